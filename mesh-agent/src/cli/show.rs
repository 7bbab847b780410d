//! What the running agent says: `status` and `peers`.

use anyhow::bail;

use super::exit::NeverJoined;
use super::{Global, Output, block_on, exit, print, to_json};
use crate::api::{ApiError, client};
use crate::status::{NodeState, PeerStatus, Status, peer_details, peers_table};

pub(super) fn status(global: &Global) -> anyhow::Result<u8> {
    let status = fetch(global)?;
    print(&match global.output {
        Some(Output::Json) => to_json(&status)?,
        Some(Output::Yaml) => serde_saphyr::to_string(&status)?,
        None | Some(Output::Table | Output::Wide) => status.to_table(global.show()),
    })?;
    Ok(if status.node.state == NodeState::Degraded { exit::DEGRADED } else { exit::OK })
}

pub(super) fn peers(global: &Global, name: Option<&str>) -> anyhow::Result<u8> {
    let status = fetch(global)?;
    let peers: Vec<&PeerStatus> = match name {
        Some(name) => status.peers_named(name),
        None => status.peers.iter().collect(),
    };
    if let (Some(name), true) = (name, peers.is_empty()) {
        let known: Vec<&str> = status.peers.iter().map(|peer| peer.host_name.as_str()).collect();
        bail!(
            "no peer is called {name}; the peers are: {}",
            if known.is_empty() { "none".to_owned() } else { known.join(", ") }
        );
    }
    print(&match global.output {
        Some(Output::Json) => to_json(&peers)?,
        Some(Output::Yaml) => serde_saphyr::to_string(&peers)?,
        None | Some(Output::Table | Output::Wide) => match name {
            Some(_) => peers.iter().map(|peer| peer_details(peer, global.show())).collect::<Vec<_>>().join("\n"),
            None => peers_table(peers.into_iter(), global.show()) + "\n",
        },
    })
}

/// The agent's status; a machine that never joined is told so instead of being asked to start an agent.
fn fetch(global: &Global) -> anyhow::Result<Status> {
    match block_on(client::status(&global.settings().socket))? {
        Ok(status) => Ok(status),
        Err(ApiError::NotRunning { .. }) if !global.config.exists() => {
            Err(NeverJoined { code: exit::NOT_RUNNING, ..global.never_joined() }.into())
        }
        Err(error) => Err(error.into()),
    }
}
