#![allow(clippy::unwrap_used)]

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
    run_until(&mut agent, later + Duration::from_secs(3600) + WARM);
    assert_eq!(agent.poll_timeout(), None);
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
    run_until(&mut agent, at(500) + HANDSHAKE_TRUST * 2);
    assert_eq!(agent.tunnel_generation(), 1, "nothing answered: perhaps its clock went back");
    let mut idle = self::agent(&[1]);
    idle.handle_instance([1; 16], at(0));
    idle.handle_instance([2; 16], at(500));
    assert_eq!(idle.tunnel_generation(), 1);
    assert!(!drain(&mut idle).contains(&PathEvent::StartHandshake));
}

#[test]
fn an_endpoint_that_worked_and_that_nobody_announces_is_tried_with_the_others() {
    let mut agent = agent(&[1, 2]);
    agent.handle_report(&PeerReport::Handshake { endpoint: addr(9) }, at(0));
    agent.handle_report(&PeerReport::Demand, at(200_000));
    run_until(&mut agent, at(200_000) + Duration::from_secs(30));
    // New candidates do not drop it; once announced it is no endpoint twice.
    let targets = |agent: &PathAgent| -> Vec<Endpoint> {
        let mut targets: Vec<_> = agent.route().primary.into_iter().collect();
        targets.extend(&agent.route().handshake_fan_out);
        targets.sort_unstable();
        targets
    };
    assert_eq!(targets(&agent), [addr(1), addr(2), addr(9)]);
    agent.handle_candidates(&candidates(&[1, 3]), at(231_000));
    assert_eq!(targets(&agent), [addr(1), addr(3), addr(9)]);
    agent.handle_candidates(&candidates(&[1, 9]), at(232_000));
    assert_eq!(targets(&agent), [addr(1), addr(9)]);
}
