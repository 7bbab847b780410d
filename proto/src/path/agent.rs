//! One peer's path: which endpoint its packets go to, and when to try again.
//!
//! Owns the candidates a peer announced, the endpoint that a handshake proved, and the schedule of attempts. It sends
//! nothing: it gives a [`PeerRoute`] and asks for handshakes. While nothing is proven the initiation goes to every
//! candidate at once, because the responder answers the first that arrives and that is the best path there is; a proven
//! endpoint stays until distress: unanswered demand, a changed network, or authentic traffic from elsewhere.

use std::collections::VecDeque;
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::id::ServerId;
use mesh_common::limits::{PEER_DOWN_AFTER, PEER_RETRY_MAX, REJECT_AFTER_TIME, REKEY_TIMEOUT};
use mesh_common::nat::NatClass;
use mesh_common::time::Instant;

use crate::device::{Endpoint, PeerReport, PeerRoute};
use crate::path::candidate::Remotes;
use crate::path::view::PathView;
use crate::random::SplitMix64;
use crate::wire::probe::Probe;
use crate::wire::record::Candidate;

/// The first retry of an unanswered handshake. WireGuard's own retry is 5 s, too slow for a peer that learns of us a
/// moment after our first attempt.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// A proven endpoint gets this long to answer before all candidates are tried again.
const TRUST: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathEvent {
    Route(PeerRoute),
    StartHandshake,
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
}

impl Default for PathPolicy {
    fn default() -> Self {
        Self { call: true, dual_send: true, trust_expiry: true }
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
    #[expect(dead_code, reason = "the policy that it switches comes next")]
    policy: PathPolicy,
    remotes: Remotes,
    own: Vec<Candidate>,
    subnets: Vec<IpNet>,
    relays: Vec<ServerId>,
    own_nat: [NatClass; 2],
    peer_nat: [NatClass; 2],
    proven: Option<Endpoint>,
    /// The endpoint that was proven last and then fell silent.
    last_proven: Option<Endpoint>,
    instance: Option<[u8; 16]>,
    /// The peer restarted since its tunnel was made.
    is_tunnel_stale: bool,
    tunnel_generation: u64,
    last_handshake: Option<Instant>,
    attempt: Option<Attempt>,
    random: SplitMix64,
    route: PeerRoute,
    events: VecDeque<PathEvent>,
}

/// An unanswered wish for a session.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    since: Instant,
    retry_at: Instant,
    pause: Duration,
}

impl PathAgent {
    /// `seed` draws the jitter of retries.
    pub fn new(seed: u64, policy: PathPolicy) -> Self {
        Self {
            policy,
            remotes: Remotes::default(),
            own: Vec::new(),
            subnets: Vec::new(),
            relays: Vec::new(),
            own_nat: [NatClass::default(); 2],
            peer_nat: [NatClass::default(); 2],
            proven: None,
            last_proven: None,
            instance: None,
            is_tunnel_stale: false,
            tunnel_generation: 0,
            last_handshake: None,
            attempt: None,
            random: SplitMix64::new(seed),
            route: PeerRoute::default(),
            events: VecDeque::new(),
        }
    }

    /// The peer's newest candidates, best first: those of its record, our own addresses and those of the overlay left out. A
    /// proven endpoint outlives its place in the list.
    pub fn handle_candidates(&mut self, candidates: &[Candidate], now: Instant) {
        self.remotes.announce(candidates);
        self.update_route(now);
    }

    /// Our own candidates as they are now, best first: what a CALL tells the peer.
    pub fn handle_own_candidates(&mut self, candidates: &[Candidate], _now: Instant) {
        self.own = candidates.to_vec();
    }

    /// The subnets this node is connected to: a path inside one of them is the best there is.
    pub fn handle_subnets(&mut self, subnets: &[IpNet], _now: Instant) {
        self.subnets = subnets.to_vec();
    }

    /// The relays through which this peer can be reached now, best first.
    pub fn handle_relays(&mut self, relays: &[ServerId], now: Instant) {
        self.relays = relays.to_vec();
        self.update_route(now);
    }

    /// The NATs in front of both nodes, IPv4 then IPv6.
    pub fn handle_nat(&mut self, own: [NatClass; 2], peer: [NatClass; 2], _now: Instant) {
        (self.own_nat, self.peer_nat) = (own, peer);
    }

    /// An authentic and fresh probe of the peer. The candidates of a CALL are judged by the caller like those of a record.
    pub fn handle_probe(&mut self, _from: Endpoint, _probe: &Probe, _now: Instant) {}

    /// This relay does not reach the peer.
    pub fn handle_no_peer(&mut self, server: ServerId, now: Instant) {
        self.relays.retain(|relay| *relay != server);
        self.update_route(now);
    }

    /// Which start of the peer's agent its record is of. After another one the peer has no session with us, and traffic
    /// that flowed is wanted still. The tunnel is not thrown away at once: the restarted agent may have greeted us before its
    /// record came, and that session is good. It goes when nothing answers, or when nobody uses it.
    pub fn handle_instance(&mut self, instance: [u8; 16], now: Instant) {
        let before = self.instance.replace(instance);
        if before.is_some_and(|before| before != instance) {
            self.is_tunnel_stale = true;
            if self.attempt.is_some() || matches!(self.state(now), PathState::Up { .. }) {
                self.attempt = None;
                self.want(now);
                self.events.push_back(PathEvent::StartHandshake);
            }
        }
        if self.state(now) == PathState::Idle {
            self.renew_tunnel();
        }
        self.update_route(now);
    }

    /// Which tunnel this peer should have; another number asks for another tunnel.
    pub fn tunnel_generation(&self) -> u64 {
        self.tunnel_generation
    }

    pub fn handle_report(&mut self, report: &PeerReport, now: Instant) {
        match report {
            PeerReport::Demand => self.want(now),
            PeerReport::Handshake { endpoint } => {
                self.proven = Some(*endpoint);
                self.last_handshake = Some(now);
                self.attempt = None;
            }
            PeerReport::Roamed { endpoint } => self.proven = Some(*endpoint),
            PeerReport::Traffic(_) => {}
        }
        self.update_route(now);
    }

    /// Our own addresses changed: a live path is proven anew, others wait for demand.
    pub fn handle_network_changed(&mut self, now: Instant) {
        if matches!(self.state(now), PathState::Up { .. }) || self.attempt.is_some() {
            self.attempt = None;
            self.want(now);
            self.update_route(now);
            self.events.push_back(PathEvent::StartHandshake);
        }
    }

    /// One handshake without waiting for a packet: after our restart, so that a peer with an old session finds us again.
    pub fn handle_wake(&mut self, _now: Instant) {
        self.events.push_back(PathEvent::StartHandshake);
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        let Some(attempt) = self.attempt else { return };
        if now < attempt.retry_at {
            return;
        }
        let down_at = attempt.since + PEER_DOWN_AFTER;
        let longest = if now < down_at { REKEY_TIMEOUT } else { PEER_RETRY_MAX };
        let pause = (attempt.pause * 2).min(longest);
        let mut retry_at = now + self.random.jitter(pause);
        if now < down_at {
            // Whoever watches `state` is woken when it turns to down.
            retry_at = retry_at.min(down_at);
        }
        self.attempt = Some(Attempt { retry_at, pause, ..attempt });
        if now.since(attempt.since) >= TRUST {
            self.last_proven = self.proven.take().or(self.last_proven);
            self.renew_tunnel();
        }
        self.update_route(now);
        self.events.push_back(PathEvent::StartHandshake);
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
        None
    }

    pub fn view(&self, _now: Instant) -> PathView {
        PathView { endpoint: self.route.primary, second: self.route.second, ..PathView::default() }
    }

    pub fn poll_transmit(&mut self) -> Option<ProbeTransmit> {
        None
    }

    pub fn poll_event(&mut self) -> Option<PathEvent> {
        self.events.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        self.attempt.map(|attempt| (attempt.retry_at, "try a peer again"))
    }

    fn renew_tunnel(&mut self) {
        if std::mem::take(&mut self.is_tunnel_stale) {
            self.tunnel_generation += 1;
            self.last_handshake = None;
        }
    }

    fn want(&mut self, now: Instant) {
        if self.attempt.is_none() {
            self.attempt = Some(Attempt { since: now, retry_at: now + FIRST_RETRY, pause: FIRST_RETRY });
        }
    }

    fn live_endpoint(&self, now: Instant) -> Option<Endpoint> {
        let at = self.last_handshake?;
        (now.since(at) < REJECT_AFTER_TIME).then_some(self.proven).flatten()
    }

    fn update_route(&mut self, _now: Instant) {
        let route = match self.proven {
            Some(endpoint) if self.attempt.is_none() => PeerRoute { primary: Some(endpoint), ..PeerRoute::default() },
            proven => {
                let candidates: Vec<_> =
                    self.remotes.all().iter().map(|remote| Endpoint::Direct(remote.addr)).collect();
                let primary = proven.or(self.route.primary.filter(|at| candidates.contains(at)));
                let primary = primary.or(candidates.first().copied());
                // Behind a NAT the endpoint that worked may be none that the peer knows of.
                let unannounced = self.last_proven.filter(|at| !candidates.contains(at));
                let others = candidates.into_iter().chain(unannounced).filter(|at| Some(*at) != primary);
                PeerRoute { primary, second: None, handshake_fan_out: others.collect() }
            }
        };
        if route != self.route {
            self.route = route.clone();
            self.events.push_back(PathEvent::Route(route));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::wire::record::CandidateKind;

    fn at(millis: u64) -> Instant {
        Instant::from_origin(Duration::from_millis(millis))
    }

    fn addr(port: u16) -> Endpoint {
        Endpoint::Direct(([192, 0, 2, 1], port).into())
    }

    fn agent(ports: &[u16]) -> PathAgent {
        let mut agent = PathAgent::new(1, PathPolicy::default());
        agent.handle_candidates(&candidates(ports), at(0));
        agent
    }

    fn candidates(ports: &[u16]) -> Vec<Candidate> {
        let candidate = |port: &u16| Candidate { kind: CandidateKind::Host, addr: addr(*port).direct().unwrap() };
        ports.iter().map(candidate).collect()
    }

    fn drain(agent: &mut PathAgent) -> Vec<PathEvent> {
        std::iter::from_fn(|| agent.poll_event()).collect()
    }

    /// Runs timers until `end` and gives how many handshakes were asked for.
    fn run_until(agent: &mut PathAgent, end: Instant) -> usize {
        let mut handshakes = 0;
        while let Some((deadline, _)) = agent.poll_timeout().filter(|(deadline, _)| *deadline <= end) {
            agent.handle_timeout(deadline);
            handshakes += drain(agent).iter().filter(|event| **event == PathEvent::StartHandshake).count();
        }
        handshakes
    }

    #[test]
    fn unproven_handshakes_go_to_every_candidate() {
        let mut agent = agent(&[1, 2, 3]);
        let handshake_fan_out = vec![addr(2), addr(3)];
        let route = PeerRoute { primary: Some(addr(1)), second: None, handshake_fan_out };
        assert_eq!(drain(&mut agent), [PathEvent::Route(route)]);
        assert_eq!(agent.state(at(0)), PathState::Idle);
        assert_eq!(agent.poll_timeout(), None, "an idle peer costs nothing");
    }

    #[test]
    fn the_answering_endpoint_carries_alone() {
        let mut agent = agent(&[1, 2]);
        agent.handle_report(&PeerReport::Demand, at(0));
        assert_eq!(agent.state(at(5)), PathState::Connecting { since: at(0) });
        agent.handle_report(&PeerReport::Handshake { endpoint: addr(2) }, at(30));
        let route = PeerRoute { primary: Some(addr(2)), ..PeerRoute::default() };
        assert_eq!(drain(&mut agent).last(), Some(&PathEvent::Route(route)));
        assert_eq!(agent.state(at(31)), PathState::Up { endpoint: addr(2) });
        assert_eq!(agent.state(at(30) + REJECT_AFTER_TIME), PathState::Idle);
    }

    #[test]
    fn unanswered_demand_ends_trust_then_the_peer_is_down_and_retries_go_on() {
        let mut agent = agent(&[1, 2]);
        agent.handle_report(&PeerReport::Handshake { endpoint: addr(9) }, at(0));
        let later = at(200_000);
        agent.handle_report(&PeerReport::Demand, later);
        run_until(&mut agent, later + Duration::from_secs(2));
        assert_eq!(agent.route().primary, Some(addr(1)), "the silent endpoint is given up");
        assert_eq!(agent.state(later + PEER_DOWN_AFTER), PathState::Down { since: later });
        let hour = run_until(&mut agent, later + Duration::from_secs(3600));
        assert!((60..=130).contains(&hour), "{hour} attempts in an hour: one or two a minute");
        agent.handle_report(&PeerReport::Handshake { endpoint: addr(2) }, later + Duration::from_secs(3600));
        assert_eq!(agent.state(later + Duration::from_secs(3601)), PathState::Up { endpoint: addr(2) });
        assert_eq!(agent.poll_timeout(), None);
    }

    #[test]
    fn an_endpoint_that_worked_and_that_nobody_announces_is_tried_with_the_others() {
        let mut agent = agent(&[1, 2]);
        agent.handle_report(&PeerReport::Handshake { endpoint: addr(9) }, at(0));
        agent.handle_report(&PeerReport::Demand, at(200_000));
        run_until(&mut agent, at(200_000) + Duration::from_secs(30));
        // New candidates do not drop it; once announced it is no endpoint twice.
        let route = |others: &[u16]| PeerRoute {
            primary: Some(addr(1)),
            second: None,
            handshake_fan_out: others.iter().map(|port| addr(*port)).collect(),
        };
        assert_eq!(*agent.route(), route(&[2, 9]));
        agent.handle_candidates(&candidates(&[1, 3]), at(231_000));
        assert_eq!(*agent.route(), route(&[3, 9]));
        agent.handle_candidates(&candidates(&[1, 9]), at(232_000));
        assert_eq!(*agent.route(), route(&[9]));
        // The endpoint that works next takes its place.
        agent.handle_report(&PeerReport::Handshake { endpoint: addr(7) }, at(300_000));
        agent.handle_report(&PeerReport::Demand, at(600_000));
        run_until(&mut agent, at(600_000) + Duration::from_secs(30));
        agent.handle_candidates(&candidates(&[1]), at(631_000));
        assert_eq!(*agent.route(), route(&[7]));
    }

    #[test]
    fn a_peer_that_learns_of_us_late_is_reached_within_a_second() {
        let mut agent = agent(&[1]);
        agent.handle_report(&PeerReport::Demand, at(0));
        assert!(run_until(&mut agent, at(1000)) >= 2);
    }

    #[test]
    fn traffic_from_elsewhere_moves_the_route() {
        let mut agent = agent(&[1]);
        agent.handle_report(&PeerReport::Handshake { endpoint: addr(1) }, at(0));
        agent.handle_report(&PeerReport::Roamed { endpoint: addr(7) }, at(10));
        assert_eq!(agent.route().primary, Some(addr(7)));
        assert_eq!(agent.state(at(11)), PathState::Up { endpoint: addr(7) });
    }

    #[test]
    fn a_restarted_peer_with_traffic_gets_a_handshake_at_once() {
        let mut agent = agent(&[1]);
        agent.handle_report(&PeerReport::Handshake { endpoint: addr(1) }, at(0));
        drain(&mut agent);
        agent.handle_instance([1; 16], at(400));
        assert_eq!(agent.poll_event(), None);
        agent.handle_instance([2; 16], at(500));
        assert!(drain(&mut agent).contains(&PathEvent::StartHandshake));
        assert_eq!(agent.tunnel_generation(), 0, "the session may be of the new start already");
        run_until(&mut agent, at(500) + TRUST * 2);
        assert_eq!(agent.tunnel_generation(), 1, "nothing answered: perhaps its clock went back");
        let mut idle = self::agent(&[1]);
        idle.handle_instance([1; 16], at(0));
        idle.handle_instance([2; 16], at(500));
        assert_eq!(idle.tunnel_generation(), 1);
        assert!(!drain(&mut idle).contains(&PathEvent::StartHandshake));
    }
}
