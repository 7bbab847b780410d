//! `cargo run --release -p netns-tests --bin roaming`: a pair of real agents loses its path in every way, on this machine
//! alone.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;
use netns_tests::{
    binaries::{BIN_DIR, Binaries},
    isolation,
    roaming::{self, Options, report::Report},
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
    let args = Args::parse();
    let binaries = match Binaries::find() {
        Ok(binaries) => binaries,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    // No thread exists yet: this may replace the process by itself inside a user namespace.
    if let Err(why) = isolation::tun_available().and_then(|()| isolation::enter_program(&[(BIN_DIR, binaries.dir())])) {
        eprintln!("error: roaming cannot run here: {why}\nhelp: {}", why.help());
        return ExitCode::FAILURE;
    }
    let options = Options { only: args.only, delay: Duration::from_millis(args.delay_ms.into()), keep: args.keep };
    let report = roaming::run(&binaries, &options).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Report::default()
    });
    if args.json {
        println!("{}", report.json());
    }
    if report.ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
