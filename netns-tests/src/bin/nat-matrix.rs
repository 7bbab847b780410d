//! `cargo run --release -p netns-tests --bin nat-matrix`: real agents behind every pair of NATs, on this machine alone.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;
use netns_tests::{
    matrix::{self, Options, Selection, parse_pair},
    nat::{Ports, oracle::Pair},
    program,
};

/// Connects two nodes across every pair of NAT kinds and measures how, how fast, and what is lost.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Print the verdicts as one JSON line at the end; everything for people goes to stderr.
    #[arg(long)]
    json: bool,
    /// One pair of each class.
    #[arg(long, conflicts_with = "only")]
    smoke: bool,
    /// The pair that needs luck, ten times, and no other.
    #[arg(long, conflicts_with_all = ["only", "smoke"])]
    hard: bool,
    /// These pairs, each as A,B or same-nat; may be repeated.
    #[arg(long, value_name = "A,B", value_parser = parse_pair)]
    only: Vec<Pair>,
    /// One-way delay of each site's uplink, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u16).range(0..=1000))]
    delay_ms: u16,
    /// Keep the logs and the status of the agents of each failed pair here.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Routers give another port than the inner one even where that is free.
    #[arg(long)]
    shifted: bool,
}

fn main() -> ExitCode {
    program::run(|| work(Args::parse()))
}

fn work(args: Args) -> Result<bool> {
    let binaries = program::enter("the matrix")?;
    let selection = if args.smoke {
        Selection::Smoke
    } else if args.hard {
        Selection::Hard
    } else if args.only.is_empty() {
        Selection::All
    } else {
        Selection::Only(args.only)
    };
    let ports = if args.shifted { Ports::Shifted } else { Ports::Kept };
    let options = Options { selection, delay: Duration::from_millis(args.delay_ms.into()), ports, keep: args.keep };
    let report = matrix::run(&binaries, &options)?;
    if args.json {
        println!("{}", report.json());
    }
    Ok(report.ok())
}
