//! The command line of `mesh-bench`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::{
    contender::copying::{self, CopyingEnd},
    converge, soak, throughput, traffic,
};

/// Measures Meshspan beside its rivals, on this machine alone, in network namespaces.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Throughput(throughput::Args),
    Soak(soak::Args),
    Converge(converge::Args),
    /// A child of `throughput`: sends and receives as it is told.
    #[command(hide = true)]
    Traffic {
        socket: PathBuf,
    },
    /// A child of `throughput`: one end of the no-crypto ceiling.
    #[command(hide = true)]
    CopyingEnd {
        end: CopyingEnd,
    },
}

/// Runs the command of this process.
pub fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Throughput(args) => throughput::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Converge(args) => converge::run(&args),
        Command::Traffic { socket } => traffic::serve(&socket).map(|()| ExitCode::SUCCESS),
        Command::CopyingEnd { end } => copying::run(&end).map(|()| ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
