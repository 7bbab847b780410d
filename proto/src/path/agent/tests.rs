#![allow(clippy::unwrap_used)]

use super::*;
use crate::device::PathTraffic;
use crate::path::candidate::RemoteKind;
use crate::path::score::Tier;
use crate::wire::probe::Call;
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

const RELAYS: [ServerId; 2] = [ServerId(0), ServerId(1)];

fn relay(server: usize) -> Endpoint {
    Endpoint::Relay(ServerId(server))
}

fn candidate(kind: CandidateKind, port: u16) -> Candidate {
    Candidate { kind, addr: addr(port).direct().unwrap() }
}

/// What goes out now: kind of probe, to where, whether it is an opener.
fn probes(agent: &mut PathAgent) -> Vec<(&'static str, Endpoint, bool)> {
    let probes = std::iter::from_fn(|| agent.poll_transmit());
    let kind = |probe: &Probe| match probe {
        Probe::Ping { .. } => "ping",
        Probe::Pong { .. } => "pong",
        Probe::Call(call) if call.answer_wanted => "call",
        Probe::Call(_) => "answer",
    };
    probes.map(|out| (kind(&out.probe), out.to, out.ttl.is_some())).collect()
}

/// Answers the pings that went to this endpoint, and gives all that went out.
fn answer(agent: &mut PathAgent, endpoint: Endpoint, heard: u32, now: Instant) -> usize {
    let out: Vec<_> = std::iter::from_fn(|| agent.poll_transmit()).collect();
    for transmit in &out {
        if let (Probe::Ping { id, .. }, true) = (&transmit.probe, transmit.to == endpoint) {
            agent.handle_probe(endpoint, &Probe::Pong { id: *id, heard, observed: None }, now);
        }
    }
    out.len()
}

/// A peer behind a NAT, reachable over two relays, nobody uses it yet.
fn relayed() -> PathAgent {
    let mut agent = PathAgent::new(1, PathPolicy::default());
    agent.handle_relays(&RELAYS, at(0));
    let kinds = [CandidateKind::Host, CandidateKind::Mapped, CandidateKind::Reflexive];
    let candidates: Vec<_> = kinds.into_iter().zip(1..).map(|(kind, port)| candidate(kind, port)).collect();
    agent.handle_candidates(&candidates, at(0));
    agent
}

/// The same with a session over the first relay.
fn carried() -> PathAgent {
    let mut agent = relayed();
    agent.handle_report(&PeerReport::Demand, at(0));
    agent.handle_report(&PeerReport::Handshake { endpoint: relay(0) }, at(60));
    probes(&mut agent);
    agent
}

#[test]
fn demand_greets_over_relays_calls_and_probes_every_address() {
    let mut agent = relayed();
    let fan_out = vec![relay(1), addr(1), addr(2)];
    let expected = PeerRoute { primary: Some(relay(0)), second: None, handshake_fan_out: fan_out };
    assert_eq!(agent.route(), &expected, "its reflexive address is not knocked at before it has opened");
    assert_eq!(probes(&mut agent), []);
    agent.handle_report(&PeerReport::Demand, at(0));
    assert_eq!(
        probes(&mut agent),
        [("ping", addr(1), false), ("ping", addr(2), false), ("ping", addr(3), true), ("call", relay(0), false)]
    );
    agent.handle_report(&PeerReport::Handshake { endpoint: relay(1) }, at(60));
    let expected = PeerRoute { primary: Some(relay(0)), ..PeerRoute::default() };
    assert_eq!(agent.route(), &expected, "relays are chosen by their order");
    agent.handle_relays(&[], at(70));
    assert_eq!(agent.route().handshake_fan_out.len(), 2, "without a relay all three are greeted: {:?}", agent.route());
}

#[test]
fn an_answer_promotes_and_the_old_path_carries_too_until_data_is_heard() {
    let mut agent = carried();
    agent.handle_timeout(at(100));
    answer(&mut agent, addr(2), 0, at(130));
    let both = PeerRoute { primary: Some(addr(2)), second: Some(relay(0)), handshake_fan_out: Vec::new() };
    assert_eq!(agent.route(), &both);
    agent.handle_probe(addr(2), &Probe::Ping { id: 1, heard: 0 }, at(200));
    assert_eq!(agent.route(), &both, "nothing was heard yet");
    agent.handle_probe(addr(2), &Probe::Ping { id: 1, heard: 3 }, at(300));
    assert_eq!(agent.route(), &PeerRoute { primary: Some(addr(2)), ..PeerRoute::default() });
    let view = agent.view(at(300));
    assert_eq!((view.tier, view.rtt), (Some(Tier::Translated), Some(Duration::from_millis(30))));
    assert_eq!((view.why_not_direct, view.time_to_direct), (None, Some(Duration::from_millis(130))));
    assert_eq!(view.candidates[1].last, "answered 0 s ago");
}

#[test]
fn a_better_tier_takes_over_and_a_worse_one_does_not() {
    let mut agent = carried();
    agent.handle_subnets(&["192.0.2.0/24".parse().unwrap()], at(90));
    agent.handle_subnets(&[], at(90));
    agent.handle_timeout(at(100));
    answer(&mut agent, addr(2), 0, at(120));
    agent.handle_timeout(at(500));
    answer(&mut agent, addr(1), 0, at(590));
    assert_eq!(agent.route().primary, Some(addr(1)), "an address of its own, though it is slower");
    agent.handle_probe(addr(9), &Probe::Ping { id: 1, heard: 0 }, at(700));
    answer(&mut agent, addr(9), 0, at(701));
    assert_eq!(agent.route().primary, Some(addr(1)), "translated, though it is faster");
}

#[test]
fn the_address_that_answers_carries_rather_than_the_one_that_was_asked() {
    let mut agent = carried();
    agent.handle_probe(addr(8), &Probe::Ping { id: 1, heard: 0 }, at(70));
    let asked: Vec<_> = std::iter::from_fn(|| agent.poll_transmit()).collect();
    let Some(ProbeTransmit { to, probe: Probe::Ping { id, .. }, .. }) = asked.last() else { panic!("{asked:?}") };
    assert_eq!(*to, addr(8));
    agent.handle_probe(addr(9), &Probe::Pong { id: *id, heard: 0, observed: None }, at(100));
    assert_eq!(agent.route().primary, Some(addr(8)), "better than none: its NAT has another mapping for answers");
    agent.handle_probe(addr(9), &Probe::Ping { id: 2, heard: 0 }, at(110));
    answer(&mut agent, addr(9), 0, at(140));
    assert_eq!(agent.route().primary, Some(addr(9)));
    agent.handle_probe(addr(8), &Probe::Ping { id: 3, heard: 0 }, at(150));
    answer(&mut agent, addr(8), 0, at(151));
    assert_eq!(agent.route().primary, Some(addr(9)), "a smaller delay does not bring it back");
}

#[test]
fn a_ping_from_an_unknown_address_is_answered_and_pinged_back_once() {
    let mut agent = carried();
    agent.handle_probe(addr(9), &Probe::Ping { id: 77, heard: 0 }, at(70));
    let sent: Vec<_> = std::iter::from_fn(|| agent.poll_transmit()).collect();
    let pong = Probe::Pong { id: 77, heard: 0, observed: addr(9).direct() };
    assert_eq!((&sent[0].probe, sent[0].to), (&pong, addr(9)));
    assert!(matches!(sent[1], ProbeTransmit { to, probe: Probe::Ping { .. }, ttl: None, .. } if to == addr(9)));
    assert_eq!(sent.len(), 2);
    for n in 0..50u32 {
        agent.handle_probe(addr(9), &Probe::Ping { id: n, heard: 0 }, at(80));
    }
    assert_eq!(probes(&mut agent).len(), 19, "twenty pongs a second, no other ping");
    for port in 100..200 {
        agent.handle_probe(addr(port), &Probe::Ping { id: 1, heard: 0 }, at(90));
    }
    let observed = agent.view(at(90)).candidates.iter().filter(|seen| seen.kind == RemoteKind::PeerReflexive).count();
    assert_eq!(observed, 4);
    assert!(probes(&mut agent).len() <= 64, "what waits is bounded");
}

#[test]
fn pongs_nobody_asked_for_change_nothing() {
    let mut agent = carried();
    let before = agent.route().clone();
    agent.handle_timeout(at(100));
    let asked: Vec<_> = std::iter::from_fn(|| agent.poll_transmit()).collect();
    let Probe::Ping { id, .. } = asked[0].probe else { panic!("{asked:?}") };
    agent.handle_probe(addr(1), &Probe::Pong { id: id ^ 1, heard: 0, observed: None }, at(120));
    agent.handle_probe(relay(0), &Probe::Pong { id, heard: 0, observed: None }, at(120));
    assert_eq!(agent.route(), &before, "another id; and a direct ping is not answered over a relay");
}

#[test]
fn a_call_is_answered_and_its_candidates_are_probed_at_once() {
    let mut agent = relayed();
    let call = |answer_wanted| {
        let good = (20..25).map(|port| candidate(CandidateKind::Host, port));
        let bad = ["127.0.0.1:9", "224.0.0.1:9", "192.0.2.1:0", "[fe80::1]:9"];
        let bad = bad.map(|at| Candidate { kind: CandidateKind::Host, addr: at.parse().unwrap() });
        Probe::Call(Call { answer_wanted, candidates: bad.into_iter().chain(good).collect(), ..Call::default() })
    };
    agent.handle_probe(addr(1), &call(true), at(0));
    assert_eq!(probes(&mut agent), [], "only a relay brings calls");
    agent.handle_probe(relay(1), &call(true), at(0));
    let sent = probes(&mut agent);
    assert_eq!(sent[0], ("answer", relay(1), false));
    let expected: Vec<_> = (20..25).chain(1..4).map(|port| ("ping", addr(port), port == 3)).collect();
    assert_eq!(sent[1..], expected);
    for n in 0..100 {
        agent.handle_probe(relay(1), &call(true), at(1 + n));
    }
    assert!(probes(&mut agent).len() <= 8, "a storm of calls is one round");
    agent.handle_probe(relay(1), &call(false), at(400));
    assert!(probes(&mut agent).iter().all(|(kind, ..)| *kind == "ping"));
}

#[test]
fn a_relay_that_does_not_reach_the_peer_gives_way() {
    let mut agent = carried();
    agent.handle_no_peer(ServerId(0), at(100));
    assert_eq!(agent.route().primary, Some(relay(1)));
    agent.handle_no_peer(ServerId(1), at(200));
    assert!(!agent.route().primary.unwrap().is_relay() && !agent.route().handshake_fan_out.is_empty());
    run_until(&mut agent, at(11_000));
    assert!(agent.route().primary.unwrap().is_relay(), "it is asked again");
    agent.handle_relays(&[ServerId(1)], at(11_100));
    assert_eq!(agent.route().primary, Some(relay(1)));
}

#[test]
fn a_relays_word_that_a_peer_is_gone_leaves_a_direct_path_alone() {
    let mut agent = carried();
    agent.handle_timeout(at(100));
    answer(&mut agent, addr(2), 0, at(130));
    agent.handle_probe(addr(2), &Probe::Ping { id: 1, heard: 3 }, at(300));
    let direct = PeerRoute { primary: Some(addr(2)), ..PeerRoute::default() };
    for millis in 301..400 {
        agent.handle_no_peer(ServerId(0), at(millis));
        agent.handle_no_peer(ServerId(1), at(millis));
        assert_eq!(agent.route(), &direct);
    }
    agent.handle_relays(&[], at(400));
    assert_eq!(agent.route(), &direct, "nor does one that lists it no longer");
}

#[test]
fn a_relay_that_answers_nothing_is_left_for_another() {
    let mut agent = carried();
    let traffic = PeerReport::Traffic(vec![PathTraffic { endpoint: relay(0), sent: 1, received: 0 }]);
    for second in 1..10 {
        run_until(&mut agent, at(second * 1000));
        agent.handle_report(&traffic, at(second * 1000));
    }
    assert_eq!(agent.route().primary, Some(relay(1)));
}

#[test]
fn a_handshake_at_a_direct_address_is_believed_with_the_relay_beside_it() {
    let mut agent = relayed();
    agent.handle_report(&PeerReport::Demand, at(0));
    agent.handle_report(&PeerReport::Handshake { endpoint: addr(1) }, at(5));
    let both = PeerRoute { primary: Some(addr(1)), second: Some(relay(0)), handshake_fan_out: Vec::new() };
    assert_eq!(agent.route(), &both);
    run_until(&mut agent, at(3000));
    assert_eq!(agent.route().primary, Some(relay(0)), "no ping is answered there");
    agent.handle_report(&PeerReport::Handshake { endpoint: addr(1) }, at(4000));
    assert_eq!(agent.route().primary, Some(relay(0)), "not on its word alone a second time");
}
