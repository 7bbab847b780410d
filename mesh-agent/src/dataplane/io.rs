//! The shapes in which packets come and go: whole batches in memory that is reused.
//!
//! [`PacketDevice`] and [`DatagramSocket`] are all that the threads know of TUN and UDP. Neither ever blocks; who wants to
//! wait polls the descriptors.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use mesh_proto::device::{Endpoint, Family, SocketId};
use mesh_proto::offload::VnetHeader;

use super::ecn::Ecn;
use super::offloads::{DeviceOffloads, SocketOffloads};

/// Packets of the host in one batch, and buffers that one receive fills.
pub const MAX_BATCH: usize = 64;
/// The largest inner packet and the largest datagram.
pub(super) const MAX_PACKET: usize = 65_535;
/// Datagrams that one send may carry to one destination: what every kernel with UDP_SEGMENT takes.
const MAX_RUN: usize = 64;
/// Their bytes: the largest IPv4 packet without its headers.
const MAX_RUN_BYTES: usize = 65_535 - 20 - 8;
/// What one batch of received datagrams aims at: it, and what is opened of it, stay in a core's second level cache. A batch
/// of whole slots would be 4 MiB, and each of its bytes would come from memory three times.
const RECEIVE_BYTES: usize = 128 << 10;
/// Slots that a batch has at least: one for each family of addresses.
const MIN_SLOTS: usize = 2;
/// Room for one receive. An odd number of cache lines, so that slots do not compete for the same cache sets.
const SLOT: usize = 65_536 + 64;

/// Where inner packets come from and go to: the TUN device.
pub trait PacketDevice: AsFd + Send + Sync + 'static {
    /// Adds what the host has ready, until the batch is full or the host has no more: then it says [`Ready::Drained`]. An
    /// error means that the link is gone.
    fn read(&self, batch: &mut Packed<VnetHeader>) -> io::Result<Ready>;

    /// Hands one packet to the host, given in parts (at most one more than [`mesh_proto::offload::coalesce::MAX_SEGMENTS`]).
    /// False when the host did not take it.
    fn write(&self, header: VnetHeader, parts: &[IoSlice<'_>]) -> bool;

    /// What the host leaves to us and takes from us.
    fn offloads(&self) -> DeviceOffloads;
}

/// Where datagrams come from and go to: the pair of UDP sockets.
pub trait DatagramSocket: Send + Sync + 'static {
    /// What to poll for datagrams: one descriptor a family, one for all sockets beside the pair, one for the connected socket.
    fn descriptors(&self) -> Descriptors<'_>;

    /// Takes what has arrived at these of the descriptors, at most a batch, in place of what `batch` held.
    fn receive(&self, readable: Readable, batch: &mut Received) -> io::Result<Ready>;

    /// Sends all datagrams with a UDP address and says how many of them did not leave; relayed ones are not its own. Waits up
    /// to `patience` for a full send buffer.
    fn send(&self, batch: &Outgoing, patience: Duration) -> usize;

    /// Sends one datagram, if it may with this many hops at most, and never waits. False when it did not leave.
    fn send_one(&self, to: Endpoint, datagram: &[u8], ttl: Option<u8>) -> bool;

    /// Opens sockets beside the pair, as many of `count` as it can.
    fn open_extra(&self, family: Family, count: u16) -> Vec<SocketId>;

    fn close_extra(&self, closed: &[SocketId]);

    /// How the kernel takes and gives datagrams.
    fn offloads(&self) -> SocketOffloads;
}

/// What a socket polls.
pub type Descriptors<'a> = [Option<BorrowedFd<'a>>; 4];

/// Which of the descriptors may have something.
pub(super) type Readable = [bool; 4];

pub(super) const ANY_READABLE: Readable = [true; 4];

/// Whether there is more to take at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Perhaps.
    More,
    /// There was nothing left.
    Drained,
}

/// Where a datagram came from, and to which socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// `None` = the main pair.
    pub socket: Option<SocketId>,
    pub source: SocketAddr,
    /// What the underlay says of congestion.
    pub ecn: Ecn,
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
        Self { socket: None, source, ecn: Ecn::NotCapable }
    }
}

/// A batch of packets that grows by appending into one block.
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
        self.push_from(0, len, meta);
    }

    /// The same, where the item begins after `skip` bytes.
    pub fn push_from(&mut self, skip: usize, len: usize, meta: M) {
        let end = (self.used + len).min(self.bytes.len());
        self.items.push(((self.used + skip).min(end)..end, meta));
        self.used = end;
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Bytes of all items.
    pub fn used(&self) -> usize {
        self.used
    }

    pub fn get_mut(&mut self, at: usize) -> Option<(&mut [u8], M)> {
        self.items.get(at).map(|(range, meta)| (&mut self.bytes[range.clone()], *meta))
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], M)> {
        self.items.iter().map(|(range, meta)| (&self.bytes[range.clone()], *meta))
    }

    /// The block, and where in it the items lie.
    pub(super) fn parts(&mut self) -> (&mut [u8], impl Iterator<Item = Range<usize>>) {
        (&mut self.bytes, self.items.iter().map(|(range, _)| range.clone()))
    }
}

/// Datagrams to send, in one block. Those that lie side by side, go to one destination and are of one length (the last may
/// be shorter) are a run, which the kernel can take whole.
#[derive(Debug)]
pub struct Outgoing {
    bytes: Box<[u8]>,
    used: usize,
    runs: Vec<Run>,
}

/// Side by side in the block: datagrams of `segment` bytes each, the last may be shorter.
#[derive(Debug, Clone)]
struct Run {
    range: Range<usize>,
    segment: usize,
    count: usize,
    to: Endpoint,
    ecn: Ecn,
}

impl Run {
    /// Whether a datagram of this length can follow.
    fn takes(&self, len: usize) -> bool {
        let is_even = self.range.len() == self.count * self.segment;
        is_even && len <= self.segment && self.count < MAX_RUN && self.range.len() + len <= MAX_RUN_BYTES
    }

    fn datagram(&self, number: usize) -> Range<usize> {
        let start = self.range.start + number * self.segment;
        start..(start + self.segment).min(self.range.end)
    }
}

/// The datagrams of a run.
#[derive(Debug, Clone, Copy)]
pub struct RunOf<'a> {
    pub bytes: &'a [u8],
    /// Of each but the last.
    pub segment: usize,
    pub count: usize,
    pub to: Endpoint,
    pub ecn: Ecn,
}

impl<'a> RunOf<'a> {
    pub fn datagrams(self) -> impl Iterator<Item = &'a [u8]> {
        self.bytes.chunks(self.segment.max(1))
    }
}

impl Outgoing {
    /// `capacity` in bytes; memory is not touched before it is used.
    pub fn new(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity].into_boxed_slice(), used: 0, runs: Vec::with_capacity(MAX_BATCH) }
    }

    pub fn clear(&mut self) {
        self.used = 0;
        self.runs.clear();
    }

    /// Room for one more datagram of up to `len` bytes; `None` when the block is full.
    pub fn spare(&mut self, len: usize) -> Option<&mut [u8]> {
        self.bytes.get_mut(self.used..self.used.checked_add(len)?)
    }

    /// Adds what was written to the first `len` bytes of the spare room.
    pub fn push(&mut self, len: usize, to: Endpoint) {
        self.push_each(len, [&to], Ecn::NotCapable);
    }

    /// The same bytes to each destination, stored once.
    pub fn push_each<'e>(&mut self, len: usize, all: impl IntoIterator<Item = &'e Endpoint>, ecn: Ecn) {
        let start = self.used;
        let end = (start + len).min(self.bytes.len());
        for to in all {
            // Runs of the same bytes to several destinations grow side by side.
            let mut newest = self.runs.iter_mut().rev().take_while(|run| run.range.end >= start);
            match newest.find(|run| run.range.end == start && run.to == *to && run.ecn == ecn) {
                Some(run) if run.takes(len) => {
                    run.range.end = end;
                    run.count += 1;
                }
                _ => self.runs.push(Run { range: start..end, segment: len, count: 1, to: *to, ecn }),
            }
        }
        self.used = end;
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// A mark for [`Self::since`].
    pub fn mark(&self) -> usize {
        self.used
    }

    /// The datagrams that were pushed since the mark, with their destinations.
    pub fn since(&self, mark: usize) -> impl Iterator<Item = (&[u8], Endpoint)> {
        let newer = self.runs.iter().filter(move |run| run.range.end > mark);
        newer.flat_map(move |run| {
            let datagrams = (0..run.count).map(|number| run.datagram(number));
            datagrams.filter(move |range| range.start >= mark).map(|range| (&self.bytes[range], run.to))
        })
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], Endpoint)> {
        self.since(0)
    }

    pub fn runs(&self) -> impl Iterator<Item = RunOf<'_>> {
        self.runs.iter().map(|run| RunOf {
            bytes: &self.bytes[run.range.clone()],
            segment: run.segment,
            count: run.count,
            to: run.to,
            ecn: run.ecn,
        })
    }
}

/// A batch of received datagrams: slots of equal size, each with one datagram or with many of one length and one source that
/// the kernel joined.
#[derive(Debug)]
pub struct Received {
    bytes: Box<[u8]>,
    slots: Vec<Slot>,
    /// Slots to fill at most, by what the last batch held.
    most: usize,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    len: usize,
    /// Of each datagram but the last.
    segment: usize,
    arrival: Arrival,
}

impl Default for Received {
    fn default() -> Self {
        let bytes = vec![0; MAX_BATCH * SLOT].into_boxed_slice();
        Self { bytes, slots: Vec::with_capacity(MAX_BATCH), most: MAX_BATCH }
    }
}

impl Received {
    /// Empties it for the next batch, which may have as many slots as those of the last one suggest.
    pub fn clear(&mut self) {
        if let Some(mean) = self.total().checked_div(self.slots.len()) {
            let fitting = RECEIVE_BYTES / mean.max(1);
            self.most = fitting.min(self.slots.len() * 4).clamp(MIN_SLOTS, MAX_BATCH);
        }
        self.slots.clear();
    }

    /// The free slots, in the order in which [`Self::push`] fills them.
    pub fn free_slots(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes.chunks_exact_mut(SLOT).take(self.most).skip(self.slots.len())
    }

    /// Says that the first free slot holds `len` bytes: datagrams of `segment` bytes, the last may be shorter.
    pub fn push(&mut self, len: usize, segment: usize, arrival: Arrival) {
        let len = len.min(SLOT);
        self.slots.push(Slot { len, segment: if segment == 0 { len } else { segment }, arrival });
    }

    /// Slots in use.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Who sent all that the slots from `first` on hold, if they are `count` at least and each holds one datagram.
    pub(super) fn unjoined_source(&self, first: usize, count: usize) -> Option<SocketAddr> {
        let slots = &self.slots[first..];
        let source = slots.first()?.arrival.source;
        let is_alike = |slot: &Slot| slot.len == slot.segment && slot.arrival.source == source;
        (slots.len() >= count && slots.iter().all(is_alike)).then_some(source)
    }

    fn total(&self) -> usize {
        self.slots.iter().map(|slot| slot.len).sum()
    }

    /// Every datagram in the order they came, with its slot's arrival, and where it lies.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &Arrival, usize)> {
        self.slots.iter().enumerate().flat_map(move |(at, slot)| {
            let start = at * SLOT;
            let bytes = &self.bytes[start..start + slot.len];
            // An empty datagram is one too.
            let empty = bytes.is_empty().then_some((bytes, &slot.arrival, start));
            let datagrams = bytes.chunks(slot.segment.max(1)).enumerate();
            datagrams
                .map(move |(number, datagram)| (datagram, &slot.arrival, start + number * slot.segment))
                .chain(empty)
        })
    }

    /// The datagram of `len` bytes that lies at `start`, both as [`Self::iter`] gave them.
    pub fn get(&self, start: usize, len: usize) -> (&[u8], &Arrival) {
        (&self.bytes[start..start + len], &self.slots[start / SLOT].arrival)
    }
}
