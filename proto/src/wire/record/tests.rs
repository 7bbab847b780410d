#![allow(clippy::unwrap_used)]

use mesh_common::addr::overlay_v6;
use mesh_common::id::NodeId;
use mesh_common::key::WgSecret;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A valid record of `node` in the cluster `home`.
pub(crate) fn record_of(node: &NodeId) -> Record {
    let wg = WgSecret::from_seed(&[7; 32]);
    Record {
        wg_key: wg.public(),
        wg_proof: wg.prove(node),
        host_name: HostName::try_from("node-1".to_owned()).unwrap(),
        overlay_v6: overlay_v6("home", node),
        overlay_v4: Some(OverlayV4 { addr: Ipv4Addr::new(198, 19, 3, 4), claimed_at_ms: 1_700_000_000_000 }),
        prefixes: vec![
            PrefixClaim { prefix: "10.42.1.0/24".parse().unwrap(), since_ms: 1_700_000_000_050 },
            PrefixClaim { prefix: "fd00:42:1::/64".parse().unwrap(), since_ms: 1_700_000_000_060 },
        ],
        excluded_prefixes: vec!["10.42.1.128/25".parse().unwrap()],
        candidates: vec![
            Candidate { kind: CandidateKind::Host, addr: "192.0.2.7:51872".parse().unwrap() },
            Candidate { kind: CandidateKind::Reflexive, addr: "[2001:db8::7]:51872".parse().unwrap() },
        ],
        nat_v4: NatClass { mapping: Mapping::EndpointIndependent, filtering: Filtering::AddressAndPortDependent },
        nat_v6: NatClass::default(),
        instance: [9; 16],
        started_at_ms: 1_700_000_000_123,
        valid_for: Duration::from_secs(86_400),
        wire_min: 1,
        wire_max: 1,
        features: 5,
        admission: vec![1, 2, 3],
        ext: vec![(2, vec![4, 5])],
    }
}

fn prefix() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (any::<[u8; 4]>(), 0u8..=32).prop_map(|(ip, len)| IpNet::new(ip.into(), len).unwrap().trunc()),
        (any::<[u8; 16]>(), 0u8..=128).prop_map(|(ip, len)| IpNet::new(ip.into(), len).unwrap().trunc()),
    ]
}

fn candidate() -> impl Strategy<Value = Candidate> {
    (0u8..4, prefix(), any::<u16>()).prop_map(|(kind, prefix, port)| Candidate {
        kind: candidate_kind(kind).unwrap(),
        addr: SocketAddr::new(prefix.addr().to_canonical(), port),
    })
}

fn nat() -> impl Strategy<Value = NatClass> {
    (0u8..5, 0u8..4).prop_map(|(mapping, filtering)| nat_class([mapping, filtering]).unwrap())
}

prop_compose! {
    fn any_record()(
        host_name in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?",
        overlay_v4 in proptest::option::of((any::<[u8; 4]>(), any::<u64>())),
        prefixes in vec((prefix(), any::<u64>()).prop_map(|(prefix, since_ms)| PrefixClaim { prefix, since_ms }), 0..=MAX_PREFIXES),
        excluded_prefixes in vec(prefix(), 0..5),
        candidates in vec(candidate(), 0..=MAX_CANDIDATES),
        (nat_v4, nat_v6) in (nat(), nat()),
        (valid_for, features, wire_max) in (any::<u32>(), any::<u64>(), any::<u8>()),
        admission in vec(any::<u8>(), 0..50),
        ext in vec((0..EXTENSION_MUST_UNDERSTAND, vec(any::<u8>(), 0..20)), 0..4),
    ) -> Record {
        Record {
            host_name: HostName::try_from(host_name).unwrap(),
            overlay_v4: overlay_v4.map(|(addr, claimed_at_ms)| OverlayV4 { addr: addr.into(), claimed_at_ms }),
            prefixes, excluded_prefixes, candidates, nat_v4, nat_v6,
            valid_for: Duration::from_secs(valid_for.into()),
            features, wire_max, admission, ext,
            ..record_of(&NodeId([1; 32]))
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(record in any_record()) {
        prop_assert_eq!(Record::decode(&record.encode().unwrap()), Ok(record));
    }

    #[test]
    fn changed_bytes_are_refused_or_are_another_record(record in any_record(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut bytes = record.encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(other) = Record::decode(&bytes) {
            prop_assert_ne!(&other, &record);
            prop_assert_eq!(other.encode().unwrap(), bytes);
        }
    }
}

#[test]
fn a_record_cut_anywhere_or_with_a_byte_more_is_malformed() {
    let mut bytes = record_of(&NodeId([1; 32])).encode().unwrap();
    for len in 0..bytes.len() {
        assert_eq!(Record::decode(&bytes[..len]), Err(DecodeRecordError::Malformed), "{len}");
    }
    bytes.push(0);
    assert_eq!(Record::decode(&bytes), Err(DecodeRecordError::Malformed));
}

#[test]
fn an_extension_that_must_be_understood_is_told_apart_from_garbage() {
    let mut record = record_of(&NodeId([1; 32]));
    record.ext.push((EXTENSION_MUST_UNDERSTAND | 7, vec![]));
    assert_eq!(Record::decode(&record.encode().unwrap()), Err(DecodeRecordError::UnknownExtension(0x8007)));
}

#[test]
fn lists_over_their_limits_are_not_written() {
    let full = record_of(&NodeId([1; 32]));
    let mut wide = full.clone();
    wide.prefixes = vec![wide.prefixes[0]; MAX_PREFIXES + 1];
    assert!(matches!(wide.encode(), Err(EncodeRecordError::TooMany { what: "prefixes", count: 65, limit: 64 })));
    let mut chatty = full.clone();
    chatty.candidates = vec![chatty.candidates[0]; MAX_CANDIDATES + 1];
    assert!(matches!(chatty.encode(), Err(EncodeRecordError::TooMany { what: "candidates", .. })));
    let mut heavy = full;
    heavy.ext = vec![(1, vec![0; 5000])];
    assert!(matches!(heavy.encode(), Err(EncodeRecordError::TooLarge(bytes)) if bytes > 5000));
}

#[test]
fn a_mapped_candidate_is_written_as_ipv4_and_a_fraction_of_a_second_is_lost() {
    let mut record = record_of(&NodeId([1; 32]));
    record.candidates[0].addr = "[::ffff:192.0.2.7]:51872".parse().unwrap();
    record.valid_for = Duration::from_millis(86_400_999);
    assert_eq!(Record::decode(&record.encode().unwrap()).unwrap(), record_of(&NodeId([1; 32])));
}
