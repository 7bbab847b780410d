//! `mesh-bench soak`.
use std::process::ExitCode;

use anyhow::Result;

#[derive(Debug, Clone, clap::Args)]
pub struct Args {}

pub fn run(_args: &Args) -> Result<ExitCode> {
    Ok(ExitCode::FAILURE)
}
