#![allow(clippy::unwrap_used)]

use super::*;

/// A node with one of everything, for tests of what is shown and sent.
pub(crate) fn example() -> Status {
    Status {
        api_version: API_VERSION.to_owned(),
        node: NodeStatus {
            id: "ab".repeat(32),
            host_name: "node-1".to_owned(),
            public_key: "AbCdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPE=".to_owned(),
            overlay_v4: Some(Ipv4Addr::new(198, 19, 0, 7)),
            overlay_v6: Some("fd00::7".parse().unwrap()),
            state: NodeState::Degraded,
            cluster_id: Some("home".to_owned()),
            namespace: Some("cd".repeat(32)),
            interface: "mesh0".to_owned(),
            listen_port: 51872,
            version: "0.1.0".to_owned(),
            started_at_ms: 1_000_000,
            problems: vec![Problem { what: "no server answers".to_owned(), fix: "open UDP 7443".to_owned() }],
        },
        servers: vec![ServerStatus {
            endpoint: "https://disc.example:7443".to_owned(),
            state: ServerState::Waiting,
            carrier: None,
            detail: "connection \u{1b}[31mrefused".to_owned(),
            retry_in_ms: Some(2500),
        }],
        peers: vec![PeerStatus {
            node_id: Some("ef".repeat(32)),
            host_name: "node-2".to_owned(),
            kind: PeerKind::Member,
            state: PeerState::Up,
            public_key: "ZbCdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPE=".to_owned(),
            overlay_v4: Some(Ipv4Addr::new(198, 19, 0, 8)),
            overlay_v6: None,
            endpoint: Some("203.0.113.9:51872".parse().unwrap()),
            candidates: vec!["203.0.113.9:51872".parse().unwrap()],
            prefixes: vec![
                PrefixStatus {
                    prefix: "10.1.0.0/24".parse().unwrap(),
                    state: PrefixState::Routed,
                    detail: String::new(),
                },
                PrefixStatus {
                    prefix: "192.168.1.9/32".parse().unwrap(),
                    state: PrefixState::LocalOverlap,
                    detail: "inside 192.168.1.0/24 of eth0".to_owned(),
                },
            ],
            last_handshake_ms_ago: Some(5000),
            rx_bytes: 1536,
            tx_bytes: 0,
            seen_ms_ago: Some(5000),
            detail: String::new(),
        }],
        counters: BTreeMap::from([("frames_refused".to_owned(), 3)]),
    }
}

#[test]
fn the_table_says_what_matters_and_nothing_a_terminal_obeys() {
    let show = Show { wide: false, colour: false, now_ms: 1_065_000 };
    let expected = "\
Node        node-1 in mesh home
State       degraded (65 s, version 0.1.0)
Addresses   198.19.0.7, fd00::7
Interface   mesh0, UDP port 51872
Node id     abababababababababababababababababababababababababababababababab

Problem: no server answers
    Fix: open UDP 7443

SERVER                     STATE    CARRIER  DETAIL
https://disc.example:7443  waiting  -        connection \u{fffd}[31mrefused; next attempt in 2 s

PEER    STATE  ADDRESS     ENDPOINT           HANDSHAKE  RECEIVED  SENT
node-2  up     198.19.0.8  203.0.113.9:51872  5 s ago    1.5 KiB   0 B

PREFIX          PEER    STATE          DETAIL
192.168.1.9/32  node-2  local-overlap  inside 192.168.1.0/24 of eth0
";
    assert_eq!(example().to_table(show), expected);
    let wide = example().to_table(Show { wide: true, ..show });
    for shown in ["frames_refused", "AbCdefgh", "10.1.0.0/24", &"ef".repeat(32)] {
        assert!(wide.contains(shown), "{shown} is not in {wide}");
    }
    assert!(example().to_table(Show { colour: true, ..show }).contains("\u{1b}["));
}

#[test]
fn json_has_the_documented_words() {
    let json = serde_json::to_value(example()).unwrap();
    assert_eq!(json["api_version"], "meshspan/v1");
    assert_eq!(json["node"]["state"], "degraded");
    assert_eq!(json["servers"][0]["carrier"], serde_json::Value::Null);
    assert_eq!(json["peers"][0]["prefixes"][1]["state"], "local-overlap");
    assert_eq!(serde_json::to_value(Carrier::WebSocket).unwrap(), "websocket");
    assert_eq!(serde_json::from_value::<Status>(json).unwrap(), example());
}

#[test]
fn peers_are_found_by_name_or_the_start_of_an_id() {
    let status = example();
    for name in ["node-2", "efef", "ZbCdef"] {
        assert_eq!(status.peers_named(name).len(), 1, "{name}");
    }
    for name in ["node", "ef", ""] {
        assert!(status.peers_named(name).is_empty(), "{name}");
    }
}
