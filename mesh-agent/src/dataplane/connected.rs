//! A socket of its own for the one sender whose datagrams come in numbers and unjoined: on the port of the pair, connected to
//! the sender.
//!
//! For a datagram to an unconnected socket the kernel looks up a route and the sender's, by all policy rules of the host, of
//! which one is ours: 7 % of a machine's time at 3 Gbit/s where nothing joins datagrams. A connected one remembers the answer.
//!
//! It only receives. What we send leaves by the pair, with the route and the address of the moment. So nothing depends on
//! this socket: from a sender that roams, and at another address of ours, datagrams come to the pair again.
//!
//! Where several lanes share the port, the kernel deals the other senders among them anew when it opens: what is on its way
//! then may overtake.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{setsockopt, sockopt};

use super::io::{Ready, Received};
use super::mmsg::BatchSocket;
use super::udp::{self, BindError, Sharing};

/// Unjoined datagrams of one sender in one receive that make it busy: more than keepalives and acknowledgements.
const BUSY: usize = 16;
/// So many such receives, and nothing meanwhile from the sender that has the socket, give the socket to another.
const BUSY_RECEIVES: u32 = 32;
/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(10);

/// The socket, what watches it, and who may get it next. One thread at a time receives.
#[derive(Debug)]
pub(super) struct Connected {
    port: u16,
    mark: u32,
    /// A descriptor that stays when the socket changes.
    watch: Epoll,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    socket: Option<BatchSocket>,
    busiest: Busiest,
}

impl Connected {
    pub(super) fn new(port: u16, mark: u32) -> io::Result<Self> {
        let watch = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { port, mark, watch, state: Mutex::default() })
    }

    /// Readable when the socket is.
    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.watch.0.as_fd()
    }

    /// Receives into most of the free slots; the others are for the pair, however much comes here.
    pub(super) fn receive(&self, batch: &mut Received) -> Ready {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { socket: Some(socket), busiest } = &mut *state else { return Ready::Drained };
        let (before, free) = (batch.len(), batch.free_slots().count());
        // An error is an ICMP message about what the pair sent, which is told there too.
        let ready = socket.receive(None, free - free.div_ceil(8), batch).unwrap_or(Ready::More);
        if batch.len() > before {
            busiest.interrupt();
        }
        ready
    }

    /// Looks at what the slots from `first` on hold, which `socket` of the pair received.
    pub(super) fn note(&self, socket: &BatchSocket, batch: &Received, first: usize) {
        let Some(source) = batch.unjoined_source(first, BUSY) else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.busiest.note(source) && state.busiest.may_try(Instant::now()) {
            match self.connect(socket, source) {
                Ok(connected) => {
                    tracing::debug!(%source, "a busy sender gets a socket of its own");
                    // Closing the last one ends its watch.
                    state.socket = connected;
                }
                Err(error) => tracing::debug!(%error, %source, "a busy sender gets no socket of its own"),
            }
        }
    }

    /// Who has the socket.
    #[cfg(test)]
    pub(super) fn peer(&self) -> Option<SocketAddr> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.socket.as_ref()?.socket().peer_addr().ok()?.as_socket()
    }

    fn connect(&self, sharing: &BatchSocket, source: SocketAddr) -> Result<Option<BatchSocket>, BindError> {
        let failed = |source| BindError::Failed { port: self.port, source };
        let any = match source {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        sharing.socket().set_reuse_port(true).map_err(failed)?;
        // From here to where it is connected it gets what comes from others too: that is received like all.
        let Some(socket) = udp::open(SocketAddr::new(any, self.port), Sharing::WithOwn)? else { return Ok(None) };
        // What the pair was refused was warned of there.
        let _refused = setsockopt(&socket, sockopt::Mark, &self.mark);
        socket.connect(&source.into()).map_err(failed)?;
        self.watch.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0)).map_err(|errno| failed(errno.into()))?;
        Ok(Some(BatchSocket::new(socket, source.is_ipv4())))
    }
}

/// Which sender of the pair's is to get the socket.
#[derive(Debug, Default)]
struct Busiest {
    source: Option<SocketAddr>,
    receives: u32,
    tried: Option<Instant>,
}

impl Busiest {
    /// The sender was busy in one receive. True when it has been for long enough.
    fn note(&mut self, source: SocketAddr) -> bool {
        if self.source.replace(source) != Some(source) {
            self.receives = 0;
        }
        self.receives += 1;
        self.receives >= BUSY_RECEIVES
    }

    /// The sender that has the socket is heard.
    fn interrupt(&mut self) {
        self.receives = 0;
    }

    fn may_try(&mut self, now: Instant) -> bool {
        self.receives = 0;
        let may = self.tried.is_none_or(|tried| now.duration_since(tried) >= PAUSE);
        self.tried = if may { Some(now) } else { self.tried };
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sender(port: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, port).into()
    }

    fn receives_needed(busiest: &mut Busiest, port: u16) -> u32 {
        (1..).find(|_| busiest.note(sender(port))).expect("it comes")
    }

    #[test]
    fn the_socket_goes_to_who_is_busy_while_nobody_else_is() {
        let (mut busiest, now) = (Busiest::default(), Instant::now());
        for round in 0..BUSY_RECEIVES * 2 {
            assert!(!busiest.note(sender(1 + (round % 2) as u16)), "two are equally busy");
        }
        assert_eq!(receives_needed(&mut busiest, 3), BUSY_RECEIVES);
        assert!(busiest.may_try(now));

        for _ in 0..BUSY_RECEIVES * 2 {
            assert!(!busiest.note(sender(4)), "who has it is heard between");
            busiest.interrupt();
        }
        assert_eq!(receives_needed(&mut busiest, 4), BUSY_RECEIVES);
        assert!(!busiest.may_try(now + PAUSE / 2), "not at every turn");
        assert_eq!(receives_needed(&mut busiest, 4), BUSY_RECEIVES);
        assert!(busiest.may_try(now + PAUSE));
    }
}
