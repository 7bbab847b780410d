//! Forced mode under every fault at once: nothing to a mesh prefix is ever on a wire in clear.

use std::{fs, net::IpAddr, time::Duration};

use netns_tests::{
    Host, Mesh, MeshOptions,
    checks::{
        carry, faults,
        life::{Pings, floor_only, wait_connected},
        traces,
    },
    demo,
    mesh::{MESH_LINK, UPLINK, enter_or_skip},
    traffic::first_unreachable,
};

const EVERY: Duration = Duration::from_millis(20);
const TTL: Duration = Duration::from_secs(5);
const BACK_WITHIN: Duration = Duration::from_secs(5);
const RECONNECTS_WITHIN: Duration = Duration::from_secs(40);
const AT_ONCE: Duration = Duration::from_secs(2);
const OWN_TABLE: &str = "inet meshspan";

/// Both nodes and their pods answer each other.
fn answer(mesh: &Mesh, a: usize, b: usize, payload: &[u8]) {
    let (a, b) = (&mesh.nodes[a], &mesh.nodes[b]);
    let pings: [(&Host, IpAddr); 4] = [
        (&a.host, b.overlay_v6().unwrap()),
        (&b.host, a.overlay_v4().unwrap()),
        (&a.pods[0].host, b.pods[0].v4.into()),
        (&b.pods[0].host, a.pods[0].v6.into()),
    ];
    carry::replies(&pings, payload, BACK_WITHIN).unwrap_or_else(|error| panic!("{}: {error:#}", a.name()));
}

#[test]
fn nothing_is_sent_in_clear_whatever_dies() {
    let Some(binaries) = enter_or_skip("nothing_is_sent_in_clear_whatever_dies").unwrap() else { return };
    let options = MeshOptions { pods_per_node: 1, ttl: Some(TTL), ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    mesh.send_controls("start").unwrap();
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    let marker = mesh.marker("leak").unwrap();
    let payload = marker.bytes();
    let pings = Pings::between(&mesh.nodes[0], &mesh.nodes[1], &marker).unwrap();
    let third = [0, 1].map(|peer| Pings::between(&mesh.nodes[2], &mesh.nodes[peer], &marker).unwrap());

    // Agents die and are stopped, and return.
    for crash in [true, false] {
        let node = &mut mesh.nodes[1];
        if crash {
            node.crash().unwrap()
        } else {
            node.stop().unwrap()
        }
        floor_only(node).unwrap();
        // The way of what has just left the tunnel for an address that went with the link.
        for own in [node.overlay_v4().unwrap(), node.overlay_v6().unwrap()] {
            first_unreachable(&node.host, own, payload, EVERY, AT_ONCE).unwrap();
        }
        node.start().unwrap();
        answer(&mesh, 1, 0, payload);
        answer(&mesh, 1, 2, payload);
    }
    // All agents at once.
    mesh.nodes.iter_mut().for_each(|node| node.crash().unwrap());
    mesh.nodes.iter().for_each(|node| drop(floor_only(node).unwrap()));
    mesh.start_nodes().unwrap();
    answer(&mesh, 0, 1, payload);
    answer(&mesh, 1, 2, payload);
    // The link goes under a running agent.
    let whole = traces::mesh_state(&mesh.nodes[0]).unwrap();
    mesh.nodes[0].host.delete_link(MESH_LINK).unwrap();
    traces::wait_same_state(&mesh.nodes[0], &whole, AT_ONCE).unwrap();
    answer(&mesh, 0, 1, payload);
    // No server, and an agent that has to live from its cache.
    println!("{}", faults::agent_restart_without_server(&mut mesh).unwrap());
    // No server, and no cache either: until it has heard who is there, the node keeps the floor that it finds.
    mesh.nodes[1].crash().unwrap();
    let floor = floor_only(&mesh.nodes[1]).unwrap();
    for name in ["cache.bin", "cache.bin.prev"] {
        match fs::remove_file(mesh.nodes[1].state_dir().join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{name}: {error}"),
            _ => {}
        }
    }
    mesh.nodes[1].start().unwrap();
    netns_tests::wait::until_true("the agent to have its link", BACK_WITHIN, || mesh.nodes[1].host.has_link(MESH_LINK))
        .unwrap();
    println!("without server and cache: {floor}");
    let peer = &mesh.nodes[0];
    for to in [peer.overlay_v4().unwrap(), peer.overlay_v6().unwrap()] {
        first_unreachable(&mesh.nodes[1].host, to, payload, EVERY, AT_ONCE).unwrap();
    }
    mesh.server.start().unwrap();
    for node in &mesh.nodes {
        wait_connected(node, RECONNECTS_WITHIN).unwrap();
    }
    mesh.wait_until_formed().unwrap();
    answer(&mesh, 0, 1, payload);
    answer(&mesh, 1, 2, payload);
    // The boolean. A node that is off has no mesh to protect, so nothing is sent from or to it meanwhile.
    for pings in third {
        pings.stop().unwrap();
    }
    mesh.nodes[2].set_enabled(false).unwrap();
    mesh.wait_until_formed_of(&[0, 1], BACK_WITHIN).unwrap();
    mesh.nodes[2].set_enabled(true).unwrap();
    mesh.wait_until_formed().unwrap();
    answer(&mesh, 2, 0, payload);
    answer(&mesh, 2, 1, payload);

    println!("{} echo requests", pings.stop().unwrap());
    println!("{}", carry::no_cleartext(&mut mesh).unwrap());
}

#[test]
fn strict_reverse_path_filters_lose_nothing() {
    let Some(binaries) = enter_or_skip("strict_reverse_path_filters_lose_nothing").unwrap() else { return };
    let options = MeshOptions { pods_per_node: 1, ttl: Some(TTL), rp_filter: 1, ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    for node in &mesh.nodes {
        node.host.set_sysctl("ipv4/conf/all/rp_filter", "1").unwrap();
    }
    mesh.take_baseline().unwrap();
    mesh.send_controls("start").unwrap();
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    let marker = mesh.marker("node addresses").unwrap();
    // The peers' endpoints themselves are captured: what is sent to them goes through the tunnel to them.
    let pings: Vec<_> = mesh.pairs().map(|(a, b)| (&a.host, b.address)).collect();
    carry::replies(&pings, marker.bytes(), BACK_WITHIN).unwrap();
    println!("{}", carry::pod_to_node(&mesh).unwrap());
    println!("{}", carry::pod_to_pod(&mesh).unwrap());
    let uplink = format!("ipv4/conf/{UPLINK}/rp_filter");
    for node in &mesh.nodes {
        assert_eq!(node.host.sysctl(&uplink).unwrap(), "2", "{} loosened its uplink", node.name());
        assert_eq!(node.host.sysctl("ipv4/conf/all/rp_filter").unwrap(), "1");
    }
    println!("{}", carry::no_cleartext(&mut mesh).unwrap());
    // One that is stopped leaves the floor and nothing else.
    let node = &mut mesh.nodes[1];
    assert!(node.host.nft_tables().unwrap().contains(OWN_TABLE));
    node.stop().unwrap();
    floor_only(node).unwrap();
    assert_eq!(node.host.sysctl(&uplink).unwrap(), "1", "the filter is strict again");
    assert!(!node.host.nft_tables().unwrap().contains(OWN_TABLE));
    // An agent that died cannot restore them: cleanup does.
    mesh.nodes[0].crash().unwrap();
    println!("{}", traces::nothing_left_behind(&mut mesh).unwrap());
    assert!(mesh.nodes.iter().all(|node| node.host.sysctl(&uplink).unwrap() == "1"));
}

#[test]
fn the_demo_is_green_with_strict_reverse_path_filters() {
    let Some(binaries) = enter_or_skip("the_demo_is_green_with_strict_reverse_path_filters").unwrap() else { return };
    let options = demo::Options { json: true, keep: false, cold_starts: 2, rp_filter: 1 };
    let (report, _) = demo::run(&binaries, options);
    assert!(report.ok(), "{}", report.json());
}
