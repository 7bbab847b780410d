//! From the tree to a checked [`Config`]: every key in either spelling, then what only the whole can show.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net};

use super::error::{ConfigError, ConfigErrors, Place};
use super::scalar::{Reader, Section, Setting};
use super::tree::{Node, Value, parse as parse_tree};
use super::values::{ExpectedValue, parse_keepalive};
use super::{
    AgentSettings, BackendChoice, ClusterId, Config, DiscoveryServer, EndpointFilter, FilterEntry, InterfaceName,
    LogFormat, Mesh, ProxyUrl, SecretSource, StaticPeer,
};
use crate::addr::check_prefix;
use crate::host_name::HostName;
use crate::id::NodeId;
use crate::key::{ClusterSecret, WgPublicKey};
use crate::limits::MAX_PREFIXES;

const TOP: &[&str] = &["mesh", "cluster", "discovery", "agent", "machine"];
const MESH: &[&str] = &[
    "enabled",
    "hostName",
    "interfaceName",
    "listenPort",
    "backend",
    "mtu",
    "podCIDRs",
    "advertiseKubernetesNetworks",
    "extraPrefixes",
    "advertiseNodeAddresses",
    "overlayIPv4Pool",
    "allowDownPeerBypass",
    "allowWidePrefixes",
    "portMapping",
    "speedtest",
    "staticPeers",
    "filters",
    "denyNodes",
    "proxy",
];
const STATIC_PEER: &[&str] = &["name", "publicKey", "endpoint", "allowedIPs", "presharedKeyFile", "keepalive"];
const CLUSTER: &[&str] = &["id", "secretFile", "secret"];
const DISCOVERY: &[&str] = &["endpoint", "pin", "proxied"];
const AGENT: &[&str] = &["stateDir", "socket", "http", "logFormat"];
const KUBESPAN: &[&str] = &["enabled", "advertiseKubernetesNetworks", "allowDownPeerBypass", "mtu", "filters"];
const KUBESPAN_DOCUMENT: &[&str] =
    &["apiVersion", "kind", "enabled", "advertiseKubernetesNetworks", "allowDownPeerBypass", "mtu", "filters"];

pub(super) fn parse(text: &str) -> Result<Config, ConfigErrors> {
    let documents = parse_tree(text).map_err(|error| ConfigErrors(vec![error]))?;
    let mut reader = Reader { text, errors: Vec::new() };
    let mut draft = Draft::default();
    for document in &documents {
        draft.document(&mut reader, document);
    }
    let config = draft.finish(&mut reader);
    let mut errors = reader.errors;
    errors.sort_by_key(|error| error.place().map_or((1, None), |place| (0, Some(place))));
    if errors.is_empty() { Ok(config) } else { Err(ConfigErrors(errors)) }
}

/// What the documents said so far.
#[derive(Default)]
struct Draft {
    enabled: Option<Setting<bool>>,
    host_name: Option<Setting<HostName>>,
    interface_name: Option<Setting<InterfaceName>>,
    listen_port: Option<Setting<u16>>,
    backend: Option<Setting<BackendChoice>>,
    mtu: Option<Setting<u16>>,
    pod_cidrs: Option<Setting<Vec<IpNet>>>,
    advertise_kubernetes_networks: Option<Setting<bool>>,
    extra_prefixes: Option<Setting<Vec<IpNet>>>,
    advertise_node_addresses: Option<Setting<bool>>,
    overlay_v4_pool: Option<Setting<Ipv4Net>>,
    allow_down_peer_bypass: Option<Setting<bool>>,
    allow_wide_prefixes: Option<Setting<bool>>,
    port_mapping: Option<Setting<bool>>,
    speedtest: Option<Setting<bool>>,
    static_peers: Option<Setting<Vec<StaticPeer>>>,
    endpoint_filter: Option<Setting<Vec<FilterEntry>>>,
    deny_nodes: Option<Setting<Vec<NodeId>>>,
    proxy: Option<Setting<ProxyUrl>>,
    cluster_id: Option<Setting<ClusterId>>,
    secret: Option<Setting<SecretSource>>,
    discovery: Option<Setting<Vec<DiscoveryServer>>>,
    state_dir: Option<Setting<PathBuf>>,
    socket: Option<Setting<PathBuf>>,
    http: Option<Setting<SocketAddr>>,
    log_format: Option<Setting<LogFormat>>,
    /// Prefixes still to be judged: whether wide ones are allowed may be said later.
    prefixes: Vec<(IpNet, String, Place)>,
}

impl Draft {
    fn document(&mut self, reader: &mut Reader<'_>, document: &Node) {
        let is_kind = |(key, _): &(Node, Node)| matches!(&key.value, Value::Text(name) if name == "kind");
        if matches!(&document.value, Value::Section(entries) if entries.iter().any(is_kind)) {
            let section = reader.section(document, "", KUBESPAN_DOCUMENT);
            reader.text(&section, "kind", |kind| match kind {
                "KubeSpanConfig" => Ok(()),
                _ => Err("the only kind of document understood here is KubeSpanConfig: remove this document"),
            });
            reader.text(&section, "apiVersion", |version| match version {
                "v1alpha1" => Ok(()),
                _ => Err("it must be v1alpha1"),
            });
            self.kubespan(reader, &section);
            return;
        }
        let top = reader.section(document, "", TOP);
        if let Some(mesh) = reader.subsection(&top, "mesh", MESH) {
            self.kubespan(reader, &mesh);
            self.mesh(reader, &mesh);
        }
        if let Some(cluster) = reader.subsection(&top, "cluster", CLUSTER) {
            set(reader, |r| r.text(&cluster, "id", str::parse::<ClusterId>), &mut self.cluster_id);
            let file = |r: &mut Reader<'_>| r.text(&cluster, "secretFile", absolute_path).map(to(SecretSource::File));
            set(reader, file, &mut self.secret);
            let inline =
                |r: &mut Reader<'_>| r.text(&cluster, "secret", ClusterSecret::parse).map(to(SecretSource::Inline));
            set(reader, inline, &mut self.secret);
        }
        if let Some(node) = top.get("discovery") {
            let servers = discovery(reader, node);
            let setting = Setting { value: servers, key: "discovery".to_owned(), place: node.place };
            set(reader, |_| Some(setting), &mut self.discovery);
        }
        if let Some(agent) = reader.subsection(&top, "agent", AGENT) {
            set(reader, |r| r.text(&agent, "stateDir", absolute_path), &mut self.state_dir);
            set(reader, |r| r.text(&agent, "socket", absolute_path), &mut self.socket);
            let addr = |text: &str| text.parse().map_err(|_| ExpectedValue("address:port such as 127.0.0.1:9586"));
            set(reader, |r| r.text(&agent, "http", addr), &mut self.http);
            let format = |text: &str| match text {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err(ExpectedValue("text or json")),
            };
            set(reader, |r| r.text(&agent, "logFormat", format), &mut self.log_format);
        }
        if let Some(machine) = reader.subsection(&top, "machine", &["network"])
            && let Some(network) = reader.subsection(&machine, "network", &["kubespan"])
            && let Some(kubespan) = reader.subsection(&network, "kubespan", KUBESPAN)
        {
            self.kubespan(reader, &kubespan);
        }
    }

    /// The keys that Talos has too.
    fn kubespan(&mut self, reader: &mut Reader<'_>, section: &Section<'_>) {
        set(reader, |r| r.boolean(section, "enabled"), &mut self.enabled);
        let networks = |r: &mut Reader<'_>| r.boolean(section, "advertiseKubernetesNetworks");
        set(reader, networks, &mut self.advertise_kubernetes_networks);
        set(reader, |r| r.boolean(section, "allowDownPeerBypass"), &mut self.allow_down_peer_bypass);
        set(reader, |r| r.integer(section, "mtu", 1280..=9000), &mut self.mtu);
        if let Some(filters) = reader.subsection(section, "filters", &["endpoints"]) {
            set(reader, |r| r.list(&filters, "endpoints", str::parse::<FilterEntry>), &mut self.endpoint_filter);
        }
    }

    fn mesh(&mut self, reader: &mut Reader<'_>, mesh: &Section<'_>) {
        let host_name = |text: &str| HostName::try_from(text.to_owned());
        set(reader, |r| r.text(mesh, "hostName", host_name), &mut self.host_name);
        set(reader, |r| r.text(mesh, "interfaceName", str::parse::<InterfaceName>), &mut self.interface_name);
        set(reader, |r| r.integer(mesh, "listenPort", 1..=u16::MAX), &mut self.listen_port);
        set(reader, |r| r.text(mesh, "backend", str::parse::<BackendChoice>), &mut self.backend);
        for (key, slot) in [("podCIDRs", &mut self.pod_cidrs), ("extraPrefixes", &mut self.extra_prefixes)] {
            set(reader, |r| r.list(mesh, key, parse_prefix), slot);
            if let Some(setting) = slot {
                let entry = |prefix: &IpNet| (*prefix, setting.key.clone(), setting.place);
                self.prefixes.extend(setting.value.iter().map(entry));
            }
        }
        set(reader, |r| r.boolean(mesh, "advertiseNodeAddresses"), &mut self.advertise_node_addresses);
        set(reader, |r| r.text(mesh, "overlayIPv4Pool", parse_pool), &mut self.overlay_v4_pool);
        set(reader, |r| r.boolean(mesh, "allowWidePrefixes"), &mut self.allow_wide_prefixes);
        set(reader, |r| r.boolean(mesh, "portMapping"), &mut self.port_mapping);
        set(reader, |r| r.boolean(mesh, "speedtest"), &mut self.speedtest);
        set(reader, |r| r.list(mesh, "denyNodes", str::parse::<NodeId>), &mut self.deny_nodes);
        set(reader, |r| r.text(mesh, "proxy", str::parse::<ProxyUrl>), &mut self.proxy);
        if let Some(node) = mesh.get("staticPeers") {
            let key = mesh.path_of("staticPeers");
            let value = self.static_peers(reader, node, &key);
            set(reader, |_| Some(Setting { value, key, place: node.place }), &mut self.static_peers);
        }
    }

    fn static_peers(&mut self, reader: &mut Reader<'_>, node: &Node, path: &str) -> Vec<StaticPeer> {
        let mut peers = Vec::new();
        let mut keys = BTreeSet::new();
        let mut prefixes = BTreeSet::new();
        for (n, item) in reader.items(node, path).iter().enumerate() {
            let peer = reader.section(item, &format!("{path}[{n}]"), STATIC_PEER);
            let name = reader.text(&peer, "name", |text| HostName::try_from(text.to_owned()));
            let public_key = reader.text(&peer, "publicKey", |text| {
                let key = WgPublicKey::parse(text).ok_or("it must be base64 of 32 bytes, as `wg pubkey` prints it")?;
                if keys.insert(key) { Ok(key) } else { Err("another static peer has this key: give each its own") }
            });
            let endpoint = reader.text(&peer, "endpoint", str::parse);
            let allowed_ips = reader.list(&peer, "allowedIPs", parse_prefix);
            let preshared_key_file = reader.text(&peer, "presharedKeyFile", absolute_path);
            let keepalive = reader.text(&peer, "keepalive", parse_keepalive);
            for prefix in allowed_ips.iter().flat_map(|setting| &setting.value) {
                let key = peer.path_of("allowedIPs");
                if !prefixes.insert(*prefix) {
                    reader.bad(item, &key, &format!("{prefix} is given twice: a prefix belongs to one peer"));
                }
                self.prefixes.push((*prefix, key, item.place));
            }
            if peer.get("publicKey").is_none() {
                let fix = "give the device's WireGuard public key".to_owned();
                reader.errors.push(ConfigError::Missing { key: peer.path_of("publicKey"), fix });
            }
            let allowed_ips = allowed_ips.map(|setting| setting.value).unwrap_or_default();
            if allowed_ips.is_empty() && peer.get("allowedIPs").is_none_or(|node| reader.items(node, "").is_empty()) {
                let fix = "list the addresses that are behind this peer".to_owned();
                reader.errors.push(ConfigError::Missing { key: peer.path_of("allowedIPs"), fix });
            }
            if let Some(public_key) = public_key {
                peers.push(StaticPeer {
                    name: name.map(value),
                    public_key: public_key.value,
                    endpoint: endpoint.map(value),
                    allowed_ips,
                    preshared_key_file: preshared_key_file.map(value),
                    keepalive: keepalive.and_then(value),
                });
            }
        }
        peers
    }

    /// Fills in defaults and checks what only the whole shows.
    fn finish(self, reader: &mut Reader<'_>) -> Config {
        let allow_wide = self.allow_wide_prefixes.map(value).unwrap_or_default();
        for (prefix, key, place) in self.prefixes {
            if let Err(refusal) = check_prefix(prefix, allow_wide) {
                let value = prefix.to_string();
                let fix = match refusal {
                    crate::addr::PrefixRefusal::Unroutable => format!("{refusal}: remove it"),
                    _ => format!("{refusal}: write a narrower prefix, or set mesh.allowWidePrefixes: true"),
                };
                reader.errors.push(ConfigError::BadValue { place, key, value, fix });
            }
        }
        let defaults = Mesh::default();
        let mesh = Mesh {
            enabled: self.enabled.map_or(defaults.enabled, value),
            host_name: self.host_name.map(value),
            interface_name: self.interface_name.map_or(defaults.interface_name, value),
            listen_port: self.listen_port.map_or(defaults.listen_port, value),
            backend: self.backend.map_or(defaults.backend, value),
            mtu: self.mtu.map_or(defaults.mtu, value),
            advertise_kubernetes_networks: self
                .advertise_kubernetes_networks
                .map_or(defaults.advertise_kubernetes_networks, value),
            pod_cidrs: distinct(reader, self.pod_cidrs),
            extra_prefixes: distinct(reader, self.extra_prefixes),
            advertise_node_addresses: self.advertise_node_addresses.map_or(defaults.advertise_node_addresses, value),
            overlay_v4_pool: self.overlay_v4_pool.map_or(defaults.overlay_v4_pool, value),
            allow_down_peer_bypass: self.allow_down_peer_bypass.map_or(defaults.allow_down_peer_bypass, value),
            allow_wide_prefixes: allow_wide,
            port_mapping: self.port_mapping.map_or(defaults.port_mapping, value),
            speedtest: self.speedtest.map_or(defaults.speedtest, value),
            static_peers: self.static_peers.map(value).unwrap_or_default(),
            filters: super::Filters { endpoints: EndpointFilter(self.endpoint_filter.map(value).unwrap_or_default()) },
            deny_nodes: self.deny_nodes.map(value).unwrap_or_default().into_iter().collect(),
            proxy: self.proxy.map(value),
        };
        let discovery = self.discovery.map(value).unwrap_or_default();
        if mesh.enabled && discovery.is_empty() && mesh.static_peers.is_empty() {
            let fix = "run `mesh-agent init` or `mesh-agent join`, or give mesh.staticPeers".to_owned();
            missing(reader, "discovery", fix);
        }
        if mesh.enabled && self.cluster_id.is_none() {
            missing(reader, "cluster.id", "give the name of the cluster, the same on every node".to_owned());
        }
        Config {
            mesh,
            cluster: super::Cluster {
                id: self.cluster_id.map(value),
                secret: self.secret.map(value).unwrap_or_default(),
            },
            discovery,
            agent: AgentSettings {
                state_dir: self.state_dir.map(value),
                socket: self.socket.map(value),
                http: self.http.map(value),
                log_format: self.log_format.map(value),
            },
        }
    }
}

fn discovery(reader: &mut Reader<'_>, node: &Node) -> Vec<DiscoveryServer> {
    let mut servers = Vec::new();
    let mut endpoints = BTreeSet::new();
    for (n, item) in reader.items(node, "discovery").iter().enumerate() {
        let entry = reader.section(item, &format!("discovery[{n}]"), DISCOVERY);
        let endpoint = reader.text(&entry, "endpoint", |text| {
            let endpoint: super::ServerEndpoint = text.parse().map_err(|error: ExpectedValue| error.to_string())?;
            match endpoints.insert(endpoint.clone()) {
                true => Ok(endpoint),
                false => Err("this server is listed already: remove one entry".to_owned()),
            }
        });
        let pin = reader.text(&entry, "pin", str::parse);
        let proxied = reader.boolean(&entry, "proxied").is_some_and(value);
        for (key, fix) in [
            ("endpoint", "give the server's address, https://host:port"),
            ("pin", "give the pin that the discovery server printed, sha256:…"),
        ] {
            if matches!(item.value, Value::Section(_) | Value::Null) && entry.get(key).is_none() {
                missing(reader, &entry.path_of(key), fix.to_owned());
            }
        }
        if let (Some(endpoint), Some(pin)) = (endpoint, pin) {
            servers.push(DiscoveryServer { endpoint: endpoint.value, pin: pin.value, proxied });
        }
    }
    servers
}

/// Puts a setting into its slot; one that is there already is reported with both places.
fn set<'t, T>(
    reader: &mut Reader<'t>,
    read: impl FnOnce(&mut Reader<'t>) -> Option<Setting<T>>,
    slot: &mut Option<Setting<T>>,
) {
    let Some(setting) = read(reader) else { return };
    match slot {
        None => *slot = Some(setting),
        Some(first) => reader.errors.push(ConfigError::Twice {
            place: setting.place,
            key: setting.key,
            first: first.place,
            first_key: first.key.clone(),
        }),
    }
}

fn missing(reader: &mut Reader<'_>, key: &str, fix: String) {
    reader.errors.push(ConfigError::Missing { key: key.to_owned(), fix });
}

/// A list of prefixes without repetition, in the order given, and not longer than a record can hold.
fn distinct(reader: &mut Reader<'_>, setting: Option<Setting<Vec<IpNet>>>) -> Vec<IpNet> {
    let Some(Setting { value, key, place }) = setting else {
        return Vec::new();
    };
    if value.len() > MAX_PREFIXES {
        let (value, fix) =
            (format!("{} prefixes", value.len()), format!("a node announces at most {MAX_PREFIXES}: merge some"));
        reader.errors.push(ConfigError::BadValue { place, key, value, fix });
    }
    let mut seen = BTreeSet::new();
    value.into_iter().filter(|prefix| seen.insert(*prefix)).collect()
}

fn value<T>(setting: Setting<T>) -> T {
    setting.value
}

fn to<T, U>(wrap: impl FnOnce(T) -> U) -> impl FnOnce(Setting<T>) -> Setting<U> {
    |setting| Setting { value: wrap(setting.value), key: setting.key, place: setting.place }
}

fn absolute_path(text: &str) -> Result<PathBuf, ExpectedValue> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(ExpectedValue("an absolute path (it starts with /)")) }
}

/// A prefix without host bits; a bare address is its own /32 or /128.
fn parse_prefix(text: &str) -> Result<IpNet, String> {
    let prefix = match (text.parse::<IpNet>(), text.parse::<IpAddr>()) {
        (Ok(prefix), _) => prefix,
        (_, Ok(addr)) => addr.into(),
        _ => return Err(ExpectedValue("a CIDR such as 10.244.1.0/24 or fd00:1::/64").to_string()),
    };
    if prefix.trunc() == prefix {
        Ok(prefix)
    } else {
        Err(format!("it has bits set behind its length: write {}", prefix.trunc()))
    }
}

fn parse_pool(text: &str) -> Result<Ipv4Net, ExpectedValue> {
    const EXPECTED: ExpectedValue = ExpectedValue("an IPv4 CIDR from /8 to /24 such as 198.19.0.0/16");
    let pool: Ipv4Net = text.parse().map_err(|_| EXPECTED)?;
    let usable = (8..=24).contains(&pool.prefix_len()) && pool.trunc() == pool;
    if usable && check_prefix(pool.into(), false).is_ok() { Ok(pool) } else { Err(EXPECTED) }
}
