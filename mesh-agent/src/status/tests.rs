#![allow(clippy::unwrap_used)]

use super::net::{FamilyStatus, Netcheck, Udp};
use super::offload::OffloadStatus;
use super::path::{AddressKind, FilteringWord, MappingWord, Nat, SwitchStatus, Tier, TriedAddress};
use super::port_mapping::{PortMappingProtocol, PortMappingState, PortMappingStatus};
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
            backend: Some(BackendStatus {
                kind: BackendKind::Userspace,
                why_not_kernel: Some("this kernel has no WireGuard".to_owned()),
            }),
            net: net(),
            offloads: Some(OffloadStatus { tun_tcp: true, tun_udp: false, udp_send: true, udp_receive: true }),
        },
        servers: vec![ServerStatus {
            endpoint: "https://disc.example:7443".to_owned(),
            state: ServerState::Waiting,
            carrier: None,
            detail: "connection \u{1b}[31mrefused".to_owned(),
            retry_in_ms: Some(2500),
            relays: false,
            rtt_us: None,
            proxy: None,
        }],
        peers: vec![PeerStatus {
            node_id: Some("ef".repeat(32)),
            host_name: "node-2".to_owned(),
            kind: PeerKind::Member,
            state: PeerState::Up,
            public_key: "ZbCdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPE=".to_owned(),
            overlay_v4: Some(Ipv4Addr::new(198, 19, 0, 8)),
            overlay_v6: None,
            endpoint: None,
            path: Some(relayed()),
            nat: NatStatus { v4: hard(), ..NatStatus::default() },
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

fn hard() -> Nat {
    Nat { mapping: MappingWord::AddressAndPortDependent, filtering: FilteringWord::AddressAndPortDependent }
}

fn net() -> NetStatus {
    let seen_at = vec!["198.51.100.4:40112".parse().unwrap()];
    let v4 = FamilyStatus {
        udp: Udp::Ok,
        seen_at,
        is_translated: Some(true),
        nat: Nat { mapping: MappingWord::PortIndependent, filtering: FilteringWord::AddressAndPortDependent },
        hairpin: Some(false),
        keeps_port: Some(false),
    };
    let port_mapping = PortMappingStatus {
        state: PortMappingState::Mapped,
        router: Some(Ipv4Addr::new(192, 168, 1, 1)),
        protocol: Some(PortMappingProtocol::Pcp),
        external: Some("203.0.113.7:51872".parse().unwrap()),
        next_in_ms: Some(28 * 60_000),
        tried: BTreeMap::from([(PortMappingProtocol::Pcp, "works".to_owned())]),
        detail: "203.0.113.7:51872, which router 192.168.1.1 leads to this node (PCP)".to_owned(),
    };
    NetStatus { v4, v6: FamilyStatus { udp: Udp::Blocked, ..FamilyStatus::default() }, port_mapping }
}

fn relayed() -> PathStatus {
    let tried = |address: &str, kind, last: &str, failures| TriedAddress {
        address: address.parse().unwrap(),
        kind,
        rtt_us: None,
        last: last.to_owned(),
        failures,
    };
    PathStatus {
        tier: Some(Tier::Relay),
        relay: Some("https://disc.example:7443".to_owned()),
        rtt_us: Some(41_900),
        mtu: Some(1280),
        why_not_direct: Some("two strict NATs\u{1b}[31m: hole punching cannot work".to_owned()),
        next_retry_in_ms: Some(12_000),
        last_switch: Some(SwitchStatus {
            ms_ago: 180_000,
            from: Some("203.0.113.9:51872".to_owned()),
            to: Some("https://disc.example:7443".to_owned()),
            reason: "no answer for 3 s".to_owned(),
        }),
        tried: vec![
            tried("192.168.7.2:51872", AddressKind::Host, "probed, no answer yet", 0),
            tried("203.0.113.9:51872", AddressKind::PeerReflexive, "no answer for 3 s (180 s ago)", 2),
        ],
        ..PathStatus::default()
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
Backend     userspace; this kernel has no WireGuard
Offloads    TUN TCP, UDP send, UDP receive (the kernel lacks TUN UDP)
Node id     abababababababababababababababababababababababababababababababab

Problem: no server answers
    Fix: open UDP 7443

SERVER                     STATE    CARRIER  DETAIL
https://disc.example:7443  waiting  -        connection \u{fffd}[31mrefused; next attempt in 2 s

PEER    STATE  PATH   ADDRESS     ENDPOINT                         HANDSHAKE  RECEIVED  SENT
node-2  up     relay  198.19.0.8  relay https://disc.example:7443  5 s ago    1.5 KiB   0 B

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
fn why_a_peer_is_relayed_names_both_nats_the_reason_and_what_was_tried() {
    let show = Show { wide: false, colour: false, now_ms: 1_065_000 };
    let expected = "\
Path        relay, over https://disc.example:7443, 41 ms, packets up to 1280 bytes
Not direct  two strict NATs\u{fffd}[31m: hole punching cannot work
NAT here    IPv4: keeps one public port and lets in only the very address and port that was written to (mapping at least port-independent, filtering address- and port-dependent)
            IPv6: UDP is blocked
NAT there   IPv4: uses another public port for each destination and lets in only the very address and port that was written to (mapping address- and port-dependent, filtering address- and port-dependent)
Next try    in 12 s
Last switch 3 min ago, from 203.0.113.9:51872 to https://disc.example:7443: no answer for 3 s
TRIED              KIND            ROUND TRIP  FAILURES  LAST RESULT
192.168.7.2:51872  host            -           0         probed, no answer yet
203.0.113.9:51872  peer-reflexive  -           2         no answer for 3 s (180 s ago)
";
    let why = example().to_why(show);
    assert!(why.contains(&format!("\nPeer        node-2 (up)\n{expected}")), "{why}");
    let details = peer_details(&example().peers[0], &example().node, show);
    assert!(details.contains(expected), "{details}");

    let mut idle = example();
    idle.peers[0].state = PeerState::Idle;
    idle.peers = vec![idle.peers.remove(0); 12];
    let why = idle.to_why(show);
    assert!(why.ends_with(", node-2, 2 more: nobody sends to them, so no path is looked for\n"), "{why}");
    assert!(!why.contains("TRIED"));
}

#[test]
fn a_look_at_the_network_says_how_servers_see_this_node() {
    let connected = ServerStatus {
        state: ServerState::Connected,
        carrier: Some(Carrier::WebSocket),
        detail: String::new(),
        retry_in_ms: None,
        relays: true,
        rtt_us: Some(3_450),
        proxy: Some("http://(hidden)@proxy.example:3128".to_owned()),
        ..example().servers.remove(0)
    };
    let netcheck = Netcheck { is_complete: true, listen_port: 51872, net: net(), servers: vec![connected] };
    let expected = "\
IPv4        UDP passes
Seen at     198.51.100.4:40112 (the port is another than this host's 51872)
NAT         keeps one public port and lets in only the very address and port that was written to (mapping at least port-independent, filtering address- and port-dependent)
Hairpin     no

IPv6        UDP is blocked: no server answers over it, so peers elsewhere are reached over relays

Mapped port 203.0.113.7:51872, which router 192.168.1.1 leads to this node (PCP); renewed in 28 min

SERVER                     STATE      CARRIER    ROUND TRIP  RELAY  PROXY                               DETAIL
https://disc.example:7443  connected  websocket  3.4 ms      yes    http://(hidden)@proxy.example:3128
";
    let show = Show { wide: false, colour: false, now_ms: 0 };
    assert_eq!(netcheck.to_table(show), expected);
    let json = serde_json::to_value(&netcheck).unwrap();
    assert_eq!(json["net"]["v4"]["nat"]["mapping"], "port-independent");
    assert_eq!(json["net"]["v6"]["udp"], "blocked");
    assert_eq!(json["net"]["port_mapping"]["tried"]["pcp"], "works");
}

#[test]
fn a_status_of_an_older_agent_is_read_too() {
    let mut json = serde_json::to_value(example()).unwrap();
    for new in ["net", "backend"] {
        json["node"].as_object_mut().unwrap().remove(new);
    }
    for new in ["relays", "rtt_us", "proxy"] {
        json["servers"][0].as_object_mut().unwrap().remove(new);
    }
    for new in ["path", "nat"] {
        json["peers"][0].as_object_mut().unwrap().remove(new);
    }
    let read: Status = serde_json::from_value(json).unwrap();
    assert_eq!(read.peers[0].path, None);
}

#[test]
fn json_has_the_documented_words() {
    let json = serde_json::to_value(example()).unwrap();
    assert_eq!(json["api_version"], "meshspan/v1");
    assert_eq!(json["node"]["state"], "degraded");
    assert_eq!(json["node"]["backend"]["kind"], "userspace");
    assert_eq!(json["servers"][0]["carrier"], serde_json::Value::Null);
    assert_eq!(json["peers"][0]["prefixes"][1]["state"], "local-overlap");
    assert_eq!(serde_json::to_value(Carrier::WebSocket).unwrap(), "websocket");
    let path = &json["peers"][0]["path"];
    assert_eq!((&path["tier"], &path["tried"][1]["kind"]), (&"relay".into(), &"peer-reflexive".into()));
    assert_eq!(json["peers"][0]["nat"]["v4"]["filtering"], "address-and-port-dependent");
    assert_eq!(serde_json::from_value::<Status>(json).unwrap(), example());
}
