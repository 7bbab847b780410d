//! What the operator decided, as the machine needs it: validated, with files read and names resolved by the shell.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use mesh_common::host_name::HostName;
use mesh_common::id::NodeId;
use mesh_common::key::{PresharedKey, WgPublicKey};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub cluster_id: String,
    pub host_name: HostName,
    pub servers: Vec<ServerSettings>,
    pub link_name: String,
    pub listen_port: u16,
    pub mtu: u16,
    pub overlay_v4_pool: Ipv4Net,
    /// Pod CIDRs and extra prefixes that this node announces.
    pub prefixes: BTreeSet<IpNet>,
    pub advertise_node_addresses: bool,
    /// Which own addresses may be announced as candidates.
    pub endpoint_filter: EndpointFilter,
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

/// Rules in order: the last whose prefix holds the address decides. An address that none holds is allowed unless the list
/// says what is allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointFilter(pub Vec<FilterRule>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilterRule {
    pub prefix: IpNet,
    pub allow: bool,
}

impl EndpointFilter {
    pub fn allows(&self, addr: IpAddr) -> bool {
        let decisive = self.0.iter().rev().find(|rule| rule.prefix.contains(&addr));
        decisive.map_or_else(|| !self.0.iter().any(|rule| rule.allow), |rule| rule.allow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(rules: &[&str]) -> EndpointFilter {
        let parse = |rule: &&str| match rule.strip_prefix('!') {
            Some(prefix) => FilterRule {
                prefix: prefix.parse().unwrap(),
                allow: false,
            },
            None => FilterRule {
                prefix: rule.parse().unwrap(),
                allow: true,
            },
        };
        EndpointFilter(rules.iter().map(parse).collect())
    }

    #[test]
    fn the_last_rule_that_holds_an_address_decides() {
        let allows = |rules: &[&str], addr: &str| filter(rules).allows(addr.parse().unwrap());
        assert!(allows(&[], "192.0.2.1"));
        assert!(allows(&["0.0.0.0/0", "!192.168.0.0/16"], "192.0.2.1"));
        assert!(!allows(&["0.0.0.0/0", "!192.168.0.0/16"], "192.168.1.1"));
        assert!(
            !allows(&["0.0.0.0/0"], "2001:db8::1"),
            "an allow list allows nothing else"
        );
        assert!(
            allows(&["!192.168.0.0/16"], "192.0.2.1"),
            "a deny list denies nothing else"
        );
    }
}
