//! What a kernel tells of changes to a host's network, whoever made them: links and their settings, addresses, routes,
//! rules, nftables. Each is stamped when it was heard.
//!
//! Left out: neighbours, which come and go by themselves. Invariant: a change that was not heard is an error of the monitor,
//! never a silent gap.

use std::{
    fmt,
    io::{self, ErrorKind},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{RouteNetlinkMessage, route::RouteMessage};
use netlink_sys::{
    Socket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{setsockopt, sockopt},
};

use crate::{
    host::Host,
    link::{destination, table_of},
};

/// Links, addresses, routes, rules and settings (`netconf`) of both families.
const ROUTE_GROUPS: [u32; 9] = [1, 5, 7, 8, 9, 11, 19, 24, 25];
const NFTABLES_GROUPS: [u32; 1] = [7];
/// Room for tens of thousands of changes that the monitor has not read yet.
const BUFFER_BYTES: usize = 64 << 20;
/// Slice of waiting; the stop sign is looked at in between.
const LOOK: Duration = Duration::from_millis(20);
const HEADER: usize = 16;

/// One message of the kernel.
#[derive(Debug, Clone)]
pub struct Change {
    /// When it was heard.
    pub at: Instant,
    pub what: What,
}

#[derive(Debug, Clone)]
pub enum What {
    Network(Box<RouteNetlinkMessage>),
    /// Of a link's settings, or of a kind that is not understood: its number.
    Other(u16),
    /// Its number among nftables' messages.
    Nftables(u16),
}

/// Hears until it is stopped or dropped.
#[derive(Debug)]
pub struct Monitor {
    host: String,
    stop: Arc<AtomicBool>,
    changes: Arc<Mutex<Vec<Change>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Monitor {
    /// When this returns, every later change is heard.
    pub fn start(host: &Host) -> Result<Self> {
        let sockets = host.inside(|| {
            let mut sockets = vec![open(NETLINK_ROUTE, &ROUTE_GROUPS)?];
            match open(NETLINK_NETFILTER, &NFTABLES_GROUPS) {
                Ok(socket) => sockets.push(socket),
                // Then there is no nftables to change.
                Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {}
                Err(error) => return Err(error.into()),
            }
            Ok(sockets)
        });
        let sockets = sockets.context("cannot hear of changes by netlink")?;
        let stop = Arc::new(AtomicBool::new(false));
        let changes = Arc::new(Mutex::new(Vec::new()));
        let thread = host.start_inside({
            let (stop, changes) = (Arc::clone(&stop), Arc::clone(&changes));
            move || hear(&sockets, &stop, &changes)
        })?;
        Ok(Self { host: host.name().to_owned(), stop, changes, thread: Some(thread) })
    }

    /// What was heard so far, less the first `known` changes.
    pub fn after(&self, known: usize) -> Result<Vec<Change>> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            bail!("the monitor of {} ended: what it missed is unknown", self.host);
        }
        Ok(lock(&self.changes).get(known..).unwrap_or_default().to_vec())
    }

    /// Hears what the kernel has told by now, ends, and gives everything in order.
    pub fn stop(mut self) -> Result<Vec<Change>> {
        self.join()?;
        Ok(std::mem::take(&mut lock(&self.changes)))
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the monitor of {} panicked", self.host))?,
            None => Ok(()),
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

impl What {
    /// A route that was added or replaced (`true`), or deleted.
    pub fn route(&self) -> Option<(bool, &RouteMessage)> {
        match self {
            Self::Network(message) => match message.as_ref() {
                RouteNetlinkMessage::NewRoute(route) => Some((true, route)),
                RouteNetlinkMessage::DelRoute(route) => Some((false, route)),
                _ => None,
            },
            _ => None,
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((added, route)) = self.route() {
            let verb = if added { "set" } else { "deleted" };
            let kind = route.header.kind;
            return match destination(route) {
                Some(to) => write!(f, "route to {to} ({kind:?}) in table {} {verb}", table_of(route)),
                None => write!(f, "route ({kind:?}) in table {} {verb}", table_of(route)),
            };
        }
        match self {
            Self::Network(message) => f.write_str(match message.as_ref() {
                RouteNetlinkMessage::NewLink(_) => "link set",
                RouteNetlinkMessage::DelLink(_) => "link deleted",
                RouteNetlinkMessage::NewAddress(_) => "address set",
                RouteNetlinkMessage::DelAddress(_) => "address deleted",
                RouteNetlinkMessage::NewRule(_) => "rule set",
                RouteNetlinkMessage::DelRule(_) => "rule deleted",
                _ => "something changed",
            }),
            Self::Other(kind) => write!(f, "rtnetlink message {kind}"),
            Self::Nftables(kind) => write!(f, "nftables message {kind}"),
        }
    }
}

fn open(protocol: isize, groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    // More than the host's limit where this process may; a buffer that is too small is an error when it is full.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER_BYTES)?;
    }
    groups.iter().try_for_each(|group| socket.add_membership(*group))?;
    Ok(socket)
}

fn hear(sockets: &[Socket], stop: &AtomicBool, changes: &Mutex<Vec<Change>>) -> Result<()> {
    let look = PollTimeout::try_from(LOOK).context("a short time")?;
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        for (index, socket) in sockets.iter().enumerate() {
            loop {
                match socket.recv_from_full() {
                    Ok((datagram, _)) => {
                        let at = Instant::now();
                        let heard = read(&datagram, index == 0)?;
                        lock(changes).extend(heard.into_iter().map(|what| Change { at, what }));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error).context("changes were missed"),
                }
            }
        }
        if stopping {
            return Ok(());
        }
        let mut waiting: Vec<PollFd<'_>> =
            sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut waiting, look) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for changes"),
        }
    }
}

fn read(mut rest: &[u8], is_route: bool) -> Result<Vec<What>> {
    let mut heard = Vec::new();
    while let Some(header) = rest.first_chunk::<HEADER>() {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let message = rest.get(..length).filter(|_| length >= HEADER).context("a message that was cut off")?;
        heard.push(match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
            _ if !is_route => What::Nftables(kind),
            Ok(NetlinkMessage { payload: NetlinkPayload::InnerMessage(message), .. }) => {
                What::Network(Box::new(message))
            }
            _ => What::Other(kind),
        });
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(heard)
}

fn lock(changes: &Mutex<Vec<Change>>) -> MutexGuard<'_, Vec<Change>> {
    changes.lock().unwrap_or_else(PoisonError::into_inner)
}
