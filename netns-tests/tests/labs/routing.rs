//! Where packets go, asked from the kernel and from the packets themselves: tables and marks, prefixes that clash, overlap
//! or are too wide, peers that are down or denied, and underlays of one family.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use ipnet::IpNet;
use mesh_common::key::WgSecret;
use netns_tests::{
    Host, Mesh, MeshOptions,
    checks::carry,
    link::{MAIN_TABLE, To, connect},
    mesh::{MESH_LINK, MESH_TABLE, OWN_MARK, UPLINK, config::NodeConfig, enter_or_skip, node::Node},
    traffic::{EchoStream, UdpStream, first_reply},
    wait,
};
use nix::sys::socket::{getsockopt, sockopt::TcpMaxSeg};
use rtnetlink::IpVersion;
use serde_json::Value;

const EVERY: Duration = Duration::from_millis(20);
const SOON: Duration = Duration::from_secs(10);
/// Packets to a peer that died before its session counts as dead (15 s), and then demand in vain (10 s), with some slack.
const DOWN_WITHIN: Duration = Duration::from_secs(60);
/// An address that no host of the lab has unless a test says so.
const FAR: &str = "203.0.113.1";

fn ping(from: &Host, to: IpAddr) {
    first_reply(from, to, b"routing", EVERY, SOON).unwrap();
}

fn start(nodes: usize, pods_per_node: usize, tweak: fn(usize, &mut NodeConfig), name: &str) -> Option<Mesh> {
    let binaries = enter_or_skip(name).unwrap()?;
    let options = MeshOptions { nodes, pods_per_node, tweak, ..MeshOptions::default() };
    Some(Mesh::start(&binaries, &options).unwrap())
}

/// What `status` says of a prefix that a peer announces.
fn verdict(node: &Node, peer: &str, prefix: &str) -> anyhow::Result<Option<Value>> {
    let status = node.status_json()?;
    let peers = status["peers"].as_array().unwrap();
    Ok(peers
        .iter()
        .filter(|listed| listed["host_name"] == peer)
        .flat_map(|listed| listed["prefixes"].as_array().unwrap())
        .find(|listed| listed["prefix"] == prefix)
        .cloned())
}

fn wait_verdict(node: &Node, peer: &str, prefix: &str, state: &str) -> Value {
    let what = format!("{} to call {prefix} of {peer} {state}", node.name());
    let seen =
        wait::until(&what, SOON, || Ok(verdict(node, peer, prefix)?.filter(|verdict| verdict["state"] == state)));
    node.explain(seen).unwrap().0
}

fn wait_peers(node: &Node, count: usize) {
    let what = format!("{} to list {count} peers", node.name());
    let seen = wait::until_true(&what, SOON, || Ok(node.status()?.peers.len() == count));
    node.explain(seen).unwrap();
}

fn counter(node: &Node, name: &str) -> u64 {
    node.status_json().unwrap()["counters"][name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
}

#[test]
fn user_traffic_takes_the_table_and_own_sockets_do_not() {
    let Some(mesh) = start(2, 1, |_, _| {}, "user_traffic_takes_the_table_and_own_sockets_do_not") else {
        return;
    };
    let (from, to) = (&mesh.nodes[0], &mesh.nodes[1]);
    let pod = &to.pods[0];
    let targets = [to.overlay_v4().unwrap(), to.overlay_v6().unwrap(), to.address, pod.v4.into(), pod.v6.into()];
    for target in targets {
        wait::until_true("the route", SOON, || Ok(from.host.lookup(target, 0)?.link.as_deref() == Some(MESH_LINK)))
            .unwrap();
        // The marks of nobody, of kube-proxy, and of Cilium with a cluster id that has our bit.
        for mark in [0, 0x4000, 0xf10] {
            let hop = from.host.lookup(target, mark).unwrap();
            assert_eq!(
                (hop.link.as_deref(), hop.table),
                (Some(MESH_LINK), Some(MESH_TABLE)),
                "{target} with mark {mark:#x}: {hop:?}"
            );
        }
        for mark in [OWN_MARK, OWN_MARK | 0x4000] {
            let hop = from.host.lookup(target, mark).unwrap();
            assert_ne!(hop.link.as_deref(), Some(MESH_LINK), "{target} with mark {mark:#x}");
            assert_ne!(hop.table, Some(MESH_TABLE), "{target} with mark {mark:#x}");
        }
    }
}

#[test]
fn a_server_on_a_mesh_node_is_reached_by_all_and_by_itself() {
    let name = "a_server_on_a_mesh_node_is_reached_by_all_and_by_itself";
    let Some(binaries) = enter_or_skip(name).unwrap() else {
        return;
    };
    let mut mesh = Mesh::build(&binaries, &MeshOptions { pods_per_node: 0, ..MeshOptions::default() }).unwrap();
    mesh.server.host = mesh.nodes[0].host.clone();
    mesh.server.address = mesh.nodes[0].address;
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    let address = mesh.server.address;
    for node in &mesh.nodes[1..] {
        assert_eq!(node.host.lookup(address, 0).unwrap().link.as_deref(), Some(MESH_LINK));
        ping(&node.host, address);
    }
    // Every session is opened anew while the mesh's routes cover the server's address.
    mesh.server.crash().unwrap();
    mesh.server.start().unwrap();
    for node in &mesh.nodes {
        let connected = wait::until_true("another session", Duration::from_secs(40), || {
            Ok(node.log()?.matches("connected to discovery server").count() == 2)
        });
        node.explain(connected).unwrap();
    }
    // A farewell goes through the server to both others, and so does the return.
    mesh.nodes[2].set_enabled(false).unwrap();
    wait_peers(&mesh.nodes[0], 1);
    wait_peers(&mesh.nodes[1], 1);
    mesh.nodes[2].set_enabled(true).unwrap();
    mesh.wait_until_formed().unwrap();
    carry::node_to_node_v6(&mesh).unwrap();
}

#[test]
fn a_shared_lan_carries_the_tunnel_and_keeps_its_own_addresses() {
    let name = "a_shared_lan_carries_the_tunnel_and_keeps_its_own_addresses";
    let Some(binaries) = enter_or_skip(name).unwrap() else {
        return;
    };
    let options = MeshOptions { nodes: 2, pods_per_node: 1, ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    connect(&mesh.nodes[0].host, "lan0", &mesh.nodes[1].host, "lan0").unwrap();
    for (number, node) in mesh.nodes.iter().enumerate() {
        let address = format!("192.168.7.{}/24", number + 1);
        node.host.add_address("lan0", address.parse().unwrap()).unwrap();
    }
    // Between their sites there is no way.
    for (node, prefixes) in
        mesh.nodes.iter().zip([["10.0.2.0/24", "2001:db8:2::/64"], ["10.0.1.0/24", "2001:db8:1::/64"]])
    {
        for prefix in prefixes {
            node.host.add_route(MAIN_TABLE, prefix.parse().unwrap(), &To::Unreachable).unwrap();
        }
    }
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    let [a, b] = &mesh.nodes[..] else { panic!("two nodes") };

    // What the LAN reaches is not taken from it.
    let overlap = wait_verdict(a, "n2", "192.168.7.2/32", "local-overlap");
    assert_eq!(overlap["detail"], "this node reaches 192.168.7.0/24 on lan0 without the mesh");
    assert_eq!(verdict(a, "n2", "10.0.2.2/32").unwrap().unwrap()["state"], "routed");
    let neighbour: IpAddr = "192.168.7.2".parse().unwrap();
    assert_eq!(a.host.lookup(neighbour, 0).unwrap().link.as_deref(), Some("lan0"));
    ping(&a.host, neighbour);
    assert_eq!(a.status_json().unwrap()["node"]["state"], "running", "an overlap is no error");

    let pod = &b.pods[0];
    ping(&a.pods[0].host, pod.v4.into());
    ping(&b.pods[0].host, a.pods[0].v6.into());
    assert_eq!(a.status_json().unwrap()["peers"][0]["endpoint"], "192.168.7.2:51872");
    let on_sites: u64 = mesh.counts().iter().map(|(_, seen)| seen.wireguard).sum();
    assert_eq!(on_sites, 0, "WireGuard packets on the sites' links");
}

#[test]
fn a_prefix_of_two_nodes_stays_with_the_first_until_it_leaves() {
    const PREFIX: &str = "10.77.0.0/24";
    let name = "a_prefix_of_two_nodes_stays_with_the_first_until_it_leaves";
    let Some(binaries) = enter_or_skip(name).unwrap() else {
        return;
    };
    let announce = |index: usize, config: &mut NodeConfig| {
        if index < 2 {
            config.more_mesh.push(format!("extraPrefixes: [\"{PREFIX}\"]"));
        }
    };
    let options = MeshOptions { pods_per_node: 0, tweak: announce, ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    mesh.start_server().unwrap();
    let [incumbent, newcomer, other] = &mut mesh.nodes[..] else { panic!("three nodes") };
    let behind: IpAddr = "10.77.0.1".parse().unwrap();
    incumbent.host.add_address("lo", IpNet::from(behind)).unwrap();
    incumbent.start().unwrap();
    other.start().unwrap();
    wait_verdict(other, "n1", PREFIX, "routed");
    ping(&other.host, behind);

    let stream = UdpStream::start(&other.host, &incumbent.host, behind, 200, b"to the incumbent").unwrap();
    for round in 0..3 {
        if round > 0 {
            newcomer.crash().unwrap();
        }
        newcomer.start().unwrap();
        wait_verdict(newcomer, "n1", PREFIX, "routed");
        wait_verdict(incumbent, "n2", PREFIX, "owned-by-other");
        wait_verdict(other, "n2", PREFIX, "owned-by-other");
        wait_verdict(other, "n1", PREFIX, "routed");
        ping(&newcomer.host, behind);
        // A verdict may be of the newcomer's former life: time for its new record to go round.
        let sent = stream.sent() + 400;
        wait::until_true("400 packets", SOON, || Ok(stream.sent() >= sent)).unwrap();
        wait_verdict(other, "n2", PREFIX, "owned-by-other");
        wait_verdict(other, "n1", PREFIX, "routed");
    }
    let totals = stream.stop().unwrap();
    assert_eq!((totals.lost, totals.refused), (0, 0), "{totals:?}");

    let behind: IpAddr = "10.77.0.2".parse().unwrap();
    newcomer.host.add_address("lo", IpNet::from(behind)).unwrap();
    incumbent.down().unwrap();
    wait_verdict(other, "n2", PREFIX, "routed");
    ping(&other.host, behind);
}

#[test]
fn wide_prefixes_are_refused_unless_allowed_and_never_take_the_lan() {
    let announce = |index: usize, config: &mut NodeConfig| {
        if index == 0 {
            config.more_mesh.push("extraPrefixes: [\"0.0.0.0/0\", \"200.0.0.0/6\"]".into());
        }
        if index != 1 {
            config.more_mesh.push("allowWidePrefixes: true".into());
        }
    };
    let Some(mesh) = start(3, 0, announce, "wide_prefixes_are_refused_unless_allowed_and_never_take_the_lan") else {
        return;
    };
    let far: IpAddr = FAR.parse().unwrap();
    mesh.internet.add_address("lo", IpNet::from(far)).unwrap();
    // The way back to whoever asks through the first node.
    mesh.internet.add_route(MAIN_TABLE, "198.19.0.0/16".parse().unwrap(), &To::Gateway(mesh.nodes[0].address)).unwrap();
    let [gateway, strict, open] = &mesh.nodes[..] else { panic!("three nodes") };

    let default = wait_verdict(strict, "n1", "0.0.0.0/0", "refused");
    assert_eq!(default["detail"], "it is a default route");
    let wide = wait_verdict(strict, "n1", "200.0.0.0/6", "refused");
    assert_eq!(wide["detail"], "it is wider than /8 (IPv4) or /16 (IPv6)");
    assert_eq!(strict.host.lookup(far, 0).unwrap().link.as_deref(), Some(UPLINK));

    wait_verdict(open, "n1", "0.0.0.0/0", "routed");
    wait_verdict(open, "n1", "200.0.0.0/6", "routed");
    wait::until_true("the default route", SOON, || Ok(open.host.lookup(far, 0)?.link.as_deref() == Some(MESH_LINK)))
        .unwrap();
    ping(&open.host, far);
    let lan: IpAddr = "10.0.3.1".parse().unwrap();
    assert_eq!(open.host.lookup(lan, 0).unwrap().link.as_deref(), Some(UPLINK));
    ping(&open.host, lan);
    for (a, b) in [(open, gateway), (open, strict), (strict, gateway)] {
        ping(&a.host, b.overlay_v4().unwrap());
    }
}

#[test]
fn foreign_sources_are_dropped_and_denied_nodes_are_strangers() {
    let Some(mut mesh) = start(3, 0, |_, _| {}, "foreign_sources_are_dropped_and_denied_nodes_are_strangers") else {
        return;
    };
    let [a, b, _] = &mesh.nodes[..] else { panic!("three nodes") };
    let far: IpAddr = FAR.parse().unwrap();
    a.host.add_address("lo", IpNet::from(far)).unwrap();
    let overlay = b.overlay_v4().unwrap();
    ping(&a.host, overlay);
    let inbox = b.host.inside(|| Ok(UdpSocket::bind((overlay, 0))?)).unwrap();
    let target = inbox.local_addr().unwrap();
    let send = |source: IpAddr, text: &[u8]| {
        a.host
            .inside(|| {
                let socket = UdpSocket::bind((source, 0))?;
                Ok(socket.send_to(text, target)?)
            })
            .unwrap();
    };
    let before = counter(b, "drop_in_foreign_source");
    send(far, b"not mine");
    send(a.overlay_v4().unwrap(), b"mine");
    inbox.set_read_timeout(Some(SOON)).unwrap();
    let mut text = [0; 64];
    let (length, from) = inbox.recv_from(&mut text).unwrap();
    assert_eq!((&text[..length], from.ip()), (&b"mine"[..], a.overlay_v4().unwrap()));
    assert_eq!(counter(b, "drop_in_foreign_source"), before + 1);

    let denied = b.status().unwrap().node.id;
    let a = &mut mesh.nodes[0];
    a.config.more_mesh.push(format!("denyNodes: [\"{denied}\"]"));
    a.write_config().unwrap();
    a.reload().unwrap();
    wait_peers(a, 1);
    let [a, b, c] = &mesh.nodes[..] else { panic!("three nodes") };
    let to_a = EchoStream::start(&b.host, a.overlay_v6().unwrap(), b"denied".to_vec(), EVERY).unwrap();
    for (from, to) in [(a, c), (c, a), (b, c)] {
        ping(&from.host, to.overlay_v6().unwrap());
    }
    // One second of pings is enough: the others were answered at once.
    let start = std::time::Instant::now();
    wait::until_true("some pings", SOON, || Ok(start.elapsed() > Duration::from_secs(1))).unwrap();
    let totals = to_a.stop().unwrap();
    assert_eq!(totals.answered, 0, "{totals:?}");
    assert!(totals.sent > 10, "{totals:?}");
}

#[test]
fn forwarded_connections_learn_the_mtu_of_the_mesh() {
    let Some(mesh) = start(2, 2, |_, _| {}, "forwarded_connections_learn_the_mtu_of_the_mesh") else {
        return;
    };
    let (a, b) = (&mesh.nodes[0], &mesh.nodes[1]);
    let [near, beside, ..] = &a.pods[..] else { panic!("two pods") };
    let far = &b.pods[0];
    for (to, largest) in [(IpAddr::from(far.v4), 1380), (far.v6.into(), 1360)] {
        for (client, server, to) in [
            (&near.host, &far.host, to),
            (&far.host, &near.host, if to.is_ipv4() { near.v4.into() } else { near.v6.into() }),
        ] {
            ping(client, to);
            let (at_client, at_server) = segment_sizes(client, server, to);
            for size in [at_client, at_server] {
                assert!((1000..=largest).contains(&size), "segments of {size} bytes to {to}");
            }
        }
    }
    // The control: without the mesh between them pods use their whole link.
    let (at_client, at_server) = segment_sizes(&near.host, &beside.host, beside.v4.into());
    assert!(at_client > 1380 && at_server > 1380, "{at_client}, {at_server}");
}

/// The largest segment that each end of a new connection sends.
fn segment_sizes(client: &Host, server: &Host, to: IpAddr) -> (u32, u32) {
    let listener = server.inside(|| Ok(TcpListener::bind((to, 0))?)).unwrap();
    let target: SocketAddr = listener.local_addr().unwrap();
    let near = client.inside(|| Ok(TcpStream::connect_timeout(&target, SOON)?)).unwrap();
    let (far, _) = listener.accept().unwrap();
    (getsockopt(&near, TcpMaxSeg).unwrap(), getsockopt(&far, TcpMaxSeg).unwrap())
}

#[test]
fn a_peer_that_is_down_is_refused_or_bypassed_as_configured() {
    let bypass = |index: usize, config: &mut NodeConfig| {
        if index != 1 {
            config.more_mesh.push("allowDownPeerBypass: true".into());
        }
    };
    let Some(mut mesh) = start(3, 0, bypass, "a_peer_that_is_down_is_refused_or_bypassed_as_configured") else {
        return;
    };
    let target = mesh.nodes[2].address;
    for node in &mesh.nodes[..2] {
        wait_verdict(node, "n3", "10.0.3.2/32", "routed");
        ping(&node.host, target);
    }
    let (in_clear, kept) = (mesh.marker("bypass").unwrap(), mesh.marker("closed").unwrap());
    mesh.nodes[2].crash().unwrap();
    let [open, closed, _] = &mesh.nodes[..] else { panic!("three nodes") };
    let demand = EchoStream::start(&closed.host, target, kept.bytes().to_vec(), EVERY).unwrap();
    // Its host lives on and answers whoever comes without the mesh.
    let answered = first_reply(&open.host, target, in_clear.bytes(), EVERY, DOWN_WITHIN);
    open.explain(answered).unwrap();
    let hop = open.host.lookup(target, 0).unwrap();
    assert_eq!((hop.link.as_deref(), hop.table), (Some(UPLINK), Some(MAIN_TABLE)));
    let inside = mesh.nodes[2].overlay_v4().unwrap();
    let refused = wait::until_true("the peer to be unreachable", DOWN_WITHIN, || {
        Ok(closed.host.lookup(inside, 0)?.error.is_some())
    });
    closed.explain(refused).unwrap();
    // A prefix that holds the peer's endpoint stays in the tunnel: the kernel would drop the peer's own answers else.
    assert_eq!(closed.host.lookup(target, 0).unwrap().link.as_deref(), Some(MESH_LINK));
    wait::until_true("the sender to be told", SOON, || {
        let sent = closed.host.inside(|| {
            let socket = UdpSocket::bind(("0.0.0.0", 0))?;
            Ok(socket.send_to(b"refused", (inside, 9)).map_err(|error| error.raw_os_error()))
        })?;
        Ok(matches!(sent, Err(Some(libc::EHOSTUNREACH | libc::ENETUNREACH))))
    })
    .unwrap();
    let totals = demand.stop().unwrap();
    assert_eq!(totals.answered, 0, "{totals:?}");
    let counts = mesh.stop_captures().unwrap();
    let seen = |marker| counts.iter().map(|(_, counts)| counts.of(marker)).sum::<u64>();
    assert!(seen(&in_clear) > 0, "the control: what is bypassed is seen");
    assert_eq!(seen(&kept), 0, "the closed node leaked");
}

#[test]
fn an_underlay_of_ipv6_only_carries_both_families() {
    let name = "an_underlay_of_ipv6_only_carries_both_families";
    let Some(binaries) = enter_or_skip(name).unwrap() else {
        return;
    };
    let options = MeshOptions { nodes: 2, ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    let v6 = |number: usize| -> IpAddr { format!("2001:db8:{number}::2").parse().unwrap() };
    mesh.server.host.flush_addresses(UPLINK, IpVersion::V4).unwrap();
    mesh.server.address = v6(0);
    for (index, node) in mesh.nodes.iter_mut().enumerate() {
        node.host.flush_addresses(UPLINK, IpVersion::V4).unwrap();
        node.address = v6(index + 1);
    }
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    carry::node_to_node_v4(&mesh).unwrap();
    carry::node_to_node_v6(&mesh).unwrap();
    carry::pod_to_pod(&mesh).unwrap();
    carry::pod_to_node(&mesh).unwrap();
}

#[test]
fn a_static_peer_is_sought_where_a_reload_says() {
    const PORT: u16 = 51820;
    let name = "a_static_peer_is_sought_where_a_reload_says";
    let Some(binaries) = enter_or_skip(name).unwrap() else {
        return;
    };
    // Only the first node runs an agent; the device is expected on the second host, then on the third.
    let mut mesh = Mesh::build(&binaries, &MeshOptions { pods_per_node: 0, ..MeshOptions::default() }).unwrap();
    mesh.start_server().unwrap();
    let [node, before, after] = &mut mesh.nodes[..] else { panic!("three nodes") };
    let inbox = |host: &Host, at: IpAddr| {
        let socket = host.inside(|| Ok(UdpSocket::bind((at, PORT))?)).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    let (first, second) = (inbox(&before.host, before.address), inbox(&after.host, after.address));
    let expect_at = |node: &mut Node, endpoint: IpAddr| {
        node.config.more_mesh = vec![
            "staticPeers:".into(),
            format!("  - publicKey: \"{}\"", WgSecret::from_seed(&[7; 32]).public()),
            "    allowedIPs: [\"10.50.0.1/32\"]".into(),
            format!("    endpoint: {endpoint}:{PORT}"),
            "    keepalive: 1s".into(),
        ];
        node.write_config().unwrap();
    };
    expect_at(node, before.address);
    node.start().unwrap();
    wait_initiation(node, &first);
    assert!(!is_initiation(&second));

    expect_at(node, after.address);
    node.reload().unwrap();
    wait_initiation(node, &second);
    while is_initiation(&first) {}
    wait_initiation(node, &second);
    assert!(!is_initiation(&first), "the old endpoint is still sought");
    node.check_running().unwrap();
}

fn wait_initiation(node: &Node, inbox: &UdpSocket) {
    let heard = wait::until_true("a handshake initiation", 2 * SOON, || Ok(is_initiation(inbox)));
    node.explain(heard).unwrap();
}

/// Whether the next datagram, if there is one, begins a WireGuard handshake.
fn is_initiation(inbox: &UdpSocket) -> bool {
    let mut datagram = [0; 2048];
    inbox.recv(&mut datagram).is_ok_and(|length| length == 148 && datagram.starts_with(&[1, 0, 0, 0]))
}
