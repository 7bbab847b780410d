//! Programs that start with less than they need: no TUN device, no right to change the network.
#![allow(unsafe_code)]

use std::{io, os::unix::process::CommandExt, process::Command};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// From linux/capability.h.
const CAP_NET_ADMIN: libc::c_ulong = 12;

/// The program sees an empty `/dev/net`.
pub(crate) fn without_tun(mut command: Command) -> Command {
    // SAFETY: the closure makes system calls on constant strings and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            mount(Some("none"), "/dev/net", Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
            Ok(())
        })
    };
    command
}

/// The program is root without CAP_NET_ADMIN, as in a container that was not given it.
pub(crate) fn without_net_admin(mut command: Command) -> Command {
    // SAFETY: the closure makes one system call on numbers.
    unsafe {
        command.pre_exec(|| {
            // SAFETY: this option takes one number and touches no memory.
            let result = libc::prctl(libc::PR_CAPBSET_DROP, CAP_NET_ADMIN, 0, 0, 0);
            Errno::result(result).map(drop).map_err(io::Error::from)
        })
    };
    command
}
