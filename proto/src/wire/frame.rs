//! A sealed record as it travels: the same bytes through a server, a cache file or a peer.
//!
//! ```text
//! "MSR1" | suite u8 | kind u8 | namespace 32 | node 32 | seq u64 | nonce 24 | len u16 | ciphertext | signature 64
//! ```
//! Little-endian, parsed by hand. The signature is the node identity's over everything before it; the AEAD's associated
//! data is everything before the ciphertext. Parsing proves shape only: [`Frame::verify`] proves the author, and
//! [`crate::sealed::open`] the membership.

use bytes::Bytes;
use mesh_common::id::{Namespace, NodeId};
use mesh_common::key::SignKey;

/// What a frame says about its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Record,
    /// The node left: a signed farewell with an empty body.
    Tombstone,
}

/// A frame of valid shape. Cloning is cheap: the bytes are shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    bytes: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseFrameError {
    #[error("a frame of this kind cannot have {0} bytes")]
    Length(usize),
    #[error("it does not start with MSR1")]
    Magic,
    #[error("suite {0} is not known")]
    Suite(u8),
    #[error("kind {0} is not known")]
    Kind(u8),
}

impl Frame {
    /// Checks lengths, magic, suite and kind; trailing bytes are refused.
    pub fn parse(bytes: Bytes) -> Result<Self, ParseFrameError> {
        todo!()
    }

    /// Assembles and signs a frame around a ciphertext made with [`Frame::header`] as associated data.
    pub(crate) fn assemble(header: Vec<u8>, ciphertext: &[u8], identity: &SignKey) -> Self {
        todo!()
    }

    /// The bytes before the ciphertext.
    pub(crate) fn header(
        kind: Kind,
        namespace: &Namespace,
        node: &NodeId,
        seq: u64,
        nonce: &[u8; 24],
        ciphertext_len: u16,
    ) -> Vec<u8> {
        todo!()
    }

    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub fn kind(&self) -> Kind {
        todo!()
    }

    pub fn namespace(&self) -> Namespace {
        todo!()
    }

    pub fn node(&self) -> NodeId {
        todo!()
    }

    pub fn seq(&self) -> u64 {
        todo!()
    }

    pub(crate) fn nonce(&self) -> [u8; 24] {
        todo!()
    }

    /// The associated data of the AEAD.
    pub(crate) fn associated_data(&self) -> &[u8] {
        todo!()
    }

    pub(crate) fn ciphertext(&self) -> &[u8] {
        todo!()
    }

    /// Whether the node this frame names signed it.
    pub fn verify(&self) -> bool {
        todo!()
    }
}
