//! This node's own place in the network: how servers see it, and how far they are.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::ServerStatus;
use super::path::Nat;
use super::port_mapping::PortMappingStatus;

/// How servers see the WireGuard port, each IP version.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStatus {
    pub v4: FamilyStatus,
    pub v6: FamilyStatus,
    /// The port of the router that leads here, IPv4.
    #[serde(default)]
    pub port_mapping: PortMappingStatus,
}

/// The answer to `netcheck`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netcheck {
    /// Every server that was asked has answered, or will not any more.
    pub is_complete: bool,
    /// UDP port of WireGuard.
    pub listen_port: u16,
    pub net: NetStatus,
    /// One for each entry of `discovery`, in its order.
    pub servers: Vec<ServerStatus>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FamilyStatus {
    pub udp: Udp,
    /// Where servers see the WireGuard port.
    pub seen_at: Vec<SocketAddr>,
    /// Whether that is another address or port than the host's own.
    pub is_translated: Option<bool>,
    pub nat: Nat,
    /// Whether this node reaches itself by its external address.
    pub hairpin: Option<bool>,
    /// Whether the external port is the host's own.
    pub keeps_port: Option<bool>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Udp {
    /// Nobody was asked, or not all is said.
    #[default]
    Unknown,
    /// A server answered.
    Ok,
    /// None of those that were asked did.
    Blocked,
}
