#![allow(clippy::unwrap_used)]

use mesh_common::limits::{MAX_RELAY_PAYLOAD, MAX_RELAY_QUEUE_BYTES, MAX_RELAY_QUEUE_MESSAGES};

use super::*;

const RED: Namespace = Namespace([1; 32]);
const BLUE: Namespace = Namespace([2; 32]);

fn at(ms: u64) -> Instant {
    Instant::from_origin(Duration::from_millis(ms))
}

fn node(n: u8) -> NodeId {
    NodeId([n; 32])
}

fn switch() -> Switch {
    Switch::new(Some(RelayLimits::default()))
}

fn join(switch: &mut Switch, conn: u64, namespace: Namespace, of: u8) {
    switch.join(ConnId(conn), namespace, node(of), at(0));
}

fn send(switch: &mut Switch, conn: u64, to: u8, payload: &[u8], now: Instant) -> Relayed {
    switch.handle_relay(ConnId(conn), &node(to), payload, now)
}

/// All that waits for this session, each with its sender.
fn received(switch: &mut Switch, conn: u64) -> Vec<(NodeId, Bytes)> {
    std::iter::from_fn(|| switch.poll_relay(ConnId(conn)))
        .map(|bytes| match ServerMessage::decode(&bytes) {
            Ok(ServerMessage::Relayed { from, payload }) => (from, payload),
            other => panic!("{other:?}"),
        })
        .collect()
}

fn dropped(switch: &Switch, why: &str) -> u64 {
    switch.stats().dropped.get(why).copied().unwrap_or(0)
}

#[test]
fn a_datagram_reaches_its_node_and_says_whose_it_is() {
    let mut switch = switch();
    join(&mut switch, 1, RED, 1);
    join(&mut switch, 2, RED, 2);
    join(&mut switch, 3, RED, 3);
    assert_eq!(send(&mut switch, 1, 2, b"one", at(0)), Relayed::Queued { to: ConnId(2), wake: true });
    assert_eq!(send(&mut switch, 3, 2, b"two", at(0)), Relayed::Queued { to: ConnId(2), wake: false });
    let expected = [(node(1), Bytes::from_static(b"one")), (node(3), Bytes::from_static(b"two"))];
    assert_eq!(received(&mut switch, 2), expected);
    assert_eq!(received(&mut switch, 1), []);
    assert_eq!(received(&mut switch, 3), []);
    assert_eq!(send(&mut switch, 1, 2, b"three", at(0)), Relayed::Queued { to: ConnId(2), wake: true });
    assert_eq!((switch.stats().datagrams, switch.stats().bytes), (2, 6));
    assert_eq!(switch.stats().dropped, BTreeMap::new());
}

#[test]
fn another_namespace_is_never_reached() {
    let mut switch = switch();
    join(&mut switch, 1, RED, 1);
    join(&mut switch, 2, BLUE, 2);
    assert_eq!(send(&mut switch, 1, 2, b"hello?", at(0)), Relayed::NoPeer);
    // Not even where the same node is in both.
    join(&mut switch, 3, RED, 3);
    join(&mut switch, 4, BLUE, 3);
    assert_eq!(send(&mut switch, 1, 3, b"hello", at(0)), Relayed::Queued { to: ConnId(3), wake: true });
    switch.leave(ConnId(3));
    assert_eq!(send(&mut switch, 1, 3, b"hello", at(2000)), Relayed::NoPeer);
    for blue in [2, 4] {
        assert_eq!(received(&mut switch, blue), []);
    }
}

#[test]
fn the_newest_session_of_a_node_gets_it_and_the_one_before_when_that_ends() {
    let mut switch = switch();
    join(&mut switch, 1, RED, 1);
    join(&mut switch, 2, RED, 2);
    join(&mut switch, 3, RED, 2);
    assert_eq!(send(&mut switch, 1, 2, b"a", at(0)), Relayed::Queued { to: ConnId(3), wake: true });
    switch.leave(ConnId(3));
    assert_eq!(send(&mut switch, 1, 2, b"b", at(0)), Relayed::Queued { to: ConnId(2), wake: true });
    assert_eq!(received(&mut switch, 3), [], "it is gone, and what waited for it");
    assert_eq!(received(&mut switch, 2).len(), 1);
}

#[test]
fn an_absent_node_costs_the_datagram_and_is_told_once_a_second() {
    let mut switch = switch();
    join(&mut switch, 1, RED, 1);
    join(&mut switch, 2, RED, 2);
    assert_eq!(send(&mut switch, 1, 9, b"x", at(0)), Relayed::NoPeer);
    assert_eq!(send(&mut switch, 1, 8, b"x", at(999)), Relayed::Dropped);
    assert_eq!(send(&mut switch, 2, 9, b"x", at(999)), Relayed::NoPeer, "each sender by itself");
    assert_eq!(send(&mut switch, 1, 8, b"x", at(1000)), Relayed::NoPeer);
    assert_eq!(send(&mut switch, 1, 1, b"x", at(2000)), Relayed::NoPeer, "nobody relays to himself");
    assert_eq!(dropped(&switch, reason::RELAY_NO_PEER), 5);
    // A session that never proved anything has no place here.
    assert_eq!(send(&mut switch, 77, 2, b"x", at(0)), Relayed::Dropped);
    assert_eq!(received(&mut switch, 2), []);
}

#[test]
fn without_relay_nothing_passes() {
    let mut switch = Switch::new(None);
    join(&mut switch, 1, RED, 1);
    join(&mut switch, 2, RED, 2);
    assert!(!switch.offers_relay());
    assert_eq!(send(&mut switch, 1, 2, b"x", at(0)), Relayed::NoPeer);
    assert_eq!(send(&mut switch, 1, 2, b"x", at(1)), Relayed::Dropped);
    assert_eq!((received(&mut switch, 2), dropped(&switch, reason::RELAY_OFF)), (vec![], 2));
}

#[test]
fn a_flood_meets_its_budget_and_disturbs_nobody() {
    let mut switch = switch();
    for of in 1..=4 {
        join(&mut switch, u64::from(of), RED, of);
    }
    let payload = [7; 1400];
    let (mut flooded, mut told, mut calm) = (0, Vec::new(), 0);
    // One second: 1 sends 28 MB to 2; 3 sends 100 datagrams a second to 4. The readers keep up.
    for ms in 1..=1000 {
        for _ in 0..20 {
            match send(&mut switch, 1, 2, &payload, at(ms)) {
                Relayed::Queued { .. } => {}
                Relayed::OverBudget(exceeded) => told.push(exceeded),
                Relayed::Dropped => {}
                Relayed::NoPeer => panic!("2 is there"),
            }
        }
        if ms % 10 == 0 {
            assert!(matches!(send(&mut switch, 3, 4, &payload, at(ms)), Relayed::Queued { .. }));
        }
        flooded += received(&mut switch, 2).len() * payload.len();
        calm += received(&mut switch, 4).len();
    }
    assert_eq!(calm, 100);
    let budget = 5 << 20;
    assert!(flooded <= budget && flooded > budget - (64 << 10), "a second's worth and the burst: {flooded}");
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(told[0].limit, reason::RELAY_CLIENT_BYTES);
    assert!(told[0].retry_after < Duration::from_millis(1));
    assert_eq!(dropped(&switch, reason::RELAY_CLIENT_BYTES), 20_000 - (flooded / payload.len()) as u64);
    assert_eq!(dropped(&switch, reason::RELAY_QUEUE), 0);
}

#[test]
fn many_sessions_of_one_client_have_one_budget_and_all_clients_that_of_their_namespace() {
    let limits = RelayLimits { client_bytes: 1 << 20, namespace_bytes: 2 << 20 };
    let mut switch = Switch::new(Some(limits));
    let receiver = 1;
    join(&mut switch, receiver, RED, 200);
    join(&mut switch, 2, BLUE, 200);
    join(&mut switch, 3, BLUE, 1);
    for conn in 10..14 {
        join(&mut switch, conn, RED, 10);
    }
    let mut pass = |senders: &[u64], to: u8, ms: u64| {
        let mut passed = 0;
        let mut met = BTreeSet::new();
        for round in 0..4096 {
            match send(&mut switch, senders[round % senders.len()], to, &[1; 1024], at(ms)) {
                Relayed::Queued { .. } => passed += 1024,
                Relayed::OverBudget(exceeded) => drop(met.insert(exceeded.limit)),
                _ => {}
            }
        }
        (passed, met)
    };
    assert_eq!(pass(&[10, 11, 12, 13], 200, 0), (256 << 10, BTreeSet::from([reason::RELAY_CLIENT_BYTES])));
    assert_eq!(pass(&[3], 200, 0), (256 << 10, BTreeSet::from([reason::RELAY_CLIENT_BYTES])), "another namespace");
    for conn in 20..30 {
        join(&mut switch, conn, RED, u8::try_from(conn).unwrap());
    }
    let mut met = BTreeSet::new();
    let mut passed = 0;
    for conn in 20..30 {
        for _ in 0..200 {
            match send(&mut switch, conn, 200, &[1; 1024], at(10_000)) {
                Relayed::Queued { .. } => passed += 1024,
                Relayed::OverBudget(exceeded) => drop(met.insert(exceeded.limit)),
                _ => {}
            }
        }
    }
    assert_eq!((passed, met), (512 << 10, BTreeSet::from([reason::RELAY_NAMESPACE_BYTES])));
}

#[test]
fn a_slow_reader_loses_its_oldest_and_nobody_else_loses_any() {
    let mut switch = switch();
    for of in 1..=3 {
        join(&mut switch, u64::from(of), RED, of);
    }
    let total = MAX_RELAY_QUEUE_MESSAGES as u32 + 40;
    for number in 0..total {
        assert!(matches!(send(&mut switch, 1, 2, &number.to_le_bytes(), at(0)), Relayed::Queued { .. }));
        assert!(matches!(send(&mut switch, 1, 3, &number.to_le_bytes(), at(0)), Relayed::Queued { .. }));
        assert_eq!(received(&mut switch, 3).len(), 1, "it keeps up");
    }
    let late: Vec<u32> = received(&mut switch, 2)
        .iter()
        .map(|(_, payload)| u32::from_le_bytes(payload[..].try_into().unwrap()))
        .collect();
    assert_eq!(late, (40..total).collect::<Vec<_>>());
    assert_eq!(dropped(&switch, reason::RELAY_QUEUE), 40);
}

#[test]
fn all_queues_together_are_bounded_and_the_fullest_pays() {
    let mut switch = Switch::new(Some(RelayLimits { client_bytes: 1 << 40, namespace_bytes: 1 << 40 }));
    join(&mut switch, 0, RED, 0);
    let readers = MAX_RELAY_QUEUED_BYTES / MAX_RELAY_QUEUE_BYTES + 20;
    let reader = |number: usize| {
        let mut id = [9; 32];
        id[..8].copy_from_slice(&number.to_le_bytes());
        NodeId(id)
    };
    for number in 1..=readers {
        switch.join(ConnId(number as u64), RED, reader(number), at(0));
    }
    for number in 1..readers {
        for _ in 0..MAX_RELAY_QUEUE_MESSAGES {
            switch.handle_relay(ConnId(0), &reader(number), &[1; MAX_RELAY_PAYLOAD], at(0));
            assert!(switch.queued_bytes <= MAX_RELAY_QUEUED_BYTES);
        }
    }
    assert!(dropped(&switch, reason::RELAY_MEMORY) > 0);
    // Who reads gets all of it, however full it is elsewhere.
    for _ in 0..100 {
        switch.handle_relay(ConnId(0), &reader(readers), b"fresh", at(0));
    }
    assert_eq!(received(&mut switch, readers as u64).len(), 100);
    for number in 0..=readers {
        switch.leave(ConnId(number as u64));
    }
    assert_eq!((switch.queued_bytes, switch.by_size.len(), switch.segments.len()), (0, 0, 0), "nothing is kept");
}
