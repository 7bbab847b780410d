//! The member set and prefix owners as functions of the frames seen, whatever their order, number and road.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::addr::overlay_v6;
use mesh_common::host_name::HostName;
use mesh_common::id::{NodeId, ServerId};
use mesh_common::key::{ClusterKeys, ClusterSecret, SignKey, WgSecret};
use mesh_common::nat::NatClass;
use mesh_common::time::Instant;
use mesh_proto::mesh::members::{Admission, Members, Rejection};
use mesh_proto::random::SplitMix64;
use mesh_proto::sealed;
use mesh_proto::wire::record::{OverlayV4, PrefixClaim, Record};

const CLUSTER: &str = "home";
const OWN: NodeId = NodeId([0; 32]);

fn keys(byte: u8) -> ClusterKeys {
    let mut secret = [byte; 32];
    secret[0] = 1;
    ClusterSecret::from_bytes(secret).derive()
}

fn identity(number: u8) -> SignKey {
    SignKey::from_seed(&[number; 32])
}

fn record(number: u8) -> Record {
    let node = identity(number).node_id();
    let wg = WgSecret::from_seed(&[100 + number; 32]);
    Record {
        wg_key: wg.public(),
        wg_proof: wg.prove(&node),
        host_name: HostName::try_from(format!("node-{number}")).unwrap(),
        overlay_v6: overlay_v6(CLUSTER, &node),
        overlay_v4: Some(OverlayV4 { addr: Ipv4Addr::new(198, 19, 0, 1 + number % 3), claimed_at_ms: 1 }),
        prefixes: vec![PrefixClaim { prefix: "10.1.0.0/16".parse().unwrap(), since_ms: 1 }],
        excluded_prefixes: vec![],
        candidates: vec![],
        nat_v4: NatClass::default(),
        nat_v6: NatClass::default(),
        instance: [number; 16],
        started_at_ms: 0,
        valid_for: Duration::from_secs(3600),
        wire_min: 1,
        wire_max: 1,
        features: 0,
        admission: vec![],
        ext: vec![],
    }
}

fn frame(number: u8, seq: u64, record: Option<&Record>) -> Bytes {
    let mut nonce = [number; 24];
    nonce[..8].copy_from_slice(&seq.to_le_bytes());
    sealed::seal(&keys(9), &identity(number), seq, record, nonce).unwrap().as_bytes().clone()
}

fn members() -> Members {
    Members::new(keys(9), CLUSTER.into(), OWN, BTreeMap::new())
}

fn at(seconds: u64) -> Instant {
    Instant::from_origin(Duration::from_secs(seconds))
}

fn state(members: &Members) -> BTreeMap<NodeId, (u64, Record)> {
    members.iter().map(|(node, member)| (*node, (member.frame.seq(), member.record.clone()))).collect()
}

#[test]
fn the_set_depends_on_the_frames_and_on_nothing_else() {
    // Four nodes with three records each; node 3 left with its last frame.
    let mut frames: Vec<Bytes> = Vec::new();
    for number in 0..4 {
        for seq in 1..=3 {
            let mut said = record(number);
            said.features = seq;
            let farewell = number == 3 && seq == 3;
            frames.push(frame(number, seq, (!farewell).then_some(&said)));
        }
    }
    let mut expected = None;
    for seed in 0..60 {
        let mut random = SplitMix64::new(seed);
        let mut members = members();
        let mut order: Vec<Bytes> = frames.iter().chain(&frames).cloned().collect();
        for last in (1..order.len()).rev() {
            order.swap(last, random.below(last as u64 + 1) as usize);
        }
        for bytes in order {
            // By a server's listing, or from a cache or peer.
            let _refused_when_older = match random.below(3) {
                0 => members.admit(bytes, at(1)),
                server => members.admit_listed(bytes, ServerId(server as usize), at(1)),
            };
        }
        let state = state(&members);
        assert_eq!(state.len(), 3, "seed {seed}");
        assert!(state.values().all(|(seq, record)| *seq == 3 && record.features == 3), "seed {seed}");
        assert_eq!(expected.get_or_insert_with(|| state.clone()), &state, "seed {seed}");
    }
}

#[test]
fn an_older_frame_is_refused_also_after_a_farewell_and_after_a_restart() {
    let mut first = members();
    first.admit(frame(1, 5, Some(&record(1))), at(0)).unwrap();
    assert_eq!(first.admit(frame(1, 4, Some(&record(1))), at(0)), Err(Rejection::Stale));
    assert_eq!(first.admit(frame(1, 6, None), at(0)).unwrap().1, Admission::Left);
    assert_eq!(first.admit(frame(1, 5, Some(&record(1))), at(0)), Err(Rejection::Stale));
    let mut restarted = Members::new(keys(9), CLUSTER.into(), OWN, first.marks().clone());
    assert_eq!(restarted.admit(frame(1, 5, Some(&record(1))), at(0)), Err(Rejection::Stale));
    assert_eq!(restarted.iter().count(), 0);
    assert_eq!(restarted.rejected().get(&Rejection::Stale), Some(&1));
    assert_eq!(restarted.admit(frame(1, 7, Some(&record(1))), at(0)).unwrap().1, Admission::New);
}

#[test]
fn a_record_of_another_secret_or_node_is_counted_and_changes_nothing() {
    let mut members = members();
    members.admit(frame(1, 5, Some(&record(1))), at(0)).unwrap();
    let before = state(&members);
    let foreign = sealed::seal(&keys(8), &identity(2), 1, Some(&record(2)), [1; 24]).unwrap();
    assert!(members.admit(foreign.as_bytes().clone(), at(0)).is_err());
    // Node 2 claims the key and the address of node 1.
    assert!(members.admit(frame(2, 1, Some(&record(1))), at(0)).is_err());
    let mut flipped = frame(2, 2, Some(&record(2))).to_vec();
    for byte in 0..flipped.len() {
        flipped[byte] ^= 1;
        assert!(members.admit(Bytes::copy_from_slice(&flipped), at(0)).is_err(), "byte {byte}");
        flipped[byte] ^= 1;
    }
    assert_eq!(state(&members), before);
    assert!(members.rejected().values().sum::<u64>() > 100);
}

#[test]
fn a_member_expires_only_when_nobody_lists_it_and_it_is_silent() {
    let server = ServerId(0);
    let connected = BTreeSet::from([server]);
    let node = identity(1).node_id();
    let mut members = members();
    members.admit_listed(frame(1, 1, Some(&record(1))), server, at(0)).unwrap();
    assert!(members.expire(&connected, at(100_000)).is_empty(), "a connected server lists it");
    members.unlist(server, &node);
    assert!(members.expire(&connected, at(3599)).is_empty(), "an absence is a hint");
    members.note_evidence(&record(1).wg_key, at(3000));
    assert!(members.expire(&connected, at(6599)).is_empty(), "a handshake spoke for it");
    assert_eq!(members.expire(&connected, at(6600)), [node]);
    members.admit_listed(frame(1, 2, Some(&record(1))), server, at(7000)).unwrap();
    assert_eq!(members.expire(&BTreeSet::new(), at(7000 + 3600)), [node], "a lost server's list keeps nobody for ever");
}

#[test]
fn a_server_that_is_no_longer_configured_lists_nobody() {
    let mut members = members();
    members.admit_listed(frame(1, 1, Some(&record(1))), ServerId(1), at(0)).unwrap();
    let node = identity(1).node_id();
    assert!(members.get(&node).unwrap().is_live(at(10_000)));
    members.forget_servers_from(ServerId(1));
    assert!(!members.get(&node).unwrap().is_live(at(10_000)));
}

#[test]
fn a_denied_node_is_removed_and_stays_out() {
    let mut members = members();
    members.admit(frame(1, 1, Some(&record(1))), at(0)).unwrap();
    members.set_denied(BTreeSet::from([identity(1).node_id()]));
    assert_eq!(members.iter().count(), 0);
    assert_eq!(members.admit(frame(1, 2, Some(&record(1))), at(0)), Err(Rejection::Denied));
    members.set_denied(BTreeSet::new());
    assert!(members.admit(frame(1, 2, Some(&record(1))), at(0)).is_ok());
}

#[test]
fn a_newer_frame_of_our_own_identity_is_told_apart() {
    let own = identity(1).node_id();
    let mut members = Members::new(keys(9), CLUSTER.into(), own, BTreeMap::new());
    members.set_own_seq(10);
    assert_eq!(members.admit(frame(1, 10, Some(&record(1))), at(0)).unwrap(), (own, Admission::Known));
    let newer = members.admit(frame(1, 11, Some(&record(1))), at(0)).unwrap();
    assert_eq!(newer, (own, Admission::OwnIdentity { seq: 11 }));
    assert_eq!(members.iter().count(), 0, "we are not our own peer");
}
