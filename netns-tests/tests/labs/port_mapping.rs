//! Routers that lead a port to a node which asks: a pair that no hole punching connects is direct through it, whatever the
//! protocol, and what a router tells wrongly, or not at all, harms nothing and is said.
//!
//! The router is the lab's own ([`netns_tests::gateway`]); direct is what captures show.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use netns_tests::{
    Lab,
    capture::flows::FlowLog,
    gateway::{Gateway, GatewayOptions, Manner, Protocol},
    matrix::{
        judge::Evidence,
        pair::{Bench, BenchOptions, LAST, Place},
    },
    mesh,
    nat::{Kind, oracle::Pair, world::SERVER},
    wait,
};

/// Ports of the first side differ for each destination, the second lets in only whom it wrote to.
const HARD: [Kind; 2] = [Kind::EdmApdf, Kind::EimApdf];
const PLACES: [Place; 2] = [Place { site: 0, last: LAST[0] }, Place { site: 1, last: LAST[1] }];
/// Three protocols, each given up in time.
const SAID_WITHIN: Duration = Duration::from_secs(25);
const DIRECT_WITHIN: Duration = Duration::from_secs(8);

fn bench(name: &str) -> Option<Bench> {
    bench_in(name, Lab::new)
}

/// For a test that waits for a router most of its time.
fn bench_beside_others(name: &str) -> Option<Bench> {
    bench_in(name, Lab::beside_others)
}

fn bench_in(name: &str, lab: fn() -> anyhow::Result<Lab>) -> Option<Bench> {
    let binaries = mesh::enter_or_skip(name).unwrap()?;
    let options = BenchOptions { delay: Duration::from_millis(5), ..BenchOptions::default() };
    Some(Bench::build(lab().unwrap(), &binaries, &options).unwrap())
}

/// Both nodes at their places, not started, and the router before the first one.
fn place(bench: &mut Bench, kinds: [Kind; 2], protocol: Protocol, manner: Manner) -> Gateway {
    bench.world.sites[0].set_maps_ports(true).unwrap();
    bench.place(&kinds, &PLACES).unwrap();
    start_gateway(bench, protocol, manner, Duration::from_secs(3600))
}

fn start_gateway(bench: &Bench, protocol: Protocol, manner: Manner, lifetime: Duration) -> Gateway {
    let site = &bench.world.sites[0];
    let options = GatewayOptions {
        protocol,
        manner,
        inside: site.inner_address(1),
        outer_link: site.outer_link(),
        outside: site.home_outside(),
        lifetime,
    };
    Gateway::start(&site.home, options).unwrap()
}

/// What the first node says of its router's port.
fn said(bench: &Bench) -> serde_json::Value {
    bench.nodes[0].status_json().unwrap()["node"]["net"]["port_mapping"].clone()
}

fn wait_until_said(bench: &Bench, state: &str) -> serde_json::Value {
    let node = &bench.nodes[0];
    let what = format!("the node to say {state} of its router's port");
    let waited = wait::until(&what, SAID_WITHIN, || {
        let port_mapping = &node.status_json()?["node"]["net"]["port_mapping"];
        anyhow::ensure!(port_mapping["state"] == state, "it says {port_mapping}");
        Ok(Some(port_mapping.clone()))
    });
    node.explain(waited).unwrap().0
}

/// Runs an exchange of the pair and tells whether tunnel data went both ways through this port of the first router alone.
fn is_direct_through(bench: &mut Bench, kinds: [Kind; 2], port: u16) -> (bool, Evidence) {
    let evidence = bench.exchange(Pair::Apart(kinds[0], kinds[1]), DIRECT_WITHIN).unwrap();
    let Some(since) = evidence.direct_since() else { return (false, evidence) };
    let by_port = |line: &netns_tests::capture::flows::Passed| {
        let left = if line.source.ip() == evidence.left { line.source } else { line.destination };
        left.port() == port
    };
    let is_through = evidence.tunnel.iter().filter(|line| line.at >= since).all(by_port);
    (is_through, evidence)
}

#[test]
fn a_hard_pair_is_direct_by_each_protocol_and_the_port_is_given_back_at_the_end() {
    let Some(mut bench) = bench("a_hard_pair_is_direct_by_each_protocol_and_the_port_is_given_back_at_the_end") else {
        return;
    };
    for (protocol, name) in [(Protocol::Pcp, "pcp"), (Protocol::NatPmp, "nat-pmp"), (Protocol::Upnp, "upnp")] {
        let gateway = place(&mut bench, HARD, protocol, Manner::Honest);
        bench.start(2).unwrap();
        let said = wait_until_said(&bench, "mapped");
        let [(port, inside)] = gateway.led()[..] else { panic!("{:?} is led", gateway.led()) };
        assert_eq!(*inside.ip(), bench.world.sites[0].inner_address(LAST[0]));
        let external = format!("{}:{port}", bench.world.sites[0].home_address());
        assert_eq!((&said["external"], &said["protocol"]), (&external.clone().into(), &name.into()));
        bench.wait_until_idle(2).unwrap();
        let known = bench.nodes[1].status_json().unwrap()["peers"][0]["candidates"].to_string();
        assert!(known.contains(&external), "{known}");
        let (is_direct, evidence) = is_direct_through(&mut bench, HARD, port);
        assert!(is_direct, "{name}\n{}", evidence.timeline());
        bench.nodes[0].stop().unwrap();
        assert_eq!((gateway.released(), gateway.led()), (1, Vec::new()), "{name}");
    }
}

#[test]
fn a_router_that_promises_a_port_and_leads_none_turns_the_check_red() {
    let Some(mut bench) = bench("a_router_that_promises_a_port_and_leads_none_turns_the_check_red") else { return };
    let gateway = place(&mut bench, HARD, Protocol::Pcp, Manner::Promises);
    bench.start(2).unwrap();
    wait_until_said(&bench, "mapped");
    bench.wait_until_idle(2).unwrap();
    let (port, _) = gateway.led()[0];
    let (is_direct, evidence) = is_direct_through(&mut bench, HARD, port);
    assert!(!is_direct, "{}", evidence.timeline());
    assert!(evidence.beats.iter().rev().take(100).all(|beat| !beat.lost()), "the relay carries meanwhile");
}

#[test]
fn an_address_that_is_not_the_routers_is_told_to_nobody_and_written_to_by_nobody() {
    let Some(mut bench) = bench("an_address_that_is_not_the_routers_is_told_to_nobody_and_written_to_by_nobody") else {
        return;
    };
    // Somebody else's, of the same internet.
    let foreign = SERVER[1];
    let of_a_carrier = Ipv4Addr::new(100, 64, 9, 9);
    for (told, why) in [(foreign, "discovery servers see this node at"), (of_a_carrier, "is no public address")] {
        let _gateway = place(&mut bench, HARD, Protocol::NatPmp, Manner::Tells(told));
        let port = bench.world.sites[1].port();
        let log = FlowLog::start(&bench.world.internet, &port).unwrap();
        bench.start(2).unwrap();
        let said = wait_until_said(&bench, "not-believed");
        assert!(said["detail"].as_str().unwrap().contains(why), "{said}");
        assert_eq!(said["external"], serde_json::Value::Null);
        bench.wait_until_idle(2).unwrap();
        let known = bench.nodes[1].status_json().unwrap()["peers"][0]["candidates"].to_string();
        assert!(!known.contains(&told.to_string()), "{known}");
        let exchanged = bench.exchange(Pair::Apart(HARD[0], HARD[1]), Duration::from_secs(3)).unwrap();
        assert!(exchanged.beats.iter().rev().take(100).all(|beat| !beat.lost()), "traffic flows");
        let mapped_port = said_port(&said);
        let is_to_it = |to: std::net::SocketAddr| to.ip() == IpAddr::V4(told) && to.port() == mapped_port;
        let written = log.stop().unwrap().into_iter().filter(|line| is_to_it(line.destination)).count();
        assert_eq!(written, 0, "packets to {told}");
    }
}

/// The port that the sentence names.
fn said_port(said: &serde_json::Value) -> u16 {
    let detail = said["detail"].as_str().unwrap();
    let (_, rest) = detail.split_once("mapped port ").unwrap();
    rest.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn behind_two_routers_the_inner_ones_port_is_told_to_nobody_and_the_reason_is_said() {
    let Some(mut bench) = bench("behind_two_routers_the_inner_ones_port_is_told_to_nobody_and_the_reason_is_said")
    else {
        return;
    };
    let kinds = [Kind::CgnatEdmApdf, Kind::EimApdf];
    let gateway = place(&mut bench, kinds, Protocol::Pcp, Manner::Honest);
    bench.start(2).unwrap();
    let said = wait_until_said(&bench, "not-believed");
    let detail = said["detail"].as_str().unwrap();
    assert!(detail.contains("of 100.64.1.2 (PCP), which is no public address"), "{detail}");
    assert!(detail.contains("bridge mode"), "{detail}");
    bench.wait_until_idle(2).unwrap();
    let known = bench.nodes[1].status_json().unwrap()["peers"][0]["candidates"].to_string();
    assert!(!known.contains("100.64."), "{known}");
    assert_eq!(gateway.led().len(), 1, "it is kept");
}

#[test]
fn routers_that_hang_or_answer_garbage_are_named_and_stop_nothing() {
    let Some(mut bench) = bench_beside_others("routers_that_hang_or_answer_garbage_are_named_and_stop_nothing") else {
        return;
    };
    for (protocol, key) in [(Protocol::Pcp, "pcp"), (Protocol::Upnp, "upnp")] {
        for manner in [Manner::Hangs, Manner::Garbage] {
            let gateway = place(&mut bench, HARD, protocol, manner);
            bench.start(2).unwrap();
            // The mesh does not wait for the router.
            bench.wait_until_idle(2).unwrap();
            let said = wait_until_said(&bench, "failed");
            assert!(gateway.heard() > 0);
            let why = said["tried"][key].as_str().unwrap();
            let expected =
                if manner == Manner::Garbage && protocol == Protocol::Pcp { "makes no sense" } else { "no answer" };
            assert!(why.contains(expected), "{protocol:?} {manner:?}: {said}");
            let exchanged = bench.exchange(Pair::Apart(HARD[0], HARD[1]), Duration::from_secs(2)).unwrap();
            assert!(exchanged.beats.iter().rev().take(100).all(|beat| !beat.lost()), "traffic flows");
        }
    }
}

#[test]
fn a_port_that_is_granted_for_thirty_seconds_is_kept_and_one_that_was_forgotten_comes_back() {
    let Some(mut bench) =
        bench_beside_others("a_port_that_is_granted_for_thirty_seconds_is_kept_and_one_that_was_forgotten_comes_back")
    else {
        return;
    };
    bench.world.sites[0].set_maps_ports(true).unwrap();
    bench.place(&HARD, &PLACES).unwrap();
    let lifetime = Duration::from_secs(30);
    let gateway = start_gateway(&bench, Protocol::NatPmp, Manner::Honest, lifetime);
    bench.start(2).unwrap();
    wait_until_said(&bench, "mapped");
    let began = Instant::now();
    wait::until_true("the port to outlive what it was granted for", lifetime * 2, || {
        anyhow::ensure!(!gateway.led().is_empty(), "it was lost after {:?}", began.elapsed());
        Ok(began.elapsed() > lifetime + Duration::from_secs(3))
    })
    .unwrap();
    assert_eq!((gateway.led().len(), gateway.released()), (1, 0));
    let renewals = gateway.granted().len() - 1;
    assert!((2..=4).contains(&renewals), "{renewals}");
    gateway.forget().unwrap();
    wait::until_true("the port to be led again", lifetime, || Ok(!gateway.led().is_empty())).unwrap();
    assert_eq!(said(&bench)["state"], "mapped");
}

#[test]
fn a_node_that_is_told_not_to_asks_no_router() {
    let Some(mut bench) = bench("a_node_that_is_told_not_to_asks_no_router") else { return };
    bench.nodes[0].config.more_mesh.push("portMapping: false".to_owned());
    bench.nodes[0].write_config().unwrap();
    let gateway = place(&mut bench, HARD, Protocol::Pcp, Manner::Honest);
    bench.start(2).unwrap();
    assert_eq!(wait_until_said(&bench, "off")["detail"], "switched off by mesh.portMapping");
    bench.wait_until_idle(2).unwrap();
    assert_eq!((gateway.heard(), gateway.led()), (0, Vec::new()));
    // And one that is told so later gives back what it has.
    bench.nodes[0].config.more_mesh.clear();
    bench.nodes[0].write_config().unwrap();
    bench.nodes[0].reload().unwrap();
    wait_until_said(&bench, "mapped");
    bench.nodes[0].config.more_mesh.push("portMapping: false".to_owned());
    bench.nodes[0].write_config().unwrap();
    bench.nodes[0].reload().unwrap();
    wait::until_true("the port to be given back", SAID_WITHIN, || Ok(gateway.led().is_empty())).unwrap();
    assert_eq!(gateway.released(), 1);
}
