//! UDP sockets beside the main pair, each on a port of its own: many while ports are guessed, then the few that hit.
//!
//! All are watched by one epoll descriptor, which the inbound thread polls like a socket. The data threads load the set once
//! a batch; one that was closed lives until they have let go of it.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use arc_swap::{ArcSwap, Guard};
use mesh_proto::device::{Family, SocketId};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::mmsg::BatchSocket;

/// Sockets that one look tells of; the others are told of by the next.
const MAX_READY: usize = 32;

#[derive(Debug)]
pub(crate) struct ExtraSockets {
    epoll: Epoll,
    open: ArcSwap<BTreeMap<SocketId, Arc<BatchSocket>>>,
    last: AtomicU16,
    mark: u32,
}

impl ExtraSockets {
    /// Sockets will carry this firewall mark.
    pub(crate) fn new(mark: u32) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, open: ArcSwap::default(), last: AtomicU16::new(0), mark })
    }

    /// Readable when one of the sockets is.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    pub(crate) fn load(&self) -> Guard<Arc<BTreeMap<SocketId, Arc<BatchSocket>>>> {
        self.open.load()
    }

    /// Opens as many as it can: fewer than `count` where descriptors or memory run out. Only for the control thread.
    pub(crate) fn open(&self, family: Family, count: u16) -> Vec<SocketId> {
        let mut all = BTreeMap::clone(&self.open.load());
        let mut opened = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            let id = loop {
                let id = SocketId(self.last.fetch_add(1, Ordering::Relaxed));
                if !all.contains_key(&id) {
                    break id;
                }
            };
            match self.open_one(family, id) {
                Ok(socket) => {
                    all.insert(id, Arc::new(socket));
                    opened.push(id);
                }
                Err(error) => {
                    tracing::warn!(%error, opened = opened.len(), "not all sockets could be opened");
                    break;
                }
            }
        }
        self.open.store(Arc::new(all));
        opened
    }

    /// Only for the control thread.
    pub(crate) fn close(&self, closed: &[SocketId]) {
        let mut all = BTreeMap::clone(&self.open.load());
        for id in closed {
            if let Some(socket) = all.remove(id) {
                // It fails only for what is not watched.
                let _not_watched = self.epoll.delete(&*socket);
            }
        }
        self.open.store(Arc::new(all));
    }

    /// Sockets with something to receive.
    pub(crate) fn ready(&self) -> impl Iterator<Item = (SocketId, Arc<BatchSocket>)> {
        let mut events = [EpollEvent::empty(); MAX_READY];
        let open = self.open.load();
        let count =
            if open.is_empty() { 0 } else { self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or_default() };
        events.into_iter().take(count).filter_map(move |event| {
            let id = SocketId(u16::try_from(event.data()).ok()?);
            Some((id, Arc::clone(open.get(&id)?)))
        })
    }

    fn open_one(&self, family: Family, id: SocketId) -> io::Result<BatchSocket> {
        let address: SocketAddr = match family {
            Family::V4 => (Ipv4Addr::UNSPECIFIED, 0).into(),
            Family::V6 => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // What the main pair was refused was warned of there.
        let _refused = setsockopt(&socket, sockopt::Mark, &self.mark);
        socket.bind(&address.into())?;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, u64::from(id.0)))?;
        Ok(BatchSocket::new(socket, address.is_ipv4()))
    }
}
