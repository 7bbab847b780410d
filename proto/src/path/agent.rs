//! One peer's paths: which one carries its packets, what is probed, and when to try again.
//!
//! Role-less: both ends run the same machine. Owns the peer's addresses ([`candidate`](super::candidate)), what is known of each
//! path, the wish for a session, and the choice. It seals nothing and counts no budget of the node: it gives probes in plain
//! ([`ProbeTransmit`]), a [`PeerRoute`], and asks for handshakes.
//!
//! Holds: what a relay carries comes first and a direct path later; only an answered ping proves a path, both ways;
//! probes promote a path at once, and only silence or a proof that the tunnel does not pass demotes it; while that is unsure,
//! data goes out twice; without a relay the last path is kept and handshakes go to every address; a peer that nobody talks to
//! costs nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::id::ServerId;
use mesh_common::limits::{PEER_DOWN_AFTER, PEER_RETRY_MAX, REJECT_AFTER_TIME, REKEY_TIMEOUT};
use mesh_common::nat::NatClass;
use mesh_common::time::Instant;

use crate::device::{Capabilities, Endpoint, Family, PeerReport, PeerRoute, SocketId};
use crate::path::candidate::{Change, Remotes};
use crate::path::hard::Guessing;
use crate::path::round::Round;
use crate::path::track::Track;
use crate::path::view::Switch;
use crate::random::SplitMix64;
use crate::wire::probe::Probe;
use crate::wire::record::Candidate;

/// The first retry of an unanswered handshake. WireGuard's own retry is 5 s, too slow for a peer that learns of us a
/// moment after our first attempt.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// A proven endpoint gets this long to answer a handshake before all candidates are tried again.
const HANDSHAKE_TRUST: Duration = Duration::from_secs(1);
/// Tunnel data moved within this long: the path is watched closely.
pub(super) const ACTIVE: Duration = Duration::from_secs(10);
/// Tunnel data moved within this long: the path is watched.
pub(super) const WARM: Duration = Duration::from_secs(30);
/// The peer called within this long, the time of a round: its probes are helped along.
pub(super) const CALLED: Duration = Duration::from_secs(10);
/// A relay that does not reach the peer is asked again after this.
const ABSENT: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathEvent {
    Route(PeerRoute),
    StartHandshake,
    /// Open this many sockets beside the main pair; answer by [`PathAgent::handle_sockets`].
    OpenSockets {
        family: Family,
        count: u16,
    },
    /// This path needs them no more.
    CloseSockets(BTreeSet<SocketId>),
    /// The direct path that carried answers no more: perhaps our own NAT forgot it.
    FellSilent,
}

/// A probe that wants to go out: the owner of keys and counters seals it. One that waits for a budget may wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeTransmit {
    pub to: Endpoint,
    pub probe: Probe,
    /// The IP time to live, where it is not the host's own: a datagram that opens our NAT and never reaches the peer's.
    pub ttl: Option<u8>,
    /// The exact length of the datagram, where it is asked whether such a one passes.
    pub pad_to: Option<u16>,
}

/// What the simulator switches off, one by one, to prove that each is needed. All on everywhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathPolicy {
    /// Call the peer over a relay, so that both sides probe at once.
    pub call: bool,
    /// Send on two paths while it is not sure that the first one carries.
    pub dual_send: bool,
    /// Stop to trust a path whose probes are not answered.
    pub trust_expiry: bool,
    /// Guess the ports of a peer behind a NAT that nothing else gets through.
    pub guess_ports: bool,
}

impl Default for PathPolicy {
    fn default() -> Self {
        Self { call: true, dual_send: true, trust_expiry: true, guess_ports: true }
    }
}

/// What a peer's path is good for, derived from facts and `now`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// No session and nobody wants one.
    Idle,
    /// Wanted since then, not there yet.
    Connecting {
        since: Instant,
    },
    Up {
        endpoint: Endpoint,
    },
    /// Wanted since then in vain.
    Down {
        since: Instant,
    },
}

#[derive(Debug)]
pub struct PathAgent {
    pub(super) policy: PathPolicy,
    pub(super) device: Capabilities,
    pub(super) random: SplitMix64,
    pub(super) remotes: Remotes,
    pub(super) own: Vec<Candidate>,
    pub(super) subnets: Vec<IpNet>,
    pub(super) relays: Vec<ServerId>,
    /// Relays that said they do not reach the peer, until then.
    pub(super) absent: BTreeMap<ServerId, Instant>,
    pub(super) own_nat: [NatClass; 2],
    pub(super) peer_nat: [NatClass; 2],
    instance: Option<[u8; 16]>,

    /// The peer restarted since its tunnel was made.
    is_tunnel_stale: bool,
    tunnel_generation: u64,
    last_handshake: Option<Instant>,
    pub(super) attempt: Option<Attempt>,

    pub(super) tracks: BTreeMap<Endpoint, Track>,
    /// The path that carries.
    pub(super) primary: Option<Endpoint>,
    /// A direct path that carried and was left.
    pub(super) last_proven: Option<Endpoint>,
    /// The path that carried before, while the new one is not proven to carry the tunnel.
    pub(super) before: Option<Before>,
    pub(super) last_active: Option<Instant>,
    /// When the peer last called for our probes.
    pub(super) last_called: Option<Instant>,
    /// Everything that an idle peer needs was done once.
    pub(super) is_at_rest: bool,
    pub(super) relayed_since: Option<Instant>,
    pub(super) mtu: Option<u16>,

    pub(super) round: Option<Round>,
    /// When the last round began, and how many went by in vain.
    pub(super) last_round: Option<Instant>,
    pub(super) rounds_in_vain: usize,
    pub(super) wanted_direct_since: Option<Instant>,
    pub(super) guessing: Guessing,
    pub(super) last_call_answer: Option<Instant>,
    pub(super) pongs: BTreeMap<Endpoint, super::exchange::Budget>,
    pub(super) ping_backs: Option<super::exchange::Budget>,
    pub(super) unknown_starts: Option<super::exchange::Budget>,

    pub(super) last_switch: Option<Switch>,
    pub(super) switches: u64,
    pub(super) probes_sent: u64,
    pub(super) probes_received: u64,
    pub(super) time_to_direct: Option<Duration>,
    pub(super) time_to_first_byte: Option<Duration>,

    /// When everything was last worked out.
    pub(super) judged_at: Instant,
    /// When something follows from the passing of time alone.
    pub(super) due: Option<(Instant, &'static str)>,
    route: PeerRoute,
    pub(super) transmits: VecDeque<ProbeTransmit>,
    pub(super) events: VecDeque<PathEvent>,
}

/// An unanswered wish for a session.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attempt {
    pub(super) since: Instant,
    retry_at: Instant,
    pause: Duration,
}

/// The path that was left for a better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Before {
    pub(super) endpoint: Endpoint,
    pub(super) until: Instant,
}

impl PathAgent {
    /// `seed` draws the jitter of retries and the ids of pings.
    pub fn new(seed: u64, policy: PathPolicy) -> Self {
        Self {
            policy,
            device: Capabilities::USERSPACE,
            random: SplitMix64::new(seed),
            remotes: Remotes::default(),
            own: Vec::new(),
            subnets: Vec::new(),
            relays: Vec::new(),
            absent: BTreeMap::new(),
            own_nat: [NatClass::default(); 2],
            peer_nat: [NatClass::default(); 2],
            instance: None,
            is_tunnel_stale: false,
            tunnel_generation: 0,
            last_handshake: None,
            attempt: None,
            tracks: BTreeMap::new(),
            primary: None,
            last_proven: None,
            before: None,
            last_active: None,
            last_called: None,
            is_at_rest: true,
            relayed_since: None,
            mtu: None,
            round: None,
            last_round: None,
            rounds_in_vain: 0,
            wanted_direct_since: None,
            guessing: Guessing::default(),
            last_call_answer: None,
            pongs: BTreeMap::new(),
            ping_backs: None,
            unknown_starts: None,
            last_switch: None,
            switches: 0,
            probes_sent: 0,
            probes_received: 0,
            time_to_direct: None,
            time_to_first_byte: None,
            judged_at: Instant::ORIGIN,
            due: None,
            route: PeerRoute::default(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The peer's newest candidates, best first: those of its record, our own addresses and those of the overlay left out. A
    /// proven endpoint outlives its place in the list.
    pub fn handle_candidates(&mut self, candidates: &[Candidate], now: Instant) {
        match self.remotes.announce(candidates) {
            Change::None => return,
            Change::Gone => {}
            Change::New => self.hunt_again(now),
        }
        self.settle(now);
    }

    /// Our own candidates as they are now, best first: what a CALL tells the peer.
    pub fn handle_own_candidates(&mut self, candidates: &[Candidate], now: Instant) {
        if self.own == candidates {
            return;
        }
        let is_new = candidates.iter().any(|candidate| !self.own.contains(candidate));
        self.own = candidates.to_vec();
        if is_new && !self.is_direct_trusted(now) {
            self.hunt_again(now);
        }
        self.settle(now);
    }

    /// The subnets this node is connected to: a path inside one of them is the best there is.
    pub fn handle_subnets(&mut self, subnets: &[IpNet], now: Instant) {
        if self.subnets != subnets {
            self.subnets = subnets.to_vec();
            self.settle(now);
        }
    }

    /// The relays through which this peer can be reached now, best first.
    pub fn handle_relays(&mut self, relays: &[ServerId], now: Instant) {
        if self.relays == relays {
            return;
        }
        let is_first = self.best_relay(now).is_none();
        self.relays = relays.to_vec();
        self.absent.retain(|relay, _| relays.contains(relay));
        if is_first && self.best_relay(now).is_some() && !self.is_direct_trusted(now) {
            self.hunt_again(now);
        }
        self.settle(now);
    }

    /// The NATs in front of both nodes, IPv4 then IPv6.
    pub fn handle_nat(&mut self, own: [NatClass; 2], peer: [NatClass; 2], _now: Instant) {
        (self.own_nat, self.peer_nat) = (own, peer);
    }

    /// Which start of the peer's agent its record is of. After another one the peer has no session with us, and traffic
    /// that flowed is wanted still. The tunnel is not thrown away at once: the restarted agent may have greeted us before its
    /// record came, and that session is good. It goes when nothing answers, or when nobody uses it.
    pub fn handle_instance(&mut self, instance: [u8; 16], now: Instant) {
        let before = self.instance.replace(instance);
        if before == Some(instance) && !self.is_tunnel_stale {
            return;
        }
        if before.is_some_and(|before| before != instance) {
            self.is_tunnel_stale = true;
            self.doubt_all();
            if self.attempt.is_some() || matches!(self.state(now), PathState::Up { .. }) {
                self.attempt = None;
                self.want(now);
                self.events.push_back(PathEvent::StartHandshake);
            }
        }
        if self.state(now) == PathState::Idle {
            self.renew_tunnel();
        }
        self.settle(now);
    }

    /// Which tunnel this peer should have; another number asks for another tunnel.
    pub fn tunnel_generation(&self) -> u64 {
        self.tunnel_generation
    }

    pub fn handle_report(&mut self, report: &PeerReport, now: Instant) {
        match report {
            PeerReport::Demand => {
                self.touch(now);
                self.want(now);
            }
            PeerReport::Handshake { endpoint } => {
                self.last_handshake = Some(now);
                if let Some(attempt) = self.attempt.take() {
                    self.time_to_first_byte = Some(now.since(attempt.since));
                }
                self.touch(now);
                self.take_handshake(*endpoint, now);
            }
            PeerReport::Roamed { endpoint } => self.take_roamed(*endpoint, now),
            PeerReport::Traffic(paths) => self.take_traffic(paths, now),
        }
        self.settle(now);
    }

    /// An authentic and fresh probe of the peer. The candidates of a CALL are judged by the caller like those of a record.
    pub fn handle_probe(&mut self, from: Endpoint, probe: &Probe, now: Instant) {
        self.probes_received += 1;
        self.note_seen(from, now);
        match probe {
            Probe::Ping { id, heard } => self.take_ping(from, *id, *heard, now),
            Probe::Pong { id, heard, .. } => self.take_pong(from, *id, *heard, now),
            Probe::Call(call) => self.take_call(from, call, now),
        }
        self.settle(now);
    }

    /// This relay does not reach the peer.
    pub fn handle_no_peer(&mut self, server: ServerId, now: Instant) {
        self.absent.insert(server, now + ABSENT);
        self.settle(now);
    }

    /// Our own addresses changed: a live path is proven anew, others wait for demand.
    pub fn handle_network_changed(&mut self, now: Instant) {
        self.doubt_all();
        for track in self.tracks.values_mut() {
            track.mtu = super::mtu::MtuSearch::default();
            track.barred_until = None;
        }
        if matches!(self.state(now), PathState::Up { .. }) || self.attempt.is_some() {
            self.attempt = None;
            self.want(now);
            self.hunt_again(now);
            self.settle(now);
            self.events.push_back(PathEvent::StartHandshake);
        }
        self.settle(now);
    }

    /// What the device can do that carries this peer.
    pub fn handle_device(&mut self, device: Capabilities, now: Instant) {
        if self.device != device {
            self.device = device;
            self.settle(now);
        }
    }

    /// One handshake without waiting for a packet: after our restart, so that a peer with an old session finds us again.
    pub fn handle_wake(&mut self, _now: Instant) {
        self.events.push_back(PathEvent::StartHandshake);
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        // Every peer is asked whenever one is due.
        if self.poll_timeout().is_some_and(|(due, _)| due <= now) {
            self.retry_handshake(now);
            self.settle(now);
        }
    }

    pub fn state(&self, now: Instant) -> PathState {
        match (self.attempt, self.live_endpoint(now)) {
            (Some(attempt), _) if now.since(attempt.since) >= PEER_DOWN_AFTER => {
                PathState::Down { since: attempt.since }
            }
            (_, Some(endpoint)) => PathState::Up { endpoint },
            (Some(attempt), None) => PathState::Connecting { since: attempt.since },
            (None, None) => PathState::Idle,
        }
    }

    /// Where packets go now.
    pub fn route(&self) -> &PeerRoute {
        &self.route
    }

    /// The largest packet that fits through the path; `None` for the link's own MTU.
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    pub fn poll_transmit(&mut self) -> Option<ProbeTransmit> {
        self.transmits.pop_front()
    }

    pub fn poll_event(&mut self) -> Option<PathEvent> {
        self.events.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let handshake = self.attempt.map(|attempt| (attempt.retry_at, "try a peer again"));
        handshake.into_iter().chain(self.due).min_by_key(|(at, _)| *at)
    }

    pub(super) fn renew_tunnel(&mut self) {
        if std::mem::take(&mut self.is_tunnel_stale) {
            self.tunnel_generation += 1;
            self.last_handshake = None;
        }
    }

    /// Data may go out on two paths at once.
    pub(super) fn sends_twice(&self) -> bool {
        self.policy.dual_send && self.device.several_endpoints
    }

    /// Wants a session, and the best path for it.
    pub(super) fn want(&mut self, now: Instant) {
        if self.attempt.is_none() {
            self.attempt = Some(Attempt { since: now, retry_at: now + FIRST_RETRY, pause: FIRST_RETRY });
            self.touch(now);
            if !self.is_direct_trusted(now) {
                self.hunt_again(now);
            }
        }
    }

    /// A session that may carry data.
    pub(super) fn is_live(&self, now: Instant) -> bool {
        self.last_handshake.is_some_and(|at| now.since(at) < REJECT_AFTER_TIME)
    }

    fn live_endpoint(&self, now: Instant) -> Option<Endpoint> {
        self.primary.filter(|_| self.is_live(now))
    }

    fn retry_handshake(&mut self, now: Instant) {
        let Some(attempt) = self.attempt.filter(|attempt| now >= attempt.retry_at) else { return };
        let down_at = attempt.since + PEER_DOWN_AFTER;
        let longest = if now < down_at { REKEY_TIMEOUT } else { PEER_RETRY_MAX };
        let pause = (attempt.pause * 2).min(longest);
        let mut retry_at = now + self.random.jitter(pause);
        if now < down_at {
            // Whoever watches `state` is woken when it turns to down.
            retry_at = retry_at.min(down_at);
        }
        self.attempt = Some(Attempt { retry_at, pause, ..attempt });
        if now.since(attempt.since) >= HANDSHAKE_TRUST {
            self.give_up_unanswered(now);
            self.renew_tunnel();
        }
        self.settle(now);
        self.events.push_back(PathEvent::StartHandshake);
    }

    /// The route that follows from everything; told only when it changed.
    pub(super) fn set_route(&mut self, route: PeerRoute) {
        if route != self.route {
            self.route = route.clone();
            self.events.push_back(PathEvent::Route(route));
        }
    }
}

#[cfg(test)]
mod tests;
