//! What the data threads hand to control: bounded queues, one wake-up for all of them.
//!
//! A handshake, a probe or a STUN message that finds its queue full is dropped, so that a flood cannot push out what waits;
//! a datagram for a relay pushes out the oldest instead, because of traffic that is too much the newest is worth most.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mesh_common::id::ServerId;
use mesh_common::key::WgPublicKey;
use mesh_proto::device::Endpoint;
use mesh_proto::wire::demux::WireGuardKind;
use tokio::sync::Notify;

use super::io::Arrival;
use super::peer::{Peer, Source};

/// Handshake messages that wait for control: what it does in about 50 ms. As many probes and STUN messages wait beside.
pub(super) const CONTROL_QUEUE: usize = 256;
/// No probe and no STUN message is longer: a probe fills at most the underlay's packet.
pub(super) const MAX_CONTROL_DATAGRAM: usize = 2048;
/// Datagrams that wait to be handed to a relay, and their bytes.
pub(super) const RELAY_QUEUE: usize = 512;
pub(super) const RELAY_QUEUE_BYTES: usize = 1 << 20;

/// What waits for control.
pub(super) struct Queues<T> {
    pub(super) notify: Notify,
    handshakes: Mutex<VecDeque<HandshakeMessage>>,
    datagrams: Mutex<VecDeque<ControlDatagram>>,
    relayed: Mutex<RelayQueue>,
    reporting: Mutex<Vec<Arc<Peer<T>>>>,
}

/// A handshake message with its source.
#[derive(Debug)]
pub(super) struct HandshakeMessage {
    pub(super) kind: WireGuardKind,
    pub(super) source: Source,
    /// At most the 148 bytes of an initiation: their lengths are fixed.
    pub(super) bytes: Box<[u8]>,
}

/// A probe or a STUN message: nobody has judged yet whether it is genuine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlDatagram {
    pub source: Endpoint,
    pub bytes: Bytes,
}

/// Datagrams for peers behind relays.
#[derive(Debug, Default)]
struct RelayQueue {
    datagrams: VecDeque<(WgPublicKey, ServerId, Bytes)>,
    bytes: usize,
}

impl<T> Default for Queues<T> {
    fn default() -> Self {
        Self {
            notify: Notify::new(),
            handshakes: Mutex::default(),
            datagrams: Mutex::default(),
            relayed: Mutex::default(),
            reporting: Mutex::default(),
        }
    }
}

impl<T> Queues<T> {
    /// False when the queue is full.
    pub(super) fn queue_handshake(&self, kind: WireGuardKind, source: Arrival, datagram: &[u8]) -> bool {
        let mut queue = lock(&self.handshakes);
        if queue.len() >= CONTROL_QUEUE {
            return false;
        }
        queue.push_back(HandshakeMessage { kind, source: Source::Direct(source), bytes: datagram.into() });
        drop(queue);
        self.notify.notify_one();
        true
    }

    pub(super) fn next_handshake(&self) -> Option<HandshakeMessage> {
        lock(&self.handshakes).pop_front()
    }

    /// False when the queue is full.
    pub(super) fn queue_datagram(&self, source: Endpoint, datagram: &[u8]) -> bool {
        let mut queue = lock(&self.datagrams);
        if queue.len() >= CONTROL_QUEUE {
            return false;
        }
        queue.push_back(ControlDatagram { source, bytes: Bytes::copy_from_slice(datagram) });
        drop(queue);
        self.notify.notify_one();
        true
    }

    pub(super) fn take_datagrams(&self) -> Vec<ControlDatagram> {
        mem::take(&mut *lock(&self.datagrams)).into()
    }

    /// Queues datagrams for one peer and says how many older ones of any peer went for them.
    pub(super) fn queue_relayed<'d>(
        &self,
        peer: &WgPublicKey,
        datagrams: impl Iterator<Item = (ServerId, &'d [u8])>,
    ) -> usize {
        let mut queue = lock(&self.relayed);
        let dropped = datagrams.map(|(server, datagram)| queue.push(*peer, server, datagram)).sum();
        drop(queue);
        self.notify.notify_one();
        dropped
    }

    pub(super) fn take_relayed(&self) -> Vec<(WgPublicKey, ServerId, Bytes)> {
        mem::take(&mut *lock(&self.relayed)).datagrams.into()
    }

    /// Puts a peer on the list; it holds each peer at most once ([`Peer`]'s `note_*` see to that).
    pub(super) fn report(&self, peer: &Arc<Peer<T>>) {
        self.list(peer);
        self.notify.notify_one();
    }

    /// The same, for when control looks anyway.
    pub(super) fn list(&self, peer: &Arc<Peer<T>>) {
        lock(&self.reporting).push(Arc::clone(peer));
    }

    pub(super) fn take_reporting(&self) -> Vec<Arc<Peer<T>>> {
        mem::take(&mut *lock(&self.reporting))
    }
}

impl RelayQueue {
    /// How many went to make room.
    fn push(&mut self, peer: WgPublicKey, server: ServerId, datagram: &[u8]) -> usize {
        self.datagrams.push_back((peer, server, Bytes::copy_from_slice(datagram)));
        self.bytes += datagram.len();
        let before = self.datagrams.len();
        while self.datagrams.len() > RELAY_QUEUE || self.bytes > RELAY_QUEUE_BYTES {
            let Some((_, _, oldest)) = self.datagrams.pop_front() else { break };
            self.bytes -= oldest.len();
        }
        before - self.datagrams.len()
    }
}

fn lock<Q>(queue: &Mutex<Q>) -> MutexGuard<'_, Q> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}
