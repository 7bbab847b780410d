//! Peers behind relays, two paths at once, and what goes over each.

use super::*;
use crate::dataplane::peer::Source;

#[test]
fn data_and_handshakes_go_to_the_primary_and_to_the_second() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let [a, b] = &mut nodes;
    let (first, second) = (net.socket(endpoint(50)), net.socket(endpoint(51)));
    a.route_twice(b, endpoint(50).into(), endpoint(51).into());
    a.host.send(&packet("10.0.0.1", "10.0.0.2", 1, 600));
    let mut copies = Vec::new();
    until(&mut nodes, "both copies", |_| {
        copies.extend(first.next().into_iter().chain(second.next()));
        copies.len() == 2
    });
    assert_eq!(copies[0], copies[1], "the same bytes");
    let [a, b] = &mut nodes;
    assert!(a.engine.start_handshake(&b.key));
    let [(_, one), (_, other)] = [first.next().unwrap(), second.next().unwrap()];
    assert_eq!((one.len(), &one), (148, &other), "one initiation on both");
    a.route_twice(b, endpoint(50).into(), RELAY);
    a.host.send(&packet("10.0.0.1", "10.0.0.2", 2, 600));
    let (mut relayed, mut direct) = (Vec::new(), Vec::new());
    until(&mut nodes, "one direct, one for the relay", |nodes| {
        relayed.extend(nodes[0].engine.take_relayed());
        direct.extend(first.next().map(|(_, datagram)| datagram));
        !relayed.is_empty() && !direct.is_empty()
    });
    assert_eq!(relayed, [(nodes[1].key, SERVER, direct.swap_remove(0).into())]);
    assert_eq!(nodes[0].engine.counters(&nodes[1].key).tx_packets, 3, "a packet that goes twice is one packet");
    assert_eq!(nodes[0].dropped("out_not_sent"), 0);
}

#[test]
fn what_waits_for_a_relay_is_bounded_and_the_oldest_goes() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let burst = |nodes: &mut [Node; 2], count: usize, len: usize| {
        let [a, b] = nodes;
        a.route_to(b, RELAY);
        let before = a.engine.counters(&b.key).tx_packets;
        for n in 0..count {
            a.host.send(&packet("10.0.0.1", "10.0.0.2", n as u8, len));
            // The link holds less than the queue.
            while a.engine.counters(&b.key).tx_packets + 20 < before + n as u64 {
                thread::yield_now();
            }
        }
        until(nodes, "all are sealed", |nodes| {
            nodes[0].engine.counters(&nodes[1].key).tx_packets == before + count as u64
        });
    };
    burst(&mut nodes, RELAY_QUEUE + 88, 100);
    until(&mut nodes, "the oldest are dropped", |nodes| nodes[0].dropped("out_relay_queue_full") == 88);
    let waiting = nodes[0].engine.take_relayed();
    assert_eq!(waiting.len(), RELAY_QUEUE);
    assert!(nodes[0].engine.take_relayed().is_empty());
    let counter = |datagram: &[u8]| u64::from_le_bytes(datagram[8..16].try_into().unwrap());
    let counters: Vec<_> = waiting.iter().map(|(_, _, datagram)| counter(datagram)).collect();
    assert!(counters.windows(2).all(|pair| pair[0] + 1 == pair[1]), "the newest, in order");
    burst(&mut nodes, 300, 5000);
    until(&mut nodes, "few long ones fill it as well", |nodes| nodes[0].dropped("out_relay_queue_full") > 88);
    let bytes: usize = nodes[0].engine.take_relayed().iter().map(|(_, _, datagram)| datagram.len()).sum();
    assert!((RELAY_QUEUE_BYTES - 6000..=RELAY_QUEUE_BYTES).contains(&bytes), "{bytes}");
}

/// Two nodes that reach each other over a relay only.
fn relayed_pair(net: &MemoryNet) -> [Node; 2] {
    let [mut a, mut b] = pair(net);
    a.route_to(&b, RELAY);
    b.route_to(&a, RELAY);
    (a.is_relayed, b.is_relayed) = (true, true);
    [a, b]
}

fn exchange(nodes: &mut [Node; 2], n: u8) {
    let there = packet("10.0.0.1", "10.0.0.2", n, 300);
    nodes[0].host.send(&there);
    expect_packet(nodes, 1, &there, "there");
    let back = packet("10.0.0.2", "10.0.0.1", n, 200);
    nodes[1].host.send(&back);
    expect_packet(nodes, 0, &back, "back");
}

#[test]
fn peers_behind_a_relay_shake_hands_and_carry_packets_both_ways() {
    let net = MemoryNet::default();
    let mut nodes = relayed_pair(&net);
    let direct = [net.socket(endpoint(1)), net.socket(endpoint(2))];
    connect(&mut nodes);
    (0..50).for_each(|n| exchange(&mut nodes, n));
    for (node, peer) in [(0, 1), (1, 0)] {
        let key = nodes[peer].key;
        assert!(nodes[node].reports.contains(&(key, PeerReport::Handshake { endpoint: RELAY })));
        let roamed = |report: &PeerReport| matches!(report, PeerReport::Roamed { .. });
        assert!(!nodes[node].reports.iter().any(|(_, report)| roamed(report)), "it is where ours goes");
        let counters = nodes[node].engine.counters(&key);
        assert!(counters.rx_packets >= 50 && counters.last_rx.is_some(), "{counters:?}");
        assert!(nodes[node].engine.stats().drops.values().all(|count| *count == 0), "{:?}", nodes[node].engine.stats());
    }
    assert!(direct.iter().all(|socket| socket.next().is_none()), "nothing went directly");
}

#[test]
fn a_relay_cannot_speak_for_another_peer_and_its_junk_costs_counters_only() {
    let net = MemoryNet::default();
    let mut nodes = relayed_pair(&net);
    connect(&mut nodes);
    let third = WgSecret::from_seed(&[3; 32]).public();
    let [a, b] = &mut nodes;
    b.engine.set_peer(third, spec(3));
    let [at_a, at_b] = [a.key, b.key];
    assert!(a.engine.start_handshake(&at_b));
    let (_, _, initiation) = a.engine.take_relayed().remove(0);
    a.host.send(&packet("10.0.0.1", "10.0.0.2", 9, 60));
    a.is_relayed = false;
    let mut data = Vec::new();
    until(&mut nodes, "a datagram to misuse", |nodes| {
        data.extend(nodes[0].engine.take_relayed());
        !data.is_empty()
    });
    let (_, _, data) = data.remove(0);
    let [_, b] = &mut nodes;
    b.engine.handle_relayed(&third, SERVER, &initiation);
    b.engine.handle_relayed(&third, SERVER, &data);
    assert_eq!(b.dropped("relayed_foreign"), 2);
    let stranger = WgSecret::from_seed(&[4; 32]).public();
    b.engine.handle_relayed(&stranger, SERVER, &initiation);
    b.engine.handle_relayed(&stranger, SERVER, &data);
    assert_eq!(b.dropped("relayed_unknown_peer"), 2);
    for kind in 0..=5 {
        for len in [4, 31, 32, 64, 92, 148, 4400] {
            let mut junk = vec![0x55; len];
            junk[..4].copy_from_slice(&[kind, 0, 0, 0]);
            b.engine.handle_relayed(&at_a, SERVER, &junk);
        }
    }
    for junk in [&[][..], &[PROBE; 60], &stun::binding_request(&[7; 12], stun::Change::NONE), &data[..20]] {
        b.engine.handle_relayed(&at_a, SERVER, junk);
    }
    let mut changed = data.to_vec();
    changed[20] ^= 1;
    b.engine.handle_relayed(&at_a, SERVER, &changed);
    assert_eq!(b.dropped("in_invalid"), 1);
    assert!(b.engine.take_relayed().is_empty() && b.host.receive().is_none(), "nobody is answered");
    b.engine.handle_relayed(&at_a, SERVER, &data);
    assert_eq!(b.host.receive(), Some(packet("10.0.0.1", "10.0.0.2", 9, 60)), "the honest one is good still");
}

#[test]
fn a_relayed_packet_with_anothers_source_is_dropped() {
    let net = MemoryNet::default();
    let mut nodes = relayed_pair(&net);
    connect(&mut nodes);
    nodes[0].host.send(&packet("10.7.7.7", "10.0.0.2", 1, 60));
    let honest = packet("10.0.0.1", "10.0.0.2", 2, 60);
    nodes[0].host.send(&honest);
    expect_packet(&mut nodes, 1, &honest, "only the honest one");
    assert_eq!(nodes[1].dropped("in_foreign_source"), 1);
}

#[test]
fn what_comes_over_two_paths_is_delivered_once() {
    let net = MemoryNet::default();
    let mut nodes = relayed_pair(&net);
    connect(&mut nodes);
    nodes.iter_mut().for_each(|node| drop(node.traffic()));
    let [a, b] = &mut nodes;
    let direct = Endpoint::from(b.endpoint);
    a.route_twice(b, direct, RELAY);
    for n in 0..100 {
        nodes[0].host.send(&packet("10.0.0.1", "10.0.0.2", n, 80));
    }
    until(&mut nodes, "both copies of all", |nodes| nodes[1].dropped("in_replayed") == 100);
    let delivered: Vec<_> = std::iter::from_fn(|| nodes[1].host.receive()).collect();
    assert_eq!(delivered.len(), 100);
    assert_eq!(nodes[0].traffic(), [(direct, 100, 0), (RELAY, 100, 0)]);
    let received: u64 = nodes[1].traffic().iter().map(|(_, _, received)| received).sum();
    assert_eq!(received, 100, "the second copy counts nowhere");
}

#[test]
fn traffic_is_told_by_path_and_only_when_there_was_any() {
    let net = MemoryNet::default();
    let mut nodes = relayed_pair(&net);
    connect(&mut nodes);
    nodes.iter_mut().for_each(|node| drop(node.traffic()));
    assert_eq!(nodes[0].traffic(), []);
    (0..7).for_each(|n| exchange(&mut nodes, n));
    let direct = [endpoint(1), endpoint(2)].map(Endpoint::from);
    let [a, b] = &mut nodes;
    a.route_to(b, direct[1]);
    (0..5).for_each(|n| exchange(&mut nodes, n));
    assert_eq!(nodes[0].traffic(), [(direct[1], 5, 0), (RELAY, 7, 12)]);
    assert_eq!(nodes[1].traffic(), [(direct[0], 0, 5), (RELAY, 12, 7)]);
    assert!(nodes.iter_mut().all(|node| node.traffic().is_empty()));
}

#[test]
fn a_route_without_a_fan_out_is_left_only_when_control_says_so() {
    let net = MemoryNet::default();
    let mut nodes = relayed_pair(&net);
    connect(&mut nodes);
    nodes.iter_mut().for_each(|node| drop(node.traffic()));
    let [a, b] = &mut nodes;
    let from = Endpoint::from(a.endpoint);
    let (key, peer) = (a.key, b.key);
    a.route_to(b, b.endpoint.into());
    b.reports.clear();
    assert!(a.engine.start_handshake(&peer));
    exchange(&mut nodes, 1);
    for report in [PeerReport::Handshake { endpoint: from }, PeerReport::Roamed { endpoint: from }] {
        until(&mut nodes, "control hears of it", |nodes| nodes[1].reports.contains(&(key, report.clone())));
    }
    exchange(&mut nodes, 2);
    let sent = nodes[1].traffic().into_iter().filter(|(_, sent, _)| *sent > 0).map(|(endpoint, ..)| endpoint);
    assert_eq!(sent.collect::<Vec<_>>(), [RELAY]);
}

#[test]
fn while_control_fans_out_a_direct_handshake_outweighs_a_relayed_one() {
    let net = MemoryNet::default();
    let mut nodes = relayed_pair(&net);
    let [a, b] = &mut nodes;
    let from = Endpoint::from(a.endpoint);
    let fan_out = PeerRoute { primary: Some(RELAY), second: None, handshake_fan_out: vec![from] };
    b.engine.set_route(&a.key, &fan_out);
    for (n, route) in [(1, b.endpoint.into()), (2, RELAY)] {
        let [a, b] = &mut nodes;
        a.route_to(b, route);
        b.reports.clear();
        assert!(a.engine.start_handshake(&b.key));
        let key = a.key;
        until(&mut nodes, "a handshake", |nodes| {
            let handshake = |report: &PeerReport| matches!(report, PeerReport::Handshake { .. });
            nodes[1].reports.iter().any(|(peer, report)| *peer == key && handshake(report))
        });
        drop(nodes[1].traffic());
        exchange(&mut nodes, n);
        let sent = nodes[1].traffic().into_iter().filter(|(_, sent, _)| *sent > 0).map(|(endpoint, ..)| endpoint);
        assert_eq!(sent.collect::<Vec<_>>(), [from], "handshake over {route}");
    }
}

#[test]
fn under_load_a_relayed_peer_gets_a_cookie_of_its_own_and_comes_back_with_it() {
    let net = MemoryNet::default();
    let mut nodes = relayed_pair(&net);
    let [a, b] = &mut nodes;
    let [at_a, at_b] = [a.key, b.key];
    let initiate = |node: &mut Node| {
        assert!(node.engine.start_handshake(&at_b));
        node.engine.take_relayed().remove(0).2
    };
    let flood = initiate(a);
    let answer = |node: &mut Node| node.engine.take_relayed().first().map(|(_, _, answer)| answer.clone());
    let mut cookie = None;
    for _ in 0..1000 {
        b.engine.handle_relayed(&at_a, SERVER, &flood);
        cookie = answer(b).filter(|answer| answer.len() == 64).or(cookie);
    }
    assert!(b.dropped("handshake_under_load") > 0);
    a.engine.handle_relayed(&at_b, SERVER, &cookie.unwrap());
    let again = initiate(a);
    b.engine.handle_relayed(&at_a, ServerId(1), &again);
    assert_eq!(answer(b).map(|answer| answer.len()), Some(92), "it is good whichever relay it takes");
    // Another peer's cookie is another one: to the dispatcher they come from different addresses.
    let sources = [at_a, at_b].map(|peer| Source::Relay(SERVER, peer).limited_as());
    assert_ne!(sources[0], sources[1]);
}
