//! From the validated configuration to what the machine needs: files read, names resolved.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use mesh_common::config::{Config, HostPort};
use mesh_common::host_name::HostName;
use mesh_proto::mesh::settings::{ServerSettings, Settings, StaticPeer};

use tokio::time::timeout;

use crate::io::session::{ServerAddress, proxy};
use crate::secrets;

/// The event loop waits for a reload: no name may hold it up for long.
const RESOLVE_LIMIT: Duration = Duration::from_secs(1);

/// Reads what the configuration points to. Fails with the key and the fix; nothing running is disturbed by that.
pub async fn load(config: &Config) -> anyhow::Result<Settings> {
    let mesh = &config.mesh;
    let cluster_id = config.cluster.id.as_ref().context("cluster.id is missing: every node of a mesh has the same")?;
    let mut static_peers = Vec::new();
    for (place, peer) in mesh.static_peers.iter().enumerate() {
        let endpoint = match &peer.endpoint {
            Some(endpoint) => resolve(endpoint, place).await,
            None => None,
        };
        let preshared_key = peer.preshared_key_file.as_deref().map(secrets::preshared_key).transpose()?;
        static_peers.push(StaticPeer {
            name: peer.name.as_ref().map_or_else(|| peer.public_key.to_string(), ToString::to_string),
            public_key: peer.public_key,
            endpoint,
            allowed_ips: peer.allowed_ips.iter().map(ipnet::IpNet::trunc).collect::<BTreeSet<_>>(),
            preshared_key,
            keepalive: peer.keepalive,
        });
    }
    Ok(Settings {
        cluster_id: cluster_id.as_str().to_owned(),
        host_name: host_name(config)?,
        servers: config
            .discovery
            .iter()
            .map(|server| ServerSettings { name: server.endpoint.authority().to_string(), proxied: server.proxied })
            .collect(),
        link_name: mesh.interface_name.as_str().to_owned(),
        listen_port: mesh.listen_port,
        mtu: mesh.mtu,
        overlay_v4_pool: mesh.overlay_v4_pool,
        prefixes: config.announced_prefixes(),
        advertise_node_addresses: mesh.advertise_node_addresses,
        endpoint_filter: mesh.filters.endpoints.clone(),
        static_peers,
        deny_nodes: mesh.deny_nodes.clone(),
        allow_down_peer_bypass: mesh.allow_down_peer_bypass,
        allow_wide_prefixes: mesh.allow_wide_prefixes,
        port_mapping: mesh.port_mapping,
    })
}

/// The servers to dial, in the order of [`Settings::servers`].
pub fn servers(config: &Config) -> Vec<ServerAddress> {
    let address = |server: &mesh_common::config::DiscoveryServer| ServerAddress {
        host: server.endpoint.host().to_owned(),
        port: server.endpoint.port(),
        pin: server.pin.0,
        proxy: config.mesh.proxy.clone().or_else(|| proxy::from_environment(server.endpoint.authority())),
    };
    config.discovery.iter().map(address).collect()
}

/// What peers see this node as: configured, else the first label of the system's host name.
pub fn host_name(config: &Config) -> anyhow::Result<HostName> {
    if let Some(name) = &config.mesh.host_name {
        return Ok(name.clone());
    }
    let system = nix::unistd::gethostname().context("cannot read this machine's host name: set mesh.hostName")?;
    let system = system.to_string_lossy();
    HostName::from_system(&system)
        .with_context(|| format!("this machine is called {system:?}, which peers cannot show: set mesh.hostName"))
}

/// A name that does not resolve now is no reason to go without a mesh: the device may speak first.
async fn resolve(endpoint: &HostPort, place: usize) -> Option<SocketAddr> {
    let lookup = tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port));
    let found = timeout(RESOLVE_LIMIT, lookup).await.ok().and_then(Result::ok).and_then(|mut found| found.next());
    if found.is_none() {
        tracing::warn!(
            "mesh.staticPeers[{place}].endpoint {endpoint} does not resolve: waiting for the device to speak first; \
             reload the agent once the name resolves"
        );
    }
    found
}
