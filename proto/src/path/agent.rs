//! One peer's path: which endpoint its packets go to, and when to try again.
//!
//! Owns the candidates a peer announced, the endpoint that a handshake proved, and the schedule of attempts. It sends
//! nothing: it gives a [`PeerRoute`] and asks for handshakes. While nothing is proven the initiation goes to every
//! candidate at once, because the responder answers the first that arrives and that is the best path there is; a proven
//! endpoint stays until distress: unanswered demand, a changed network, or authentic traffic from elsewhere.

use std::collections::VecDeque;
use std::time::Duration;

use mesh_common::limits::{MAX_CANDIDATES, PEER_DOWN_AFTER, PEER_RETRY_MAX, REJECT_AFTER_TIME, REKEY_TIMEOUT};
use mesh_common::time::Instant;

use crate::device::{Endpoint, PeerReport, PeerRoute};
use crate::random::SplitMix64;

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
    candidates: Vec<Endpoint>,
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
    pub fn new(seed: u64) -> Self {
        Self {
            candidates: Vec::new(),
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

    /// The peer's newest candidates, best first. A proven endpoint outlives its place in the list.
    pub fn handle_candidates(&mut self, candidates: &[Endpoint]) {
        self.candidates = candidates.iter().copied().take(MAX_CANDIDATES).collect();
        self.update_route();
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
        self.update_route();
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
        self.update_route();
    }

    /// Our own addresses changed: a live path is proven anew, others wait for demand.
    pub fn handle_network_changed(&mut self, now: Instant) {
        if matches!(self.state(now), PathState::Up { .. }) || self.attempt.is_some() {
            self.attempt = None;
            self.want(now);
            self.update_route();
            self.events.push_back(PathEvent::StartHandshake);
        }
    }

    /// One handshake without waiting for a packet: after our restart, so that a peer with an old session finds us again.
    pub fn handle_wake(&mut self) {
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
        self.update_route();
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

    pub fn candidates(&self) -> &[Endpoint] {
        &self.candidates
    }

    /// Where packets go now.
    pub fn route(&self) -> &PeerRoute {
        &self.route
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

    fn update_route(&mut self) {
        let route = match self.proven {
            Some(endpoint) if self.attempt.is_none() => PeerRoute { primary: Some(endpoint), ..PeerRoute::default() },
            proven => {
                let primary = proven.or(self.route.primary.filter(|at| self.candidates.contains(at)));
                let primary = primary.or(self.candidates.first().copied());
                // Behind a NAT the endpoint that worked may be none that the peer knows of.
                let unannounced = self.last_proven.filter(|at| !self.candidates.contains(at));
                let others = self.candidates.iter().copied().chain(unannounced).filter(|at| Some(*at) != primary);
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
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_origin(Duration::from_millis(millis))
    }

    fn addr(port: u16) -> Endpoint {
        Endpoint::Direct(([192, 0, 2, 1], port).into())
    }

    fn agent(ports: &[u16]) -> PathAgent {
        let mut agent = PathAgent::new(1);
        agent.handle_candidates(&ports.iter().map(|port| addr(*port)).collect::<Vec<_>>());
        agent
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
        agent.handle_candidates(&[addr(1), addr(3)]);
        assert_eq!(*agent.route(), route(&[3, 9]));
        agent.handle_candidates(&[addr(1), addr(9)]);
        assert_eq!(*agent.route(), route(&[9]));
        // The endpoint that works next takes its place.
        agent.handle_report(&PeerReport::Handshake { endpoint: addr(7) }, at(300_000));
        agent.handle_report(&PeerReport::Demand, at(600_000));
        run_until(&mut agent, at(600_000) + Duration::from_secs(30));
        agent.handle_candidates(&[addr(1)]);
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
