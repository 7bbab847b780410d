//! Ports guessed by chance, where nothing else finds a direct path.

use std::collections::BTreeSet;
use std::time::Duration;

use mesh_common::time::Instant;

use super::pair::{Nat, Pair, millis};
use crate::device::{Endpoint, SocketId};
use crate::path::agent::{PathAgent, PathEvent, PathPolicy};
use crate::path::hard::{MAX_KEPT, Turn};
use crate::wire::probe::Probe;

const MIXED: [Nat; 2] = [Nat::Hard, Nat::Easy];

/// Both sides have their turn and talk.
fn talking(nats: [Nat; 2], seed: u64) -> Pair {
    let mut pair = Pair::with_policy(nats, seed, PathPolicy::default()).with_relay();
    give_turns(&mut pair, Turn::Own);
    for at in 0..2 {
        pair.send_every(at, Some(millis(20)));
    }
    pair
}

fn give_turns(pair: &mut Pair, turn: Turn) {
    for at in 0..2 {
        pair.sides[at].agent.handle_guessing_turn(turn, pair.now);
    }
}

#[test]
fn a_side_with_many_ports_and_one_with_a_strict_filter_find_each_other() {
    let mut direct = 0;
    for seed in 0..60 {
        let nats = if seed % 2 == 0 { MIXED } else { [Nat::Easy, Nat::Hard] };
        let mut pair = talking(nats, seed);
        if pair.run_until(Duration::from_secs(15), Pair::are_direct).is_none() {
            continue;
        }
        direct += 1;
        pair.run_for(Duration::from_secs(20));
        assert!(pair.are_direct(), "seed {seed}: it lasts");
        assert_eq!((pair.lost(0), pair.lost(1)), (0, 0), "seed {seed}");
        let hard = usize::from(seed % 2 == 1);
        assert_eq!(pair.sides[hard].sockets.len(), 1, "seed {seed}: both sides agree on one socket");
        assert_eq!(pair.sides[1 - hard].sockets.len(), 0);
    }
    assert!(direct >= 54, "{direct} of 60");
}

#[test]
fn guesses_are_paced_and_end_whatever_comes_of_them() {
    let mut pair = talking(MIXED, 7);
    pair.faults.direct = [true; 2];
    pair.run_for(Duration::from_secs(60));
    assert!(pair.is_relayed(0) && pair.is_relayed(1));
    for (at, expected) in [(0, 2 * 256), (1, 1024)] {
        let guesses = &pair.sides[at].guesses;
        assert_eq!(guesses.len(), expected);
        for (first, later) in guesses.iter().zip(guesses.iter().skip(400)) {
            assert!(later.since(*first) >= millis(990), "{at}: over 400 in a second");
        }
        let lasted = guesses.last().unwrap().since(*guesses.first().unwrap());
        assert!(lasted < Duration::from_secs(4), "{lasted:?}");
        assert!(pair.sides[at].sockets.is_empty(), "closed again");
        let view = pair.sides[at].agent.view(pair.now);
        assert!(view.why_not_direct.clone().unwrap().contains("guessing ports found none"), "{view:?}");
    }
    // Ten minutes long nobody guesses again, whatever happens.
    pair.run_for(Duration::from_secs(520));
    assert_eq!(pair.sides[1].guesses.len(), 1024);
    pair.run_for(Duration::from_secs(120));
    assert_eq!(pair.sides[1].guesses.len(), 2 * 1024);
}

#[test]
fn nobody_guesses_where_it_is_hopeless_or_needless() {
    for nats in [[Nat::Hard, Nat::Hard], [Nat::Easy, Nat::Easy], [Nat::Open, Nat::Hard]] {
        let mut pair = talking(nats, 3);
        pair.run_for(Duration::from_secs(30));
        assert!(pair.sides.iter().all(|side| side.guesses.is_empty()), "{nats:?}");
    }
    let mut idle = Pair::new(MIXED, 4).with_relay();
    give_turns(&mut idle, Turn::Own);
    idle.run_for(Duration::from_secs(30));
    assert!(idle.sides.iter().all(|side| side.guesses.is_empty()), "nobody wants a path");
}

#[test]
fn a_peer_whose_node_is_busy_is_asked_in_vain_and_a_minute_later_again() {
    let mut pair = talking(MIXED, 5);
    let now = pair.now;
    pair.sides[1].agent.handle_guessing_turn(Turn::None, now);
    pair.run_for(Duration::from_secs(30));
    assert!(pair.sides.iter().all(|side| side.guesses.is_empty() && side.sockets.is_empty()));
    let now = pair.now;
    pair.sides[1].agent.handle_guessing_turn(Turn::IfAsked, now);
    assert!(pair.run_until(Duration::from_secs(50), Pair::are_direct).is_some());
}

#[test]
fn a_host_without_room_for_sockets_says_so_and_stays_on_the_relay() {
    let mut pair = talking(MIXED, 6);
    pair.sides[0].room_for_sockets = 0;
    pair.run_for(Duration::from_secs(20));
    assert!(pair.is_relayed(0) && pair.sides[0].guesses.is_empty());
    let why = pair.sides[0].agent.view(pair.now).why_not_direct.unwrap();
    assert!(why.contains("no room for sockets"), "{why}");
}

#[test]
fn a_socket_that_was_opened_for_a_neighbour_is_kept_while_this_peer_uses_it() {
    let mut agent = PathAgent::new(1, PathPolicy::default());
    let at = |seconds| Instant::from_origin(Duration::from_secs(seconds));
    let peer = Endpoint::Extra(SocketId(3), ([192, 0, 2, 1], 51872).into());
    agent.handle_probe(peer, &Probe::Ping { id: 1, heard: 0 }, at(10));
    let left = BTreeSet::from([SocketId(3), SocketId(4)]);
    assert_eq!(agent.adopt_sockets(&left, at(11)), BTreeSet::from([SocketId(3)]), "nothing came on the other");
    let closed = |agent: &mut PathAgent| {
        std::iter::from_fn(|| agent.poll_event()).any(|event| event == PathEvent::CloseSockets([SocketId(3)].into()))
    };
    agent.handle_timeout(at(12));
    assert!(!closed(&mut agent));
    agent.handle_timeout(at(16));
    assert!(closed(&mut agent), "nothing has come for five seconds");
    assert_eq!(agent.adopt_sockets(&left, at(17)), BTreeSet::new());
}

#[test]
fn a_socket_is_kept_as_long_as_its_path() {
    let mut pair = talking(MIXED, 8);
    assert!(pair.run_until(Duration::from_secs(15), Pair::are_direct).is_some());
    pair.run_for(millis(500));
    assert!((1..=MAX_KEPT).contains(&pair.sides[0].sockets.len()), "{:?}", pair.sides[0].sockets);
    pair.faults.direct = [true; 2];
    pair.run_for(Duration::from_secs(15));
    assert!(pair.is_relayed(0) && pair.sides[0].sockets.is_empty());
}
