//! `netcheck`: how this node's network looks from outside, asked anew.

use super::show::answered;
use super::{Global, Output, block_on, exit, print, to_json};
use crate::api::client;
use crate::status::net::Udp;

/// Degraded when UDP goes nowhere: then no peer elsewhere is reached directly.
pub(super) fn netcheck(global: &Global) -> anyhow::Result<u8> {
    let netcheck = answered(global, block_on(client::netcheck(&global.settings().socket))?)?;
    print(&match global.output {
        Some(Output::Json) => to_json(&netcheck)?,
        Some(Output::Yaml) => serde_saphyr::to_string(&netcheck)?,
        None | Some(Output::Table | Output::Wide) => netcheck.to_table(global.show()),
    })?;
    let udp = [netcheck.net.v4.udp, netcheck.net.v6.udp];
    let is_blocked = udp.contains(&Udp::Blocked) && !udp.contains(&Udp::Ok);
    Ok(if is_blocked { exit::DEGRADED } else { exit::OK })
}
