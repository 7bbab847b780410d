//! The configuration of one node: YAML text in, checked values out.
//!
//! Owns the keys, their defaults and what makes a configuration valid. Reads no file: text is an argument, and paths in it
//! stay paths. Refuses unknown keys, a key given twice (in either spelling, ours or the one of Talos), and any value that
//! could only fail later. An error names the place, the key and the fix, and never shows a secret.
//!
//! One file may hold several YAML documents: any number of ours, and `kind: KubeSpanConfig`. Talos names that are
//! understood: `machine.network.kubespan` and `KubeSpanConfig`, each with `enabled`, `advertiseKubernetesNetworks`,
//! `allowDownPeerBypass`, `mtu` and `filters.endpoints`, and `cluster.id` with `cluster.secret`.

mod edit;
mod error;
mod proxy;
mod read;
mod scalar;
mod tree;
mod values;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize, Serializer};

pub use edit::{EditError, set_cluster, set_enabled};
pub use error::{ConfigError, ConfigErrors, Place};
pub use proxy::ProxyUrl;
pub use values::{ClusterId, EndpointFilter, ExpectedValue, FilterEntry, HostPort, InterfaceName, Pin, ServerEndpoint};

use crate::addr::OVERLAY_V4_POOL;
use crate::host_name::HostName;
use crate::id::NodeId;
use crate::key::{ClusterSecret, WgPublicKey};
use crate::limits::{LINK_MTU, LISTEN_PORT};

/// Where the agent looks for its configuration unless told otherwise.
pub const DEFAULT_CONFIG_FILE: &str = "/etc/meshspan/config.yaml";
/// The file of the cluster secret unless configured otherwise.
pub const DEFAULT_SECRET_FILE: &str = "/etc/meshspan/cluster.secret";
pub const DEFAULT_STATE_DIR: &str = "/var/lib/meshspan";
pub const DEFAULT_SOCKET: &str = "/run/meshspan/agent.sock";

/// A valid configuration with every default filled in. Serializes to the same keys it is read from, secrets hidden.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Config {
    pub mesh: Mesh,
    pub cluster: Cluster,
    /// All of them are used at once. Never empty while the mesh is enabled, unless there are static peers.
    pub discovery: Vec<DiscoveryServer>,
    pub agent: AgentSettings,
}

impl Config {
    /// Parses and checks the text of a configuration file. Empty text is a valid configuration with the mesh off.
    pub fn parse(text: &str) -> Result<Self, ConfigErrors> {
        read::parse(text)
    }

    /// The prefixes this node announces beside its own addresses.
    pub fn announced_prefixes(&self) -> BTreeSet<IpNet> {
        let pods = self.mesh.pod_cidrs.iter().filter(|_| self.mesh.advertise_kubernetes_networks);
        pods.chain(&self.mesh.extra_prefixes).copied().collect()
    }
}

/// The section `mesh`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Mesh {
    /// The one boolean. Default false: the agent idles and owns nothing.
    pub enabled: bool,
    /// The name peers show for this node. Default: the first label of the system's host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_name: Option<HostName>,
    /// Default `mesh0`.
    pub interface_name: InterfaceName,
    /// WireGuard's UDP port. Default 51872.
    pub listen_port: u16,
    /// What carries the packets. Default auto.
    pub backend: BackendChoice,
    /// MTU of the interface, bytes, 1280 to 9000. Default 1420.
    pub mtu: u16,
    /// Pod networks behind this node. Default none.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<IpNet>,
    /// Whether `podCIDRs` are announced. Default true; Talos' `advertiseKubernetesNetworks: false` turns it off.
    pub advertise_kubernetes_networks: bool,
    /// Other networks behind this node. Default none.
    pub extra_prefixes: Vec<IpNet>,
    /// Whether the node's own addresses are announced, as /32 and /128. Default true.
    pub advertise_node_addresses: bool,
    /// The pool that overlay IPv4 addresses come from, the same on every node. Default 198.19.0.0/16.
    #[serde(rename = "overlayIPv4Pool")]
    pub overlay_v4_pool: Ipv4Net,
    /// Whether traffic to a peer that is down may leave unencrypted. Default false: it is refused.
    pub allow_down_peer_bypass: bool,
    /// Whether default routes and prefixes wider than /8 (IPv4) or /16 (IPv6) are accepted. Default false.
    pub allow_wide_prefixes: bool,
    /// Whether the router before this node is asked, by PCP, NAT-PMP or UPnP, to lead a port to it. Default true.
    pub port_mapping: bool,
    /// Whether peers may measure the tunnel to this node. Default true.
    pub speedtest: bool,
    /// Plain WireGuard devices. Default none.
    pub static_peers: Vec<StaticPeer>,
    pub filters: Filters,
    /// Members this node has nothing to do with. Default none.
    #[serde(serialize_with = "ids_as_text")]
    pub deny_nodes: BTreeSet<NodeId>,
    /// An HTTP proxy that connections to discovery servers may take. Default: what the environment names.
    ///
    /// Of the node, not of a server: what is said of servers travels in tokens, and a proxy's credentials must not.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "option_as_text")]
    pub proxy: Option<ProxyUrl>,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            enabled: false,
            host_name: None,
            interface_name: "mesh0".parse().expect("the default name is a valid one"),
            listen_port: LISTEN_PORT,
            backend: BackendChoice::default(),
            mtu: LINK_MTU,
            pod_cidrs: Vec::new(),
            advertise_kubernetes_networks: true,
            extra_prefixes: Vec::new(),
            advertise_node_addresses: true,
            overlay_v4_pool: OVERLAY_V4_POOL,
            allow_down_peer_bypass: false,
            allow_wide_prefixes: false,
            port_mapping: true,
            speedtest: true,
            static_peers: Vec::new(),
            filters: Filters::default(),
            deny_nodes: BTreeSet::new(),
            proxy: None,
        }
    }
}

/// The key `mesh.backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// The kernel's WireGuard where it can be used, else this process.
    #[default]
    Auto,
    Kernel,
    Userspace,
}

impl std::str::FromStr for BackendChoice {
    type Err = ExpectedValue;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "kernel" => Ok(Self::Kernel),
            "userspace" => Ok(Self::Userspace),
            _ => Err(ExpectedValue("auto, kernel or userspace")),
        }
    }
}

/// The section `mesh.filters`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Filters {
    /// Which own addresses are announced as endpoint candidates, and which of the peers' are tried. Default all.
    #[serde(serialize_with = "filter_as_text")]
    pub endpoints: EndpointFilter,
}

/// A plain WireGuard device that has no agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StaticPeer {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<HostName>,
    #[serde(serialize_with = "as_text")]
    pub public_key: WgPublicKey,
    /// Where its packets go first; without it the device has to speak first.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "option_as_text")]
    pub endpoint: Option<HostPort>,
    /// Never empty.
    #[serde(rename = "allowedIPs")]
    pub allowed_ips: Vec<IpNet>,
    /// A file with base64 of 32 bytes, as `wg genpsk` writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preshared_key_file: Option<PathBuf>,
    /// Default none.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "seconds_as_text")]
    pub keepalive: Option<Duration>,
}

/// The section `cluster`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Cluster {
    /// Never `None` while the mesh is enabled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<ClusterId>,
    #[serde(flatten)]
    pub secret: SecretSource,
}

/// Where the cluster secret is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum SecretSource {
    /// `cluster.secretFile`, default `/etc/meshspan/cluster.secret`: base64 of 32 bytes.
    #[serde(rename = "secretFile")]
    File(PathBuf),
    /// `cluster.secret`, the secret itself, as Talos has it.
    #[serde(rename = "secret", serialize_with = "hidden")]
    Inline(ClusterSecret),
}

impl Default for SecretSource {
    fn default() -> Self {
        Self::File(DEFAULT_SECRET_FILE.into())
    }
}

/// One entry of `discovery`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DiscoveryServer {
    pub endpoint: ServerEndpoint,
    pub pin: Pin,
    /// A proxy that ends TLS stands before the server: the proof binds to a nonce of the server instead of the TLS session.
    #[serde(default, skip_serializing_if = "is_false")]
    pub proxied: bool,
}

/// The section `agent`: what the command line can say too; there it wins.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentSettings {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Address of metrics and health. Default off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn as_text<T: ToString, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&value.to_string())
}

fn option_as_text<T: ToString, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    value.as_ref().map(ToString::to_string).serialize(serializer)
}

fn seconds_as_text<S: Serializer>(value: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(|value| format!("{}s", value.as_secs())).serialize(serializer)
}

fn ids_as_text<S: Serializer>(ids: &BTreeSet<NodeId>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ids.iter().map(ToString::to_string))
}

fn filter_as_text<S: Serializer>(filter: &EndpointFilter, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(filter.0.iter().map(ToString::to_string))
}

fn hidden<S: Serializer>(_: &ClusterSecret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("(hidden)")
}

#[cfg(test)]
mod tests;
