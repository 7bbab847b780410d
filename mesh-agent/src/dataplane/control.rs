//! The control thread's part of moving datagrams: handshakes and timers.

use std::sync::Arc;
use std::time::Duration;

use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::wg::{DropReason, MIN_BUFFER, OVERHEAD, Opened, Tunnel};
use mesh_proto::wire::demux::{Datagram, WireGuardKind, classify};

use super::drops::Drop;
use super::inbound::flush;
use super::index;
use super::io::{DatagramSocket, MAX_PACKET, Packed, PacketDevice};
use super::peer::{Peer, limited_as};
use super::queues::HandshakeMessage;
use super::shared::Shared;
use super::table::PeerTable;
use super::tunnel::{Refused, TunnelFactory};

/// What a tunnel queues at most, 256 packets of the usual size.
const OUT_BYTES: usize = 8 * (MAX_PACKET + 1);

/// Sends what control itself sends. It never waits for the kernel: the event loop runs on this thread.
pub(super) struct Outbox {
    datagrams: Packed<Endpoint>,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self { datagrams: Packed::new(OUT_BYTES) }
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
        let Some(len) = peer.tunnel().start_handshake(spare, now).map(<[u8]>::len) else { return false };
        self.datagrams.push_each(len, targets);
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
        let mut tunnel = peer.tunnel();
        let Some(datagram) = tunnel.handle_timeout(spare, now) else { return };
        let len = datagram.len();
        let path = peer.path();
        if matches!(classify(datagram), Datagram::WireGuard(WireGuardKind::Data)) {
            self.datagrams.push_each(len, path.data_target());
        } else {
            self.datagrams.push_each(len, path.handshake_targets());
            if peer.is_silent(now) && peer.note_demand(now) {
                shared.control.report(peer);
            }
        }
        drop(tunnel);
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
        self.send(shared, None);
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
            match factory.admit(bytes, limited_as(message.source), spare) {
                Ok(()) => {}
                Err(Refused::Invalid) => return Err(Drop::HandshakeInvalid),
                Err(Refused::UnderLoad(cookie)) => {
                    if let Some(len) = cookie.map(<[u8]>::len) {
                        self.datagrams.push(len, message.source);
                    }
                    return Err(Drop::HandshakeUnderLoad);
                }
            }
        }
        let found = match message.kind {
            WireGuardKind::Initiation => {
                let key = factory.initiator(bytes).ok_or(Drop::HandshakeInvalid)?;
                return peers.by_key(&key).cloned().ok_or(Drop::HandshakeUnknownKey);
            }
            WireGuardKind::Response => index::read(bytes, 8),
            WireGuardKind::CookieReply | WireGuardKind::Data => index::read(bytes, 4),
        };
        found.and_then(|index| peers.by_index(index)).cloned().ok_or(Drop::HandshakeUnexpected)
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
        let source = message.source;
        let spare = self.datagrams.spare(MIN_BUFFER).ok_or(Drop::HandshakeUnderLoad)?;
        let mut tunnel = peer.tunnel();
        match tunnel.open(&message.bytes, limited_as(source), spare, now) {
            Opened::Reply(reply) => {
                let len = reply.len();
                self.datagrams.push(len, source);
            }
            Opened::Established(confirm) => {
                if let Some(len) = confirm.map(<[u8]>::len) {
                    self.datagrams.push(len, source);
                }
                flush(&mut *tunnel, peer, source, &mut self.datagrams, now);
                if peer.note_handshake(&tunnel, source, now) {
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
        drop(tunnel);
        peer.used(now);
        Ok(())
    }
}
