//! Wire v1 byte by byte: what the vectors hold is what the codecs write and read. A changed vector is a new wire version.
//!
//! The vectors were made from docs/wire.md by an implementation that shares no code with this one.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use data_encoding::HEXLOWER;
use mesh_common::addr::{overlay_v4_choice, overlay_v6};
use mesh_common::host_name::HostName;
use mesh_common::id::NodeId;
use mesh_common::key::{ClusterKeys, ClusterSecret, PresharedKey, SignKey, WgProof, WgPublicKey, WgSecret};
use mesh_common::nat::{Filtering, Mapping, NatClass};
use mesh_proto::sealed::{self, Opened};
use mesh_proto::wire::frame::{Frame, Kind};
use mesh_proto::wire::probe::{self, Call, OpenProbeError, Opened as OpenedProbe, Probe};
use mesh_proto::wire::record::{Candidate, CandidateKind, DecodeRecordError, OverlayV4, PrefixClaim, Record};
use mesh_proto::wire::session::{
    ALPN, Binding, ClientMessage, Cursor, DecodeError, Deframer, EXPORTER_LABEL, ErrorCode, Hello, ServerMessage,
    SessionError, WEBSOCKET_PATH, Welcome, enframe,
};
use mesh_proto::wire::stun;
use serde_json::Value;

#[test]
fn keys_and_addresses_are_derived_as_written() {
    let vectors = parse(include_str!("vectors/keys.json"));
    for vector in list(&vectors["clusters"]) {
        let keys = cluster(&vector["secret"]);
        assert_eq!(*keys.membership.seed(), array(&vector["membership_seed"]));
        assert_eq!(keys.namespace.0, array(&vector["namespace"]));
        assert_eq!(*keys.record.as_bytes(), array(&vector["record_key"]));
    }
    for vector in list(&vectors["nodes"]) {
        assert_eq!(identity(&vector["identity_seed"]).node_id(), node(&vector["node"]));
    }
    for vector in list(&vectors["wireguard"]) {
        let wg = WgSecret::from_seed(&array(&vector["seed"]));
        let (node, key) = (node(&vector["node"]), WgPublicKey(array(&vector["key"])));
        let proof = WgProof { ed25519: array(&vector["proof_ed25519"]), signature: array(&vector["proof_signature"]) };
        assert_eq!((wg.public(), wg.prove(&node)), (key, proof));
        assert!(proof.holds(&node, &key));
    }
    for vector in list(&vectors["pair_psk"]) {
        let side = |side: &Value| (node(&side["node"]), WgPublicKey(array(&side["wg_key"])));
        let psk = cluster(&vector["secret"]).pair_psk(side(&vector["b"]), side(&vector["a"]));
        assert!(psk == PresharedKey(array(&vector["psk"])));
    }
    for vector in list(&vectors["overlay_v6"]) {
        assert_eq!(overlay_v6(text(&vector["cluster_id"]), &node(&vector["node"])).to_string(), text(&vector["addr"]));
    }
    for vector in list(&vectors["overlay_v4"]) {
        let attempt = u32::try_from(number(&vector["attempt"])).unwrap();
        let choice =
            overlay_v4_choice(text(&vector["pool"]).parse().unwrap(), &node(&vector["node"]), attempt).unwrap();
        assert_eq!(choice.to_string(), text(&vector["addr"]));
    }
}

#[test]
fn records_have_these_bytes() {
    let vectors = parse(include_str!("vectors/records.json"));
    for vector in list(&vectors["records"]) {
        let record = record(&vector["record"]);
        assert_eq!(hex(&record.encode().unwrap()), text(&vector["body"]), "{}", vector["name"]);
        assert_eq!(Record::decode(&bytes(&vector["body"])), Ok(record), "{}", vector["name"]);
    }
    for vector in list(&vectors["refused"]) {
        let error = match text(&vector["error"]) {
            "malformed" => DecodeRecordError::Malformed,
            "unknown extension" => DecodeRecordError::UnknownExtension(0x8001),
            other => panic!("{other}"),
        };
        assert_eq!(Record::decode(&bytes(&vector["body"])), Err(error), "{}", vector["why"]);
    }
}

#[test]
fn frames_have_these_bytes() {
    for vector in list(&parse(include_str!("vectors/frames.json"))) {
        let name = text(&vector["name"]);
        let (keys, identity) = (cluster(&vector["secret"]), identity(&vector["identity_seed"]));
        let (kind, record) = match text(&vector["kind"]) {
            "record" => (Kind::Record, Some(Record::decode(&bytes(&vector["body"])).unwrap())),
            "tombstone" => (Kind::Tombstone, None),
            other => panic!("{other}"),
        };
        let seq = number(&vector["seq"]);
        let sealed = sealed::seal(&keys, &identity, seq, record.as_ref(), array(&vector["nonce"])).unwrap();
        assert_eq!(hex(sealed.as_bytes()), text(&vector["frame"]), "{name}");

        let frame = Frame::parse(bytes(&vector["frame"]).into()).unwrap();
        assert_eq!((frame.kind(), frame.seq(), frame.node()), (kind, seq, identity.node_id()), "{name}");
        assert_eq!(frame.namespace(), keys.namespace, "{name}");
        assert!(frame.verify(), "{name}");
        let opened = record.map_or(Opened::Tombstone, |record| Opened::Record(Box::new(record)));
        assert_eq!(sealed::open(&keys, text(&vector["cluster_id"]), &frame), Ok(opened), "{name}");
    }
}

#[test]
fn session_messages_have_these_bytes() {
    let vectors = parse(include_str!("vectors/session.json"));
    assert_eq!(ALPN, text(&vectors["alpn"]));
    assert_eq!(WEBSOCKET_PATH, text(&vectors["websocket_path"]));
    assert_eq!(EXPORTER_LABEL, text(&vectors["exporter_label"]).as_bytes());
    for vector in list(&vectors["hello"]) {
        let binding = match text(&vector["mode"]) {
            "exporter" => Binding::Exporter(array(&vector["binding"])),
            "challenge" => Binding::Challenge(array(&vector["binding"])),
            other => panic!("{other}"),
        };
        let (keys, identity) = (cluster(&vector["secret"]), identity(&vector["identity_seed"]));
        let hello = Hello::sign(&keys, &identity, array(&vector["instance"]), text(&vector["server_name"]), binding);
        assert!(hello.verify(binding));
        check_client(vector, ClientMessage::Hello(Box::new(hello)));
    }
    for vector in list(&vectors["client"]) {
        check_client(vector, client_message(vector));
    }
    for vector in list(&vectors["server"]) {
        let message = server_message(vector);
        assert_eq!(hex(&message.encode()), text(&vector["message"]), "{message:?}");
        assert_eq!(ServerMessage::decode(&bytes(&vector["message"])), Ok(message));
    }
    for vector in list(&vectors["client_refused"]) {
        let refused = ClientMessage::decode(&bytes(&vector["message"]));
        assert_eq!(refused, Err(DecodeError::Malformed), "{}", vector["why"]);
    }
    for vector in list(&vectors["server_refused"]) {
        let refused = ServerMessage::decode(&bytes(&vector["message"]));
        assert_eq!(refused, Err(DecodeError::Malformed), "{}", vector["why"]);
    }
}

#[test]
fn a_stream_of_messages_has_these_bytes() {
    let vector = &parse(include_str!("vectors/session.json"))["stream"];
    let messages: Vec<Vec<u8>> = list(&vector["messages"]).iter().map(bytes).collect();
    let stream: Vec<u8> = messages.iter().flat_map(|message| enframe(message).to_vec()).collect();
    assert_eq!(hex(&stream), text(&vector["bytes"]));
    let mut deframer = Deframer::default();
    deframer.push(&stream);
    for message in messages {
        assert_eq!(deframer.next_message().unwrap().unwrap(), message);
    }
    assert_eq!(deframer.next_message(), Ok(None));
}

#[test]
fn stun_messages_have_these_bytes() {
    let vectors = parse(include_str!("vectors/stun.json"));
    for vector in list(&vectors["exchanges"]) {
        let (transaction, source) = (array(&vector["transaction"]), addr(&vector["source"]));
        let flag = |name: &str| vector[name].as_bool().unwrap();
        let from = stun::Change { address: flag("change_address"), port: flag("change_port") };
        assert_eq!(hex(&stun::binding_request(&transaction, from)), text(&vector["request"]));
        let answer = stun::answer(&bytes(&vector["request"]), source).unwrap();
        assert_eq!((hex(&answer.bytes).as_str(), answer.from), (text(&vector["response"]), from));
        let response = stun::parse_response(&bytes(&vector["response"])).unwrap();
        assert_eq!((response.transaction, response.mapped), (transaction, source));
    }
    for vector in list(&vectors["unanswered"]) {
        assert_eq!(stun::answer(&bytes(&vector["request"]), addr(&vector["source"])), None, "{}", vector["why"]);
    }
}

#[test]
fn probes_are_sealed_and_refused_as_written() {
    let vectors = parse(include_str!("vectors/probes.json"));
    let sealed_by = |pair: &Value, own: &str, peer: &str| {
        let keys = cluster(&pair["secret"]);
        let secret = WgSecret::from_seed(&array(&pair[own]["wg_seed"]));
        let peer = (node(&pair[peer]["node"]), WgPublicKey(array(&pair[peer]["wg_key"])));
        keys.probe_keys((node(&pair[own]["node"]), &secret), peer).unwrap()
    };
    for pair in list(&vectors["pairs"]) {
        let keys = sealed_by(pair, "a", "b");
        for (key, vector) in [(&keys.send, &pair["a_to_b"]), (&keys.receive, &pair["b_to_a"])] {
            assert_eq!((*key.key.as_bytes(), key.tag), (array(&vector["key"]), array(&vector["tag"])));
        }
    }
    let pair = &vectors["pairs"][0];
    let (send, receive) = (sealed_by(pair, "a", "b").send, sealed_by(pair, "b", "a").receive);
    for vector in list(&vectors["probes"]) {
        let (instance, counter, probe) =
            (array(&vector["instance"]), number(&vector["counter"]), probe(&vector["probe"]));
        let pad_to = vector["pad_to"].as_u64().map(|len| u16::try_from(len).unwrap());
        let datagram = probe::seal(&send, &instance, counter, array(&vector["nonce"]), &probe, pad_to);
        assert_eq!(hex(&datagram), text(&vector["datagram"]), "{probe:?}");
        let opened = OpenedProbe { instance, counter, probe };
        assert_eq!(probe::open(&receive, &bytes(&vector["datagram"])), Ok(opened));
    }
    for vector in list(&vectors["refused"]) {
        let error = match text(&vector["error"]) {
            "shape" => OpenProbeError::Shape,
            "sealed" => OpenProbeError::Sealed,
            "malformed" => OpenProbeError::Malformed,
            other => panic!("{other}"),
        };
        assert_eq!(probe::open(&receive, &bytes(&vector["datagram"])), Err(error), "{}", vector["why"]);
    }
}

fn probe(value: &Value) -> Probe {
    let (kind, body) = value.as_object().unwrap().iter().next().unwrap();
    let small = |value: &Value| u32::try_from(number(value)).unwrap();
    match kind.as_str() {
        "ping" => Probe::Ping { id: small(&body["id"]), heard: small(&body["heard"]) },
        "pong" => Probe::Pong {
            id: small(&body["id"]),
            heard: small(&body["heard"]),
            observed: body["observed"].as_str().map(|addr| addr.parse().unwrap()),
        },
        "call" => Probe::Call(Call {
            guess_ports: body["guess_ports"].as_bool().unwrap(),
            answer_wanted: body["answer_wanted"].as_bool().unwrap(),
            nat_v4: nat_class(&body["nat_v4"]),
            nat_v6: nat_class(&body["nat_v6"]),
            candidates: list(&body["candidates"]).iter().map(candidate).collect(),
        }),
        other => panic!("{other}"),
    }
}

fn check_client(vector: &Value, message: ClientMessage) {
    assert_eq!(hex(&message.encode()), text(&vector["message"]), "{message:?}");
    assert_eq!(ClientMessage::decode(&bytes(&vector["message"])), Ok(message));
}

/// The one member of a vector besides `message` says which message it is.
fn variant(vector: &Value) -> (&str, &Value) {
    let (name, value) = vector.as_object().unwrap().iter().find(|(name, _)| *name != "message").unwrap();
    (name, value)
}

fn client_message(vector: &Value) -> ClientMessage {
    match variant(vector) {
        ("put", frame) => ClientMessage::Put(bytes(frame).into()),
        ("watch", Value::Null) => ClientMessage::Watch(None),
        ("watch", at) => ClientMessage::Watch(Some(cursor(at))),
        ("ping", nonce) => ClientMessage::Ping(number(nonce)),
        ("relay", relay) => ClientMessage::Relay { to: node(&relay["to"]), payload: bytes(&relay["payload"]).into() },
        (other, _) => panic!("{other}"),
    }
}

fn server_message(vector: &Value) -> ServerMessage {
    match variant(vector) {
        ("challenge", nonce) => ServerMessage::Challenge(array(nonce)),
        ("welcome", welcome) => ServerMessage::Welcome(Welcome {
            server_instance: number(&welcome["server_instance"]),
            observed: addr(&welcome["observed"]),
            stun_ports: list(&welcome["stun_ports"]).iter().map(|port| u16::try_from(number(port)).unwrap()).collect(),
            slot_ttl: millis(&welcome["slot_ttl_ms"]),
            max_slots: u32::try_from(number(&welcome["max_slots"])).unwrap(),
            relay: welcome["relay"].as_bool().unwrap(),
            stun_alt: list(&welcome["stun_alt"]).iter().map(addr).collect(),
        }),
        ("stored", seq) => ServerMessage::Stored { seq: number(seq) },
        ("restart", _) => ServerMessage::Restart,
        ("frame", frame) => ServerMessage::Frame(Bytes::from(bytes(frame))),
        ("gone", gone) => ServerMessage::Gone(node(gone)),
        ("synced", at) => ServerMessage::Synced(cursor(at)),
        ("pong", nonce) => ServerMessage::Pong(number(nonce)),
        ("relayed", relayed) => {
            ServerMessage::Relayed { from: node(&relayed["from"]), payload: bytes(&relayed["payload"]).into() }
        }
        ("no_peer", absent) => ServerMessage::NoPeer(node(absent)),
        ("drain_ms", wait) => ServerMessage::Drain { retry_after: millis(wait) },
        ("error", error) => ServerMessage::Error(SessionError {
            code: match text(&error["code"]) {
                "auth_failed" => ErrorCode::AuthFailed,
                "namespace_refused" => ErrorCode::NamespaceRefused,
                "cluster_full" => ErrorCode::ClusterFull,
                "server_full" => ErrorCode::ServerFull,
                "rate_limited" => ErrorCode::RateLimited,
                "protocol" => ErrorCode::Protocol,
                "bad_frame" => ErrorCode::BadFrame,
                "stale" => ErrorCode::Stale,
                "too_large" => ErrorCode::TooLarge,
                other => panic!("{other}"),
            },
            limit: text(&error["limit"]).to_owned(),
            retry_after: millis(&error["retry_after_ms"]),
        }),
        (other, _) => panic!("{other}"),
    }
}

fn record(value: &Value) -> Record {
    let prefix = |value: &Value| text(value).parse().unwrap();
    let claim = |value: &Value| PrefixClaim { prefix: prefix(&value["prefix"]), since_ms: number(&value["since_ms"]) };
    let byte = |value: &Value| u8::try_from(number(value)).unwrap();
    Record {
        wg_key: WgPublicKey(array(&value["wg_key"])),
        wg_proof: WgProof { ed25519: array(&value["wg_ed25519"]), signature: array(&value["wg_signature"]) },
        host_name: HostName::try_from(text(&value["host_name"]).to_owned()).unwrap(),
        overlay_v6: text(&value["overlay_v6"]).parse().unwrap(),
        overlay_v4: value["overlay_v4"].as_object().map(|v4| OverlayV4 {
            addr: text(&v4["addr"]).parse().unwrap(),
            claimed_at_ms: number(&v4["claimed_at_ms"]),
        }),
        prefixes: list(&value["prefixes"]).iter().map(claim).collect(),
        excluded_prefixes: list(&value["excluded_prefixes"]).iter().map(prefix).collect(),
        candidates: list(&value["candidates"]).iter().map(candidate).collect(),
        nat_v4: nat_class(&value["nat_v4"]),
        nat_v6: nat_class(&value["nat_v6"]),
        instance: array(&value["instance"]),
        started_at_ms: number(&value["started_at_ms"]),
        valid_for: Duration::from_secs(number(&value["valid_for_s"])),
        wire_min: byte(&value["wire_min"]),
        wire_max: byte(&value["wire_max"]),
        features: number(&value["features"]),
        admission: bytes(&value["admission"]),
        ext: list(&value["ext"])
            .iter()
            .map(|ext| (u16::try_from(number(&ext["tag"])).unwrap(), bytes(&ext["value"])))
            .collect(),
    }
}

fn nat_class(value: &Value) -> NatClass {
    NatClass {
        mapping: [
            Mapping::Unknown,
            Mapping::EndpointIndependent,
            Mapping::AddressDependent,
            Mapping::AddressAndPortDependent,
            Mapping::PortIndependent,
        ][usize::try_from(number(&value[0])).unwrap()],
        filtering: [
            Filtering::Unknown,
            Filtering::EndpointIndependent,
            Filtering::AddressDependent,
            Filtering::AddressAndPortDependent,
        ][usize::try_from(number(&value[1])).unwrap()],
    }
}

fn candidate(value: &Value) -> Candidate {
    Candidate {
        kind: [CandidateKind::Host, CandidateKind::Static, CandidateKind::Reflexive, CandidateKind::Mapped]
            [usize::try_from(number(&value["kind"])).unwrap()],
        addr: addr(&value["addr"]),
    }
}

fn parse(json: &str) -> Value {
    serde_json::from_str(json).unwrap()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

fn bytes(value: &Value) -> Vec<u8> {
    HEXLOWER.decode(text(value).as_bytes()).unwrap()
}

fn array<const N: usize>(value: &Value) -> [u8; N] {
    bytes(value).try_into().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    HEXLOWER.encode(bytes)
}

fn node(value: &Value) -> NodeId {
    NodeId(array(value))
}

fn addr(value: &Value) -> SocketAddr {
    text(value).parse().unwrap()
}

fn millis(value: &Value) -> Duration {
    Duration::from_millis(number(value))
}

fn cursor(value: &Value) -> Cursor {
    Cursor { server_instance: number(&value["server_instance"]), version: number(&value["version"]) }
}

fn cluster(secret: &Value) -> ClusterKeys {
    ClusterSecret::from_bytes(array(secret)).derive()
}

fn identity(seed: &Value) -> SignKey {
    SignKey::from_seed(&array(seed))
}
