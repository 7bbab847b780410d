//! Probes and STUN messages on their way to and from control.

use super::*;

fn probe(n: usize) -> Vec<u8> {
    let mut probe = vec![PROBE; 60];
    probe[1..9].copy_from_slice(&n.to_le_bytes());
    probe
}

#[test]
fn probes_and_stun_messages_come_to_control_whole_with_their_source() {
    let net = MemoryNet::default();
    let mut nodes = [Node::start(&net, 1)];
    let (stranger, to) = (endpoint(77), nodes[0].endpoint);
    let stun = stun::binding_request(&[7; 12], stun::Change::NONE);
    net.inject(stranger, to, &probe(1));
    net.inject(endpoint(78), to, &stun);
    let mut got = Vec::new();
    until(&mut nodes, "both come", |nodes| {
        got.extend(nodes[0].engine.take_control());
        got.len() == 2
    });
    let expected = [(stranger, probe(1)), (endpoint(78), stun.to_vec())];
    assert_eq!(got, expected.map(|(source, bytes)| ControlDatagram { source: source.into(), bytes: bytes.into() }));
    assert!(nodes[0].engine.stats().drops.values().all(|count| *count == 0), "{:?}", nodes[0].engine.stats());
}

#[test]
fn an_answer_leaves_from_the_address_that_carries_wireguard() {
    let net = MemoryNet::default();
    let mut node = Node::start(&net, 1);
    let asker = net.socket(endpoint(77));
    node.engine.send_raw(endpoint(77).into(), &probe(5), Some(2));
    assert_eq!(asker.next(), Some((node.endpoint, probe(5))));
}

#[test]
fn a_flood_of_probes_and_stun_fills_their_queue_and_nothing_else() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    let (stranger, to) = (endpoint(77), nodes[1].endpoint);
    let extra = 50;
    for n in 0..CONTROL_QUEUE + extra {
        net.inject(stranger, to, &probe(n));
        net.inject(stranger, to, &stun::binding_request(&[7; 12], stun::Change::NONE));
    }
    connect(&mut nodes);
    let there = packet("10.0.0.1", "10.0.0.2", 1, 1000);
    nodes[0].host.send(&there);
    expect_packet(&mut nodes, 1, &there, "data passes by the full queue");
    let dropped = nodes[1].dropped("probe_queue_full") + nodes[1].dropped("stun_queue_full");
    assert_eq!(dropped as usize, CONTROL_QUEUE + 2 * extra);
    let waiting = nodes[1].engine.take_control();
    assert_eq!(waiting.len(), CONTROL_QUEUE);
    assert_eq!(waiting[0].bytes, probe(0), "what came first is not pushed out");
    assert!(nodes[1].engine.take_control().is_empty());
}

#[test]
fn waiting_wakes_for_a_probe_and_for_what_goes_over_a_relay() {
    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let [mut a, b] = nodes;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let woken_until = |a: &mut Node, done: &dyn Fn(&mut Node) -> bool| {
        runtime.block_on(async {
            while !done(a) {
                let woken = tokio::time::timeout(PATIENCE, a.engine.wait()).await;
                assert!(woken.is_ok(), "it sleeps on");
            }
        });
    };
    net.inject(endpoint(77), a.endpoint, &probe(1));
    woken_until(&mut a, &|a| !a.engine.take_control().is_empty());
    a.route_to(&b, RELAY);
    a.host.send(&packet("10.0.0.1", "10.0.0.2", 1, 60));
    woken_until(&mut a, &|a| !a.engine.take_relayed().is_empty());
}
