//! TUN to UDP: look up whose packet it is, seal it, send it.
//!
//! Packets are read until the device has no more or the batch is full, so batches form under load and a lone packet never
//! waits. They leave in the order they came, per peer.

use std::iter;
use std::os::fd::AsFd;
use std::sync::Arc;

use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::wg::{MIN_BUFFER, OVERHEAD, Sealed, Tunnel};

use super::drops::Drop;
use super::inner::Inner;
use super::io::{DatagramSocket, MAX_BATCH, MAX_PACKET, Packed, PacketDevice};
use super::peer::Peer;
use super::shared::{Shared, Snapshot};

/// Bytes read at once: 64 packets of the usual size, or a few of the largest.
const READ_BYTES: usize = 4 * (MAX_PACKET + 1);

/// Runs until the engine stops.
pub(super) fn run<T, D, S>(shared: &Shared<T, D, S>)
where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let mut batch = Batch::new();
    while !shared.is_stopping() {
        let Some(device) = shared.device.load_full() else {
            shared.outbound_waker.wait(&[], None);
            continue;
        };
        batch.packets.clear();
        match device.read(&mut batch.packets) {
            Ok(0) => shared.outbound_waker.wait(&[Some(device.as_fd())], None),
            Ok(_) => batch.carry(shared),
            Err(error) => {
                tracing::info!(%error, "the mesh link is gone; packets wait until it is made again");
                shared.lose_link(&device);
            }
        }
    }
}

struct Batch {
    packets: Packed<()>,
    sealed: Packed<Endpoint>,
    /// (slot of the peer, position in `packets`), sorted: all packets of a peer in the order they came.
    order: Vec<(u32, u32)>,
}

impl Batch {
    fn new() -> Self {
        Self {
            packets: Packed::new(READ_BYTES),
            sealed: Packed::new(READ_BYTES + MAX_BATCH * MIN_BUFFER),
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
        self.sealed.clear();
        for group in self.order.chunk_by(|a, b| a.0 == b.0) {
            let peer = snapshot.peer(group[0].0);
            let packets = group.iter().filter_map(|(_, at)| self.packets.get(*at as usize));
            seal_all(shared, peer, packets, &mut self.sealed, now);
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
        for ((packet, ()), at) in self.packets.iter().zip(0..) {
            let Some(inner) = Inner::parse(packet) else {
                shared.drops.count(Drop::OutMalformed);
                continue;
            };
            match snapshot.allowed_ips.lookup(inner.destination) {
                Some(slot) => self.order.push((*slot, at)),
                None => shared.drops.count(Drop::OutNoPeer),
            }
        }
        self.order.sort_unstable();
    }
}

fn seal_all<'p, T, D, S>(
    shared: &Shared<T, D, S>,
    peer: &Arc<Peer<T>>,
    packets: impl Iterator<Item = &'p [u8]>,
    sealed: &mut Packed<Endpoint>,
    now: Instant,
) where
    T: Tunnel + 'static,
    D: PacketDevice,
    S: DatagramSocket,
{
    let path = peer.path();
    let (target, second) = (path.data_target(), path.second_target());
    let first = sealed.len();
    let (mut sent, mut bytes, mut demand) = (0, 0, false);
    let mut inside = peer.lock();
    for packet in packets {
        let Some(spare) = sealed.spare((packet.len() + OVERHEAD).max(MIN_BUFFER)) else {
            shared.drops.count(Drop::OutNotSealed);
            continue;
        };
        match (inside.tunnel.seal(packet, spare, now), target) {
            (Sealed::Data(datagram), Some(target)) => {
                let len = datagram.len();
                sealed.push_each(len, iter::once(target).chain(second));
                sent += 1;
                bytes += packet.len() as u64;
            }
            (Sealed::Data(_), None) => {
                shared.drops.count(Drop::OutNoEndpoint);
                demand = true;
            }
            (Sealed::Handshake(initiation), _) => {
                let len = initiation.len();
                sealed.push_each(len, path.handshake_targets());
                demand = true;
            }
            (Sealed::Queued, _) => demand = true,
            (Sealed::Dropped(_), _) => shared.drops.count(Drop::OutNotSealed),
        }
    }
    target.into_iter().chain(second).for_each(|endpoint| inside.traffic.count_sent(endpoint, sent));
    drop(inside);
    peer.used(now);
    peer.count_sent(sent, bytes, now);
    if path.has_relay() {
        shared.relay(&peer.key, sealed, first);
    }
    if demand && peer.note_demand(now) {
        shared.control.report(peer);
    }
}
