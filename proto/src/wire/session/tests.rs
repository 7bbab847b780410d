#![allow(clippy::unwrap_used)]

use mesh_common::key::ClusterSecret;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn keys() -> ClusterKeys {
    ClusterSecret::from_bytes([5; 32]).derive()
}

fn hello(binding: Binding) -> Hello {
    Hello::sign(&keys(), &SignKey::from_seed(&[1; 32]), [2; 16], "disc.example:7443", binding)
}

const EXPORTER: Binding = Binding::Exporter([3; 32]);

#[test]
fn a_hello_holds_on_its_own_connection_only() {
    assert!(hello(EXPORTER).verify(EXPORTER));
    assert!(!hello(EXPORTER).verify(Binding::Exporter([4; 32])));
    // The same value under the other mode: a server cannot choose the mode.
    assert!(!hello(EXPORTER).verify(Binding::Challenge([3; 32])));
    assert!(hello(Binding::Challenge([3; 32])).verify(Binding::Challenge([3; 32])));
}

#[test]
fn every_field_of_a_hello_is_signed_by_both_keys() {
    let good = hello(EXPORTER);
    let changes: [fn(&mut Hello); 8] = [
        |hello| hello.namespace = ClusterSecret::from_bytes([6; 32]).derive().namespace,
        |hello| hello.node = SignKey::from_seed(&[9; 32]).node_id(),
        |hello| hello.instance[0] ^= 1,
        |hello| hello.role = 1,
        |hello| hello.server_name.push('0'),
        |hello| hello.wire_max += 1,
        |hello| hello.mode = BindingMode::Challenge,
        |hello| std::mem::swap(&mut hello.membership_signature, &mut hello.identity_signature),
    ];
    for (index, change) in changes.into_iter().enumerate() {
        let mut changed = good.clone();
        change(&mut changed);
        assert!(!changed.verify(EXPORTER), "change {index}");
        assert!(!changed.verify(Binding::Challenge([3; 32])), "change {index}");
    }
    let forgeries: [fn(&mut Hello); 2] =
        [|hello| hello.membership_signature[5] ^= 1, |hello| hello.identity_signature[5] ^= 1];
    for signature in forgeries {
        let mut changed = good.clone();
        signature(&mut changed);
        assert!(!changed.verify(EXPORTER));
    }
}

#[test]
fn a_member_cannot_speak_for_another_node_nor_an_outsider_for_the_cluster() {
    let outsider = ClusterSecret::from_bytes([6; 32]).derive();
    let mut pretender = Hello::sign(&outsider, &SignKey::from_seed(&[1; 32]), [2; 16], "disc.example:7443", EXPORTER);
    pretender.namespace = keys().namespace;
    assert!(!pretender.verify(EXPORTER));
}

fn text(max: usize) -> impl Strategy<Value = String> {
    vec(0x20u8..0x7f, 0..=max).prop_map(|bytes| String::from_utf8(bytes).unwrap())
}

fn blob() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..600).prop_map(Bytes::from)
}

fn cursor() -> impl Strategy<Value = Cursor> {
    any::<(u64, u64)>().prop_map(|(server_instance, version)| Cursor { server_instance, version })
}

fn addr() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        any::<([u8; 4], u16)>().prop_map(SocketAddr::from),
        any::<([u8; 16], u16)>().prop_map(|addr| wire::address::canonical(addr.into())),
    ]
}

fn time() -> impl Strategy<Value = Duration> {
    any::<u32>().prop_map(from_millis)
}

fn datagram() -> impl Strategy<Value = (NodeId, Bytes)> {
    (any::<[u8; 32]>().prop_map(NodeId), vec(any::<u8>(), 1..600).prop_map(Bytes::from))
}

fn client_message() -> impl Strategy<Value = ClientMessage> {
    let hello = (any::<[u8; 16]>(), any::<u8>(), text(MAX_SERVER_NAME), any::<bool>(), any::<[u8; 32]>());
    prop_oneof![
        hello.prop_map(|(instance, role, server_name, challenge, bytes)| {
            ClientMessage::Hello(Box::new(Hello {
                namespace: Namespace(bytes),
                node: NodeId(bytes),
                instance,
                role,
                server_name,
                mode: if challenge { BindingMode::Challenge } else { BindingMode::Exporter },
                wire_max: role,
                membership_signature: [role; 64],
                identity_signature: [instance[0]; 64],
            }))
        }),
        blob().prop_map(ClientMessage::Put),
        proptest::option::of(cursor()).prop_map(ClientMessage::Watch),
        any::<u64>().prop_map(ClientMessage::Ping),
        datagram().prop_map(|(to, payload)| ClientMessage::Relay { to, payload }),
    ]
}

fn server_message() -> impl Strategy<Value = ServerMessage> {
    let stun = (vec(any::<u16>(), 0..=MAX_STUN_PORTS), vec(addr(), 0..=MAX_STUN_ALT));
    let welcome = (any::<(u64, u32, bool)>(), addr(), stun, time());
    prop_oneof![
        any::<[u8; 32]>().prop_map(ServerMessage::Challenge),
        welcome.prop_map(|((server_instance, max_slots, relay), observed, (stun_ports, stun_alt), slot_ttl)| {
            ServerMessage::Welcome(Welcome {
                server_instance,
                observed,
                stun_ports,
                slot_ttl,
                max_slots,
                relay,
                stun_alt,
            })
        }),
        any::<u64>().prop_map(|seq| ServerMessage::Stored { seq }),
        Just(ServerMessage::Restart),
        blob().prop_map(ServerMessage::Frame),
        any::<[u8; 32]>().prop_map(|node| ServerMessage::Gone(NodeId(node))),
        cursor().prop_map(ServerMessage::Synced),
        any::<u64>().prop_map(ServerMessage::Pong),
        time().prop_map(|retry_after| ServerMessage::Drain { retry_after }),
        (1u8..=9, text(MAX_LIMIT_NAME), time()).prop_map(|(code, limit, retry_after)| {
            ServerMessage::Error(SessionError { code: body::error_code(code).unwrap(), limit, retry_after })
        }),
        datagram().prop_map(|(from, payload)| ServerMessage::Relayed { from, payload }),
        any::<[u8; 32]>().prop_map(|node| ServerMessage::NoPeer(NodeId(node))),
    ]
}

proptest! {
    #[test]
    fn client_messages_round_trip(message in client_message()) {
        prop_assert_eq!(ClientMessage::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn server_messages_round_trip(message in server_message()) {
        prop_assert_eq!(ServerMessage::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn a_message_cut_short_or_changed_is_refused_or_another(
        message in server_message(), at in any::<prop::sample::Index>(), flip in 1u8..,
    ) {
        let bytes = message.encode();
        let cut = at.index(bytes.len());
        if let Ok(other) = ServerMessage::decode(&bytes[..cut]) {
            prop_assert!(matches!(other, ServerMessage::Frame(_) | ServerMessage::Relayed { .. }), "{:?}", other);
        }
        let mut changed = bytes.to_vec();
        changed[cut] ^= flip;
        if let Ok(other) = ServerMessage::decode(&changed) {
            prop_assert_ne!(&other, &message);
            prop_assert_eq!(&other.encode()[..], &changed[..]);
        }
    }

    #[test]
    fn a_stream_cut_anyhow_gives_the_same_messages(
        messages in vec(blob(), 0..12), sizes in vec(1usize..700, 1..40),
    ) {
        let stream: Vec<u8> = messages.iter().flat_map(|message| enframe(message).to_vec()).collect();
        let (mut deframer, mut got, mut rest) = (Deframer::default(), Vec::new(), &stream[..]);
        for size in sizes.iter().cycle() {
            let (piece, later) = rest.split_at((*size).min(rest.len()));
            deframer.push(piece);
            while let Some(message) = deframer.next_message().unwrap() {
                got.push(message);
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(got, messages);
    }
}

#[test]
fn the_two_directions_share_no_type() {
    assert_eq!(ServerMessage::decode(&ClientMessage::Ping(1).encode()), Err(DecodeError::UnknownType(4)));
    assert_eq!(ClientMessage::decode(&ServerMessage::Pong(1).encode()), Err(DecodeError::UnknownType(0x88)));
    assert_eq!(ClientMessage::decode(&[]), Err(DecodeError::Malformed));
    assert_eq!(ClientMessage::decode(&[0]), Err(DecodeError::UnknownType(0)));
}

#[test]
fn a_datagram_to_relay_has_a_node_and_some_bytes_and_not_too_many() {
    let relay = |len: usize| ClientMessage::decode(&[vec![RELAY], vec![7; 32 + len]].concat());
    let relayed = |len: usize| ServerMessage::decode(&[vec![RELAYED], vec![7; 32 + len]].concat());
    for len in [1, 1452, MAX_RELAY_PAYLOAD] {
        let payload = Bytes::from(vec![7; len]);
        assert_eq!(relay(len), Ok(ClientMessage::Relay { to: NodeId([7; 32]), payload: payload.clone() }));
        assert_eq!(relayed(len), Ok(ServerMessage::Relayed { from: NodeId([7; 32]), payload }));
    }
    for len in [0, MAX_RELAY_PAYLOAD + 1, MAX_MESSAGE - 33] {
        assert_eq!(relay(len), Err(DecodeError::Malformed), "{len}");
        assert_eq!(relayed(len), Err(DecodeError::Malformed), "{len}");
    }
    assert_eq!(ClientMessage::decode(&[RELAY; 32]), Err(DecodeError::Malformed), "no whole node");
    assert_eq!(ServerMessage::decode(&[RELAYED; 32]), Err(DecodeError::Malformed), "no whole node");
    const { assert!(MAX_RELAY_PAYLOAD >= wire::frame::MAX_FRAME, "a record can be relayed") };
}

#[test]
fn text_that_could_move_a_terminal_is_refused() {
    let error = |limit: &str| {
        let error = SessionError { code: ErrorCode::ServerFull, limit: limit.to_owned(), retry_after: Duration::ZERO };
        ServerMessage::decode(&ServerMessage::Error(error).encode())
    };
    assert!(error("max-connections").is_ok());
    assert_eq!(error("\u{1b}[2J"), Err(DecodeError::Malformed));
    assert_eq!(error("näme"), Err(DecodeError::Malformed));
}

#[test]
fn a_message_over_the_limit_is_not_decoded_and_breaks_a_stream() {
    let put = |len| ClientMessage::Put(vec![0; len].into()).encode();
    assert!(ClientMessage::decode(&put(MAX_MESSAGE - 1)).is_ok());
    assert_eq!(ClientMessage::decode(&put(MAX_MESSAGE)), Err(DecodeError::Malformed));

    let mut deframer = Deframer::default();
    deframer.push(&enframe(&put(MAX_MESSAGE - 1)));
    deframer.push(&8193u32.to_le_bytes());
    assert_eq!(deframer.next_message().unwrap().unwrap().len(), MAX_MESSAGE);
    assert_eq!(deframer.next_message(), Err(TooLong(8193)));
    deframer.push(&enframe(b"a message that comes too late"));
    assert_eq!(deframer.next_message(), Err(TooLong(8193)));
}

#[test]
fn a_stream_that_nobody_reads_is_bounded() {
    let mut deframer = Deframer::default();
    for _ in 0..1000 {
        deframer.push(&enframe(&[0; 1000]));
    }
    assert!(deframer.next_message().is_err());
    assert!(deframer.buffer.capacity() <= Deframer::MAX_BUFFERED);
}
