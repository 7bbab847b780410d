//! The shapes in which packets come and go: whole batches in memory that is reused.
//!
//! [`PacketDevice`] and [`DatagramSocket`] are all that the threads know of TUN and UDP. Neither ever blocks; who wants to
//! wait polls the descriptors.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use mesh_proto::device::{Endpoint, Family, SocketId};

/// Packets or datagrams in one batch.
pub const MAX_BATCH: usize = 64;
/// The largest inner packet and the largest datagram.
pub(super) const MAX_PACKET: usize = 65_535;
/// Room for one received datagram. An odd number of cache lines, so that slots do not compete for the same cache sets.
const SLOT: usize = 65_536 + 64;

/// Where inner packets come from and go to: the TUN device.
pub trait PacketDevice: AsFd + Send + Sync + 'static {
    /// Adds what the host has ready, until the batch is full, and says how many. An error means that the link is gone.
    fn read(&self, batch: &mut Packed<()>) -> io::Result<usize>;

    /// Hands all packets to the host and says how many it took.
    fn write(&self, batch: &Packed<()>) -> usize;
}

/// Where datagrams come from and go to: the pair of UDP sockets.
pub trait DatagramSocket: Send + Sync + 'static {
    /// What to poll for datagrams: one descriptor a family, and one for all sockets beside the pair.
    fn descriptors(&self) -> [Option<BorrowedFd<'_>>; 3];

    /// Takes what has arrived, at most a batch, in place of what `batch` held.
    fn receive(&self, batch: &mut Received) -> io::Result<()>;

    /// Sends all datagrams with a UDP address and says how many of them did not leave; relayed ones are not its own. Waits up
    /// to `patience` for a full send buffer.
    fn send(&self, batch: &Packed<Endpoint>, patience: Duration) -> usize;

    /// Sends one datagram, if it may with this many hops at most, and never waits. False when it did not leave.
    fn send_one(&self, to: Endpoint, datagram: &[u8], ttl: Option<u8>) -> bool;

    /// Opens sockets beside the pair, as many of `count` as it can.
    fn open_extra(&self, family: Family, count: u16) -> Vec<SocketId>;

    fn close_extra(&self, closed: &[SocketId]);
}

/// Where a datagram came from, and to which socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// `None` = the main pair.
    pub socket: Option<SocketId>,
    pub source: SocketAddr,
}

impl Arrival {
    pub fn endpoint(self) -> Endpoint {
        match self.socket {
            Some(socket) => Endpoint::Extra(socket, self.source),
            None => Endpoint::Direct(self.source),
        }
    }
}

impl From<SocketAddr> for Arrival {
    fn from(source: SocketAddr) -> Self {
        Self { socket: None, source }
    }
}

/// A batch that grows by appending into one block: packets, or datagrams with their destination.
#[derive(Debug)]
pub struct Packed<M> {
    bytes: Box<[u8]>,
    used: usize,
    items: Vec<(Range<usize>, M)>,
}

impl<M: Copy> Packed<M> {
    /// `capacity` in bytes; memory is not touched before it is used.
    pub fn new(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity].into_boxed_slice(), used: 0, items: Vec::with_capacity(MAX_BATCH) }
    }

    pub fn clear(&mut self) {
        self.used = 0;
        self.items.clear();
    }

    /// Room for one more item of up to `len` bytes; `None` when the block is full.
    pub fn spare(&mut self, len: usize) -> Option<&mut [u8]> {
        self.bytes.get_mut(self.used..self.used.checked_add(len)?)
    }

    /// Adds what was written to the first `len` bytes of the spare room.
    pub fn push(&mut self, len: usize, meta: M) {
        self.push_each(len, [meta]);
    }

    /// The same bytes once for each `meta`, stored once.
    pub fn push_each(&mut self, len: usize, metas: impl IntoIterator<Item = M>) {
        let end = (self.used + len).min(self.bytes.len());
        self.items.extend(metas.into_iter().map(|meta| (self.used..end, meta)));
        self.used = end;
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub fn get(&self, at: usize) -> Option<&[u8]> {
        self.items.get(at).map(|(range, _)| &self.bytes[range.clone()])
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], M)> {
        self.items.iter().map(|(range, meta)| (&self.bytes[range.clone()], *meta))
    }
}

/// A batch of received datagrams in slots of equal size.
#[derive(Debug)]
pub struct Received {
    bytes: Box<[u8]>,
    items: Vec<(usize, Arrival)>,
}

impl Default for Received {
    fn default() -> Self {
        Self { bytes: vec![0; MAX_BATCH * SLOT].into_boxed_slice(), items: Vec::with_capacity(MAX_BATCH) }
    }
}

impl Received {
    pub fn clear(&mut self) {
        self.items.clear();
    }

    /// The free slots, in the order in which [`Self::push`] fills them.
    pub fn free_slots(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes.chunks_exact_mut(SLOT).skip(self.items.len())
    }

    /// Says that the first free slot holds a datagram of `len` bytes.
    pub fn push(&mut self, len: usize, arrival: Arrival) {
        self.items.push((len.min(SLOT), arrival));
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub fn get(&self, at: usize) -> (&[u8], Arrival) {
        match self.items.get(at) {
            Some((len, arrival)) => (&self.bytes[at * SLOT..at * SLOT + len], *arrival),
            None => (&[], SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into()),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], Arrival)> {
        (0..self.len()).map(|at| self.get(at))
    }
}
