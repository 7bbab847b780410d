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
use mesh_common::key::{self, SignKey};
use mesh_common::limits::{MAX_CIPHERTEXT, RECORD_SIZES};

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

/// How every frame begins.
pub const MAGIC: &[u8; 4] = b"MSR1";
/// Ed25519 signature, XChaCha20-Poly1305, bodies of wire v1.
const SUITE: u8 = 1;
const KIND_RECORD: u8 = 1;
const KIND_TOMBSTONE: u8 = 2;
const LABEL: &str = "meshspan/v1 frame";

const SUITE_AT: usize = 4;
const KIND_AT: usize = 5;
const NAMESPACE_AT: usize = 6;
const NODE_AT: usize = 38;
const SEQ_AT: usize = 70;
const NONCE_AT: usize = 78;
const LEN_AT: usize = 102;
const HEADER_LEN: usize = 104;
const SIGNATURE_LEN: usize = 64;
const TAG_LEN: usize = 16;

/// The longest frame.
pub const MAX_FRAME: usize = HEADER_LEN + MAX_CIPHERTEXT + SIGNATURE_LEN;

impl Frame {
    /// Checks lengths, magic, suite and kind; trailing bytes are refused.
    pub fn parse(bytes: Bytes) -> Result<Self, ParseFrameError> {
        let Some(ciphertext_len) = bytes.len().checked_sub(HEADER_LEN + SIGNATURE_LEN) else {
            return Err(ParseFrameError::Length(bytes.len()));
        };
        let known_size = RECORD_SIZES.iter().any(|size| size + TAG_LEN == ciphertext_len);
        if !known_size || usize::from(u16::from_le_bytes(field(&bytes, LEN_AT))) != ciphertext_len {
            return Err(ParseFrameError::Length(bytes.len()));
        }
        if bytes[..SUITE_AT] != *MAGIC {
            return Err(ParseFrameError::Magic);
        }
        if bytes[SUITE_AT] != SUITE {
            return Err(ParseFrameError::Suite(bytes[SUITE_AT]));
        }
        match bytes[KIND_AT] {
            KIND_RECORD | KIND_TOMBSTONE => Ok(Self { bytes }),
            kind => Err(ParseFrameError::Kind(kind)),
        }
    }

    /// Assembles and signs a frame around a ciphertext made with [`Frame::header`] as associated data.
    pub(crate) fn assemble(header: Vec<u8>, ciphertext: &[u8], identity: &SignKey) -> Self {
        let mut bytes = header;
        bytes.reserve_exact(ciphertext.len() + SIGNATURE_LEN);
        bytes.extend_from_slice(ciphertext);
        let signature = identity.sign(LABEL, &bytes);
        bytes.extend_from_slice(&signature);
        Self { bytes: bytes.into() }
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
        let kind = match kind {
            Kind::Record => KIND_RECORD,
            Kind::Tombstone => KIND_TOMBSTONE,
        };
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&[SUITE, kind]);
        bytes.extend_from_slice(&namespace.0);
        bytes.extend_from_slice(&node.0);
        bytes.extend_from_slice(&seq.to_le_bytes());
        bytes.extend_from_slice(nonce);
        bytes.extend_from_slice(&ciphertext_len.to_le_bytes());
        bytes
    }

    pub fn as_bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub fn kind(&self) -> Kind {
        if self.bytes[KIND_AT] == KIND_TOMBSTONE { Kind::Tombstone } else { Kind::Record }
    }

    pub fn namespace(&self) -> Namespace {
        Namespace(field(&self.bytes, NAMESPACE_AT))
    }

    pub fn node(&self) -> NodeId {
        NodeId(field(&self.bytes, NODE_AT))
    }

    pub fn seq(&self) -> u64 {
        u64::from_le_bytes(field(&self.bytes, SEQ_AT))
    }

    pub(crate) fn nonce(&self) -> [u8; 24] {
        field(&self.bytes, NONCE_AT)
    }

    /// The associated data of the AEAD.
    pub(crate) fn associated_data(&self) -> &[u8] {
        &self.bytes[..HEADER_LEN]
    }

    pub(crate) fn ciphertext(&self) -> &[u8] {
        &self.bytes[HEADER_LEN..self.signature_at()]
    }

    /// Whether the node this frame names signed it.
    pub fn verify(&self) -> bool {
        let signature = field(&self.bytes, self.signature_at());
        key::verify(&self.node().0, LABEL, &self.bytes[..self.signature_at()], &signature)
    }

    fn signature_at(&self) -> usize {
        self.bytes.len() - SIGNATURE_LEN
    }
}

/// `N` bytes at an offset that the caller has checked: a [`Frame`] is never shorter than its head and signature.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a slice of N bytes is an array of N bytes")
}
