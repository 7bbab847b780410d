//! From what the machine and the data plane know to what a person reads.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_common::config::{Config, SecretSource};
use mesh_common::id::ServerId;
use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;
use mesh_proto::device::{Endpoint, PeerCounters};
use mesh_proto::discovery::client::ClientState;
use mesh_proto::mesh::agent::{PeerView, ServerView, View};
use mesh_proto::mesh::peer::Verdict;
use mesh_proto::net::report::FamilyReport;
use mesh_proto::path::agent::PathState;
use mesh_proto::path::candidate::RemoteKind;
use mesh_proto::path::score;
use mesh_proto::path::view::{CandidateView, PathView};

use super::net::{FamilyStatus, NetStatus, Netcheck, Udp};
use super::offload::OffloadStatus;
use super::path::{AddressKind, Nat, NatStatus, PathStatus, SwitchStatus, Tier, TriedAddress};
use super::port_mapping::PortMappingStatus;
use super::{
    API_VERSION, BackendStatus, Carrier, NodeState, NodeStatus, PeerKind, PeerState, PeerStatus, PrefixState,
    PrefixStatus, Problem, ServerState, ServerStatus, Status,
};
use crate::dataplane::{EngineStats, Offloads};
use crate::io::carriers::Carriers;
use crate::io::session::CarrierKind;
use crate::state::State;

/// How the problem begins that a node has with all its servers.
pub const NO_SERVER: &str = "no discovery server is connected";

/// What the status of a running node is made of.
#[expect(missing_debug_implementations, reason = "it holds a closure and lives for one call")]
pub struct Facts<'a> {
    pub config: &'a Config,
    pub view: &'a View,
    pub carriers: &'a Carriers,
    pub counters: &'a dyn Fn(&WgPublicKey) -> PeerCounters,
    pub engine: &'a EngineStats,
    pub backend: &'a BackendStatus,
    /// Why the kernel's WireGuard did not take what it was last told.
    pub backend_problem: Option<&'a str>,
    /// `None` where the kernel's WireGuard carries the packets.
    pub offloads: Option<Offloads>,
    pub host_name: &'a str,
    pub started_at_ms: u64,
    pub is_ready: bool,
    pub host_problem: Option<&'a str>,
    pub is_state_dir_failing: bool,
    pub now: Instant,
}

pub fn running(facts: &Facts<'_>) -> Status {
    let view = facts.view;
    let problems = problems(facts);
    let state = match (facts.is_ready, problems.is_empty()) {
        (false, true) => NodeState::Starting,
        (true, true) => NodeState::Running,
        (_, false) => NodeState::Degraded,
    };
    let mut peers: Vec<PeerStatus> = view.peers.iter().map(|peer| peer_status(peer, facts)).collect();
    peers.sort_by(|a, b| (a.kind as u8, &a.host_name, &a.node_id).cmp(&(b.kind as u8, &b.host_name, &b.node_id)));
    Status {
        api_version: API_VERSION.to_owned(),
        node: NodeStatus {
            id: view.node.to_string(),
            host_name: facts.host_name.to_owned(),
            public_key: view.wg_public.to_string(),
            overlay_v4: view.overlay_v4,
            overlay_v6: Some(view.overlay_v6),
            listen_port: view.listen_port,
            state,
            namespace: Some(view.namespace.to_string()),
            problems,
            backend: Some(facts.backend.clone()),
            net: net(facts),
            offloads: facts.offloads.map(offloads),
            ..node(facts.config, facts.started_at_ms)
        },
        servers: servers(facts),
        peers,
        counters: counters(facts),
    }
}

/// How the network looks from here; complete when no answer is awaited any more.
pub fn netcheck(facts: &Facts<'_>, is_complete: bool) -> Netcheck {
    Netcheck { is_complete, listen_port: facts.view.listen_port, net: net(facts), servers: servers(facts) }
}

/// The mesh is off.
pub fn disabled(config: &Config, host_name: &str, state: &State, started_at_ms: u64) -> Status {
    Status {
        api_version: API_VERSION.to_owned(),
        node: NodeStatus {
            id: state.identity().node_id().to_string(),
            host_name: host_name.to_owned(),
            public_key: state.wg().public().to_string(),
            ..node(config, started_at_ms)
        },
        servers: Vec::new(),
        peers: Vec::new(),
        counters: BTreeMap::new(),
    }
}

/// What the configuration says of a node.
fn node(config: &Config, started_at_ms: u64) -> NodeStatus {
    NodeStatus {
        id: String::new(),
        host_name: String::new(),
        public_key: String::new(),
        overlay_v4: None,
        overlay_v6: None,
        state: NodeState::Disabled,
        cluster_id: config.cluster.id.as_ref().map(|id| id.as_str().to_owned()),
        namespace: None,
        interface: config.mesh.interface_name.as_str().to_owned(),
        listen_port: config.mesh.listen_port,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started_at_ms,
        problems: Vec::new(),
        backend: None,
        net: NetStatus::default(),
        offloads: None,
    }
}

fn offloads(granted: Offloads) -> OffloadStatus {
    OffloadStatus {
        tun_tcp: granted.device.tcp,
        tun_udp: granted.device.udp,
        udp_send: granted.socket.segmentation,
        udp_receive: granted.socket.receive,
    }
}

fn net(facts: &Facts<'_>) -> NetStatus {
    let view = facts.view;
    let family = |report: &FamilyReport| FamilyStatus {
        udp: match (report.reflexive.is_empty(), report.udp_blocked) {
            (_, true) => Udp::Blocked,
            (false, false) => Udp::Ok,
            (true, false) => Udp::Unknown,
        },
        seen_at: report.reflexive.clone(),
        is_translated: report.is_translated,
        nat: report.nat.into(),
        hairpin: report.hairpin,
        keeps_port: report.keeps_port,
    };
    NetStatus {
        v4: family(&view.net.v4),
        v6: family(&view.net.v6),
        port_mapping: PortMappingStatus::new(&view.port_mapping, view.listen_port, facts.now),
    }
}

fn servers(facts: &Facts<'_>) -> Vec<ServerStatus> {
    let servers = facts.view.servers.iter().enumerate();
    servers.map(|(place, server)| server_status(server, ServerId(place), facts)).collect()
}

fn problems(facts: &Facts<'_>) -> Vec<Problem> {
    let view = facts.view;
    let problem = |what: String, fix: &str| Problem { what, fix: fix.to_owned() };
    let mut problems = Vec::new();
    let is_connected = |server: &ServerView| matches!(server.state, ClientState::Syncing | ClientState::Live);
    if facts.is_ready && !view.servers.is_empty() && !view.servers.iter().any(is_connected) {
        let why = view.servers.iter().find_map(|server| server.detail.clone()).unwrap_or_default();
        problems.push(problem(
            format!("{NO_SERVER}: {why}"),
            "known peers keep working; new ones are found when a server is back",
        ));
    }
    if view.clone_seen {
        problems.push(problem(
            "another agent runs with this node's identity".to_owned(),
            "give every machine its own state directory: stop one agent, empty its state directory, start it",
        ));
    }
    for (step, error) in &view.failed_steps {
        problems.push(problem(format!("cannot {step}: {error}"), "the agent tries again by itself"));
    }
    for link in &view.rp_filter_denied {
        problems.push(problem(
            format!("strict reverse path filter on {link}: prefixes that hold a peer's endpoint are not routed"),
            &format!("sysctl -w net.ipv4.conf.{link}.rp_filter=2"),
        ));
    }
    if let Some(text) = facts.backend_problem {
        problems.push(problem(format!("the kernel's WireGuard: {text}"), "the agent tries again by itself"));
    }
    if let Some(text) = facts.host_problem {
        problems.push(problem(text.to_owned(), "the agent tries again by itself"));
    }
    if facts.is_state_dir_failing {
        problems.push(problem(
            "the state directory cannot be written".to_owned(),
            "free space or make it writable; the node goes on from memory until it restarts",
        ));
    }
    problems
}

fn server_status(server: &ServerView, id: ServerId, facts: &Facts<'_>) -> ServerStatus {
    let (state, retry_in) = match server.state {
        ClientState::Syncing | ClientState::Live => (ServerState::Connected, None),
        ClientState::Dialing | ClientState::Proving => (ServerState::Connecting, None),
        ClientState::Waiting { until } => (ServerState::Waiting, Some(until.since(facts.now))),
        ClientState::Stopped => (ServerState::Waiting, None),
    };
    let is_connected = state == ServerState::Connected;
    let carrier = facts.carriers.kind(id).filter(|_| is_connected).map(|kind| match kind {
        CarrierKind::Quic => Carrier::Quic,
        CarrierKind::WebSocket => Carrier::WebSocket,
    });
    ServerStatus {
        endpoint: format!("https://{}", server.name),
        state,
        carrier,
        detail: server.detail.clone().or_else(|| lonely(server, facts)).unwrap_or_default(),
        retry_in_ms: retry_in.map(millis),
        relays: server.relays,
        rtt_us: server.rtt.map(micros),
        proxy: facts.carriers.proxy(id).filter(|_| is_connected).map(ToString::to_string),
    }
}

/// A wrong secret is another cluster, where nobody is: to servers and to this node that is nothing unusual.
fn lonely(server: &ServerView, facts: &Facts<'_>) -> Option<String> {
    let is_alone = server.state == ClientState::Live && facts.view.peers.iter().all(|peer| peer.node.is_none());
    let secret = match &facts.config.cluster.secret {
        SecretSource::File(file) => file.display().to_string(),
        SecretSource::Inline(_) => "cluster.secret".to_owned(),
    };
    is_alone.then(|| {
        format!(
            "no other node with this cluster secret is there: if there should be, copy {secret} anew from one of them"
        )
    })
}

fn peer_status(peer: &PeerView, facts: &Facts<'_>) -> PeerStatus {
    let counters = (facts.counters)(&peer.key);
    let ago = |at: Instant| millis(facts.now.since(at));
    let (state, detail) = match peer.state {
        Some(PathState::Idle) => (PeerState::Idle, String::new()),
        Some(PathState::Connecting { .. }) => (PeerState::Connecting, "waiting for an answer".to_owned()),
        Some(PathState::Up { .. }) => (PeerState::Up, String::new()),
        Some(PathState::Down { since }) => {
            let seconds = facts.now.since(since).as_secs();
            (PeerState::Down, format!("none of {} endpoints answers for {seconds} s", peer.candidates.len()))
        }
        None if counters.last_handshake.is_some_and(|at| facts.now.since(at) < Duration::from_secs(180)) => {
            (PeerState::Up, String::new())
        }
        None => (PeerState::Idle, String::new()),
    };
    PeerStatus {
        node_id: peer.node.map(|node| node.to_string()),
        host_name: peer.name.clone(),
        kind: if peer.node.is_some() { PeerKind::Member } else { PeerKind::Static },
        state,
        public_key: peer.key.to_string(),
        overlay_v4: peer.overlay_v4,
        overlay_v6: peer.overlay_v6,
        endpoint: peer.endpoint.and_then(Endpoint::direct),
        path: peer.path.as_ref().map(|path| path_status(path, facts)),
        nat: NatStatus { v4: Nat::from(peer.nat[0]), v6: Nat::from(peer.nat[1]) },
        candidates: peer.candidates.clone(),
        prefixes: peer.prefixes.iter().map(|(prefix, verdict)| prefix_status(*prefix, verdict)).collect(),
        last_handshake_ms_ago: counters.last_handshake.map(ago),
        rx_bytes: counters.rx_bytes,
        tx_bytes: counters.tx_bytes,
        seen_ms_ago: peer.last_evidence.map(ago),
        detail,
    }
}

fn path_status(path: &PathView, facts: &Facts<'_>) -> PathStatus {
    let name = |endpoint: Endpoint| endpoint_name(endpoint, facts.view);
    PathStatus {
        tier: path.tier.map(|tier| match tier {
            score::Tier::Lan => Tier::Lan,
            score::Tier::Host | score::Tier::Translated => Tier::Direct,
            score::Tier::Relay => Tier::Relay,
        }),
        relay: path.endpoint.filter(|endpoint| endpoint.is_relay()).map(name),
        second: path.second.map(name),
        rtt_us: path.rtt.map(micros),
        mtu: path.mtu,
        why_not_direct: path.why_not_direct.clone(),
        next_retry_in_ms: path.next_retry.map(|at| millis(at.since(facts.now))),
        last_switch: path.last_switch.as_ref().map(|switch| SwitchStatus {
            ms_ago: millis(facts.now.since(switch.at)),
            from: switch.from.map(name),
            to: switch.to.map(name),
            reason: switch.reason.clone(),
        }),
        switches: path.switches,
        probes_sent: path.probes_sent,
        probes_received: path.probes_received,
        time_to_first_byte_ms: path.time_to_first_byte.map(millis),
        time_to_direct_ms: path.time_to_direct.map(millis),
        tried: path.candidates.iter().filter_map(tried).collect(),
    }
}

/// An address, or the server of a relay by its URL.
pub fn endpoint_name(endpoint: Endpoint, view: &View) -> String {
    match endpoint {
        Endpoint::Relay(ServerId(place)) => {
            view.servers.get(place).map_or_else(|| endpoint.to_string(), |server| format!("https://{}", server.name))
        }
        direct => direct.to_string(),
    }
}

fn tried(candidate: &CandidateView) -> Option<TriedAddress> {
    let kind = match candidate.kind {
        RemoteKind::Host => AddressKind::Host,
        RemoteKind::Static => AddressKind::Static,
        RemoteKind::Mapped => AddressKind::Mapped,
        RemoteKind::Reflexive => AddressKind::Reflexive,
        RemoteKind::PeerReflexive => AddressKind::PeerReflexive,
        RemoteKind::Relay => return None,
    };
    Some(TriedAddress {
        address: candidate.endpoint.direct()?,
        kind,
        rtt_us: candidate.rtt.map(micros),
        last: candidate.last.clone(),
        failures: candidate.failures,
    })
}

fn prefix_status(prefix: ipnet::IpNet, verdict: &Verdict) -> PrefixStatus {
    let (state, detail) = match verdict {
        Verdict::Routed => (PrefixState::Routed, String::new()),
        Verdict::LocalOverlap { subnet, link } => {
            (PrefixState::LocalOverlap, format!("this node reaches {subnet} on {link} without the mesh"))
        }
        Verdict::OwnedBy(node) => (PrefixState::OwnedByOther, format!("node {} announced it first", node.short())),
        Verdict::Refused(refusal) => (PrefixState::Refused, refusal.to_string()),
        Verdict::OverlaySpace => (PrefixState::Refused, "it lies in the overlay's own addresses".to_owned()),
        Verdict::RpFilter { link } => {
            (PrefixState::Refused, format!("set net.ipv4.conf.{link}.rp_filter = 2 on this node"))
        }
    };
    PrefixStatus { prefix, state, detail }
}

/// Names are stable: `drop_*` for packets, `record_refused: *` for records, `probe_*` and `relayed_*` for probes and what came
/// through relays.
fn counters(facts: &Facts<'_>) -> BTreeMap<String, u64> {
    let drops = facts.engine.drops.iter().map(|(name, count)| (format!("drop_{name}"), *count));
    let refused = facts.view.rejected.iter().map(|(why, count)| (format!("record_refused: {why}"), *count));
    let probes = facts.view.dropped_probes.iter().map(|(why, count)| (why.clone(), *count));
    let malformed = ("session_messages_malformed".to_owned(), facts.view.malformed);
    let stun = ("stun_rejected".to_owned(), facts.view.stun_rejected);
    let mapping = facts.view.port_mapping_counters.clone();
    drops.chain(refused).chain(probes).chain(mapping).chain([malformed, stun]).collect()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
