//! The simulated mesh over many seeds. `MESHSPAN_SEED=N` runs one of them, `MESHSPAN_SEED=N..M` others.
// A run has no environment; the test that starts many of them has.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use mesh_sim::host::Sabotage;
use mesh_sim::model::Violation;
use mesh_sim::scenario::Options;
use mesh_sim::world::{self, Outcome};

const AGENTS: usize = 50;
const SEEDS: u64 = 100;
const QUARTERS: u64 = 4;

fn run(seed: u64, agents: usize, sabotage: Option<Sabotage>) -> Outcome {
    world::run(Options { seed, agents, sabotage })
}

/// What is wrong with a run, in words that let one repeat it.
fn complaint(outcome: &Outcome) -> Option<String> {
    let shown: Vec<String> = outcome
        .violations
        .iter()
        .take(5)
        .map(|(at, violation)| format!("  {:?}: {violation}", at.since_origin()))
        .collect();
    (!shown.is_empty()).then(|| {
        format!(
            "seed {}: {} broken rules (MESHSPAN_SEED={} repeats it)\n{}",
            outcome.seed,
            outcome.violations.len(),
            outcome.seed,
            shown.join("\n")
        )
    })
}

/// The seeds of a quarter, so that a machine with two cores is through with each in less than three minutes: after the last
/// fault every pair talks again within 30 s, and no rule is broken.
fn every_pair_talks_again(quarter: u64) {
    let seeds = std::env::var("MESHSPAN_SEED").map_or(0..SEEDS, |words| {
        let number = |word: &str| word.parse().expect("MESHSPAN_SEED is a number, or two with .. between");
        match words.split_once("..") {
            Some((first, end)) => number(first)..number(end),
            None => number(&words)..number(&words) + 1,
        }
    });
    let outcomes: Vec<Outcome> =
        seeds.filter(|seed| seed % QUARTERS == quarter).map(|seed| run(seed, AGENTS, None)).collect();
    for outcome in &outcomes {
        println!(
            "seed {}: settled after {:?}, {} events, {} packets, {} forged dropped",
            outcome.seed, outcome.settled_after, outcome.events, outcome.delivered, outcome.forged_dropped
        );
        assert!(outcome.forged_dropped > 0, "seed {}: forged packets were sent and reached a check", outcome.seed);
    }
    let complaints: Vec<String> = outcomes.iter().filter_map(complaint).collect();
    assert!(complaints.is_empty(), "{} of {} runs failed\n{}", complaints.len(), outcomes.len(), complaints.join("\n"));
}

#[test]
fn every_pair_of_fifty_nodes_talks_again_in_the_first_quarter_of_seeds() {
    every_pair_talks_again(0);
}

#[test]
fn every_pair_of_fifty_nodes_talks_again_in_the_second_quarter_of_seeds() {
    every_pair_talks_again(1);
}

#[test]
fn every_pair_of_fifty_nodes_talks_again_in_the_third_quarter_of_seeds() {
    every_pair_talks_again(2);
}

#[test]
fn every_pair_of_fifty_nodes_talks_again_in_the_fourth_quarter_of_seeds() {
    every_pair_talks_again(3);
}

#[test]
fn a_seed_is_a_complete_description_of_a_run() {
    let runs: Vec<Outcome> = (0..2).map(|_| run(7, 8, None)).collect();
    assert_eq!(runs[0].events, runs[1].events);
    assert_eq!(runs[0].settled_after, runs[1].settled_after);
}

/// The rules that a sabotaged host breaks within a few seeds.
fn broken_by(sabotage: Sabotage) -> Vec<Violation> {
    let runs = (0..24).map(|seed| run(seed, 12, Some(sabotage)));
    let violations = runs.flat_map(|outcome| outcome.violations);
    violations.map(|(_, violation)| violation).collect()
}

#[test]
fn a_host_that_delivers_foreign_sources_is_seen() {
    let broken = broken_by(Sabotage::DeliversForeignSources);
    assert!(broken.iter().any(|violation| matches!(violation, Violation::ForeignSource { at: 0, .. })));
}

#[test]
fn a_host_that_ignores_its_steps_is_seen() {
    let broken = broken_by(Sabotage::IgnoresSteps);
    assert!(broken.iter().any(|violation| matches!(violation, Violation::NotConverged(_))));
}

#[test]
fn a_host_without_the_floor_is_seen() {
    let broken = broken_by(Sabotage::OmitsFloor);
    assert!(broken.iter().any(|violation| matches!(violation, Violation::Leak { at: 0, .. })));
}

#[test]
fn a_host_that_forgets_what_it_saw_is_rolled_back_and_seen() {
    let broken = broken_by(Sabotage::ForgetsMarks);
    assert!(broken.iter().any(|violation| matches!(violation, Violation::Rollback { at: 0, .. })));
}
