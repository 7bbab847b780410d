//! Builds the agent from its configuration and runs it.

use crate::options::RunOptions;

/// Runs the agent until it is told to stop.
pub fn run(options: RunOptions) -> anyhow::Result<()> {
    anyhow::bail!("this build has no agent to run with {}", options.config_file.display())
}
