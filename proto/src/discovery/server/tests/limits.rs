//! Each limit: met by name, and nobody else pays for it.

use super::*;

#[test]
fn failed_proofs_are_answered_to_a_limit_and_never_lock_out_the_good() {
    let mut server = new_server(|_| {});
    let limit = u64::from(MAX_FAILED_PROOFS_PER_MINUTE);
    let attempt = |server: &mut Server, conn: u64, from: u8, now: Instant| {
        connect(server, conn, remote(from), now);
        let told = say(server, conn, &stolen_hello(1), now);
        assert!(events(server).contains(&ServerEvent::Close(ConnId(conn))));
        server.handle_disconnected(ConnId(conn), now);
        told
    };
    for conn in 1..=limit {
        assert_eq!(code_and_limit(&attempt(&mut server, conn, 1, at(0))).0, ErrorCode::AuthFailed);
    }
    assert_eq!(attempt(&mut server, 100, 1, at(1)), [], "silence");
    assert_eq!(refused(&server, reason::BAD_PROOF), limit);
    assert_eq!(refused(&server, reason::FAILED_PROOFS_PER_IP), 1);
    assert_ne!(attempt(&mut server, 101, 2, at(1)), [], "another address is answered");
    connect(&mut server, 102, remote(1), at(1));
    let told = say(&mut server, 102, &hello(1, 1), at(1));
    assert!(matches!(told.as_slice(), [ServerMessage::Welcome(_)]), "a good neighbour gets in: {told:?}");
    assert_ne!(attempt(&mut server, 103, 1, at(60)), [], "a minute later");
}

#[test]
fn connections_are_limited_in_all_and_unproven_ones_by_address() {
    let mut server = new_server(|config| config.max_connections = 2);
    connect(&mut server, 1, remote(1), at(0));
    connect(&mut server, 2, remote(2), at(0));
    events(&mut server);
    server.handle_connected(ConnId(3), remote(3), EXPORTER, at(0));
    assert_eq!(events(&mut server), [ServerEvent::Close(ConnId(3))]);
    let full = refusal(ErrorCode::ServerFull, reason::MAX_CONNECTIONS, FULL_RETRY_AFTER);
    assert_eq!(drain(&mut server, 3, at(0)), [full]);
    assert_eq!(say(&mut server, 3, &hello(1, 3), at(0)), [], "it has no session");
    server.handle_disconnected(ConnId(1), at(0));
    connect(&mut server, 4, remote(3), at(0));

    let mut server = new_server(|_| {});
    let limit = MAX_UNPROVEN_PER_IP as u64;
    for conn in 1..=limit {
        connect(&mut server, conn, remote(1), at(0));
    }
    let turned_away = |server: &mut Server, conn| {
        server.handle_connected(ConnId(conn), remote(1), EXPORTER, at(0));
        let told = drain(server, conn, at(0));
        matches!(told.as_slice(), [ServerMessage::Error(error)]
            if error.code == ErrorCode::RateLimited && error.limit == reason::UNPROVEN_PER_IP && !error.retry_after.is_zero())
    };
    assert!(turned_away(&mut server, limit + 1));
    connect(&mut server, 1000, remote(2), at(0));
    // Each way out of the unproven makes room for one: a proof, an end, a deadline.
    say(&mut server, 1, &hello(1, 1), at(0));
    connect(&mut server, 1001, remote(1), at(0));
    assert!(turned_away(&mut server, 1002));
    server.handle_disconnected(ConnId(2), at(0));
    connect(&mut server, 1003, remote(1), at(0));
    assert!(turned_away(&mut server, 1004));
    server.handle_timeout(at(0) + HELLO_TIMEOUT);
    for conn in 2000..2000 + limit {
        connect(&mut server, conn, remote(1), at(10));
    }
    assert!(turned_away(&mut server, 3000));
}

#[test]
fn those_turned_away_are_remembered_in_bounds() {
    let mut server = new_server(|config| config.max_connections = 0);
    for conn in 0..10_000 {
        server.handle_connected(ConnId(conn), remote(1), EXPORTER, at(0));
        events(&mut server);
    }
    assert!(server.turned_away.len() <= 256);
    assert_eq!(server.stats().connections, 0);
    assert_eq!(refused(&server, reason::MAX_CONNECTIONS), 10_000);
}

#[test]
fn namespaces_are_limited_in_all_and_new_ones_by_address() {
    let mut server = new_server(|config| config.max_namespaces = 1);
    join(&mut server, 1, 1, 1, at(0));
    connect(&mut server, 2, remote(2), at(0));
    let told = say(&mut server, 2, &hello(2, 2), at(0));
    assert_eq!(told, [refusal(ErrorCode::ServerFull, reason::MAX_NAMESPACES, EMPTY_NAMESPACE_TTL)]);
    join(&mut server, 3, 1, 3, at(0));

    let mut server = new_server(|_| {});
    let limit = u8::try_from(NEW_NAMESPACES_PER_IP_PER_HOUR).unwrap();
    let open = |server: &mut Server, conn: u64, cluster: u8, from: u8, now: Instant| {
        connect(server, conn, remote(from), now);
        say(server, conn, &hello(cluster, 1), now)
    };
    for cluster in 1..=limit {
        let told = open(&mut server, u64::from(cluster), cluster, 1, at(0));
        assert!(matches!(told.as_slice(), [ServerMessage::Welcome(_)]), "{told:?}");
    }
    let told = open(&mut server, 100, limit + 1, 1, at(600));
    let wait = Duration::from_secs(3000);
    assert_eq!(told, [refusal(ErrorCode::RateLimited, reason::NEW_NAMESPACES_PER_IP, wait)]);
    let told = open(&mut server, 101, limit, 1, at(600));
    assert!(matches!(told.as_slice(), [ServerMessage::Welcome(_)]), "one that is open stays open: {told:?}");
    let told = open(&mut server, 102, limit + 1, 2, at(600));
    assert!(matches!(told.as_slice(), [ServerMessage::Welcome(_)]), "another address: {told:?}");
}

#[test]
fn slots_and_puts_meet_their_limits_with_a_name() {
    let mut server = new_server(|config| config.max_slots_per_namespace = 2);
    for of in 1..=3 {
        join(&mut server, u64::from(of), 1, of, at(0));
    }
    for of in 1..=2 {
        assert_eq!(say(&mut server, u64::from(of), &put(of, 1), at(0)), [ServerMessage::Stored { seq: 1 }]);
    }
    let told = say(&mut server, 3, &put(3, 1), at(0));
    assert_eq!(told, [refusal(ErrorCode::ClusterFull, reason::MAX_SLOTS, FULL_RETRY_AFTER)]);
    // It may still watch, and the others still publish.
    let told = say(&mut server, 3, &watch(), at(0));
    assert_eq!(told.iter().filter(|message| matches!(message, ServerMessage::Frame(_))).count(), 2);
    for seq in 2..=u64::from(PUT_BURST) {
        assert_eq!(say(&mut server, 1, &put(1, seq), at(0)), [ServerMessage::Stored { seq }]);
    }
    let told = say(&mut server, 1, &put(1, 100), at(0));
    assert_eq!(told, [refusal(ErrorCode::RateLimited, reason::PUTS_PER_SLOT, PUT_INTERVAL)]);
    assert_eq!(say(&mut server, 1, &put(1, 100), at(1)), [ServerMessage::Stored { seq: 100 }]);
    assert_eq!(refused(&server, reason::PUTS_PER_SLOT), 1);
    assert_eq!(refused(&server, reason::MAX_SLOTS), 1);
}

#[test]
fn used_up_memory_refuses_new_slots_and_keeps_the_old_ones() {
    let frame = frame(keys(1).namespace, 1, Kind::Record, 1).as_bytes().len();
    let mut server = new_server(|config| config.max_stored_bytes = 2 * frame);
    for of in 1..=3 {
        join(&mut server, u64::from(of), 1, of, at(0));
    }
    for of in 1..=2 {
        assert_eq!(say(&mut server, u64::from(of), &put(of, 1), at(0)), [ServerMessage::Stored { seq: 1 }]);
    }
    let told = say(&mut server, 3, &put(3, 1), at(0));
    assert_eq!(told, [refusal(ErrorCode::ServerFull, reason::MAX_MEMORY, FULL_RETRY_AFTER)]);
    assert_eq!(say(&mut server, 2, &put(2, 2), at(0)), [ServerMessage::Stored { seq: 2 }]);
    assert_eq!(refused(&server, reason::MAX_MEMORY), 1);
    assert_eq!(server.stats().stored_bytes, 2 * frame as u64);
}

#[test]
fn a_relay_budget_that_is_met_is_told_by_name_and_costs_no_session() {
    let limits = RelayLimits { client_bytes: 1000, namespace_bytes: 1 << 30 };
    let mut server = new_server(|config| config.relay = Some(limits));
    join(&mut server, 1, 1, 1, at(0));
    join(&mut server, 2, 1, 2, at(0));
    let relay = ClientMessage::relay(&node(2), &[1; 1400]);
    // The client does not read: what it is told does not pile up.
    for second in 0..30 {
        for _ in 0..100 {
            server.handle_message(ConnId(1), &relay, at(second));
        }
    }
    let told = drain(&mut server, 1, at(30));
    assert_eq!(told.len(), MAX_QUEUED_REPLIES / 2);
    for message in &told {
        assert_eq!(code_and_limit(std::slice::from_ref(message)), (ErrorCode::RateLimited, reason::RELAY_CLIENT_BYTES));
    }
    assert_eq!(say(&mut server, 1, &ClientMessage::Ping(1).encode(), at(30)), [ServerMessage::Pong(1)]);
    assert!(server.stats().relay.dropped[reason::RELAY_CLIENT_BYTES] > 2900);
}

#[test]
fn a_node_with_too_many_sessions_loses_the_oldest() {
    let mut server = new_server(|_| {});
    let limit = u64::from(MAX_SESSIONS_PER_NODE);
    for conn in 1..=limit {
        join(&mut server, conn, 1, 1, at(0));
    }
    join(&mut server, limit + 1, 1, 1, at(0));
    assert_eq!(code_and_limit(&drain(&mut server, 1, at(0))), (ErrorCode::RateLimited, reason::SESSIONS_PER_NODE));
    assert_eq!(say(&mut server, 2, &put(1, 1), at(0)), [ServerMessage::Stored { seq: 1 }]);
    assert_eq!(say(&mut server, 1, &put(1, 2), at(0)), [], "closed");
}

#[test]
fn sessions_of_a_namespace_are_limited() {
    let mut server = new_server(|config| config.max_slots_per_namespace = 1);
    let limit = u8::try_from(2 + SPARE_SESSIONS_PER_NAMESPACE).unwrap();
    for of in 1..=limit {
        join(&mut server, u64::from(of), 1, of, at(0));
    }
    connect(&mut server, 100, remote(100), at(0));
    let told = say(&mut server, 100, &hello(1, 100), at(0));
    assert_eq!(told, [refusal(ErrorCode::ClusterFull, reason::SESSIONS_PER_NAMESPACE, FULL_RETRY_AFTER)]);
    server.handle_disconnected(ConnId(1), at(0));
    join(&mut server, 101, 1, 101, at(0));
}

#[test]
fn an_agent_that_asks_faster_than_it_reads_is_closed() {
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    for number in 0..MAX_QUEUED_REPLIES as u64 {
        server.handle_message(ConnId(1), &ClientMessage::Ping(number).encode(), at(0));
    }
    assert_eq!(events(&mut server), [ServerEvent::Wake(ConnId(1))]);
    server.handle_message(ConnId(1), &ClientMessage::Ping(99).encode(), at(0));
    assert!(events(&mut server).contains(&ServerEvent::Close(ConnId(1))));
    let told = drain(&mut server, 1, at(0));
    assert_eq!(code_and_limit(&told), (ErrorCode::Protocol, reason::QUEUED_REPLIES));
}
