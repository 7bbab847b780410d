#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::discovery::tests::{at, client_config, frame, keys, node};
use crate::wire::session::Welcome;

const EXPORTER: [u8; 32] = [9; 32];
const SEED: u64 = 11;

fn dialing() -> Client {
    let mut client = Client::new(client_config(1), SEED, at(0));
    assert_eq!(events(&mut client), [ClientEvent::Dial]);
    client
}

/// Welcomed at this moment, nothing synced yet; what it says is polled.
fn syncing(client: &mut Client, now: Instant) {
    client.handle_connected(EXPORTER, now);
    sent(client);
    receive(client, &welcome(), now);
    assert_eq!(client.state(), ClientState::Syncing);
    events(client);
}

/// Live with one listed node (2) and this cursor.
fn live(client: &mut Client, version: u64, now: Instant) {
    syncing(client, now);
    receive(client, &ServerMessage::Restart, now);
    receive(client, &ServerMessage::Frame(record(2, 1).as_bytes().clone()), now);
    receive(client, &synced(version), now);
    assert_eq!(client.state(), ClientState::Live);
    events(client);
}

fn welcome() -> ServerMessage {
    ServerMessage::Welcome(Welcome {
        server_instance: 5,
        observed: SocketAddr::from(([192, 0, 2, 1], 4000)),
        stun_ports: vec![3478],
        slot_ttl: Duration::from_secs(120),
        max_slots: 1024,
        relay: true,
        stun_alt: vec![SocketAddr::from(([192, 0, 2, 2], 3478))],
    })
}

fn synced(version: u64) -> ServerMessage {
    ServerMessage::Synced(cursor(version))
}

fn cursor(version: u64) -> Cursor {
    Cursor { server_instance: 5, version }
}

fn record(of: u8, seq: u64) -> Frame {
    frame(keys(1).namespace, of, Kind::Record, seq)
}

fn refusal(code: ErrorCode, retry_after: Duration) -> ServerMessage {
    ServerMessage::Error(SessionError { code, limit: "some-limit".to_owned(), retry_after })
}

fn relayed() -> ServerMessage {
    ServerMessage::Relayed { from: node(2), payload: Bytes::from_static(b"sealed") }
}

fn receive(client: &mut Client, message: &ServerMessage, now: Instant) {
    client.handle_message(&message.encode(), now);
}

fn sent(client: &mut Client) -> Vec<ClientMessage> {
    std::iter::from_fn(|| client.poll_transmit()).map(|bytes| ClientMessage::decode(&bytes).unwrap()).collect()
}

fn events(client: &mut Client) -> Vec<ClientEvent> {
    std::iter::from_fn(|| client.poll_event()).collect()
}

/// The events of a session that we ended ourselves: the reason and the pause.
fn hung_up(client: &mut Client) -> (String, Duration) {
    let events = events(client);
    match events.as_slice() {
        [.., ClientEvent::HangUp, ClientEvent::Lost { reason, retry_in }] => (reason.clone(), *retry_in),
        other => panic!("expected a hang-up, got {other:?}"),
    }
}

fn lost(client: &mut Client) -> Duration {
    match events(client).as_slice() {
        [ClientEvent::Lost { retry_in, .. }] => *retry_in,
        other => panic!("expected a loss, got {other:?}"),
    }
}

fn assert_between(wait: Duration, low: Duration, high: Duration) {
    assert!(low <= wait && wait <= high, "{wait:?} is not between {low:?} and {high:?}");
}

#[test]
fn proof_record_and_watch_leave_in_one_flight() {
    let mut client = dialing();
    client.publish(record(1, 3), at(0));
    assert_eq!(sent(&mut client), []);
    client.handle_connected(EXPORTER, at(1));
    assert_eq!(client.state(), ClientState::Proving);
    match sent(&mut client).as_slice() {
        [ClientMessage::Hello(hello), ClientMessage::Put(put), ClientMessage::Watch(None)] => {
            assert!(hello.verify(Binding::Exporter(EXPORTER)));
            assert_eq!((hello.node, hello.namespace), (node(1), keys(1).namespace));
            assert_eq!(hello.server_name, "disc.example:7443");
            assert_eq!(put, record(1, 3).as_bytes());
        }
        other => panic!("{other:?}"),
    }
    receive(&mut client, &welcome(), at(1));
    let welcomed = ClientEvent::Welcomed {
        observed: SocketAddr::from(([192, 0, 2, 1], 4000)),
        stun_ports: vec![3478],
        stun_alt: vec![SocketAddr::from(([192, 0, 2, 2], 3478))],
        relay: true,
    };
    assert_eq!(events(&mut client), [welcomed]);
    receive(&mut client, &ServerMessage::Stored { seq: 3 }, at(1));
    assert_eq!(events(&mut client), [ClientEvent::Stored { seq: 3 }]);
}

#[test]
fn a_snapshot_is_told_then_deltas() {
    let mut client = dialing();
    syncing(&mut client, at(0));
    let others = [record(2, 1), record(3, 1)];
    receive(&mut client, &ServerMessage::Restart, at(0));
    for frame in &others {
        receive(&mut client, &ServerMessage::Frame(frame.as_bytes().clone()), at(0));
    }
    receive(&mut client, &synced(4), at(0));
    let frames = others.map(|frame| ClientEvent::Frame(frame.as_bytes().clone()));
    let whole = ClientEvent::Synced { listed: BTreeSet::from([node(2), node(3)]) };
    assert_eq!(events(&mut client), [frames[0].clone(), frames[1].clone(), whole]);
    assert_eq!(client.state(), ClientState::Live);

    let farewell = frame(keys(1).namespace, 2, Kind::Tombstone, 2).as_bytes().clone();
    receive(&mut client, &ServerMessage::Frame(farewell.clone()), at(1));
    receive(&mut client, &ServerMessage::Gone(node(3)), at(1));
    receive(&mut client, &synced(6), at(1));
    let nobody = ClientEvent::Synced { listed: BTreeSet::new() };
    assert_eq!(events(&mut client), [ClientEvent::Frame(farewell), ClientEvent::Gone(node(3)), nobody]);
}

#[test]
fn a_reconnect_resumes_by_cursor_and_keeps_the_list() {
    let mut client = dialing();
    live(&mut client, 4, at(0));
    client.handle_disconnected("connection reset", at(1));
    let pause = lost(&mut client);
    client.handle_timeout(at(1) + pause);
    assert_eq!(events(&mut client), [ClientEvent::Dial]);
    client.handle_connected(EXPORTER, at(2));
    assert!(matches!(sent(&mut client).as_slice(), [_, ClientMessage::Watch(Some(at))] if *at == cursor(4)));
    receive(&mut client, &welcome(), at(2));
    receive(&mut client, &ServerMessage::Frame(record(3, 1).as_bytes().clone()), at(2));
    receive(&mut client, &synced(5), at(2));
    let listed = BTreeSet::from([node(2), node(3)]);
    assert_eq!(events(&mut client).last(), Some(&ClientEvent::Synced { listed }));
}

#[test]
fn a_snapshot_cut_off_starts_over() {
    let mut client = dialing();
    live(&mut client, 4, at(0));
    receive(&mut client, &ServerMessage::Restart, at(1));
    assert_eq!(client.state(), ClientState::Syncing);
    client.handle_disconnected("connection reset", at(1));
    client.handle_network_changed(at(2));
    client.handle_connected(EXPORTER, at(2));
    assert!(matches!(sent(&mut client).as_slice(), [_, ClientMessage::Watch(None)]));
}

#[test]
fn pauses_double_with_jitter_and_start_over_after_a_stable_session() {
    let mut client = dialing();
    let mut now = at(0);
    let mut most = RECONNECT_MIN;
    for _ in 0..10 {
        client.handle_disconnected("connection refused", now);
        let pause = lost(&mut client);
        assert_between(pause, most / 2, most);
        assert_eq!(client.state(), ClientState::Waiting { until: now + pause });
        assert_eq!(client.poll_timeout().unwrap().0, now + pause);
        client.handle_timeout(now + (pause - Duration::from_nanos(1)));
        assert_eq!(events(&mut client), [], "not early");
        now += pause;
        client.handle_timeout(now);
        assert_eq!(events(&mut client), [ClientEvent::Dial]);
        most = (most * 2).min(RECONNECT_MAX);
    }
    assert_eq!(most, RECONNECT_MAX);
    // A short session changes nothing, a stable one does.
    live(&mut client, 1, now);
    client.handle_disconnected("connection reset", now + STABLE_AFTER / 2);
    assert_between(lost(&mut client), RECONNECT_MAX / 2, RECONNECT_MAX);
    now += Duration::from_secs(60);
    client.handle_timeout(now);
    events(&mut client);
    live(&mut client, 2, now);
    client.handle_disconnected("connection reset", now + STABLE_AFTER);
    assert_between(lost(&mut client), RECONNECT_MIN / 2, RECONNECT_MIN);
}

#[test]
fn two_agents_do_not_come_back_together() {
    let pauses: BTreeSet<Duration> = (0..20)
        .map(|seed| {
            let mut client = Client::new(client_config(1), seed, at(0));
            events(&mut client);
            client.handle_disconnected("connection refused", at(0));
            lost(&mut client)
        })
        .collect();
    assert_eq!(pauses.len(), 20);
}

#[test]
fn a_changed_network_is_tried_at_once() {
    let mut client = dialing();
    for _ in 0..8 {
        client.handle_disconnected("network unreachable", at(0));
        client.handle_network_changed(at(0));
    }
    events(&mut client);
    assert_eq!(client.state(), ClientState::Dialing);
    client.handle_network_changed(at(0));
    assert_eq!(events(&mut client), [], "an attempt is under way");
    client.handle_disconnected("network unreachable", at(0));
    assert_between(lost(&mut client), RECONNECT_MIN / 2, RECONNECT_MIN);
}

#[test]
fn an_attempt_from_before_a_change_of_the_network_ends_soon_and_starts_anew_at_once() {
    let ms = |ms| at(0) + Duration::from_millis(ms);
    let mut client = dialing();
    client.handle_network_changed(ms(100));
    assert_eq!(client.poll_timeout().unwrap().0, at(0) + RECONNECT_MIN, "it may still come through");
    client.handle_network_changed(ms(200));
    client.handle_timeout(at(0) + RECONNECT_MIN);
    assert_eq!(hung_up(&mut client), ("the network changed".to_owned(), Duration::ZERO));
    client.handle_timeout(at(0) + RECONNECT_MIN);
    assert_eq!(events(&mut client), [ClientEvent::Dial]);
    // Connected in time: nothing is given up.
    client.handle_network_changed(ms(600));
    live(&mut client, 1, ms(700));
    client.handle_timeout(ms(2000));
    assert_eq!((events(&mut client), client.state()), (vec![], ClientState::Live));
    // A proof that is not answered is an attempt too.
    let mut client = dialing();
    client.handle_connected(EXPORTER, ms(100));
    client.handle_network_changed(ms(3000));
    client.handle_timeout(ms(3000));
    assert_eq!(hung_up(&mut client).1, Duration::ZERO);
}

#[test]
fn a_session_shows_at_once_that_it_survived_a_change_of_the_network() {
    let mut client = dialing();
    live(&mut client, 1, at(0));
    client.handle_network_changed(at(10));
    assert_eq!(sent(&mut client), [ClientMessage::Ping(1)]);
    receive(&mut client, &ServerMessage::Pong(1), at(11));
    client.handle_timeout(at(12));
    assert_eq!((events(&mut client), client.state()), (vec![], ClientState::Live));
}

#[test]
fn a_session_that_did_not_survive_a_change_of_the_network_is_replaced_at_once() {
    let mut client = dialing();
    live(&mut client, 1, at(0));
    client.handle_timeout(at(0) + SESSION_KEEPALIVE);
    assert_eq!(sent(&mut client), [ClientMessage::Ping(1)]);
    client.handle_network_changed(at(7));
    assert_eq!(sent(&mut client), [ClientMessage::Ping(2)]);
    let dead_at = at(7) + PROBE_TIMEOUT;
    assert_eq!(client.poll_timeout().unwrap().0, dead_at);
    // What was on its way before says nothing, and a second change puts nothing off.
    receive(&mut client, &ServerMessage::Pong(1), at(7));
    receive(&mut client, &relayed(), at(7));
    client.handle_network_changed(at(8));
    events(&mut client);
    client.handle_timeout(dead_at);
    let (reason, pause) = hung_up(&mut client);
    assert_eq!(reason, "disc.example:7443 did not answer after the network changed");
    assert_eq!(pause, Duration::ZERO);
    client.handle_timeout(dead_at);
    assert_eq!(events(&mut client), [ClientEvent::Dial]);
}

#[test]
fn datagrams_are_relayed_while_a_session_offers_it() {
    let mut client = dialing();
    assert_eq!((client.offers_relay(), client.relay(&node(2), b"sealed", at(0))), (false, None));
    client.handle_connected(EXPORTER, at(0));
    sent(&mut client);
    receive(&mut client, &relayed(), at(0));
    assert_eq!((events(&mut client), client.state()), (vec![], ClientState::Proving), "it overtook the welcome");
    receive(&mut client, &welcome(), at(0));
    events(&mut client);
    assert!(client.offers_relay());
    let message = client.relay(&node(2), b"sealed", at(0)).unwrap();
    let expected = ClientMessage::Relay { to: node(2), payload: Bytes::from_static(b"sealed") };
    assert_eq!(ClientMessage::decode(&message), Ok(expected));
    assert_eq!(client.relay(&node(2), b"", at(0)), None);
    assert!(client.relay(&node(2), &[1; MAX_RELAY_PAYLOAD], at(0)).is_some());
    assert_eq!(client.relay(&node(2), &[1; MAX_RELAY_PAYLOAD + 1], at(0)), None);

    receive(&mut client, &relayed(), at(1));
    receive(&mut client, &ServerMessage::NoPeer(node(3)), at(1));
    let expected =
        [ClientEvent::Relayed { from: node(2), payload: Bytes::from_static(b"sealed") }, ClientEvent::NoPeer(node(3))];
    assert_eq!(events(&mut client), expected);
    client.handle_disconnected("connection reset", at(2));
    assert_eq!((client.offers_relay(), client.relay(&node(2), b"sealed", at(0))), (false, None));

    let mut client = dialing();
    client.handle_connected(EXPORTER, at(0));
    let ServerMessage::Welcome(without) = welcome() else { unreachable!() };
    receive(&mut client, &ServerMessage::Welcome(Welcome { relay: false, ..without }), at(0));
    assert_eq!((client.offers_relay(), client.relay(&node(2), b"sealed", at(0))), (false, None));
}

#[test]
fn a_relay_budget_that_is_met_is_told_and_holds_no_put_back() {
    for limit in [reason::RELAY_CLIENT_BYTES, reason::RELAY_NAMESPACE_BYTES] {
        let mut client = dialing();
        live(&mut client, 1, at(0));
        let met = SessionError {
            code: ErrorCode::RateLimited,
            limit: limit.to_owned(),
            retry_after: Duration::from_millis(40),
        };
        receive(&mut client, &ServerMessage::Error(met.clone()), at(1));
        assert_eq!(events(&mut client), [ClientEvent::Refused(met)]);
        client.publish(record(1, 5), at(1));
        assert!(matches!(sent(&mut client).as_slice(), [ClientMessage::Put(_)]), "{limit}");
    }
}

#[test]
fn a_server_that_does_not_answer_is_given_up_in_time() {
    let mut client = dialing();
    assert_eq!(client.poll_timeout().unwrap().0, at(0) + CONNECT_TIMEOUT);
    client.handle_timeout(at(0) + CONNECT_TIMEOUT);
    assert_eq!(hung_up(&mut client).0, "disc.example:7443 did not answer within 5s");
    // A carrier that comes up too late is closed again.
    client.handle_connected(EXPORTER, at(5));
    assert_eq!(events(&mut client), [ClientEvent::HangUp]);

    client.handle_timeout(at(10));
    client.handle_connected(EXPORTER, at(10));
    events(&mut client);
    assert_eq!(client.poll_timeout().unwrap().0, at(10) + HELLO_TIMEOUT);
    client.handle_timeout(at(10) + HELLO_TIMEOUT);
    assert!(hung_up(&mut client).0.contains("disc.example:7443 did not answer the proof within 10s"));
    assert_eq!(sent(&mut client), [], "nothing is left of the old session");
}

#[test]
fn the_round_trip_is_measured_by_the_answer_to_its_own_ping() {
    let mut client = dialing();
    client.handle_check(at(0));
    assert!(!client.is_measuring(), "there is no session");
    live(&mut client, 1, at(0));
    client.handle_check(at(1));
    client.handle_check(at(2));
    assert_eq!(sent(&mut client), [ClientMessage::Ping(1)]);
    receive(&mut client, &ServerMessage::Pong(7), at(2));
    assert!((client.is_measuring(), client.rtt()) == (true, None), "a number that nobody asked for");
    receive(&mut client, &ServerMessage::Pong(1), at(1) + Duration::from_millis(40));
    assert_eq!((client.is_measuring(), client.rtt()), (false, Some(Duration::from_millis(40))));
    receive(&mut client, &ServerMessage::Pong(1), at(3));
    assert_eq!(client.rtt(), Some(Duration::from_millis(40)));
    client.handle_disconnected("the carrier broke", at(3));
    assert_eq!(client.rtt(), None);
}

#[test]
fn a_session_is_kept_alive_and_a_dead_one_noticed() {
    let mut client = dialing();
    live(&mut client, 1, at(0));
    assert_eq!(client.poll_timeout().unwrap().0, at(0) + SESSION_KEEPALIVE);
    let pinged = at(0) + SESSION_KEEPALIVE;
    client.handle_timeout(pinged);
    assert_eq!(sent(&mut client), [ClientMessage::Ping(1)]);
    receive(&mut client, &ServerMessage::Pong(1), pinged);
    client.handle_timeout(pinged + SESSION_KEEPALIVE);
    client.handle_timeout(pinged + SESSION_KEEPALIVE + Duration::from_secs(1));
    assert_eq!(sent(&mut client), [ClientMessage::Ping(2)], "one ping at a time");
    client.handle_timeout(pinged + (SESSION_IDLE - Duration::from_secs(1)));
    assert_eq!(client.state(), ClientState::Live);
    client.handle_timeout(pinged + SESSION_IDLE);
    assert_eq!(hung_up(&mut client).0, "disc.example:7443 was silent for 15s");
}

#[test]
fn garbage_is_counted_and_ends_the_session_with_a_reason() {
    let mut client = dialing();
    client.handle_connected(EXPORTER, at(0));
    client.handle_message(&[], at(0));
    let (reason, pause) = hung_up(&mut client);
    assert_eq!(reason, "disc.example:7443 answers garbage: is it a discovery server?");
    assert_between(pause, RECONNECT_MIN / 2, RECONNECT_MIN);
    assert_eq!(client.malformed(), 1);
    client.handle_message(&[], at(0));
    assert_eq!(client.malformed(), 1, "a session that ended says nothing more");

    // Cut short within a session; unknown types and broken frames are skipped.
    client.handle_network_changed(at(1));
    live(&mut client, 1, at(1));
    client.handle_message(&[0x7f, 1, 2, 3], at(1));
    receive(&mut client, &ServerMessage::Frame(Bytes::from_static(b"no frame")), at(1));
    assert_eq!((client.malformed(), client.state()), (3, ClientState::Live));
    assert_eq!(events(&mut client), []);
    client.handle_message(&synced(9).encode()[..5], at(1));
    assert_eq!(client.malformed(), 4);
    hung_up(&mut client);
}

#[test]
fn messages_out_of_order_end_the_session() {
    let early = [
        ServerMessage::Restart,
        ServerMessage::Frame(record(2, 1).as_bytes().clone()),
        ServerMessage::Gone(node(2)),
        synced(1),
        ServerMessage::Stored { seq: 1 },
    ];
    for message in early {
        let mut client = dialing();
        client.handle_connected(EXPORTER, at(0));
        receive(&mut client, &message, at(0));
        assert!(hung_up(&mut client).0.contains("garbage"), "{message:?} before the welcome");
        assert_eq!(client.malformed(), 1);
    }
    let mut client = dialing();
    live(&mut client, 1, at(0));
    receive(&mut client, &welcome(), at(0));
    assert!(hung_up(&mut client).0.contains("garbage"), "a second welcome");
}

#[test]
fn the_configuration_chooses_the_binding_and_the_server_cannot() {
    let mut client = dialing();
    client.handle_connected(EXPORTER, at(0));
    receive(&mut client, &ServerMessage::Challenge([4; 32]), at(0));
    let hellos = sent(&mut client);
    assert!(matches!(hellos.as_slice(), [ClientMessage::Hello(hello), _] if hello.verify(Binding::Exporter(EXPORTER))));
    receive(&mut client, &ServerMessage::Challenge([5; 32]), at(0));
    assert_eq!(sent(&mut client), [], "one proof a connection");

    let mut client = Client::new(ClientConfig { proxied: true, ..client_config(1) }, SEED, at(0));
    client.handle_connected(EXPORTER, at(0));
    assert_eq!(sent(&mut client), []);
    receive(&mut client, &welcome(), at(0));
    assert_eq!(client.malformed(), 1, "welcomed before any proof");
    client.handle_network_changed(at(1));
    client.handle_connected(EXPORTER, at(1));
    receive(&mut client, &ServerMessage::Challenge([4; 32]), at(1));
    receive(&mut client, &ServerMessage::Challenge([5; 32]), at(1));
    let hellos = sent(&mut client);
    assert!(matches!(hellos.as_slice(), [ClientMessage::Hello(hello), _] if hello.verify(Binding::Challenge([4; 32]))));
}

#[test]
fn a_drain_is_obeyed_within_its_spread_and_grows_no_pause() {
    let spread = Duration::from_secs(20);
    let mut waits = Vec::new();
    for seed in 0..40 {
        let mut client = Client::new(client_config(1), seed, at(0));
        events(&mut client);
        live(&mut client, 1, at(0));
        receive(&mut client, &ServerMessage::Drain { retry_after: spread }, at(1));
        let wait = hung_up(&mut client).1;
        assert!(wait <= spread);
        waits.push(wait);
        client.handle_timeout(at(1) + wait);
        events(&mut client);
        client.handle_disconnected("connection refused", at(22));
        assert_between(lost(&mut client), RECONNECT_MIN / 2, RECONNECT_MIN);
    }
    assert!(waits.iter().any(|wait| *wait < spread / 4) && waits.iter().any(|wait| *wait > spread * 3 / 4));
}

#[test]
fn a_refused_proof_is_told_and_tried_again_slowly() {
    for code in [ErrorCode::AuthFailed, ErrorCode::NamespaceRefused] {
        let mut client = dialing();
        client.handle_connected(EXPORTER, at(0));
        let refusal = refusal(code, Duration::ZERO);
        receive(&mut client, &refusal, at(0));
        let ServerMessage::Error(error) = refusal else { unreachable!() };
        assert_eq!(client.poll_event(), Some(ClientEvent::Refused(error)));
        let (reason, wait) = hung_up(&mut client);
        assert_between(wait, RECONNECT_MAX / 2, RECONNECT_MAX);
        let fix = if code == ErrorCode::AuthFailed { "proxied: true" } else { "--only-namespace" };
        assert!(reason.contains("disc.example:7443") && reason.contains(fix), "{reason}");
    }
}

#[test]
fn a_full_server_is_asked_again_when_it_said() {
    let mut client = dialing();
    client.handle_connected(EXPORTER, at(0));
    let wait = Duration::from_secs(60);
    receive(&mut client, &refusal(ErrorCode::ServerFull, wait), at(0));
    let (reason, pause) = hung_up(&mut client);
    assert_between(pause, wait / 2, wait * 3 / 2);
    assert!(reason.contains("the server is full (some-limit)"), "{reason}");
    // A server cannot send an agent away for good.
    client.handle_network_changed(at(1));
    client.handle_connected(EXPORTER, at(1));
    receive(&mut client, &refusal(ErrorCode::ServerFull, Duration::from_secs(1 << 30)), at(1));
    assert!(hung_up(&mut client).1 <= MAX_RETRY_AFTER * 3 / 2);
}

#[test]
fn a_refused_put_waits_and_then_puts_the_newest() {
    for code in [ErrorCode::RateLimited, ErrorCode::ClusterFull, ErrorCode::ServerFull] {
        let mut client = dialing();
        client.publish(record(1, 1), at(0));
        live(&mut client, 1, at(0));
        let wait = Duration::from_secs(4);
        receive(&mut client, &refusal(code, wait), at(0));
        assert!(matches!(events(&mut client).as_slice(), [ClientEvent::Refused(_)]));
        client.publish(record(1, 2), at(1));
        assert_eq!(sent(&mut client), [], "not before the server said");
        let (due, _) = client.poll_timeout().unwrap();
        assert_between(due.since(at(0)), wait / 2, wait * 3 / 2);
        client.handle_timeout(due);
        assert_eq!(sent(&mut client), [ClientMessage::Put(record(1, 2).as_bytes().clone())]);
        assert_eq!(client.state(), ClientState::Live);
    }
}

#[test]
fn the_newest_record_is_put_once_a_session_and_a_refused_one_not_again() {
    let mut client = dialing();
    client.publish(record(1, 5), at(0));
    live(&mut client, 1, at(0));
    client.publish(record(1, 4), at(0));
    client.publish(record(1, 5), at(0));
    assert_eq!(sent(&mut client), [], "nothing newer");
    client.publish(record(1, 6), at(0));
    client.publish(record(1, 7), at(0));
    assert_eq!(sent(&mut client), [ClientMessage::Put(record(1, 7).as_bytes().clone())]);
    receive(&mut client, &refusal(ErrorCode::Stale, Duration::ZERO), at(0));
    assert!(matches!(events(&mut client).as_slice(), [ClientEvent::Refused(_)]));
    client.handle_timeout(at(4));
    assert_eq!(sent(&mut client), []);
    client.publish(record(1, 8), at(6));
    assert_eq!(sent(&mut client), [ClientMessage::Put(record(1, 8).as_bytes().clone())]);
    client.handle_disconnected("connection reset", at(6));
    client.handle_network_changed(at(6));
    client.handle_connected(EXPORTER, at(6));
    assert_eq!(sent(&mut client)[1], ClientMessage::Put(record(1, 8).as_bytes().clone()));
}

#[test]
fn stopping_sends_what_is_pending_then_hangs_up_for_good() {
    let mut client = dialing();
    live(&mut client, 1, at(0));
    let farewell = frame(keys(1).namespace, 1, Kind::Tombstone, 9);
    client.publish(farewell.clone(), at(1));
    client.stop();
    assert_eq!(client.poll_event(), None, "the farewell is not out yet");
    assert_eq!(sent(&mut client), [ClientMessage::Put(farewell.as_bytes().clone())]);
    assert_eq!(events(&mut client), [ClientEvent::HangUp]);
    client.handle_disconnected("closed", at(1));
    client.handle_network_changed(at(1));
    client.handle_timeout(at(1000));
    assert_eq!((events(&mut client), client.state(), client.poll_timeout()), (vec![], ClientState::Stopped, None));

    let mut client = dialing();
    client.stop();
    assert_eq!(events(&mut client), [ClientEvent::HangUp], "an attempt is given up");
    let mut client = dialing();
    client.handle_disconnected("connection refused", at(0));
    lost(&mut client);
    client.stop();
    assert_eq!(events(&mut client), [], "there is no carrier");
    assert_eq!(client.poll_timeout(), None);
}

#[test]
fn a_list_without_end_is_bounded_and_foreign_frames_are_not_listed() {
    let mut client = dialing();
    syncing(&mut client, at(0));
    let foreign = frame(keys(2).namespace, 3, Kind::Record, 1).as_bytes().clone();
    receive(&mut client, &ServerMessage::Frame(foreign.clone()), at(0));
    assert_eq!(events(&mut client), [ClientEvent::Frame(foreign)], "whoever opens it says what it is");
    let template = record(2, 1).as_bytes().to_vec();
    let id_at = template.windows(32).position(|window| window == node(2).0).unwrap();
    for number in 0..MAX_MEMBERS as u32 + 10 {
        let mut bytes = template.clone();
        bytes[id_at..id_at + 4].copy_from_slice(&number.to_le_bytes());
        receive(&mut client, &ServerMessage::Frame(bytes.into()), at(0));
        events(&mut client);
    }
    receive(&mut client, &synced(1), at(0));
    match events(&mut client).as_slice() {
        [ClientEvent::Synced { listed }] => assert_eq!(listed.len(), MAX_MEMBERS),
        other => panic!("{other:?}"),
    }
}

#[derive(Debug, Clone)]
enum Input {
    Connected,
    Disconnected,
    Message(ServerMessage),
    Bytes(Vec<u8>),
    Wait(u64),
    NetworkChanged,
    Publish(u64),
}

fn inputs() -> impl Strategy<Value = Vec<Input>> {
    let message = prop_oneof![
        4 => Just(welcome()),
        1 => Just(ServerMessage::Restart),
        1 => (2..6_u8).prop_map(|of| ServerMessage::Frame(record(of, 1).as_bytes().clone())),
        1 => (2..6_u8).prop_map(|of| ServerMessage::Gone(node(of))),
        2 => (0..9_u64).prop_map(synced),
        1 => Just(ServerMessage::Stored { seq: 1 }),
        1 => Just(ServerMessage::Pong(1)),
        1 => Just(relayed()),
        1 => Just(ServerMessage::NoPeer(node(3))),
        1 => Just(ServerMessage::Challenge([4; 32])),
        1 => Just(ServerMessage::Drain { retry_after: Duration::from_secs(9) }),
        1 => prop_oneof![
            Just(ErrorCode::AuthFailed),
            Just(ErrorCode::RateLimited),
            Just(ErrorCode::Protocol),
            Just(ErrorCode::Stale)
        ]
        .prop_map(|code| refusal(code, Duration::from_secs(3))),
    ];
    let input = prop_oneof![
        4 => Just(Input::Connected),
        1 => Just(Input::Disconnected),
        12 => message.prop_map(Input::Message),
        1 => proptest::collection::vec(any::<u8>(), 0..60).prop_map(Input::Bytes),
        4 => prop_oneof![Just(0), Just(1), Just(10), Just(40)].prop_map(Input::Wait),
        1 => Just(Input::NetworkChanged),
        1 => (1..20_u64).prop_map(Input::Publish),
    ];
    proptest::collection::vec(input, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a server or a carrier does: each attempt ends once, the next one is always planned, and nothing piles up.
    #[test]
    fn any_input_leaves_one_attempt_or_one_plan(inputs in inputs(), proxied: bool) {
        let mut now = at(0);
        let mut client = Client::new(ClientConfig { proxied, ..client_config(1) }, SEED, now);
        let (mut dials, mut losses) = (0, 0);
        for input in inputs {
            match input {
                Input::Connected => client.handle_connected(EXPORTER, now),
                Input::Disconnected => client.handle_disconnected("connection reset", now),
                Input::Message(message) => receive(&mut client, &message, now),
                Input::Bytes(bytes) => client.handle_message(&bytes, now),
                Input::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    client.handle_timeout(now);
                }
                Input::NetworkChanged => client.handle_network_changed(now),
                Input::Publish(seq) => client.publish(record(1, seq), now),
            }
            for event in events(&mut client) {
                match event {
                    ClientEvent::Dial => dials += 1,
                    ClientEvent::Lost { retry_in, reason } => {
                        losses += 1;
                        let at_once = retry_in.is_zero() && reason.contains("the network changed");
                        prop_assert!(at_once || retry_in >= RECONNECT_MIN / 2, "{}", reason);
                    }
                    _ => {}
                }
            }
            let open = u32::from(!matches!(client.state(), ClientState::Waiting { .. }));
            prop_assert_eq!(dials - losses, open);
            prop_assert!(client.poll_timeout().is_some());
            prop_assert!(sent(&mut client).len() <= 4);
        }
    }
}
