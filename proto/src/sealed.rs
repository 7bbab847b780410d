//! Record to frame and back: padding, encryption, and the order of checks.
//!
//! Open order, cheap first: namespace, signature, AEAD, decode, proof of the WireGuard key, overlay IPv6 address. The caller
//! has checked the sequence number before (it alone knows the mark). Each failure is one variant and nothing else.

use mesh_common::key::{ClusterKeys, SignKey};

use crate::wire::frame::Frame;
use crate::wire::record::Record;

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the record needs {0} bytes, the largest frame holds 4094: announce fewer prefixes or candidates"
)]
pub struct SealError(pub usize);

/// Seals a record (`None` = a tombstone). `nonce` is 24 fresh random bytes.
pub fn seal(
    keys: &ClusterKeys,
    identity: &SignKey,
    seq: u64,
    record: Option<&Record>,
    nonce: [u8; 24],
) -> Result<Frame, SealError> {
    todo!()
}

/// Opens a frame. `cluster_id` is what overlay addresses are derived from.
pub fn open(keys: &ClusterKeys, cluster_id: &str, frame: &Frame) -> Result<Opened, OpenError> {
    todo!()
}
