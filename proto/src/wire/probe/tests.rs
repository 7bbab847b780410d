#![allow(clippy::unwrap_used)]

use mesh_common::id::NodeId;
use mesh_common::key::{ClusterSecret, ProbeKeys, WgSecret};
use mesh_common::nat::{Filtering, Mapping};
use proptest::prelude::*;

use super::*;
use crate::wire::record::CandidateKind;

/// The keys of one pair, at both ends.
fn pair() -> (ProbeKeys, ProbeKeys) {
    let keys = ClusterSecret::from_bytes(*b"a secret for probes, not a secre").derive();
    let [(a, a_wg), (b, b_wg)] = [1, 2].map(|n| (NodeId([n; 32]), WgSecret::from_seed(&[n; 32])));
    (keys.probe_keys((a, &a_wg), (b, b_wg.public())).unwrap(), keys.probe_keys((b, &b_wg), (a, a_wg.public())).unwrap())
}

fn candidate(port: u16) -> Candidate {
    Candidate { kind: CandidateKind::Reflexive, addr: ([0x20, 1, 0xdb8, 0, 0, 0, 0, 7], port).into() }
}

fn samples() -> Vec<Probe> {
    let nat_v4 = NatClass { mapping: Mapping::EndpointIndependent, filtering: Filtering::AddressAndPortDependent };
    let candidates = (1..=16).map(candidate).collect();
    vec![
        Probe::Ping { id: 7, heard: u32::MAX },
        Probe::Pong { id: u32::MAX, heard: 0, observed: Some(([192, 0, 2, 1], 51872).into()) },
        Probe::Pong { id: 1, heard: 2, observed: Some(([0x20, 1, 0xdb8, 0, 0, 0, 0, 1], 65535).into()) },
        Probe::Pong { id: 1, heard: 2, observed: None },
        Probe::Call(Call::default()),
        Probe::Call(Call { answer_wanted: true, guess_ports: true, nat_v4, nat_v6: NatClass::default(), candidates }),
    ]
}

#[test]
fn what_is_sealed_opens_at_the_other_end_and_there_only() {
    let (a, b) = pair();
    for probe in samples() {
        let datagram = seal(&a.send, &[9; 16], 5, [3; 24], &probe, None);
        assert_eq!(tag(&datagram), Some(b.receive.tag));
        assert_eq!(open(&b.receive, &datagram), Ok(Opened { instance: [9; 16], counter: 5, probe }));
        assert_eq!(open(&b.send, &datagram), Err(OpenProbeError::Shape), "reflected at its sender");
        let relabelled = ProbeKey { tag: a.send.tag, ..b.send.clone() };
        assert_eq!(open(&relabelled, &datagram), Err(OpenProbeError::Sealed));
    }
}

#[test]
fn no_flipped_bit_and_no_missing_byte_opens() {
    let (a, b) = pair();
    for probe in samples() {
        let datagram = seal(&a.send, &[9; 16], 5, [3; 24], &probe, None).to_vec();
        for bit in 0..datagram.len() * 8 {
            let mut flipped = datagram.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&b.receive, &flipped).is_err(), "bit {bit} of {probe:?}");
        }
        for len in 0..datagram.len() {
            assert!(open(&b.receive, &datagram[..len]).is_err(), "{len} bytes of {probe:?}");
        }
    }
}

#[test]
fn sizes_are_exact_and_a_pong_is_never_longer_than_its_ping() {
    let (a, b) = pair();
    let len = |probe: &Probe, pad_to| seal(&a.send, &[9; 16], 5, [3; 24], probe, pad_to).len();
    let ping = Probe::Ping { id: 1, heard: 2 };
    for (pad_to, expected) in
        [(None, 104), (Some(0), 104), (Some(105), 105), (Some(1452), 1452), (Some(u16::MAX), 9000)]
    {
        assert_eq!(len(&ping, pad_to), expected);
        assert!(open(&b.receive, &seal(&a.send, &[9; 16], 5, [3; 24], &ping, pad_to)).is_ok());
    }
    for probe in samples() {
        match probe {
            Probe::Ping { .. } | Probe::Pong { .. } => assert_eq!(len(&probe, None), MIN_PROBE),
            Probe::Call(_) => assert!((MIN_PROBE..=403).contains(&len(&probe, None))),
        }
    }
}

#[test]
fn more_candidates_than_fit_are_left_out() {
    let (a, b) = pair();
    let chatty = Call { candidates: (1..=300).map(candidate).collect(), ..Call::default() };
    let opened = open(&b.receive, &seal(&a.send, &[9; 16], 5, [3; 24], &Probe::Call(chatty), None)).unwrap();
    let Probe::Call(call) = opened.probe else { panic!("{opened:?}") };
    assert_eq!(call.candidates, (1..=16).map(candidate).collect::<Vec<_>>());
}

#[test]
fn a_peer_that_seals_nonsense_is_refused() {
    // type, instance, counter, then a body.
    let content = |kind: u8, body: &[u8]| [&[kind][..], &[0; 24], body, &[0; 60]].concat();
    assert!(parse(&content(PING, &[1; 8])).is_some());
    let mapped = [&[0; 8][..], &[6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1, 2, 3, 4, 5, 6]].concat();
    for (why, kind, body) in [
        ("unknown type", 0, &[][..]),
        ("unknown type", 4, &[]),
        ("something after the body", PING, &[1; 9]),
        ("an address of no family", PONG, &[0, 0, 0, 0, 0, 0, 0, 0, 5]),
        ("IPv4 written as IPv6", PONG, &mapped),
        ("unknown flags", CALL, &[4]),
        ("an unknown mapping", CALL, &[0, 5]),
        ("an unknown filtering", CALL, &[0, 0, 9]),
        ("17 candidates", CALL, &[0, 0, 0, 0, 0, 17]),
        ("an unknown kind of candidate", CALL, &[0, 0, 0, 0, 0, 1, 9, 4]),
        ("a candidate cut short", CALL, &[0, 0, 0, 0, 0, 16, 1, 4]),
    ] {
        assert_eq!(parse(&content(kind, body)), None, "{why}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_stumble(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let (_, b) = pair();
        prop_assert!(open(&b.receive, &bytes).is_err());
        if let Some(opened) = parse(&bytes) {
            let mut again = Vec::new();
            write_body(&opened.probe, &mut again);
            prop_assert!(bytes[PROLOGUE_LEN..].starts_with(&again));
        }
    }
}
