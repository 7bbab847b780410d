//! One run of qemu: no acceleration, no disk, no network, two serial lines.
//!
//! Hardware acceleration is not asked for: inside rented machines it is there and hangs as often as it works. Without it a
//! busy host would give the machine a fraction of a processor while its clock ran on, and every timeout inside would be a
//! matter of luck. So its clock counts its instructions: the same run on a slower host takes longer and sees nothing of it.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::{find::Tools, image::ENDED};

/// Lines of the console that an error shows.
const CONSOLE_LINES: usize = 15;
/// An instruction takes 2^0 ns, and time in which nothing runs is skipped. That needs all of it on one thread of the host.
const CLOCK: [&str; 6] = ["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-smp", "1"];
/// The kernel is not to test whether its timer ticks: it does not while the host has other things to do.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off no_timer_check";

#[derive(Debug)]
pub struct Machine<'a> {
    pub tools: &'a Tools,
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
    pub memory_mib: u32,
}

impl Machine<'_> {
    /// Runs until the program inside has ended; `console` is where the kernel's words are kept.
    pub fn run(&self, console: &Path, within: Duration, mut line: impl FnMut(&str)) -> Result<()> {
        let mut command = Command::new(&self.tools.qemu);
        command
            .args(CLOCK)
            .args(["-cpu", "max", "-no-reboot", "-nodefaults"])
            .args(["-display", "none", "-m", &self.memory_mib.to_string()])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", KERNEL_ARGUMENTS])
            .args(["-serial", &format!("file:{}", console.display()), "-serial", "stdio"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut qemu = Running(child.with_context(|| format!("cannot run {}", self.tools.qemu.display()))?);
        let ended = follow(&mut qemu.0, within, &mut line);
        drop(qemu);
        let text = || fs::read_to_string(console).map(|text| tail(&text)).unwrap_or_default();
        let code = ended.with_context(|| format!("the machine's console ends:\n{}", text()))?;
        ensure!(code == 0, "the program inside the machine ended with {code}; its console is {}", console.display());
        Ok(())
    }
}

/// Killed when dropped: it has nothing to save.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Passes lines on until the one that says the program ended, and gives its exit code.
fn follow(qemu: &mut Child, within: Duration, line: &mut impl FnMut(&str)) -> Result<i32> {
    let output = qemu.stdout.take().context("the output of qemu is piped")?;
    let errors = qemu.stderr.take().context("the errors of qemu are piped")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for read in BufReader::new(output).split(b'\n') {
            let Ok(read) = read else { break };
            if sender.send(String::from_utf8_lossy(&read).trim_end_matches('\r').to_owned()).is_err() {
                break;
            }
        }
    });
    let complaints = thread::spawn(move || std::io::read_to_string(errors).unwrap_or_default());
    let deadline = Instant::now() + within;
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(text) => match text.strip_prefix(ENDED) {
                Some(code) => return code.trim().parse().with_context(|| format!("{code:?} is no exit code")),
                None => line(&text),
            },
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("the machine did not finish within {within:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = qemu.wait()?;
                let said = complaints.join().unwrap_or_default();
                bail!("qemu ended with {status} before the program inside did: {}", said.trim());
            }
        }
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A shell in the place of qemu.
    fn machine(script: &str) -> (Result<i32>, Vec<String>) {
        let mut child = Running(
            Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(),
        );
        let mut seen = Vec::new();
        let code = follow(&mut child.0, Duration::from_secs(5), &mut |line| seen.push(line.to_owned()));
        (code, seen)
    }

    #[test]
    fn lines_come_back_and_the_exit_code_with_them() {
        let (code, seen) = machine(&format!("printf 'one\\r\\ntwo\\n{ENDED}3\\r\\nafter\\n'"));
        assert_eq!((code.unwrap(), seen), (3, vec!["one".to_owned(), "two".to_owned()]));
    }

    #[test]
    fn a_machine_that_ends_early_is_a_failure_with_its_words() {
        let (code, _) = machine("echo one; echo no memory >&2; exit 1");
        let error = code.unwrap_err().to_string();
        assert!(error.contains("no memory") && error.contains("before the program inside"), "{error}");
    }
}
