//! Every verdict turns red when the thing it judges is broken on purpose.
//!
//! No agent runs here: shell scripts stand in for the programs, and the tests make by hand what agents would make, wrongly.

use std::{fs, net::IpAddr, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use netns_tests::{
    Entry, Mesh, MeshOptions, Snapshot,
    binaries::Binaries,
    checks::{carry, faults, life, traces},
    demo, enter_or_skip,
    link::{MAIN_TABLE, To, connect},
    mesh::{MESH_LINK, MESH_RULE, MESH_TABLE, UPLINK},
    snapshot::Kind,
    traffic::first_unreachable,
    wait,
};

const SOON: Duration = Duration::from_secs(5);
const SERVER: &str = "#!/bin/sh\necho endpoint=https://10.0.0.2:7443\necho pin=sha256:none\nexec sleep 1000\n";
/// Lives, hears nothing, and succeeds at every command.
const AGENT: &str = "#!/bin/sh\n[ \"$1\" = run ] || exit 0\ntrap '' HUP\nexec sleep 1000\n";

fn stand_ins(dir: &Path, server: &str) -> Binaries {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    Binaries { agent: write("mesh-agent", AGENT), server: write("discovery-server", server) }
}

/// A mesh of three nodes whose programs do nothing.
fn idle_mesh(dir: &Path) -> Mesh {
    let options = MeshOptions { ttl: Some(Duration::from_secs(1)), ..MeshOptions::default() };
    let mut mesh = Mesh::build(&stand_ins(dir, SERVER), &options).unwrap();
    for (index, node) in mesh.nodes.iter_mut().enumerate() {
        let number = index + 1;
        node.overlay =
            Some((format!("198.19.0.{number}").parse().unwrap(), format!("fd00:1::{number}").parse().unwrap()));
    }
    mesh.take_baseline().unwrap();
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh
}

/// Carries everything between nodes and pods over the internet, unencrypted.
fn route_in_clear(mesh: &Mesh) {
    for (index, node) in mesh.nodes.iter().enumerate() {
        let number = index + 1;
        let (v4, v6) = node.overlay.unwrap();
        for (prefix, address) in [(32, IpAddr::from(v4)), (128, v6.into())] {
            node.host.add_address("lo", ipnet::IpNet::new(address, prefix).unwrap()).unwrap();
        }
        let (gateway4, gateway6) = (format!("10.0.{number}.2"), format!("2001:db8:{number}::2"));
        for (prefix, gateway) in [
            (format!("{v4}/32"), &gateway4),
            (format!("{v6}/128"), &gateway6),
            (format!("10.244.{number}.0/24"), &gateway4),
            (format!("fd00:244:{number}::/64"), &gateway6),
        ] {
            mesh.internet
                .add_route(MAIN_TABLE, prefix.parse().unwrap(), &To::Gateway(gateway.parse().unwrap()))
                .unwrap();
        }
    }
}

/// What an agent would own on a node, tied to nothing.
fn plant_mesh_link(mesh: &Mesh, node: usize) {
    let host = &mesh.nodes[node].host;
    connect(host, MESH_LINK, &mesh.internet, "spare").unwrap();
    host.add_route(MESH_TABLE, "10.99.0.0/16".parse().unwrap(), &To::Link(MESH_LINK.into())).unwrap();
    host.add_rule(rtnetlink::IpVersion::V4, MESH_RULE, MESH_TABLE).unwrap();
}

fn red(verdict: anyhow::Result<String>, word: &str) {
    match verdict {
        Ok(detail) => panic!("passed, though broken on purpose: {detail}"),
        Err(error) => assert!(format!("{error:#}").contains(word), "no {word:?} in: {error:#}"),
    }
}

#[test]
fn a_mesh_in_clear_carries_but_is_caught() {
    if enter_or_skip("a_mesh_in_clear_carries_but_is_caught") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut mesh = idle_mesh(dir.path());
    mesh.send_controls("start").unwrap();
    route_in_clear(&mesh);
    carry::node_to_node_v6(&mesh).unwrap();
    carry::node_to_node_v4(&mesh).unwrap();
    carry::pod_to_pod(&mesh).unwrap();
    carry::pod_to_node(&mesh).unwrap();
    carry::tcp_transfer(&mesh, 1 << 20, 3).unwrap();
    let links = mesh.counts();
    for label in ["node-to-node-v6", "node-to-node-v4", "pod-to-pod", "pod-to-node", "tcp-transfer"] {
        assert!(links.iter().any(|(_, seen)| seen.markers.contains_key(label)), "{label} was not seen");
    }
    red(carry::no_cleartext(&mut mesh), "in clear on internet:site1");
}

#[test]
fn leaked_addresses_and_blind_captures_are_red() {
    if enter_or_skip("leaked_addresses_and_blind_captures_are_red") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut quiet = idle_mesh(dir.path());
    red(carry::no_cleartext(&mut quiet), "no WireGuard packet on internet:site1");
    // The captures have ended: the control copies of a second verdict cannot be found.
    red(carry::no_cleartext(&mut quiet), "control copies");
    drop(quiet);

    let mut leaking = idle_mesh(dir.path());
    let pod = &leaking.nodes[0].pods[0];
    netns_tests::traffic::send_clear(&pod.host, "10.244.2.11:9".parse().unwrap(), b"no marker at all", 0).unwrap();
    red(carry::no_cleartext(&mut leaking), "10.244.1.11 -> 10.244.2.11");
}

#[test]
fn without_a_mesh_nothing_is_carried() {
    if enter_or_skip("without_a_mesh_nothing_is_carried") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mesh = idle_mesh(dir.path());
    std::thread::scope(|scope| {
        for check in [carry::node_to_node_v6, carry::node_to_node_v4, carry::pod_to_pod, carry::pod_to_node] {
            let mesh = &mesh;
            scope.spawn(move || red(check(mesh), "no reply from"));
        }
        scope.spawn(|| red(carry::tcp_transfer(&mesh, 1000, 1), "cannot connect"));
    });
}

#[test]
fn packets_lost_after_the_server_died_are_counted() {
    if enter_or_skip("packets_lost_after_the_server_died_are_counted") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut mesh = idle_mesh(dir.path());
    route_in_clear(&mesh);
    let (server, victim) = (mesh.server.host.clone(), mesh.nodes[1].host.clone());
    wait::until_true("the server to run", SOON, || {
        Ok(Snapshot::take(&server, &[])?.of(Kind::Process).next().is_some())
    })
    .unwrap();
    let cutter = std::thread::spawn(move || {
        wait::until_true("the server to die", Duration::from_secs(30), || {
            Ok(Snapshot::take(&server, &[])?.of(Kind::Process).next().is_none())
        })
        .unwrap();
        victim.set_up(UPLINK, false).unwrap();
    });
    red(faults::server_killed(&mut mesh), "packets lost");
    cutter.join().unwrap();
}

#[test]
fn a_link_that_nobody_restores_is_named() {
    if enter_or_skip("a_link_that_nobody_restores_is_named") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mesh = idle_mesh(dir.path());
    route_in_clear(&mesh);
    red(faults::link_deleted_restored(&mesh), "has nothing of a mesh");
    plant_mesh_link(&mesh, 0);
    red(faults::link_deleted_restored(&mesh), "- mesh0 up");
}

#[test]
fn a_link_that_outlives_its_agent_is_red() {
    if enter_or_skip("a_link_that_outlives_its_agent_is_red") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut mesh = idle_mesh(dir.path());
    plant_mesh_link(&mesh, 1);
    red(faults::agent_restart_without_server(&mut mesh), "mesh0 of n2 to go");
}

#[test]
fn leftovers_are_named() {
    if enter_or_skip("leftovers_are_named") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut mesh = idle_mesh(dir.path());
    red(traces::boolean_off(&mut mesh), "owned nothing before");
    plant_mesh_link(&mesh, 2);
    red(traces::boolean_off(&mut mesh), "+ link mesh0");
    red(traces::nothing_left_behind(&mut mesh), "+ route v4 table 818");
}

#[test]
fn a_node_with_more_or_less_than_a_floor_is_red() {
    if enter_or_skip("a_node_with_more_or_less_than_a_floor_is_red") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mesh = idle_mesh(dir.path());
    let (node, peer) = (&mesh.nodes[0], &mesh.nodes[1]);
    red(life::floor_only(node), "has no floor");
    node.host.add_route(MESH_TABLE, "10.99.0.0/16".parse().unwrap(), &To::Unreachable).unwrap();
    red(life::floor_only(node), "has 0 rules");
    for family in [rtnetlink::IpVersion::V4, rtnetlink::IpVersion::V6] {
        node.host.add_rule(family, MESH_RULE, MESH_TABLE).unwrap();
    }
    life::floor_only(node).unwrap();
    let to: IpAddr = "10.99.0.1".parse().unwrap();
    first_unreachable(&node.host, to, b"x", Duration::from_millis(20), SOON).unwrap();
    let watched = |change: &dyn Fn()| {
        let watch = life::FloorWatch::start(node).unwrap();
        change();
        watch.stop().map(|changes| changes.to_string())
    };
    let floor = || node.host.routes(MESH_TABLE).unwrap().remove(0);
    let back = || {
        node.host.delete_route(floor()).unwrap();
        node.host.add_route(MESH_TABLE, "10.99.0.0/16".parse().unwrap(), &To::Unreachable).unwrap();
    };
    assert_eq!(watched(&|| ()).unwrap(), "0");
    red(watched(&back), "lost a route of its floor");
    let rule = || {
        node.host.delete_rule(node.host.rules_at(MESH_RULE).unwrap().remove(0)).unwrap();
        node.host.add_rule(rtnetlink::IpVersion::V4, MESH_RULE, MESH_TABLE).unwrap();
    };
    red(watched(&rule), "lost its rule");
    let gateway = To::Gateway("10.0.1.1".parse().unwrap());
    node.host.add_route(MESH_TABLE, "10.98.0.0/16".parse().unwrap(), &gateway).unwrap();
    red(life::floor_only(node), "more than a floor");

    let marker = mesh.marker("unanswered").unwrap();
    let pings = life::Pings::between(node, peer, &marker).unwrap();
    red(pings.stop().map(|sent| sent.to_string()), "was never answered");

    let host = &mesh.nodes[2];
    life::wait_nothing_owned(&mesh, host).unwrap();
    host.host.add_nft_table("meshspan").unwrap();
    assert!(host.host.nft_tables().unwrap().contains("inet meshspan"));
    let kept = life::wait_nothing_owned(&mesh, host).map(|()| String::new());
    red(kept, "+ nftables inet meshspan");
    host.host.delete_nft_table("meshspan").unwrap();
    life::wait_nothing_owned(&mesh, host).unwrap();
}

#[test]
fn a_demo_that_cannot_start_fails_every_check() {
    if enter_or_skip("a_demo_that_cannot_start_fails_every_check") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let binaries = stand_ins(dir.path(), "#!/bin/sh\necho the port is taken >&2\nexit 1\n");
    let options = demo::Options { json: true, keep: false, cold_starts: 1, rp_filter: 0 };
    let (report, kept) = demo::run(&binaries, options);
    assert!(!report.ok() && kept.is_none());
    assert_eq!(report.checks.iter().map(|check| check.name).collect::<Vec<_>>(), demo::report::CHECKS);
    assert!(report.checks.iter().all(|check| !check.ok), "{}", report.json());
    let why = &report.checks[0].detail;
    assert!(why.contains("the port is taken"), "{why}");
}
