//! Devices that send to one place at a time, as the kernel's do: relay first, direct once that is proven, never both.
//! [`Pair`] itself holds that they are given no other route.

use super::pair::{Nat, Pair, millis};
use crate::device::Capabilities;

const KERNEL: Capabilities = Capabilities::KERNEL;
const USERSPACE: Capabilities = Capabilities::USERSPACE;

fn talking(nats: [Nat; 2], devices: [Capabilities; 2], seed: u64) -> Pair {
    let mut pair = Pair::new(nats, seed).with_devices(devices).with_relay();
    pair.send_every(0, Some(millis(5)));
    pair.send_every(1, Some(millis(5)));
    pair
}

#[test]
fn a_kernel_is_direct_as_soon_as_another_device_and_loses_nothing() {
    for devices in [[KERNEL, KERNEL], [KERNEL, USERSPACE], [USERSPACE, KERNEL]] {
        for seed in 0..20 {
            let mut pair = talking([Nat::Easy, Nat::Easy], devices, seed);
            let first = pair.run_until(millis(5000), |pair| !pair.sides[1].got.is_empty()).unwrap();
            assert!(first <= millis(2 * 60 + 200), "first byte after {first:?}");
            let direct = pair.run_until(millis(5000), Pair::are_direct).unwrap();
            assert!(direct < millis(1000), "direct after {direct:?}");
            pair.run_for(millis(5000));
            assert!(pair.are_direct());
            assert_eq!((pair.lost(0), pair.lost(1)), (0, 0), "seed {seed}");
        }
    }
}

#[test]
fn a_dead_direct_path_is_left_within_three_seconds_and_found_again() {
    for seed in 0..20 {
        let mut pair = talking([Nat::Easy, Nat::Easy], [KERNEL, KERNEL], seed);
        pair.run_until(millis(5000), Pair::are_direct).unwrap();
        pair.run_for(millis(5000));
        let cut = pair.now;
        pair.faults.direct = [true; 2];
        pair.run_for(millis(6000));
        for at in 0..2 {
            assert!(pair.is_relayed(at), "seed {seed}");
            let gap = pair.longest_gap(at, cut);
            assert!(gap <= millis(3000), "{gap:?}, seed {seed}");
        }
        pair.faults.direct = [false; 2];
        assert!(pair.run_until(millis(15_000), Pair::are_direct).is_some(), "seed {seed}");
    }
}

#[test]
fn without_a_relay_probes_find_the_address_that_initiations_then_go_to() {
    for nats in [[Nat::Open, Nat::Open], [Nat::Hard, Nat::Open], [Nat::Easy, Nat::Open]] {
        let mut pair = Pair::new(nats, 5).with_devices([KERNEL, KERNEL]);
        pair.send_every(0, Some(millis(10)));
        let first = pair.run_until(millis(2000), |pair| !pair.sides[1].got.is_empty());
        assert!(first.is_some(), "{nats:?}");
        pair.run_for(millis(1000));
        assert_eq!(pair.lost(1), 0, "{nats:?}");
    }
}

#[test]
fn a_device_that_is_not_told_so_is_given_routes_it_cannot_carry_out() {
    let mut pair = talking([Nat::Easy, Nat::Easy], [USERSPACE, USERSPACE], 1);
    let is_sent_twice = |pair: &Pair| pair.sides.iter().any(|side| side.agent.route().second.is_some());
    assert!(pair.run_until(millis(5000), is_sent_twice).is_some());
}
