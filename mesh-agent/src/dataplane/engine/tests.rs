#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::Instant as RealInstant;

use mesh_common::key::{PresharedKey, WgSecret};
use mesh_proto::device::Endpoint;
use mesh_proto::wire::demux::PROBE;
use mesh_proto::wire::stun;

use super::*;
use crate::dataplane::inner::tests::packet;
use crate::dataplane::memory::{HostLink, MemoryNet, MemorySocket, MemoryTun, link, link_with};
use crate::dataplane::offloads::DeviceOffloads;
use crate::dataplane::peer::{Path, Peer};
use crate::dataplane::queues::{CONTROL_QUEUE, RELAY_QUEUE, RELAY_QUEUE_BYTES};

mod control;
mod offload;
mod paths;

const SERVER: ServerId = ServerId(0);
const RELAY: Endpoint = Endpoint::Relay(SERVER);
const PATIENCE: Duration = Duration::from_secs(10);

/// A node with an engine over doubles, and its host's end of the link.
struct Node {
    engine: Engine<BoringTunnels, MemoryTun, MemorySocket>,
    host: HostLink,
    key: WgPublicKey,
    endpoint: SocketAddr,
    clock: Clock,
    reports: Vec<(WgPublicKey, PeerReport)>,
    /// Its relays carry what it sends.
    is_relayed: bool,
}

impl Node {
    /// Node `n` has inner addresses 10.0.0.n and fd00::n, and endpoint 192.0.2.n:51872.
    fn start(net: &MemoryNet, n: u8) -> Self {
        Self::start_with(net, n, link())
    }

    /// With a lane for each queue of the link.
    fn start_with(net: &MemoryNet, n: u8, (link, host): (Vec<MemoryTun>, HostLink)) -> Self {
        let started = RealInstant::now();
        // Far from the origin, as on a host that booted long ago.
        let clock: Clock = Arc::new(move || Instant::from_origin(Duration::from_secs(10_000) + started.elapsed()));
        let secret = WgSecret::from_seed(&[n; 32]);
        let endpoint = endpoint(n);
        let factory = BoringTunnels::new(&secret);
        let sockets = net.sockets(endpoint, link.len());
        let engine = Engine::start(Some(link), sockets, factory, Arc::clone(&clock)).unwrap();
        Self { engine, host, key: secret.public(), endpoint, clock, reports: Vec::new(), is_relayed: false }
    }

    fn know(&mut self, peer: &Self, n: u8) {
        self.engine.set_peer(peer.key, spec(n));
    }

    fn route(&mut self, peer: &Self, primary: Option<SocketAddr>, fan_out: &[SocketAddr]) {
        let handshake_fan_out = fan_out.iter().copied().map(Endpoint::from).collect();
        let route = PeerRoute { primary: primary.map(Endpoint::from), second: None, handshake_fan_out };
        self.engine.set_route(&peer.key, &route);
    }

    fn route_to(&mut self, peer: &Self, primary: Endpoint) {
        self.engine.set_route(&peer.key, &PeerRoute { primary: Some(primary), ..PeerRoute::default() });
    }

    fn route_twice(&mut self, peer: &Self, primary: Endpoint, second: Endpoint) {
        let route = PeerRoute { primary: Some(primary), second: Some(second), handshake_fan_out: Vec::new() };
        self.engine.set_route(&peer.key, &route);
    }

    fn step(&mut self) {
        let reports = self.engine.handle_control((self.clock)());
        self.reports.extend(reports);
    }

    /// What went over each path since the last look, in the order of the paths.
    fn traffic(&mut self) -> Vec<(Endpoint, u64, u64)> {
        self.engine.handle_timeout((self.clock)());
        let reports = self.engine.handle_control((self.clock)()).into_iter();
        let paths = reports.flat_map(|(_, report)| match report {
            PeerReport::Traffic(paths) => paths,
            _ => Vec::new(),
        });
        let mut paths: Vec<_> = paths.map(|path| (path.endpoint, path.sent, path.received)).collect();
        paths.sort_unstable();
        paths
    }

    fn dropped(&self, name: &str) -> u64 {
        self.engine.stats().drops[name]
    }
}

fn endpoint(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 51872))
}

fn spec(n: u8) -> PeerSpec {
    PeerSpec {
        preshared_key: Some(PresharedKey([9; 32])),
        allowed_ips: [format!("10.0.0.{n}/32"), format!("fd00::{n}/128")].map(|prefix| prefix.parse().unwrap()).into(),
        keepalive: None,
        generation: 0,
    }
}

/// Two nodes that know each other and where they are.
fn pair(net: &MemoryNet) -> [Node; 2] {
    introduce([Node::start(net, 1), Node::start(net, 2)])
}

fn introduce([mut a, mut b]: [Node; 2]) -> [Node; 2] {
    a.know(&b, 2);
    b.know(&a, 1);
    a.route(&b, Some(b.endpoint), &[]);
    b.route(&a, Some(a.endpoint), &[]);
    a.engine.publish();
    b.engine.publish();
    [a, b]
}

/// Runs control of all nodes until `done`.
fn until<const N: usize>(nodes: &mut [Node; N], what: &str, mut done: impl FnMut(&mut [Node; N]) -> bool) {
    let deadline = RealInstant::now() + PATIENCE;
    while !done(nodes) {
        assert!(RealInstant::now() < deadline, "not within {PATIENCE:?}: {what}; {:?}", nodes[0].engine.stats());
        nodes.iter_mut().for_each(Node::step);
        (0..N).for_each(|from| relay(nodes, from));
        thread::yield_now();
    }
}

/// Relays what a node has to relay.
fn relay<const N: usize>(nodes: &mut [Node; N], from: usize) {
    if !nodes[from].is_relayed {
        return;
    }
    let sender = nodes[from].key;
    for (to, server, datagram) in nodes[from].engine.take_relayed() {
        let receiver = nodes.iter_mut().find(|node| node.key == to).unwrap();
        receiver.engine.handle_relayed(&sender, server, &datagram);
    }
}

fn expect_packet<const N: usize>(nodes: &mut [Node; N], at: usize, expected: &[u8], what: &str) {
    let mut got = None;
    until(nodes, what, |nodes| {
        got = nodes[at].host.receive();
        got.is_some()
    });
    assert_eq!(got.as_deref(), Some(expected), "{what}");
}

fn connect(nodes: &mut [Node; 2]) {
    let first = packet("10.0.0.1", "10.0.0.2", 7, 60);
    nodes[0].host.send(&first);
    expect_packet(nodes, 1, &first, "the first packet connects");
    let both = |nodes: &mut [Node; 2]| {
        nodes.iter().all(|node| node.reports.iter().any(|(_, report)| matches!(report, PeerReport::Handshake { .. })))
    };
    until(nodes, "both report the handshake", both);
}

#[test]
fn with_several_lanes_the_packets_of_each_peer_stay_in_order() {
    const LANES: usize = 3;
    const PEERS: u8 = 4;
    const PACKETS: u16 = 300;
    let net = MemoryNet::default();
    let several = || link_with(DeviceOffloads::default(), LANES);
    let mut nodes: [Node; 1 + PEERS as usize] =
        std::array::from_fn(|at| Node::start_with(&net, at as u8 + 1, if at == 0 { several() } else { link() }));
    let [hub, peers @ ..] = &mut nodes;
    for (peer, n) in peers.iter_mut().zip(2..) {
        hub.know(peer, n);
        hub.route(peer, Some(peer.endpoint), &[]);
        peer.know(hub, 1);
        peer.route(hub, Some(hub.endpoint), &[]);
        peer.engine.publish();
    }
    hub.engine.publish();
    let address = |n: u8| format!("10.0.0.{n}");
    // One each way first, so that all have sessions.
    for n in 2..=PEERS + 1 {
        nodes[0].host.send(&packet(&address(1), &address(n), 0, 60));
        let expected = packet(&address(1), &address(n), 0, 60);
        expect_packet(&mut nodes, usize::from(n) - 1, &expected, "the first packet connects");
    }
    let numbered = |from: &str, to: &str, number: u16| {
        let mut packet = packet(from, to, 0, 100);
        packet[40..42].copy_from_slice(&number.to_be_bytes());
        packet
    };
    let mut heard: BTreeMap<(u8, u8), Vec<u16>> = BTreeMap::new();
    let mut hear = |nodes: &mut [Node; 1 + PEERS as usize]| {
        for node in nodes.iter() {
            while let Some(packet) = node.host.receive() {
                let number = u16::from_be_bytes([packet[40], packet[41]]);
                heard.entry((packet[15], packet[19])).or_default().push(number);
            }
        }
        heard.values().map(Vec::len).sum::<usize>()
    };
    for number in 0..PACKETS {
        for n in 2..=PEERS + 1 {
            nodes[usize::from(n) - 1].host.send(&numbered(&address(n), &address(1), number));
            nodes[0].host.send(&numbered(&address(1), &address(n), number));
        }
        // No link or queue of the host holds all of them.
        let sent = usize::from(number + 1) * 2 * usize::from(PEERS);
        until(&mut nodes, "most have arrived", |nodes| hear(nodes) + 64 >= sent);
    }
    let all = usize::from(PACKETS) * 2 * usize::from(PEERS);
    until(&mut nodes, "all have arrived", |nodes| hear(nodes) == all);
    let in_order: Vec<u16> = (0..PACKETS).collect();
    assert_eq!(heard.len(), 2 * usize::from(PEERS));
    for (way, numbers) in heard {
        assert_eq!(numbers, in_order, "{way:?}");
    }
}

#[test]
fn two_engines_carry_packets_of_both_families_both_ways() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    for n in 0..200u16 {
        let len = 60 + usize::from(n) * 6;
        let there = packet("fd00::1", "fd00::2", n as u8, len);
        nodes[0].host.send(&there);
        expect_packet(&mut nodes, 1, &there, "there");
        let back = packet("10.0.0.2", "10.0.0.1", n as u8, len);
        nodes[1].host.send(&back);
        expect_packet(&mut nodes, 0, &back, "back");
    }
    let [a, b] = &nodes;
    let (sent, received) = (a.engine.counters(&b.key), b.engine.counters(&a.key));
    assert_eq!((sent.tx_packets, sent.rx_packets), (201, 200));
    assert_eq!((sent.tx_packets, sent.tx_bytes), (received.rx_packets, received.rx_bytes));
    assert!(sent.last_handshake.is_some() && received.last_handshake.is_some() && received.last_rx.is_some());
    for node in &nodes {
        assert!(node.engine.stats().drops.values().all(|count| *count == 0), "{:?}", node.engine.stats());
    }
}

#[test]
fn a_burst_arrives_whole_and_in_order() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let burst: Vec<_> = (0..150u16).map(|n| packet("10.0.0.1", "10.0.0.2", n as u8, 100 + usize::from(n))).collect();
    burst.iter().for_each(|packet| nodes[0].host.send(packet));
    for packet in &burst {
        expect_packet(&mut nodes, 1, packet, "in order");
    }
}

#[test]
fn an_answer_leaves_before_its_thread_hears_of_it() {
    let net = MemoryNet::default();
    let (queues, host) = link();
    let silenced = queues.into_iter().map(MemoryTun::silenced).collect();
    let mut nodes = introduce([Node::start_with(&net, 1, (silenced, host)), Node::start(&net, 2)]);
    let there = |n| packet("10.0.0.1", "10.0.0.2", n, 60);
    for n in 0..8 {
        nodes[0].host.send(&there(n));
        nodes[0].engine.shared.lanes[0].outbound.wake();
        expect_packet(&mut nodes, 1, &there(n), "little goes out");
    }
    nodes[0].host.send(&there(8));
    let question = packet("10.0.0.2", "10.0.0.1", 9, 60);
    nodes[1].host.send(&question);
    expect_packet(&mut nodes, 0, &question, "a lone packet comes in");
    expect_packet(&mut nodes, 1, &there(8), "what waited goes out after it");
}

#[test]
fn reports_tell_demand_at_once_and_where_the_handshake_was() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let [a, b] = &nodes;
    assert_eq!(a.reports[0], (b.key, PeerReport::Demand));
    assert!(a.reports.contains(&(b.key, PeerReport::Handshake { endpoint: b.endpoint.into() })), "{:?}", a.reports);
    assert_eq!(b.reports, [(a.key, PeerReport::Handshake { endpoint: a.endpoint.into() })]);
}

#[test]
fn demand_is_reported_once_a_second_however_many_packets_want_to_go() {
    let net = MemoryNet::default();
    let mut nodes = [Node::start(&net, 1), Node::start(&net, 2)];
    let [a, b] = &mut nodes;
    a.know(b, 2);
    a.step();
    let started = (a.clock)();
    for n in 0..50 {
        a.host.send(&packet("10.0.0.1", "10.0.0.2", n, 60));
    }
    until(&mut nodes, "a demand", |nodes| !nodes[0].reports.is_empty());
    nodes[0].host.send(&packet("10.0.0.1", "10.9.9.9", 0, 60));
    until(&mut nodes, "the burst is through", |nodes| nodes[0].dropped("out_no_peer") == 1);
    nodes[0].step();
    let seconds = (nodes[0].clock)().since(started).as_secs() as usize;
    assert!(nodes[0].reports.len() <= 1 + seconds, "{:?}", nodes[0].reports);
}

#[test]
fn an_initiation_reaches_the_second_endpoint_when_the_first_is_dead_and_answers_take_its_path() {
    let net = MemoryNet::default();
    let mut nodes = [Node::start(&net, 1), Node::start(&net, 2)];
    let dead = endpoint(66);
    let [a, b] = &mut nodes;
    a.know(b, 2);
    b.know(a, 1);
    let [at_a, at_b] = [a.endpoint, b.endpoint];
    a.route(b, Some(dead), &[dead, at_b]);
    b.route(a, Some(dead), &[at_a]);
    a.engine.publish();
    b.engine.publish();
    // Control only handles handshakes here; it never answers the reports with another route.
    connect(&mut nodes);
    let there = packet("10.0.0.1", "10.0.0.2", 1, 80);
    nodes[0].host.send(&there);
    expect_packet(&mut nodes, 1, &there, "data takes the proven path");
    let back = packet("10.0.0.2", "10.0.0.1", 2, 80);
    nodes[1].host.send(&back);
    expect_packet(&mut nodes, 0, &back, "and so does the answer");
    let [a, b] = &nodes;
    assert!(a.reports.contains(&(b.key, PeerReport::Handshake { endpoint: b.endpoint.into() })));
}

#[test]
fn a_packet_that_came_before_any_endpoint_goes_out_when_one_is_known() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    let [a, b] = &mut nodes;
    a.route(b, None, &[]);
    let waiting = packet("10.0.0.1", "10.0.0.2", 5, 90);
    a.step();
    assert!(!a.engine.start_handshake(&b.key), "nobody to shake hands with");
    a.host.send(&waiting);
    until(&mut nodes, "demand", |nodes| !nodes[0].reports.is_empty());
    let [a, b] = &mut nodes;
    a.route(b, Some(b.endpoint), &[]);
    assert!(a.engine.start_handshake(&b.key));
    expect_packet(&mut nodes, 1, &waiting, "the packet that waited");
}

#[test]
fn a_packet_with_anothers_source_is_dropped_and_counted() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    nodes[1].engine.set_peer(WgSecret::from_seed(&[3; 32]).public(), spec(3));
    nodes[1].engine.publish();
    connect(&mut nodes);
    for source in ["10.0.0.3", "10.7.7.7", "10.0.0.2"] {
        nodes[0].host.send(&packet(source, "10.0.0.2", 1, 60));
    }
    let honest = packet("10.0.0.1", "10.0.0.2", 2, 60);
    nodes[0].host.send(&honest);
    expect_packet(&mut nodes, 1, &honest, "only the honest one");
    let [a, b] = &nodes;
    assert_eq!(b.dropped("in_foreign_source"), 3);
    assert_eq!(b.engine.counters(&a.key).rx_foreign_source, 3);
}

#[test]
fn a_change_of_allowed_ips_keeps_the_session_and_a_new_generation_does_not() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let [a, b] = &mut nodes;
    let mut wider = spec(1);
    wider.allowed_ips.insert("10.5.0.0/16".parse().unwrap());
    b.engine.set_peer(a.key, wider.clone());
    b.step();
    assert_eq!(b.engine.peers()[&a.key], wider);
    let from_pod = packet("10.5.1.1", "10.0.0.2", 1, 60);
    a.host.send(&from_pod);
    expect_packet(&mut nodes, 1, &from_pod, "on the old session");
    let [a, b] = &mut nodes;
    assert_eq!(b.engine.counters(&a.key).rx_packets, 2);
    b.engine.set_peer(a.key, PeerSpec { generation: 1, ..wider });
    assert_eq!(b.engine.counters(&a.key), PeerCounters::default(), "another tunnel");
    assert!(b.engine.start_handshake(&a.key), "the route stayed");
    let back = packet("10.0.0.2", "10.0.0.1", 3, 60);
    b.host.send(&back);
    expect_packet(&mut nodes, 0, &back, "over the new session");
}

#[test]
fn a_tunnel_made_anew_greets_a_peer_that_still_has_a_session_with_the_old_one() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let [a, b] = &mut nodes;
    a.engine.set_peer(b.key, PeerSpec { generation: 1, ..spec(2) });
    b.reports.clear();
    let (from, key) = (a.endpoint, a.key);
    until(&mut nodes, "a handshake that nobody's packet asked for", |nodes| {
        nodes[1].reports.contains(&(key, PeerReport::Handshake { endpoint: from.into() }))
    });
    let back = packet("10.0.0.2", "10.0.0.1", 8, 60);
    nodes[1].host.send(&back);
    expect_packet(&mut nodes, 0, &back, "what the peer sends now arrives");
}

#[test]
fn a_removed_peer_is_gone_at_once() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let [a, b] = &mut nodes;
    b.engine.remove_peer(&a.key);
    b.step();
    a.host.send(&packet("10.0.0.1", "10.0.0.2", 1, 60));
    b.host.send(&packet("10.0.0.2", "10.0.0.1", 1, 60));
    until(&mut nodes, "both dropped", |nodes| {
        nodes[1].dropped("in_unknown_index") == 1 && nodes[1].dropped("out_no_peer") == 1
    });
    assert!(nodes[1].engine.peers().is_empty());
}

#[test]
fn strangers_and_junk_cost_counters_only() {
    let net = MemoryNet::default();
    let mut nodes = [Node::start(&net, 1), Node::start(&net, 2)];
    let stranger = endpoint(77);
    // A stranger's good initiation.
    let [a, b] = &mut nodes;
    b.know(a, 1);
    b.route(a, Some(a.endpoint), &[]);
    b.step();
    assert!(b.engine.start_handshake(&a.key));
    until(&mut nodes, "an unknown key", |nodes| nodes[0].dropped("handshake_unknown_key") == 1);

    let to = nodes[0].endpoint;
    let message = |kind: u8, len: usize| {
        let mut message = vec![0x33; len];
        message[..4].copy_from_slice(&[kind, 0, 0, 0]);
        message
    };
    net.inject(stranger, to, &message(4, 1400)); // an index nobody has
    net.inject(stranger, to, &message(4, 65_507)); // the same, as long as it gets
    net.inject(stranger, to, &message(4, 31)); // shorter than an empty packet
    net.inject(stranger, to, &message(1, 148)); // an initiation with a wrong mac
    net.inject(stranger, to, &message(1, 147)); // cut
    net.inject(stranger, to, &message(2, 92));
    net.inject(stranger, to, &message(3, 64)); // a cookie for nobody
    net.inject(stranger, to, &[]);
    net.inject(stranger, to, &[PROBE; 2049]); // longer than a probe can be
    net.inject(stranger, to, b"GET / HTTP/1.1\r\n\r\n");
    until(&mut nodes, "all counted", |nodes| {
        let counts = ["in_unknown_index", "in_unknown", "handshake_invalid", "handshake_unexpected"]
            .map(|name| nodes[0].dropped(name));
        counts == [2, 5, 1, 2]
    });
    nodes[0].host.send(&[0xff; 40]);
    nodes[0].host.send(&[0x45]);
    until(&mut nodes, "malformed packets of the host", |nodes| nodes[0].dropped("out_malformed") == 2);
    assert!(nodes[0].engine.is_running());
    assert!(nodes[0].reports.is_empty() && nodes[0].host.receive().is_none());
}

#[test]
fn a_full_queue_of_handshakes_drops_the_rest() {
    let net = MemoryNet::default();
    let node = Node::start(&net, 1);
    let initiation = initiation_of_a_stranger(&net, &node);
    let extra = 40;
    for _ in 0..CONTROL_QUEUE + extra {
        net.inject(endpoint(77), node.endpoint, &initiation);
    }
    let deadline = RealInstant::now() + PATIENCE;
    while node.dropped("handshake_queue_full") < extra as u64 {
        assert!(RealInstant::now() < deadline, "{:?}", node.engine.stats());
        thread::yield_now();
    }
    let mut nodes = [node];
    let looked_at = |node: &Node| node.dropped("handshake_unknown_key") == CONTROL_QUEUE as u64;
    until(&mut nodes, "the others are looked at", |[node]| looked_at(node));
    assert_eq!(nodes[0].dropped("handshake_queue_full"), extra as u64);
}

#[test]
fn junk_takes_no_place_in_the_queue_of_handshakes() {
    let net = MemoryNet::default();
    let node = Node::start(&net, 1);
    let initiation = initiation_of_a_stranger(&net, &node);
    let for_another = initiation_of_a_stranger(&net, &Node::start(&net, 3));
    // Nobody looks at the queue meanwhile.
    for n in 0..CONTROL_QUEUE {
        net.inject(endpoint(77), node.endpoint, &for_another);
        let (kind, len) = [(1, 148), (2, 92), (3, 64)][n % 3];
        let mut junk = vec![n as u8; len];
        junk[..4].copy_from_slice(&[kind, 0, 0, 0]);
        net.inject(endpoint(77), node.endpoint, &junk);
    }
    net.inject(endpoint(77), node.endpoint, &initiation);
    let mut nodes = [node];
    until(&mut nodes, "the genuine one is looked at", |[node]| node.dropped("handshake_unknown_key") == 1);
    let dropped =
        ["handshake_invalid", "handshake_unexpected", "handshake_queue_full"].map(|name| nodes[0].dropped(name));
    assert_eq!((dropped[0] + dropped[1], dropped[2]), (2 * CONTROL_QUEUE as u64, 0));
}

/// An initiation made for the node by somebody whom it does not know.
fn initiation_of_a_stranger(net: &MemoryNet, node: &Node) -> Vec<u8> {
    let (address, mut stranger) = (endpoint(99), Node::start(net, 98));
    let wire = net.socket(address);
    stranger.know(node, 1);
    stranger.route(node, Some(address), &[]);
    assert!(stranger.engine.start_handshake(&node.key));
    wire.next().unwrap().1
}

#[test]
fn a_deleted_link_is_told_and_sessions_outlive_it() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    assert!(!nodes[0].engine.link_lost());
    let (link, host) = link();
    drop(std::mem::replace(&mut nodes[0].host, host));
    until(&mut nodes, "the loss is noticed", |nodes| nodes[0].engine.link_lost());
    nodes[1].host.send(&packet("10.0.0.2", "10.0.0.1", 1, 60));
    until(&mut nodes, "no link to deliver to", |nodes| nodes[0].dropped("in_not_delivered") == 1);
    nodes[0].engine.replace_link(link);
    assert!(!nodes[0].engine.link_lost());
    nodes.iter_mut().for_each(|node| node.reports.clear());
    let there = packet("10.0.0.1", "10.0.0.2", 2, 60);
    nodes[0].host.send(&there);
    expect_packet(&mut nodes, 1, &there, "through the new link");
    let back = packet("10.0.0.2", "10.0.0.1", 3, 60);
    nodes[1].host.send(&back);
    expect_packet(&mut nodes, 0, &back, "and back");
    assert!(nodes.iter().all(|node| node.reports.is_empty()), "no new handshake was needed");
}

#[test]
fn roaming_is_reported_and_changed_or_repeated_data_is_dropped() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let elsewhere = endpoint(99);
    let tap = net.socket(nodes[1].endpoint);
    nodes[0].host.send(&packet("10.0.0.1", "10.0.0.2", 1, 60));
    let mut tapped = None;
    until(&mut nodes, "a datagram to move", |_| {
        tapped = tap.next();
        tapped.is_some()
    });
    let (_, datagram) = tapped.unwrap();
    // The engine behind b still reads its own inbox.
    nodes[1].reports.clear();
    nodes[1].engine.shared.sender().deliver(elsewhere, &datagram);
    expect_packet(&mut nodes, 1, &packet("10.0.0.1", "10.0.0.2", 1, 60), "it is accepted from anywhere");
    until(&mut nodes, "roaming is told", |nodes| !nodes[1].reports.is_empty());
    let a = nodes[0].key;
    assert_eq!(nodes[1].reports, [(a, PeerReport::Roamed { endpoint: elsewhere.into() })]);
    let mut changed = datagram.clone();
    changed[20] ^= 1;
    changed[8] ^= 0x40;
    nodes[1].engine.shared.sender().deliver(elsewhere, &changed);
    nodes[1].engine.shared.sender().deliver(elsewhere, &datagram);
    until(&mut nodes, "changed and repeated data is dropped", |nodes| {
        nodes[1].dropped("in_invalid") == 1 && nodes[1].dropped("in_replayed") == 1
    });
}

#[test]
fn timers_repeat_an_initiation_that_got_lost_and_idle_peers_are_left_alone() {
    let net = MemoryNet::default();
    let mut nodes = [Node::start(&net, 1)];
    let silent = net.socket(endpoint(5));
    let other = WgSecret::from_seed(&[5; 32]).public();
    let [node] = &mut nodes;
    node.engine.set_peer(other, PeerSpec { keepalive: Some(Duration::from_secs(1)), ..spec(5) });
    node.engine.set_route(&other, &PeerRoute { primary: Some(endpoint(5).into()), ..PeerRoute::default() });
    let idle = WgSecret::from_seed(&[6; 32]).public();
    node.engine.set_peer(idle, spec(6));
    node.engine.set_route(&idle, &PeerRoute { primary: Some(endpoint(5).into()), ..PeerRoute::default() });
    until(&mut nodes, "the keepalive starts a handshake", |[node]| {
        node.engine.handle_timeout((node.clock)());
        silent.next().is_some_and(|(_, datagram)| datagram.len() == 148)
    });
    assert!(silent.next().is_none(), "one peer, one initiation");
}

#[test]
fn a_peer_is_silent_when_packets_stay_unanswered_for_longer_than_a_keepalive_takes() {
    let tunnel = BoringTunnels::new(&WgSecret::from_seed(&[1; 32]));
    let key = WgSecret::from_seed(&[2; 32]).public();
    let at = |seconds| Instant::from_origin(Duration::from_secs(seconds));
    let peer = Peer::new(key, 1, tunnel.make(&key, &spec(2), 1, at(0)), false, Path::default());
    assert!(!peer.is_silent(at(1000)), "nobody wants anything");
    peer.count_sent(1, 60, at(1000));
    peer.count_sent(1, 60, at(1011));
    assert!(!peer.is_silent(at(1011)));
    assert!(peer.is_silent(at(1012)), "since the first unanswered packet");
    peer.count_received(0, 0, at(1012));
    assert!(!peer.is_silent(at(1013)), "a keepalive is an answer");
}

#[test]
fn roaming_between_two_endpoints_is_reported_four_times_a_second() {
    let tunnel = BoringTunnels::new(&WgSecret::from_seed(&[1; 32]));
    let key = WgSecret::from_seed(&[2; 32]).public();
    let at = |millis| Instant::from_origin(Duration::from_millis(millis));
    let peer = Peer::new(key, 1, tunnel.make(&key, &spec(2), 1, at(0)), false, Path::default());
    let roam = |n, millis| {
        peer.note_source(endpoint(n).into(), at(millis));
        !peer.take_reports().is_empty()
    };
    assert!(roam(1, 1000) && !roam(2, 1010) && !roam(1, 1020));
    assert!(roam(2, 1250) && !roam(1, 1260), "a new one soon");
    assert!(!roam(2, 2240) && roam(2, 2250), "the same one a second later");
}

#[test]
fn stopping_ends_the_threads_within_a_second() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    for node in nodes {
        let (mut engine, started) = (node.engine, RealInstant::now());
        let shared = Arc::downgrade(&engine.shared);
        engine.stop();
        assert!(started.elapsed() < Duration::from_secs(1));
        assert_eq!(shared.strong_count(), 1, "the threads hold nothing any more");
    }
}

#[test]
fn waiting_wakes_for_a_handshake() {
    let net = MemoryNet::default();
    let node = Node::start(&net, 1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let initiation = initiation_of_a_stranger(&net, &node);
    net.inject(endpoint(77), node.endpoint, &initiation);
    let woken = runtime.block_on(async { tokio::time::timeout(PATIENCE, node.engine.wait()).await });
    assert!(woken.is_ok());
}
