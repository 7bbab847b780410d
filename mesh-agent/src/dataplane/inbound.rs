//! UDP to TUN: find the tunnel by receiver index, open, check the inner source, hand to the host.
//!
//! Only transport data is opened here. Handshake messages, probes and STUN go to control over bounded queues.

use std::time::Duration;

use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::wg::{DropReason, MIN_BUFFER, OVERHEAD, Opened, Tunnel};
use mesh_proto::wire::demux::{Datagram, WireGuardKind, classify};

use super::drops::Drop;
use super::index;
use super::inner::Inner;
use super::io::{DatagramSocket, MAX_BATCH, MAX_PACKET, Packed, PacketDevice, Received};
use super::peer::{Inside, Peer, Source};
use super::queues::MAX_CONTROL_DATAGRAM;
use super::shared::{Shared, Snapshot};

/// Pause after the socket failed, so that a lasting failure does not take a core.
const ERROR_PAUSE: Duration = Duration::from_millis(50);
/// Room for packets that were queued while there was no session.
const FLUSH_BYTES: usize = 8 * (MAX_PACKET + 1);

/// Runs until the engine stops.
pub(super) fn run<T, D, S>(shared: &Shared<T, D, S>)
where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let mut batch = Batch::new();
    while !shared.is_stopping() {
        match shared.socket.receive(&mut batch.received) {
            Ok(()) if batch.received.is_empty() => shared.inbound_waker.wait(&shared.socket.descriptors(), None),
            Ok(()) => batch.carry(shared),
            Err(_) => {
                shared.drops.count(Drop::InSocketError);
                shared.inbound_waker.wait(&[], Some(ERROR_PAUSE));
            }
        }
    }
}

struct Batch {
    received: Received,
    opened: Packed<()>,
    flushed: Packed<Endpoint>,
    /// (slot of the peer, position in `received`), sorted: all datagrams of a peer in the order they came.
    order: Vec<(u32, u32)>,
}

impl Batch {
    fn new() -> Self {
        Self {
            received: Received::default(),
            opened: Packed::new(MAX_BATCH * (MAX_PACKET + 1)),
            flushed: Packed::new(FLUSH_BYTES),
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
        for group in self.order.chunk_by(|a, b| a.0 == b.0) {
            let datagrams = group.iter().map(|(_, at)| self.received.get(*at as usize));
            let datagrams = datagrams.map(|(datagram, source)| (datagram, Source::Direct(source)));
            let place = (&**snapshot, group[0].0);
            open_all(shared, place, datagrams, &mut self.opened, &mut self.flushed, now);
        }
        deliver(shared, &self.opened);
        shared.send(&self.flushed);
    }

    fn sort<T, D, S>(&mut self, shared: &Shared<T, D, S>, snapshot: &Snapshot<T>)
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        self.order.clear();
        for ((datagram, source), at) in self.received.iter().zip(0..) {
            match classify(datagram) {
                Datagram::WireGuard(WireGuardKind::Data) => {
                    match index::read(datagram, 4).and_then(|index| snapshot.by_index.slot(index)) {
                        Some(slot) => self.order.push((slot, at)),
                        None => shared.drops.count(Drop::InUnknownIndex),
                    }
                }
                Datagram::WireGuard(kind) => {
                    if !shared.control.queue_handshake(kind, source, datagram) {
                        shared.drops.count(Drop::HandshakeQueueFull);
                    }
                }
                kind @ (Datagram::Probe | Datagram::Stun) if datagram.len() <= MAX_CONTROL_DATAGRAM => {
                    if !shared.control.queue_datagram(source.endpoint(), datagram) {
                        let is_probe = kind == Datagram::Probe;
                        shared.drops.count(if is_probe { Drop::ProbeQueueFull } else { Drop::StunQueueFull });
                    }
                }
                Datagram::Probe | Datagram::Stun | Datagram::Unknown => shared.drops.count(Drop::InUnknown),
            }
        }
        self.order.sort_unstable();
    }
}

/// Hands opened packets to the host.
pub(super) fn deliver<T, D, S>(shared: &Shared<T, D, S>, opened: &Packed<()>)
where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    if !opened.is_empty() {
        let taken = shared.device.load().as_ref().map_or(0, |device| device.write(opened));
        shared.drops.add(Drop::InNotDelivered, opened.len().saturating_sub(taken));
    }
}

/// Opens data of one peer: packets to `opened`, what had waited for the session to `flushed`.
pub(super) fn open_all<'d, T, D, S>(
    shared: &Shared<T, D, S>,
    (snapshot, slot): (&Snapshot<T>, u32),
    datagrams: impl Iterator<Item = (&'d [u8], Source)>,
    opened: &mut Packed<()>,
    flushed: &mut Packed<Endpoint>,
    now: Instant,
) where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let peer = snapshot.peer(slot);
    let (mut packets, mut bytes) = (0, 0);
    let mut authentic = None;
    let mut inside = peer.lock();
    let Inside { tunnel, traffic } = &mut *inside;
    for (datagram, source) in datagrams {
        let Some(spare) = opened.spare(datagram.len().max(MIN_BUFFER)) else {
            shared.drops.count(Drop::InNotDelivered);
            continue;
        };
        let result = tunnel.open(datagram, source.limited_as(), spare, now);
        if matches!(result, Opened::Packet(_) | Opened::Keepalive) {
            traffic.count_received(source.endpoint());
            authentic = Some(source.endpoint());
        }
        match result {
            Opened::Packet(packet) => {
                let len = packet.len();
                match Inner::parse(packet) {
                    Some(inner) if snapshot.allowed_ips.lookup(inner.source) == Some(&slot) => {
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
    let Some(source) = authentic else { return };
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
    flushed: &mut Packed<Endpoint>,
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
