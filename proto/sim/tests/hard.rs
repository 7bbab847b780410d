//! Hard pairs: one side's port differs for each destination, the other lets in only whom it wrote to.
//! `cargo run --release -p mesh-sim -- --scenarios 1 --seed N --trace` repeats a seed.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use mesh_proto::path::agent::PathPolicy;
use mesh_sim::campaign::complaint;
use mesh_sim::nat::NatKind;
use mesh_sim::paths::plan::{Plan, class_pairs};
use mesh_sim::paths::{self, Options, Outcome};

const HARD: [&str; 2] = ["eim-apdf", "apdm-apdf"];

fn is_soon(outcome: &&Outcome) -> bool {
    outcome.was_direct && outcome.to_direct.is_some_and(|after| after < Duration::from_secs(15))
}

/// Runs of this pair of classes, calm ones, with IPv4 alone and UDP.
fn runs(classes: [&str; 2], count: usize, policy: PathPolicy) -> Vec<Outcome> {
    let kind = |name: &str| NatKind::all().find(|kind| kind.name() == name).unwrap();
    let classes = classes.map(kind);
    let pairs = class_pairs();
    let (place, count_of_pairs) = (pairs.iter().position(|pair| *pair == classes).unwrap(), pairs.len());
    let seeds = (0..).map(|turn| (place + turn * count_of_pairs) as u64);
    let is_calm = |seed: &u64| {
        let plan = Plan::new(*seed);
        let sides: Vec<_> = plan.hosts.iter().map(|host| host.uplinks[0].side(&plan.internet)).collect();
        let has_udp = sides.iter().all(|side| side.routers.iter().all(|hop| !hop.blocks_udp));
        !plan.is_troubled && plan.fault.is_none() && has_udp && !sides.iter().all(|side| side.has_v6)
    };
    let run = |seed| paths::run(Options { seed, policy, traces: false });
    seeds.filter(is_calm).take(count).map(run).collect()
}

#[test]
fn a_hard_pair_is_direct_within_fifteen_seconds_in_four_of_five_runs() {
    let outcomes = runs(HARD, 50, PathPolicy::default());
    let complaints: Vec<String> = outcomes.iter().filter_map(complaint).collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    let direct = outcomes.iter().filter(is_soon).count();
    let others: Vec<u64> = outcomes.iter().filter(|outcome| !is_soon(outcome)).map(|outcome| outcome.seed).collect();
    println!("{direct} of {}, not direct: {others:?}", outcomes.len());
    assert!(direct * 5 >= outcomes.len() * 4, "{direct} of {}, not direct: {others:?}", outcomes.len());

    let without = runs(HARD, 50, PathPolicy { guess_ports: false, ..PathPolicy::default() });
    let direct = without.iter().filter(is_soon).count();
    assert!(direct * 2 < without.len(), "{direct} of {} without guessing", without.len());
}

#[test]
fn two_sides_that_both_change_their_ports_stay_on_the_relay() {
    for outcome in runs(["apdm-apdf", "apdm-apdf"], 8, PathPolicy::default()) {
        assert_eq!(complaint(&outcome), None);
    }
}
