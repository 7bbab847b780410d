//! Many runs of [`crate::paths`] on all cores, and what they add up to.
// Runs have one thread each; what starts many of them has several.
#![allow(clippy::disallowed_types, clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mesh_proto::path::agent::PathPolicy;

use crate::nat::NatKind;
use crate::paths::{self, Options, Outcome};

/// What a range of seeds came to.
#[derive(Debug, Default)]
pub struct Tally {
    pub scenarios: u64,
    pub pairs: BTreeMap<[NatKind; 2], Pair>,
    /// Words for each run with a broken rule, by seed.
    pub complaints: BTreeMap<u64, String>,
    pub violations: u64,
    /// Of pairs that must be direct, in runs without losses.
    to_direct: Vec<Duration>,
    first_bytes: Vec<Duration>,
}

/// Runs of one pair of classes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pair {
    pub scenarios: u64,
    pub troubled: u64,
    pub must_be_direct: u64,
    pub was_direct: u64,
}

/// Runs `count` seeds from `first` on.
pub fn run(first: u64, count: u64, policy: PathPolicy) -> Tally {
    let next = AtomicU64::new(0);
    let tally = Mutex::new(Tally::default());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        break;
                    }
                    let outcome = paths::run(Options { seed: first.wrapping_add(index), policy, traces: false });
                    tally.lock().unwrap_or_else(PoisonError::into_inner).add(&outcome);
                }
            });
        }
    });
    tally.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// What is wrong with a run, in words that let one repeat it.
pub fn complaint(outcome: &Outcome) -> Option<String> {
    if outcome.violations.is_empty() {
        return None;
    }
    let Outcome { seed, classes: [left, right], fault, violations, .. } = outcome;
    let mut words = format!(
        "seed {seed}: {} and {}, {fault:?}: {} broken rules (--scenarios 1 --seed {seed} --trace repeats it)",
        left.name(),
        right.name(),
        violations.len()
    );
    for (at, violation) in violations.iter().take(4) {
        write!(words, "\n  {:?}: {violation}", at.since_origin()).expect("a string takes all");
    }
    Some(words)
}

impl Tally {
    fn add(&mut self, outcome: &Outcome) {
        self.scenarios += 1;
        let pair = self.pairs.entry(outcome.classes).or_default();
        pair.scenarios += 1;
        pair.troubled += u64::from(outcome.is_troubled);
        pair.must_be_direct += u64::from(outcome.must_be_direct);
        pair.was_direct += u64::from(outcome.was_direct);
        self.violations += outcome.violations.len() as u64;
        if let Some(complaint) = complaint(outcome) {
            self.complaints.insert(outcome.seed, complaint);
        }
        if !outcome.loses {
            self.first_bytes.extend(outcome.first_byte);
            self.to_direct.extend(outcome.to_direct.filter(|_| outcome.must_be_direct));
        }
    }

    /// One line of JSON.
    pub fn json(&self, first: u64) -> String {
        let pairs: Vec<String> = self
            .pairs
            .iter()
            .map(|([left, right], pair)| {
                let Pair { scenarios, troubled, must_be_direct, was_direct } = pair;
                format!(
                    r#"{{"left":"{}","right":"{}","scenarios":{scenarios},"troubled":{troubled},"must_be_direct":{must_be_direct},"was_direct":{was_direct}}}"#,
                    left.name(),
                    right.name(),
                )
            })
            .collect();
        let quantile = |times: &[Duration], percent: usize| {
            let mut times = times.to_vec();
            times.sort_unstable();
            times.get((times.len().saturating_sub(1)) * percent / 100).map_or(0, Duration::as_millis)
        };
        format!(
            r#"{{"scenarios":{},"seed":{first},"violations":{},"direct_p50_ms":{},"direct_p95_ms":{},"direct_max_ms":{},"first_byte_p50_ms":{},"first_byte_max_ms":{},"pairs":[{}]}}"#,
            self.scenarios,
            self.violations,
            quantile(&self.to_direct, 50),
            quantile(&self.to_direct, 95),
            quantile(&self.to_direct, 100),
            quantile(&self.first_bytes, 50),
            quantile(&self.first_bytes, 100),
            pairs.join(","),
        )
    }
}
