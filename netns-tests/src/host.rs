//! One host of the lab: a network namespace, held by a file descriptor.
//!
//! Invariant: no thread that lives on ever changes its namespace. Work inside a host runs in a thread that was started
//! for it and ends there, or in a child process that entered before exec.

use std::{
    fmt,
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
    sync::Arc,
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};

use crate::lab::nursery::Nursery;

/// A handle to one namespace; clones share it. The namespace dies with its last handle and its last process.
#[derive(Clone)]
pub struct Host {
    name: String,
    netns: Arc<OwnedFd>,
    inode: u64,
    nursery: Arc<Nursery>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Host({}, net:[{}])", self.name, self.inode)
    }
}

impl Host {
    /// Makes a new, empty namespace. Called by the lab, which knows the nursery for child processes.
    pub(crate) fn create(name: &str, nursery: Arc<Nursery>) -> Result<Self> {
        let netns = thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            File::open("/proc/thread-self/ns/net").context("cannot hold the new network namespace")
        })
        .join()
        .map_err(|_| anyhow!("the thread that makes the namespace of {name} panicked"))??;
        let inode = netns.metadata()?.ino();
        Ok(Self { name: name.to_owned(), netns: Arc::new(netns.into()), inode, nursery })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The number in `net:[…]` of every process that lives here.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    pub(crate) fn nursery(&self) -> &Nursery {
        &self.nursery
    }

    /// Runs `work` in a thread inside this host and waits for it. Threads that `work` starts live here too.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let netns = self.netns();
        thread::scope(|scope| {
            thread::Builder::new()
                .name(format!("in-{}", self.name))
                .spawn_scoped(scope, move || {
                    enter(netns)?;
                    work()
                })
                .context("cannot start a thread")?
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
        .with_context(|| format!("on host {}", self.name))
    }

    /// Starts `work` in a thread inside this host; the thread ends with it.
    pub fn start_inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let netns = Arc::clone(&self.netns);
        let name = self.name.clone();
        thread::Builder::new()
            .name(format!("in-{name}"))
            .spawn(move || enter(netns.as_fd()).and_then(|()| work()).with_context(|| format!("on host {name}")))
            .context("cannot start a thread")
    }

    /// Reads `/proc/sys/net/<key>` as this host sees it, for example `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        let path = Path::new("/proc/sys/net").join(key);
        self.inside(|| {
            Ok(std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?
                .trim()
                .to_owned())
        })
    }

    /// Writes `/proc/sys/net/<key>` of this host.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(key);
        self.inside(|| {
            std::fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
        })
    }
}

fn enter(netns: BorrowedFd<'_>) -> Result<()> {
    setns(netns, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")
}
