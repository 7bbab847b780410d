//! Who is where: a core that routes public addresses, and networks behind routers, one in another.
//!
//! A datagram climbs from its sender's network to the first one that knows its destination ([`Internet::send`]); when it
//! has travelled it descends to a machine ([`Internet::arrive`]). Routers translate and filter at the moment it passes
//! them, and each takes one off its TTL: one that expires leaves no trace where it did not arrive.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use mesh_common::time::Instant;

use crate::nat::Nat;

/// TTL of a datagram unless its sender sets another.
pub const DEFAULT_TTL: u8 = 64;

/// A network: its machines see each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetworkId(usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouterId(usize);

impl NetworkId {
    /// Where public addresses are.
    pub const CORE: Self = Self(0);

    pub fn number(self) -> usize {
        self.0
    }
}

impl RouterId {
    pub fn number(self) -> usize {
        self.0
    }
}

/// Who has an address in a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Host(usize),
    Server(usize),
    Router(RouterId),
}

/// A datagram in the network that knows its destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flight {
    pub network: NetworkId,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    ttl: u8,
}

/// A datagram at a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    pub node: Node,
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

#[derive(Debug)]
pub struct Internet {
    networks: Vec<Network>,
    routers: Vec<Router>,
    /// Routers between any two networks at the core.
    core_hops: u8,
}

#[derive(Debug, Default)]
struct Network {
    gateway: Option<RouterId>,
    nodes: BTreeMap<IpAddr, Node>,
}

#[derive(Debug)]
struct Router {
    nat: Nat,
    outer: NetworkId,
    inner: Vec<NetworkId>,
}

impl Internet {
    pub fn new(core_hops: u8) -> Self {
        Self { networks: vec![Network::default()], routers: Vec::new(), core_hops }
    }

    /// A router with its outer address in this network.
    pub fn add_router(&mut self, outer: NetworkId, nat: Nat) -> RouterId {
        let id = RouterId(self.routers.len());
        self.networks[outer.0].nodes.insert(nat.outer().into(), Node::Router(id));
        self.routers.push(Router { nat, outer, inner: Vec::new() });
        id
    }

    /// A network behind a router. Two of them behind one do not see each other.
    pub fn add_network(&mut self, gateway: RouterId) -> NetworkId {
        let id = NetworkId(self.networks.len());
        self.networks.push(Network { gateway: Some(gateway), nodes: BTreeMap::new() });
        self.routers[gateway.0].inner.push(id);
        id
    }

    /// A machine's address in a network; IPv6 is routed to it from everywhere.
    pub fn attach(&mut self, network: NetworkId, addr: IpAddr, node: Node) {
        self.networks[network.0].nodes.insert(addr, node);
        if addr.is_ipv6()
            && let Some(gateway) = self.networks[network.0].gateway
        {
            self.attach(self.routers[gateway.0].outer, addr, Node::Router(gateway));
        }
    }

    /// Takes an address away, and the route to it.
    pub fn detach(&mut self, network: NetworkId, addr: IpAddr) {
        self.networks[network.0].nodes.remove(&addr);
        if addr.is_ipv6()
            && let Some(gateway) = self.networks[network.0].gateway
        {
            self.detach(self.routers[gateway.0].outer, addr);
        }
    }

    pub fn nat(&self, router: RouterId) -> &Nat {
        &self.routers[router.0].nat
    }

    pub fn nat_mut(&mut self, router: RouterId) -> &mut Nat {
        &mut self.routers[router.0].nat
    }

    /// The router forgets its flows and moves to this address.
    pub fn rebind(&mut self, router: RouterId, outer: Ipv4Addr) {
        let Router { nat, outer: network, .. } = &mut self.routers[router.0];
        let nodes = &mut self.networks[network.0].nodes;
        nodes.remove(&nat.outer().into());
        nat.rebind(outer);
        nodes.insert(outer.into(), Node::Router(router));
    }

    /// The routers between a network and the core, from the inside.
    pub fn routers_before(&self, network: NetworkId) -> Vec<RouterId> {
        let gateway = |network: NetworkId| self.networks[network.0].gateway;
        let outwards = |router: &RouterId| gateway(self.routers[router.0].outer);
        std::iter::successors(gateway(network), outwards).collect()
    }

    /// Who has this address at the core.
    pub fn at_core(&self, addr: IpAddr) -> Option<Node> {
        self.networks[NetworkId::CORE.0].nodes.get(&addr).copied()
    }

    /// A machine in this network sends. `None` = the datagram is lost.
    pub fn send(
        &mut self,
        mut network: NetworkId,
        mut source: SocketAddr,
        destination: SocketAddr,
        mut ttl: u8,
        now: Instant,
    ) -> Option<Flight> {
        loop {
            if self.networks[network.0].nodes.contains_key(&destination.ip()) {
                break;
            }
            let router = &mut self.routers[self.networks[network.0].gateway?.0];
            ttl = forwarded(ttl, 1)?;
            if destination.ip() == IpAddr::V4(router.nat.outer()) {
                let (source, destination) = router.nat.hairpin(source, destination, now)?;
                let inside = router.inner.iter().copied();
                let network = inside_with(&self.networks, inside, destination.ip())?;
                return Some(Flight { network, source, destination, ttl });
            }
            source = router.nat.outbound(source, destination, now)?;
            network = router.outer;
        }
        if network == NetworkId::CORE {
            ttl = forwarded(ttl, self.core_hops)?;
        }
        Some(Flight { network, source, destination, ttl })
    }

    /// The datagram has travelled. `None` = nobody gets it.
    pub fn arrive(&mut self, flight: Flight, now: Instant) -> Option<Arrival> {
        let Flight { mut network, source, mut destination, mut ttl } = flight;
        loop {
            let node = *self.networks[network.0].nodes.get(&destination.ip())?;
            let Node::Router(router) = node else {
                return Some(Arrival { node, source, destination });
            };
            let router = &mut self.routers[router.0];
            destination = router.nat.inbound(source, destination, now)?;
            ttl = forwarded(ttl, 1)?;
            let inside = router.inner.iter().copied();
            network = inside_with(&self.networks, inside, destination.ip())?;
        }
    }
}

/// The TTL after this many routers, if it lasts.
fn forwarded(ttl: u8, routers: u8) -> Option<u8> {
    ttl.checked_sub(routers).filter(|ttl| *ttl > 0)
}

fn inside_with(networks: &[Network], mut inside: impl Iterator<Item = NetworkId>, addr: IpAddr) -> Option<NetworkId> {
    inside.find(|network| networks[network.0].nodes.contains_key(&addr))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::nat::{NatKind, NatPlan, PortChoice};

    const SERVER: &str = "203.0.113.1:3478";
    const NOW: Instant = Instant::ORIGIN;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn nat(outer: &str, hairpins: bool) -> Nat {
        let kind = NatKind::all().find(|kind| kind.name() == "eim-apdf").unwrap();
        let plan = NatPlan {
            kind,
            ports: PortChoice::Random,
            expiry: Duration::from_secs(60),
            inbound_refreshes: false,
            hairpins,
            renumbers_after_knock: false,
        };
        Nat::new(plan, outer.parse().unwrap(), 5)
    }

    /// A server at the core, a carrier's NAT, two homes behind it with one host each, numbered alike.
    fn carrier(hairpins: bool) -> (Internet, [NetworkId; 2]) {
        let mut internet = Internet::new(3);
        internet.attach(NetworkId::CORE, ip("203.0.113.1"), Node::Server(0));
        let carrier = internet.add_router(NetworkId::CORE, nat("198.51.100.1", hairpins));
        let access = internet.add_network(carrier);
        let homes = [0, 1].map(|home| {
            let outer = format!("100.64.0.{}", home + 2);
            let router = internet.add_router(access, nat(&outer, false));
            let lan = internet.add_network(router);
            internet.attach(lan, ip("192.168.1.5"), Node::Host(home));
            lan
        });
        (internet, homes)
    }

    /// Sends from one home and gives what arrives.
    fn pass(internet: &mut Internet, network: NetworkId, to: SocketAddr, ttl: u8) -> Option<Arrival> {
        let flight = internet.send(network, addr("192.168.1.5:51872"), to, ttl, NOW)?;
        internet.arrive(flight, NOW)
    }

    #[test]
    fn two_nats_in_a_row_translate_both_ways() {
        let (mut internet, [home, _]) = carrier(false);
        let seen = pass(&mut internet, home, addr(SERVER), DEFAULT_TTL).unwrap();
        assert_eq!((seen.node, seen.source.ip()), (Node::Server(0), ip("198.51.100.1")));
        let answer = internet.send(NetworkId::CORE, addr(SERVER), seen.source, DEFAULT_TTL, NOW).unwrap();
        let back = internet.arrive(answer, NOW).unwrap();
        assert_eq!(back, Arrival { node: Node::Host(0), source: addr(SERVER), destination: addr("192.168.1.5:51872") });
        let stranger = internet.send(NetworkId::CORE, addr("203.0.113.1:9"), seen.source, DEFAULT_TTL, NOW).unwrap();
        assert_eq!(internet.arrive(stranger, NOW), None);
    }

    #[test]
    fn a_shared_nat_turns_datagrams_round_only_where_it_hairpins() {
        for hairpins in [false, true] {
            let (mut internet, homes) = carrier(hairpins);
            let outer = homes.map(|home| pass(&mut internet, home, addr(SERVER), DEFAULT_TTL).unwrap().source);
            let first = pass(&mut internet, homes[0], outer[1], DEFAULT_TTL);
            let second = pass(&mut internet, homes[1], outer[0], DEFAULT_TTL);
            assert_eq!(first, None, "the other home's filter is not open yet");
            assert_eq!(
                second.map(|arrival| (arrival.node, arrival.source)),
                hairpins.then_some((Node::Host(0), outer[1]))
            );
        }
    }

    #[test]
    fn a_low_ttl_opens_the_nats_it_passes_and_reaches_nobody() {
        let (mut internet, [home, other]) = carrier(true);
        assert_eq!(pass(&mut internet, home, addr(SERVER), 3), None);
        let arrives = |ttl| pass(&mut carrier(true).0, other, addr(SERVER), ttl).is_some();
        assert!(!arrives(5) && arrives(6), "two NATs and three routers of the core");
    }

    #[test]
    fn ipv6_is_routed_to_where_it_is_attached_and_no_longer_after() {
        let (mut internet, [home, _]) = carrier(false);
        let host = ip("2001:db8:1::5");
        internet.attach(home, host, Node::Host(0));
        let server = addr("[2001:db8:ffff::1]:3478");
        internet.attach(NetworkId::CORE, server.ip(), Node::Server(0));
        let mine = SocketAddr::new(host, 51872);
        let flight = internet.send(home, mine, server, DEFAULT_TTL, NOW).unwrap();
        assert_eq!(internet.arrive(flight, NOW).unwrap().source, mine);
        let answer = internet.send(NetworkId::CORE, server, mine, DEFAULT_TTL, NOW).unwrap();
        assert_eq!(internet.arrive(answer, NOW).unwrap().node, Node::Host(0));
        internet.detach(home, host);
        assert_eq!(internet.send(NetworkId::CORE, server, mine, DEFAULT_TTL, NOW), None);
    }

    #[test]
    fn a_rebound_router_is_found_at_its_new_address_only() {
        let (mut internet, [home, _]) = carrier(false);
        let carrier = *internet.routers_before(home).last().unwrap();
        internet.rebind(carrier, "198.51.100.99".parse().unwrap());
        assert_eq!(internet.at_core(ip("198.51.100.1")), None);
        let seen = pass(&mut internet, home, addr(SERVER), DEFAULT_TTL).unwrap();
        assert_eq!(seen.source.ip(), ip("198.51.100.99"));
    }
}
