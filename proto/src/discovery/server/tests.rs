#![allow(clippy::unwrap_used)]

mod limits;

use mesh_common::key::ClusterKeys;
use mesh_common::limits::{
    MAX_FAILED_PROOFS_PER_MINUTE, MAX_UNPROVEN_PER_IP, NEW_NAMESPACES_PER_IP_PER_HOUR, PUT_BURST, PUT_INTERVAL,
    SLOT_TTL, TOMBSTONE_TTL,
};
use proptest::prelude::*;

use super::*;
use crate::discovery::tests::{at, frame, identity, keys, node, server_config};
use crate::wire::frame::Kind;

const EXPORTER: [u8; 32] = [9; 32];
const NAME: &str = "disc.example:7443";

fn new_server(change: impl FnOnce(&mut ServerConfig)) -> Server {
    let mut config = server_config();
    change(&mut config);
    Server::new(config, [3; 32])
}

fn remote(last: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, last], 40_000))
}

fn hello_by(keys: &ClusterKeys, of: u8, binding: Binding) -> Bytes {
    ClientMessage::Hello(Box::new(Hello::sign(keys, &identity(of), [of; 16], NAME, binding))).encode()
}

fn hello(cluster: u8, of: u8) -> Bytes {
    hello_by(&keys(cluster), of, Binding::Exporter(EXPORTER))
}

/// A Hello that was signed for another connection.
fn stolen_hello(of: u8) -> Bytes {
    hello_by(&keys(1), of, Binding::Exporter([8; 32]))
}

fn put(of: u8, seq: u64) -> Bytes {
    ClientMessage::Put(frame(keys(1).namespace, of, Kind::Record, seq).as_bytes().clone()).encode()
}

fn watch() -> Bytes {
    ClientMessage::Watch(None).encode()
}

/// All this connection is told now.
fn drain(server: &mut Server, conn: u64, now: Instant) -> Vec<ServerMessage> {
    std::iter::from_fn(|| server.poll_transmit(ConnId(conn), now))
        .map(|bytes| ServerMessage::decode(&bytes).unwrap())
        .collect()
}

fn events(server: &mut Server) -> Vec<ServerEvent> {
    std::iter::from_fn(|| server.poll_event()).collect()
}

/// Connects; gives the challenge.
fn connect(server: &mut Server, conn: u64, from: SocketAddr, now: Instant) -> [u8; 32] {
    server.handle_connected(ConnId(conn), from, EXPORTER, now);
    match drain(server, conn, now).as_slice() {
        [ServerMessage::Challenge(challenge)] => *challenge,
        other => panic!("expected a challenge, got {other:?}"),
    }
}

/// Connects and proves; each node from an address of its own.
fn join(server: &mut Server, conn: u64, cluster: u8, of: u8, now: Instant) {
    connect(server, conn, remote(of), now);
    server.handle_message(ConnId(conn), &hello(cluster, of), now);
    let answer = drain(server, conn, now);
    assert!(matches!(answer.as_slice(), [ServerMessage::Welcome(_)]), "{answer:?}");
    events(server);
}

fn say(server: &mut Server, conn: u64, message: &Bytes, now: Instant) -> Vec<ServerMessage> {
    server.handle_message(ConnId(conn), message, now);
    drain(server, conn, now)
}

fn refusal(code: ErrorCode, limit: &str, retry_after: Duration) -> ServerMessage {
    ServerMessage::Error(error(code, limit, retry_after))
}

/// What is told, whatever the wait.
fn code_and_limit(messages: &[ServerMessage]) -> (ErrorCode, &str) {
    match messages {
        [ServerMessage::Error(error)] => (error.code, &error.limit),
        other => panic!("expected one error, got {other:?}"),
    }
}

fn refused(server: &Server, reason: &str) -> u64 {
    server.stats().refused.get(reason).copied().unwrap_or(0)
}

#[test]
fn a_session_from_challenge_to_farewell() {
    let mut server = new_server(|_| {});
    let namespace = keys(1).namespace;
    server.handle_connected(ConnId(1), remote(1), EXPORTER, at(0));
    assert_eq!(events(&mut server), [ServerEvent::Wake(ConnId(1))]);
    assert!(matches!(drain(&mut server, 1, at(0)).as_slice(), [ServerMessage::Challenge(_)]));

    server.handle_message(ConnId(1), &hello(1, 1), at(0));
    let joined = ServerEvent::Joined { conn: ConnId(1), namespace, node: node(1) };
    let expected = [ServerEvent::NamespaceOpened(namespace), joined, ServerEvent::Wake(ConnId(1))];
    assert_eq!(events(&mut server), expected);
    let welcome = ServerMessage::Welcome(Welcome {
        server_instance: 1,
        observed: remote(1),
        stun_ports: vec![3478, 3479],
        slot_ttl: SLOT_TTL,
        max_slots: 1024,
        relay: true,
        stun_alt: Vec::new(),
    });
    assert_eq!(drain(&mut server, 1, at(0)), [welcome]);

    assert_eq!(say(&mut server, 1, &put(1, 4), at(0)), [ServerMessage::Stored { seq: 4 }]);
    let cursor = Cursor { server_instance: 1, version: 1 };
    let own = ServerMessage::Frame(frame(namespace, 1, Kind::Record, 4).as_bytes().clone());
    assert_eq!(say(&mut server, 1, &watch(), at(0)), [ServerMessage::Restart, own, ServerMessage::Synced(cursor)]);
    let ping = ClientMessage::Ping(77).encode();
    assert_eq!(say(&mut server, 1, &ping, at(0)), [ServerMessage::Pong(77)]);
    events(&mut server);
    let stats = server.stats();
    assert_eq!((stats.connections, stats.namespaces, stats.slots), (1, 1, 1));
    assert_eq!((stats.hellos_accepted, stats.puts_accepted, stats.frames_sent), (1, 1, 1));
    assert_eq!(stats.refused, BTreeMap::new());

    server.handle_disconnected(ConnId(1), at(1));
    assert_eq!(events(&mut server), [ServerEvent::Left { namespace, node: node(1) }]);
    assert_eq!(server.poll_timeout().unwrap().0, at(1) + SLOT_TTL);
    server.handle_timeout(at(1) + SLOT_TTL);
    let freed_at = at(1) + SLOT_TTL + EMPTY_NAMESPACE_TTL;
    assert_eq!(server.poll_timeout().unwrap().0, freed_at);
    server.handle_timeout(freed_at);
    assert_eq!(events(&mut server), [ServerEvent::NamespaceFreed(namespace)]);
    assert_eq!(server.poll_timeout(), None);
    assert_eq!(server.stats().namespaces + server.stats().connections + server.stats().stored_bytes, 0);
}

#[test]
fn watchers_are_woken_once_and_told_when_they_can_take_it() {
    let mut server = new_server(|_| {});
    for of in 1..=3 {
        join(&mut server, u64::from(of), 1, of, at(0));
    }
    say(&mut server, 1, &watch(), at(0));
    events(&mut server);
    // 2 publishes three times, 1 is slow: woken once; 3 does not watch and hears nothing; 2 is only answered.
    for seq in 1..=3 {
        server.handle_message(ConnId(2), &put(2, seq), at(seq));
    }
    assert_eq!(events(&mut server), [ServerEvent::Wake(ConnId(1)), ServerEvent::Wake(ConnId(2))]);
    let newest = frame(keys(1).namespace, 2, Kind::Record, 3).as_bytes().clone();
    let cursor = Cursor { server_instance: 1, version: 3 };
    assert_eq!(drain(&mut server, 1, at(3)), [ServerMessage::Frame(newest), ServerMessage::Synced(cursor)]);
    assert_eq!(drain(&mut server, 3, at(3)), []);
    drain(&mut server, 2, at(3));
    server.handle_message(ConnId(2), &put(2, 4), at(4));
    assert!(events(&mut server).contains(&ServerEvent::Wake(ConnId(1))), "woken again after it had polled all");
}

#[test]
fn replies_come_before_watch_messages() {
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    join(&mut server, 2, 1, 2, at(0));
    say(&mut server, 2, &put(2, 1), at(0));
    server.handle_message(ConnId(1), &watch(), at(0));
    server.handle_message(ConnId(1), &ClientMessage::Ping(1).encode(), at(0));
    let told = drain(&mut server, 1, at(0));
    assert!(
        matches!(
            told.as_slice(),
            [ServerMessage::Pong(1), ServerMessage::Restart, ServerMessage::Frame(_), ServerMessage::Synced(_)]
        ),
        "{told:?}"
    );
}

#[test]
fn nothing_of_another_cluster_is_told() {
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    join(&mut server, 2, 2, 2, at(0));
    say(&mut server, 2, &watch(), at(0));
    events(&mut server);
    say(&mut server, 1, &put(1, 1), at(0));
    assert_eq!(drain(&mut server, 2, at(0)), []);
    assert!(!events(&mut server).contains(&ServerEvent::Wake(ConnId(2))));
    let told = say(&mut server, 2, &watch(), at(0));
    assert!(matches!(told.as_slice(), [ServerMessage::Restart, ServerMessage::Synced(_)]), "{told:?}");
}

#[test]
fn a_datagram_goes_to_its_node_beside_the_control_messages() {
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    join(&mut server, 2, 1, 2, at(0));
    assert_eq!(say(&mut server, 1, &ClientMessage::relay(&node(2), b"sealed"), at(0)), [], "no answer");
    assert_eq!(events(&mut server), [ServerEvent::Wake(ConnId(2))]);
    assert_eq!(drain(&mut server, 2, at(0)), [], "a lane of its own");
    let expected = ServerMessage::relayed(&node(1), b"sealed");
    assert_eq!((server.poll_relay(ConnId(2)), server.poll_relay(ConnId(2))), (Some(expected), None));
    assert_eq!((server.stats().relay.datagrams, server.stats().relay.bytes), (1, 6));

    // Whoever has left is not reached, and the session that relays to him stays.
    server.handle_disconnected(ConnId(2), at(1));
    events(&mut server);
    let relay = ClientMessage::relay(&node(2), b"sealed");
    assert_eq!(say(&mut server, 1, &relay, at(1)), [ServerMessage::NoPeer(node(2))]);
    assert_eq!(say(&mut server, 1, &relay, at(1)), [], "told once a second");
    assert_eq!(server.poll_relay(ConnId(2)), None);
}

#[test]
fn what_a_session_relays_keeps_it_alive_and_its_end_ends_the_relay() {
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    join(&mut server, 2, 1, 2, at(0));
    server.handle_message(ConnId(2), &ClientMessage::Ping(1).encode(), at(10));
    server.handle_message(ConnId(1), &ClientMessage::relay(&node(2), b"sealed"), at(10));
    server.handle_timeout(at(0) + SESSION_IDLE);
    assert_eq!(server.stats().connections, 2);
    // Closed by the machine, its carrier still there: nothing is forwarded to it any more.
    server.handle_message(ConnId(2), &Bytes::new(), at(16));
    assert_eq!(server.poll_relay(ConnId(2)), None);
    events(&mut server);
    drain(&mut server, 1, at(16));
    let told = say(&mut server, 1, &ClientMessage::relay(&node(2), b"sealed"), at(16));
    assert_eq!(told, [ServerMessage::NoPeer(node(2))]);
}

#[test]
fn a_server_without_relay_says_so() {
    let mut server = new_server(|config| config.relay = None);
    connect(&mut server, 1, remote(1), at(0));
    let told = say(&mut server, 1, &hello(1, 1), at(0));
    assert!(matches!(told.as_slice(), [ServerMessage::Welcome(Welcome { relay: false, .. })]), "{told:?}");
    join(&mut server, 2, 1, 2, at(0));
    let told = say(&mut server, 1, &ClientMessage::relay(&node(2), b"sealed"), at(0));
    assert_eq!((told, server.poll_relay(ConnId(2))), (vec![ServerMessage::NoPeer(node(2))], None));
}

#[test]
fn only_hello_comes_first_and_only_once() {
    let relay = ClientMessage::relay(&node(2), b"sealed");
    let first = [put(1, 1), watch(), ClientMessage::Ping(1).encode(), relay, Bytes::from_static(&[0x7f])];
    for message in first {
        let mut server = new_server(|_| {});
        connect(&mut server, 1, remote(1), at(0));
        events(&mut server);
        let told = say(&mut server, 1, &message, at(0));
        assert_eq!(code_and_limit(&told), (ErrorCode::Protocol, reason::OUT_OF_ORDER));
        assert!(events(&mut server).contains(&ServerEvent::Close(ConnId(1))));
        // Not even a good proof helps any more.
        assert_eq!(say(&mut server, 1, &hello(1, 1), at(0)), []);
    }
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    let told = say(&mut server, 1, &hello(1, 1), at(0));
    assert_eq!(code_and_limit(&told), (ErrorCode::Protocol, reason::OUT_OF_ORDER));
    let namespace = keys(1).namespace;
    let left = ServerEvent::Left { namespace, node: node(1) };
    assert_eq!(events(&mut server), [left, ServerEvent::Close(ConnId(1))]);
}

#[test]
fn malformed_and_oversized_messages_end_the_session_and_unknown_ones_do_not() {
    let hello_cut = hello(1, 1).slice(..40);
    let cases = [
        (hello_cut, ErrorCode::Protocol, reason::MALFORMED),
        (Bytes::new(), ErrorCode::Protocol, reason::MALFORMED),
        (Bytes::from(vec![2; MAX_MESSAGE + 1]), ErrorCode::TooLarge, reason::MAX_MESSAGE),
    ];
    for (message, code, limit) in cases {
        let mut server = new_server(|_| {});
        join(&mut server, 1, 1, 1, at(0));
        assert_eq!(code_and_limit(&say(&mut server, 1, &message, at(0))), (code, limit));
        assert!(events(&mut server).contains(&ServerEvent::Close(ConnId(1))));
        assert_eq!(refused(&server, limit), 1);
    }
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    assert_eq!(say(&mut server, 1, &Bytes::from_static(&[0x7f, 1, 2]), at(0)), []);
    assert_eq!(refused(&server, reason::UNKNOWN_MESSAGE), 1);
    // The largest message that is allowed is looked at: no frame is that long.
    let told = say(&mut server, 1, &Bytes::from(vec![2; MAX_MESSAGE]), at(0));
    assert_eq!(code_and_limit(&told), (ErrorCode::BadFrame, reason::BAD_FRAME));
    assert_eq!(say(&mut server, 1, &put(1, 1), at(0)), [ServerMessage::Stored { seq: 1 }]);
}

#[test]
fn a_proof_is_good_for_its_own_connection_and_by_both_keys() {
    let forged = |change: fn(&mut Hello)| {
        let mut hello = Hello::sign(&keys(1), &identity(1), [1; 16], NAME, Binding::Exporter(EXPORTER));
        change(&mut hello);
        ClientMessage::Hello(Box::new(hello)).encode()
    };
    let cases = [
        stolen_hello(1),
        forged(|hello| hello.node = node(2)),
        forged(|hello| hello.namespace = keys(2).namespace),
        forged(|hello| hello.membership_signature[0] ^= 1),
        forged(|hello| hello.identity_signature[0] ^= 1),
        forged(|hello| hello.server_name = "other.example:7443".to_owned()),
        forged(|hello| hello.mode = BindingMode::Challenge),
    ];
    for (index, message) in cases.into_iter().enumerate() {
        let mut server = new_server(|config| config.own_names = BTreeSet::from(["disc.example".to_owned()]));
        connect(&mut server, 1, remote(1), at(0));
        let told = say(&mut server, 1, &message, at(0));
        assert_eq!(code_and_limit(&told), (ErrorCode::AuthFailed, reason::BAD_PROOF), "case {index}");
        assert!(events(&mut server).contains(&ServerEvent::Close(ConnId(1))));
        assert_eq!(server.stats().hellos_accepted, 0);
        assert_eq!(server.stats().namespaces, 0);
    }
}

#[test]
fn a_challenge_is_answered_for_own_names_only_and_on_its_own_connection() {
    let by_challenge = |name: &str, challenge| {
        let hello = Hello::sign(&keys(1), &identity(1), [1; 16], name, Binding::Challenge(challenge));
        ClientMessage::Hello(Box::new(hello)).encode()
    };
    let own = || new_server(|config| config.own_names = ["disc.example", "2001:db8::1"].map(str::to_owned).into());
    for name in ["disc.example:7443", "DISC.example:443", "disc.example", "[2001:db8::1]:7443"] {
        let mut server = own();
        let challenge = connect(&mut server, 1, remote(1), at(0));
        let told = say(&mut server, 1, &by_challenge(name, challenge), at(0));
        assert!(matches!(told.as_slice(), [ServerMessage::Welcome(_)]), "{name}: {told:?}");
    }
    let mut server = own();
    let challenge = connect(&mut server, 1, remote(1), at(0));
    let told = say(&mut server, 1, &by_challenge("evil.example:7443", challenge), at(0));
    assert_eq!(code_and_limit(&told), (ErrorCode::AuthFailed, reason::OWN_NAME));
    // Another connection has another challenge.
    let other = connect(&mut server, 2, remote(1), at(0));
    assert_ne!(challenge, other);
    let told = say(&mut server, 2, &by_challenge(NAME, challenge), at(0));
    assert_eq!(code_and_limit(&told), (ErrorCode::AuthFailed, reason::BAD_PROOF));

    let mut nameless = new_server(|_| {});
    let challenge = connect(&mut nameless, 1, remote(1), at(0));
    let told = say(&mut nameless, 1, &by_challenge(NAME, challenge), at(0));
    assert_eq!(code_and_limit(&told), (ErrorCode::AuthFailed, reason::OWN_NAME));
}

#[test]
fn a_closed_server_lets_its_own_clusters_in_only() {
    let mut server = new_server(|config| config.only_namespaces = BTreeSet::from([keys(1).namespace]));
    join(&mut server, 1, 1, 1, at(0));
    connect(&mut server, 2, remote(2), at(0));
    let told = say(&mut server, 2, &hello(2, 2), at(0));
    assert_eq!(code_and_limit(&told), (ErrorCode::NamespaceRefused, reason::ONLY_NAMESPACE));
    assert!(events(&mut server).contains(&ServerEvent::Close(ConnId(2))));
    // Who cannot prove membership does not learn which namespaces are served.
    connect(&mut server, 3, remote(2), at(0));
    let mut hello = Hello::sign(&keys(2), &identity(2), [1; 16], NAME, Binding::Exporter(EXPORTER));
    hello.namespace = keys(1).namespace;
    let told = say(&mut server, 3, &ClientMessage::Hello(Box::new(hello)).encode(), at(0));
    assert_eq!(code_and_limit(&told).0, ErrorCode::AuthFailed);
}

#[test]
fn puts_of_others_bad_frames_and_old_ones_are_refused_and_the_session_stays() {
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    say(&mut server, 1, &put(1, 5), at(0));
    let forged = {
        let mut bytes = put(1, 9).to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        Bytes::from(bytes)
    };
    let other_cluster = ClientMessage::Put(frame(keys(2).namespace, 1, Kind::Record, 9).as_bytes().clone()).encode();
    let cases = [
        (put(2, 9), ErrorCode::BadFrame, reason::FOREIGN_FRAME),
        (other_cluster, ErrorCode::BadFrame, reason::FOREIGN_FRAME),
        (forged, ErrorCode::BadFrame, reason::BAD_FRAME),
        (put(1, 9).slice(..100), ErrorCode::BadFrame, reason::BAD_FRAME),
        (put(1, 4), ErrorCode::Stale, reason::STALE_FRAME),
    ];
    for (message, code, limit) in cases {
        assert_eq!(code_and_limit(&say(&mut server, 1, &message, at(0))), (code, limit));
    }
    assert_eq!(say(&mut server, 1, &put(1, 5), at(0)), [ServerMessage::Stored { seq: 5 }], "the same again is fine");
    assert_eq!(events(&mut server).iter().filter(|event| matches!(event, ServerEvent::Close(_))).count(), 0);
}

#[test]
fn a_farewell_reaches_watchers_and_keeps_older_frames_out() {
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    join(&mut server, 2, 1, 2, at(0));
    say(&mut server, 1, &put(1, 5), at(0));
    say(&mut server, 2, &watch(), at(0));
    let farewell = frame(keys(1).namespace, 1, Kind::Tombstone, 6).as_bytes().clone();
    let told = say(&mut server, 1, &ClientMessage::Put(farewell.clone()).encode(), at(0));
    assert_eq!(told, [ServerMessage::Stored { seq: 6 }]);
    assert_eq!(drain(&mut server, 2, at(0))[0], ServerMessage::Frame(farewell));
    assert_eq!(server.stats().slots, 0);
    assert_eq!(code_and_limit(&say(&mut server, 1, &put(1, 5), at(0))).0, ErrorCode::Stale);
    for conn in [1, 2] {
        server.handle_disconnected(ConnId(conn), at(1));
    }
    server.handle_timeout(at(0) + TOMBSTONE_TTL);
    server.handle_timeout(at(0) + TOMBSTONE_TTL + EMPTY_NAMESPACE_TTL);
    assert_eq!(server.stats().namespaces, 0);
}

#[test]
fn one_node_on_two_connections_is_one_member() {
    let mut server = new_server(|_| {});
    let namespace = keys(1).namespace;
    join(&mut server, 1, 1, 1, at(0));
    join(&mut server, 2, 1, 1, at(0));
    say(&mut server, 1, &put(1, 1), at(0));
    assert_eq!(say(&mut server, 2, &put(1, 2), at(0)), [ServerMessage::Stored { seq: 2 }]);
    assert_eq!(code_and_limit(&say(&mut server, 1, &put(1, 1), at(0))).0, ErrorCode::Stale);
    assert_eq!(server.stats().slots, 1);
    // Each hears what the other says: that is how a cloned identity shows.
    let told = |seq| ServerMessage::Frame(frame(namespace, 1, Kind::Record, seq).as_bytes().clone());
    assert!(say(&mut server, 1, &watch(), at(0)).contains(&told(2)));
    say(&mut server, 2, &put(1, 3), at(0));
    assert!(drain(&mut server, 1, at(0)).contains(&told(3)));
    events(&mut server);
    server.handle_disconnected(ConnId(1), at(1));
    assert_eq!(events(&mut server), [], "it is still there");
    server.handle_timeout(at(10));
    say(&mut server, 2, &ClientMessage::Ping(1).encode(), at(10));
    events(&mut server);
    server.handle_disconnected(ConnId(2), at(11));
    assert_eq!(events(&mut server), [ServerEvent::Left { namespace, node: node(1) }]);
}

#[test]
fn silent_connections_are_closed_in_time() {
    let mut server = new_server(|_| {});
    connect(&mut server, 1, remote(1), at(0));
    join(&mut server, 2, 1, 2, at(0));
    assert_eq!(server.poll_timeout().unwrap().0, at(0) + HELLO_TIMEOUT);
    server.handle_timeout(at(0) + (HELLO_TIMEOUT - Duration::from_nanos(1)));
    assert_eq!(events(&mut server), [], "not early");
    server.handle_timeout(at(0) + HELLO_TIMEOUT);
    assert_eq!(events(&mut server), [ServerEvent::Close(ConnId(1))]);
    assert_eq!(code_and_limit(&drain(&mut server, 1, at(10))), (ErrorCode::Protocol, reason::HELLO_TIMEOUT));
    server.handle_disconnected(ConnId(1), at(10));

    // Anything it says keeps a session: the deadline moves on when it fires.
    say(&mut server, 2, &ClientMessage::Ping(1).encode(), at(14));
    events(&mut server);
    server.handle_timeout(at(0) + SESSION_IDLE);
    assert_eq!(events(&mut server), []);
    assert_eq!(server.poll_timeout().unwrap().0, at(14) + SESSION_IDLE);
    server.handle_timeout(at(14) + SESSION_IDLE);
    let left = ServerEvent::Left { namespace: keys(1).namespace, node: node(2) };
    assert_eq!(events(&mut server), [left, ServerEvent::Close(ConnId(2))]);
    assert_eq!(refused(&server, reason::IDLE), 1);
    // A carrier that never ends is forgotten.
    server.handle_timeout(at(14) + SESSION_IDLE + CLOSE_GRACE);
    assert_eq!(server.stats().connections, 0);
}

#[test]
fn a_shutdown_asks_everybody_to_come_back_and_turns_newcomers_away() {
    let mut server = new_server(|_| {});
    join(&mut server, 1, 1, 1, at(0));
    connect(&mut server, 2, remote(2), at(0));
    events(&mut server);
    let spread = Duration::from_secs(20);
    server.handle_shutdown(spread, at(5));
    events(&mut server);
    for conn in [1, 2] {
        assert_eq!(drain(&mut server, conn, at(5)), [ServerMessage::Drain { retry_after: spread }]);
    }
    assert_eq!(drain(&mut server, 1, at(6)), [], "once");
    server.handle_connected(ConnId(3), remote(3), EXPORTER, at(10));
    assert_eq!(events(&mut server), [ServerEvent::Close(ConnId(3))]);
    let rest = ServerMessage::Drain { retry_after: Duration::from_secs(15) };
    assert_eq!(drain(&mut server, 3, at(10)), [rest]);
}

#[derive(Debug, Clone)]
enum Input {
    Connect { conn: u64, from: u8 },
    Hello { conn: u64, cluster: u8, of: u8, stolen: bool },
    Put { conn: u64, of: u8, seq: u64, farewell: bool },
    Watch { conn: u64, version: Option<u64> },
    Bytes { conn: u64, bytes: Vec<u8> },
    Poll { conn: u64 },
    Disconnect { conn: u64 },
    Wait { seconds: u64 },
    Shutdown,
}

fn inputs() -> impl Strategy<Value = Vec<Input>> {
    let conn = || 0..8_u64;
    let of = || 1..5_u8;
    let input = prop_oneof![
        6 => (conn(), of()).prop_map(|(conn, from)| Input::Connect { conn, from }),
        8 => (conn(), 1..4_u8, of(), prop::bool::weighted(0.2))
            .prop_map(|(conn, cluster, of, stolen)| Input::Hello { conn, cluster, of, stolen }),
        8 => (conn(), of(), 1..20_u64, prop::bool::weighted(0.2))
            .prop_map(|(conn, of, seq, farewell)| Input::Put { conn, of, seq, farewell }),
        3 => (conn(), proptest::option::of(0..20_u64)).prop_map(|(conn, version)| Input::Watch { conn, version }),
        2 => (conn(), proptest::collection::vec(any::<u8>(), 0..80)).prop_map(|(conn, bytes)| Input::Bytes { conn, bytes }),
        8 => conn().prop_map(|conn| Input::Poll { conn }),
        3 => conn().prop_map(|conn| Input::Disconnect { conn }),
        3 => prop_oneof![Just(1), Just(9), Just(31), Just(121), Just(3600)].prop_map(|seconds| Input::Wait { seconds }),
        1 => prop::bool::weighted(0.05).prop_map(|stop| if stop { Input::Shutdown } else { Input::Wait { seconds: 0 } }),
    ];
    proptest::collection::vec(input, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes in whatever order: no panic, everything counted once, and nothing left when all are gone.
    #[test]
    fn any_input_is_survived_and_leaves_nothing_behind(inputs in inputs()) {
        let mut server = new_server(|config| {
            config.max_connections = 5;
            config.max_namespaces = 2;
            config.max_slots_per_namespace = 2;
        });
        let mut now = at(1);
        for input in inputs {
            match input {
                Input::Connect { conn, from } => server.handle_connected(ConnId(conn), remote(from), EXPORTER, now),
                Input::Hello { conn, cluster, of, stolen } => {
                    let hello = if stolen { stolen_hello(of) } else { hello(cluster, of) };
                    server.handle_message(ConnId(conn), &hello, now);
                }
                Input::Put { conn, of, seq, farewell } => {
                    let kind = if farewell { Kind::Tombstone } else { Kind::Record };
                    let put = ClientMessage::Put(frame(keys(1).namespace, of, kind, seq).as_bytes().clone()).encode();
                    server.handle_message(ConnId(conn), &put, now);
                }
                Input::Watch { conn, version } => {
                    let cursor = version.map(|version| Cursor { server_instance: 1, version });
                    server.handle_message(ConnId(conn), &ClientMessage::Watch(cursor).encode(), now);
                }
                Input::Bytes { conn, bytes } => server.handle_message(ConnId(conn), &bytes, now),
                Input::Poll { conn } => while server.poll_transmit(ConnId(conn), now).is_some() {},
                Input::Disconnect { conn } => server.handle_disconnected(ConnId(conn), now),
                Input::Wait { seconds } => {
                    now += Duration::from_secs(seconds);
                    server.handle_timeout(now);
                }
                Input::Shutdown => server.handle_shutdown(Duration::from_secs(5), now),
            }
            let wakes: Vec<ConnId> = events(&mut server)
                .into_iter()
                .filter_map(|event| if let ServerEvent::Wake(conn) = event { Some(conn) } else { None })
                .collect();
            prop_assert_eq!(wakes.len(), wakes.iter().collect::<BTreeSet<_>>().len(), "one wake a connection");
            prop_assert!(server.connections.len() <= 5);
            prop_assert_eq!(server.deadlines.len(), server.connections.len());
            let members: usize = server.sessions.values().map(BTreeMap::len).sum();
            let phases = |wanted: fn(&Phase) -> bool| {
                server.connections.values().filter(|connection| wanted(&connection.phase)).count()
            };
            prop_assert_eq!(members, phases(|phase| matches!(phase, Phase::Member { .. })));
        }
        for conn in 0..8 {
            server.handle_disconnected(ConnId(conn), now);
        }
        while let Some((due, _)) = server.poll_timeout() {
            now = now.max(due);
            server.handle_timeout(now);
        }
        let stats = server.stats();
        prop_assert_eq!((stats.connections, stats.namespaces, stats.slots, stats.stored_bytes), (0, 0, 0, 0));
        prop_assert!(server.turned_away.is_empty() && server.sessions.is_empty());
        // Nobody counts as unproven any more: the whole budget is there again.
        let mut server = Server { draining: None, config: server_config(), ..server };
        for conn in 0..MAX_UNPROVEN_PER_IP as u64 {
            connect(&mut server, 100 + conn, remote(1), now);
        }
    }
}

#[test]
fn input_for_connections_that_are_not_there_changes_nothing() {
    let mut server = new_server(|_| {});
    server.handle_message(ConnId(5), &hello(1, 1), at(0));
    server.handle_disconnected(ConnId(5), at(0));
    assert_eq!(server.poll_transmit(ConnId(5), at(0)), None);
    assert_eq!(events(&mut server), []);
    assert_eq!(server.stats(), ServerStats::default());
}

#[test]
fn an_observed_address_is_said_plainly() {
    let mut server = new_server(|_| {});
    server.handle_connected(ConnId(1), "[::ffff:192.0.2.7]:4000".parse().unwrap(), EXPORTER, at(0));
    server.handle_message(ConnId(1), &hello(1, 1), at(0));
    match drain(&mut server, 1, at(0)).last() {
        Some(ServerMessage::Welcome(welcome)) => assert_eq!(welcome.observed, "192.0.2.7:4000".parse().unwrap()),
        other => panic!("{other:?}"),
    }
}
