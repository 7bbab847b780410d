//! Servers that die, change their key, or are behind a firewall: the mesh lives on and takes in new nodes.

use std::time::{Duration, Instant};

use netns_tests::{
    Mesh, MeshOptions,
    checks::{
        carry, cold_start, faults,
        life::{pass, wait_connected},
    },
    mesh::{config::ServerAddress, enter_or_skip, node::Node},
    traffic::UdpStream,
    wait,
};

const TTL: Duration = Duration::from_secs(5);
/// The longest pause between attempts and one attempt that fails.
const RECONNECTS_WITHIN: Duration = Duration::from_secs(40);
const JOINS_WITHIN: Duration = Duration::from_secs(5);
const PACKETS_PER_SECOND: u32 = 200;
const SESSION_PORT: u16 = 7443;
/// Before all rules that the kernel makes for itself.
const FIRST: u32 = 1;
/// A session over TCP stands within this where UDP is blocked, and the mesh as fast as ever after it (DESIGN.md 8).
const BLOCKED_COLD_START_MS: u64 = 2000 + 1500;

fn options(nodes: usize) -> MeshOptions {
    MeshOptions { nodes, pods_per_node: 1, ttl: Some(TTL), ..MeshOptions::default() }
}

/// Numbered packets around the ring of the first three nodes; stopping counts the lost ones.
struct Ring(Vec<UdpStream>);

impl Ring {
    fn start(mesh: &Mesh) -> Self {
        let marker = mesh.marker("ring").unwrap();
        let stream = |index: usize| {
            let (from, to) = (&mesh.nodes[index].pods[0], &mesh.nodes[(index + 1) % 3].pods[0]);
            carry::replies(&[(&from.host, to.v6.into())], marker.bytes(), JOINS_WITHIN).unwrap();
            UdpStream::start(&from.host, &to.host, to.v6.into(), PACKETS_PER_SECOND, marker.bytes()).unwrap()
        };
        Self((0..3).map(stream).collect())
    }

    fn none_lost(self) {
        for stream in self.0 {
            let totals = stream.stop().unwrap();
            assert!(totals.sent > u64::from(PACKETS_PER_SECOND), "{totals:?}");
            assert_eq!(totals.lost, 0, "{totals:?}");
        }
    }
}

/// How often each of these nodes got a session. `status` may show a dead one as connected until the next keepalive.
fn sessions(mesh: &Mesh, members: &[usize]) -> Vec<usize> {
    let of = |member: &usize| mesh.nodes[*member].log().unwrap().matches("connected to discovery server").count();
    members.iter().map(of).collect()
}

fn wait_new_sessions(mesh: &Mesh, members: &[usize], before: &[usize]) {
    for (place, member) in members.iter().enumerate() {
        let again = wait::until_true("a new session with the server", RECONNECTS_WITHIN, || {
            Ok(sessions(mesh, members)[place] > before[place])
        });
        println!("connected again after {:?}", mesh.nodes[*member].explain(again).unwrap());
    }
}

/// A node that was not there before reaches these nodes and is reached by them.
fn joins(mesh: &mut Mesh, node: usize, members: &[usize]) {
    let start = Instant::now();
    mesh.nodes[node].start().unwrap();
    let own = wait::until("the new node to list its peers", JOINS_WITHIN, || {
        let status = mesh.nodes[node].status()?;
        let complete = status.peers.iter().filter(|peer| peer.overlay_v4.is_some()).count();
        let own = status.node.overlay_v4.zip(status.node.overlay_v6);
        Ok(own.filter(|_| complete == members.len()))
    });
    mesh.nodes[node].overlay = Some(mesh.nodes[node].explain(own).unwrap().0);
    let marker = mesh.marker("joins").unwrap();
    let new = &mesh.nodes[node];
    let mut pings = Vec::new();
    for member in members {
        let member = &mesh.nodes[*member];
        pings.push((&new.pods[0].host, member.pods[0].v4.into()));
        pings.push((&new.host, member.overlay_v6().unwrap()));
    }
    carry::replies(&pings, marker.bytes(), JOINS_WITHIN).unwrap();
    for member in members {
        let member = &mesh.nodes[*member];
        // Its prefixes must be known there before a packet is sent, or it would leave in clear by right.
        wait::until_true("a member to list the new node", JOINS_WITHIN, || {
            Ok(member.status()?.peers.iter().any(|peer| peer.host_name == new.name() && peer.overlay_v4.is_some()))
        })
        .unwrap();
        let back = [(&member.host, new.overlay_v4().unwrap()), (&member.pods[0].host, new.pods[0].v6.into())];
        carry::replies(&back, marker.bytes(), JOINS_WITHIN).unwrap();
    }
    println!("{} joined after {:?}", new.name(), start.elapsed());
}

#[test]
fn a_server_that_comes_back_is_found_and_another_key_is_refused() {
    let Some(binaries) = enter_or_skip("a_server_that_comes_back_is_found_and_another_key_is_refused").unwrap() else {
        return;
    };
    let mut mesh = Mesh::build(&binaries, &options(4)).unwrap();
    mesh.send_controls("start").unwrap();
    mesh.start_server().unwrap();
    let members = [0, 1, 2];
    members.iter().for_each(|member| mesh.nodes[*member].start().unwrap());
    mesh.wait_until_formed_of(&members, Duration::from_secs(30)).unwrap();

    // The same server: killed, gone for longer than its TTL, back.
    let ring = Ring::start(&mesh);
    let pin = mesh.nodes[0].config.discovery[0].pin.clone();
    let before = sessions(&mesh, &members);
    mesh.server.crash().unwrap();
    pass(TTL + Duration::from_secs(1)).unwrap();
    let address = mesh.server.start().unwrap();
    assert_eq!(address.pin, pin, "a restart keeps the key");
    wait_new_sessions(&mesh, &members, &before);
    ring.none_lost();
    joins(&mut mesh, 3, &members);

    // An impostor at the same address.
    mesh.wait_until_formed().unwrap();
    let ring = Ring::start(&mesh);
    mesh.server.crash().unwrap();
    mesh.server.forget_key().unwrap();
    let impostor = mesh.server.start().unwrap();
    assert_ne!(impostor.pin, pin);
    let words = format!("has key {}", impostor.pin);
    for node in &mesh.nodes {
        let told = wait::until_true("status to name the wrong key", RECONNECTS_WITHIN, || {
            let status = node.status()?;
            Ok(status.servers[0].state != "connected"
                && status.servers[0].detail.contains(&words)
                && status.node.problems.iter().any(|problem| problem.what.contains(&words)))
        });
        node.explain(told).unwrap();
        assert!(node.log().unwrap().contains(&words), "the log of {} does not say {words}", node.name());
    }
    ring.none_lost();
    println!("{}", faults::agent_restart_without_server(&mut mesh).unwrap());
    println!("{}", carry::no_cleartext(&mut mesh).unwrap());
}

#[test]
fn with_two_servers_either_may_die() {
    let Some(binaries) = enter_or_skip("with_two_servers_either_may_die").unwrap() else { return };
    let mut mesh = Mesh::build(&binaries, &options(5)).unwrap();
    let mut other = mesh.another_server(&binaries).unwrap();
    mesh.start_server().unwrap();
    let first = mesh.nodes[0].config.discovery[0].clone();
    let second = other.start().unwrap();
    for (index, node) in mesh.nodes.iter_mut().enumerate() {
        node.config.discovery = match index {
            3 => vec![second.clone()],
            4 => vec![first.clone()],
            _ => vec![first.clone(), second.clone()],
        };
        node.write_config().unwrap();
    }
    let members = [0, 1, 2];
    members.iter().for_each(|member| mesh.nodes[*member].start().unwrap());
    mesh.wait_until_formed_of(&members, Duration::from_secs(30)).unwrap();
    for member in members {
        wait_connected(&mesh.nodes[member], JOINS_WITHIN).unwrap();
    }

    let ring = Ring::start(&mesh);
    mesh.server.crash().unwrap();
    joins(&mut mesh, 3, &members);
    pass(TTL + Duration::from_secs(1)).unwrap();
    ring.none_lost();
    let before = sessions(&mesh, &members);
    mesh.server.start().unwrap();
    wait_new_sessions(&mesh, &members, &before);

    let ring = Ring::start(&mesh);
    other.crash().unwrap();
    joins(&mut mesh, 4, &members);
    pass(TTL + Duration::from_secs(1)).unwrap();
    ring.none_lost();
    // The node whose only server died keeps its peers.
    let marker = mesh.marker("kept").unwrap();
    let kept: Vec<_> =
        members.iter().map(|member| (&mesh.nodes[3].host, mesh.nodes[*member].overlay_v4().unwrap())).collect();
    carry::replies(&kept, marker.bytes(), JOINS_WITHIN).unwrap();
}

#[test]
fn where_udp_to_the_server_is_blocked_the_session_takes_tcp() {
    let Some(binaries) = enter_or_skip("where_udp_to_the_server_is_blocked_the_session_takes_tcp").unwrap() else {
        return;
    };
    let mut mesh = Mesh::build(&binaries, &options(2)).unwrap();
    let fresh = cold_start::make_identity(&mut mesh, 1).unwrap();
    mesh.internet.swallow_udp(FIRST, SESSION_PORT).unwrap();
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    println!("formed after {:?}", mesh.wait_until_formed().unwrap());
    for node in &mesh.nodes {
        let server = &node.status().unwrap().servers[0];
        assert_eq!((server.state.as_str(), server.carrier.as_deref()), ("connected", Some("websocket")));
    }
    carry::node_to_node_v6(&mesh).unwrap();
    carry::pod_to_pod(&mesh).unwrap();
    let starts = cold_start::cold_starts(&mut mesh, &fresh, 3).unwrap();
    println!("{starts:?}");
    assert!(starts.max <= BLOCKED_COLD_START_MS, "{starts:?}");
    // Nothing came through on UDP: with the block gone, a new start takes QUIC again.
    let rule = mesh.internet.rules_at(FIRST).unwrap().remove(0);
    mesh.internet.delete_rule(rule).unwrap();
    mesh.nodes[0].stop().unwrap();
    mesh.nodes[0].start().unwrap();
    wait::until_true("QUIC to carry the session", JOINS_WITHIN, || {
        Ok(mesh.nodes[0].status()?.servers[0].carrier.as_deref() == Some("quic"))
    })
    .unwrap();
}

#[test]
fn a_reload_with_another_pin_ends_the_session_and_the_right_one_brings_it_back() {
    let name = "a_reload_with_another_pin_ends_the_session_and_the_right_one_brings_it_back";
    let Some(binaries) = enter_or_skip(name).unwrap() else { return };
    let mut mesh = Mesh::start(&binaries, &options(3)).unwrap();
    let ring = Ring::start(&mesh);
    let node = &mut mesh.nodes[0];
    let reload = |node: &mut Node, server: ServerAddress| {
        node.config.discovery = vec![server];
        node.write_config().unwrap();
        node.reload().unwrap();
    };
    let good = node.config.discovery[0].clone();
    let wrong = ServerAddress { pin: format!("sha256:{}", "5a".repeat(32)), ..good.clone() };
    reload(node, wrong.clone());
    let told = wait::until_true("status to name the wrong pin", JOINS_WITHIN, || {
        let server = node.status()?.servers.remove(0);
        Ok(server.state != "connected"
            && server.detail.contains(&format!("has key {}, the configuration expects {}", good.pin, wrong.pin)))
    });
    node.explain(told).unwrap();
    // It goes on trying, and never without the pin.
    pass(Duration::from_secs(3)).unwrap();
    assert_ne!(node.status().unwrap().servers[0].state, "connected");
    assert_eq!(sessions(&mesh, &[0]), [1]);
    let node = &mut mesh.nodes[0];
    reload(node, good);
    println!("connected again after {:?}", wait_connected(node, RECONNECTS_WITHIN).unwrap());
    assert_eq!(sessions(&mesh, &[0]), [2]);
    ring.none_lost();
}
