//! What the running agent says: `status` and `peers`.

use super::exit::NeverJoined;
use super::{Global, Output, block_on, exit, print, to_json};
use crate::api::{ApiError, client};
use crate::status::{NodeState, PeerStatus, Status, peer_details, peers_table};

pub(super) fn status(global: &Global, why: bool) -> anyhow::Result<u8> {
    let status = fetch(global)?;
    print(&match global.output {
        Some(Output::Json) => to_json(&status)?,
        Some(Output::Yaml) => serde_saphyr::to_string(&status)?,
        None | Some(Output::Table | Output::Wide) if why => status.to_why(global.show()),
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
        return Err(status.unknown_name(name).into());
    }
    print(&match global.output {
        Some(Output::Json) => to_json(&peers)?,
        Some(Output::Yaml) => serde_saphyr::to_string(&peers)?,
        None | Some(Output::Table | Output::Wide) => match name {
            Some(_) => {
                peers.iter().map(|peer| peer_details(peer, &status.node, global.show())).collect::<Vec<_>>().join("\n")
            }
            None => peers_table(peers.into_iter(), global.show()) + "\n",
        },
    })
}

fn fetch(global: &Global) -> anyhow::Result<Status> {
    answered(global, block_on(client::status(&global.settings().socket))?)
}

/// What the agent answered; a machine that never joined is told so instead of being asked to start an agent.
pub(super) fn answered<T>(global: &Global, answer: Result<T, ApiError>) -> anyhow::Result<T> {
    answer.map_err(|error| match error {
        ApiError::NotRunning { .. } if !global.config.exists() => {
            NeverJoined { code: exit::NOT_RUNNING, ..global.never_joined() }.into()
        }
        error => error.into(),
    })
}
