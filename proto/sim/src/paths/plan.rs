//! A run from a seed: two hosts or three behind NATs of a given class, servers, weather, and what goes wrong.
//!
//! Seeds take turns over all pairs of classes, and over troubled and calm runs: a range of seeds is spread evenly.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::addr::OVERLAY_V4_POOL;
use mesh_common::config::EndpointFilter;
use mesh_common::host_name::HostName;
use mesh_common::key::{ClusterKeys, ClusterSecret, SignKey, WgSecret};
use mesh_common::limits::{LINK_MTU, LISTEN_PORT};
use mesh_proto::device::UnderlayLink;
use mesh_proto::mesh::settings::{ServerSettings, Settings};
use mesh_proto::path::agent::PathPolicy;
use mesh_proto::random::SplitMix64;

use crate::host::HostPlan;
use crate::internet::{Internet, NetworkId, Node, RouterId};
use crate::link::Weather;
use crate::nat::{Dependence, Nat, NatKind, NatPlan, PortChoice};
use crate::oracle::{Hop, Side};
use crate::paths::port_mapping::PlannedMapper;

/// Ports of every server's STUN.
pub const STUN_PORTS: [u16; 2] = [3478, 3479];
/// A stream of 200 packets a second from the first packet on.
pub const BUSY: Duration = Duration::from_secs(7);
/// After a fault is over, traffic goes on for this long.
pub const AFTER_FAULT: Duration = Duration::from_secs(16);
const UNIX_MS: u64 = 1_800_000_000_000;

#[derive(Debug)]
pub struct Plan {
    /// What the routers of the first two hosts are together.
    pub classes: [NatKind; 2],
    /// Something expires, is lost, or an uplink is swapped.
    pub is_troubled: bool,
    pub internet: Internet,
    pub hosts: Vec<PlannedHost>,
    pub servers: Vec<PlannedServer>,
    /// Who talks to whom.
    pub pairs: Vec<(usize, usize)>,
    pub weather: Weather,
    /// Routers that lead ports on request; none unless a test puts some there.
    pub mappers: Vec<PlannedMapper>,
    /// The first packet of each pair.
    pub demand_at: Duration,
    pub fault: Option<(Duration, Fault)>,
    /// The last packet before the pairs fall silent.
    pub quiet_at: Duration,
    /// They talk again.
    pub resume_at: Option<Duration>,
}

#[derive(Debug)]
pub struct PlannedHost {
    pub plan: HostPlan,
    pub starts: Duration,
    /// Where it is, and where it is after its uplink was swapped.
    pub uplinks: [Uplink; 2],
    /// Its carriers deliver relayed datagrams in order and without loss, as those over TCP do.
    pub relays_in_order: bool,
}

/// An uplink of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    pub network: NetworkId,
    pub addresses: Vec<IpNet>,
}

impl Uplink {
    /// The address that datagrams to this destination leave from.
    pub fn source(&self, destination: IpAddr) -> Option<IpAddr> {
        let mut addresses = self.addresses.iter().map(IpNet::addr);
        addresses.find(|addr| addr.is_ipv4() == destination.is_ipv4())
    }

    /// The host's link to it.
    pub fn link(&self) -> UnderlayLink {
        UnderlayLink { name: "eth0".into(), addresses: self.addresses.clone(), rp_filter: 0, virtual_kind: None }
    }

    /// What the oracle has to know of it.
    pub fn side(&self, internet: &Internet) -> Side {
        let internal = self.source(Ipv4Addr::UNSPECIFIED.into()).map(|addr| SocketAddr::new(addr, LISTEN_PORT));
        let hop = |router: RouterId| {
            let nat = internet.nat(router);
            Hop {
                router: router.number(),
                kind: nat.plan().kind,
                is_forwarded: internal.is_some_and(|internal| nat.forwards_to(internal)),
                hairpins: nat.plan().hairpins,
                blocks_udp: nat.blocks_udp(),
                renumbers: nat.plan().renumbers_after_knock,
            }
        };
        Side {
            network: self.network.number(),
            routers: internet.routers_before(self.network).into_iter().map(hop).collect(),
            has_v6: self.addresses.iter().any(|net| net.addr().is_ipv6()),
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct PlannedServer {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    /// STUN answers from here as well.
    pub alternate: Option<Ipv4Addr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The host is somewhere else from now on.
    Swap {
        host: usize,
    },
    Suspend {
        host: usize,
        lasts: Duration,
    },
    /// The router next to the core forgets everything and gets another address.
    Rebind {
        host: usize,
    },
    /// Datagrams between the first pair are lost, or those of the first host only.
    Block {
        both_ways: bool,
        lasts: Duration,
    },
    /// All servers at once.
    RelayRestart {
        lasts: Duration,
    },
    /// The host's router passes no UDP from now on.
    UdpBlocked {
        host: usize,
    },
}

impl Fault {
    pub fn lasts(&self) -> Duration {
        match self {
            Self::Suspend { lasts, .. } | Self::Block { lasts, .. } | Self::RelayRestart { lasts } => *lasts,
            Self::Swap { .. } | Self::Rebind { .. } | Self::UdpBlocked { .. } => Duration::ZERO,
        }
    }
}

/// All unordered pairs of classes.
pub fn class_pairs() -> Vec<[NatKind; 2]> {
    let kinds: Vec<NatKind> = NatKind::all().collect();
    kinds
        .iter()
        .flat_map(|left| kinds.iter().filter(move |right| left <= *right).map(|right| [*left, *right]))
        .collect()
}

impl Plan {
    pub fn new(seed: u64) -> Self {
        let pairs = class_pairs();
        let count = pairs.len() as u64;
        let classes = pairs[(seed % count) as usize];
        let is_troubled = (seed / count).is_multiple_of(2);
        let random = SplitMix64::new(seed ^ 0x7061_7468_7300_0000);
        Draft::new(random, classes, is_troubled).finish()
    }
}

/// A plan while it is drawn.
struct Draft {
    random: SplitMix64,
    classes: [NatKind; 2],
    is_troubled: bool,
    internet: Internet,
    /// NATs forget soon, and the pairs fall silent for longer.
    expires: bool,
    has_loss: bool,
    swaps: bool,
    routers: u8,
    /// Networks whose router, of whatever kind, leads a port to its one host.
    forwarding: BTreeSet<NetworkId>,
}

impl Draft {
    fn new(mut random: SplitMix64, classes: [NatKind; 2], is_troubled: bool) -> Self {
        // Bit by bit: expiry, loss, swap; a troubled run has at least one.
        let troubles = if is_troubled { 1 + random.below(7) } else { 0 };
        Self {
            internet: Internet::new(1 + random.below(8) as u8),
            random,
            classes,
            is_troubled,
            expires: troubles & 1 != 0,
            has_loss: troubles & 2 != 0,
            swaps: troubles & 4 != 0,
            routers: 0,
            forwarding: BTreeSet::new(),
        }
    }

    fn finish(mut self) -> Plan {
        let servers: Vec<PlannedServer> =
            (0..if self.one_in(4) { 2 } else { 1 }).map(|index| self.server(index)).collect();
        let secret = ClusterSecret::from_bytes(self.bytes32()).derive();
        let v6 = self.random.below(10);
        let has_v6 = [v6 < 2, v6 == 0 || v6 == 2];
        let networks = self.networks();
        // Where there is no router nothing expires.
        self.has_loss |= self.expires && networks == [NetworkId::CORE; 2];
        let mut hosts: Vec<PlannedHost> = (0..2)
            .map(|index| self.host(index, networks[index], has_v6[index], servers.len(), secret.clone()))
            .collect();
        let mut pairs = vec![(0, 1)];
        if networks[0] != NetworkId::CORE && self.one_in(12) {
            // A neighbour with the same port behind the same routers.
            let third = self.host(2, networks[0], has_v6[0], servers.len(), secret);
            hosts.push(third);
            pairs.push((2, 1));
        }
        self.block_udp(&networks);
        let fault = self.fault(&hosts);
        let last_start = hosts.iter().map(|host| host.starts).max().unwrap_or_default();
        let demand_at = last_start + self.millis(3000, 5000);
        let fault = fault.map(|fault| (demand_at + self.millis(8000, 9500), fault));
        let quiet_at = match &fault {
            Some((at, fault)) => *at + fault.lasts() + AFTER_FAULT,
            None => demand_at + Duration::from_secs(10),
        };
        let silence = self.millis(62_000, 75_000);
        let resumes = self.expires || self.one_in(8);
        let weather = Weather {
            delay: (Duration::from_millis(2), self.millis(10, 60)),
            jitter: self.millis(0, 8),
            loss: if self.has_loss { (10, 10 + self.random.below(50)) } else { (0, 0) },
            duplicated: self.random.below(10),
            reordered: self.random.below(20),
        };
        Plan {
            classes: self.classes,
            is_troubled: self.is_troubled,
            internet: self.internet,
            hosts,
            servers,
            pairs,
            weather,
            mappers: Vec::new(),
            demand_at,
            fault,
            quiet_at,
            resume_at: resumes.then(|| quiet_at + silence),
        }
    }

    fn server(&mut self, index: u8) -> PlannedServer {
        let v4 = |last| Ipv4Addr::new(203, 0, 113, last);
        let server = PlannedServer {
            v4: v4(10 + index),
            v6: Ipv6Addr::new(0x2001, 0xdb8, 0xffff, u16::from(index), 0, 0, 0, 1),
            alternate: self.one_in(2).then_some(v4(20 + index)),
        };
        let addresses = [Some(IpAddr::V4(server.v4)), Some(server.v6.into()), server.alternate.map(IpAddr::V4)];
        for addr in addresses.into_iter().flatten() {
            self.internet.attach(NetworkId::CORE, addr, Node::Server(usize::from(index)));
        }
        server
    }

    /// Where the first two hosts are: behind routers that are together of their class, sometimes shared ones.
    fn networks(&mut self) -> [NetworkId; 2] {
        let [left, right] = self.classes;
        if left == right && self.one_in(2) {
            return match self.random.below(3) {
                0 => {
                    let network = self.behind(&[left]);
                    [network; 2]
                }
                1 => {
                    // Two networks of one router that do not see each other.
                    let network = self.behind(&[left]);
                    let router = self.internet.routers_before(network)[0];
                    [network, self.internet.add_network(router)]
                }
                _ => {
                    let [inner, carrier] = self.two_routers(left);
                    let access = self.behind(&[carrier]);
                    [0, 1].map(|_| self.router_in(access, inner, false))
                }
            };
        }
        [left, right].map(|class| self.network_of(class))
    }

    fn network_of(&mut self, class: NatKind) -> NetworkId {
        if class == NatKind::OPEN {
            match self.random.below(3) {
                0 => return NetworkId::CORE,
                1 => {
                    let kind = self.any_kind();
                    let network = self.behind(&[kind]);
                    self.forwarding.insert(network);
                    return network;
                }
                _ => {}
            }
        }
        if class.name() == "apdm-apdf" && self.one_in(3) {
            // Not strict by itself, but careless: whoever knocks too early costs it its port.
            let kind = NatKind { mapping: Dependence::EndpointIndependent, ..class };
            return self.router_in(NetworkId::CORE, kind, true);
        }
        if self.one_in(3) {
            let routers = self.two_routers(class);
            self.behind(&routers)
        } else {
            self.behind(&[class])
        }
    }

    /// Two kinds, the inner first, that are together of this class.
    fn two_routers(&mut self, class: NatKind) -> [NatKind; 2] {
        let hop =
            |kind| Hop { router: 0, kind, is_forwarded: false, hairpins: false, blocks_udp: false, renumbers: false };
        let is_fitting =
            |kinds: &[NatKind; 2]| Side { network: 0, routers: kinds.map(hop).to_vec(), has_v6: false }.kind() == class;
        let chains = NatKind::all().flat_map(|inner| NatKind::all().map(move |outer| [inner, outer]));
        let fitting: Vec<[NatKind; 2]> = chains.filter(is_fitting).collect();
        fitting[self.random.below(fitting.len() as u64) as usize]
    }

    /// A network behind new routers of these kinds, the inner first.
    fn behind(&mut self, kinds: &[NatKind]) -> NetworkId {
        kinds.iter().rev().fold(NetworkId::CORE, |outer, kind| self.router_in(outer, *kind, false))
    }

    fn router_in(&mut self, outer: NetworkId, kind: NatKind, renumbers_after_knock: bool) -> NetworkId {
        self.routers += 1;
        let addr = match outer {
            NetworkId::CORE => Ipv4Addr::new(198, 51, 100, self.routers),
            _ => Ipv4Addr::new(100, 64, 0, self.routers),
        };
        let plan = NatPlan {
            kind,
            ports: [PortChoice::Preserving, PortChoice::Preserving, PortChoice::Random, PortChoice::Sequential]
                [self.random.below(4) as usize],
            expiry: if self.expires { self.millis(30_000, 40_000) } else { self.millis(90_000, 300_000) },
            inbound_refreshes: self.one_in(2),
            hairpins: self.one_in(2),
            renumbers_after_knock,
        };
        let router = self.internet.add_router(outer, Nat::new(plan, addr, self.random.next_u64()));
        self.internet.add_network(router)
    }

    fn host(
        &mut self,
        index: usize,
        network: NetworkId,
        has_v6: bool,
        servers: usize,
        keys: ClusterKeys,
    ) -> PlannedHost {
        let home = self.uplink(index, 0, network, has_v6);
        if self.forwarding.contains(&network) && index < 2 {
            self.forward(&home);
        }
        let elsewhere = self.any_kind();
        let elsewhere = self.network_of(elsewhere);
        let elsewhere = self.uplink(index, 1, elsewhere, has_v6);
        if self.forwarding.contains(&elsewhere.network) {
            self.forward(&elsewhere);
        }
        for net in &home.addresses {
            self.internet.attach(network, net.addr(), Node::Host(index));
        }
        let plan = HostPlan {
            keys,
            identity: SignKey::from_seed(&self.bytes32()),
            wg: WgSecret::from_seed(&self.bytes32()),
            settings: settings(index, servers),
            site: 0,
            underlay: vec![home.link()],
            rp_filter_read_only: false,
            pods: None,
            unix_ms: UNIX_MS + self.random.below(600_000),
            seed: self.random.next_u64(),
            sabotage: None,
            path_policy: PathPolicy::default(),
        };
        PlannedHost { plan, starts: self.millis(0, 1000), uplinks: [home, elsewhere], relays_in_order: self.one_in(3) }
    }

    /// A port of the router before this host leads to it.
    fn forward(&mut self, uplink: &Uplink) {
        let router = self.internet.routers_before(uplink.network)[0];
        let addr = uplink.source(Ipv4Addr::UNSPECIFIED.into()).expect("every host has IPv4");
        self.internet.nat_mut(router).forward(LISTEN_PORT, SocketAddr::new(addr, LISTEN_PORT));
    }

    fn uplink(&mut self, index: usize, number: u8, network: NetworkId, has_v6: bool) -> Uplink {
        let host = u8::try_from(index).expect("a run has few hosts");
        let v4 = if network == NetworkId::CORE {
            Ipv4Addr::new(192, 0, 2, 10 + host * 2 + number)
        } else {
            // Homes are numbered alike: an address of one may be somebody else's in the other, or its own.
            let subnet = 1 + (network.number() % 2) as u8;
            Ipv4Addr::new(192, 168, subnet, 10 + host * 4 + self.random.below(4) as u8)
        };
        let mut addresses = vec![IpNet::new(v4.into(), 24).expect("24 is a length")];
        if has_v6 {
            let subnet = u16::try_from(network.number()).expect("a run has few networks");
            let v6 = Ipv6Addr::new(0x2001, 0xdb8, subnet, u16::from(number), 0, 0, 0, 5 + u16::from(host));
            addresses.push(IpNet::new(v6.into(), 64).expect("64 is a length"));
        }
        Uplink { network, addresses }
    }

    /// Now and then a side has no UDP at all.
    fn block_udp(&mut self, networks: &[NetworkId; 2]) {
        if !self.one_in(20) {
            return;
        }
        let network = networks[self.random.below(2) as usize];
        if let Some(router) = self.internet.routers_before(network).first() {
            self.internet.nat_mut(*router).block_udp(true);
        }
    }

    fn fault(&mut self, hosts: &[PlannedHost]) -> Option<Fault> {
        let host = self.random.below(2) as usize;
        if self.swaps {
            return Some(Fault::Swap { host });
        }
        let lasts = self.millis(4000, 6000);
        let has_router = hosts[host].uplinks[0].network != NetworkId::CORE;
        match self.random.below(10) {
            0 | 1 => Some(Fault::Suspend { host, lasts: self.millis(1000, 10_000) }),
            2 if has_router && !hosts[host].relays_in_order => Some(Fault::Rebind { host }),
            3 | 4 => Some(Fault::Block { both_ways: self.one_in(2), lasts }),
            5 => Some(Fault::RelayRestart { lasts: self.millis(200, 1000) }),
            6 if has_router && hosts[host].relays_in_order => Some(Fault::UdpBlocked { host }),
            _ => None,
        }
    }

    fn any_kind(&mut self) -> NatKind {
        NatKind::all().nth(self.random.below(9) as usize).expect("there are nine kinds")
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.random.below(count) == 0
    }

    fn millis(&mut self, least: u64, most: u64) -> Duration {
        self.random.between(Duration::from_millis(least), Duration::from_millis(most))
    }

    fn bytes32(&mut self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.random.next_u64().to_le_bytes());
        }
        bytes
    }
}

fn settings(index: usize, servers: usize) -> Settings {
    Settings {
        cluster_id: "sim".into(),
        host_name: HostName::try_from(format!("node-{index}")).expect("it is a DNS label"),
        servers: (0..servers)
            .map(|server| ServerSettings { name: format!("s{server}.example:7443"), proxied: false })
            .collect(),
        link_name: "mesh0".into(),
        listen_port: LISTEN_PORT,
        mtu: LINK_MTU,
        overlay_v4_pool: OVERLAY_V4_POOL,
        prefixes: BTreeSet::new(),
        advertise_node_addresses: false,
        endpoint_filter: EndpointFilter::default(),
        port_mapping: true,
        static_peers: Vec::new(),
        deny_nodes: BTreeSet::new(),
        allow_down_peer_bypass: false,
        allow_wide_prefixes: false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn seeds_take_turns_over_pairs_of_classes_and_half_of_each_are_troubled() {
        let count = class_pairs().len() as u64;
        let mut seen: BTreeMap<[NatKind; 2], [u32; 2]> = BTreeMap::new();
        for seed in 1000..1000 + 2 * count {
            let plan = Plan::new(seed);
            seen.entry(plan.classes).or_default()[usize::from(plan.is_troubled)] += 1;
            let swaps = matches!(plan.fault, Some((_, Fault::Swap { .. })));
            let forgets_soon = plan.resume_at.is_some()
                && plan.hosts.iter().any(|host| expiry(&plan, host).is_some_and(|expiry| expiry < SOON));
            assert_eq!(plan.is_troubled, swaps || plan.weather.loss.1 > 0 || forgets_soon, "seed {seed}");
        }
        assert_eq!(seen.len() as u64, count);
        assert!(seen.values().all(|runs| *runs == [1, 1]), "{seen:?}");
    }

    const SOON: Duration = Duration::from_secs(60);

    fn expiry(plan: &Plan, host: &PlannedHost) -> Option<Duration> {
        let routers = plan.internet.routers_before(host.uplinks[0].network);
        routers.iter().map(|router| plan.internet.nat(*router).plan().expiry).min()
    }

    #[test]
    fn the_routers_of_a_plan_are_of_the_class_it_is_counted_under() {
        for seed in 0..2000 {
            let plan = Plan::new(seed);
            for (host, class) in plan.hosts.iter().zip(plan.classes) {
                assert_eq!(host.uplinks[0].side(&plan.internet).kind(), class, "seed {seed}");
            }
        }
    }
}
