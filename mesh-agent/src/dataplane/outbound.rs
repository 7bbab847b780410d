//! TUN to UDP: look up whose packet it is, cut it if it is a super-packet, seal each piece, send them.
//!
//! Packets are read until the device has no more or the batch is full, so batches form under load and a lone packet never
//! waits. They leave in the order they came, per peer. Where little goes out, the lane's other thread takes turns too.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::thread;

use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::offload::{Cut, VnetHeader, cut};
use mesh_proto::wg::{MIN_BUFFER, OVERHEAD, Sealed, Tunnel};

use super::drops::Drop;
use super::ecn::Ecn;
use super::inner::Inner;
use super::io::{DatagramSocket, MAX_BATCH, Outgoing, Packed, PacketDevice, Ready};
use super::peer::{Inside, Path, Peer};
use super::shared::{Lane, Shared, Snapshot};
use super::tun::MAX_READ;

/// A batch that holds this much takes no more.
const READ_BYTES: usize = 64 << 10;
/// So many batches in a row that hold no more than [`SMALL_BYTES`] mean that little goes out.
const SMALL_TURNS: u32 = 8;
/// A packet of the usual size, or some of the smallest.
const SMALL_BYTES: usize = 2048;
/// A batch that holds this much is one of many: a whole super-packet. What paced senders have ready at once holds less, and looks
/// for more would cost them a fifth of their CPU time for nothing.
const LARGE_BYTES: usize = 48 << 10;
/// How often the thread that carried such a batch lets others run and looks again before it sleeps. The next one is some
/// microseconds away, and to be woken for it costs the host's sender and us more than these looks.
const LOOKS: u32 = 12;
/// What a batch grows to when it is sealed: far more than packets of any usual size do.
const SEALED_BYTES: usize = 1 << 20;

/// Runs a lane until the engine stops.
pub(super) fn run<T, D, S>(shared: &Shared<T, D, S>, lane: usize)
where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let Lane { outbound: waker, outgoing, .. } = &shared.lanes[lane];
    while !shared.is_stopping() {
        let link = shared.link.load_full();
        let Some((link, device)) = link.as_ref().and_then(|link| Some((link, link.get(lane)?))) else {
            waker.wait([None; 4], None);
            continue;
        };
        let mut batch = outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = batch.turn(shared, device);
        let may_look = matches!(turn, Ok(Ready::Drained)) && batch.may_look_again();
        drop(batch);
        match turn {
            Ok(Ready::More) => {}
            Ok(Ready::Drained) if may_look => thread::yield_now(),
            Ok(Ready::Drained) => drop(waker.wait([Some(device.as_fd()), None, None, None], None)),
            Err(error) => {
                tracing::info!(%error, "the mesh link is gone; packets wait until it is made again");
                shared.lose_link(link);
            }
        }
    }
}

/// Takes a turn for the thread of a lane where little goes out. The host's answer to what just came in can wait here already,
/// while the kernel has only begun to wake that thread on an idle processor: 70 to 100 µs in a virtual machine.
pub(super) fn take_turn<T, D, S>(shared: &Shared<T, D, S>, lane: usize)
where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let link = shared.link.load();
    let device = link.as_ref().and_then(|link| link.get(lane));
    if let (Some(device), Ok(mut batch)) = (device, shared.lanes[lane].outgoing.try_lock())
        && batch.small_turns >= SMALL_TURNS
    {
        // The thread meets the same error.
        let _ready = batch.turn(shared, device);
    }
}

/// What goes out at once. One thread has it at a time, so that packets of a flow stay in order.
pub(super) struct Batch {
    packets: Packed<VnetHeader>,
    sealed: Outgoing,
    /// (slot of the peer, position in `packets`), sorted: all packets of a peer in the order they came.
    order: Vec<(u32, u32)>,
    /// Since the last that was larger; those that found nothing do not count.
    small_turns: u32,
    /// Looks that are left since the last that was large.
    looks: u32,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self {
            packets: Packed::new(READ_BYTES + MAX_READ),
            sealed: Outgoing::new(SEALED_BYTES),
            order: Vec::with_capacity(MAX_BATCH),
            small_turns: 0,
            looks: 0,
        }
    }

    /// Carries what the host has ready.
    fn turn<T, D, S>(&mut self, shared: &Shared<T, D, S>, device: &D) -> io::Result<Ready>
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        self.packets.clear();
        let ready = device.read(&mut self.packets)?;
        if !self.packets.is_empty() {
            let is_small = self.packets.used() <= SMALL_BYTES;
            self.small_turns = if is_small { self.small_turns.saturating_add(1) } else { 0 };
            self.looks = if self.packets.used() >= LARGE_BYTES { LOOKS } else { 0 };
            self.carry(shared);
        }
        Ok(ready)
    }

    /// Whether it is worth another look although there was nothing left; takes one of the looks.
    fn may_look_again(&mut self) -> bool {
        let may_look = self.looks > 0;
        self.looks = self.looks.saturating_sub(1);
        may_look
    }

    fn carry<T, D, S>(&mut self, shared: &Shared<T, D, S>)
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        let now = shared.now();
        let snapshot = shared.snapshot.load();
        self.sort(shared, &snapshot);
        self.sealed.clear();
        for group in self.order.chunk_by(|a, b| a.0 == b.0) {
            let peer = snapshot.peer(group[0].0);
            seal_all(shared, peer, &mut self.packets, group, &mut self.sealed, now);
        }
        shared.send(&self.sealed);
    }

    fn sort<T, D, S>(&mut self, shared: &Shared<T, D, S>, snapshot: &Snapshot<T>)
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        self.order.clear();
        let mut last: Option<(IpAddr, u32)> = None;
        for ((packet, _), at) in self.packets.iter().zip(0..) {
            let Some(inner) = Inner::parse(packet) else {
                shared.drops.count(Drop::OutMalformed);
                continue;
            };
            let known = last.filter(|(destination, _)| *destination == inner.destination).map(|(_, slot)| slot);
            match known.or_else(|| snapshot.allowed_ips.lookup(inner.destination).copied()) {
                Some(slot) => {
                    last = Some((inner.destination, slot));
                    self.order.push((slot, at));
                }
                None => shared.drops.count(Drop::OutNoPeer),
            }
        }
        self.order.sort_unstable();
    }
}

/// What became of a peer's packets.
#[derive(Default)]
struct Tally {
    sent: u64,
    bytes: u64,
    demand: bool,
}

fn seal_all<T, D, S>(
    shared: &Shared<T, D, S>,
    peer: &Arc<Peer<T>>,
    packets: &mut Packed<VnetHeader>,
    group: &[(u32, u32)],
    sealed: &mut Outgoing,
    now: Instant,
) where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let path = peer.path();
    let mut sealer = Sealer { path: &path, target: path.data_target(), second: path.second_target(), now };
    let mark = sealed.mark();
    let mut tally = Tally::default();
    for (_, at) in group {
        let Some((packet, header)) = packets.get_mut(*at as usize) else { continue };
        let ecn = Ecn::of_packet(packet);
        // Other threads get the tunnel between two super-packets.
        let mut inside = peer.lock();
        match cut::cut(header, packet) {
            Ok(Cut::Whole) => sealer.seal(shared, &mut inside, packet, ecn, sealed, &mut tally),
            Ok(Cut::Segments(mut segments)) => {
                while let Some(range) = segments.next(packet) {
                    sealer.seal(shared, &mut inside, &packet[range], ecn, sealed, &mut tally);
                }
            }
            Err(cut::Malformed) => shared.drops.count(Drop::OutMalformed),
        }
    }
    let targets = sealer.target.into_iter().chain(sealer.second);
    let mut inside = peer.lock();
    targets.for_each(|endpoint| inside.traffic.count_sent(endpoint, tally.sent));
    drop(inside);
    peer.used(now);
    peer.count_sent(tally.sent, tally.bytes, now);
    if path.has_relay() {
        shared.relay(&peer.key, sealed, mark);
    }
    if tally.demand && peer.note_demand(now) {
        shared.control.report(peer);
    }
}

/// Seals packets of one peer.
struct Sealer<'a> {
    path: &'a Path,
    target: Option<Endpoint>,
    second: Option<Endpoint>,
    now: Instant,
}

impl Sealer<'_> {
    #[inline]
    fn seal<T, D, S>(
        &mut self,
        shared: &Shared<T, D, S>,
        inside: &mut Inside<T>,
        packet: &[u8],
        ecn: Ecn,
        sealed: &mut Outgoing,
        tally: &mut Tally,
    ) where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        let Some(spare) = sealed.spare((packet.len() + OVERHEAD).max(MIN_BUFFER)) else {
            return shared.drops.count(Drop::OutNotSealed);
        };
        match (inside.tunnel.seal(packet, spare, self.now), &self.target) {
            (Sealed::Data(datagram), Some(target)) => {
                let len = datagram.len();
                sealed.push_each(len, [target].into_iter().chain(&self.second), ecn);
                tally.sent += 1;
                tally.bytes += packet.len() as u64;
            }
            (Sealed::Data(_), None) => {
                shared.drops.count(Drop::OutNoEndpoint);
                tally.demand = true;
            }
            (Sealed::Handshake(initiation), _) => {
                let len = initiation.len();
                sealed.push_each(len, &self.path.handshake_targets(), Ecn::NotCapable);
                tally.demand = true;
            }
            (Sealed::Queued, _) => tally.demand = true,
            (Sealed::Dropped(_), _) => shared.drops.count(Drop::OutNotSealed),
        }
    }
}
