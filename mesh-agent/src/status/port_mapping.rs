//! The router's port for this node, in words: whether one leads here, and if not, why and what would help.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use mesh_common::time::Instant;
use mesh_proto::net::port_mapping::{Doubt, MapperState, MapperView, MappingProtocol};
use serde::{Deserialize, Serialize};

use super::table::age;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMappingStatus {
    pub state: PortMappingState,
    /// Who is asked.
    pub router: Option<Ipv4Addr>,
    /// What it granted the port by.
    pub protocol: Option<PortMappingProtocol>,
    /// What peers are told.
    pub external: Option<SocketAddr>,
    /// Until it is renewed, or asked for again.
    pub next_in_ms: Option<u64>,
    /// What came of each protocol's last try with this router.
    pub tried: BTreeMap<PortMappingProtocol, String>,
    /// A sentence.
    pub detail: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortMappingState {
    /// `mesh.portMapping` is false.
    Off,
    /// No router translates this node's address.
    #[default]
    NotNeeded,
    Asking,
    /// Peers are told of it.
    Mapped,
    /// The router says so, and peers are not told of it.
    NotBelieved,
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortMappingProtocol {
    Pcp,
    NatPmp,
    Upnp,
}

impl From<MappingProtocol> for PortMappingProtocol {
    fn from(protocol: MappingProtocol) -> Self {
        match protocol {
            MappingProtocol::Pcp => Self::Pcp,
            MappingProtocol::NatPmp => Self::NatPmp,
            MappingProtocol::Upnp => Self::Upnp,
        }
    }
}

impl PortMappingStatus {
    pub(super) fn new(view: &MapperView, listen_port: u16, now: Instant) -> Self {
        let outcome = |outcome: &Result<(), _>| match outcome {
            Ok(()) => "works".to_owned(),
            Err(failure) => ToString::to_string(failure),
        };
        let (state, protocol, external) = match &view.state {
            MapperState::Off => (PortMappingState::Off, None, None),
            MapperState::NotNeeded => (PortMappingState::NotNeeded, None, None),
            MapperState::Asking => (PortMappingState::Asking, None, None),
            MapperState::Mapped { protocol, external } => (PortMappingState::Mapped, Some(*protocol), Some(*external)),
            MapperState::Doubted { protocol, .. } => (PortMappingState::NotBelieved, Some(*protocol), None),
            MapperState::Failed => (PortMappingState::Failed, None, None),
        };
        Self {
            state,
            router: view.router,
            protocol: protocol.map(Into::into),
            external,
            next_in_ms: view.next.map(|at| u64::try_from(at.since(now).as_millis()).unwrap_or(u64::MAX)),
            tried: view.tried.iter().map(|(protocol, tried)| ((*protocol).into(), outcome(tried))).collect(),
            detail: detail(view, listen_port),
        }
    }

    /// The sentence, and when something happens next.
    pub(super) fn line(&self) -> String {
        match self.next_in_ms {
            Some(ms) if self.state == PortMappingState::Failed => {
                format!("{}; tried again in {}", self.detail, age(ms))
            }
            Some(ms) if self.state == PortMappingState::Mapped => format!("{}; renewed in {}", self.detail, age(ms)),
            _ => self.detail.clone(),
        }
    }
}

fn detail(view: &MapperView, listen_port: u16) -> String {
    let router = view.router.map_or_else(|| "the router".to_owned(), |router| format!("router {router}"));
    match &view.state {
        MapperState::Off => "switched off by mesh.portMapping".to_owned(),
        MapperState::NotNeeded => "not needed: no router translates this node's address".to_owned(),
        MapperState::Asking => format!("{router} is being asked"),
        MapperState::Mapped { protocol, external } => {
            format!("{external}, which {router} leads to this node ({protocol})")
        }
        MapperState::Doubted { protocol, port, doubt } => {
            let (what, so) = match doubt {
                Doubt::Untold => (
                    format!("{router} mapped port {port} ({protocol}) and does not know its public address"),
                    "it has no connection to the Internet, or another router is before it",
                ),
                Doubt::NotPublic { told } => (
                    format!("{router} mapped port {port} of {told} ({protocol}), which is no public address"),
                    "another router or the provider's NAT is before it: map the port there too, put the router into bridge \
                     mode, or ask the provider for a public address",
                ),
                Doubt::Elsewhere { told, seen } => (
                    format!(
                        "{router} mapped port {port} of {told} ({protocol}), and discovery servers see this node at {seen}"
                    ),
                    "this node's packets leave by another way, or the router is wrong",
                ),
                Doubt::Unseen => (
                    format!(
                        "{router} mapped port {port} ({protocol}), and no discovery server says where it sees this node"
                    ),
                    "it is told to peers once one does",
                ),
            };
            format!("not told to peers: {what}; {so}")
        }
        MapperState::Failed => {
            let tried: Vec<String> = view
                .tried
                .iter()
                .filter_map(|(protocol, outcome)| Some(format!("{protocol}: {}", outcome.as_ref().err()?)))
                .collect();
            format!(
                "{router} maps no port ({}): switch PCP, NAT-PMP or UPnP on there, or forward UDP port {listen_port} to this \
                 machine",
                tried.join(", ")
            )
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use mesh_proto::net::port_mapping::MappingFailure;

    use super::*;

    fn line(state: MapperState, tried: &[(MappingProtocol, Result<(), MappingFailure>)]) -> String {
        let view = MapperView {
            state,
            router: Some(Ipv4Addr::new(192, 168, 1, 1)),
            next: Some(Instant::from_origin(std::time::Duration::from_secs(1680))),
            tried: tried.iter().cloned().collect(),
        };
        PortMappingStatus::new(&view, 51872, Instant::ORIGIN).line()
    }

    #[test]
    fn every_state_says_what_to_do() {
        let protocol = MappingProtocol::Pcp;
        assert_eq!(
            line(MapperState::Mapped { protocol, external: "203.0.113.7:51872".parse().unwrap() }, &[]),
            "203.0.113.7:51872, which router 192.168.1.1 leads to this node (PCP); renewed in 28 min"
        );
        let tried = [
            (MappingProtocol::Pcp, Err(MappingFailure::NoAnswer)),
            (MappingProtocol::NatPmp, Err(MappingFailure::NoAnswer)),
            (MappingProtocol::Upnp, Err(MappingFailure::Refused("not authorized".into()))),
        ];
        assert_eq!(
            line(MapperState::Failed, &tried),
            "router 192.168.1.1 maps no port (PCP: no answer, NAT-PMP: no answer, UPnP: refused: not authorized): switch PCP, \
             NAT-PMP or UPnP on there, or forward UDP port 51872 to this machine; tried again in 28 min"
        );
        let doubted = |doubt| line(MapperState::Doubted { protocol, port: 51872, doubt }, &[]);
        let shared = doubted(Doubt::NotPublic { told: Ipv4Addr::new(100, 64, 3, 2) });
        assert!(
            shared.contains("100.64.3.2 (PCP), which is no public address; another router or the provider"),
            "{shared}"
        );
        let foreign =
            doubted(Doubt::Elsewhere { told: Ipv4Addr::new(9, 9, 9, 9), seen: Ipv4Addr::new(203, 0, 113, 7) });
        assert!(foreign.contains("of 9.9.9.9 (PCP), and discovery servers see this node at 203.0.113.7"), "{foreign}");
    }
}
