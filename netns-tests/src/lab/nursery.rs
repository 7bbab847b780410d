//! The thread that starts every child process of a lab.
//!
//! The parent death signal fires when the *thread* that forked ends, so children must not be forked by a short-lived one.
#![allow(unsafe_code)]

use std::{
    fmt, io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, Command},
    sync::{
        Mutex, PoisonError,
        mpsc::{Sender, channel},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl, signal::Signal},
    unistd::{Pid, getpid, getppid},
};

use crate::lab::ENV;

type Order = (Command, OwnedFd, Sender<io::Result<Child>>);

pub(crate) struct Nursery {
    dir: PathBuf,
    thread: Mutex<Option<(Sender<Order>, JoinHandle<()>)>>,
}

impl fmt::Debug for Nursery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nursery({})", self.dir.display())
    }
}

impl Nursery {
    pub(crate) fn start(dir: PathBuf) -> Result<Self> {
        let (orders, inbox) = channel::<Order>();
        let thread = thread::Builder::new()
            .name("lab-nursery".into())
            .spawn(move || {
                for (mut command, netns, reply) in inbox {
                    let _ = reply.send(spawn_inside(&mut command, netns));
                }
            })
            .context("cannot start the thread for child processes")?;
        Ok(Self { dir, thread: Mutex::new(Some((orders, thread))) })
    }

    /// Starts `command` inside `netns`, marked as a child of this lab. It dies with the lab, whatever ends the lab.
    pub(crate) fn spawn(&self, mut command: Command, netns: OwnedFd) -> Result<Child> {
        command.env(ENV, &self.dir);
        let (reply, answer) = channel();
        {
            let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
            let (orders, _) = thread.as_ref().context("the lab has ended")?;
            orders.send((command, netns, reply)).ok().context("the thread for child processes ended")?;
        }
        answer.recv().context("the thread for child processes ended")?.context("cannot start the process")
    }

    /// Ends the thread and with it, by their death signal, the children.
    pub(crate) fn close(&self) {
        let taken = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((orders, thread)) = taken {
            drop(orders);
            let _ = thread.join();
        }
    }
}

fn spawn_inside(command: &mut Command, netns: OwnedFd) -> io::Result<Child> {
    let parent: Pid = getpid();
    // Ctrl-C in a terminal reaches the lab only, which then ends its children itself.
    command.process_group(0);
    // SAFETY: between fork and exec the closure makes three system calls and allocates nothing; it owns `netns`.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid() != parent {
                return Err(io::Error::other("the lab ended"));
            }
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            Ok(())
        });
    }
    command.spawn()
}
