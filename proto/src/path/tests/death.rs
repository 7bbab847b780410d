//! A path dies, in every way a path can.

use super::pair::{Faults, Nat, Pair, millis};
use crate::path::agent::PathPolicy;

/// A direct pair with traffic both ways.
fn direct(seed: u64, policy: PathPolicy) -> Pair {
    let mut pair = Pair::with_policy([Nat::Easy, Nat::Easy], seed, policy).with_relay();
    pair.send_every(0, Some(millis(10)));
    pair.send_every(1, Some(millis(10)));
    pair.run_until(millis(5000), Pair::are_direct).unwrap();
    pair.run_for(millis(5000));
    assert!(pair.are_direct());
    pair
}

#[test]
fn a_dead_direct_path_is_left_for_the_relay_within_three_seconds_and_found_again() {
    for seed in 0..20 {
        let mut pair = direct(seed, PathPolicy::default());
        let cut = pair.now;
        pair.faults.direct = [true; 2];
        pair.run_for(millis(4000));
        for at in 0..2 {
            assert!(pair.is_relayed(at), "seed {seed}");
            let gap = pair.longest_gap(at, cut);
            assert!(gap <= millis(3000), "{gap:?}, seed {seed}");
            let switch = pair.sides[at].agent.view(pair.now).last_switch.unwrap();
            assert_eq!(switch.reason, "no answer to probes any more");
        }
        pair.faults.direct = [false; 2];
        assert!(pair.run_until(millis(15_000), Pair::are_direct).is_some(), "seed {seed}");
    }
}

#[test]
fn sending_twice_while_unsure_halves_the_gap() {
    let gap = |policy| {
        let mut pair = direct(1, policy);
        let cut = pair.now;
        pair.faults.direct = [true; 2];
        pair.run_for(millis(5000));
        pair.longest_gap(1, cut)
    };
    let (both, single) = (gap(PathPolicy::default()), gap(PathPolicy { dual_send: false, ..PathPolicy::default() }));
    assert!(both <= millis(2000) && single > both + millis(500), "{both:?} and {single:?}");
    let never = gap(PathPolicy { trust_expiry: false, ..PathPolicy::default() });
    assert!(never >= millis(4900), "{never:?}: without expiry the dead path is trusted for ever");
}

#[test]
fn one_dead_direction_is_enough() {
    for (dead, seed) in [(0, 1), (1, 2)] {
        let mut pair = direct(seed, PathPolicy::default());
        let cut = pair.now;
        pair.faults.direct[dead] = true;
        pair.run_for(millis(6000));
        assert!(pair.is_relayed(0) && pair.is_relayed(1));
        for at in 0..2 {
            assert!(pair.longest_gap(at, cut) <= millis(3000));
        }
        pair.run_for(millis(60_000));
        for at in 0..2 {
            assert!(pair.is_relayed(at), "data that comes in proves one direction only");
        }
    }
}

#[test]
fn probes_that_pass_do_not_make_up_for_data_that_does_not() {
    for seed in 0..20 {
        let mut pair = direct(seed, PathPolicy::default());
        let cut = pair.now;
        pair.faults.data = true;
        pair.run_for(millis(8000));
        assert!(pair.is_relayed(0) && pair.is_relayed(1), "seed {seed}");
        for at in 0..2 {
            let gap = pair.longest_gap(at, cut);
            assert!(gap <= millis(4000), "{gap:?}, seed {seed}");
            let view = pair.sides[at].agent.view(pair.now);
            assert_eq!(view.last_switch.unwrap().reason, "probes pass, tunnel data does not");
            assert!(view.why_not_direct.unwrap().contains("probes pass, tunnel data does not"), "seed {seed}");
        }
        pair.run_for(millis(40_000));
        assert!(pair.is_relayed(0) && pair.is_relayed(1), "barred for a minute, seed {seed}");
        pair.faults.data = false;
        assert!(pair.run_until(millis(90_000), Pair::are_direct).is_some(), "and tried again after it, seed {seed}");
    }
}

#[test]
fn a_switch_to_a_path_that_carries_no_data_loses_little() {
    let mut pair = Pair::new([Nat::Easy, Nat::Easy], 5).with_relay();
    pair.faults.data = true;
    let start = pair.now;
    pair.send_every(0, Some(millis(10)));
    pair.send_every(1, Some(millis(10)));
    pair.run_for(millis(30_000));
    assert!(pair.is_relayed(0) && pair.is_relayed(1));
    assert!(pair.longest_gap(0, start) <= millis(4000));
}

#[test]
fn when_the_relay_dies_a_direct_path_stays_and_a_relayed_pair_waits_for_another() {
    let mut pair = direct(4, PathPolicy::default());
    let cut = pair.now;
    pair.set_relay(false);
    pair.run_for(millis(10_000));
    assert!(pair.are_direct());
    assert!(pair.longest_gap(0, cut) <= millis(200));
    assert_eq!(pair.lost(0), 0);

    let mut hard = Pair::new([Nat::Hard, Nat::Hard], 4).with_relay();
    hard.send_every(0, Some(millis(10)));
    hard.run_for(millis(5000));
    assert!(hard.is_relayed(0));
    hard.set_relay(false);
    hard.run_for(millis(1000));
    assert!(!hard.is_relayed(0));
    hard.set_relay(true);
    hard.run_for(millis(1000));
    assert!(hard.is_relayed(0), "the session lives: the relay carries it again");
}

#[test]
fn loss_alone_does_not_end_a_path() {
    let mut pair = direct(6, PathPolicy::default()).with_loss(10);
    let before = pair.sides[0].agent.view(pair.now).switches;
    pair.run_for(millis(120_000));
    assert!(pair.are_direct());
    let switches = pair.sides[0].agent.view(pair.now).switches - before;
    assert!(switches <= 1, "{switches} switches in two minutes at 10 % loss");
}

#[test]
fn without_a_relay_the_last_path_is_kept_and_works_again_when_it_does() {
    let mut pair = Pair::new([Nat::Open, Nat::Open], 8);
    pair.send_every(0, Some(millis(10)));
    pair.run_for(millis(5000));
    assert!(pair.are_direct());
    pair.faults = Faults { direct: [true; 2], ..Faults::default() };
    pair.run_for(millis(20_000));
    assert!(pair.is_direct(0), "there is nothing better");
    let mended = pair.now;
    pair.faults = Faults::default();
    pair.run_for(millis(2000));
    assert!(pair.longest_gap(1, mended) <= millis(100));
}
