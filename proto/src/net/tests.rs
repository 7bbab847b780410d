//! Whole scenarios: a node behind a NAT of every kind, servers, loss and liars, in simulated time.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::ServerId;
use mesh_common::nat::{Filtering, Mapping};
use mesh_common::time::Instant;

use super::report::{NetReport, StunServer};
use crate::device::Family;
use crate::random::SplitMix64;
use crate::wire::stun;

mod nat;

use nat::{Nat, NatKind};

/// One way between node and server.
const DELAY: Duration = Duration::from_millis(20);
const PORT: u16 = 51872;
const CHECK_TIME: Duration = Duration::from_secs(2);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Node, NAT, and a network in which every socket of `servers` answers STUN.
struct World {
    now: Instant,
    net: NetReport,
    own: BTreeSet<IpAddr>,
    nat: Nat,
    servers: BTreeMap<ServerId, StunServer>,
    /// Servers that say nothing.
    silent: BTreeSet<ServerId>,
    udp_blocked: bool,
    /// Of a hundred datagrams, each way.
    loss: u64,
    random: SplitMix64,
    /// What arrives at the node, in order of time.
    arriving: BTreeMap<(Instant, u64), (SocketAddr, Bytes)>,
    count: u64,
    /// What the node sent, and when.
    sent: Vec<(Instant, SocketAddr)>,
}

impl World {
    fn new(kind: NatKind, servers: Vec<StunServer>, seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&random.next_u64().to_le_bytes());
        Self {
            now: Instant::from_origin(Duration::from_secs(1)),
            net: NetReport::new(bytes),
            own: [ip("10.0.0.2"), ip("2001:db8:a::2")].into(),
            nat: Nat::new(kind, ip("203.0.113.7"), random.next_u64()),
            servers: servers.into_iter().enumerate().map(|(place, server)| (ServerId(place), server)).collect(),
            silent: BTreeSet::new(),
            udp_blocked: false,
            loss: 0,
            random,
            arriving: BTreeMap::new(),
            count: 0,
            sent: Vec::new(),
        }
    }

    fn start(&mut self) {
        self.net.handle_host(self.own.clone(), PORT, self.now);
        self.net.handle_servers(self.servers.clone(), self.now);
        self.drain();
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let arrival = self.arriving.first_key_value().map(|((at, _), _)| *at);
            let timeout = self.net.poll_timeout().map(|(at, _)| at);
            let Some(next) = arrival.into_iter().chain(timeout).min().filter(|at| *at <= end) else { break };
            self.now = self.now.max(next);
            if arrival == Some(next) {
                let (_, (source, datagram)) = self.arriving.pop_first().unwrap();
                self.net.handle_stun(source, &datagram, self.now);
            } else {
                self.net.handle_timeout(self.now);
            }
            self.drain();
        }
        self.now = end;
    }

    /// Runs until the condition holds; how long that took.
    fn run_until(&mut self, limit: Duration, holds: impl Fn(&NetReport) -> bool) -> Duration {
        let start = self.now;
        while !holds(&self.net) {
            assert!(self.now.since(start) < limit, "not within {limit:?}: {:?}", self.net.report());
            self.run(ms(10));
        }
        self.now.since(start)
    }

    fn drain(&mut self) {
        while let Some((to, bytes)) = self.net.poll_transmit() {
            self.sent.push((self.now, to));
            self.carry(to, bytes);
        }
    }

    fn is_lost(&mut self) -> bool {
        self.random.below(100) < self.loss
    }

    fn carry(&mut self, to: SocketAddr, bytes: Bytes) {
        if self.udp_blocked || self.is_lost() {
            return;
        }
        let inside = SocketAddr::new(*self.own.iter().find(|own| own.is_ipv4() == to.is_ipv4()).unwrap(), PORT);
        let outside = self.nat.outbound(inside, to, self.now);
        if to.ip() == outside.ip() {
            if let Some(source) = self.nat.hairpin(outside, to) {
                self.arrive(DELAY / 20, source, bytes);
            }
            return;
        }
        let Some(from) = self.answering(to, &bytes) else { return };
        let Some(answer) = stun::answer(&bytes, outside) else { return };
        if !self.is_lost() && self.nat.lets_in(from, outside) {
            self.arrive(DELAY * 2, from, answer.bytes.into());
        }
    }

    /// The socket that answers a request to `to`.
    fn answering(&self, to: SocketAddr, request: &[u8]) -> Option<SocketAddr> {
        let (id, server) = self.servers.iter().find(|(_, server)| {
            server.alt.contains(&to) || server.addresses.contains(&to.ip()) && server.ports.contains(&to.port())
        })?;
        if self.silent.contains(id) {
            return None;
        }
        let change = stun::answer(request, to)?.from;
        let address = if change.address == server.alt.contains(&to) {
            *server.addresses.iter().find(|address| address.is_ipv4() == to.is_ipv4())?
        } else {
            server.alt.iter().find(|alt| alt.is_ipv4() == to.is_ipv4())?.ip()
        };
        let port = if change.port { *server.ports.iter().find(|port| **port != to.port())? } else { to.port() };
        Some(SocketAddr::new(address, port))
    }

    fn arrive(&mut self, delay: Duration, source: SocketAddr, bytes: Bytes) {
        self.count += 1;
        self.arriving.insert((self.now + delay, self.count), (source, bytes));
    }

    fn sent_to(&self, to: &str) -> usize {
        let to: SocketAddr = to.parse().unwrap();
        self.sent.iter().filter(|(_, at)| *at == to).count()
    }
}

/// A server with one address.
fn server(address: &str) -> StunServer {
    StunServer { addresses: vec![ip(address)], ports: vec![3478, 3479], alt: Vec::new() }
}

/// A server with `--stun-alt-address`.
fn server_with_alt(address: &str, alt: &str) -> StunServer {
    let alt = [3478, 3479].map(|port| SocketAddr::new(ip(alt), port)).into();
    StunServer { alt, ..server(address) }
}

const EIM: Mapping = Mapping::EndpointIndependent;
const MAPPINGS: [Mapping; 3] = [EIM, Mapping::AddressDependent, Mapping::AddressAndPortDependent];
const FILTERINGS: [Filtering; 3] =
    [Filtering::EndpointIndependent, Filtering::AddressDependent, Filtering::AddressAndPortDependent];

fn kinds() -> impl Iterator<Item = NatKind> {
    let pairs = MAPPINGS.into_iter().flat_map(|mapping| FILTERINGS.map(|filtering| (mapping, filtering)));
    pairs.flat_map(|(mapping, filtering)| {
        [true, false].map(|keeps_port| NatKind { mapping, filtering, keeps_port, ..NatKind::default() })
    })
}

#[test]
fn every_kind_of_nat_is_named_within_two_seconds() {
    for kind in kinds() {
        let mut world = World::new(kind, vec![server_with_alt("192.0.2.1", "192.0.2.2")], 1);
        world.start();
        world.run(CHECK_TIME);
        let report = world.net.report().family(Family::V4).clone();
        assert_eq!((report.nat.mapping, report.nat.filtering), (kind.mapping, kind.filtering), "{kind:?}");
        assert_eq!(report.is_translated, Some(true));
        assert_eq!(report.reflexive, [world.nat.mapped_of("192.0.2.1:3478")], "{kind:?}");
        assert_eq!(report.keeps_port, Some(kind.keeps_port && kind.mapping == EIM), "{kind:?}");
        assert!(!report.udp_blocked);
        assert_eq!(world.net.rejected(), 0, "{kind:?}");
    }
}

#[test]
fn addresses_are_told_after_one_round_trip() {
    let mut world = World::new(NatKind::default(), vec![server("192.0.2.1")], 1);
    world.start();
    let took = world.run_until(CHECK_TIME, |net| !net.report().v4.reflexive.is_empty());
    assert!(took <= DELAY * 2 + ms(10), "{took:?}");
}

#[test]
fn one_server_address_proves_no_endpoint_independence() {
    for kind in kinds() {
        let mut world = World::new(kind, vec![server("192.0.2.1")], 1);
        world.start();
        world.run(CHECK_TIME);
        let nat = world.net.report().v4.nat;
        let mapping = match kind.mapping {
            Mapping::AddressAndPortDependent => Mapping::AddressAndPortDependent,
            _ => Mapping::PortIndependent,
        };
        // From one address nobody can tell whether a stranger would get in.
        let filtering = match kind.filtering {
            Filtering::AddressAndPortDependent => Filtering::AddressAndPortDependent,
            _ => Filtering::AddressDependent,
        };
        assert_eq!((nat.mapping, nat.filtering), (mapping, filtering), "{kind:?}");
        assert!(nat.mapping.is_endpoint_dependent(), "unproven is read as the stricter");
    }
}

#[test]
fn two_servers_are_two_addresses() {
    for kind in kinds() {
        let mut world = World::new(kind, vec![server("192.0.2.1"), server("198.51.100.1")], 1);
        world.start();
        world.run(CHECK_TIME);
        assert_eq!(world.net.report().v4.nat.mapping, kind.mapping, "{kind:?}");
    }
}

#[test]
fn a_server_with_one_port_says_nothing_of_classes() {
    let one_port = StunServer { ports: vec![3478], ..server("192.0.2.1") };
    let mut world = World::new(NatKind::default(), vec![one_port], 1);
    world.start();
    world.run(CHECK_TIME);
    let report = &world.net.report().v4;
    assert_eq!((report.nat.mapping, report.nat.filtering), (Mapping::Unknown, Filtering::Unknown));
    assert!(report.nat.filtering.is_strict() && !report.reflexive.is_empty());
}

#[test]
fn loss_of_every_fifth_datagram_delays_little_and_lies_never() {
    let (mut runs, mut in_time) = (0, 0);
    for seed in 0..60 {
        for kind in kinds() {
            let mut world = World::new(kind, vec![server_with_alt("192.0.2.1", "192.0.2.2")], seed);
            world.loss = 20;
            world.start();
            world.run(CHECK_TIME);
            let nat = world.net.report().v4.nat;
            runs += 1;
            in_time += usize::from((nat.mapping, nat.filtering) == (kind.mapping, kind.filtering));
            // Silence is no proof, so what is claimed may be stricter than the truth, never looser.
            let (found, truth) = (nat.filtering as u8, kind.filtering as u8);
            assert!(nat.filtering == Filtering::Unknown || found >= truth, "seed {seed}: {kind:?} is called {nat:?}");
            let is_loose = nat.mapping == EIM && kind.mapping != EIM;
            assert!(!is_loose, "seed {seed}: {kind:?} is called {nat:?}");
        }
    }
    assert!(in_time * 100 >= runs * 97, "{in_time} of {runs} runs");
}

#[test]
fn an_open_host_is_seen_as_it_is_and_keeps_no_mapping_alive() {
    let mut world = World::new(NatKind::none(Filtering::EndpointIndependent), vec![server("192.0.2.1")], 1);
    world.own = [ip("203.0.113.7")].into();
    world.start();
    world.run(CHECK_TIME);
    let report = &world.net.report().v4;
    assert_eq!(report.is_translated, Some(false));
    assert_eq!((report.nat.mapping, report.nat.filtering), (EIM, Filtering::AddressDependent));
    assert_eq!((report.hairpin, report.keeps_port), (None, Some(true)));
    let before = world.sent.len();
    world.run(Duration::from_secs(260));
    assert_eq!(world.sent.len(), before, "an open host has nothing to keep alive");
}

#[test]
fn ipv6_behind_a_firewall_has_a_filtering_and_no_translation() {
    let mut world = World::new(NatKind::default(), vec![server("2001:db8:1::1")], 1);
    world.start();
    world.run(CHECK_TIME);
    let report = &world.net.report().v6;
    assert_eq!(report.is_translated, Some(false));
    assert_eq!((report.nat.mapping, report.nat.filtering), (EIM, Filtering::AddressAndPortDependent));
    assert_eq!(world.net.report().v4, Default::default(), "no server was asked over IPv4");
}

#[test]
fn a_host_without_a_family_asks_nobody_over_it() {
    let mut world = World::new(NatKind::default(), vec![server("192.0.2.1"), server("2001:db8:1::1")], 1);
    world.own = [ip("10.0.0.2"), ip("fe80::1"), ip("::1")].into();
    world.start();
    world.run(CHECK_TIME);
    assert!(world.sent.iter().all(|(_, to)| to.is_ipv4()));
    assert!(!world.net.report().v6.udp_blocked);
}

#[test]
fn a_blocked_network_is_named_and_noticed_when_it_opens() {
    let mut world = World::new(NatKind::default(), vec![server("192.0.2.1"), server("198.51.100.1")], 1);
    world.udp_blocked = true;
    world.start();
    let took = world.run_until(CHECK_TIME, |net| net.report().v4.udp_blocked);
    assert!(took >= ms(500), "after {took:?}: too early to tell");
    world.run(Duration::from_secs(600));
    let quiet = world.sent.len();
    world.run(Duration::from_secs(600));
    assert!(world.sent.len() - quiet <= 12 * 2 * 6, "{} datagrams in ten minutes", world.sent.len() - quiet);
    world.udp_blocked = false;
    world.run_until(Duration::from_secs(62), |net| !net.report().v4.udp_blocked);
    assert_eq!(world.net.report().v4.nat.mapping, EIM);
}

#[test]
fn servers_that_fall_silent_take_nothing_back() {
    let mut world = World::new(NatKind::default(), vec![server_with_alt("192.0.2.1", "192.0.2.2")], 1);
    world.start();
    world.run(CHECK_TIME);
    let known = world.net.report().v4.clone();
    assert!(!known.reflexive.is_empty());
    world.silent.insert(ServerId(0));
    world.run_until(Duration::from_secs(30), |net| net.report().v4.udp_blocked);
    let report = world.net.report().v4.clone();
    assert_eq!((report.reflexive, report.nat), (known.reflexive.clone(), known.nat));
    // Where the network changed meanwhile, nothing is known any longer.
    world.net.handle_network_changed(world.now);
    world.run(CHECK_TIME);
    assert!(world.net.report().v4.reflexive.is_empty());
    // And one of two servers is enough.
    world.silent.clear();
    world.servers.insert(ServerId(1), server("198.51.100.1"));
    world.silent.insert(ServerId(1));
    world.net.handle_servers(world.servers.clone(), world.now);
    world.run(CHECK_TIME);
    assert_eq!((&world.net.report().v4.reflexive, world.net.report().v4.udp_blocked), (&known.reflexive, false));
}

#[test]
fn a_mapping_is_kept_alive_and_its_loss_noticed() {
    for mapping in MAPPINGS {
        let kind = NatKind { mapping, keeps_port: false, lifetime: Duration::from_secs(30), ..NatKind::default() };
        let mut world = World::new(kind, vec![server("192.0.2.1")], 1);
        world.start();
        world.run(CHECK_TIME);
        let before = world.net.report().clone();
        world.net.poll_changed();
        world.run(Duration::from_secs(3600));
        assert_eq!(*world.net.report(), before, "{mapping:?}: an hour with a mapping that lives 30 s");
        assert!(!world.net.poll_changed());
        // One datagram in 22 to 25 s, and a few every five minutes.
        assert!(world.sent_to("192.0.2.1:3478") <= 3600 / 22 + 2 * 13, "{}", world.sent_to("192.0.2.1:3478"));

        world.nat.reboot();
        world.run_until(Duration::from_secs(27), |net| net.report().v4.reflexive != before.v4.reflexive);
        world.run(CHECK_TIME);
        assert_eq!(world.net.report().v4.nat, before.v4.nat);
    }
}

#[test]
fn a_path_that_fell_silent_brings_the_question_forward_and_many_bring_one() {
    let kind = NatKind { keeps_port: false, ..NatKind::default() };
    let mut world = World::new(kind, vec![server("192.0.2.1")], 1);
    world.start();
    world.run(Duration::from_secs(10));
    let (before, asked) = (world.net.report().clone(), world.sent_to("192.0.2.1:3478"));
    world.nat.reboot();
    for _ in 0..50 {
        world.net.handle_doubt(world.now);
        world.drain();
    }
    let took = world.run_until(Duration::from_secs(5), |net| net.report().v4.reflexive != before.v4.reflexive);
    assert!(took <= DELAY * 4 + ms(10), "{took:?}");
    assert!(world.sent_to("192.0.2.1:3478") <= asked + 3);
}

#[test]
fn filtering_is_not_asked_through_doors_that_are_open_by_now() {
    let kind = NatKind { lifetime: Duration::from_secs(600), ..NatKind::default() };
    let mut world = World::new(kind, vec![server_with_alt("192.0.2.1", "192.0.2.2")], 1);
    world.start();
    world.run(Duration::from_secs(1000));
    assert_eq!(world.net.report().v4.nat.filtering, Filtering::AddressAndPortDependent);
    // Netlink says something changed, but it did not matter.
    world.net.handle_network_changed(world.now);
    world.run(CHECK_TIME);
    assert_eq!(world.net.report().v4.nat.filtering, Filtering::AddressAndPortDependent);
}

#[test]
fn a_check_on_demand_asks_again_and_comes_to_an_end_also_where_nobody_answers() {
    let mut world = World::new(NatKind::default(), vec![server("192.0.2.1")], 1);
    world.net.handle_check(world.now);
    assert!(!world.net.is_checking(), "there is nobody to ask");
    world.start();
    world.run(CHECK_TIME);
    for blocked in [false, true] {
        world.udp_blocked = blocked;
        assert!(!world.net.is_checking());
        let before = world.sent_to("192.0.2.1:3478");
        world.net.handle_check(world.now);
        world.drain();
        assert!(world.net.is_checking() && world.sent_to("192.0.2.1:3478") > before);
        world.run_until(Duration::from_secs(3), |net| !net.is_checking());
        assert_eq!(world.net.report().v4.udp_blocked, blocked);
    }
}

#[test]
fn another_uplink_is_another_report_within_two_seconds() {
    let mut world = World::new(NatKind::default(), vec![server_with_alt("192.0.2.1", "192.0.2.2")], 1);
    world.start();
    world.run(Duration::from_secs(40));
    let kind = NatKind {
        mapping: Mapping::AddressAndPortDependent,
        filtering: Filtering::AddressDependent,
        keeps_port: false,
        ..NatKind::default()
    };
    world.nat = Nat::new(kind, ip("198.51.100.77"), 5);
    world.own = [ip("10.8.0.9")].into();
    world.net.handle_host(world.own.clone(), PORT, world.now);
    world.net.handle_network_changed(world.now);
    world.drain();
    let took = world.run_until(CHECK_TIME, |net| net.report().v4.reflexive[0].ip() == ip("198.51.100.77"));
    assert!(took <= DELAY * 2 + ms(10), "{took:?}");
    world.run(CHECK_TIME);
    let nat = world.net.report().v4.nat;
    assert_eq!((nat.mapping, nat.filtering), (kind.mapping, kind.filtering));
}

#[test]
fn hairpinning_is_seen_by_a_request_that_comes_back() {
    for hairpins in [true, false] {
        let kind = NatKind { hairpins, ..NatKind::default() };
        let mut world = World::new(kind, vec![server("192.0.2.1")], 1);
        world.start();
        world.run(CHECK_TIME);
        assert_eq!(world.net.report().v4.hairpin, Some(hairpins));
        let mapped = world.net.report().v4.reflexive[0].to_string();
        assert!((1..=6).contains(&world.sent_to(&mapped)), "{}", world.sent_to(&mapped));
        world.run(Duration::from_secs(3600));
        assert!(world.sent_to(&mapped) <= 6, "once for each mapping");
    }
}

#[test]
fn a_router_that_renumbers_after_an_early_datagram_is_not_taken_for_a_symmetric_one() {
    let kind = NatKind { renumbers_after_early_inbound: true, ..NatKind::default() };
    let mut world = World::new(kind, vec![server_with_alt("192.0.2.1", "192.0.2.2")], 1);
    world.start();
    world.run(CHECK_TIME);
    assert_eq!(world.net.report().v4.nat.mapping, EIM);
}

#[test]
fn a_server_on_the_same_lan_hides_no_nat() {
    let mut world = World::new(NatKind::default(), vec![server("192.0.2.1")], 1);
    world.nat.lan.insert(ip("10.0.0.3"));
    world.servers.insert(ServerId(1), server("10.0.0.3"));
    world.start();
    world.run(CHECK_TIME);
    let report = &world.net.report().v4;
    assert_eq!((report.is_translated, report.reflexive.len()), (Some(true), 1));
    assert_eq!(report.reflexive[0].ip(), ip("203.0.113.7"));
    assert_eq!(report.nat.filtering, Filtering::AddressAndPortDependent, "the LAN's openness is not the NAT's");
}

#[test]
fn strangers_are_counted_and_never_believed() {
    let mut world = World::new(NatKind::default(), vec![server_with_alt("192.0.2.1", "192.0.2.2")], 1);
    world.net.handle_host(world.own.clone(), PORT, world.now);
    world.net.handle_servers(world.servers.clone(), world.now);
    let mut requests = Vec::new();
    while let Some(request) = world.net.poll_transmit() {
        requests.push(request);
    }
    let lie: SocketAddr = "198.51.100.66:6666".parse().unwrap();
    let lies = |request: &Bytes, mapped| Bytes::from(stun::answer(request, mapped).unwrap().bytes);
    let mut expected = 0;
    let mut tell = |world: &mut World, source: SocketAddr, datagram: &[u8]| {
        world.net.handle_stun(source, datagram, world.now);
        expected += 1;
        assert_eq!(world.net.rejected(), expected, "{source}");
        assert!(world.net.report().v4.reflexive.is_empty(), "{source} is believed");
    };
    let (asked, request) = requests[0].clone();
    // Right transaction, wrong socket; the server's other port, address, or both, for a question that is not theirs.
    for stranger in ["198.51.100.9:3478", "192.0.2.1:3477", "192.0.2.1:3479", "192.0.2.2:3478", "[2001:db8::1]:3478"] {
        let mapped = if stranger.starts_with('[') { "[2001:db8:f::1]:9".parse().unwrap() } else { lie };
        tell(&mut world, stranger.parse().unwrap(), &lies(&request, mapped));
    }
    // Right socket, guessed transaction.
    tell(&mut world, asked, &lies(&stun::binding_request(&[7; 12], stun::Change::NONE).into(), lie));
    // Right socket and transaction, an address that cannot be ours.
    for mapped in ["127.0.0.1:9", "224.0.0.1:9", "0.0.0.0:9", "198.51.100.66:0", "192.0.2.2:3479", "[2001:db8:f::1]:9"]
    {
        tell(&mut world, asked, &lies(&request, mapped.parse().unwrap()));
    }
    // Somebody asks us, and garbage.
    tell(&mut world, lie, &stun::binding_request(&[8; 12], stun::Change::NONE));
    tell(&mut world, asked, &request);
    tell(&mut world, asked, b"");
    // The truth still counts.
    world.net.handle_stun(asked, &lies(&request, "203.0.113.7:51872".parse().unwrap()), world.now);
    assert_eq!(world.net.report().v4.reflexive, ["203.0.113.7:51872".parse().unwrap()]);
    // A copy of an answer is no lie.
    world.net.handle_stun(asked, &lies(&request, lie), world.now);
    assert_eq!(world.net.rejected(), expected);
    assert_eq!(world.net.report().v4.reflexive, ["203.0.113.7:51872".parse().unwrap()]);
}

#[test]
fn many_servers_with_many_addresses_are_asked_a_bounded_number_of_questions() {
    let greedy = |site: u8| StunServer {
        addresses: (1..=200).map(|host| IpAddr::from([198, 51, site, host])).collect(),
        ports: (3000..3008).collect(),
        alt: (1..=200).map(|host| SocketAddr::from(([203, 0, site, host], 1))).collect(),
    };
    let mut world = World::new(NatKind::default(), (0..100).map(greedy).collect(), 1);
    world.udp_blocked = true;
    world.start();
    assert!(world.sent.len() <= 4 * 3, "{} questions at once", world.sent.len());
    world.run(CHECK_TIME);
    assert!(world.sent.len() <= 4 * 3 * 6, "{} datagrams", world.sent.len());
    // As many different servers as possible.
    let sites: BTreeSet<_> = world.sent.iter().map(|(_, to)| to.ip()).collect();
    assert_eq!(sites, (0..4).map(|site| IpAddr::from([198, 51, site, 1])).collect());
}

#[test]
fn unusable_servers_are_not_asked() {
    let nowhere = StunServer { addresses: vec![ip("127.0.0.1"), ip("10.0.0.2"), ip("0.0.0.0")], ..server("224.0.0.1") };
    let portless = StunServer { ports: vec![0], ..server("192.0.2.1") };
    let mut world = World::new(NatKind::default(), vec![nowhere, portless, StunServer::default()], 1);
    world.start();
    world.run(CHECK_TIME);
    assert_eq!(world.sent, []);
    assert_eq!(world.net.poll_timeout(), None, "nobody to ask, nothing to wait for");
}

#[test]
fn a_server_that_comes_later_joins_the_check() {
    let kind = NatKind { filtering: Filtering::EndpointIndependent, ..NatKind::default() };
    let mut world = World::new(kind, vec![server("192.0.2.1")], 1);
    world.start();
    world.run(ms(50));
    world.servers.insert(ServerId(1), server("198.51.100.1"));
    world.net.handle_servers(world.servers.clone(), world.now);
    world.drain();
    world.run(CHECK_TIME);
    assert_eq!(world.net.report().v4.nat.mapping, EIM);
    assert_eq!(world.sent_to("198.51.100.1:3478"), 2, "its view of us, and an answer from its other port");
    // The same again is no news.
    let before = world.sent.len();
    world.net.handle_servers(world.servers.clone(), world.now);
    world.run(Duration::from_secs(10));
    assert_eq!(world.sent.len(), before);
    // Without servers nothing goes out any longer.
    world.net.handle_servers(BTreeMap::new(), world.now);
    world.run(Duration::from_secs(1000));
    assert_eq!((world.sent.len(), world.net.poll_timeout()), (before, None));
}

#[test]
fn the_same_seed_asks_the_same() {
    let run = |seed| {
        let mut world = World::new(NatKind::default(), vec![server_with_alt("192.0.2.1", "192.0.2.2")], seed);
        world.loss = 30;
        world.start();
        world.run(Duration::from_secs(900));
        (world.sent, world.net.report().clone())
    };
    assert_eq!(run(3), run(3));
    assert_ne!(run(3).0, run(4).0);
}
