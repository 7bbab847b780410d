//! Stop, start, leave, come back; and whatever someone deletes meanwhile. Real agents, judged by packets and kernel dumps.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use netns_tests::{
    Host, Mesh, MeshOptions,
    checks::{
        carry,
        life::{FloorWatch, Pings, floor_only, wait_connected, wait_nothing_owned},
        traces,
    },
    link::To,
    mesh::{MESH_LINK, MESH_RULE, MESH_TABLE, enter_or_skip, node::Node},
    traffic::first_unreachable,
    wait,
};

const EVERY: Duration = Duration::from_millis(20);
const TTL: Duration = Duration::from_secs(5);
/// A restarted agent rejoins within this, and peers learn of a departure at once.
const REJOIN_WITHIN: Duration = Duration::from_secs(5);
const AT_ONCE: Duration = Duration::from_secs(2);
/// WireGuard wants an answer after 15 s of silence; after 10 s more without one a peer is down, and packets to it are refused.
const DOWN_WITHIN: Duration = Duration::from_secs(30);
const RESTORED_WITHIN: Duration = Duration::from_secs(2);
/// A state directory that works again is written to within this.
const WRITTEN_WITHIN: Duration = Duration::from_secs(20);
/// A routing table that is nobody's.
const FLOODED_TABLE: u32 = 99;
const OWN_TABLE: &str = "inet meshspan";
/// The link of a second agent on a host.
const SECOND_LINK: &str = "mesh1";
/// A session that broke is noticed, or made anew, within this.
const RECONNECTS_WITHIN: Duration = Duration::from_secs(40);

fn options() -> MeshOptions {
    MeshOptions { pods_per_node: 1, ttl: Some(TTL), ..MeshOptions::default() }
}

/// Which node this is to its peers: its id and its overlay addresses.
fn who(mesh: &Mesh, node: usize) -> (String, Option<Ipv4Addr>, Option<Ipv6Addr>) {
    let node = mesh.nodes[node].status().unwrap().node;
    (node.id, node.overlay_v4, node.overlay_v6)
}

fn all_answer(mesh: &Mesh) {
    carry::node_to_node_v4(mesh).unwrap();
    carry::node_to_node_v6(mesh).unwrap();
    carry::pod_to_pod(mesh).unwrap();
}

#[test]
fn a_node_stops_starts_leaves_and_comes_back_as_itself() {
    let Some(binaries) = enter_or_skip("a_node_stops_starts_leaves_and_comes_back_as_itself").unwrap() else { return };
    let mut mesh = Mesh::build(&binaries, &options()).unwrap();
    for node in &mesh.nodes {
        // The test pings all the time, and the kernel would ration what it says to that.
        node.host.set_sysctl("ipv4/icmp_ratelimit", "0").unwrap();
        node.host.set_sysctl("ipv6/icmp/ratelimit", "0").unwrap();
    }
    mesh.take_baseline().unwrap();
    mesh.send_controls("start").unwrap();
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    all_answer(&mesh);

    // SIGTERM: the floor answers for the agent, on the node and, once they notice, on its peers.
    let marker = mesh.marker("restart").unwrap();
    let before = who(&mesh, 1);
    let pings = Pings::between(&mesh.nodes[0], &mesh.nodes[1], &marker).unwrap();
    mesh.nodes[1].stop().unwrap();
    println!("stopped: {}", floor_only(&mesh.nodes[1]).unwrap());
    let (peer, node) = (&mesh.nodes[0], &mesh.nodes[1]);
    let refused = |from: &Host, to: IpAddr, within| first_unreachable(from, to, marker.bytes(), EVERY, within).unwrap();
    for to in [peer.overlay_v4().unwrap(), peer.overlay_v6().unwrap(), peer.address] {
        refused(&node.host, to, AT_ONCE);
    }
    for to in peer.pods[0].addresses() {
        refused(&node.pods[0].host, to, AT_ONCE);
    }
    for to in node.pods[0].addresses() {
        println!("peers' pods are told after {:?}", refused(&peer.pods[0].host, to, DOWN_WITHIN));
    }
    assert!(floor_only(node).is_ok(), "the floor stays");
    let start = Instant::now();
    mesh.nodes[1].start().unwrap();
    carry::replies(
        &[
            (&mesh.nodes[1].host, mesh.nodes[0].overlay_v4().unwrap()),
            (&mesh.nodes[0].host, mesh.nodes[1].overlay_v6().unwrap()),
            (&mesh.nodes[0].pods[0].host, mesh.nodes[1].pods[0].v4.into()),
        ],
        marker.bytes(),
        REJOIN_WITHIN,
    )
    .unwrap();
    println!("back after {:?}", start.elapsed());
    mesh.wait_until_formed().unwrap();
    assert_eq!(who(&mesh, 1), before, "a restart changes nothing that peers know a node by");
    pings.stop().unwrap();

    // Leave: peers drop the node at once, nothing stays on it; `up` brings the same node back.
    let before = who(&mesh, 2);
    mesh.nodes[2].leave().unwrap();
    let left = mesh.wait_until_formed_of(&[0, 1], AT_ONCE).unwrap();
    println!("peers dropped the node {left:?} after `leave` returned");
    wait_nothing_owned(&mesh, &mesh.nodes[2]).unwrap();
    carry::replies(&[(&mesh.nodes[0].host, mesh.nodes[1].overlay_v4().unwrap())], marker.bytes(), AT_ONCE).unwrap();
    mesh.nodes[2].up().unwrap();
    mesh.wait_until_formed().unwrap();
    assert_eq!(who(&mesh, 2), before);
    all_answer(&mesh);

    println!("{}", carry::no_cleartext(&mut mesh).unwrap());
    // One agent dies before: what it leaves is removed without it.
    mesh.nodes[0].crash().unwrap();
    println!("{}", traces::nothing_left_behind(&mut mesh).unwrap());
}

#[test]
fn whatever_is_deleted_or_changed_is_put_back() {
    let Some(binaries) = enter_or_skip("whatever_is_deleted_or_changed_is_put_back").unwrap() else { return };
    let mut mesh = Mesh::start(&binaries, &options()).unwrap();
    all_answer(&mesh);
    let node = &mesh.nodes[0];
    let whole = traces::mesh_state(node).unwrap();
    let marker = mesh.marker("deleted").unwrap();
    // While a rule is missing the kernel sends in clear, so packets are sent only when all is back.
    let back = |what: &str| {
        let took = node.explain(traces::wait_same_state(node, &whole, RESTORED_WITHIN));
        let took = took.unwrap_or_else(|error| panic!("{what}: {error:#}"));
        let peer = &mesh.nodes[1];
        let all = [
            (&node.host, peer.overlay_v4().unwrap()),
            (&node.host, peer.overlay_v6().unwrap()),
            (&peer.pods[0].host, node.pods[0].v6.into()),
        ];
        carry::replies(&all, marker.bytes(), REJOIN_WITHIN).unwrap_or_else(|error| panic!("after {what}: {error:#}"));
        took
    };
    let routes = node.host.routes(MESH_TABLE).unwrap();
    let count = routes.len();
    assert!(count >= 8, "two peers have more than {count} routes");
    let mut slowest = Duration::ZERO;
    for route in routes {
        let what = format!("{route:?}");
        node.host.delete_route(route).unwrap();
        slowest = slowest.max(back(&what));
    }
    println!("{count} routes, each back after {slowest:?} at most");
    let rules = node.host.rules_at(MESH_RULE).unwrap();
    assert_eq!(rules.len(), 2);
    for rule in rules {
        node.host.delete_rule(rule).unwrap();
        println!("rule back after {:?}", back("a rule was deleted"));
    }
    for address in [node.overlay_v4().unwrap(), node.overlay_v6().unwrap()] {
        node.host.delete_address(MESH_LINK, address).unwrap();
        println!("{address} back after {:?}", back("an address was deleted"));
    }
    node.host.set_mtu(MESH_LINK, 1300).unwrap();
    println!("MTU back after {:?}", back("the MTU was changed"));
    node.host.set_up(MESH_LINK, false).unwrap();
    println!("link up again after {:?}", back("the link was set down"));
    for _ in 0..3 {
        node.host.delete_link(MESH_LINK).unwrap();
        println!("link back after {:?}", back("the link was deleted"));
    }
    for _ in 0..2 {
        assert!(node.host.nft_tables().unwrap().contains(OWN_TABLE));
        node.host.delete_nft_table("meshspan").unwrap();
        let table = wait::until_true("the packet filter table to be back", RESTORED_WITHIN, || {
            Ok(node.host.nft_tables()?.contains(OWN_TABLE))
        });
        println!("nftables back after {:?}", node.explain(table).unwrap());
    }
    back("all of it");

    // The state directory fails: said once, shown, and nothing else happens.
    let (state, away) = (node.state_dir(), node.state_dir().with_extension("away"));
    fs::rename(&state, &away).unwrap();
    fs::write(&state, "this is no directory").unwrap();
    let problem = |mesh: &Mesh| {
        let problems = mesh.nodes[0].status().unwrap().node.problems;
        problems.iter().any(|problem| problem.what.contains("state directory") && !problem.fix.is_empty())
    };
    assert!(!problem(&mesh));
    let (survivor, others) = mesh.nodes.split_first_mut().unwrap();
    for _ in 0..2 {
        // A restarted peer has a new record, which the node wants to keep.
        others[1].stop().unwrap();
        others[1].start().unwrap();
        carry::replies(&[(&survivor.host, others[1].overlay_v4().unwrap())], marker.bytes(), REJOIN_WITHIN).unwrap();
        wait::until_true("status to name the state directory", WRITTEN_WITHIN, || {
            let problems = survivor.status()?.node.problems;
            Ok(problems.iter().any(|problem| problem.what.contains("state directory")))
        })
        .unwrap();
    }
    survivor.check_running().unwrap();
    assert_eq!(survivor.log().unwrap().matches("goes on from memory").count(), 1, "{}", survivor.log().unwrap());
    all_answer(&mesh);
    fs::remove_file(&state).unwrap();
    fs::rename(&away, &state).unwrap();
    let written = wait::until_true("the state directory to be written again", WRITTEN_WITHIN, || Ok(!problem(&mesh)));
    println!("written again after {:?}", mesh.nodes[0].explain(written).unwrap());
}

#[test]
fn what_was_changed_in_a_flood_of_which_the_kernel_dropped_most_is_put_back() {
    let Some(binaries) =
        enter_or_skip("what_was_changed_in_a_flood_of_which_the_kernel_dropped_most_is_put_back").unwrap()
    else {
        return;
    };
    let mesh = Mesh::start(&binaries, &options()).unwrap();
    all_answer(&mesh);
    let node = &mesh.nodes[0];
    let whole = traces::mesh_state(node).unwrap();
    let lost_before = lost_notifications(&node.host);
    node.suspend().unwrap();
    for third in 0..=255 {
        for fourth in [1, 2, 3] {
            let destination = IpNet::new(Ipv4Addr::new(203, 0, third, fourth).into(), 32).unwrap();
            node.host.add_route(FLOODED_TABLE, destination, &To::Unreachable).unwrap();
        }
    }
    // After the socket of the agent is full: nobody tells it of these.
    for route in node.host.routes(MESH_TABLE).unwrap() {
        node.host.delete_route(route).unwrap();
    }
    assert!(lost_notifications(&node.host) > lost_before, "the kernel dropped nothing, so this proves nothing");
    node.resume().unwrap();
    let took = node.explain(traces::wait_same_state(node, &whole, RESTORED_WITHIN)).unwrap();
    println!("all routes back after {took:?}");
    all_answer(&mesh);
}

/// How many netlink messages the kernel could not deliver to sockets of this host, all of them together.
fn lost_notifications(host: &Host) -> u64 {
    let sockets = host.inside(|| Ok(fs::read_to_string("/proc/thread-self/net/netlink")?)).unwrap();
    let mut lines = sockets.lines();
    let place = lines.next().unwrap().split_whitespace().position(|column| column == "Drops").unwrap();
    lines.map(|line| line.split_whitespace().nth(place).unwrap().parse::<u64>().unwrap()).sum()
}

/// Waits until an agent answers and says that it is off.
fn wait_off(node: &Node) {
    let off = wait::until_true("the agent to be off", REJOIN_WITHIN, || Ok(node.status()?.node.state == "disabled"));
    node.explain(off).unwrap();
}

#[test]
fn a_start_switched_off_removes_what_the_last_run_left_and_nothing_of_another_agent() {
    let name = "a_start_switched_off_removes_what_the_last_run_left_and_nothing_of_another_agent";
    let Some(binaries) = enter_or_skip(name).unwrap() else { return };
    let mut mesh = Mesh::build(&binaries, &MeshOptions { nodes: 2, rp_filter: 1, ..options() }).unwrap();
    mesh.take_baseline().unwrap();
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    let mut second = mesh.another_agent(&binaries, 1).unwrap();

    for crash in [false, true] {
        let node = &mut mesh.nodes[1];
        if crash {
            node.crash().unwrap()
        } else {
            node.stop().unwrap()
        }
        floor_only(node).unwrap();
        // The floor of a stopped agent outlives the start of another one that is off.
        let watch = FloorWatch::start(node).unwrap();
        second.start().unwrap();
        wait_off(&second);
        second.explain(watch.stop()).unwrap();
        second.stop().unwrap();

        node.config.enabled = false;
        node.write_config().unwrap();
        node.start().unwrap();
        wait_off(node);
        wait_nothing_owned(&mesh, &mesh.nodes[1]).unwrap();
        mesh.nodes[1].up().unwrap();
        mesh.nodes[1].config.enabled = true;
        mesh.wait_until_formed().unwrap();
    }

    // The second agent was on and died, so what is on the host may be its own; but the first is on meanwhile.
    let node = &mut mesh.nodes[1];
    node.stop().unwrap();
    second.config.enabled = true;
    second.write_config().unwrap();
    second.start().unwrap();
    let on = wait::until_true("the second agent to have a link", REJOIN_WITHIN, || node.host.has_link(SECOND_LINK));
    second.explain(on).unwrap();
    second.crash().unwrap();
    node.start().unwrap();
    mesh.wait_until_formed().unwrap();
    all_answer(&mesh);
    let node = &mesh.nodes[1];
    let whole = traces::mesh_state(node).unwrap();
    let watch = FloorWatch::start(node).unwrap();
    second.config.enabled = false;
    second.write_config().unwrap();
    second.start().unwrap();
    wait_off(&second);
    assert!(second.log().unwrap().contains("an agent is on here, its link is mesh0"), "{}", second.log().unwrap());
    second.stop().unwrap();
    // Nor does the command, which knows the places of the second agent only.
    let refused = second.run_to_end(second.command("cleanup")).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("its link is mesh0: use `mesh-agent down`"), "{}", refused.stderr);
    node.explain(watch.stop()).unwrap();
    assert_eq!(traces::mesh_state(node).unwrap(), whole);
    assert!(node.host.nft_tables().unwrap().contains(OWN_TABLE));
    all_answer(&mesh);
    // The places of the second agent are no part of the dump.
    println!("{}", traces::nothing_left_behind(&mut mesh).unwrap());
}

#[test]
fn a_new_port_or_link_name_is_taken_without_a_gap_in_the_floor() {
    let name = "a_new_port_or_link_name_is_taken_without_a_gap_in_the_floor";
    let Some(binaries) = enter_or_skip(name).unwrap() else { return };
    let mut mesh = Mesh::build(&binaries, &MeshOptions { nodes: 2, ..options() }).unwrap();
    mesh.send_controls("start").unwrap();
    mesh.start_server().unwrap();
    mesh.start_nodes().unwrap();
    mesh.wait_until_formed().unwrap();
    let marker = mesh.marker("new port").unwrap();
    let pings = Pings::between(&mesh.nodes[0], &mesh.nodes[1], &marker).unwrap();
    carry::node_to_node_v6(&mesh).unwrap();
    let (port, link) = (51999, "mesh7");
    for change in ["port", "link"] {
        let watch = FloorWatch::start(&mesh.nodes[0]).unwrap();
        let node = &mut mesh.nodes[0];
        match change {
            "port" => node.config.listen_port = port,
            _ => node.config.more_mesh.push(format!("interfaceName: {link}")),
        }
        node.write_config().unwrap();
        node.reload().unwrap();
        let (node, peer) = (&mesh.nodes[0], &mesh.nodes[1]);
        let taken = wait::until_true(&format!("the new {change}"), REJOIN_WITHIN, || {
            let json = node.status_json()?;
            let has_link = node.host.has_link(if change == "link" { link } else { MESH_LINK })?;
            Ok(json["node"]["listen_port"] == port && has_link && json["node"]["state"] == "running")
        });
        node.explain(taken).unwrap();
        let all = [
            (&node.host, peer.overlay_v4().unwrap()),
            (&peer.host, node.overlay_v6().unwrap()),
            (&node.pods[0].host, peer.pods[0].v4.into()),
        ];
        node.explain(carry::replies(&all, marker.bytes(), REJOIN_WITHIN)).unwrap();
        let changes = node.explain(watch.stop()).unwrap();
        assert!(changes > 0, "a new {change} comes with routes to a new link");
    }
    assert!(!mesh.nodes[0].host.has_link(MESH_LINK).unwrap());
    pings.stop().unwrap();
    println!("{}", carry::no_cleartext(&mut mesh).unwrap());
}

#[test]
fn up_and_leave_answer_when_it_is_so_and_not_before() {
    let Some(binaries) = enter_or_skip("up_and_leave_answer_when_it_is_so_and_not_before").unwrap() else { return };
    let mut mesh = Mesh::start(&binaries, &MeshOptions { nodes: 2, ..options() }).unwrap();
    let refused = |node: &Node, command: &str, words: &str| {
        let answer = node.run_to_end(node.command(command)).unwrap();
        assert_eq!(answer.status.code(), Some(1), "{command}: {}{}", answer.stdout, answer.stderr);
        assert!(answer.stderr.contains(words), "{command}: no {words:?} in {}", answer.stderr);
    };
    let is_on = |node: &Node| node.host.has_link(MESH_LINK).unwrap();

    let node = &mut mesh.nodes[1];
    node.down().unwrap();
    assert!(!is_on(node) && traces::mesh_state(node).unwrap().is_empty(), "`down` came back too early");
    let port = node.config.listen_port;
    let taken = node.host.inside(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?)).unwrap();
    refused(node, "up", &format!("UDP port {port}"));
    assert!(!is_on(node));
    node.check_running().unwrap();
    drop(taken);
    node.up().unwrap();
    assert!(is_on(node), "`up` came back too early");
    mesh.wait_until_formed().unwrap();

    // Nobody can be told: the node stays what it was.
    mesh.server.stop().unwrap();
    let node = &mesh.nodes[1];
    let gone = wait::until_true("the session to be gone", RECONNECTS_WITHIN, || {
        Ok(node.status()?.servers.iter().all(|server| server.state != "connected"))
    });
    node.explain(gone).unwrap();
    refused(node, "leave", "the members cannot be told");
    assert!(fs::read_to_string(node.config_path()).unwrap().contains("enabled: true"));
    carry::node_to_node_v6(&mesh).unwrap();

    mesh.server.start().unwrap();
    for node in &mesh.nodes {
        wait_connected(node, RECONNECTS_WITHIN).unwrap();
    }
    let node = &mesh.nodes[1];
    node.leave().unwrap();
    assert!(!is_on(node) && traces::mesh_state(node).unwrap().is_empty(), "`leave` came back too early");
    assert_eq!(node.status().unwrap().node.state, "disabled");
    let told = wait::until_true("the peer to know", AT_ONCE, || Ok(mesh.nodes[0].status()?.peers.is_empty()));
    mesh.nodes[0].explain(told).unwrap();
}
