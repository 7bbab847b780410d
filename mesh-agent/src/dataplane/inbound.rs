//! UDP to TUN: find the tunnel by receiver index, open, check the inner source, hand to the host.
//!
//! Only transport data is opened here. Handshake messages, probes and STUN go to control over bounded queues.

use std::io::IoSlice;
use std::net::IpAddr;
use std::time::Duration;

use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::offload::Coalescer;
use mesh_proto::offload::coalesce::MAX_SEGMENTS;
use mesh_proto::wg::{DropReason, MIN_BUFFER, OVERHEAD, Opened, Tunnel};
use mesh_proto::wire::demux::{Datagram, WireGuardKind, classify};

use super::drops::Drop;
use super::ecn::{Ecn, mark_congestion};
use super::index;
use super::inner::Inner;
use super::io::{ANY_READABLE, DatagramSocket, MAX_BATCH, MAX_PACKET, Outgoing, Packed, PacketDevice, Ready, Received};
use super::outbound;
use super::peer::{Inside, Peer, Source};
use super::queues::MAX_CONTROL_DATAGRAM;
use super::shared::{Shared, Snapshot};

/// Pause after the socket failed, so that a lasting failure does not take a core.
const ERROR_PAUSE: Duration = Duration::from_millis(50);
/// Room for packets that were queued while there was no session.
const FLUSH_BYTES: usize = 8 * (MAX_PACKET + 1);
/// Datagrams that are opened before others get the tunnel: what one receive brings of one sender at most.
const OPEN_AT_ONCE: usize = 64;

/// Runs a lane until the engine stops.
pub(super) fn run<T, D, S>(shared: &Shared<T, D, S>, lane: usize)
where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let mut batch = Batch::new(lane);
    let (socket, waker) = (&shared.sockets[lane], &shared.lanes[lane].inbound);
    let mut readable = ANY_READABLE;
    while !shared.is_stopping() {
        match socket.receive(readable, &mut batch.received) {
            Ok(ready) => {
                if !batch.received.is_empty() {
                    batch.carry(shared);
                    if batch.opened.len() == 1 {
                        outbound::take_turn(shared, lane);
                    }
                }
                readable = match ready {
                    Ready::Drained => waker.wait(socket.descriptors(), None),
                    Ready::More => ANY_READABLE,
                };
            }
            Err(_) => {
                shared.drops.count(Drop::InSocketError);
                waker.wait([None; 4], Some(ERROR_PAUSE));
                readable = ANY_READABLE;
            }
        }
    }
}

struct Batch {
    lane: usize,
    received: Received,
    opened: Packed<()>,
    coalescer: Coalescer,
    flushed: Outgoing,
    /// Sorted: all datagrams of a peer in the order they came.
    order: Vec<Place>,
}

/// A datagram of `received`, for the peer in slot `slot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    slot: u32,
    start: u32,
    len: u32,
}

impl Batch {
    fn new(lane: usize) -> Self {
        Self {
            lane,
            received: Received::default(),
            opened: Packed::new(MAX_BATCH * (MAX_PACKET + 1)),
            coalescer: Coalescer::default(),
            flushed: Outgoing::new(FLUSH_BYTES),
            order: Vec::with_capacity(MAX_BATCH),
        }
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
        self.opened.clear();
        self.flushed.clear();
        for group in self.order.chunk_by(|a, b| a.slot == b.slot) {
            for places in group.chunks(OPEN_AT_ONCE) {
                let datagrams = places.iter().map(|place| self.received.get(place.start as usize, place.len as usize));
                let datagrams = datagrams.map(|(datagram, arrival)| (datagram, Source::Direct(*arrival), arrival.ecn));
                let place = (&**snapshot, group[0].slot);
                open_all(shared, place, datagrams, &mut self.opened, &mut self.flushed, now);
            }
        }
        deliver(shared, self.lane, &mut self.opened, &mut self.coalescer);
        shared.send(&self.flushed);
    }

    fn sort<T, D, S>(&mut self, shared: &Shared<T, D, S>, snapshot: &Snapshot<T>)
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        self.order.clear();
        let mut unknown = 0;
        let mut last: Option<(u32, u32)> = None;
        for (datagram, source, start) in self.received.iter() {
            match classify(datagram) {
                Datagram::WireGuard(kind @ WireGuardKind::Data) => {
                    let Some(index) = index::receiver(kind, datagram) else { continue };
                    let known = last.filter(|(last, _)| *last == index).map(|(_, slot)| slot);
                    match known.or_else(|| snapshot.by_index.slot(index)) {
                        Some(slot) => {
                            last = Some((index, slot));
                            self.order.push(Place { slot, start: start as u32, len: datagram.len() as u32 });
                        }
                        None => shared.drops.count(Drop::InUnknownIndex),
                    }
                }
                Datagram::WireGuard(kind) => {
                    if let Some(why) = why_not_handshake(shared, snapshot, kind, datagram) {
                        shared.drops.count(why);
                    } else if !shared.control.queue_handshake(kind, *source, datagram) {
                        shared.drops.count(Drop::HandshakeQueueFull);
                    }
                }
                kind @ (Datagram::Probe | Datagram::Stun) if datagram.len() <= MAX_CONTROL_DATAGRAM => {
                    if !shared.control.queue_datagram(source.endpoint(), datagram) {
                        let is_probe = kind == Datagram::Probe;
                        shared.drops.count(if is_probe { Drop::ProbeQueueFull } else { Drop::StunQueueFull });
                    }
                }
                Datagram::Probe | Datagram::Stun | Datagram::Unknown => unknown += 1,
            }
        }
        shared.drops.add(Drop::InUnknown, unknown);
        self.order.sort_unstable();
    }
}

/// Why control need not see a handshake message. Checks that are cheaper than a place in its queue, and keep junk from taking
/// those of genuine messages.
fn why_not_handshake<T, D, S>(
    shared: &Shared<T, D, S>,
    snapshot: &Snapshot<T>,
    kind: WireGuardKind,
    datagram: &[u8],
) -> Option<Drop> {
    if kind == WireGuardKind::Initiation {
        return (!(shared.is_for_us)(datagram)).then_some(Drop::HandshakeInvalid);
    }
    let slot = index::receiver(kind, datagram).and_then(|index| snapshot.by_index.slot(index));
    slot.is_none().then_some(Drop::HandshakeUnexpected)
}

/// Hands opened packets to the host by the queue of this lane, joined as far as it takes them so.
pub(super) fn deliver<T, D, S>(
    shared: &Shared<T, D, S>,
    lane: usize,
    opened: &mut Packed<()>,
    coalescer: &mut Coalescer,
) where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    if opened.is_empty() {
        return;
    }
    let link = shared.link.load();
    let Some(device) = link.as_ref().and_then(|link| link.get(lane)) else {
        return shared.drops.add(Drop::InNotDelivered, opened.len());
    };
    let accepts = device.offloads().accepts();
    coalescer.clear();
    let (block, packets) = opened.parts();
    packets.for_each(|packet| coalescer.add(block, packet, accepts));
    coalescer.finish(block);
    let mut lost = 0;
    for (header, count, parts) in coalescer.iter(block) {
        let mut slices = [IoSlice::new(&[]); MAX_SEGMENTS];
        let used = slices.iter_mut().zip(parts).map(|(slice, part)| *slice = IoSlice::new(part)).count();
        if !device.write(header, &slices[..used]) {
            lost += count;
        }
    }
    shared.drops.add(Drop::InNotDelivered, lost);
}

/// Opens data of one peer: packets to `opened`, what had waited for the session to `flushed`.
pub(super) fn open_all<'d, T, D, S>(
    shared: &Shared<T, D, S>,
    (snapshot, slot): (&Snapshot<T>, u32),
    datagrams: impl Iterator<Item = (&'d [u8], Source, Ecn)>,
    opened: &mut Packed<()>,
    flushed: &mut Outgoing,
    now: Instant,
) where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let peer = snapshot.peer(slot);
    let (mut packets, mut bytes) = (0, 0);
    // The last source that was good, and where authentic datagrams came from, how many.
    let mut allowed: Option<IpAddr> = None;
    let mut authentic: Option<(Endpoint, u64)> = None;
    let mut inside = peer.lock();
    let Inside { tunnel, traffic } = &mut *inside;
    for (datagram, source, ecn) in datagrams {
        let Some(spare) = opened.spare(datagram.len().max(MIN_BUFFER)) else {
            shared.drops.count(Drop::InNotDelivered);
            continue;
        };
        let result = tunnel.open(datagram, source.limited_as(), spare, now);
        if matches!(result, Opened::Packet(_) | Opened::Keepalive) {
            let from = source.endpoint();
            match &mut authentic {
                Some((endpoint, count)) if *endpoint == from => *count += 1,
                other => {
                    if let Some((endpoint, count)) = other.replace((from, 1)) {
                        traffic.count_received(endpoint, count);
                    }
                }
            }
        }
        match result {
            Opened::Packet(packet) => {
                let len = packet.len();
                let is_allowed = |source| allowed == Some(source) || snapshot.allowed_ips.lookup(source) == Some(&slot);
                match Inner::parse(packet) {
                    Some(inner) if is_allowed(inner.source) => {
                        allowed = Some(inner.source);
                        if ecn == Ecn::Met {
                            opened.spare(len).into_iter().for_each(mark_congestion);
                        }
                        opened.push(len, ());
                        packets += 1;
                        bytes += len as u64;
                    }
                    Some(_) => {
                        peer.count_foreign_source();
                        shared.drops.count(Drop::InForeignSource);
                    }
                    None => shared.drops.count(Drop::InMalformed),
                }
            }
            Opened::Keepalive => {}
            Opened::Dropped(reason) => shared.drops.count(match reason {
                DropReason::Replayed => Drop::InReplayed,
                DropReason::NoSession => Drop::InNoSession,
                DropReason::Invalid | DropReason::ShortBuffer | DropReason::UnderLoad => Drop::InInvalid,
            }),
            // Data is never answered.
            Opened::Reply(_) | Opened::Established(_) => shared.drops.count(Drop::InInvalid),
        }
    }
    let Some((source, count)) = authentic else { return };
    traffic.count_received(source, count);
    let established = peer.note_handshake(tunnel, source, now);
    flush(&mut inside, peer, source, flushed, now);
    drop(inside);
    peer.used(now);
    peer.count_received(packets, bytes, now);
    let roamed = peer.note_source(source, now);
    if established || roamed {
        shared.control.report(peer);
    }
}

/// Takes out what waited for a session, as far as there is room; the rest comes with the next batch.
pub(super) fn flush<T: Tunnel>(
    inside: &mut Inside<T>,
    peer: &Peer<T>,
    target: Endpoint,
    flushed: &mut Outgoing,
    now: Instant,
) {
    let (mut packets, mut bytes) = (0, 0);
    while let Some(datagram) = flushed.spare(MAX_PACKET + OVERHEAD).and_then(|spare| inside.tunnel.flush(spare, now)) {
        let len = datagram.len();
        flushed.push(len, target);
        packets += 1;
        bytes += len.saturating_sub(OVERHEAD) as u64;
    }
    inside.traffic.count_sent(target, packets);
    peer.count_sent(packets, bytes, now);
}
