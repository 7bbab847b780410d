//! Ending and removing what a lab left: processes that carry its name in their environment, and its directory.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    isolation::is_rootless,
    lab::{BESIDE, DIR_PREFIX, ENV},
    wait,
};

/// Longest wait for killed processes to go.
const KILL_WITHIN: Duration = Duration::from_secs(5);

/// A file in each lab directory that names the owner's user namespace.
const USER_NAMESPACE: &str = "user-namespace";

/// Locked for as long as a lab lives that takes no lock of the machine.
const ALIVE: &str = "alive";

/// Removes every dead lab under `base`. Only for the holder of the lab lock, which proves that their owners ended.
///
/// From inside a user namespace the processes of a lab in another one cannot be recognised; such a lab is left to the
/// user's own first process, which can look into all of them.
pub fn sweep_dead_labs(base: &Path) {
    for dir in labs_under(base) {
        let is_ours = !is_rootless() || fs::read_to_string(dir.join(USER_NAMESPACE)).ok() == own_user_namespace();
        if is_ours && !is_alive(&dir) {
            remove_lab(&dir);
        }
    }
}

/// Says in a new lab directory who can sweep it.
pub(crate) fn sign(dir: &Path) -> std::io::Result<()> {
    fs::write(dir.join(USER_NAMESPACE), own_user_namespace().unwrap_or_default())
}

/// Says that this lab lives, to whoever sweeps, until the lock is dropped.
pub(crate) fn stay_alive(dir: &Path) -> Result<Flock<File>> {
    let file = File::create(dir.join(ALIVE))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno).context("cannot lock a new file")
}

fn is_alive(dir: &Path) -> bool {
    File::open(dir.join(ALIVE)).is_ok_and(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err())
}

fn own_user_namespace() -> Option<String> {
    Some(fs::read_link("/proc/self/ns/user").ok()?.to_string_lossy().into_owned())
}

/// Kills the processes of one lab and removes its directory. What another user owns stays; nothing fails.
pub fn remove_lab(dir: &Path) {
    let _ = wait::until_true("the processes of a lab to end", KILL_WITHIN, || {
        let pids = processes_of(dir);
        for pid in &pids {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        Ok(pids.is_empty())
    });
    let _ = fs::remove_dir_all(dir);
}

/// Living processes that were started by the lab in `dir`, or by their children. Zombies have no environment left.
pub fn processes_of(dir: &Path) -> Vec<Pid> {
    let mark = format!("{ENV}={}", dir.display());
    let own = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|pair| pair == mark.as_bytes()))
        })
        .map(|pid| Pid::from_raw(pid.cast_signed()))
        .collect()
}

fn labs_under(base: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(base) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_prefix(DIR_PREFIX))
                .and_then(|name| name.split(BESIDE).next())
                .is_some_and(|pid| pid.parse::<u32>().is_ok())
        })
        .map(|entry| entry.path())
        .collect()
}
