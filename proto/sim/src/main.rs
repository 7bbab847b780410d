//! `mesh-sim --scenarios N --seed S [--json] [--trace]`: paths through NATs, as many runs as asked for, judged.
// Arguments are the one thing that comes from outside.
#![allow(clippy::disallowed_methods)]

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use mesh_proto::path::agent::PathPolicy;
use mesh_sim::campaign;
use mesh_sim::paths::{self, Options};

const USAGE: &str =
    "usage: mesh-sim [--scenarios N] [--seed S] [--json] [--trace] [--without call|dual-send|trust-expiry]";

fn main() -> Result<ExitCode> {
    let (mut scenarios, mut seed, mut json, mut traces) = (100, 1, false, false);
    let mut policy = PathPolicy::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} needs a value\n{USAGE}"));
        match argument.as_str() {
            "--scenarios" => scenarios = value()?.parse().context("--scenarios takes a number")?,
            "--seed" => seed = value()?.parse().context("--seed takes a number")?,
            "--json" => json = true,
            "--trace" => traces = true,
            "--without" => match value()?.as_str() {
                "call" => policy.call = false,
                "dual-send" => policy.dual_send = false,
                "trust-expiry" => policy.trust_expiry = false,
                other => bail!("{other} cannot be switched off\n{USAGE}"),
            },
            other => bail!("unknown argument {other}\n{USAGE}"),
        }
    }
    if traces {
        for seed in seed..seed + scenarios {
            let outcome = paths::run(Options { seed, policy, traces });
            outcome.trace.iter().for_each(|line| println!("{line}"));
        }
    }
    let tally = campaign::run(seed, scenarios, policy);
    for complaint in tally.complaints.values() {
        eprintln!("{complaint}");
    }
    if json {
        println!("{}", tally.json(seed));
    } else {
        println!("{} scenarios, {} violations", tally.scenarios, tally.violations);
    }
    Ok(if tally.violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
