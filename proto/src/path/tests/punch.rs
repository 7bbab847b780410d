//! From nothing to a relay, from the relay to a direct path.

use super::pair::{Nat, Pair, millis};
use crate::path::agent::{PathPolicy, PathState};
use crate::path::score::Tier;

const EASY: [Nat; 2] = [Nat::Easy, Nat::Easy];

/// The first packet's way, then both directions direct, from the first packet on.
fn to_direct(pair: &mut Pair) -> (u128, u128) {
    pair.send_every(0, Some(millis(5)));
    pair.send_every(1, Some(millis(5)));
    let first = pair.run_until(millis(5000), |pair| !pair.sides[1].got.is_empty()).unwrap();
    let direct = pair.run_until(millis(20_000), Pair::are_direct).unwrap();
    (first.as_millis(), (first + direct).as_millis())
}

#[test]
fn two_easy_nats_are_direct_within_a_second_and_nothing_is_lost() {
    for seed in 0..50 {
        let mut pair = Pair::new(EASY, seed).with_relay();
        let (first, direct) = to_direct(&mut pair);
        assert!(first <= 2 * 60 + 200, "first byte after {first} ms");
        assert!(direct < 1000, "direct after {direct} ms");
        pair.run_for(millis(3000));
        assert!(pair.are_direct());
        assert_eq!((pair.lost(0), pair.lost(1)), (0, 0), "seed {seed}");
    }
}

#[test]
fn a_tenth_of_all_datagrams_lost_costs_little_time() {
    let mut times: Vec<u128> =
        (0..100).map(|seed| to_direct(&mut Pair::new(EASY, seed).with_relay().with_loss(10)).1).collect();
    times.sort_unstable();
    assert!(times[50] < 1000, "half within {} ms", times[50]);
    assert!(times[95] < 3000, "nearly all within {} ms", times[95]);
}

#[test]
fn without_a_call_the_peer_knocks_too_late() {
    let policy = PathPolicy { call: false, ..PathPolicy::default() };
    let mut pair = Pair::with_policy(EASY, 1, policy).with_relay();
    // Only one side has anything to say, and the other learns of it by the first packet over the relay.
    let mut called = Pair::new(EASY, 1).with_relay();
    for pair in [&mut pair, &mut called] {
        pair.send_every(0, Some(millis(50)));
    }
    let late = pair.run_until(millis(20_000), |pair| pair.is_direct(0));
    let soon = called.run_until(millis(20_000), |pair| pair.is_direct(0)).unwrap();
    assert!(late.is_none_or(|late| late > soon), "{late:?} without a call, {soon:?} with one");
}

#[test]
fn an_open_side_is_reached_at_once_and_a_hard_pair_stays_on_the_relay() {
    for (nats, is_direct) in [
        ([Nat::Open, Nat::Open], true),
        ([Nat::Open, Nat::Hard], true),
        ([Nat::Hard, Nat::Open], true),
        ([Nat::Open, Nat::Easy], true),
        ([Nat::Easy, Nat::Hard], false),
        ([Nat::Hard, Nat::Hard], false),
    ] {
        let mut pair = Pair::new(nats, 7).with_relay();
        pair.send_every(0, Some(millis(20)));
        pair.send_every(1, Some(millis(20)));
        pair.run_for(millis(3000));
        assert_eq!(pair.are_direct(), is_direct, "{nats:?}");
        assert_eq!((pair.lost(0), pair.lost(1)), (0, 0), "{nats:?}");
        let view = pair.sides[0].agent.view(pair.now);
        assert_eq!(view.why_not_direct.is_none(), is_direct, "{nats:?}: {:?}", view.why_not_direct);
        assert_eq!(view.tier == Some(Tier::Relay), !is_direct);
        assert!(matches!(pair.sides[0].agent.state(pair.now), PathState::Up { .. }));
        if !is_direct {
            assert_eq!(pair.sides[0].agent.mtu(), None, "three seconds are not over");
            pair.run_for(millis(1000));
            assert_eq!(pair.sides[0].agent.mtu(), Some(1280));
            let why = pair.sides[0].agent.view(pair.now).why_not_direct.unwrap();
            assert!(why.contains("hole punching cannot work") && why.contains("open UDP port 51872"), "{why}");
        }
    }
}

#[test]
fn a_relayed_pair_costs_few_probes() {
    let mut pair = Pair::new([Nat::Hard, Nat::Hard], 3).with_relay();
    pair.send_every(0, Some(millis(100)));
    pair.run_for(millis(60_000));
    let first_minute = pair.sides[0].probes;
    pair.run_for(millis(600_000));
    let later = (pair.sides[0].probes - first_minute) / 10;
    assert!(later <= 120, "{later} probes a minute after {first_minute} in the first");
}

#[test]
fn without_a_relay_open_nodes_find_each_other_as_ever() {
    for nats in [[Nat::Open, Nat::Open], [Nat::Hard, Nat::Open], [Nat::Open, Nat::Easy]] {
        let mut pair = Pair::new(nats, 5);
        let open = usize::from(nats[0] == Nat::Open && nats[1] != Nat::Open);
        let caller = if nats[0] == Nat::Open { open } else { 0 };
        pair.send_every(caller, Some(millis(10)));
        let first = pair.run_until(millis(2000), |pair| !pair.sides[1 - caller].got.is_empty());
        assert!(first.is_some(), "{nats:?}");
        pair.run_for(millis(1000));
        assert_eq!(pair.lost(1 - caller), 0);
        assert_eq!(pair.sides[caller].agent.mtu(), None);
    }
}

#[test]
fn a_path_of_small_packets_is_measured() {
    let mut pair = Pair::new([Nat::Open, Nat::Open], 5).with_relay();
    pair.faults.max_len = Some(1400);
    pair.send_every(0, Some(millis(20)));
    pair.run_for(millis(4000));
    assert!(pair.are_direct());
    assert_eq!(pair.sides[0].agent.mtu(), Some(1360));
    let mut wide = Pair::new([Nat::Open, Nat::Open], 5).with_relay();
    wide.send_every(0, Some(millis(20)));
    wide.run_for(millis(4000));
    assert_eq!(wide.sides[0].agent.mtu(), None);
}

#[test]
fn nats_that_show_each_ping_another_source_start_no_storm() {
    let mut pair = Pair::new([Nat::Anew, Nat::Anew], 3).with_relay();
    pair.send_every(0, Some(millis(20)));
    pair.send_every(1, Some(millis(20)));
    pair.run_for(millis(10_000));
    assert!(pair.are_direct());
    let before = pair.sides[0].probes;
    pair.run_for(millis(60_000));
    let probes = pair.sides[0].probes - before;
    assert!(probes <= 140, "{probes} in a minute: a ping and a pong a second is what a path needs");
    pair.send_every(0, None);
    pair.send_every(1, None);
    pair.run_for(millis(60_000));
    let before = pair.sides[0].probes;
    pair.run_for(millis(60_000));
    assert_eq!(pair.sides[0].probes, before, "nobody uses the peer");
}
