//! The server's relay: which session a datagram goes to, what it may cost, and what waits for a slow reader.
//!
//! Owns the relay budgets and one bounded queue a session. Looks at no payload. Refuses everything that leaves the sender's
//! namespace: a node is looked up among its own only.
//!
//! # Invariants
//!
//! - A datagram is in one queue or dropped and counted by its reason; a queue drops its oldest, and only its own.
//! - All queues together stay within [`MAX_RELAY_QUEUED_BYTES`]; over it the fullest one pays.
//! - What a sender is told about drops is at most one message a second and kind.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::{Namespace, NodeId};
use mesh_common::limits::{MAX_RELAY_QUEUED_BYTES, RELAY_CLIENT_BYTES, RELAY_NAMESPACE_BYTES};
use mesh_common::time::Instant;

use super::budget::{ByteBudget, ByteRate};
use super::queue::DropOldest;
use crate::discovery::limits::{Exceeded, reason};
use crate::discovery::server::ConnId;
use crate::wire::session::{RELAY_OVERHEAD, ServerMessage};

/// Between two answers of one kind to one session.
const TELL_PAUSE: Duration = Duration::from_secs(1);

/// Bytes a second, payloads only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelayLimits {
    pub client_bytes: u64,
    pub namespace_bytes: u64,
}

impl Default for RelayLimits {
    /// What a public server gives.
    fn default() -> Self {
        Self { client_bytes: RELAY_CLIENT_BYTES, namespace_bytes: RELAY_NAMESPACE_BYTES }
    }
}

/// What became of a datagram, as far as somebody has to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relayed {
    /// It waits for this session. `wake`: its shell has polled to the end before, and does not know.
    Queued { to: ConnId, wake: bool },
    /// Tell the sender that this server does not reach the node.
    NoPeer,
    /// Tell the sender that it met a budget.
    OverBudget(Exceeded),
    /// Dropped, and the sender has been told lately.
    Dropped,
}

/// Totals since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RelayStats {
    /// Handed to the carrier of the receiver.
    pub datagrams: u64,
    /// Their payloads.
    pub bytes: u64,
    /// Datagrams that were not forwarded, by the words of [`reason`].
    pub dropped: BTreeMap<&'static str, u64>,
}

#[derive(Debug)]
pub struct Switch {
    /// Of a client and of a namespace; `None` when this server does not relay.
    rates: Option<(ByteRate, ByteRate)>,
    ports: BTreeMap<ConnId, Port>,
    segments: BTreeMap<Namespace, Segment>,
    /// Ports with something queued, by how much.
    by_size: BTreeSet<(usize, ConnId)>,
    queued_bytes: usize,
    stats: RelayStats,
}

/// A proven session.
#[derive(Debug)]
struct Port {
    namespace: Namespace,
    node: NodeId,
    queue: DropOldest,
    /// The shell was woken and has not polled to the end since.
    awake: bool,
    told_no_peer: Option<Instant>,
    told_budget: Option<Instant>,
}

/// The part of the switch that belongs to one namespace.
#[derive(Debug)]
struct Segment {
    budget: ByteBudget,
    nodes: BTreeMap<NodeId, Member>,
}

#[derive(Debug)]
struct Member {
    budget: ByteBudget,
    /// The newest is last, and gets what comes.
    sessions: Vec<ConnId>,
}

impl Switch {
    /// `None` = no relay: every datagram is dropped, and its sender told that nobody is reached.
    pub fn new(limits: Option<RelayLimits>) -> Self {
        Self {
            rates: limits.map(|limits| (ByteRate::new(limits.client_bytes), ByteRate::new(limits.namespace_bytes))),
            ports: BTreeMap::new(),
            segments: BTreeMap::new(),
            by_size: BTreeSet::new(),
            queued_bytes: 0,
            stats: RelayStats::default(),
        }
    }

    pub fn offers_relay(&self) -> bool {
        self.rates.is_some()
    }

    /// This connection has proven to be this node.
    pub fn join(&mut self, conn: ConnId, namespace: Namespace, node: NodeId, now: Instant) {
        let port =
            Port { namespace, node, queue: DropOldest::default(), awake: false, told_no_peer: None, told_budget: None };
        self.ports.insert(conn, port);
        let segment = self
            .segments
            .entry(namespace)
            .or_insert_with(|| Segment { budget: ByteBudget::new(now), nodes: BTreeMap::new() });
        let member =
            segment.nodes.entry(node).or_insert_with(|| Member { budget: ByteBudget::new(now), sessions: Vec::new() });
        member.sessions.push(conn);
    }

    /// The session ended; what waited for it is lost.
    pub fn leave(&mut self, conn: ConnId) {
        let Some(port) = self.ports.remove(&conn) else { return };
        self.by_size.remove(&(port.queue.bytes(), conn));
        self.queued_bytes -= port.queue.bytes();
        let Some(segment) = self.segments.get_mut(&port.namespace) else { return };
        if let Some(member) = segment.nodes.get_mut(&port.node) {
            member.sessions.retain(|session| *session != conn);
            if member.sessions.is_empty() {
                segment.nodes.remove(&port.node);
            }
        }
        if segment.nodes.is_empty() {
            self.segments.remove(&port.namespace);
        }
    }

    /// A datagram of this session for a node of its namespace.
    pub fn handle_relay(&mut self, from: ConnId, to: &NodeId, payload: &[u8], now: Instant) -> Relayed {
        let Some(port) = self.ports.get_mut(&from) else { return Relayed::Dropped };
        let segment = self.segments.get_mut(&port.namespace).expect("a port belongs to the segment it joined");
        let target = segment.nodes.get(to).and_then(|member| member.sessions.last()).filter(|_| *to != port.node);
        let (Some(target), Some((client_rate, namespace_rate))) = (target.copied(), self.rates) else {
            let why = if self.rates.is_some() { reason::RELAY_NO_PEER } else { reason::RELAY_OFF };
            *self.stats.dropped.entry(why).or_default() += 1;
            return if may_tell(&mut port.told_no_peer, now) { Relayed::NoPeer } else { Relayed::Dropped };
        };
        let sender = segment.nodes.get_mut(&port.node).expect("a port belongs to the node it joined as");
        let checks = [
            (sender.budget.check(client_rate, payload.len(), now), reason::RELAY_CLIENT_BYTES),
            (segment.budget.check(namespace_rate, payload.len(), now), reason::RELAY_NAMESPACE_BYTES),
        ];
        for (check, limit) in checks {
            if let Err(retry_after) = check {
                *self.stats.dropped.entry(limit).or_default() += 1;
                let tell = may_tell(&mut port.told_budget, now);
                return if tell { Relayed::OverBudget(Exceeded { limit, retry_after }) } else { Relayed::Dropped };
            }
        }
        sender.budget.spend(client_rate, payload.len(), now);
        segment.budget.spend(namespace_rate, payload.len(), now);
        let message = ServerMessage::relayed(&port.node, payload);
        let wake = self.enqueue(target, message);
        Relayed::Queued { to: target, wake }
    }

    /// The next message for this session, or `None` until it is woken.
    pub fn poll_relay(&mut self, conn: ConnId) -> Option<Bytes> {
        let Some(message) = self.change_queue(conn, DropOldest::pop)? else {
            self.ports.get_mut(&conn)?.awake = false;
            return None;
        };
        self.stats.datagrams += 1;
        self.stats.bytes += (message.len() - RELAY_OVERHEAD) as u64;
        Some(message)
    }

    pub fn stats(&self) -> &RelayStats {
        &self.stats
    }

    /// `true` = the session has to be woken.
    fn enqueue(&mut self, to: ConnId, message: Bytes) -> bool {
        let dropped =
            self.change_queue(to, |queue| queue.push(message)).expect("members lists sessions that are there");
        if dropped > 0 {
            *self.stats.dropped.entry(reason::RELAY_QUEUE).or_default() += dropped;
        }
        while self.queued_bytes > MAX_RELAY_QUEUED_BYTES
            && let Some((_, fullest)) = self.by_size.last().copied()
        {
            self.change_queue(fullest, DropOldest::pop);
            *self.stats.dropped.entry(reason::RELAY_MEMORY).or_default() += 1;
        }
        let port = self.ports.get_mut(&to).expect("members lists sessions that are there");
        !std::mem::replace(&mut port.awake, true)
    }

    /// Every change of a queue goes through here, so that the sums hold.
    fn change_queue<T>(&mut self, conn: ConnId, change: impl FnOnce(&mut DropOldest) -> T) -> Option<T> {
        let queue = &mut self.ports.get_mut(&conn)?.queue;
        let before = queue.bytes();
        let value = change(queue);
        let after = queue.bytes();
        if before != after {
            self.by_size.remove(&(before, conn));
            if after > 0 {
                self.by_size.insert((after, conn));
            }
            self.queued_bytes = self.queued_bytes - before + after;
        }
        Some(value)
    }
}

fn may_tell(told: &mut Option<Instant>, now: Instant) -> bool {
    let due = told.is_none_or(|told| now.since(told) >= TELL_PAUSE);
    if due {
        *told = Some(now);
    }
    due
}

#[cfg(test)]
mod tests;
