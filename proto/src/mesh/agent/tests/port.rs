//! Nodes that share a public address: who leaves the port, for which, and how often.

use super::*;
use crate::wire::record::OverlayV4;

const PUBLIC: &str = "203.0.113.7";
/// When the node of these tests took its overlay address.
const CLAIMED: u64 = 1000;
const A_WHILE: Duration = Duration::from_secs(5);

/// An agent that took its overlay address long ago.
fn claimed(listen_port: u16) -> Agent {
    let mut agent = fresh(Settings { listen_port, ..settings(1) });
    agent.publisher.claim = Some(OwnClaim { addr: [198, 19, 0, 1].into(), claimed_at_ms: CLAIMED });
    agent.handle_observed(behind_nat(), at(1));
    welcome(&mut agent, at(1));
    agent
}

/// One that servers see at this address, with this inner port.
fn other(seed: u8, public: &str, port: u16, claimed_at_ms: u64) -> Other {
    let mut other = Other::new(seed);
    other.record.overlay_v4 = Some(OverlayV4 { addr: [198, 19, 9, seed].into(), claimed_at_ms });
    other.record.candidates = vec![
        candidate(CandidateKind::Host, &format!("10.0.0.{seed}:{port}")),
        candidate(CandidateKind::Reflexive, &format!("{public}:{}", 1024 + u16::from(seed))),
    ];
    other
}

/// Where the agent wants to move to while it is run for this long.
fn moves(agent: &mut Agent, from: Instant, time: Duration) -> Vec<u16> {
    let mut moves = Vec::new();
    run_with(
        agent,
        &behind_nat(),
        from,
        time,
        |_| "203.0.113.7:40000",
        |_, event, _| {
            if let AgentEvent::MovePort(port) = event {
                moves.push(port);
            }
        },
    );
    moves
}

/// The port that an agent with these neighbours moves to.
fn moved(others: &mut [Other]) -> Option<u16> {
    let mut agent = claimed(LISTEN_PORT);
    others.iter_mut().for_each(|other| other.tell(&mut agent, at(1)));
    let moves = moves(&mut agent, at(1), A_WHILE);
    assert!(moves.len() < 2, "{moves:?}");
    moves.first().copied()
}

#[test]
fn the_newcomer_leaves_the_port_for_one_of_its_own() {
    let chosen = moved(&mut [other(7, PUBLIC, LISTEN_PORT, CLAIMED - 1)]).unwrap();
    assert!((20_000..30_000).contains(&chosen), "{chosen}");
    assert_eq!(moved(&mut [other(8, PUBLIC, LISTEN_PORT, CLAIMED - 1)]), Some(chosen), "whoever it meets");
    let ties = [7, 8, 9].map(|seed| moved(&mut [other(seed, PUBLIC, LISTEN_PORT, CLAIMED)]).is_some());
    assert!(ties.contains(&true) && ties.contains(&false), "a tie goes by the node id: {ties:?}");
    // Where a neighbour listens already is no place to move to.
    let elsewhere = moved(&mut [other(7, PUBLIC, LISTEN_PORT, CLAIMED - 1), other(8, PUBLIC, chosen, CLAIMED + 1)]);
    assert!(elsewhere.is_some_and(|port| port != chosen), "{elsewhere:?}");
}

#[test]
fn nobody_moves_without_need() {
    for (why, mut other) in [
        ("it came later", other(7, PUBLIC, LISTEN_PORT, CLAIMED + 1)),
        ("it has another port", other(7, PUBLIC, LISTEN_PORT + 1, CLAIMED - 1)),
        ("it is elsewhere", other(7, "203.0.113.8", LISTEN_PORT, CLAIMED - 1)),
    ] {
        assert_eq!(moved(std::slice::from_mut(&mut other)), None, "{why}");
    }
    // Not translated: what servers see is the host's own.
    let mut agent = claimed(LISTEN_PORT);
    other(7, "10.0.0.2", LISTEN_PORT, CLAIMED - 1).tell(&mut agent, at(1));
    let mut moves = 0;
    run_with(
        &mut agent,
        &behind_nat(),
        at(1),
        A_WHILE,
        |_| "10.0.0.2:51872",
        |_, event, _| {
            moves += u32::from(matches!(event, AgentEvent::MovePort(_)));
        },
    );
    assert_eq!(moves, 0);
}

#[test]
fn a_port_that_another_program_has_is_passed_over() {
    let mut agent = claimed(LISTEN_PORT);
    other(7, PUBLIC, LISTEN_PORT, CLAIMED - 1).tell(&mut agent, at(1));
    let mut asked = Vec::new();
    run_with(
        &mut agent,
        &behind_nat(),
        at(1),
        A_WHILE,
        |_| "203.0.113.7:40000",
        |agent, event, now| {
            if let AgentEvent::MovePort(port) = event {
                asked.push(port);
                agent.handle_port_taken(port, now);
            }
        },
    );
    let distinct: BTreeSet<u16> = asked.iter().copied().collect();
    assert!(asked.len() == distinct.len() && asked.len() > 10, "each once, then it stays: {asked:?}");
}

#[test]
fn a_member_that_follows_a_node_moves_it_once_in_ten_minutes() {
    let own = moved(&mut [other(7, PUBLIC, LISTEN_PORT, CLAIMED - 1)]).unwrap();
    // The node has moved and started anew.
    let mut agent = claimed(own);
    let mut follower = other(7, PUBLIC, own, CLAIMED - 1);
    follower.tell(&mut agent, at(1));
    assert!(moves(&mut agent, at(1), Duration::from_secs(590)).is_empty());
    follower.tell(&mut agent, at(592));
    assert_eq!(moves(&mut agent, at(592), Duration::from_secs(20)).len(), 1);
}
