//! Networks change, nodes rest and wake.

use super::pair::{Nat, Pair, RELAY, millis};
use crate::device::Endpoint;
use crate::random::SplitMix64;

fn direct(nats: [Nat; 2], seed: u64) -> Pair {
    let mut pair = Pair::new(nats, seed).with_relay();
    pair.send_every(0, Some(millis(10)));
    pair.send_every(1, Some(millis(10)));
    pair.run_until(millis(5000), Pair::are_direct).unwrap();
    pair.run_for(millis(3000));
    pair
}

#[test]
fn an_idle_pair_costs_nothing() {
    let mut pair = direct([Nat::Easy, Nat::Easy], 1);
    pair.send_every(0, None);
    pair.send_every(1, None);
    pair.run_for(millis(47_000));
    let probes = [pair.sides[0].probes, pair.sides[1].probes];
    for side in &pair.sides {
        assert_eq!(side.agent.poll_timeout(), None);
        assert_eq!(
            side.agent.route().second,
            Some(Endpoint::Relay(RELAY)),
            "the first packet after a rest goes both ways"
        );
    }
    pair.run_for(millis(3_600_000));
    assert_eq!([pair.sides[0].probes, pair.sides[1].probes], probes);
}

#[test]
fn heartbeats_follow_use() {
    let mut pair = direct([Nat::Open, Nat::Open], 1);
    let probes = |pair: &mut Pair, time| {
        let before = pair.sides[0].agent.view(pair.now).probes_sent + pair.sides[1].agent.view(pair.now).probes_sent;
        pair.run_for(millis(time));
        pair.sides[0].agent.view(pair.now).probes_sent + pair.sides[1].agent.view(pair.now).probes_sent - before
    };
    let active = probes(&mut pair, 10_000);
    assert!((36..=44).contains(&active), "{active}: a ping a second each, and its pong");
    pair.send_every(0, None);
    pair.send_every(1, None);
    pair.run_for(millis(11_000));
    let warm = probes(&mut pair, 15_000);
    assert!((16..=24).contains(&warm), "{warm}: a ping each three seconds, and its pong");
}

#[test]
fn a_path_is_not_left_for_bursts_and_the_pauses_between_them() {
    // In all phases against pings and reports of both sides, shorter than a rest: nothing is asked anew.
    for (seed, loss) in (0..100).flat_map(|seed| [(seed, 0), (seed, 3)]) {
        let mut random = SplitMix64::new(seed);
        let mut pair = direct([Nat::Open, Nat::Open], seed).with_loss(loss);
        let switches = pair.sides.each_ref().map(|side| side.agent.view(pair.now).switches);
        for _burst in 0..8 {
            // Enough datagrams within one report for a proof.
            pair.send_every(0, Some(millis(1)));
            pair.send_every(1, Some(millis(7)));
            pair.run_for(random.between(millis(300), millis(3000)));
            pair.send_every(0, None);
            pair.send_every(1, None);
            pair.run_for(random.between(millis(100), millis(9000)));
        }
        for (at, before) in switches.into_iter().enumerate() {
            let view = pair.sides[at].agent.view(pair.now);
            assert_eq!(view.switches, before, "seed {seed}, {loss} % lost: {:?}", view.last_switch);
        }
    }
}

#[test]
fn the_first_packets_after_a_rest_arrive_though_the_nat_forgot() {
    let mut pair = direct([Nat::Easy, Nat::Easy], 2);
    pair.send_every(0, None);
    pair.send_every(1, None);
    pair.run_for(millis(100_000));
    pair.rebind(0);
    pair.rebind(1);
    let woken = pair.now;
    pair.send_every(0, Some(millis(10)));
    pair.run_for(millis(3000));
    assert!(pair.longest_gap(1, woken) <= millis(100));
    assert_eq!(pair.lost(1), 0);
    // Their reflexive addresses are learned anew by STUN.
    pair.announce(0);
    pair.announce(1);
    assert!(pair.run_until(millis(10_000), |pair| pair.is_direct(0)).is_some());
}

#[test]
fn a_peer_whose_nat_gives_another_port_is_followed() {
    let mut pair = direct([Nat::Easy, Nat::Open], 3);
    let (cut, before) = (pair.now, pair.public(0));
    pair.rebind(0);
    pair.run_for(millis(6000));
    assert!(pair.are_direct());
    assert_ne!(pair.public(0), before);
    assert_eq!(pair.sides[1].agent.route().primary, Some(Endpoint::Direct(pair.public(0))));
    for at in 0..2 {
        let gap = pair.longest_gap(at, cut);
        assert!(gap <= millis(3000), "{gap:?}");
    }
}

#[test]
fn another_uplink_is_bridged_by_the_relay() {
    let mut pair = direct([Nat::Easy, Nat::Easy], 4);
    let cut = pair.now;
    pair.rebind(0);
    let now = pair.now;
    pair.sides[0].agent.handle_network_changed(now);
    pair.run_for(millis(1000));
    pair.announce(0);
    pair.run_for(millis(4000));
    assert!(pair.are_direct());
    for at in 0..2 {
        let gap = pair.longest_gap(at, cut);
        assert!(gap <= millis(3000), "{gap:?}");
    }
}

#[test]
fn a_long_sleep_ends_trust() {
    let mut pair = direct([Nat::Easy, Nat::Easy], 5);
    // Both hosts are suspended for a day: no timer runs, then all are late.
    pair.now += millis(86_400_000);
    for at in 0..2 {
        let now = pair.now;
        pair.sides[at].agent.handle_timeout(now);
        assert_eq!(pair.sides[at].agent.route().second, Some(Endpoint::Relay(RELAY)));
        assert_eq!(pair.sides[at].agent.poll_timeout(), None);
    }
}

#[test]
fn routes_are_told_only_when_they_change() {
    let mut pair = direct([Nat::Easy, Nat::Easy], 6);
    let before = pair.sides[0].routes;
    pair.run_for(millis(60_000));
    assert_eq!(pair.sides[0].routes, before);
    for _ in 0..100 {
        pair.announce(1);
        pair.set_relay(true);
    }
    assert_eq!(pair.sides[0].routes, before);
}

#[test]
fn two_nodes_that_nobody_uses_do_not_keep_each_other_awake_by_calling() {
    for seed in 0..20 {
        let mut pair = direct([Nat::Easy, Nat::Easy], seed).with_loss(40);
        pair.send_every(0, None);
        pair.send_every(1, None);
        pair.run_for(millis(60_000));
        let probes = [pair.sides[0].probes, pair.sides[1].probes];
        pair.run_for(millis(60_000));
        assert_eq!([pair.sides[0].probes, pair.sides[1].probes], probes, "seed {seed}");
        for side in &pair.sides {
            assert_eq!(side.agent.poll_timeout(), None, "seed {seed}");
        }
    }
}
