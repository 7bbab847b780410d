//! What control and the threads share.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_common::allowed_ips::AllowedIps;
use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::wg::Tunnel;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::drops::{Drop, Drops};
use super::engine::Clock;
use super::index::IndexTable;
use super::io::{ANY_READABLE, DatagramSocket, Descriptors, Outgoing, PacketDevice, Readable};
use super::outbound;
use super::peer::Peer;
use super::queues::Queues;

/// How long a thread waits for the kernel's send buffer before it drops.
const SEND_PATIENCE: Duration = Duration::from_millis(100);

/// Judges a datagram.
type Filter = Box<dyn Fn(&[u8]) -> bool + Send + Sync>;

pub(super) struct Shared<T, D, S> {
    pub(super) clock: Clock,
    pub(super) snapshot: ArcSwap<Snapshot<T>>,
    /// A queue of the link for each lane; `None` while the link is gone.
    pub(super) link: ArcSwapOption<Vec<D>>,
    /// One for each lane, all on one port. The first sends for all of them.
    pub(super) sockets: Vec<S>,
    pub(super) lanes: Vec<Lane>,
    pub(super) drops: Drops,
    pub(super) control: Queues<T>,
    /// [`TunnelFactory::is_for_us`](super::tunnel::TunnelFactory::is_for_us).
    pub(super) is_for_us: Filter,
    pub(super) link_lost: AtomicBool,
    stop: AtomicBool,
}

/// A thread for each direction, with a queue of the link and a socket of its own.
pub(super) struct Lane {
    pub(super) outbound: Waker,
    pub(super) inbound: Waker,
    pub(super) outgoing: Mutex<outbound::Batch>,
}

/// What the threads know of peers, replaced as a whole.
#[derive(Debug)]
pub(super) struct Snapshot<T> {
    pub(super) peers: Vec<Arc<Peer<T>>>,
    pub(super) by_index: IndexTable,
    /// To positions in `peers`.
    pub(super) allowed_ips: AllowedIps<u32>,
}

impl<T> Default for Snapshot<T> {
    fn default() -> Self {
        Self { peers: Vec::new(), by_index: IndexTable::default(), allowed_ips: AllowedIps::default() }
    }
}

impl<T> Snapshot<T> {
    pub(super) fn peer(&self, slot: u32) -> &Arc<Peer<T>> {
        &self.peers[slot as usize]
    }
}

impl<T: Tunnel + 'static, D: PacketDevice, S: DatagramSocket> Shared<T, D, S> {
    pub(super) fn new(link: Option<Vec<D>>, sockets: Vec<S>, clock: Clock, is_for_us: Filter) -> io::Result<Self> {
        let lane = |_| {
            let outgoing = Mutex::new(outbound::Batch::new());
            Ok(Lane { outbound: Waker::new()?, inbound: Waker::new()?, outgoing })
        };
        Ok(Self {
            clock,
            snapshot: ArcSwap::default(),
            link: ArcSwapOption::from_pointee(link),
            lanes: sockets.iter().map(lane).collect::<io::Result<_>>()?,
            sockets,
            drops: Drops::default(),
            control: Queues::default(),
            is_for_us,
            link_lost: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        })
    }

    pub(super) fn sender(&self) -> &S {
        self.sockets.first().expect("there is a lane")
    }

    pub(super) fn now(&self) -> Instant {
        (self.clock)()
    }

    /// Sends from a data thread, which may wait for the kernel. What goes over relays is for [`Self::relay`].
    pub(super) fn send(&self, batch: &Outgoing) {
        self.send_within(batch, SEND_PATIENCE);
    }

    pub(super) fn send_within(&self, batch: &Outgoing, patience: Duration) {
        if !batch.is_empty() {
            self.drops.add(Drop::OutNotSent, self.sender().send(batch, patience));
        }
    }

    /// Hands control those of a batch's datagrams since `mark` that go to `peer` over a relay.
    pub(super) fn relay(&self, peer: &WgPublicKey, batch: &Outgoing, mark: usize) {
        let relayed = batch.since(mark).filter_map(|(datagram, to)| match to {
            Endpoint::Relay(server) => Some((server, datagram)),
            Endpoint::Direct(_) | Endpoint::Extra(..) => None,
        });
        let mut relayed = relayed.peekable();
        if relayed.peek().is_some() {
            self.drops.add(Drop::OutRelayQueueFull, self.control.queue_relayed(peer, relayed));
        }
    }

    /// Takes a dead link out of use, unless control has replaced it already.
    pub(super) fn lose_link(&self, dead: &Arc<Vec<D>>) {
        let found = self.link.compare_and_swap(dead, None);
        if found.as_ref().is_some_and(|found| Arc::ptr_eq(found, dead)) {
            self.link_lost.store(true, Ordering::Release);
            self.control.notify.notify_one();
        }
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        for lane in &self.lanes {
            lane.outbound.wake();
            lane.inbound.wake();
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// Gets a thread out of its poll.
#[derive(Debug)]
pub(super) struct Waker(EventFd);

impl Waker {
    fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?))
    }

    pub(super) fn wake(&self) {
        // The only failure is a counter at its limit, and then the thread is awake.
        let _full = self.0.write(1);
    }

    /// Waits until one of `descriptors` is readable or broken, somebody wakes, or `limit` has passed. Gives which are.
    pub(super) fn wait(&self, descriptors: Descriptors<'_>, limit: Option<Duration>) -> Readable {
        let waker = self.0.as_fd();
        // A descriptor that is missing is stood in for by the waker's own.
        let [first, second, third, fourth] = descriptors.map(|descriptor| descriptor.unwrap_or(waker));
        let mut polled = [waker, first, second, third, fourth].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let limit = limit.map_or(PollTimeout::NONE, |limit| PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX));
        if poll(&mut polled, limit).is_err() {
            return ANY_READABLE;
        }
        let [woken, readable @ ..] = polled.map(|fd| fd.any().unwrap_or(true));
        if woken {
            let _woken = self.0.read();
        }
        readable
    }
}
