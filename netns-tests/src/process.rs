//! One program running inside a host: its output in files, its end awaited with a deadline.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{host::Host, wait};

/// Longest a command that answers and ends may take.
const COMMAND_WITHIN: Duration = Duration::from_secs(20);
/// Lines of a log that an error shows.
const LOG_LINES: usize = 15;

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    what: String,
}

/// How a command that was run to its end answered.
#[derive(Debug)]
pub struct Answer {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Process {
    /// Starts `command` inside `host`; its output goes to `log_stem`.out and `.err`, appended.
    ///
    /// The child sees only PATH, `MESHSPAN_LOG` and `RUST_BACKTRACE` of this process's environment, and what `command` sets.
    pub fn start(host: &Host, mut command: Command, log_stem: &Path) -> Result<Self> {
        let what = command.get_program().to_string_lossy().rsplit('/').next().unwrap_or_default().to_owned();
        let (stdout, stderr) = (log_stem.with_extension("out"), log_stem.with_extension("err"));
        command.stdin(Stdio::null()).stdout(append(&stdout)?).stderr(append(&stderr)?);
        clean_environment(&mut command);
        let child = host
            .nursery()
            .spawn(command, host.netns().try_clone_to_owned()?)
            .with_context(|| format!("{what} on {}", host.name()))?;
        Ok(Self { child, stdout, stderr, what })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("cannot send {signal} to {}", self.what))
    }

    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Ends the program at once, as a crash would, and reaps it.
    pub fn crash(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for the program to end by itself.
    pub fn ended(&mut self, within: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.what);
        Ok(wait::until(&what, within, || Ok(self.child.try_wait()?))?.0)
    }

    /// SIGTERM, then waits for the end.
    pub fn terminate(&mut self, within: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.ended(within)
    }

    pub fn stdout(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.stdout)?)
    }

    /// Adds the end of the program's log to an error, for a person who asks why.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let text = fs::read_to_string(&self.stderr).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join(
                "
",
            );
            anyhow!(
                "{error:#}
the log of {} ends:
{tail}",
                self.what
            )
        })
    }

    /// An error that says so when the program is not running.
    pub fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}", self.what);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command inside `host` to its end. `scratch` holds its output while it runs.
pub fn run(host: &Host, program: &Path, args: &[&OsStr], scratch: &Path) -> Result<Answer> {
    let mut command = Command::new(program);
    command.args(args);
    run_command(host, command, scratch)
}

/// The same for a command that the caller has prepared.
pub fn run_command(host: &Host, command: Command, scratch: &Path) -> Result<Answer> {
    let stem = tempfile::Builder::new().prefix("command-").tempdir_in(scratch)?;
    let mut process = Process::start(host, command, &stem.path().join("answer"))?;
    let status = process.ended(COMMAND_WITHIN)?;
    Ok(Answer { status, stdout: fs::read_to_string(&process.stdout)?, stderr: fs::read_to_string(&process.stderr)? })
}

impl Answer {
    /// The standard output of a command that must succeed.
    pub fn success(self) -> Result<String> {
        ensure!(self.status.success(), "ended with {}: {}", self.status, self.stderr.trim());
        Ok(self.stdout)
    }
}

fn append(path: &Path) -> Result<File> {
    File::options().create(true).append(true).open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn clean_environment(command: &mut Command) {
    let own: Vec<_> = command.get_envs().filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned()))).collect();
    command.env_clear().envs(own);
    for key in ["PATH", "MESHSPAN_LOG", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(key) {
            command.env(key, value);
        }
    }
}
