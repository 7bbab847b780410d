//! What should be on this host: a pure function of settings, peers and the state of their paths.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use mesh_common::id::NodeId;
use mesh_common::key::{PresharedKey, WgPublicKey};

use crate::device::{Desired, Family, Link, PeerSpec, Route, RouteKind, UnderlayLink};
use crate::mesh::peer::Peer;
use crate::mesh::settings::Settings;

/// Facts that the desired state is made of.
#[derive(Debug)]
pub struct Inputs<'a> {
    pub settings: &'a Settings,
    /// Of every peer.
    pub preshared_keys: &'a BTreeMap<(WgPublicKey, NodeId), PresharedKey>,
    pub overlay_v6: Ipv6Addr,
    pub overlay_v4: Option<Ipv4Addr>,
    pub peers: &'a [Peer],
    /// Which tunnel each peer should have, see [`PeerSpec::generation`].
    pub tunnels: &'a BTreeMap<WgPublicKey, u64>,
    /// The largest packet that fits through a peer's path, where that is less than the link's.
    pub mtus: &'a BTreeMap<WgPublicKey, u16>,
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
        let endpoints = self.endpoints_v4();
        for peer in self.peers {
            let allowed_ips = peer.routed();
            let is_down = self.down.contains(&peer.key);
            let way = Way { is_down, mtu: self.mtus.get(&peer.key).copied() };
            self.add_routes(&mut routes, &allowed_ips, way, &endpoints);
            let preshared_key = self.preshared_keys.get(&(peer.key, peer.node)).cloned();
            let generation = self.tunnels.get(&peer.key).copied().unwrap_or(0);
            let spec = PeerSpec { preshared_key, allowed_ips, keepalive: None, generation };
            peers.insert(peer.key, spec);
        }
        for peer in &self.settings.static_peers {
            self.add_routes(&mut routes, &peer.allowed_ips, Way::default(), &endpoints);
            let spec = PeerSpec {
                preshared_key: peer.preshared_key.clone(),
                allowed_ips: peer.allowed_ips.clone(),
                keepalive: peer.keepalive,
                generation: 0,
            };
            peers.insert(peer.public_key, spec);
        }
        let own = [Some(IpAddr::V6(self.overlay_v6)), self.overlay_v4.map(IpAddr::V4)];
        let addresses: BTreeSet<IpNet> = own.into_iter().flatten().map(IpNet::from).collect();
        // While they are on the link the local table answers for them. When it goes, a packet that has just left the tunnel
        // would be forwarded by the default route, in clear.
        if !self.settings.allow_down_peer_bypass {
            routes.extend(addresses.iter().map(|&prefix| Route { prefix, kind: RouteKind::Unreachable }));
        }
        self.spare_connected_subnets(&mut routes);
        let link = Link {
            name: self.settings.link_name.clone(),
            mtu: self.settings.mtu,
            listen_port: self.settings.listen_port,
            addresses,
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

    fn add_routes(
        &self,
        routes: &mut BTreeSet<Route>,
        prefixes: &BTreeSet<IpNet>,
        way: Way,
        endpoints: &BTreeSet<IpAddr>,
    ) {
        for prefix in prefixes.iter().copied() {
            // Linux's reverse path filter, strict or loose, drops what comes from an address whose route is `unreachable`:
            // a peer that is down could never answer from inside such a prefix. So that one keeps its device route.
            let down = way.is_down && (self.settings.allow_down_peer_bypass || !holds_any(&prefix, endpoints));
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
                routes.insert(Route { prefix, kind: RouteKind::Dev { mtu: way.mtu, source } });
            }
        }
    }

    /// Where peers may send from. IPv6 has no reverse path filter.
    fn endpoints_v4(&self) -> BTreeSet<IpAddr> {
        let candidates = self.peers.iter().flat_map(|peer| &peer.candidates);
        candidates.map(|candidate| candidate.addr.ip()).filter(IpAddr::is_ipv4).collect()
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
        let endpoints = self.endpoints_v4();
        if !self.peers.iter().any(|peer| peer.routed().iter().any(|prefix| holds_any(prefix, &endpoints))) {
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

/// What a peer's path means for its routes.
#[derive(Debug, Clone, Copy, Default)]
struct Way {
    is_down: bool,
    mtu: Option<u16>,
}

fn holds_any(prefix: &IpNet, addrs: &BTreeSet<IpAddr>) -> bool {
    addrs.range(prefix.network()..=prefix.broadcast()).next().is_some()
}
