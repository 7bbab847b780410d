//! `discovery-server`: the shell around `mesh_proto::discovery::server`.
//!
//! Owns sockets, TLS, time and randomness; every decision about a session is the machine's. Nothing is kept on disk but
//! the TLS key. Exit codes: 0 stopped by signal, 1 error, 2 usage.

use std::io::{self, IsTerminal as _};
use std::process::ExitCode;

use clap::Parser as _;
use tracing::warn;
use tracing_subscriber::EnvFilter;

use crate::config::{Cli, Command, LogFormat};

mod config;
mod connection;
mod gate;
mod http;
mod hub;
mod metrics;
mod quic;
mod serve;
mod socket;
mod stun;
mod tls;
mod token;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Some(Command::Token) => token::print(&cli.identity),
        None => {
            log_to_stderr(cli.serve.log_format);
            serve::run(&cli.identity, &cli.serve)
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr(format: LogFormat) {
    let wanted = std::env::var("MESHSPAN_LOG").unwrap_or_else(|_| "info".to_owned());
    let parsed = EnvFilter::try_new(&wanted);
    let unclear = parsed.is_err();
    let filter = parsed.unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    // The journal has its own clock.
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    match format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text if journal => builder.with_ansi(false).without_time().init(),
        LogFormat::Text => {
            let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            builder.with_ansi(colour).init();
        }
    }
    if unclear {
        warn!("MESHSPAN_LOG={wanted} is not a filter such as info or debug: logging at info");
    }
}
