//! What every program of the lab does around its work: find the binaries, enter namespaces, say how it ended.

use std::process::ExitCode;

use anyhow::{Result, anyhow};

use crate::{
    binaries::{BIN_DIR, Binaries},
    isolation,
};

/// Works, and gives success where that says that all is well. An error is printed and a failure.
pub fn run(work: impl FnOnce() -> Result<bool>) -> ExitCode {
    match work() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Finds the binaries under test and makes this process one that can make namespaces and TUN devices, or says why `what`
/// cannot run here and what helps.
///
/// Must be called before the program starts a thread: it may replace the process by itself inside a user namespace.
pub fn enter(what: &str) -> Result<Binaries> {
    let binaries = Binaries::find()?;
    isolation::tun_available()
        .and_then(|()| isolation::enter_program(&[(BIN_DIR, binaries.dir())]))
        .map_err(|why| anyhow!("{what} cannot run here: {why}\nhelp: {}", why.help()))?;
    Ok(binaries)
}
