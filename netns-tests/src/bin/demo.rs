//! `cargo run --release -p netns-tests --bin demo`: one server, three nodes, six pods, on this machine alone.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use netns_tests::{demo, program};

/// Builds a mesh of three nodes in network namespaces of this machine, checks it, and removes it.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Print the verdicts as one JSON line at the end; everything for people goes to stderr.
    #[arg(long)]
    json: bool,
    /// Keep the mesh until Ctrl-C and print how to enter its hosts.
    #[arg(long)]
    keep: bool,
    /// How often to measure the start of a node with an empty cache.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    cold_starts: u16,
    /// Reverse path filter on every underlay link: 0 off, 1 strict, 2 loose.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    rp_filter: u8,
}

fn main() -> ExitCode {
    program::run(|| work(Args::parse()))
}

fn work(args: Args) -> Result<bool> {
    let binaries = program::enter("the demo")?;
    let options = demo::Options {
        json: args.json,
        keep: args.keep,
        cold_starts: args.cold_starts.into(),
        rp_filter: args.rp_filter,
    };
    let (report, kept) = demo::run(&binaries, options);
    if let Some(mesh) = &kept {
        eprintln!("{}", demo::ways_in(mesh));
    }
    if args.json {
        println!("{}", report.json());
    }
    if kept.is_some() {
        // A signal removes the lab and ends the process.
        loop {
            std::thread::park();
        }
    }
    Ok(report.ok())
}
