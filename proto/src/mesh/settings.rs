//! What the operator decided, as the machine needs it: validated, with files read and names resolved by the shell.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use mesh_common::config::EndpointFilter;
use mesh_common::host_name::HostName;
use mesh_common::id::NodeId;
use mesh_common::key::{PresharedKey, WgPublicKey};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub cluster_id: String,
    pub host_name: HostName,
    pub servers: Vec<ServerSettings>,
    pub link_name: String,
    /// In use: the configured one, or the one that this node moved to.
    pub listen_port: u16,
    pub mtu: u16,
    pub overlay_v4_pool: Ipv4Net,
    /// Pod CIDRs and extra prefixes that this node announces.
    pub prefixes: BTreeSet<IpNet>,
    pub advertise_node_addresses: bool,
    /// Which own addresses may be announced as candidates, and which of the peers' may be tried.
    pub endpoint_filter: EndpointFilter,
    /// Whether the router before this node is asked to lead a port here.
    pub port_mapping: bool,
    pub static_peers: Vec<StaticPeer>,
    pub deny_nodes: BTreeSet<NodeId>,
    pub allow_down_peer_bypass: bool,
    pub allow_wide_prefixes: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerSettings {
    /// Host and port, as written.
    pub name: String,
    pub proxied: bool,
}

/// A plain WireGuard device: no record, no path agent; its endpoint is the source of its last authentic packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaticPeer {
    pub name: String,
    pub public_key: WgPublicKey,
    pub endpoint: Option<SocketAddr>,
    pub allowed_ips: BTreeSet<IpNet>,
    pub preshared_key: Option<PresharedKey>,
    pub keepalive: Option<Duration>,
}
