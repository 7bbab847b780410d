//! A run from a seed: who is there, how bad the network is, and what goes wrong when.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use mesh_common::config::EndpointFilter;
use mesh_common::host_name::HostName;
use mesh_common::key::{ClusterSecret, SignKey, WgSecret};
use mesh_common::limits::{LINK_MTU, LISTEN_PORT};
use mesh_proto::device::UnderlayLink;
use mesh_proto::mesh::settings::{ServerSettings, Settings};
use mesh_proto::path::agent::PathPolicy;
use mesh_proto::random::SplitMix64;

use crate::host::{HostPlan, Sabotage};
use crate::link::{Place, Weather};

/// Hosts of one site share a LAN.
const SITES: usize = 6;
/// Wall clocks begin about here.
const UNIX_MS: u64 = 1_800_000_000_000;

/// What a run is made from.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub seed: u64,
    pub agents: usize,
    /// How host 0 is broken.
    pub sabotage: Option<Sabotage>,
}

#[derive(Debug)]
pub struct Scenario {
    /// Members first, then nodes with another secret.
    pub hosts: Vec<HostPlan>,
    pub members: usize,
    /// When each host starts.
    pub starts: Vec<Duration>,
    pub servers: usize,
    pub weather: Weather,
    pub habit: Habit,
    pub replayer: bool,
    /// The last server serves old records.
    pub rolls_back: bool,
    /// When, and what. The last one is over at [`Self::last_fault`].
    pub faults: Vec<(Duration, Fault)>,
    pub last_fault: Duration,
    /// Announced by more than one host.
    pub contested: BTreeSet<IpNet>,
}

/// Who talks with whom until the last fault is over; from then on every pair must.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Habit {
    /// All pairs all the time: no path ever rests.
    WithEverybody,
    /// One pair in twelve; the others once in a while, from rest.
    WithFew,
}

#[derive(Debug, Clone)]
pub enum Fault {
    ServerDown {
        server: usize,
        lasts: Duration,
    },
    Island {
        places: BTreeSet<Place>,
        lasts: Duration,
    },
    AgentRestart {
        host: usize,
        lasts: Duration,
    },
    /// The host leaves and joins again.
    Leave {
        host: usize,
        lasts: Duration,
    },
    LinkDeleted {
        host: usize,
    },
    RoutesRemoved {
        host: usize,
    },
    RulesRemoved {
        host: usize,
    },
    ForeignRoute {
        host: usize,
    },
    /// The uplink gets another address.
    Moved {
        host: usize,
    },
}

impl Fault {
    pub fn lasts(&self) -> Duration {
        match self {
            Self::ServerDown { lasts, .. }
            | Self::Island { lasts, .. }
            | Self::AgentRestart { lasts, .. }
            | Self::Leave { lasts, .. } => *lasts,
            _ => Duration::ZERO,
        }
    }
}

impl Scenario {
    pub fn new(options: Options) -> Self {
        let Options { seed, agents, .. } = options;
        let mut random = SplitMix64::new(seed ^ 0x6d65_7368_7370_616e);
        // Each actor is in a third of the runs, in every combination.
        let strangers = if seed.is_multiple_of(3) { 2 } else { 0 };
        let replayer = (seed / 3).is_multiple_of(3);
        let rolls_back = (seed / 9).is_multiple_of(3);
        let servers = if rolls_back { 3 } else { 2 };
        let secrets = [secret(seed, 1), secret(seed, 2)];
        let contested = (0..4).map(contested_prefix).collect();
        let hosts = (0..agents + strangers)
            .map(|index| {
                let keys = secrets[usize::from(index >= agents)].derive();
                plan(index, servers, keys, options, &mut random)
            })
            .collect();
        let starts = (0..agents + strangers)
            .map(|index| match index % 12 {
                11 => seconds(&mut random, 6, 12),
                _ => random.between(Duration::ZERO, Duration::from_secs(2)),
            })
            .collect();
        let mut faults = faults(agents, servers, &mut random);
        if options.sabotage.is_some() {
            // The broken host gets its chances to show it.
            let restart =
                |second| (Duration::from_secs(second), Fault::AgentRestart { host: 0, lasts: Duration::from_secs(1) });
            faults.extend([8, 11, 14, 17, 20].map(restart));
        }
        let end = |(at, fault): &(Duration, Fault)| *at + fault.lasts();
        let last_fault = faults.iter().map(end).max().unwrap_or_default();
        Self {
            hosts,
            members: agents,
            starts,
            servers,
            weather: Weather {
                delay: (Duration::from_micros(500), Duration::from_millis(90)),
                jitter: Duration::from_millis(1 + random.below(15)),
                loss: (50, 50 + random.below(60)),
                duplicated: 20,
                reordered: 30,
            },
            habit: if seed.is_multiple_of(16) || options.sabotage.is_some() {
                Habit::WithEverybody
            } else {
                Habit::WithFew
            },
            replayer,
            rolls_back,
            faults,
            last_fault,
            contested,
        }
    }
}

/// Pods of a host.
pub fn pod_prefix(index: usize) -> IpNet {
    let octet = u8::try_from(index).expect("at most 256 hosts");
    IpNet::V4(Ipv4Net::new(Ipv4Addr::new(10, 42, octet, 0), 24).expect("24 is a length"))
}

/// The uplink address of a host after this many moves.
pub fn uplink(index: usize, moves: usize) -> Ipv4Addr {
    let octet = |value: usize| u8::try_from(value).expect("small");
    Ipv4Addr::new(10, 200 + octet(moves), octet(index % SITES), 10 + octet(index))
}

fn contested_prefix(index: usize) -> IpNet {
    let octet = u8::try_from(index).expect("small");
    IpNet::V4(Ipv4Net::new(Ipv4Addr::new(10, 99, octet, 0), 24).expect("24 is a length"))
}

fn secret(seed: u64, number: u64) -> ClusterSecret {
    let mut random = SplitMix64::new(seed.wrapping_mul(31) + number);
    ClusterSecret::from_bytes(bytes32(&mut random))
}

fn bytes32(random: &mut SplitMix64) -> [u8; 32] {
    let mut bytes = [0; 32];
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random.next_u64().to_le_bytes());
    }
    bytes
}

fn plan(
    index: usize,
    servers: usize,
    keys: mesh_common::key::ClusterKeys,
    options: Options,
    random: &mut SplitMix64,
) -> HostPlan {
    let site = index % SITES;
    let mut prefixes = BTreeSet::from([pod_prefix(index)]);
    if random.below(6) == 0 {
        prefixes.insert(contested_prefix(random.below(4) as usize));
    }
    let settings = Settings {
        cluster_id: "sim".into(),
        host_name: HostName::try_from(format!("node-{index}")).expect("it is a DNS label"),
        servers: (0..servers)
            .map(|server| ServerSettings { name: format!("s{server}.example:7443"), proxied: false })
            .collect(),
        link_name: "mesh0".into(),
        listen_port: LISTEN_PORT,
        mtu: LINK_MTU,
        // Small, so that addresses clash.
        overlay_v4_pool: Ipv4Net::new(Ipv4Addr::new(198, 19, 0, 0), 24).expect("24 is a length"),
        prefixes,
        advertise_node_addresses: random.below(4) != 0,
        endpoint_filter: EndpointFilter::default(),
        port_mapping: true,
        static_peers: Vec::new(),
        deny_nodes: BTreeSet::new(),
        allow_down_peer_bypass: random.below(8) == 0,
        allow_wide_prefixes: false,
    };
    HostPlan {
        keys,
        identity: SignKey::from_seed(&bytes32(random)),
        wg: WgSecret::from_seed(&bytes32(random)),
        settings,
        site,
        underlay: underlay(index, site, random),
        rp_filter_read_only: random.below(6) == 0,
        pods: Some(pod_prefix(index)),
        // Clocks differ by up to ten minutes.
        unix_ms: UNIX_MS + random.below(600_000),
        seed: random.next_u64(),
        sabotage: options.sabotage.filter(|_| index == 0),
        path_policy: PathPolicy::default(),
    }
}

fn underlay(index: usize, site: usize, random: &mut SplitMix64) -> Vec<UnderlayLink> {
    let rp_filter = [0, 1, 2][random.below(3) as usize];
    let link = |name: &str, addresses, virtual_kind: Option<&str>| UnderlayLink {
        name: name.into(),
        addresses,
        rp_filter,
        virtual_kind: virtual_kind.map(Into::into),
    };
    let net = |addr: IpAddr, len| IpNet::new(addr, len).expect("a fitting length");
    let mut uplinks = vec![net(uplink(index, 0).into(), 24)];
    if random.below(3) != 0 {
        let site = u16::try_from(site).expect("small");
        let index = u16::try_from(index).expect("small");
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, site, 0, 0, 0, 0, index + 1);
        uplinks.push(net(v6.into(), 64));
    }
    let mut links = vec![link("eth0", uplinks, None)];
    if random.below(2) == 0 {
        // The same private numbers at every site: a candidate that leads to somebody else, or to nobody.
        let octet = u8::try_from(10 + index / SITES).expect("small");
        let lan = net(Ipv4Addr::new(192, 168, 1, octet).into(), 24);
        links.push(link("lan0", vec![lan], None));
    }
    let docker = net(Ipv4Addr::new(172, 17, 0, 1).into(), 16);
    links.push(link("docker0", vec![docker], Some("bridge")));
    links
}

fn faults(agents: usize, servers: usize, random: &mut SplitMix64) -> Vec<(Duration, Fault)> {
    let mut faults = Vec::new();
    let host = |random: &mut SplitMix64| random.below(agents as u64) as usize;
    for server in 0..servers {
        let lasts = random.between(Duration::from_millis(200), Duration::from_secs(8));
        faults.push((seconds(random, 4, 16), Fault::ServerDown { server, lasts }));
    }
    for _ in 0..3 {
        let mut places: BTreeSet<Place> =
            (0..1 + random.below(agents as u64 / 2)).map(|_| Place::Host(host(random))).collect();
        if random.below(2) == 0 {
            places.insert(Place::Server(random.below(servers as u64) as usize));
        }
        let lasts = seconds(random, 2, 15);
        faults.push((seconds(random, 4, 14), Fault::Island { places, lasts }));
    }
    for _ in 0..agents.div_ceil(10) {
        let lasts = random.between(Duration::from_millis(100), Duration::from_secs(5));
        let restart = Fault::AgentRestart { host: host(random), lasts };
        faults.push((seconds(random, 4, 20), restart));
    }
    let leave = Fault::Leave { host: host(random), lasts: seconds(random, 3, 6) };
    faults.push((seconds(random, 4, 18), leave));
    for kind in 0..10 {
        let host = host(random);
        let damage = match kind % 5 {
            0 => Fault::LinkDeleted { host },
            1 => Fault::RoutesRemoved { host },
            2 => Fault::RulesRemoved { host },
            3 => Fault::ForeignRoute { host },
            _ => Fault::Moved { host },
        };
        faults.push((seconds(random, 4, 22), damage));
    }
    faults
}

fn seconds(random: &mut SplitMix64, low: u64, high: u64) -> Duration {
    random.between(Duration::from_secs(low), Duration::from_secs(high))
}
