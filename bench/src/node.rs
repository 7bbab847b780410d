//! The node from which the mesh is looked at, number 0: its settings, its host, and the steps from records to actions.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_common::addr::{OVERLAY_V4_POOL, overlay_v6};
use mesh_common::config::EndpointFilter;
use mesh_common::host_name::HostName;
use mesh_common::id::NodeId;
use mesh_common::key::{ClusterKeys, PresharedKey, WgPublicKey};
use mesh_common::limits::{LINK_MTU, LISTEN_PORT};
use mesh_common::time::Instant;
use mesh_proto::device::{Action, Desired, MssClamp, Observed, UnderlayLink};
use mesh_proto::mesh::desired::Inputs;
use mesh_proto::mesh::members::Members;
use mesh_proto::mesh::peer::{Peer, Surroundings};
use mesh_proto::mesh::settings::{ServerSettings, Settings};

use crate::member::{CLUSTER_ID, Member, cluster_keys, frames};

/// Everything that peers and desired state are worked out from.
#[derive(Debug)]
pub struct Node {
    pub keys: ClusterKeys,
    pub members: Members,
    own: Member,
    settings: Settings,
    underlay: Vec<UnderlayLink>,
    none: BTreeSet<String>,
    /// Derived once a member, as the agent does.
    preshared_keys: RefCell<PresharedKeys>,
}

type PresharedKeys = BTreeMap<(WgPublicKey, NodeId), PresharedKey>;

impl Node {
    /// A node that has admitted the members 1 to `count` at the origin of time.
    pub fn among(count: u16) -> Self {
        let mut node = Self::alone();
        for frame in frames(count) {
            node.members.admit(frame, Instant::ORIGIN).expect("a fresh frame of a member is admitted");
        }
        node
    }

    /// A node that knows nobody.
    pub fn alone() -> Self {
        let (keys, own) = (cluster_keys(), Member::numbered(0));
        let members = Members::new(keys.clone(), CLUSTER_ID.to_owned(), own.identity.node_id(), BTreeMap::new());
        Self {
            keys,
            members,
            own,
            settings: settings(),
            underlay: underlay(),
            none: BTreeSet::new(),
            preshared_keys: RefCell::default(),
        }
    }

    pub fn peers(&self) -> Vec<Peer> {
        Surroundings {
            settings: &self.settings,
            members: &self.members,
            own: self.own.identity.node_id(),
            own_overlay_v4: None,
            own_prefixes: &BTreeMap::new(),
            underlay: &self.underlay,
            rp_filter_denied: &self.none,
            taken_sockets: BTreeSet::new(),
            now: Instant::ORIGIN,
        }
        .peers()
    }

    pub fn desired(&self, peers: &[Peer]) -> Desired {
        let own = self.own.identity.node_id();
        let mut keys = self.preshared_keys.borrow_mut();
        for peer in peers {
            keys.entry((peer.key, peer.node))
                .or_insert_with(|| self.keys.pair_psk((own, self.own.wg.public()), (peer.node, peer.key)));
        }
        Inputs {
            settings: &self.settings,
            preshared_keys: &keys,
            overlay_v6: overlay_v6(CLUSTER_ID, &own),
            overlay_v4: None,
            peers,
            tunnels: &BTreeMap::new(),
            mtus: &BTreeMap::new(),
            down: &BTreeSet::new(),
            underlay: &self.underlay,
            loosened: &self.none,
            rp_filter_denied: &self.none,
        }
        .desired()
    }
}

/// One server, the defaults, no prefixes of its own.
pub fn settings() -> Settings {
    Settings {
        cluster_id: CLUSTER_ID.to_owned(),
        host_name: HostName::try_from("node-0".to_owned()).expect("letters, a hyphen and a digit"),
        servers: vec![ServerSettings { name: "disc.example:7443".to_owned(), proxied: false }],
        link_name: "mesh0".to_owned(),
        listen_port: LISTEN_PORT,
        mtu: LINK_MTU,
        overlay_v4_pool: OVERLAY_V4_POOL,
        prefixes: BTreeSet::new(),
        advertise_node_addresses: true,
        endpoint_filter: EndpointFilter::default(),
        port_mapping: true,
        static_peers: Vec::new(),
        deny_nodes: BTreeSet::new(),
        allow_down_peer_bypass: false,
        allow_wide_prefixes: false,
    }
}

/// A host with one uplink of both families and nothing of ours.
pub fn bare_host() -> Observed {
    Observed { underlay: underlay(), ..Observed::default() }
}

/// The host after all steps towards `desired`.
pub fn settled_host(desired: &Desired) -> Observed {
    let mut host = bare_host();
    host.link = desired.link.clone();
    host.peers = desired.peers.clone();
    host.routes = desired.routes.clone();
    host.rules = desired.rules.clone();
    host.mss_clamp = MssClamp::Present;
    host
}

/// Does what the steps say. A step that the benches never see leaves the host as it is, and the agent would ask again.
pub fn carry_out(host: &mut Observed, steps: &[Action]) {
    for step in steps.iter().cloned() {
        match step {
            Action::CreateLink(link) | Action::UpdateLink(link) => host.link = Some(link),
            Action::SetPeer(key, spec) => {
                host.peers.insert(key, spec);
            }
            Action::RemovePeer(key) => {
                host.peers.remove(&key);
            }
            Action::AddRoute(route) => {
                host.routes.insert(route);
            }
            Action::RemoveRoute(route) => {
                host.routes.remove(&route);
            }
            Action::AddRule(family) => {
                host.rules.insert(family);
            }
            Action::SetMssClamp => host.mss_clamp = MssClamp::Present,
            _ => {}
        }
    }
}

fn underlay() -> Vec<UnderlayLink> {
    let v4 = Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 2, 10), 24);
    let v6 = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 10), 64);
    let addresses = vec![IpNet::from(v4), IpNet::from(v6)];
    vec![UnderlayLink { name: "eth0".to_owned(), addresses, rp_filter: 0, virtual_kind: None }]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use mesh_common::time::Instant;
    use mesh_proto::mesh::reconcile::reconcile;

    use super::*;

    #[test]
    fn every_member_is_a_peer_with_all_it_announces() {
        let node = Node::among(300);
        let peers = node.peers();
        assert_eq!(peers.len(), 300);
        let routed: BTreeSet<IpNet> = peers.iter().flat_map(Peer::routed).collect();
        let announced: BTreeSet<IpNet> = (1..=300).flat_map(|number| Member::numbered(number).routed()).collect();
        assert_eq!(routed, announced);
        assert!(peers.iter().all(|peer| peer.candidates.len() == 3));
    }

    #[test]
    fn one_changed_record_is_three_steps_and_none_is_nothing() {
        let mut node = Node::among(20);
        let host = settled_host(&node.desired(&node.peers()));
        assert_eq!(reconcile(&node.desired(&node.peers()), &host), []);
        let changed = Member::numbered(7).changed_frame(&node.keys, 2);
        node.members.admit(changed.as_bytes().clone(), Instant::ORIGIN).unwrap();
        let steps = reconcile(&node.desired(&node.peers()), &host);
        // The floor, the peer's allowed addresses, the route.
        assert!(
            matches!(steps[..], [Action::AddRoute(_), Action::SetPeer(..), Action::AddRoute(_)]),
            "{} steps: {steps:?}",
            steps.len()
        );
    }
}
