//! May this process make network namespaces? As root yes; without root through a user namespace, where allowed.
//!
//! Tests ask [`enter_or_skip`]; programs ask [`enter_program`] before they start a thread. Both give a typed reason when
//! neither way is open, with the command that helps.
#![allow(unsafe_code)]

use std::{
    fs,
    io::{self, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
    unistd::{getegid, geteuid},
};

/// Set in a copy of the program that runs inside its own user namespace.
const ROOTLESS: &str = "MESHSPAN_LAB_ROOTLESS";
/// A file that the copy makes to prove that it reached the test.
const PROOF: &str = "MESHSPAN_LAB_PROOF";
/// `1` turns a skipped test into a failed one.
pub const STRICT: &str = "MESHSPAN_STRICT";

/// Why there can be no lab here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    #[error("no right to make network namespaces ({0})")]
    Namespaces(Errno),
    #[error("the kernel has no IPv6")]
    NoIpv6,
    #[error("the kernel cannot make a {0} link: {1}")]
    NoLinkKind(&'static str, String),
    #[error("/dev/net/tun cannot be opened: {0}")]
    NoTun(String),
}

impl Unavailable {
    /// The command that helps.
    pub fn help(&self) -> &'static str {
        match self {
            Self::Namespaces(_) => {
                "run as root, or allow user namespaces: sysctl -w user.max_user_namespaces=10000 kernel.apparmor_restrict_unprivileged_userns=0"
            }
            Self::NoIpv6 => "boot without ipv6.disable=1",
            Self::NoLinkKind(..) => "modprobe -a veth bridge",
            Self::NoTun(_) => "modprobe tun; mkdir -p /dev/net; mknod /dev/net/tun c 10 200; chmod 0666 /dev/net/tun",
        }
    }
}

/// What a test does after [`enter_or_skip`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Entry {
    /// Namespaces can be made in this process: run the test.
    Inside,
    /// The test ran in a copy of the test program, or was skipped: return.
    Handled,
}

/// Lets a test run, runs it in a copy inside a user namespace, or prints `SKIPPED name: the command that helps`.
///
/// `name` is the test's full path in its test program (`module::test`). Under `MESHSPAN_STRICT=1` a skip is a panic.
pub fn enter_or_skip(name: &str) -> Entry {
    enter_or_skip_with(name, &[])
}

/// The same; `env` is added for the copy.
pub fn enter_or_skip_with(name: &str, env: &[(&str, PathBuf)]) -> Entry {
    let why = match available() {
        Ok(()) => {
            if let Some(proof) = std::env::var_os(PROOF) {
                fs::write(proof, name).expect("the directory of the proof was made by the parent");
            }
            return Entry::Inside;
        }
        Err(why) => why,
    };
    if matches!(why, Unavailable::Namespaces(_)) && !is_rootless() {
        match run_test_copy(name, env) {
            Ok(true) => return Entry::Handled,
            Ok(false) => panic!("{name} failed in its copy inside a user namespace"),
            Err(_) => {}
        }
    }
    skip(name, &why.to_string(), why.help())
}

/// Prints the skip line for a test, or panics under `MESHSPAN_STRICT=1`.
pub fn skip(name: &str, why: &str, help: &str) -> Entry {
    assert!(std::env::var_os(STRICT).is_none_or(|value| value != "1"), "{name} cannot run here: {why}; {help}");
    // Past libtest's capture, which would hide the line of a passing test.
    let _ = writeln!(io::stderr(), "SKIPPED {name}: {help} ({why})");
    Entry::Handled
}

/// For a program: returns when namespaces can be made here, or replaces the process by itself inside a user namespace.
///
/// Must be called before the program starts a thread. `env` is added for the copy.
pub fn enter_program(env: &[(&str, PathBuf)]) -> Result<(), Unavailable> {
    let why = match available() {
        Ok(()) => return Ok(()),
        Err(why) => why,
    };
    if !matches!(why, Unavailable::Namespaces(_)) || is_rootless() {
        return Err(why);
    }
    crate::lab::sweep_if_idle();
    let maps = IdMaps::of_this_user();
    maps.enter().map_err(|_| why.clone())?;
    let Ok(program) = std::env::current_exe() else {
        return Err(why);
    };
    let _ = Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(ROOTLESS, "1")
        .envs(env.iter().map(|(key, value)| (key, value)))
        .exec();
    Err(why)
}

/// Can this process make namespaces with the links that the lab needs?
pub fn available() -> Result<(), Unavailable> {
    if !Path::new("/proc/sys/net/ipv6").exists() {
        return Err(Unavailable::NoIpv6);
    }
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(Unavailable::Namespaces)?;
        crate::link::can_make_links().map_err(|(kind, error)| Unavailable::NoLinkKind(kind, error))
    })
    .join()
    .unwrap_or(Err(Unavailable::Namespaces(Errno::EAGAIN)))
}

/// Can the agents open the TUN device? Asked by whoever starts agents.
pub fn tun_available() -> Result<(), Unavailable> {
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map(drop)
        .map_err(|error| Unavailable::NoTun(error.to_string()))
}

/// Does this process run inside a user namespace that the lab made?
pub fn is_rootless() -> bool {
    std::env::var_os(ROOTLESS).is_some()
}

/// `Ok(passed)`, or an error when no copy could be run in a user namespace.
fn run_test_copy(name: &str, env: &[(&str, PathBuf)]) -> Result<bool> {
    crate::lab::sweep_if_idle();
    let scratch = tempfile::tempdir()?;
    let proof = scratch.path().join("entered");
    let maps = IdMaps::of_this_user();
    let program = std::env::current_exe()?;
    let path = path_of_test(&program, name)?;
    let mut command = Command::new(program);
    command
        .args([&*path, "--exact", "--nocapture"])
        .env(ROOTLESS, "1")
        .env(PROOF, &proof)
        .envs(env.iter().map(|(key, value)| (key, value)));
    // SAFETY: after fork the child has one thread; `enter` makes system calls on prepared strings.
    unsafe { command.pre_exec(move || maps.enter()) };
    let status = command.status().context("cannot run a copy in a user namespace")?;
    anyhow::ensure!(
        proof.exists() || !status.success(),
        "the copy of the test program could not enter, or does not ask there for {name}"
    );
    Ok(status.success())
}

/// The test of this name with the modules it is in, as libtest wants to hear it.
fn path_of_test(program: &Path, name: &str) -> Result<String> {
    let listed =
        Command::new(program).args(["--list", "--format", "terse"]).output().context("cannot list the tests")?;
    let listed = String::from_utf8(listed.stdout).context("the list of tests is no text")?;
    let paths = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    let mut named = paths.filter(|path| path.rsplit("::").next() == Some(name));
    match (named.next(), named.next()) {
        (Some(path), None) => Ok(path.to_owned()),
        (None, _) => anyhow::bail!("this program has no test {name}"),
        (Some(one), Some(other)) => anyhow::bail!("{one} and {other} have one name"),
    }
}

/// Maps this user to root of a new user namespace. Strings are made before any fork.
struct IdMaps {
    uid: String,
    gid: String,
}

impl IdMaps {
    fn of_this_user() -> Self {
        Self { uid: format!("0 {} 1\n", geteuid()), gid: format!("0 {} 1\n", getegid()) }
    }

    fn enter(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", &self.uid)?;
        fs::write("/proc/self/gid_map", &self.gid)
    }
}
