//! The server machine: every connection of every agent, and what each is told.
//!
//! Owns proofs, limits, the store, the relay switch and one cursor per watcher. Pull-based, so a slow reader costs no memory: the shell calls
//! [`Server::poll_transmit`] for a connection only when that connection's carrier can take more, and watch messages are
//! made at that moment from the newest state. [`Server::poll_relay`] is a second lane for relayed datagrams, so that neither
//! waits for the other.
//!
//! # Invariants
//!
//! - Nothing of a namespace is told or taken before a Hello that is bound to this very connection; that Hello comes once.
//! - A connection holds at most [`MAX_QUEUED_REPLIES`] replies, one cursor, and no copy of any frame; relayed datagrams have their own
//!   bounded queue in the switch.
//! - Each refusal is a typed error with the name of its limit, and a counter of that name.
//! - A closed connection has left its namespace; it exists only to hand out its last words until the carrier is gone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::{Namespace, NodeId};
use mesh_common::limits::{HELLO_TIMEOUT, MAX_MESSAGE, MAX_QUEUED_REPLIES, NONCE_LIFETIME, SESSION_IDLE};
use mesh_common::time::Instant;

use self::challenge::Challenges;
use super::limits::{
    CLOSE_GRACE, EMPTY_NAMESPACE_TTL, Exceeded, FULL_RETRY_AFTER, MAX_SESSIONS_PER_NODE, SPARE_SESSIONS_PER_NAMESPACE,
    Site, SiteBudgets, reason,
};
use super::store::{Change, Put, PutError, Store, StoreConfig, Watcher};
use crate::relay::switch::{RelayLimits, RelayStats, Relayed, Switch};
use crate::wire::frame::Frame;
use crate::wire::session::{
    Binding, BindingMode, ClientMessage, Cursor, DecodeError, ErrorCode, Hello, ServerMessage, SessionError, Welcome,
};

/// A connection, numbered by the shell; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Random per start: cursors of another instance mean a whole snapshot.
    pub instance: u64,
    pub slot_ttl: Duration,
    /// Empty = open to every namespace within the public budgets.
    pub only_namespaces: BTreeSet<Namespace>,
    pub stun_ports: Vec<u16>,
    /// Other addresses of the STUN service, at most [`MAX_STUN_ALT`](crate::wire::session::MAX_STUN_ALT).
    pub stun_alt: Vec<SocketAddr>,
    /// `None` = no relay.
    pub relay: Option<RelayLimits>,
    /// Host names (without port) this server answers a challenge-bound Hello for.
    pub own_names: BTreeSet<String>,
    pub max_connections: usize,
    pub max_namespaces: usize,
    pub max_slots_per_namespace: usize,
    /// Bytes of all stored frames together.
    pub max_stored_bytes: usize,
}

/// What the shell has to do beyond sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerEvent {
    /// This connection has something to send: poll both its lanes when its carrier can take more.
    Wake(ConnId),
    /// Send what is queued, then close the carrier.
    Close(ConnId),
    /// This connection has proven to be this node.
    Joined {
        conn: ConnId,
        namespace: Namespace,
        node: NodeId,
    },
    /// The last session of this node ended; its slot starts its TTL.
    Left {
        namespace: Namespace,
        node: NodeId,
    },
    NamespaceOpened(Namespace),
    NamespaceFreed(Namespace),
}

/// Totals for metrics and health.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerStats {
    pub connections: u64,
    pub namespaces: u64,
    pub slots: u64,
    pub stored_bytes: u64,
    pub hellos_accepted: u64,
    pub puts_accepted: u64,
    pub frames_sent: u64,
    pub relay: RelayStats,
    /// Refusals and drops by reason: the words of [`reason`].
    pub refused: BTreeMap<&'static str, u64>,
}

#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    challenges: Challenges,
    store: Store,
    switch: Switch,
    sites: SiteBudgets,
    connections: BTreeMap<ConnId, Connection>,
    /// Proven connections of each namespace.
    sessions: BTreeMap<Namespace, BTreeMap<ConnId, NodeId>>,
    /// One deadline for each connection; an idle one is moved on when it fires, not with every message.
    deadlines: BTreeSet<(Instant, ConnId)>,
    /// Last words to connections that were never let in.
    turned_away: BTreeMap<ConnId, Bytes>,
    /// Until when clients are asked to spread their return, while shutting down.
    draining: Option<Instant>,
    events: VecDeque<ServerEvent>,
    hellos_accepted: u64,
    puts_accepted: u64,
    frames_sent: u64,
    refused: BTreeMap<&'static str, u64>,
}

#[derive(Debug)]
struct Connection {
    remote: SocketAddr,
    exporter: [u8; 32],
    /// What this connection was challenged with, good until then.
    challenge: ([u8; 32], Instant),
    phase: Phase,
    last_received: Instant,
    deadline: Instant,
    replies: VecDeque<Bytes>,
    /// The shell was woken and has not polled to the end since.
    awake: bool,
    /// Has to be told that the server drains.
    drain_due: bool,
}

#[derive(Debug)]
enum Phase {
    Unproven,
    Member { namespace: Namespace, node: NodeId, watcher: Option<Watcher> },
    Closing,
}

impl Server {
    /// `seed` is 32 random bytes: challenges are drawn from it.
    pub fn new(config: ServerConfig, seed: [u8; 32]) -> Self {
        let store = Store::new(StoreConfig {
            instance: config.instance,
            slot_ttl: config.slot_ttl,
            max_namespaces: config.max_namespaces,
            max_slots_per_namespace: config.max_slots_per_namespace,
            max_stored_bytes: config.max_stored_bytes,
        });
        Self {
            switch: Switch::new(config.relay),
            config,
            challenges: Challenges::new(seed),
            store,
            sites: SiteBudgets::default(),
            connections: BTreeMap::new(),
            sessions: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            turned_away: BTreeMap::new(),
            draining: None,
            events: VecDeque::new(),
            hellos_accepted: 0,
            puts_accepted: 0,
            frames_sent: 0,
            refused: BTreeMap::new(),
        }
    }

    /// A carrier is up. `exporter` is its TLS exporter value. Refused at once (event `Close`) when the server is full.
    pub fn handle_connected(&mut self, conn: ConnId, remote: SocketAddr, exporter: [u8; 32], now: Instant) {
        self.handle_disconnected(conn, now);
        if let Some(until) = self.draining {
            self.count(reason::DRAINING);
            return self.turn_away(conn, ServerMessage::Drain { retry_after: until.since(now) });
        }
        if self.connections.len() >= self.config.max_connections {
            self.count(reason::MAX_CONNECTIONS);
            let error = error(ErrorCode::ServerFull, reason::MAX_CONNECTIONS, FULL_RETRY_AFTER);
            return self.turn_away(conn, ServerMessage::Error(error));
        }
        if let Err(Exceeded { limit, retry_after }) = self.sites.open_unproven(Site::of(remote.ip())) {
            self.count(limit);
            return self.turn_away(conn, ServerMessage::Error(error(ErrorCode::RateLimited, limit, retry_after)));
        }
        let challenge = self.challenges.draw();
        let deadline = now + HELLO_TIMEOUT;
        self.deadlines.insert((deadline, conn));
        self.connections.insert(
            conn,
            Connection {
                remote: SocketAddr::new(remote.ip().to_canonical(), remote.port()),
                exporter,
                challenge: (challenge, now + NONCE_LIFETIME),
                phase: Phase::Unproven,
                last_received: now,
                deadline,
                replies: VecDeque::new(),
                awake: false,
                drain_due: false,
            },
        );
        self.reply(conn, &ServerMessage::Challenge(challenge), now);
    }

    /// One whole message of a connection.
    pub fn handle_message(&mut self, conn: ConnId, message: &[u8], now: Instant) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        if matches!(connection.phase, Phase::Closing) {
            return;
        }
        connection.last_received = now;
        if message.len() > MAX_MESSAGE {
            return self.refuse_and_close(conn, ErrorCode::TooLarge, reason::MAX_MESSAGE, now);
        }
        let member = match connection.phase {
            Phase::Member { namespace, node, .. } => Some((namespace, node)),
            Phase::Unproven | Phase::Closing => None,
        };
        match (ClientMessage::decode(message), member) {
            (Ok(ClientMessage::Hello(hello)), None) => self.handle_hello(conn, &hello, now),
            (Ok(ClientMessage::Put(bytes)), Some((namespace, node))) => {
                self.handle_put(conn, namespace, node, bytes, now);
            }
            (Ok(ClientMessage::Watch(cursor)), Some((namespace, _))) => self.handle_watch(conn, namespace, cursor),
            (Ok(ClientMessage::Ping(number)), Some(_)) => self.reply(conn, &ServerMessage::Pong(number), now),
            (Ok(ClientMessage::Relay { to, payload }), Some(_)) => self.handle_relay(conn, &to, &payload, now),
            (Err(DecodeError::UnknownType(_)), Some(_)) => self.count(reason::UNKNOWN_MESSAGE),
            (Err(DecodeError::Malformed), _) => {
                self.refuse_and_close(conn, ErrorCode::Protocol, reason::MALFORMED, now);
            }
            (Ok(_) | Err(DecodeError::UnknownType(_)), _) => {
                self.refuse_and_close(conn, ErrorCode::Protocol, reason::OUT_OF_ORDER, now);
            }
        }
    }

    /// The carrier is gone.
    pub fn handle_disconnected(&mut self, conn: ConnId, now: Instant) {
        self.turned_away.remove(&conn);
        self.leave(conn, now);
        if let Some(connection) = self.connections.remove(&conn) {
            self.deadlines.remove(&(connection.deadline, conn));
        }
    }

    /// Asks every client to come back later, spread over `spread`. Clients hang up by themselves; new ones are turned away.
    pub fn handle_shutdown(&mut self, spread: Duration, now: Instant) {
        self.draining = Some(now + spread);
        let open: Vec<ConnId> = self.connections.keys().copied().collect();
        for conn in open {
            if let Some(connection) = self.connections.get_mut(&conn) {
                connection.drain_due = !matches!(connection.phase, Phase::Closing);
            }
            self.wake(conn);
        }
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((due, conn)) = self.deadlines.first().copied() {
            if due > now {
                break;
            }
            let Some(connection) = self.connections.get(&conn) else {
                self.deadlines.pop_first();
                continue;
            };
            match connection.phase {
                Phase::Unproven => self.refuse_and_close(conn, ErrorCode::Protocol, reason::HELLO_TIMEOUT, now),
                Phase::Member { .. } if connection.last_received + SESSION_IDLE > now => {
                    self.set_deadline(conn, connection.last_received + SESSION_IDLE);
                }
                Phase::Member { .. } => {
                    self.count(reason::IDLE);
                    self.close(conn, now);
                }
                Phase::Closing => self.handle_disconnected(conn, now),
            }
        }
        let expired = self.store.handle_timeout(now);
        for namespace in expired.changed {
            self.wake_watchers(&namespace);
        }
        self.events.extend(expired.freed.into_iter().map(ServerEvent::NamespaceFreed));
    }

    /// The next message for this connection, or `None` until its next `Wake`.
    pub fn poll_transmit(&mut self, conn: ConnId, now: Instant) -> Option<Bytes> {
        if let Some(last_words) = self.turned_away.remove(&conn) {
            return Some(last_words);
        }
        let connection = self.connections.get_mut(&conn)?;
        if let Some(reply) = connection.replies.pop_front() {
            return Some(reply);
        }
        if let Some(until) = self.draining
            && std::mem::take(&mut connection.drain_due)
        {
            return Some(ServerMessage::Drain { retry_after: until.since(now) }.encode());
        }
        if let Phase::Member { namespace, watcher: Some(watcher), .. } = &mut connection.phase
            && let Some(change) = self.store.next(namespace, watcher)
        {
            let message = match change {
                Change::Restart => ServerMessage::Restart,
                Change::Frame(frame) => {
                    self.frames_sent += 1;
                    ServerMessage::Frame(frame)
                }
                Change::Gone(node) => ServerMessage::Gone(node),
                Change::Synced(cursor) => ServerMessage::Synced(cursor),
            };
            return Some(message.encode());
        }
        connection.awake = false;
        None
    }

    /// The next relayed datagram for this connection, or `None` until its next `Wake`. May be lost on the way, and does not
    /// wait for [`Self::poll_transmit`], nor that for it.
    pub fn poll_relay(&mut self, conn: ConnId) -> Option<Bytes> {
        self.switch.poll_relay(conn)
    }

    pub fn poll_event(&mut self) -> Option<ServerEvent> {
        self.events.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let connection = self.deadlines.first().map(|(due, _)| (*due, "the deadline of a connection"));
        [connection, self.store.poll_timeout()].into_iter().flatten().min()
    }

    pub fn stats(&self) -> ServerStats {
        ServerStats {
            connections: self.connections.len() as u64,
            namespaces: self.store.namespaces() as u64,
            slots: self.store.slots() as u64,
            stored_bytes: self.store.stored_bytes() as u64,
            hellos_accepted: self.hellos_accepted,
            puts_accepted: self.puts_accepted,
            frames_sent: self.frames_sent,
            relay: self.switch.stats().clone(),
            refused: self.refused.clone(),
        }
    }

    fn handle_hello(&mut self, conn: ConnId, hello: &Hello, now: Instant) {
        if let Err(refusal) = self.admit(conn, hello, now) {
            self.count(refusal.limit);
            if refusal.answered {
                self.reply(conn, &ServerMessage::Error(error(refusal.code, refusal.limit, refusal.retry_after)), now);
            }
            return self.close(conn, now);
        }
        let (namespace, node) = (hello.namespace, hello.node);
        let connection = self.connections.get_mut(&conn).expect("the caller found it");
        self.sites.close_unproven(Site::of(connection.remote.ip()));
        connection.phase = Phase::Member { namespace, node, watcher: None };
        let observed = connection.remote;
        self.set_deadline(conn, now + SESSION_IDLE);
        self.sessions.entry(namespace).or_default().insert(conn, node);
        self.switch.join(conn, namespace, node, now);
        self.hellos_accepted += 1;
        self.events.push_back(ServerEvent::Joined { conn, namespace, node });
        let welcome = Welcome {
            server_instance: self.config.instance,
            observed,
            stun_ports: self.config.stun_ports.clone(),
            slot_ttl: self.config.slot_ttl,
            max_slots: u32::try_from(self.config.max_slots_per_namespace).unwrap_or(u32::MAX),
            relay: self.switch.offers_relay(),
            stun_alt: self.config.stun_alt.clone(),
        };
        self.reply(conn, &ServerMessage::Welcome(welcome), now);
        if self.store.sessions(&namespace, &node) > MAX_SESSIONS_PER_NODE {
            self.close_oldest_session(namespace, node, now);
        }
    }

    /// Lets a node into its namespace, or says what to answer. Nothing but the proof is told to those who cannot give it.
    fn admit(&mut self, conn: ConnId, hello: &Hello, now: Instant) -> Result<(), Refusal> {
        let connection = self.connections.get(&conn).expect("the caller found it");
        let site = Site::of(connection.remote.ip());
        if let Err(limit) = self.check_proof(connection, hello, now) {
            let answered = self.sites.answer_failed_proof(site, now);
            let limit = if answered { limit } else { reason::FAILED_PROOFS_PER_IP };
            return Err(Refusal { code: ErrorCode::AuthFailed, limit, retry_after: FULL_RETRY_AFTER, answered });
        }
        let refuse = |code, limit, retry_after| Err(Refusal { code, limit, retry_after, answered: true });
        let namespace = hello.namespace;
        if !self.config.only_namespaces.is_empty() && !self.config.only_namespaces.contains(&namespace) {
            return refuse(ErrorCode::NamespaceRefused, reason::ONLY_NAMESPACE, FULL_RETRY_AFTER);
        }
        let most_sessions =
            self.config.max_slots_per_namespace.saturating_mul(2).saturating_add(SPARE_SESSIONS_PER_NAMESPACE);
        if self.sessions.get(&namespace).is_some_and(|sessions| sessions.len() >= most_sessions) {
            return refuse(ErrorCode::ClusterFull, reason::SESSIONS_PER_NAMESPACE, FULL_RETRY_AFTER);
        }
        let opens = !self.store.has_namespace(&namespace);
        if opens {
            if self.store.namespaces() >= self.config.max_namespaces {
                return refuse(ErrorCode::ServerFull, reason::MAX_NAMESPACES, EMPTY_NAMESPACE_TTL);
            }
            // A server closed to others has no strangers to budget.
            if self.config.only_namespaces.is_empty()
                && let Err(Exceeded { limit, retry_after }) = self.sites.open_namespace(site, now)
            {
                return refuse(ErrorCode::RateLimited, limit, retry_after);
            }
        }
        if self.store.attach(namespace, hello.node, now).is_err() {
            return refuse(ErrorCode::ServerFull, reason::MAX_NAMESPACES, EMPTY_NAMESPACE_TTL);
        }
        if opens {
            self.events.push_back(ServerEvent::NamespaceOpened(namespace));
        }
        Ok(())
    }

    /// Whether this Hello proves membership and identity on this connection.
    fn check_proof(&self, connection: &Connection, hello: &Hello, now: Instant) -> Result<(), &'static str> {
        let binding = match hello.mode {
            BindingMode::Exporter => Binding::Exporter(connection.exporter),
            // A proof for another server's name could have been asked for there, and carried here.
            BindingMode::Challenge if !challenge::is_own_name(&hello.server_name, &self.config.own_names) => {
                return Err(reason::OWN_NAME);
            }
            BindingMode::Challenge if now >= connection.challenge.1 => return Err(reason::NONCE_LIFETIME),
            BindingMode::Challenge => Binding::Challenge(connection.challenge.0),
        };
        if hello.verify(binding) { Ok(()) } else { Err(reason::BAD_PROOF) }
    }

    fn handle_put(&mut self, conn: ConnId, namespace: Namespace, node: NodeId, bytes: Bytes, now: Instant) {
        let refusal = match Frame::parse(bytes) {
            Err(_) => (ErrorCode::BadFrame, reason::BAD_FRAME, Duration::ZERO),
            Ok(frame) if frame.namespace() != namespace || frame.node() != node => {
                (ErrorCode::BadFrame, reason::FOREIGN_FRAME, Duration::ZERO)
            }
            Ok(frame) => match self.store.put(&frame, now) {
                Ok(put) => {
                    self.puts_accepted += 1;
                    if put == Put::Changed {
                        self.wake_watchers(&namespace);
                    }
                    return self.reply(conn, &ServerMessage::Stored { seq: frame.seq() }, now);
                }
                Err(PutError::RateLimited(after)) => (ErrorCode::RateLimited, reason::PUTS_PER_SLOT, after),
                Err(PutError::Stale) => (ErrorCode::Stale, reason::STALE_FRAME, Duration::ZERO),
                Err(PutError::Signature) => (ErrorCode::BadFrame, reason::BAD_FRAME, Duration::ZERO),
                Err(PutError::Full) => (ErrorCode::ClusterFull, reason::MAX_SLOTS, FULL_RETRY_AFTER),
                Err(PutError::Memory) => (ErrorCode::ServerFull, reason::MAX_MEMORY, FULL_RETRY_AFTER),
                Err(PutError::NoSession) => unreachable!("a proven connection is a session of its node"),
            },
        };
        let (code, limit, retry_after) = refusal;
        self.count(limit);
        self.reply(conn, &ServerMessage::Error(error(code, limit, retry_after)), now);
    }

    fn handle_watch(&mut self, conn: ConnId, namespace: Namespace, cursor: Option<Cursor>) {
        let from = self.store.watch(&namespace, cursor);
        let connection = self.connections.get_mut(&conn).expect("the caller found it");
        if let Phase::Member { watcher, .. } = &mut connection.phase {
            *watcher = Some(from);
            self.wake(conn);
        }
    }

    fn handle_relay(&mut self, conn: ConnId, to: &NodeId, payload: &[u8], now: Instant) {
        let told = match self.switch.handle_relay(conn, to, payload, now) {
            Relayed::Queued { to, wake } => {
                if wake {
                    self.events.push_back(ServerEvent::Wake(to));
                }
                return;
            }
            Relayed::NoPeer => ServerMessage::NoPeer(*to),
            Relayed::OverBudget(Exceeded { limit, retry_after }) => {
                ServerMessage::Error(error(ErrorCode::RateLimited, limit, retry_after))
            }
            Relayed::Dropped => return,
        };
        // Only a hint: a client that reads slowly goes without it rather than losing its session.
        if self.connections.get(&conn).is_some_and(|connection| connection.replies.len() < MAX_QUEUED_REPLIES / 2) {
            self.reply(conn, &told, now);
        }
    }

    /// Queues a reply; an agent that asks faster than it reads is closed.
    fn reply(&mut self, conn: ConnId, message: &ServerMessage, now: Instant) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        if connection.replies.len() >= MAX_QUEUED_REPLIES {
            connection.replies.clear();
            return self.refuse_and_close(conn, ErrorCode::Protocol, reason::QUEUED_REPLIES, now);
        }
        connection.replies.push_back(message.encode());
        self.wake(conn);
    }

    fn refuse_and_close(&mut self, conn: ConnId, code: ErrorCode, limit: &'static str, now: Instant) {
        self.count(limit);
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.replies.push_back(ServerMessage::Error(error(code, limit, Duration::ZERO)).encode());
        }
        self.close(conn, now);
    }

    /// Ends the session now; the connection stays for its last words until the shell reports it gone.
    fn close(&mut self, conn: ConnId, now: Instant) {
        self.leave(conn, now);
        self.set_deadline(conn, now + CLOSE_GRACE);
        self.events.push_back(ServerEvent::Close(conn));
    }

    /// Gives back what a connection holds: its place among the unproven, or its session.
    fn leave(&mut self, conn: ConnId, now: Instant) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        match std::mem::replace(&mut connection.phase, Phase::Closing) {
            Phase::Unproven => self.sites.close_unproven(Site::of(connection.remote.ip())),
            Phase::Member { namespace, node, .. } => {
                self.switch.leave(conn);
                if let Some(sessions) = self.sessions.get_mut(&namespace) {
                    sessions.remove(&conn);
                    if sessions.is_empty() {
                        self.sessions.remove(&namespace);
                    }
                }
                self.store.detach(namespace, node, now);
                if self.store.sessions(&namespace, &node) == 0 {
                    self.events.push_back(ServerEvent::Left { namespace, node });
                }
            }
            Phase::Closing => {}
        }
    }

    fn close_oldest_session(&mut self, namespace: Namespace, node: NodeId, now: Instant) {
        let oldest = self
            .sessions
            .get(&namespace)
            .and_then(|sessions| sessions.iter().find(|(_, member)| **member == node))
            .map(|(conn, _)| *conn);
        if let Some(oldest) = oldest {
            self.refuse_and_close(oldest, ErrorCode::RateLimited, reason::SESSIONS_PER_NODE, now);
        }
    }

    /// Says a last message to a connection that gets no place. Only so many wait for their carrier at once.
    fn turn_away(&mut self, conn: ConnId, message: ServerMessage) {
        const MAX_TURNED_AWAY: usize = 256;
        if self.turned_away.len() >= MAX_TURNED_AWAY {
            self.turned_away.pop_first();
        }
        self.turned_away.insert(conn, message.encode());
        self.events.push_back(ServerEvent::Close(conn));
    }

    fn wake_watchers(&mut self, namespace: &Namespace) {
        let Some(sessions) = self.sessions.get(namespace) else { return };
        for conn in sessions.keys() {
            if let Some(connection) = self.connections.get_mut(conn)
                && matches!(connection.phase, Phase::Member { watcher: Some(_), .. })
                && !std::mem::replace(&mut connection.awake, true)
            {
                self.events.push_back(ServerEvent::Wake(*conn));
            }
        }
    }

    fn wake(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get_mut(&conn)
            && !std::mem::replace(&mut connection.awake, true)
        {
            self.events.push_back(ServerEvent::Wake(conn));
        }
    }

    fn set_deadline(&mut self, conn: ConnId, deadline: Instant) {
        if let Some(connection) = self.connections.get_mut(&conn) {
            self.deadlines.remove(&(connection.deadline, conn));
            connection.deadline = deadline;
            self.deadlines.insert((deadline, conn));
        }
    }

    fn count(&mut self, reason: &'static str) {
        *self.refused.entry(reason).or_default() += 1;
    }
}

/// What a Hello that is not let in gets.
struct Refusal {
    code: ErrorCode,
    limit: &'static str,
    retry_after: Duration,
    answered: bool,
}

fn error(code: ErrorCode, limit: &str, retry_after: Duration) -> SessionError {
    SessionError { code, limit: limit.to_owned(), retry_after }
}

mod challenge;
#[cfg(test)]
mod tests;
