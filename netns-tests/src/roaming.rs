//! What happens to a pair when its path does: each check makes a path, breaks it, and measures from outside for how long
//! the two did not hear each other.

pub mod checks;
pub mod gap;
pub mod report;

use std::{
    io::{self, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    Lab,
    binaries::Binaries,
    matrix::pair::{Bench, BenchOptions, keep_words},
    roaming::report::{CHECKS, Check, Outcome, Report},
};

#[derive(Debug, Clone)]
pub struct Options {
    /// Names of checks; all when empty.
    pub only: Vec<String>,
    /// One way, on the wire of each site.
    pub delay: Duration,
    /// Where what the agents of a failed check say is kept.
    pub keep: Option<PathBuf>,
}

/// Runs the checks. Fails only when no lab could be made or a name is wrong; why a check failed is on stderr.
pub fn run(binaries: &Binaries, options: &Options) -> Result<Report> {
    for name in &options.only {
        ensure!(CHECKS.contains(&name.as_str()), "there is no check {name}; checks are {}", CHECKS.join(" "));
    }
    let start = Instant::now();
    let bench_options = BenchOptions { delay: options.delay, sites: 3, nodes: 3, ..BenchOptions::default() };
    let mut bench = Bench::build(Lab::new()?, binaries, &bench_options)?;
    let mut report = Report::default();
    for name in CHECKS {
        if !options.only.is_empty() && !options.only.iter().any(|only| only == name) {
            continue;
        }
        let outcome = check(&mut bench, name);
        let check = Check::of(name, outcome.as_ref().ok().copied());
        let mut line = format!("{:>7.1} s  {check}", start.elapsed().as_secs_f64());
        if let Err(error) = &outcome {
            line.push_str(&format!("\n           {error:#}"));
        }
        if let Some(dir) = options.keep.as_deref().filter(|_| !check.ok)
            && let Err(error) = keep_words(&bench.nodes, dir, name)
        {
            line.push_str(&format!("\n           {error:#}"));
        }
        // A closed pipe must not end the run before it has cleaned up.
        let _ = writeln!(io::stderr(), "{line}");
        report.checks.push(check);
    }
    Ok(report)
}

fn check(bench: &mut Bench, name: &str) -> Result<Outcome> {
    match name {
        "direct-cut-relay-up" => checks::direct_cut_relay_up(bench),
        "uplink-swap" => checks::uplink_swap(bench),
        "udp-blocked-start" => checks::udp_blocked_start(bench),
        "udp-blocked-midflight-tcp-survives" => checks::udp_blocked_midflight_tcp_survives(bench),
        "nat-rebind" => checks::nat_rebind(bench),
        "suspend-resume" => checks::suspend_resume(bench),
        "relay-restart" => checks::relay_restart(bench),
        "same-port-behind-one-nat" => checks::same_port_behind_one_nat(bench),
        "connect-proxy" => checks::connect_proxy(bench),
        _ => unreachable!("names were checked against the list that this follows"),
    }
}
