//! A classifier of its own: two remote addresses with two ports each, as RFC 5780 has it, and every other rule by hand.
#![allow(clippy::unwrap_used)]

use super::*;

const OUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn at(seconds: u64) -> Instant {
    Instant::from_origin(Duration::from_secs(seconds))
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn inside() -> SocketAddr {
    addr("192.168.1.5:51872")
}

fn remote(address: u8, port: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::new(203, 0, 113, address).into(), port)
}

fn plan(kind: NatKind, ports: PortChoice) -> NatPlan {
    NatPlan {
        kind,
        ports,
        expiry: Duration::from_secs(60),
        inbound_refreshes: false,
        hairpins: false,
        renumbers_after_knock: false,
    }
}

fn nat(kind: NatKind) -> Nat {
    Nat::new(plan(kind, PortChoice::Random), OUTER, 1)
}

fn kind(name: &str) -> NatKind {
    NatKind::all().find(|kind| kind.name() == name).unwrap()
}

/// What a NAT looks like to somebody behind it.
fn classify(mut fresh: impl FnMut() -> Nat) -> (&'static str, &'static str) {
    let mut nat = fresh();
    let mut mapped = |to| nat.outbound(inside(), to, at(0)).unwrap();
    let [first, other_port, other_address] = [remote(1, 1), remote(1, 2), remote(2, 1)].map(&mut mapped);
    let mapping = match (first == other_port, first == other_address) {
        (true, true) => "eim",
        (true, false) => "adm",
        (false, _) => "apdm",
    };
    let mut answered_from = |from| {
        let mut nat = fresh();
        let external = nat.outbound(inside(), remote(1, 1), at(0)).unwrap();
        nat.inbound(from, external, at(1)) == Some(inside())
    };
    assert!(answered_from(remote(1, 1)));
    let filtering = match (answered_from(remote(1, 2)), answered_from(remote(2, 1))) {
        (true, true) => "eif",
        (true, false) => "adf",
        (false, false) => "apdf",
        (false, true) => panic!("a stranger may what a known address may not"),
    };
    (mapping, filtering)
}

#[test]
fn every_kind_is_what_it_says_however_ports_are_chosen() {
    for kind in NatKind::all() {
        for ports in [PortChoice::Preserving, PortChoice::Sequential, PortChoice::Random] {
            let (mapping, filtering) = classify(|| Nat::new(plan(kind, ports), OUTER, 3));
            assert_eq!(format!("{mapping}-{filtering}"), kind.name(), "{ports:?}");
        }
    }
}

#[test]
fn ports_are_chosen_as_planned_and_never_shared() {
    let two = |ports| {
        let mut nat = Nat::new(plan(NatKind::OPEN, ports), OUTER, 9);
        [inside(), addr("192.168.1.6:51872")].map(|host| nat.outbound(host, remote(1, 1), at(0)).unwrap().port())
    };
    let [first, second] = two(PortChoice::Preserving);
    assert!(first == 51872 && second != 51872, "the port is kept while it is free");
    let [first, second] = two(PortChoice::Sequential);
    assert_eq!(second, first + 1);
    let [first, second] = two(PortChoice::Random);
    assert!(first != second && first != 51872 && second != 51872);
}

#[test]
fn what_is_unused_expires_and_what_is_used_stays() {
    let mut nat = nat(kind("eim-apdf"));
    let external = nat.outbound(inside(), remote(1, 1), at(0)).unwrap();
    assert_eq!(nat.inbound(remote(1, 1), external, at(59)), Some(inside()));
    assert_eq!(nat.inbound(remote(1, 1), external, at(61)), None, "an answer is no use of it");
    let again = nat.outbound(inside(), remote(1, 1), at(61)).unwrap();
    assert_ne!(again, external, "a new mapping has a new port");
    assert_eq!(nat.outbound(inside(), remote(2, 2), at(110)), Some(again));
    assert_eq!(nat.outbound(inside(), remote(2, 2), at(160)), Some(again));
    assert_eq!(
        nat.inbound(remote(1, 1), again, at(161)),
        None,
        "the mapping lives, that way through the filter does not"
    );
    assert_eq!(nat.inbound(remote(2, 2), again, at(161)), Some(inside()));
    let mut kept =
        Nat::new(NatPlan { inbound_refreshes: true, ..plan(kind("eim-apdf"), PortChoice::Random) }, OUTER, 1);
    let external = kept.outbound(inside(), remote(1, 1), at(0)).unwrap();
    for second in [50, 100, 150] {
        assert_eq!(kept.inbound(remote(1, 1), external, at(second)), Some(inside()));
    }
}

#[test]
fn a_filter_is_opened_by_the_internal_endpoint_through_whatever_mapping() {
    let mut nat = nat(kind("apdm-adf"));
    let towards_server = nat.outbound(inside(), remote(1, 3478), at(0)).unwrap();
    let peer = remote(9, 700);
    assert_eq!(nat.inbound(peer, towards_server, at(1)), None);
    nat.outbound(inside(), remote(9, 4), at(1)).unwrap();
    assert_eq!(nat.inbound(peer, towards_server, at(1)), Some(inside()));
}

#[test]
fn a_hairpin_turns_datagrams_round_with_their_outer_source() {
    let other = addr("192.168.2.6:51872");
    let mut nat = Nat::new(NatPlan { hairpins: true, ..plan(kind("eim-apdf"), PortChoice::Random) }, OUTER, 1);
    let [first, second] = [inside(), other].map(|host| nat.outbound(host, remote(1, 1), at(0)).unwrap());
    assert_eq!(nat.hairpin(inside(), second, at(1)), None, "the filter holds here too");
    assert_eq!(nat.hairpin(other, first, at(1)), Some((second, inside())));
    assert_eq!(nat.hairpin(inside(), second, at(1)), Some((first, other)));
    let mut plain = self::nat(kind("eim-eif"));
    let external = plain.outbound(other, remote(1, 1), at(0)).unwrap();
    assert_eq!(plain.hairpin(inside(), external, at(1)), None);
}

#[test]
fn a_forwarded_port_is_open_to_all_and_used_towards_all() {
    let mut nat = nat(kind("apdm-apdf"));
    nat.forward(51872, inside());
    let external = SocketAddr::new(OUTER.into(), 51872);
    assert_eq!(nat.inbound(remote(3, 3), external, at(0)), Some(inside()));
    assert_eq!(nat.outbound(inside(), remote(1, 1), at(500)), Some(external));
    assert_eq!(nat.outbound(inside(), remote(2, 2), at(501)), Some(external));
    assert_eq!(nat.inbound(remote(3, 3), external, at(5000)), Some(inside()));
}

#[test]
fn blocked_udp_passes_neither_way_until_it_is_lifted() {
    let mut nat = nat(kind("eim-eif"));
    let external = nat.outbound(inside(), remote(1, 1), at(0)).unwrap();
    nat.block_udp(true);
    assert_eq!(nat.outbound(inside(), remote(1, 1), at(1)), None);
    assert_eq!(nat.inbound(remote(1, 1), external, at(1)), None);
    nat.block_udp(false);
    assert_eq!(nat.inbound(remote(1, 1), external, at(1)), Some(inside()));
}

#[test]
fn a_rebound_nat_has_another_address_and_knows_nobody() {
    let mut nat = Nat::new(plan(kind("eim-eif"), PortChoice::Preserving), OUTER, 1);
    let before = nat.outbound(inside(), remote(1, 1), at(0)).unwrap();
    let outer = Ipv4Addr::new(198, 51, 100, 8);
    nat.rebind(outer);
    assert_eq!(nat.inbound(remote(1, 1), SocketAddr::new(outer.into(), before.port()), at(1)), None);
    let after = nat.outbound(inside(), remote(1, 1), at(1)).unwrap();
    assert_eq!(after.ip(), IpAddr::V4(outer));
    assert_ne!(after.port(), before.port());
}

#[test]
fn a_knock_before_the_first_shot_costs_a_lax_router_its_port_towards_the_knocker_only() {
    let lax = NatPlan { renumbers_after_knock: true, ..plan(kind("eim-apdf"), PortChoice::Preserving) };
    let mut nat = Nat::new(lax, OUTER, 1);
    let external = nat.outbound(inside(), remote(1, 1), at(0)).unwrap();
    assert_eq!(nat.inbound(remote(9, 9), external, at(0)), None);
    let towards_knocker = nat.outbound(inside(), remote(9, 9), at(1)).unwrap();
    assert_ne!(towards_knocker, external);
    assert_eq!(nat.outbound(inside(), remote(2, 2), at(1)), Some(external));
    assert_eq!(nat.outbound(inside(), remote(9, 9), at(2)), Some(towards_knocker));
    let mut strict = Nat::new(plan(kind("eim-apdf"), PortChoice::Preserving), OUTER, 1);
    let external = strict.outbound(inside(), remote(1, 1), at(0)).unwrap();
    assert_eq!(strict.inbound(remote(9, 9), external, at(0)), None);
    assert_eq!(strict.outbound(inside(), remote(9, 9), at(1)), Some(external));
}

#[test]
fn ipv6_is_filtered_and_not_translated() {
    let host = addr("[2001:db8:1::5]:51872");
    let [peer, stranger] = ["[2001:db8:2::9]:51872", "[2001:db8:3::9]:51872"].map(addr);
    let mut nat = nat(kind("apdm-apdf"));
    assert_eq!(nat.inbound(peer, host, at(0)), None);
    assert_eq!(nat.outbound(host, peer, at(0)), Some(host));
    assert_eq!(nat.inbound(peer, host, at(1)), Some(host));
    assert_eq!(nat.inbound(stranger, host, at(1)), None);
}
