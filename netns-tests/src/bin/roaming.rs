//! `cargo run --release -p netns-tests --bin roaming`: a pair of real agents loses its path in every way, on this machine
//! alone.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::Parser;
use netns_tests::{
    program,
    roaming::{self, Options},
};

/// Breaks the path between two nodes in every way and measures how long they do not hear each other.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Print the verdicts as one JSON line at the end; everything for people goes to stderr.
    #[arg(long)]
    json: bool,
    /// This check; may be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// One-way delay of each site's uplink, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 20, value_parser = clap::value_parser!(u16).range(0..=1000))]
    delay_ms: u16,
    /// Keep the logs and the status of the agents of each failed check here.
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

fn main() -> ExitCode {
    program::run(|| work(Args::parse()))
}

fn work(args: Args) -> Result<bool> {
    let binaries = program::enter("roaming")?;
    let options = Options { only: args.only, delay: Duration::from_millis(args.delay_ms.into()), keep: args.keep };
    let report = roaming::run(&binaries, &options)?;
    if args.json {
        println!("{}", report.json());
    }
    Ok(report.ok())
}
