//! `cargo run --release -p netns-tests --bin kernel-vm`: agents on the kernel's WireGuard, in a machine of their own where
//! this one's kernel has none.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use clap::Parser;
use netns_tests::{
    binaries::Binaries,
    kernel::{self, MODULES, Options, report::Report},
    program,
    vm::{self, Job},
};

/// Boots Debian's kernel under qemu and runs agents inside whose packets that kernel's WireGuard carries.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Print the verdicts as one JSON line at the end; everything for people goes to stderr.
    #[arg(long)]
    json: bool,
    /// This check; may be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Run the checks right here: this is what runs inside the machine.
    #[arg(long)]
    inside: bool,
}

/// Emulated to the instruction: a machine that is busy with other work takes longer, and no check fails by it.
const WITHIN: Duration = Duration::from_secs(1800);
const MEMORY_MIB: u32 = 1536;

fn main() -> ExitCode {
    program::run(|| work(&Args::parse()))
}

fn work(args: &Args) -> Result<bool> {
    let report = if args.inside { inside(args)? } else { outside(args)? };
    if args.json || args.inside {
        println!("{}", report.json());
    }
    Ok(report.passed(&args.only))
}

fn inside(args: &Args) -> Result<Report> {
    kernel::run(&Binaries::find()?, &Options { only: args.only.clone() })
}

fn outside(args: &Args) -> Result<Report> {
    vm::find::Tools::find()?;
    let binaries = Binaries::find()?;
    let own = std::env::current_exe().context("this program has no file")?;
    let mut arguments = vec!["--inside".to_owned()];
    arguments.extend(args.only.iter().flat_map(|name| ["--only".to_owned(), name.clone()]));
    let programs: Vec<PathBuf> = vec![own, binaries.agent, binaries.server];
    let job = Job { programs, arguments, modules: MODULES, memory_mib: MEMORY_MIB, within: WITHIN };
    let mut report = None;
    let ran = vm::run(&job, |line| match serde_json::from_str::<Report>(line) {
        Ok(read) => report = Some(read),
        Err(_) => eprintln!("{line}"),
    });
    // A machine that ran to its end with checks that failed has a report all the same.
    match (report, ran) {
        (Some(report), _) => Ok(report),
        (None, Err(error)) => Err(error),
        (None, Ok(())) => anyhow::bail!("the machine ended without a report"),
    }
}
