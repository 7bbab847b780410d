//! Paths through NATs over some hundred seeds. `cargo run --release -p mesh-sim -- --scenarios 1 --seed N --trace` repeats one.
#![allow(clippy::unwrap_used)]

use mesh_proto::path::agent::PathPolicy;
use mesh_sim::campaign::{self, Tally};
use mesh_sim::paths::{self, Options};

/// Each pair of classes ten times, half of them troubled.
const SCENARIOS: u64 = 450;

fn campaign(policy: PathPolicy) -> Tally {
    campaign::run(0, SCENARIOS, policy)
}

#[test]
fn every_pair_talks_at_once_is_direct_where_it_must_be_and_survives_its_faults() {
    let tally = campaign(PathPolicy::default());
    println!("{}", tally.json(0));
    let complaints: Vec<&str> = tally.complaints.values().map(String::as_str).collect();
    assert!(complaints.is_empty(), "{} runs of {SCENARIOS} failed\n{}", complaints.len(), complaints.join("\n"));
    let must_be_direct: u64 = tally.pairs.values().map(|pair| pair.must_be_direct).sum();
    assert!((SCENARIOS / 3..SCENARIOS).contains(&must_be_direct), "{must_be_direct}");
}

#[test]
fn without_calls_without_sending_twice_and_with_eternal_trust_rules_are_broken() {
    let all = PathPolicy::default();
    for policy in [
        PathPolicy { call: false, ..all },
        PathPolicy { dual_send: false, ..all },
        PathPolicy { trust_expiry: false, ..all },
    ] {
        let tally = campaign(policy);
        println!("{policy:?}: {} violations", tally.violations);
        assert!(tally.violations > 0, "{policy:?}");
    }
}

#[test]
fn a_seed_is_a_complete_description_of_a_run() {
    let run = |seed| paths::run(Options { seed, policy: PathPolicy::default(), traces: true }).trace;
    for seed in 30..34 {
        let (first, second) = (run(seed), run(seed));
        assert!(!first.is_empty());
        assert!(first == second, "seed {seed}");
    }
}
