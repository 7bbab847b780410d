#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use bytes::Bytes;
use mesh_common::key::{ClusterSecret, WgSecret};
use proptest::prelude::*;

use super::*;
use crate::wire::record::EXTENSION_MUST_UNDERSTAND;
use crate::wire::record::tests::record_of;

fn keys(byte: u8) -> ClusterKeys {
    let mut secret = [byte; 32];
    secret[0] = 0;
    ClusterSecret::from_bytes(secret).derive()
}

fn identity(byte: u8) -> SignKey {
    SignKey::from_seed(&[byte; 32])
}

fn record() -> Record {
    record_of(&identity(1).node_id())
}

fn sealed() -> Frame {
    seal(&keys(1), &identity(1), 42, Some(&record()), [3; 24]).unwrap()
}

/// A frame around any plaintext, honestly sealed and signed: what a broken or hostile member can make.
fn forge(kind: Kind, plaintext: Vec<u8>) -> Frame {
    encrypt(&keys(1), &identity(1), kind, 42, [3; 24], plaintext)
}

fn opens(bytes: Vec<u8>) -> bool {
    Frame::parse(bytes.into()).is_ok_and(|frame| open(&keys(1), "home", &frame).is_ok())
}

#[test]
fn a_record_and_a_tombstone_come_back_as_they_went() {
    let frame = Frame::parse(sealed().as_bytes().clone()).unwrap();
    assert_eq!(open(&keys(1), "home", &frame), Ok(Opened::Record(Box::new(record()))));
    assert_eq!((frame.kind(), frame.seq(), frame.node()), (Kind::Record, 42, identity(1).node_id()));
    assert_eq!(frame.namespace(), keys(1).namespace);

    let farewell = seal(&keys(1), &identity(1), 43, None, [4; 24]).unwrap();
    assert_eq!(farewell.kind(), Kind::Tombstone);
    assert_eq!(open(&keys(1), "home", &farewell), Ok(Opened::Tombstone));
}

#[test]
fn one_flipped_bit_anywhere_never_opens() {
    for frame in [sealed(), seal(&keys(1), &identity(1), 43, None, [4; 24]).unwrap()] {
        assert!(opens(frame.as_bytes().to_vec()));
        for bit in 0..frame.as_bytes().len() * 8 {
            let mut bytes = frame.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!opens(bytes), "bit {} of byte {}", bit % 8, bit / 8);
        }
    }
}

#[test]
fn a_frame_cut_anywhere_or_with_bytes_more_is_refused() {
    let whole = sealed().as_bytes().to_vec();
    for len in 0..whole.len() {
        assert!(Frame::parse(Bytes::copy_from_slice(&whole[..len])).is_err(), "{len}");
    }
    for more in [1, 512, 4096, 1 << 20] {
        let mut long = whole.clone();
        long.resize(whole.len() + more, 0);
        assert!(Frame::parse(long.into()).is_err(), "{more}");
    }
}

#[test]
fn another_secret_does_not_open_it() {
    assert_eq!(open(&keys(2), "home", &sealed()), Err(OpenError::ForeignNamespace));
    // A server or a thief may write our namespace over a frame of another secret: the signature says no.
    let mut renamed = seal(&keys(2), &identity(1), 42, Some(&record()), [3; 24]).unwrap().as_bytes().to_vec();
    renamed[6..38].copy_from_slice(&keys(1).namespace.0);
    let renamed = Frame::parse(renamed.into()).unwrap();
    assert_eq!(open(&keys(1), "home", &renamed), Err(OpenError::Signature));
    // And its own node signing it so gains nothing without the secret.
    let header = Frame::header(Kind::Record, &keys(1).namespace, &identity(1).node_id(), 42, &[3; 24], 528);
    let outsider = Frame::assemble(header, &[0; 528], &identity(1));
    assert_eq!(open(&keys(1), "home", &outsider), Err(OpenError::Sealed));
}

#[test]
fn a_frame_of_one_node_is_never_anothers() {
    let mut stolen = sealed().as_bytes().to_vec();
    stolen[38..70].copy_from_slice(&identity(2).node_id().0);
    assert_eq!(open(&keys(1), "home", &Frame::parse(stolen.into()).unwrap()), Err(OpenError::Signature));

    // Signed anew by the thief: the associated data still names the owner.
    let frame = sealed();
    let header = Frame::header(Kind::Record, &keys(1).namespace, &identity(2).node_id(), 42, &frame.nonce(), 528);
    let resigned = Frame::assemble(header, frame.ciphertext(), &identity(2));
    assert!(resigned.verify());
    assert_eq!(open(&keys(1), "home", &resigned), Err(OpenError::Sealed));

    // Sealed anew by a member: the proof of the WireGuard key and the overlay address name the owner too.
    let resealed = seal(&keys(1), &identity(2), 42, Some(&record()), [5; 24]).unwrap();
    assert_eq!(open(&keys(1), "home", &resealed), Err(OpenError::Proof));
    let own_key = Record { wg_proof: WgSecret::from_seed(&[7; 32]).prove(&identity(2).node_id()), ..record() };
    let squatter = seal(&keys(1), &identity(2), 42, Some(&own_key), [5; 24]).unwrap();
    assert_eq!(open(&keys(1), "home", &squatter), Err(OpenError::OverlayAddress));
}

#[test]
fn the_overlay_address_belongs_to_the_cluster_id() {
    assert_eq!(open(&keys(1), "work", &sealed()), Err(OpenError::OverlayAddress));
}

#[test]
fn an_extension_that_must_be_understood_has_its_own_error() {
    let record = Record { ext: vec![(EXTENSION_MUST_UNDERSTAND, vec![])], ..record() };
    let frame = seal(&keys(1), &identity(1), 42, Some(&record), [3; 24]).unwrap();
    assert_eq!(open(&keys(1), "home", &frame), Err(OpenError::UnknownExtension));
}

#[test]
fn padding_and_bodies_that_no_honest_node_makes_are_malformed() {
    let good = pad(&record().encode().unwrap()).unwrap();
    assert!(open(&keys(1), "home", &forge(Kind::Record, good.clone())).is_ok());
    let mut dirty = good.clone();
    *dirty.last_mut().unwrap() = 1;
    let mut long = good.clone();
    long[..2].copy_from_slice(&600u16.to_le_bytes());
    let mut longest = good.clone();
    longest[..2].copy_from_slice(&u16::MAX.to_le_bytes());
    let mut short = good.clone();
    short[..2].copy_from_slice(&10u16.to_le_bytes());
    for bad in [dirty, long, longest, short, vec![0; 512]] {
        assert_eq!(open(&keys(1), "home", &forge(Kind::Record, bad)), Err(OpenError::Malformed));
    }
    assert_eq!(open(&keys(1), "home", &forge(Kind::Tombstone, good)), Err(OpenError::Malformed));
    assert_eq!(open(&keys(1), "home", &forge(Kind::Tombstone, vec![0; 512])), Ok(Opened::Tombstone));
}

#[test]
fn the_length_of_a_frame_tells_a_bucket_and_nothing_more() {
    let base = record().encode().unwrap().len();
    let mut lengths = BTreeSet::new();
    for extra in 0..=4094 - base {
        let record = Record { admission: vec![1; record().admission.len() + extra], ..record() };
        let body = base + extra;
        let bucket = RECORD_SIZES.into_iter().find(|size| body + 2 <= *size).unwrap();
        let padded = pad(&record.encode().unwrap()).unwrap();
        assert_eq!(padded.len(), bucket, "{body}");
        lengths.insert(padded.len());
    }
    assert_eq!(lengths.into_iter().collect::<Vec<_>>(), RECORD_SIZES[usize::from(base > 510)..]);

    let too_large = Record { admission: vec![1; record().admission.len() + 4095 - base], ..record() };
    let refused = seal(&keys(1), &identity(1), 42, Some(&too_large), [3; 24]);
    assert_eq!(refused, Err(SealError::TooLarge(4095)));
    assert!(refused.unwrap_err().to_string().contains("announce fewer"));
}

proptest! {
    #[test]
    fn any_bytes_may_stand_where_a_frame_is_expected(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
        prop_assert!(Frame::parse(bytes.into()).is_err());
    }
}
