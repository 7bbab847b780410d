//! The read model: what an agent says about itself, its servers and its peers.
//!
//! Owns the shape (`meshspan/v1`, documented field by field here, snake_case in JSON) and its tables. The event loop
//! fills it in; nothing is decided from it. Text that came from a server or a peer is made harmless when it is shown.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use self::net::NetStatus;
use self::offload::OffloadStatus;
use self::path::{NatStatus, PathStatus};
use crate::backend::BackendKind;

pub mod fill;
mod names;
pub mod net;
pub mod offload;
pub mod path;
pub mod port_mapping;
mod table;
mod why;

pub use names::NameError;
pub(crate) use table::clean;
pub use table::{Show, peer_details, peers_table};
pub(crate) use why::trip;

/// The version of this schema: fields are added, never renamed or removed, within one version.
pub const API_VERSION: &str = "meshspan/v1";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub api_version: String,
    pub node: NodeStatus,
    /// One for each entry of `discovery`, in its order.
    pub servers: Vec<ServerStatus>,
    /// Members by host name, then static peers.
    pub peers: Vec<PeerStatus>,
    /// Counters since the agent's start.
    pub counters: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// 64 hex digits.
    pub id: String,
    pub host_name: String,
    /// WireGuard public key, base64.
    pub public_key: String,
    /// `None` until one is taken.
    pub overlay_v4: Option<Ipv4Addr>,
    /// `None` while no cluster is configured.
    pub overlay_v6: Option<Ipv6Addr>,
    pub state: NodeState,
    pub cluster_id: Option<String>,
    /// 64 hex digits: the name that servers know the cluster by.
    pub namespace: Option<String>,
    pub interface: String,
    /// UDP port of WireGuard.
    pub listen_port: u16,
    /// Of the agent.
    pub version: String,
    /// Unix milliseconds.
    pub started_at_ms: u64,
    /// What keeps the node from being all right; empty when `state` is `running` or `disabled`.
    pub problems: Vec<Problem>,
    /// What carries the packets; `None` while the mesh is off.
    #[serde(default)]
    pub backend: Option<BackendStatus>,
    /// How servers see this node from outside.
    #[serde(default)]
    pub net: NetStatus,
    /// `None` while the mesh is off.
    #[serde(default)]
    pub offloads: Option<OffloadStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStatus {
    pub kind: BackendKind,
    /// Why it is not the kernel's, where that was to be tried.
    pub why_not_kernel: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// The mesh is on and all of it works.
    Running,
    /// `mesh.enabled` is false: nothing of ours is on the host.
    Disabled,
    /// The mesh is on and not all is set up yet.
    Starting,
    /// The mesh is on and something is wrong: see `problems`.
    Degraded,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub what: String,
    pub fix: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// `https://host:port`.
    pub endpoint: String,
    pub state: ServerState,
    /// What carries the session, while there is one.
    pub carrier: Option<Carrier>,
    /// Why it is not connected, or what it told.
    pub detail: String,
    /// Until the next attempt, while waiting.
    pub retry_in_ms: Option<u64>,
    /// It passes packets on between nodes.
    #[serde(default)]
    pub relays: bool,
    /// A round trip over the session, in microseconds.
    #[serde(default)]
    pub rtt_us: Option<u64>,
    /// The HTTP proxy that the session goes through, without its credentials.
    #[serde(default)]
    pub proxy: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServerState {
    Connected,
    Connecting,
    /// The last attempt failed, the next has its time.
    Waiting,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Carrier {
    Quic,
    WebSocket,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// 64 hex digits; `None` for a static peer.
    pub node_id: Option<String>,
    pub host_name: String,
    pub kind: PeerKind,
    pub state: PeerState,
    /// WireGuard public key, base64.
    pub public_key: String,
    pub overlay_v4: Option<Ipv4Addr>,
    pub overlay_v6: Option<Ipv6Addr>,
    /// Where its packets go now, unless over a relay.
    pub endpoint: Option<SocketAddr>,
    /// `None` for a static peer.
    #[serde(default)]
    pub path: Option<PathStatus>,
    /// The NATs before it, by its own word.
    #[serde(default)]
    pub nat: NatStatus,
    /// Where it says it can be reached.
    pub candidates: Vec<SocketAddr>,
    /// What it announces, and what became of it here.
    pub prefixes: Vec<PrefixStatus>,
    pub last_handshake_ms_ago: Option<u64>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    /// Since the last evidence that it lives: a handshake or a newer record.
    pub seen_ms_ago: Option<u64>,
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerKind {
    /// Runs an agent and holds the cluster secret.
    Member,
    /// A plain WireGuard device of `mesh.staticPeers`.
    Static,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// No packet wants to go there.
    Idle,
    Connecting,
    Up,
    /// Packets want to go there and no path works.
    Down,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixStatus {
    pub prefix: IpNet,
    pub state: PrefixState,
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrefixState {
    Routed,
    /// It lies in a subnet this node is connected to, which is nearer.
    LocalOverlap,
    /// Another peer announces it too and keeps it.
    OwnedByOther,
    /// It may not be announced: see `mesh.allowWidePrefixes`.
    Refused,
}

#[cfg(test)]
pub(crate) mod tests;
