//! A pair that stays on a relay, as `status --why` explains it: the words of a real path agent behind symmetric NATs.

use std::time::Duration;

use mesh_agent::status::Show;
use mesh_common::id::ServerId;
use mesh_common::nat::{Filtering, Mapping, NatClass};
use mesh_common::time::Instant;
use mesh_proto::device::{Endpoint, PathTraffic, PeerReport};
use mesh_proto::path::agent::{PathAgent, PathPolicy};
use mesh_proto::wire::record::{Candidate, CandidateKind};

use super::node;

/// Another port outside for each destination, and only that one is let in.
const SYMMETRIC: NatClass =
    NatClass { mapping: Mapping::AddressAndPortDependent, filtering: Filtering::AddressAndPortDependent };
const RELAY: Endpoint = Endpoint::Relay(ServerId(0));
const ROUND_TRIP: Duration = Duration::from_millis(48);
const TALKS_FOR: u64 = 28;

/// The peer's part of the answer.
pub(crate) fn why() -> String {
    let start = Instant::from_origin(Duration::from_secs(1000));
    let (path, now) = talked(start);
    let status = node::in_use(&path, SYMMETRIC, SYMMETRIC, now);
    let shown = status.to_why(Show { wide: false, colour: false, now_ms: 0 });
    shown[shown.find("Peer ").unwrap()..].trim_end().to_owned()
}

/// Somebody talks to the peer for half a minute, and nothing but the relay carries.
fn talked(start: Instant) -> (PathAgent, Instant) {
    let candidate = |kind, addr: &str| Candidate { kind, addr: addr.parse().unwrap() };
    let mut path = PathAgent::new(1, PathPolicy::default());
    let theirs = [
        candidate(CandidateKind::Host, "192.168.1.20:51872"),
        candidate(CandidateKind::Reflexive, "198.51.100.7:40021"),
    ];
    path.handle_candidates(&theirs, start);
    path.handle_own_candidates(&[candidate(CandidateKind::Host, "192.168.7.10:51872")], start);
    path.handle_nat([SYMMETRIC, NatClass::default()], [SYMMETRIC, NatClass::default()], start);
    path.handle_relays(&[ServerId(0)], start);
    path.handle_report(&PeerReport::Demand, start);
    path.handle_report(&PeerReport::Handshake { endpoint: RELAY }, start + ROUND_TRIP);
    let mut now = start + ROUND_TRIP;
    for second in 1..=TALKS_FOR {
        let next = start + Duration::from_secs(second);
        while let Some((at, _)) = path.poll_timeout().filter(|(at, _)| *at <= next) {
            now = now.max(at);
            path.handle_timeout(now);
        }
        now = next;
        let traffic = vec![PathTraffic { endpoint: RELAY, sent: 1, received: 1 }];
        path.handle_report(&PeerReport::Traffic(traffic), now);
    }
    (path, now)
}
