//! Each router is what its name says: classified from behind it, by packets alone. And the classifier is no yes-man: it
//! catches rule sets that are not what they claim.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use netns_tests::{
    Entry, Host, Lab, enter_or_skip,
    impair::Impairment,
    nat::{
        Filtering, Kind, Mapping, Ports, Router,
        classify::{Class, Reflector, hairpins},
        rules::{self, Options},
        world::{SERVER, SERVER_V6, Site, World, WorldOptions},
    },
    nft::rules::{ChainType, Field, Rule, UDP},
    wait,
};

const HOST: u8 = 10;
const OTHER_HOST: u8 = 11;
const SOON: Duration = Duration::from_secs(5);

struct Bench {
    world: World,
    reflector: Reflector,
    host: Host,
}

impl Bench {
    fn new(ipv6: bool) -> Self {
        let mut lab = Lab::new().unwrap();
        let host = lab.host("host").unwrap();
        let world = World::build(lab, WorldOptions { sites: 1, ipv6, ..WorldOptions::default() }).unwrap();
        let reflector = Reflector::start(&world.server, SERVER.map(Into::into)).unwrap();
        Self { world, reflector, host }
    }

    fn site(&mut self) -> &mut Site {
        &mut self.world.sites[0]
    }

    fn become_kind(&mut self, kind: Kind, ports: Ports, hairpin: bool) {
        self.site().become_kind(kind, ports, hairpin).unwrap();
        self.world.sites[0].attach(&self.host, HOST, false).unwrap();
    }

    fn class(&self) -> Option<Class> {
        self.reflector.classify(&self.host).unwrap()
    }
}

fn of_kind(kind: Kind, keeps_port: bool) -> Class {
    Class { mapping: kind.mapping(), filtering: kind.filtering(), keeps_port }
}

#[test]
fn every_kind_is_what_it_says() {
    if enter_or_skip("every_kind_is_what_it_says") == Entry::Handled {
        return;
    }
    let mut bench = Bench::new(false);
    for ports in [Ports::Kept, Ports::Shifted] {
        for kind in Kind::ALL {
            bench.become_kind(kind, ports, false);
            let class = bench.class();
            if kind == Kind::UdpBlocked {
                assert_eq!(class, None, "{kind} {ports:?}");
                for (port, passes) in [(443, true), (7443, true), (80, false)] {
                    assert_eq!(bench.reflector.tcp_passes(&bench.host, port).unwrap(), passes, "TCP port {port}");
                }
                continue;
            }
            let random = kind.mapping() != Mapping::EndpointIndependent;
            let keeps_port = kind == Kind::Open || (ports == Ports::Kept && !random);
            assert_eq!(class, Some(of_kind(kind, keeps_port)), "{kind} {ports:?}");
            assert!(bench.reflector.tcp_passes(&bench.host, 80).unwrap(), "{kind} passes TCP");
            let (_, outer) = bench.reflector.outer(&bench.host, 0).unwrap();
            assert_eq!(outer.ip(), bench.world.sites[0].outer_address(HOST), "{kind}");
        }
    }
}

#[test]
fn hosts_behind_one_router_hairpin_only_where_it_does() {
    if enter_or_skip("hosts_behind_one_router_hairpin_only_where_it_does") == Entry::Handled {
        return;
    }
    let mut bench = Bench::new(false);
    for (kind, hairpin) in [(Kind::EimEif, true), (Kind::EimApdf, true), (Kind::EimAdf, false), (Kind::EimApdf, false)]
    {
        bench.become_kind(kind, Ports::Kept, hairpin);
        assert_eq!(hairpins(&bench.reflector, &bench.host).unwrap(), hairpin, "{kind}");
        assert_eq!(bench.class(), Some(of_kind(kind, true)), "{kind}");
    }
}

#[test]
fn two_hosts_with_one_port_keep_a_mapping_each() {
    if enter_or_skip("two_hosts_with_one_port_keep_a_mapping_each") == Entry::Handled {
        return;
    }
    let mut bench = Bench::new(false);
    bench.become_kind(Kind::EimApdf, Ports::Kept, false);
    let other = bench.world.lab.host("other").unwrap();
    bench.world.sites[0].attach(&other, OTHER_HOST, false).unwrap();
    let (socket, outer) = bench.reflector.outer(&bench.host, 5000).unwrap();
    let (other_socket, other_outer) = bench.reflector.outer(&other, 5000).unwrap();
    assert_eq!(outer.port(), 5000);
    assert_ne!(other_outer.port(), 5000);
    for (address, port) in [(0, 1), (1, 0), (1, 1)] {
        assert_eq!(bench.reflector.seen(&socket, address, port).unwrap(), Some(outer));
        assert_eq!(bench.reflector.seen(&other_socket, address, port).unwrap(), Some(other_outer));
    }
}

#[test]
fn mappings_end_with_their_time_their_router_and_their_address() {
    if enter_or_skip("mappings_end_with_their_time_their_router_and_their_address") == Entry::Handled {
        return;
    }
    let mut bench = Bench::new(false);
    bench.become_kind(Kind::EdmApdf, Ports::Kept, false);
    bench.site().set_timeouts(1, 1, 2).unwrap();
    let (socket, outer) = bench.reflector.outer(&bench.host, 0).unwrap();
    assert_eq!(bench.reflector.seen(&socket, 0, 0).unwrap(), Some(outer), "while it is used it stays");
    // One look each 1.5 s: longer than the flow lives.
    let start = std::time::Instant::now();
    wait::until_true("the mapping to end", SOON, || Ok(start.elapsed() > Duration::from_millis(1500))).unwrap();
    let later = bench.reflector.seen(&socket, 0, 0).unwrap().unwrap();
    assert_ne!(later, outer, "an idle mapping ends");

    bench.become_kind(Kind::EimApdf, Ports::Shifted, false);
    let (socket, outer) = bench.reflector.outer(&bench.host, 0).unwrap();
    assert_eq!(bench.reflector.seen(&socket, 1, 1).unwrap(), Some(outer));
    bench.site().reload().unwrap();
    let after = bench.reflector.seen(&socket, 0, 0).unwrap().unwrap();
    assert_eq!(after.ip(), outer.ip());
    assert_ne!(after, outer, "a router that restarts has forgotten");
    bench.site().change_home_address(77).unwrap();
    let moved = bench.reflector.seen(&socket, 0, 0).unwrap().unwrap();
    assert_eq!(moved.ip(), bench.world.sites[0].outer_address(HOST));
    assert_ne!(moved.ip(), outer.ip());
}

#[test]
fn traffic_under_way_does_not_bring_a_forgotten_mapping_back() {
    if enter_or_skip("traffic_under_way_does_not_bring_a_forgotten_mapping_back") == Entry::Handled {
        return;
    }
    let mut bench = Bench::new(false);
    bench.become_kind(Kind::EimApdf, Ports::Kept, false);
    let (socket, outer) = bench.reflector.outer(&bench.host, 7000).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let sending = bench
        .host
        .start_inside({
            let (stop, socket) = (Arc::clone(&stop), socket.try_clone().unwrap());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    // Refused while the router's address changes.
                    let _ = socket.send_to(b"under way", (SERVER[0], 9));
                }
                Ok(())
            }
        })
        .unwrap();
    for last in [77, 78, 79, 80] {
        bench.site().change_home_address(last).unwrap();
        let now = bench.reflector.seen(&socket, 0, 0).unwrap().unwrap();
        assert_ne!(now.ip(), outer.ip());
        assert_eq!(now.ip(), bench.world.sites[0].outer_address(HOST));
    }
    stop.store(true, Ordering::Relaxed);
    sending.join().unwrap().unwrap();
}

#[test]
fn the_ipv6_firewall_lets_answers_in_and_nothing_else() {
    if enter_or_skip("the_ipv6_firewall_lets_answers_in_and_nothing_else") == Entry::Handled {
        return;
    }
    let mut bench = Bench::new(true);
    let reflector = Reflector::start(&bench.world.server, SERVER_V6.map(Into::into)).unwrap();
    for kind in [Kind::EimEif, Kind::EdmApdf, Kind::CgnatEdmApdf, Kind::Open] {
        bench.site().become_kind(kind, Ports::Kept, false).unwrap();
        bench.world.sites[0].attach(&bench.host, HOST, true).unwrap();
        let filtering =
            if kind == Kind::Open { Filtering::EndpointIndependent } else { Filtering::AddressAndPortDependent };
        let expected = Class { mapping: Mapping::EndpointIndependent, filtering, keeps_port: true };
        assert_eq!(reflector.classify(&bench.host).unwrap(), Some(expected), "{kind}");
        let (socket, outer) = reflector.outer(&bench.host, 0).unwrap();
        assert_eq!(outer.port(), socket.local_addr().unwrap().port(), "{kind} translates nothing");
        assert!(outer.ip().to_string().starts_with("2001:db8:1:3::"), "{kind}: {outer}");
    }
    bench.site().become_kind(Kind::UdpBlocked, Ports::Kept, false).unwrap();
    assert_eq!(reflector.classify(&bench.host).unwrap(), None);
}

#[test]
fn wrong_rules_are_caught() {
    if enter_or_skip("wrong_rules_are_caught") == Entry::Handled {
        return;
    }
    let mut bench = Bench::new(false);
    bench.become_kind(Kind::EimEif, Ports::Kept, false);
    assert_eq!(bench.class(), Some(of_kind(Kind::EimEif, true)));
    let home = bench.world.sites[0].home.clone();

    // Takes packets from outside, and forgets to let them through.
    let mut deaf = rules::tables(Router::EimEif, &Options::default());
    deaf[0].chains[1].rules.pop();
    home.load_rules(&deaf).unwrap();
    home.flush_connections().unwrap();
    assert_eq!(bench.class().unwrap().filtering, Filtering::AddressAndPortDependent);

    // Remembers which addresses were sent to, and then does not ask.
    let mut lax = rules::tables(Router::EimAdf, &Options::default());
    let before = lax[1].chains.iter_mut().find(|chain| chain.name == "pre").unwrap();
    before.rules = vec![Rule::new().from_link("wan").protocol(UDP).dnat_by(&[Field::DestinationPort], "back")];
    home.load_rules(&lax).unwrap();
    home.flush_connections().unwrap();
    assert_eq!(bench.class().unwrap().filtering, Filtering::EndpointIndependent);

    // Another port for each destination, though the flows of one destination share one.
    let mut random = rules::tables(Router::EimApdf, &Options::default());
    let post = random[1].chains.iter_mut().find(|chain| chain.kind == ChainType::Nat).unwrap();
    post.rules = vec![Rule::new().to_link("wan").masquerade_random()];
    home.load_rules(&random).unwrap();
    home.flush_connections().unwrap();
    assert_eq!(bench.class().unwrap().mapping, Mapping::AddressAndPortDependent);
}

#[test]
fn an_early_packet_from_outside_does_not_spoil_a_mapping() {
    if enter_or_skip("an_early_packet_from_outside_does_not_spoil_a_mapping") == Entry::Handled {
        return;
    }
    let mut bench = Bench::new(false);
    bench.become_kind(Kind::EimApdf, Ports::Kept, false);
    let outer = bench.world.sites[0].outer_address(HOST);
    let (_first, seen) = bench.reflector.outer(&bench.host, 6001).unwrap();
    assert_eq!(seen, (outer, 6001).into());
    let knocker = bench.world.server.inside(|| Ok(std::net::UdpSocket::bind((SERVER[1], 6000))?)).unwrap();
    knocker.send_to(b"too early", (outer, 6002)).unwrap();
    let (socket, seen) = bench.reflector.outer(&bench.host, 6002).unwrap();
    assert_eq!(seen, (outer, 6002).into());
    assert_eq!(bench.reflector.seen(&socket, 1, 0).unwrap(), Some(seen));
    // And with a wire between them: the class does not hang on speed.
    bench.world.impair(Impairment::delay(Duration::from_millis(30)));
    assert_eq!(bench.class(), Some(of_kind(Kind::EimApdf, true)));
}
