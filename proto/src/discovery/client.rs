//! An agent's session with one server: connect, prove, publish, watch, relay, keep alive, come back.
//!
//! Owns backoff and cursors. Holds no records: frames pass through as events, unverified. Believes a server in nothing but
//! what is a hint: who is listed, when to come back.
//!
//! # Invariants
//!
//! - What is to be sent is state, not a queue: the newest own frame, one watch, one ping. A slow carrier grows nothing.
//! - The cursor only names a point up to which `listed` is whole; a snapshot that was cut off starts over.
//! - `Lost` comes exactly once for each attempt that ends, and says when the next one starts.
//! - Relayed datagrams keep nothing here: [`Client::relay`] gives the message, and who called it sends it or drops it.

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::NodeId;
use mesh_common::key::{ClusterKeys, SignKey};
use mesh_common::limits::{
    CONNECT_TIMEOUT, HELLO_TIMEOUT, MAX_MEMBERS, MAX_RELAY_PAYLOAD, RECONNECT_MAX, RECONNECT_MIN, SESSION_IDLE,
    SESSION_KEEPALIVE,
};
use mesh_common::time::Instant;

use super::limits::reason;
use crate::random::SplitMix64;
use crate::wire::frame::{Frame, Kind};
use crate::wire::session::{
    Binding, ClientMessage, Cursor, DecodeError, ErrorCode, Hello, ServerMessage, SessionError, Welcome,
};

/// A session that was live for this long shows a good server: the next failure starts with the shortest pause.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// How long a session has to show that it survived a change of the host's network: a round trip with one loss.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);
/// A session that relays and brings nothing for this long is doubted.
const RELAY_SILENCE: Duration = Duration::from_millis(1500);
/// The longest wait a server can ask for: a wrong answer must not send an agent away for good.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(600);

#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Host and port as configured; part of the signed transcript.
    pub server_name: String,
    pub keys: ClusterKeys,
    pub identity: SignKey,
    pub instance: [u8; 16],
    /// Bind to the server's challenge instead of the TLS exporter.
    pub proxied: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientEvent {
    /// Open a carrier to the server, then call `handle_connected` or `handle_disconnected`.
    Dial,
    /// Close the carrier that is open.
    HangUp,
    /// The server accepted the proof.
    Welcomed { observed: SocketAddr, stun_ports: Vec<u16>, stun_alt: Vec<SocketAddr>, relay: bool },
    /// A frame of some member or of this node, not verified yet.
    Frame(Bytes),
    /// The snapshot is whole: `listed` are all nodes this server lists, this one left out (at most
    /// [`MAX_MEMBERS`]). Comes again after each later batch.
    Synced { listed: BTreeSet<NodeId> },
    /// The server lists this node no longer: a hint.
    Gone(NodeId),
    /// Our own frame of this sequence number is stored.
    Stored { seq: u64 },
    /// A datagram of another node, by way of the server. Nothing about it is verified.
    Relayed { from: NodeId, payload: Bytes },
    /// What was to be relayed to this node is lost: the server does not reach it. A hint.
    NoPeer(NodeId),
    /// The server refused something, or dropped datagrams over a relay budget.
    Refused(SessionError),
    /// The session ended for this reason; the client comes back by itself after `retry_in`.
    Lost { reason: String, retry_in: Duration },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientState {
    /// Waiting for the next attempt.
    Waiting {
        until: Instant,
    },
    Dialing,
    /// The carrier is up, the proof is not answered yet.
    Proving,
    /// Accepted; the first snapshot is under way.
    Syncing,
    Live,
    Stopped,
}

#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
    random: SplitMix64,
    state: ClientState,
    /// When the state ends by itself: the attempt starts, or fails. `None` while a session is accepted.
    deadline: Option<Instant>,
    dialed_at: Instant,
    /// The attempt started before the network changed: the deadline is its last chance, then comes another at once.
    outdated: bool,
    /// The longest the next pause may be.
    pause: Duration,
    session: Session,
    /// The newest own frame.
    own: Option<Frame>,
    cursor: Option<Cursor>,
    listed: BTreeSet<NodeId>,
    events: VecDeque<ClientEvent>,
    malformed: u64,
    /// `stop` was called with a carrier up, and its `HangUp` is not polled yet.
    hang_up_due: bool,
}

/// What belongs to one carrier.
#[derive(Debug, Default)]
struct Session {
    hello: Option<Bytes>,
    /// The proof is signed: put and watch may follow it.
    proven: bool,
    watch_due: bool,
    put_due: bool,
    put_retry: Option<Instant>,
    ping_due: bool,
    pings: u64,
    next_ping: Option<Instant>,
    /// The ping whose answer tells the round trip time, and when it was due.
    timed: Option<(u64, Instant)>,
    rtt: Option<Duration>,
    /// The network changed: dead unless this ping or a later one is answered until then.
    probe: Option<(u64, Instant)>,
    /// The welcome offered it.
    relay: bool,
    dead_at: Option<Instant>,
    live_since: Option<Instant>,
}

/// Why a session ended, as far as the pause before the next one depends on it.
enum Ending {
    /// Nobody's plan: the pauses grow.
    Failure,
    /// The server refuses this agent until somebody changes a configuration.
    Refusal,
    /// The server has no room, and says when to ask again.
    NoRoom(Duration),
    /// The server stops for a while and spreads its clients over this.
    Drain(Duration),
    /// The way to the server is another one now.
    NetworkChanged,
}

impl Client {
    /// Starts at once: the first event is `Dial`. `seed` draws the jitter.
    pub fn new(config: ClientConfig, seed: u64, now: Instant) -> Self {
        let mut client = Self {
            config,
            random: SplitMix64::new(seed),
            state: ClientState::Dialing,
            deadline: None,
            dialed_at: now,
            outdated: false,
            pause: RECONNECT_MIN,
            session: Session::default(),
            own: None,
            cursor: None,
            listed: BTreeSet::new(),
            events: VecDeque::new(),
            malformed: 0,
            hang_up_due: false,
        };
        client.dial(now);
        client
    }

    /// A carrier is up; its TLS exporter value.
    pub fn handle_connected(&mut self, exporter: [u8; 32], now: Instant) {
        if self.state != ClientState::Dialing {
            // Too late: this attempt was given up, and its carrier with it.
            return self.events.push_back(ClientEvent::HangUp);
        }
        self.state = ClientState::Proving;
        self.deadline = Some(now + HELLO_TIMEOUT);
        self.outdated = false;
        self.session = Session::default();
        if !self.config.proxied {
            self.prove(Binding::Exporter(exporter));
        }
    }

    /// Dialling failed or the carrier broke; `reason` is for people (it names wrong pins, refused connections and so on).
    /// Not to be called for a carrier that was closed after `HangUp`.
    pub fn handle_disconnected(&mut self, reason: &str, now: Instant) {
        if self.has_attempt() {
            self.lose(reason.to_owned(), Ending::Failure, now);
        } else if self.state == ClientState::Stopped {
            self.session = Session::default();
            self.hang_up_due = false;
        }
    }

    pub fn handle_message(&mut self, message: &[u8], now: Instant) {
        if !self.has_session() {
            return;
        }
        if self.session.dead_at.is_some() {
            self.session.dead_at = Some(now + SESSION_IDLE);
        }
        let message = match ServerMessage::decode(message) {
            Ok(message) => message,
            Err(DecodeError::UnknownType(_)) => {
                self.malformed += 1;
                return;
            }
            Err(DecodeError::Malformed) => return self.lose_to_garbage(now),
        };
        match message {
            // A proof for the exporter is out already, or a proof for this connection's first challenge.
            ServerMessage::Challenge(challenge) => {
                if self.config.proxied && !self.session.proven {
                    self.prove(Binding::Challenge(challenge));
                }
            }
            ServerMessage::Pong(number) => {
                if self.session.probe.is_some_and(|(ping, _)| number >= ping) {
                    self.session.probe = None;
                }
                if let Some((_, at)) = self.session.timed.take_if(|(ping, _)| *ping == number) {
                    self.session.rtt = Some(now.since(at));
                }
            }
            ServerMessage::Drain { retry_after } => {
                let reason = format!("{} restarts and asked to come back", self.config.server_name);
                self.hang_up(reason, Ending::Drain(retry_after), now);
            }
            ServerMessage::Error(error) => self.handle_refusal(error, now),
            ServerMessage::Welcome(welcome) if self.state == ClientState::Proving && self.session.proven => {
                self.state = ClientState::Syncing;
                self.deadline = None;
                self.outdated = false;
                self.session.next_ping = Some(now + SESSION_KEEPALIVE);
                self.session.dead_at = Some(now + SESSION_IDLE);
                self.session.relay = welcome.relay;
                let Welcome { observed, stun_ports, stun_alt, relay, .. } = welcome;
                self.events.push_back(ClientEvent::Welcomed { observed, stun_ports, stun_alt, relay });
            }
            // A datagram may overtake the welcome.
            ServerMessage::Relayed { .. } if self.state == ClientState::Proving => {}
            // Nothing else belongs before the welcome, and the welcome comes once.
            _ if self.state == ClientState::Proving => self.lose_to_garbage(now),
            ServerMessage::Welcome(_) => self.lose_to_garbage(now),
            ServerMessage::Stored { seq } => self.events.push_back(ClientEvent::Stored { seq }),
            ServerMessage::Restart => {
                self.cursor = None;
                self.listed.clear();
                self.state = ClientState::Syncing;
            }
            ServerMessage::Frame(bytes) => self.handle_frame(bytes),
            ServerMessage::Gone(node) => {
                self.listed.remove(&node);
                self.events.push_back(ClientEvent::Gone(node));
            }
            ServerMessage::Relayed { from, payload } => self.events.push_back(ClientEvent::Relayed { from, payload }),
            ServerMessage::NoPeer(node) => self.events.push_back(ClientEvent::NoPeer(node)),
            ServerMessage::Synced(cursor) => {
                self.cursor = Some(cursor);
                self.state = ClientState::Live;
                self.session.live_since.get_or_insert(now);
                self.events.push_back(ClientEvent::Synced { listed: self.listed.clone() });
            }
        }
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            let server = &self.config.server_name;
            return match self.state {
                ClientState::Waiting { .. } => self.dial(now),
                _ if self.outdated => self.hang_up("the network changed".to_owned(), Ending::NetworkChanged, now),
                ClientState::Dialing => {
                    let reason = format!("{server} did not answer within {CONNECT_TIMEOUT:?}");
                    self.hang_up(reason, Ending::Failure, now);
                }
                _ => {
                    let reason = format!(
                        "{server} did not answer the proof within {HELLO_TIMEOUT:?}: is it a discovery server?"
                    );
                    self.hang_up(reason, Ending::Failure, now);
                }
            };
        }
        if self.session.dead_at.is_some_and(|dead_at| dead_at <= now) {
            let reason = format!("{} was silent for {SESSION_IDLE:?}", self.config.server_name);
            return self.hang_up(reason, Ending::Failure, now);
        }
        if self.session.probe.is_some_and(|(_, dead_at)| dead_at <= now) {
            let reason = format!("{} did not answer after the network changed", self.config.server_name);
            return self.hang_up(reason, Ending::NetworkChanged, now);
        }
        if self.session.next_ping.is_some_and(|next| next <= now) {
            self.ping(now);
            self.session.next_ping = Some(now + SESSION_KEEPALIVE);
        }
        if self.session.put_retry.is_some_and(|retry| retry <= now) {
            self.session.put_retry = None;
            self.session.put_due = true;
        }
    }

    /// The host's network changed. Whoever waits tries again at once; an attempt under way may have started from an address that
    /// is gone, so it ends soon and starts anew; a session shows that it still lives, or is replaced.
    pub fn handle_network_changed(&mut self, now: Instant) {
        match self.state {
            ClientState::Waiting { .. } => {
                self.pause = RECONNECT_MIN;
                self.dial(now);
            }
            ClientState::Dialing | ClientState::Proving => {
                let last_chance = (self.dialed_at + RECONNECT_MIN).max(now);
                self.deadline = self.deadline.map(|deadline| deadline.min(last_chance));
                self.outdated = true;
            }
            ClientState::Syncing | ClientState::Live => {
                self.doubt_session(now);
            }
            ClientState::Stopped => {}
        }
    }

    /// Measures the round trip time anew, where there is a session.
    pub fn handle_check(&mut self, now: Instant) {
        if matches!(self.state, ClientState::Syncing | ClientState::Live) {
            self.ping(now);
        }
    }

    /// A round trip over the session, the last time it was measured.
    pub fn rtt(&self) -> Option<Duration> {
        self.session.rtt
    }

    /// Whether a ping waits for its answer.
    pub fn is_measuring(&self) -> bool {
        self.session.timed.is_some()
    }

    /// Whether [`Self::relay`] would give a message now.
    pub fn offers_relay(&self) -> bool {
        self.session.relay && matches!(self.state, ClientState::Syncing | ClientState::Live)
    }

    /// The message that asks the server to hand this datagram to another node; the caller sends it as one that may be lost.
    /// `None` without a session that relays, or when the datagram is empty or over [`MAX_RELAY_PAYLOAD`].
    ///
    /// Who relays and hears nothing asks at once whether the session still lives: an uplink may have changed unseen.
    pub fn relay(&mut self, to: &NodeId, payload: &[u8], now: Instant) -> Option<Bytes> {
        let fits = (1..=MAX_RELAY_PAYLOAD).contains(&payload.len());
        if !fits || !self.offers_relay() {
            return None;
        }
        let is_silent = self.session.dead_at.is_some_and(|dead_at| dead_at <= now + (SESSION_IDLE - RELAY_SILENCE));
        if is_silent && self.session.probe.is_none() {
            self.doubt_session(now);
        }
        Some(ClientMessage::relay(to, payload))
    }

    /// The node's own newest frame: put now, and again after every reconnect, until a newer one replaces it. While the server
    /// asked to wait, it waits too. One that is not newer is ignored.
    pub fn publish(&mut self, frame: Frame, _now: Instant) {
        if self.own.as_ref().is_some_and(|own| own.seq() >= frame.seq()) {
            return;
        }
        self.own = Some(frame);
        self.session.put_due = self.session.put_retry.is_none();
    }

    /// Ends the session for good (after pending messages were polled, `HangUp`). Answers are not heard any more: who wants to
    /// know that a farewell is stored waits for `Stored` first.
    pub fn stop(&mut self) {
        if self.has_attempt() {
            self.hang_up_due = true;
        }
        self.state = ClientState::Stopped;
        self.deadline = None;
        self.session.next_ping = None;
        self.session.dead_at = None;
        self.session.probe = None;
        self.session.put_retry = None;
    }

    pub fn state(&self) -> ClientState {
        self.state
    }

    /// Malformed or unknown messages of this server so far.
    pub fn malformed(&self) -> u64 {
        self.malformed
    }

    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        let session = &mut self.session;
        if let Some(hello) = session.hello.take() {
            return Some(hello);
        }
        if !session.proven {
            return None;
        }
        if std::mem::take(&mut session.put_due)
            && let Some(own) = &self.own
        {
            return Some(ClientMessage::Put(own.as_bytes().clone()).encode());
        }
        if std::mem::take(&mut session.watch_due) {
            return Some(ClientMessage::Watch(self.cursor).encode());
        }
        if std::mem::take(&mut session.ping_due) {
            session.pings += 1;
            return Some(ClientMessage::Ping(session.pings).encode());
        }
        None
    }

    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        let sent = !self.session.proven
            || (self.session.hello.is_none()
                && !self.session.put_due
                && !self.session.watch_due
                && !self.session.ping_due);
        if sent && std::mem::take(&mut self.hang_up_due) {
            self.session = Session::default();
            return Some(ClientEvent::HangUp);
        }
        None
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let what = match self.state {
            ClientState::Waiting { .. } => "the next attempt to reach a discovery server",
            ClientState::Dialing => "a discovery server that does not answer",
            _ => "a discovery server that does not answer the proof",
        };
        [
            (self.deadline, what),
            (self.session.dead_at, "a discovery server gone silent"),
            (
                self.session.probe.map(|(_, dead_at)| dead_at),
                "a session that may not have survived a change of the network",
            ),
            (self.session.next_ping, "the keepalive of a discovery session"),
            (self.session.put_retry, "putting the own record again"),
        ]
        .into_iter()
        .filter_map(|(due, what)| Some((due?, what)))
        .min()
    }

    /// The session shows that it still lives, or is replaced. Later doubts do not put the deadline off.
    fn doubt_session(&mut self, now: Instant) {
        self.session.probe.get_or_insert((self.session.pings + 1, now + PROBE_TIMEOUT));
        self.ping(now);
    }

    fn ping(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.session.ping_due, true) {
            self.session.timed = Some((self.session.pings + 1, now));
        }
    }

    fn has_session(&self) -> bool {
        matches!(self.state, ClientState::Proving | ClientState::Syncing | ClientState::Live)
    }

    fn has_attempt(&self) -> bool {
        self.state == ClientState::Dialing || self.has_session()
    }

    fn dial(&mut self, now: Instant) {
        self.state = ClientState::Dialing;
        self.deadline = Some(now + CONNECT_TIMEOUT);
        self.dialed_at = now;
        self.outdated = false;
        self.events.push_back(ClientEvent::Dial);
    }

    /// Signs the proof for this connection. Put and watch follow in the same flight: a server that refuses the proof ignores
    /// them, and the one that accepts saves a round trip.
    fn prove(&mut self, binding: Binding) {
        let ClientConfig { server_name, keys, identity, instance, .. } = &self.config;
        let hello = Hello::sign(keys, identity, *instance, server_name, binding);
        self.session.hello = Some(ClientMessage::Hello(Box::new(hello)).encode());
        self.session.proven = true;
        self.session.put_due = self.own.is_some();
        self.session.watch_due = true;
    }

    fn handle_frame(&mut self, bytes: Bytes) {
        let Ok(frame) = Frame::parse(bytes) else {
            self.malformed += 1;
            return;
        };
        let node = frame.node();
        match frame.kind() {
            // A frame of another cluster is no member; whoever opens it says so.
            Kind::Record if frame.namespace() == self.config.keys.namespace => {
                if self.listed.len() < MAX_MEMBERS && node != self.config.identity.node_id() {
                    self.listed.insert(node);
                }
            }
            Kind::Record => {}
            Kind::Tombstone => {
                self.listed.remove(&node);
            }
        }
        self.events.push_back(ClientEvent::Frame(frame.as_bytes().clone()));
    }

    fn handle_refusal(&mut self, error: SessionError, now: Instant) {
        let (code, retry_after) = (error.code, error.retry_after.min(MAX_RETRY_AFTER));
        let reason = self.explain(&error);
        let is_relay_budget =
            [reason::RELAY_CLIENT_BYTES, reason::RELAY_NAMESPACE_BYTES].contains(&error.limit.as_str());
        self.events.push_back(ClientEvent::Refused(error));
        match code {
            ErrorCode::AuthFailed | ErrorCode::NamespaceRefused => self.hang_up(reason, Ending::Refusal, now),
            _ if self.state == ClientState::Proving => self.hang_up(reason, Ending::NoRoom(retry_after), now),
            ErrorCode::RateLimited if is_relay_budget => {}
            ErrorCode::RateLimited | ErrorCode::ClusterFull | ErrorCode::ServerFull => {
                // Only a put can meet these once the session stands.
                self.session.put_due = false;
                self.session.put_retry = Some(now + self.spread_around(retry_after.max(RECONNECT_MIN)));
            }
            ErrorCode::Protocol | ErrorCode::TooLarge => self.hang_up(reason, Ending::Failure, now),
            // The same bytes would be refused again: a newer frame or a new session tries anew.
            ErrorCode::Stale | ErrorCode::BadFrame => {}
        }
    }

    fn explain(&self, error: &SessionError) -> String {
        let ClientConfig { server_name, keys, proxied, .. } = &self.config;
        let fix = match error.code {
            // A wrong secret is another namespace with a good proof of its own: what breaks a proof stands in between.
            ErrorCode::AuthFailed if *proxied => {
                "; a server behind a proxy needs --own-name with the host of this name"
            }
            ErrorCode::AuthFailed => "; if a proxy in front of it ends TLS, set `proxied: true` for this server",
            ErrorCode::NamespaceRefused => {
                return format!(
                    "{server_name} refused: {error}; allow it there with --only-namespace {}, or use another server",
                    keys.namespace
                );
            }
            _ => "",
        };
        format!("{server_name} refused: {error}{fix}")
    }

    fn lose_to_garbage(&mut self, now: Instant) {
        self.malformed += 1;
        let reason = format!("{} answers garbage: is it a discovery server?", self.config.server_name);
        self.hang_up(reason, Ending::Failure, now);
    }

    fn hang_up(&mut self, reason: String, ending: Ending, now: Instant) {
        self.events.push_back(ClientEvent::HangUp);
        self.lose(reason, ending, now);
    }

    /// Ends the attempt and draws the pause before the next.
    fn lose(&mut self, reason: String, ending: Ending, now: Instant) {
        if self.session.live_since.is_some_and(|since| now.since(since) >= STABLE_AFTER) {
            self.pause = RECONNECT_MIN;
        }
        self.session = Session::default();
        let retry_in = match ending {
            Ending::Failure => self.draw_pause(),
            Ending::Refusal => {
                self.pause = RECONNECT_MAX;
                self.draw_pause()
            }
            Ending::NoRoom(retry_after) => {
                let pause = self.draw_pause();
                pause.max(self.spread_around(retry_after))
            }
            Ending::NetworkChanged => {
                self.pause = RECONNECT_MIN;
                Duration::ZERO
            }
            Ending::Drain(spread) => {
                self.random.between(RECONNECT_MIN / 2, spread.min(MAX_RETRY_AFTER).max(RECONNECT_MIN))
            }
        };
        let until = now + retry_in;
        self.state = ClientState::Waiting { until };
        self.deadline = Some(until);
        self.events.push_back(ClientEvent::Lost { reason, retry_in });
    }

    /// Between half and all of the pause, which then doubles.
    fn draw_pause(&mut self) -> Duration {
        let drawn = self.random.jitter(self.pause);
        self.pause = (self.pause * 2).min(RECONNECT_MAX);
        drawn
    }

    /// A wait a server asked for, 50 % less to 50 % more, so that those it asked do not come together.
    fn spread_around(&mut self, wait: Duration) -> Duration {
        self.random.between(wait / 2, wait.saturating_mul(3) / 2)
    }
}

#[cfg(test)]
mod tests;
