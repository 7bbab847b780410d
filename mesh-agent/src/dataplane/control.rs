//! The control thread's part of moving datagrams: handshakes, timers, and all that relays carry.

use std::iter;
use std::sync::Arc;
use std::time::Duration;

use mesh_common::id::ServerId;
use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;
use mesh_proto::offload::Coalescer;
use mesh_proto::wg::{DropReason, MIN_BUFFER, OVERHEAD, Opened, Tunnel};
use mesh_proto::wire::demux::{Datagram, WireGuardKind, classify};

use super::drops::Drop;
use super::ecn::Ecn;
use super::inbound::{deliver, flush, open_all};
use super::index;
use super::io::{DatagramSocket, MAX_PACKET, Outgoing, Packed, PacketDevice};
use super::peer::{Peer, Source};
use super::queues::HandshakeMessage;
use super::shared::Shared;
use super::table::PeerTable;
use super::tunnel::{Refused, TunnelFactory};

/// Control hands packets to the host by the queue of this lane.
const FIRST_LANE: usize = 0;
/// What a tunnel queues at most, 256 packets of the usual size.
const OUT_BYTES: usize = 8 * (MAX_PACKET + 1);

/// Sends what control itself sends. It never waits for the kernel: the event loop runs on this thread.
pub(super) struct Outbox {
    datagrams: Outgoing,
    /// What was opened of relayed data.
    opened: Packed<()>,
    coalescer: Coalescer,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            datagrams: Outgoing::new(OUT_BYTES),
            opened: Packed::new(MAX_PACKET + 1),
            coalescer: Coalescer::default(),
        }
    }

    /// Sends all, where it goes over a relay to `peer`.
    fn send<T, D, S>(&mut self, shared: &Shared<T, D, S>, peer: Option<&WgPublicKey>)
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        shared.send_within(&self.datagrams, Duration::ZERO);
        if let Some(peer) = peer {
            shared.relay(peer, &self.datagrams, 0);
        }
        self.datagrams.clear();
    }

    /// Starts a handshake with everybody a peer may be behind. False when nobody is known.
    pub(super) fn start_handshake<T, D, S>(&mut self, shared: &Shared<T, D, S>, peer: &Peer<T>, now: Instant) -> bool
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        let targets = peer.path().handshake_targets();
        if targets.is_empty() {
            return false;
        }
        let Some(spare) = self.datagrams.spare(MIN_BUFFER) else { return false };
        let Some(len) = peer.lock().tunnel.start_handshake(spare, now).map(<[u8]>::len) else { return false };
        self.datagrams.push_each(len, &targets, Ecn::NotCapable);
        peer.used(now);
        self.send(shared, Some(&peer.key));
        true
    }

    /// Runs the timers of a tunnel. A handshake that they begin because the peer fell silent is told to control, which may
    /// know other endpoints.
    pub(super) fn handle_timeout<T, D, S>(&mut self, shared: &Shared<T, D, S>, peer: &Arc<Peer<T>>, now: Instant)
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        let Some(spare) = self.datagrams.spare(MIN_BUFFER + OVERHEAD) else { return };
        let mut inside = peer.lock();
        let Some(datagram) = inside.tunnel.handle_timeout(spare, now) else { return };
        let len = datagram.len();
        let path = peer.path();
        if matches!(classify(datagram), Datagram::WireGuard(WireGuardKind::Data)) {
            let (first, second) = (path.data_target(), path.second_target());
            self.datagrams.push_each(len, first.iter().chain(&second), Ecn::NotCapable);
            first.into_iter().chain(second).for_each(|endpoint| inside.traffic.count_sent(endpoint, 1));
        } else {
            self.datagrams.push_each(len, &path.handshake_targets(), Ecn::NotCapable);
            if peer.is_silent(now) && peer.note_demand(now) {
                shared.control.report(peer);
            }
        }
        drop(inside);
        self.send(shared, Some(&peer.key));
    }

    /// Handles one handshake message of the queue.
    pub(super) fn handle_handshake<F, D, S>(
        &mut self,
        shared: &Shared<F::Tunnel, D, S>,
        factory: &F,
        peers: &PeerTable<F::Tunnel>,
        message: &HandshakeMessage,
        now: Instant,
    ) where
        F: TunnelFactory,
        D: PacketDevice,
        S: DatagramSocket,
    {
        let refused = self.judge(factory, peers, message).and_then(|peer| self.answer(shared, &peer, message, now));
        if let Err(why) = refused {
            shared.drops.count(why);
        }
        self.send(shared, message.source.named_sender().as_ref());
    }

    /// Takes a WireGuard datagram that a relay brought. It never speaks for another peer than the one that the relay names.
    pub(super) fn handle_relayed<F, D, S>(
        &mut self,
        shared: &Shared<F::Tunnel, D, S>,
        factory: &F,
        peers: &PeerTable<F::Tunnel>,
        (server, sender): (ServerId, WgPublicKey),
        datagram: &[u8],
        now: Instant,
    ) where
        F: TunnelFactory,
        D: PacketDevice,
        S: DatagramSocket,
    {
        let source = Source::Relay(server, sender);
        match classify(datagram) {
            _ if peers.by_key(&sender).is_none() => shared.drops.count(Drop::RelayedUnknownPeer),
            Datagram::WireGuard(kind @ WireGuardKind::Data) => {
                let snapshot = shared.snapshot.load();
                let slot = index::receiver(kind, datagram).and_then(|index| snapshot.by_index.slot(index));
                let Some(slot) = slot else { return shared.drops.count(Drop::InUnknownIndex) };
                if snapshot.peer(slot).key != sender {
                    return shared.drops.count(Drop::RelayedForeign);
                }
                let datagrams = iter::once((datagram, source, Ecn::NotCapable));
                self.opened.clear();
                open_all(shared, (&**snapshot, slot), datagrams, &mut self.opened, &mut self.datagrams, now);
                deliver(shared, FIRST_LANE, &mut self.opened, &mut self.coalescer);
                self.send(shared, Some(&sender));
            }
            Datagram::WireGuard(kind) => {
                let message = HandshakeMessage { kind, source, bytes: datagram.into() };
                self.handle_handshake(shared, factory, peers, &message, now);
            }
            Datagram::Probe | Datagram::Stun | Datagram::Unknown => shared.drops.count(Drop::InUnknown),
        }
    }

    /// Finds the peer of a message, cheap checks first.
    fn judge<F: TunnelFactory>(
        &mut self,
        factory: &F,
        peers: &PeerTable<F::Tunnel>,
        message: &HandshakeMessage,
    ) -> Result<Arc<Peer<F::Tunnel>>, Drop> {
        let bytes = &message.bytes;
        if matches!(message.kind, WireGuardKind::Initiation | WireGuardKind::Response) {
            let spare = self.datagrams.spare(MIN_BUFFER).ok_or(Drop::HandshakeUnderLoad)?;
            match factory.admit(bytes, message.source.limited_as(), spare) {
                Ok(()) => {}
                Err(Refused::Invalid) => return Err(Drop::HandshakeInvalid),
                Err(Refused::UnderLoad(cookie)) => {
                    if let Some(len) = cookie.map(<[u8]>::len) {
                        self.datagrams.push(len, message.source.endpoint());
                    }
                    return Err(Drop::HandshakeUnderLoad);
                }
            }
        }
        let peer = match message.kind {
            WireGuardKind::Initiation => {
                let key = factory.initiator(bytes).ok_or(Drop::HandshakeInvalid)?;
                peers.by_key(&key).ok_or(Drop::HandshakeUnknownKey)
            }
            kind => {
                let found = index::receiver(kind, bytes).and_then(|index| peers.by_index(index));
                found.ok_or(Drop::HandshakeUnexpected)
            }
        }?;
        match message.source.named_sender() {
            Some(sender) if sender != peer.key => Err(Drop::RelayedForeign),
            _ => Ok(Arc::clone(peer)),
        }
    }

    fn answer<T, D, S>(
        &mut self,
        shared: &Shared<T, D, S>,
        peer: &Arc<Peer<T>>,
        message: &HandshakeMessage,
        now: Instant,
    ) -> Result<(), Drop>
    where
        T: Tunnel + 'static,
        D: PacketDevice,
        S: DatagramSocket,
    {
        let source = message.source.endpoint();
        let spare = self.datagrams.spare(MIN_BUFFER).ok_or(Drop::HandshakeUnderLoad)?;
        let mut inside = peer.lock();
        match inside.tunnel.open(&message.bytes, message.source.limited_as(), spare, now) {
            Opened::Reply(reply) => {
                let len = reply.len();
                self.datagrams.push(len, source);
            }
            Opened::Established(confirm) => {
                if let Some(len) = confirm.map(<[u8]>::len) {
                    self.datagrams.push(len, source);
                    inside.traffic.count_sent(source, 1);
                }
                flush(&mut inside, peer, source, &mut self.datagrams, now);
                if peer.note_handshake(&inside.tunnel, source, now) {
                    shared.control.report(peer);
                }
            }
            Opened::Packet(_) | Opened::Keepalive => {}
            Opened::Dropped(reason) => {
                return Err(match reason {
                    DropReason::Replayed => Drop::HandshakeReplayed,
                    DropReason::NoSession => Drop::HandshakeUnexpected,
                    DropReason::UnderLoad => Drop::HandshakeUnderLoad,
                    DropReason::Invalid | DropReason::ShortBuffer => Drop::HandshakeInvalid,
                });
            }
        }
        drop(inside);
        peer.used(now);
        Ok(())
    }
}
