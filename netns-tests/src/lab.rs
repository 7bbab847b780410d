//! What one lab run owns: a machine-wide lock, a directory, its hosts and its child processes.
//!
//! Invariants
//! - One lab lives at a time on this machine (a second one waits for the lock). A thread that holds a lab must not make
//!   another. Labs beside others are the exception: they take no lock, wait for nobody and sweep nothing.
//! - Whoever holds the lock may remove every lab directory it finds, with the processes that carry its name in their
//!   environment: their owner is dead, or it would hold the lock, or the lock in its directory that says it lives beside
//!   others.
//! - All is removed at drop, also while a panic unwinds, and on SIGINT, SIGTERM and SIGHUP. After SIGKILL the kernel
//!   ends the children (parent death signal) and the namespaces, and the next lab sweeps the rest.

mod interrupt;
pub(crate) mod nursery;
pub mod sweep;

use std::{
    fs::{self, File, OpenOptions, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::{host::Host, lab::nursery::Nursery};

/// Where lab directories and the lock live: the same for every user of the machine.
pub const BASE: &str = "/tmp";
const LOCK: &str = "/tmp/meshspan-lab.lock";
/// Lab directories are this and the pid of their owner.
pub const DIR_PREFIX: &str = "meshspan-lab-";
/// Then this and a number, for a lab that lives beside others.
const BESIDE: &str = "-beside-";
/// Every child carries the directory of its lab under this name, so that a sweep finds it.
pub const ENV: &str = "MESHSPAN_LAB";

/// A running lab. Dropping it removes everything.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    hosts: Vec<Host>,
    nursery: Arc<Nursery>,
    /// The machine's, or the lab's own when it lives beside others.
    _lock: Flock<File>,
}

impl Lab {
    /// Waits for the machine's lab lock, sweeps what dead labs left, and makes the directory.
    ///
    /// Fails when namespaces cannot be made here: ask [`crate::isolation`] first.
    pub fn new() -> Result<Self> {
        let lock = take_lock()?;
        sweep::sweep_dead_labs(Path::new(BASE));
        let dir = Path::new(BASE).join(format!("{DIR_PREFIX}{}", std::process::id()));
        make_dir(&dir)?;
        Self::start(dir, lock)
    }

    /// A lab that may live beside others: for a test that spends its time waiting, not working.
    pub fn beside_others() -> Result<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("{DIR_PREFIX}{}{BESIDE}{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(BASE).join(name);
        // Under a name that nobody sweeps until it is locked.
        let unnamed = dir.with_extension("new");
        make_dir(&unnamed)?;
        let lock = sweep::stay_alive(&unnamed)?;
        fs::rename(&unnamed, &dir).with_context(|| format!("cannot make the lab directory {}", dir.display()))?;
        Self::start(dir, lock)
    }

    fn start(dir: PathBuf, lock: Flock<File>) -> Result<Self> {
        let nursery = Arc::new(Nursery::start(dir.clone())?);
        let lab = Self { dir, hosts: Vec::new(), nursery, _lock: lock };
        interrupt::guard(&lab.dir)?;
        Ok(lab)
    }

    /// The directory of this run; removed with it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes a host: lo is up, nothing is forwarded, reverse path filters are off, IPv6 addresses work at once.
    pub fn host(&mut self, name: &str) -> Result<Host> {
        let host = Host::create(name, Arc::clone(&self.nursery))?;
        for (key, value) in NEW_HOST_SYSCTLS {
            host.set_sysctl(key, value)?;
        }
        host.set_up("lo", true)?;
        self.hosts.push(host.clone());
        Ok(host)
    }

    /// Makes a host that forwards packets of both families.
    pub fn router(&mut self, name: &str) -> Result<Host> {
        let host = self.host(name)?;
        host.forward()?;
        Ok(host)
    }

    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// How a person gets a shell in each host while this process lives: (host, command).
    pub fn ways_in(&self) -> Vec<(String, String)> {
        use std::os::fd::AsRawFd;
        let pid = std::process::id();
        let user = if crate::isolation::is_rootless() {
            format!("--user --preserve-credentials --target {pid} ")
        } else {
            String::new()
        };
        self.hosts
            .iter()
            .map(|host| {
                let fd = host.netns().as_raw_fd();
                (host.name().to_owned(), format!("nsenter {user}--net=/proc/{pid}/fd/{fd}"))
            })
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.nursery.close();
        sweep::remove_lab(&self.dir);
        interrupt::release(&self.dir);
    }
}

/// Explicit, because a new namespace may inherit these from the machine.
const NEW_HOST_SYSCTLS: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/all/forwarding", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
];

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir(dir).with_context(|| format!("cannot make the lab directory {}", dir.display()))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    sweep::sign(dir)?;
    Ok(())
}

/// Sweeps dead labs now, unless a lab is alive. For a process that is about to enter a user namespace, where it could no
/// longer recognise them.
pub(crate) fn sweep_if_idle() {
    if let Some(_lock) = open_lock().ok().and_then(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()) {
        sweep::sweep_dead_labs(Path::new(BASE));
    }
}

fn take_lock() -> Result<Flock<File>> {
    let file = open_lock().with_context(|| format!("cannot open {LOCK}; remove it if another user left it"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            eprintln!("another lab is running on this machine; waiting for it to end");
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).context("cannot take the lab lock")
        }
    }
}

/// Opening without create first: in a sticky directory the kernel may refuse O_CREAT on another user's file.
fn open_lock() -> std::io::Result<File> {
    if let Ok(file) = File::open(LOCK) {
        return Ok(file);
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(LOCK)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    Ok(file)
}
