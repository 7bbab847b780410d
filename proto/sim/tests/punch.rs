//! The oracle against the NAT model: two ends that know each other's reflexive addresses and knock at them, and at whoever
//! knocked, connect where the oracle says so.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_common::time::Instant;
use mesh_sim::internet::{DEFAULT_TTL, Internet, NetworkId, Node};
use mesh_sim::nat::{Nat, NatKind, NatPlan, PortChoice};
use mesh_sim::oracle::{Hop, Side, must_be_direct};

const NOW: Instant = Instant::ORIGIN;
const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

struct End {
    network: NetworkId,
    addr: SocketAddr,
    side: Side,
    /// Where the other end may be.
    targets: BTreeSet<SocketAddr>,
}

/// An end behind these routers, the innermost first.
fn end(internet: &mut Internet, number: u8, kinds: &[NatKind], ports: PortChoice) -> End {
    let mut network = NetworkId::CORE;
    let mut hops = Vec::new();
    for (depth, kind) in kinds.iter().rev().enumerate() {
        let plan = NatPlan {
            kind: *kind,
            ports,
            expiry: Duration::from_secs(60),
            inbound_refreshes: true,
            hairpins: false,
            renumbers_after_knock: false,
        };
        let depth = depth as u8;
        let outer =
            if depth == 0 { Ipv4Addr::new(198, 51, 100, number) } else { Ipv4Addr::new(100, 64, number, depth) };
        let router = internet.add_router(network, Nat::new(plan, outer, u64::from(number * 8 + depth)));
        network = internet.add_network(router);
        let router = usize::from(number * 8 + depth);
        hops.insert(
            0,
            Hop { router, kind: *kind, is_forwarded: false, hairpins: false, blocks_udp: false, renumbers: false },
        );
    }
    let host = Ipv4Addr::new(192, 168, number, 5);
    internet.attach(network, host.into(), Node::Host(usize::from(number)));
    let side = Side { network: usize::from(number), routers: hops, has_v6: false };
    let mut end = End { network, addr: SocketAddr::new(host.into(), 51872), side, targets: BTreeSet::new() };
    end.targets = [3478, 3479].map(|port| reflexive(internet, &end, port)).into();
    end
}

fn reflexive(internet: &mut Internet, end: &End, port: u16) -> SocketAddr {
    let server = SocketAddr::new(SERVER.into(), port);
    let flight = internet.send(end.network, end.addr, server, DEFAULT_TTL, NOW).unwrap();
    internet.arrive(flight, NOW).unwrap().source
}

/// Whether anything of one end is answered to it by the other.
fn connects(left: &[NatKind], right: &[NatKind], ports: PortChoice) -> (bool, bool) {
    let mut internet = Internet::new(3);
    internet.attach(NetworkId::CORE, SERVER.into(), Node::Server(0));
    let mut ends = [end(&mut internet, 1, left, ports), end(&mut internet, 2, right, ports)];
    let known = ends[0].targets.clone();
    ends[0].targets = std::mem::replace(&mut ends[1].targets, known);
    let expected = must_be_direct(&ends[0].side, &ends[1].side);
    let mut connected = false;
    for _ in 0..4 {
        for (from, to) in [(0, 1), (1, 0)] {
            for target in ends[from].targets.clone() {
                let knock = |internet: &mut Internet, end: &End, target| {
                    let flight = internet.send(end.network, end.addr, target, DEFAULT_TTL, NOW)?;
                    internet.arrive(flight, NOW)
                };
                let Some(seen) = knock(&mut internet, &ends[from], target) else { continue };
                ends[to].targets.insert(seen.source);
                connected |= knock(&mut internet, &ends[to], seen.source).is_some();
            }
        }
    }
    (expected, connected)
}

#[test]
fn single_nats_connect_exactly_where_the_oracle_says_so() {
    for ports in [PortChoice::Sequential, PortChoice::Random] {
        for left in NatKind::all() {
            for right in NatKind::all() {
                let (expected, connected) = connects(&[left], &[right], ports);
                assert_eq!(expected, connected, "{} {} {ports:?}", left.name(), right.name());
            }
        }
    }
}

#[test]
fn two_nats_in_a_row_connect_wherever_the_oracle_says_so() {
    let chains: Vec<[NatKind; 2]> =
        NatKind::all().flat_map(|inner| NatKind::all().map(move |outer| [inner, outer])).collect();
    let mut direct = 0;
    for left in &chains {
        for right in &chains {
            let (expected, connected) = connects(left, right, PortChoice::Random);
            assert!(connected || !expected, "{left:?} {right:?}");
            direct += usize::from(expected);
        }
    }
    assert!(direct > 1000, "{direct} of {} pairs", chains.len() * chains.len());
}
