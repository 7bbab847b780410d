//! Record to frame and back: padding, encryption, and the order of checks.
//!
//! Open order, cheap first: namespace, signature, AEAD, decode, proof of the WireGuard key, overlay IPv6 address. The caller
//! has checked the sequence number before (it alone knows the mark). Each failure is one variant and nothing else.

use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305};
use mesh_common::addr::overlay_v6;
use mesh_common::id::NodeId;
use mesh_common::key::{ClusterKeys, SignKey};
use mesh_common::limits::RECORD_SIZES;

use crate::wire::frame::{Frame, Kind};
use crate::wire::record::{DecodeRecordError, Record};

/// What a frame held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opened {
    Record(Box<Record>),
    Tombstone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum OpenError {
    #[error("it belongs to another cluster (another secret)")]
    ForeignNamespace,
    #[error("its signature does not hold")]
    Signature,
    #[error("it was sealed with another secret or altered")]
    Sealed,
    #[error("its content is malformed")]
    Malformed,
    #[error("it asks for an extension this version does not know")]
    UnknownExtension,
    #[error("it claims a WireGuard key its node does not own")]
    Proof,
    #[error("it claims an overlay address that is not its node's")]
    OverlayAddress,
}

/// Why a record cannot be sealed.
pub use crate::wire::record::EncodeRecordError as SealError;

/// Seals a record (`None` = a tombstone). `nonce` is 24 fresh random bytes.
pub fn seal(
    keys: &ClusterKeys,
    identity: &SignKey,
    seq: u64,
    record: Option<&Record>,
    nonce: [u8; 24],
) -> Result<Frame, SealError> {
    let (kind, body) = match record {
        Some(record) => (Kind::Record, record.encode()?),
        None => (Kind::Tombstone, Vec::new()),
    };
    Ok(encrypt(keys, identity, kind, seq, nonce, pad(&body)?))
}

/// Opens a frame. `cluster_id` is what overlay addresses are derived from.
pub fn open(keys: &ClusterKeys, cluster_id: &str, frame: &Frame) -> Result<Opened, OpenError> {
    if frame.namespace() != keys.namespace {
        return Err(OpenError::ForeignNamespace);
    }
    if !frame.verify() {
        return Err(OpenError::Signature);
    }
    let (ciphertext, tag) = frame.ciphertext().split_at(frame.ciphertext().len() - TAG_LEN);
    let mut plaintext = ciphertext.to_vec();
    cipher(keys)
        .decrypt_in_place_detached(&frame.nonce().into(), frame.associated_data(), &mut plaintext, Tag::from_slice(tag))
        .map_err(|_| OpenError::Sealed)?;
    let body = unpad(&plaintext).ok_or(OpenError::Malformed)?;
    match frame.kind() {
        Kind::Tombstone if body.is_empty() => Ok(Opened::Tombstone),
        Kind::Tombstone => Err(OpenError::Malformed),
        Kind::Record => {
            let record = Record::decode(body).map_err(|error| match error {
                DecodeRecordError::Malformed => OpenError::Malformed,
                DecodeRecordError::UnknownExtension(_) => OpenError::UnknownExtension,
            })?;
            check_claims(&record, cluster_id, &frame.node())?;
            Ok(Opened::Record(Box::new(record)))
        }
    }
}

/// What a record says of its node and only that node may say.
fn check_claims(record: &Record, cluster_id: &str, node: &NodeId) -> Result<(), OpenError> {
    if !record.wg_proof.holds(node, &record.wg_key) {
        return Err(OpenError::Proof);
    }
    if record.overlay_v6 != overlay_v6(cluster_id, node) {
        return Err(OpenError::OverlayAddress);
    }
    Ok(())
}

const TAG_LEN: usize = 16;
const LEN_LEN: usize = 2;

/// A signed frame around this plaintext.
fn encrypt(keys: &ClusterKeys, identity: &SignKey, kind: Kind, seq: u64, nonce: [u8; 24], plaintext: Vec<u8>) -> Frame {
    let mut sealed = plaintext;
    let ciphertext_len = u16::try_from(sealed.len() + TAG_LEN).expect("the largest ciphertext fits a u16");
    let header = Frame::header(kind, &keys.namespace, &identity.node_id(), seq, &nonce, ciphertext_len);
    let tag = cipher(keys)
        .encrypt_in_place_detached(&nonce.into(), &header, &mut sealed)
        .expect("a few kilobytes are within the cipher's limit");
    sealed.extend_from_slice(&tag);
    Frame::assemble(header, &sealed, identity)
}

fn cipher(keys: &ClusterKeys) -> XChaCha20Poly1305 {
    XChaCha20Poly1305::new(keys.record.as_bytes().into())
}

/// Length, body, zeros up to the next size; room for the tag.
fn pad(body: &[u8]) -> Result<Vec<u8>, SealError> {
    let too_large = SealError::TooLarge(body.len());
    let len = u16::try_from(body.len()).map_err(|_| too_large)?;
    let size = RECORD_SIZES.into_iter().find(|size| LEN_LEN + body.len() <= *size).ok_or(too_large)?;
    let mut plaintext = Vec::with_capacity(size + TAG_LEN);
    plaintext.extend_from_slice(&len.to_le_bytes());
    plaintext.extend_from_slice(body);
    plaintext.resize(size, 0);
    Ok(plaintext)
}

/// The body, when its length fits and all that follows it is zero.
fn unpad(plaintext: &[u8]) -> Option<&[u8]> {
    let (len, rest) = plaintext.split_first_chunk::<LEN_LEN>()?;
    let (body, padding) = rest.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
    padding.iter().all(|byte| *byte == 0).then_some(body)
}

#[cfg(test)]
mod tests;
