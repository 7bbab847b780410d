//! The one boolean from the command line: `up`, `down`, `leave`, and what is left to remove when no agent runs.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mesh_common::config::set_enabled;

use super::config_file::{self, InvalidConfig};
use super::exit::NotRemoved;
use super::{Global, block_on, print};
use crate::api::{ApiError, client};
use crate::status::NodeState;
use crate::{device, state};

/// How long the agent may take to remove everything.
const DOWN_TIMEOUT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(100);

pub(super) fn up(global: &Global) -> anyhow::Result<u8> {
    let changed = write_enabled(global, true)?;
    let said = if changed { "mesh.enabled is true now" } else { "mesh.enabled is true already" };
    match block_on(client::reload(&global.settings().socket))? {
        Ok(()) => print(&format!("{said}, the agent applied it\n")),
        Err(ApiError::NotRunning { .. }) => {
            print(&format!("{said}; no agent is running, it applies when one starts\n"))
        }
        Err(error) => Err(error).with_context(|| format!("{said}, but the agent did not apply it")),
    }
}

pub(super) fn down(global: &Global) -> anyhow::Result<u8> {
    let changed = write_enabled(global, false)?;
    let said = if changed { "mesh.enabled is false now" } else { "mesh.enabled is false already" };
    match block_on(turn_off(&global.settings().socket))? {
        Ok(()) => print(&format!("{said}, the agent removed everything it owned\n")),
        Err(error) if is_not_running(&error) => {
            print(&format!("{said}; no agent is running (`mesh-agent cleanup` removes what a stopped one left)\n"))
        }
        Err(error) => Err(error).with_context(|| format!("{said}, but the agent did not apply it")),
    }
}

pub(super) fn leave(global: &Global) -> anyhow::Result<u8> {
    let socket = global.settings().socket;
    // Read first: once the members are told, the boolean has to follow.
    let read = config_file::read(&global.config)?.ok_or_else(|| global.never_joined())?;
    set_enabled(&read.text, false)?;
    block_on(client::leave(&socket))?.context("leaving needs the running agent, which tells the members")?;
    write_enabled(global, false)?;
    block_on(turn_off(&socket))?
        .context("the members know and mesh.enabled is false, but the agent did not apply it")?;
    print("this node left: the members know, mesh.enabled is false, and nothing is left on the host\n")
}

pub(super) fn cleanup(global: &Global) -> anyhow::Result<u8> {
    // The state directory decides whose leftovers are removed: no guess where the configuration cannot be read.
    let config = config_file::read(&global.config)?.map(|read| read.config).unwrap_or_default();
    let settings = global.options().settings(&config);
    match block_on(client::status(&settings.socket))? {
        Err(ApiError::NotRunning { .. }) => {}
        Err(error @ ApiError::Permission { .. }) => return Err(error.into()),
        _ => bail!("an agent is running on {}: use `mesh-agent down`, or stop it first", settings.socket.display()),
    }
    // An agent that is starting, or has another socket, does not answer. Where none ever ran there is no directory.
    let _lock = match settings.state_dir.is_dir() {
        true => Some(state::lock(&settings.state_dir).context("cleanup is for root, and for an agent that stopped")?),
        false => None,
    };
    let report = block_on(device::cleanup(&settings.state_dir))??;
    for removed in &report.removed {
        print(&format!("removed {removed}\n"))?;
    }
    // No agent answers on it: one that was killed left it.
    match std::fs::remove_file(&settings.socket) {
        Ok(()) => print(&format!("removed socket {}\n", settings.socket.display())).map(drop)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => bail!("cannot remove {}: {error}", settings.socket.display()),
    }
    if !report.failed.is_empty() {
        return Err(NotRemoved(report.failed).into());
    }
    print("nothing of the mesh is left on this host\n")
}

/// Sets the boolean in the configuration file; whether that changed anything.
fn write_enabled(global: &Global, enabled: bool) -> anyhow::Result<bool> {
    let read = config_file::read(&global.config)?.ok_or_else(|| global.never_joined())?;
    let edited = set_enabled(&read.text, enabled).map_err(|error| match error {
        mesh_common::config::EditError::Invalid(errors) => {
            anyhow::Error::new(InvalidConfig { file: global.config.clone(), errors })
        }
        by_hand => anyhow::Error::new(by_hand).context(global.config.display().to_string()),
    })?;
    if edited == read.text {
        return Ok(false);
    }
    config_file::write(&global.config, &edited)?;
    Ok(true)
}

/// Has the agent read the configuration and waits until it owns nothing any more.
async fn turn_off(socket: &Path) -> anyhow::Result<()> {
    client::reload(socket).await?;
    let deadline = Instant::now() + DOWN_TIMEOUT;
    loop {
        let state = client::status(socket).await?.node.state;
        if state == NodeState::Disabled {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("it is still {state:?} after {} seconds: see its log", DOWN_TIMEOUT.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
}

fn is_not_running(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ApiError::NotRunning { .. }))
}
