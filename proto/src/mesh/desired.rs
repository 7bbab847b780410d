//! What should be on this host: a pure function of settings, peers and the state of their paths.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_common::id::NodeId;
use mesh_common::key::{ClusterKeys, WgPublicKey};

use crate::device::{Desired, Family, Link, PeerSpec, Route, RouteKind, UnderlayLink};
use crate::mesh::peer::Peer;
use crate::mesh::settings::Settings;

/// Facts that the desired state is made of.
#[derive(Debug)]
pub struct Inputs<'a> {
    pub settings: &'a Settings,
    pub keys: &'a ClusterKeys,
    pub own: (NodeId, WgPublicKey),
    pub overlay_v6: Ipv6Addr,
    pub overlay_v4: Option<Ipv4Addr>,
    pub peers: &'a [Peer],
    /// Which tunnel each peer should have, see [`PeerSpec::generation`].
    pub tunnels: &'a BTreeMap<WgPublicKey, u64>,
    /// Peers with demand and no way to reach them.
    pub down: &'a BTreeSet<WgPublicKey>,
    pub underlay: &'a [UnderlayLink],
    /// Underlay links that we loosened before: their filter shows no longer what it was.
    pub loosened: &'a BTreeSet<String>,
    pub rp_filter_denied: &'a BTreeSet<String>,
}

impl Inputs<'_> {
    pub fn desired(&self) -> Desired {
        let mut peers = BTreeMap::new();
        let mut routes = BTreeSet::new();
        for peer in self.peers {
            let allowed_ips = peer.routed();
            self.add_routes(&mut routes, &allowed_ips, self.down.contains(&peer.key));
            let preshared_key = Some(self.keys.pair_psk(self.own, (peer.node, peer.key)));
            let spec = PeerSpec {
                preshared_key,
                allowed_ips,
                keepalive: None,
                generation: self.tunnels.get(&peer.key).copied().unwrap_or(0),
            };
            peers.insert(peer.key, spec);
        }
        for peer in &self.settings.static_peers {
            self.add_routes(&mut routes, &peer.allowed_ips, false);
            let spec = PeerSpec {
                preshared_key: peer.preshared_key.clone(),
                allowed_ips: peer.allowed_ips.clone(),
                keepalive: peer.keepalive,
                generation: 0,
            };
            peers.insert(peer.public_key, spec);
        }
        self.spare_connected_subnets(&mut routes);
        let addresses = [Some(IpAddr::V6(self.overlay_v6)), self.overlay_v4.map(IpAddr::V4)];
        let link = Link {
            name: self.settings.link_name.clone(),
            mtu: self.settings.mtu,
            listen_port: self.settings.listen_port,
            addresses: addresses.into_iter().flatten().map(IpNet::from).collect(),
        };
        Desired {
            link: Some(link),
            peers,
            routes,
            rules: Family::ALL.into(),
            loose_rp_filter: self.loose_rp_filter(),
            mss_clamp: true,
        }
    }

    fn add_routes(&self, routes: &mut BTreeSet<Route>, prefixes: &BTreeSet<IpNet>, down: bool) {
        for prefix in prefixes.iter().copied() {
            if !self.settings.allow_down_peer_bypass {
                routes.insert(Route { prefix, kind: RouteKind::Unreachable });
            } else if down {
                routes.insert(Route { prefix, kind: RouteKind::Throw });
            }
            if !down {
                let source = match prefix {
                    IpNet::V4(_) => self.overlay_v4.map(IpAddr::V4),
                    IpNet::V6(_) => Some(IpAddr::V6(self.overlay_v6)),
                };
                routes.insert(Route { prefix, kind: RouteKind::Dev { mtu: None, source } });
            }
        }
    }

    /// A peer's wide prefix must not take the host's own LAN away from it.
    fn spare_connected_subnets(&self, routes: &mut BTreeSet<Route>) {
        let prefixes: BTreeSet<IpNet> = routes.iter().map(|route| route.prefix).collect();
        let connected = self.underlay.iter().flat_map(|link| &link.addresses).map(IpNet::trunc);
        let inside = |subnet: &IpNet| prefixes.iter().any(|prefix| prefix != subnet && prefix.contains(subnet));
        let spared: Vec<_> = connected.filter(|subnet| !prefixes.contains(subnet) && inside(subnet)).collect();
        routes.extend(spared.into_iter().map(|prefix| Route { prefix, kind: RouteKind::Throw }));
    }

    /// Answers of a peer whose endpoint lies inside a mesh prefix come in by the underlay, while the route back is the mesh.
    fn loose_rp_filter(&self) -> BTreeSet<String> {
        let endpoints = self.peers.iter().flat_map(|peer| &peer.candidates).map(|at| at.ip());
        let routed: Vec<IpNet> = self.peers.iter().flat_map(Peer::routed).collect();
        let is_captured = |addr: &IpAddr| addr.is_ipv4() && routed.iter().any(|prefix| prefix.contains(addr));
        if !endpoints.into_iter().any(|addr| is_captured(&addr)) {
            return BTreeSet::new();
        }
        self.underlay
            .iter()
            .filter(|link| link.rp_filter == 1 || self.loosened.contains(&link.name))
            .filter(|link| link.addresses.iter().any(|net| net.addr().is_ipv4()))
            .map(|link| link.name.clone())
            .filter(|link| !self.rp_filter_denied.contains(link))
            .collect()
    }
}
