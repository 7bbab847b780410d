//! Peers behind relays, two paths at once, and what goes over each.

use super::*;

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
    let mut relayed = Vec::new();
    until(&mut nodes, "one direct, one for the relay", |nodes| {
        relayed.extend(nodes[0].engine.take_relayed());
        !relayed.is_empty()
    });
    let (_, direct) = first.next().unwrap();
    assert_eq!(relayed, [(nodes[1].key, SERVER, direct.into())]);
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
