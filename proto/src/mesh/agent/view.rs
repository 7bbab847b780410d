//! What the machine knows, for people: a read model that is never read back.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::host_name::HostName;
use mesh_common::id::{Namespace, NodeId, ServerId};
use mesh_common::key::WgPublicKey;
use mesh_common::nat::NatClass;
use mesh_common::time::Instant;

use super::Agent;
use crate::device::{Action, Endpoint};
use crate::discovery::client::ClientState;
use crate::mesh::peer::Verdict;
use crate::net::port_mapping::MapperView;
use crate::net::report::Report;
use crate::path::agent::PathState;
use crate::path::view::PathView;
use crate::wire::session::{ErrorCode, SessionError};

/// A relay tells each second that its limit is met.
const LIMIT_SHOWN: Duration = Duration::from_secs(10);

#[derive(Debug, Clone)]
pub struct View {
    pub node: NodeId,
    pub namespace: Namespace,
    pub wg_public: WgPublicKey,
    pub overlay_v6: Ipv6Addr,
    pub overlay_v4: Option<Ipv4Addr>,
    /// Of WireGuard.
    pub listen_port: u16,
    /// Sequence number of the newest own frame that went out.
    pub published_seq: Option<u64>,
    pub servers: Vec<ServerView>,
    /// How servers see the WireGuard socket.
    pub net: Report,
    /// What came of asking the router for a port.
    pub port_mapping: MapperView,
    pub port_mapping_counters: BTreeMap<String, u64>,
    /// STUN datagrams that answered nothing we had asked, or with an address that cannot be ours.
    pub stun_rejected: u64,
    pub peers: Vec<PeerView>,
    /// Steps on the host that failed, with their reasons.
    pub failed_steps: BTreeMap<String, String>,
    pub rp_filter_denied: Vec<String>,
    /// Another agent runs with this node's identity.
    pub clone_seen: bool,
    /// Refused records by reason.
    pub rejected: BTreeMap<String, u64>,
    /// Malformed or unknown messages from servers.
    pub malformed: u64,
    /// Datagrams that looked like probes, or came through a relay, and were not believed, by reason.
    pub dropped_probes: BTreeMap<String, u64>,
}

#[derive(Debug, Clone)]
pub struct ServerView {
    pub name: String,
    pub state: ClientState,
    /// Why there is no session, or what the server refused.
    pub detail: Option<String>,
    /// It passes datagrams on between members.
    pub relays: bool,
    /// A round trip over the session.
    pub rtt: Option<Duration>,
}

#[derive(Debug, Clone)]
pub struct PeerView {
    /// `None` for a static peer.
    pub node: Option<NodeId>,
    pub name: String,
    pub key: WgPublicKey,
    pub overlay_v6: Option<Ipv6Addr>,
    pub overlay_v4: Option<Ipv4Addr>,
    /// `None` for a static peer, which has no path agent.
    pub state: Option<PathState>,
    pub endpoint: Option<Endpoint>,
    /// `None` for a static peer.
    pub path: Option<PathView>,
    /// What its record says of the NATs in front of it, IPv4 then IPv6.
    pub nat: [NatClass; 2],
    pub candidates: Vec<SocketAddr>,
    pub prefixes: Vec<(IpNet, Verdict)>,
    pub last_evidence: Option<Instant>,
}

impl Agent {
    pub fn view(&self, now: Instant) -> View {
        View {
            node: self.node_id(),
            namespace: self.keys.namespace,
            wg_public: self.wg_public,
            overlay_v6: self.overlay_v6(),
            overlay_v4: self.overlay_v4(),
            listen_port: self.settings.listen_port,
            published_seq: self.publisher.published_seq(),
            servers: self.server_views(now),
            net: self.net.report().clone(),
            port_mapping: self.mapper.view(),
            port_mapping_counters: self.mapper.counters().clone(),
            stun_rejected: self.net.rejected(),
            peers: self.member_views(now).chain(self.static_views()).collect(),
            failed_steps: self.failed.clone(),
            rp_filter_denied: self.rp_filter_denied.iter().cloned().collect(),
            clone_seen: self.clone_seen,
            rejected: self.members.rejected().iter().map(|(why, count)| (why.to_string(), *count)).collect(),
            dropped_probes: self.probing.dropped().map(|(why, count)| (why.to_string(), count)).collect(),
            malformed: self.clients.values().map(|client| client.malformed()).sum(),
        }
    }

    /// The name of a member, for logs.
    pub fn host_name_of(&self, key: &WgPublicKey) -> Option<&HostName> {
        let peer = self.peers.iter().find(|peer| peer.key == *key)?;
        self.members.get(&peer.node).map(|member| &member.record.host_name)
    }

    fn server_views(&self, now: Instant) -> Vec<ServerView> {
        let view = |(place, client): (&ServerId, &crate::discovery::client::Client)| {
            let facts = self.server_facts.get(place);
            let refused = facts.and_then(|facts| facts.refused.as_ref()).and_then(|refused| refusal(refused, now));
            ServerView {
                name: self.settings.servers[place.0].name.clone(),
                state: client.state(),
                detail: refused.or_else(|| facts.and_then(|facts| facts.lost.clone())),
                relays: client.offers_relay(),
                rtt: client.rtt(),
            }
        };
        self.clients.iter().map(view).collect()
    }

    fn member_views(&self, now: Instant) -> impl Iterator<Item = PeerView> {
        self.peers.iter().filter_map(move |peer| {
            let member = self.members.get(&peer.node)?;
            let path = self.paths.get(&peer.key);
            Some(PeerView {
                node: Some(peer.node),
                name: member.record.host_name.to_string(),
                key: peer.key,
                overlay_v6: Some(peer.overlay_v6),
                overlay_v4: peer.overlay_v4,
                state: path.map(|path| path.state(now)),
                endpoint: path.and_then(|path| path.route().primary),
                path: path.map(|path| path.view(now)),
                nat: [member.record.nat_v4, member.record.nat_v6],
                candidates: peer.candidates.iter().map(|candidate| candidate.addr).collect(),
                prefixes: peer.prefixes.clone(),
                last_evidence: Some(member.last_evidence),
            })
        })
    }

    fn static_views(&self) -> impl Iterator<Item = PeerView> {
        self.settings.static_peers.iter().map(|peer| PeerView {
            node: None,
            name: peer.name.clone(),
            key: peer.public_key,
            overlay_v6: None,
            overlay_v4: None,
            state: None,
            endpoint: self.static_routes.get(&peer.public_key).and_then(|route| route.primary),
            path: None,
            nat: [NatClass::default(); 2],
            candidates: peer.endpoint.into_iter().collect(),
            prefixes: peer.allowed_ips.iter().map(|prefix| (*prefix, Verdict::Routed)).collect(),
            last_evidence: None,
        })
    }
}

/// What a server refused, in words; a relay's limit only while it is met.
fn refusal((error, at): &(SessionError, Instant), now: Instant) -> Option<String> {
    if error.code != ErrorCode::RateLimited || !error.limit.starts_with("relay-") {
        return Some(error.to_string());
    }
    let limit = &error.limit;
    (now.since(*at) < LIMIT_SHOWN).then(|| {
        format!("this relay drops what is over its limit {limit}: send less, or raise --{limit} on the server")
    })
}

/// A step in words, without secrets.
pub(super) fn step(action: &Action) -> String {
    match action {
        Action::CreateLink(link) => format!("create interface {}", link.name),
        Action::UpdateLink(link) => format!("update interface {}", link.name),
        Action::DeleteLink { name } => format!("delete interface {name}"),
        Action::SetPeer(key, _) => format!("set peer {key}"),
        Action::RemovePeer(key) => format!("remove peer {key}"),
        Action::AddRoute(route) => format!("add route {}", route.prefix),
        Action::RemoveRoute(route) => format!("remove route {}", route.prefix),
        Action::AddRule(family) => format!("add routing rule ({})", family_name(*family)),
        Action::RemoveRule(family) => format!("remove routing rule ({})", family_name(*family)),
        Action::LoosenRpFilter { link } => format!("set rp_filter of {link} to 2"),
        Action::RestoreRpFilter { link } => format!("restore rp_filter of {link}"),
        Action::SetMssClamp => "set the MSS clamp".to_owned(),
        Action::RemoveMssClamp => "remove the MSS clamp".to_owned(),
    }
}

fn family_name(family: crate::device::Family) -> &'static str {
    match family {
        crate::device::Family::V4 => "IPv4",
        crate::device::Family::V6 => "IPv6",
    }
}
