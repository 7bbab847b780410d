//! Secrets and public keys, and every derivation from the cluster secret.
//!
//! Each secret is its own type: `Debug` prints no byte of it, memory is wiped on drop, comparison takes constant time.
//! Nothing here makes randomness: seeds come from the caller.
//!
//! Labels of wire v1 (docs/wire.md): HKDF-SHA256 with salt `meshspan/v1` and one `meshspan/v1 …` info per key; a signature
//! covers its label, a zero byte, and the message.

use std::fmt;

use data_encoding::BASE64;
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use hkdf::Hkdf;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use x25519_dalek::StaticSecret;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::id::{Namespace, NodeId};

const SALT: &[u8] = b"meshspan/v1";
const LABEL_RECORD: &[u8] = b"meshspan/v1 record";
const LABEL_MEMBERSHIP: &[u8] = b"meshspan/v1 membership";
const LABEL_PSK_ROOT: &[u8] = b"meshspan/v1 psk";
const LABEL_PAIR_PSK: &[u8] = b"meshspan/v1 pair psk";
const LABEL_PROBE_ROOT: &[u8] = b"meshspan/v1 probe root";
const LABEL_PROBE: &[u8] = b"meshspan/v1 probe";
const LABEL_WG_PROOF: &str = "meshspan/v1 wg";

/// 32 random bytes that make a node a member of one cluster. Made on a node, never on a server.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct ClusterSecret([u8; 32]);

/// A cluster secret that is not base64 of 32 bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSecretError {
    #[error("it is not base64 (expected 44 characters that end in '=')")]
    NotBase64,
    #[error("it holds {0} bytes, a cluster secret is exactly 32")]
    WrongLength(usize),
    #[error("all its bytes are equal, which no random secret is")]
    NotRandom,
}

impl ClusterSecret {
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads the text form: base64 of 32 bytes, surrounding white space ignored.
    pub fn parse(text: &str) -> Result<Self, ParseSecretError> {
        let bytes = Zeroizing::new(BASE64.decode(text.trim().as_bytes()).map_err(|_| ParseSecretError::NotBase64)?);
        let secret: [u8; 32] = bytes.as_slice().try_into().map_err(|_| ParseSecretError::WrongLength(bytes.len()))?;
        if secret.iter().all(|byte| *byte == secret[0]) {
            return Err(ParseSecretError::NotRandom);
        }
        Ok(Self(secret))
    }

    /// The text form, for the secret file and the join token only.
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(BASE64.encode(&self.0))
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Derives every key of the cluster.
    pub fn derive(&self) -> ClusterKeys {
        let hkdf = Hkdf::<Sha256>::new(Some(SALT), &self.0);
        let mut membership_seed = expand(&hkdf, LABEL_MEMBERSHIP);
        let membership = SigningKey::from_bytes(&membership_seed);
        membership_seed.zeroize();
        ClusterKeys {
            namespace: Namespace(membership.verifying_key().to_bytes()),
            membership: SignKey(membership),
            record: Key32(expand(&hkdf, LABEL_RECORD)),
            psk_root: Key32(expand(&hkdf, LABEL_PSK_ROOT)),
            probe_root: Key32(expand(&hkdf, LABEL_PROBE_ROOT)),
        }
    }
}

impl PartialEq for ClusterSecret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}
impl Eq for ClusterSecret {}

/// What one cluster secret gives: the name servers know the cluster by, and the keys of its members.
#[derive(Clone, Debug)]
pub struct ClusterKeys {
    pub namespace: Namespace,
    /// Proves to servers that a node is a member.
    pub membership: SignKey,
    /// XChaCha20-Poly1305 key of records.
    pub record: Key32,
    psk_root: Key32,
    probe_root: Key32,
}

impl ClusterKeys {
    /// The preshared key of a pair, the same on both sides: HKDF of the PSK root over both (node id, WireGuard key), sorted.
    pub fn pair_psk(&self, a: (NodeId, WgPublicKey), b: (NodeId, WgPublicKey)) -> PresharedKey {
        let (low, high) = if a <= b { (a, b) } else { (b, a) };
        let hkdf = Hkdf::<Sha256>::new(Some(SALT), &self.psk_root.0);
        let mut key = [0; 32];
        hkdf.expand_multi_info(&[LABEL_PAIR_PSK, &low.0.0, &low.1.0, &high.0.0, &high.1.0], &mut key)
            .expect("32 bytes are within HKDF-SHA256's limit");
        PresharedKey(key)
    }

    /// The keys of probes between this node and a peer, both ways. `None` when the peer's key is of small order: what is
    /// derived from it is no secret.
    pub fn probe_keys(&self, own: (NodeId, &WgSecret), peer: (NodeId, WgPublicKey)) -> Option<ProbeKeys> {
        let shared = own.1.x25519().diffie_hellman(&x25519_dalek::PublicKey::from(peer.1.0));
        if !shared.was_contributory() {
            return None;
        }
        let hkdf = Hkdf::<Sha256>::new(Some(&self.probe_root.0), shared.as_bytes());
        Some(ProbeKeys {
            send: ProbeKey::expand(&hkdf, &own.0, &peer.0),
            receive: ProbeKey::expand(&hkdf, &peer.0, &own.0),
        })
    }
}

/// The keys of probes between two nodes.
#[derive(Clone, Debug)]
pub struct ProbeKeys {
    pub send: ProbeKey,
    pub receive: ProbeKey,
}

/// The key of probes in one direction, and the tag by which the receiver knows whose key to take.
#[derive(Clone)]
pub struct ProbeKey {
    pub key: Key32,
    pub tag: [u8; 8],
}

impl ProbeKey {
    fn expand(hkdf: &Hkdf<Sha256>, sender: &NodeId, receiver: &NodeId) -> Self {
        let mut bytes = Zeroizing::new([0; 40]);
        hkdf.expand_multi_info(&[LABEL_PROBE, &sender.0, &receiver.0], bytes.as_mut())
            .expect("40 bytes are within HKDF-SHA256's limit");
        let (mut key, mut tag) = ([0; 32], [0; 8]);
        key.copy_from_slice(&bytes[..32]);
        tag.copy_from_slice(&bytes[32..]);
        Self { key: Key32(key), tag }
    }
}

/// A symmetric key.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Key32([u8; 32]);

impl Key32 {
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// A WireGuard preshared key.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey(pub [u8; 32]);

impl PartialEq for PresharedKey {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}
impl Eq for PresharedKey {}

/// An Ed25519 signing key: a node's identity, or a cluster's membership.
#[derive(Clone)]
pub struct SignKey(SigningKey);

impl SignKey {
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }

    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }

    pub fn public(&self) -> [u8; 32] {
        self.0.verifying_key().to_bytes()
    }

    /// The node that this key is the identity of.
    pub fn node_id(&self) -> NodeId {
        NodeId(self.public())
    }

    /// Signs `label`, a zero byte and `message`.
    pub fn sign(&self, label: &str, message: &[u8]) -> [u8; 64] {
        self.0.sign(&labelled(label, message)).to_bytes()
    }
}

/// Whether `signature` by `public` covers `label` and `message`. Strict: no small-order keys, no malleable encodings.
pub fn verify(public: &[u8; 32], label: &str, message: &[u8], signature: &[u8; 64]) -> bool {
    VerifyingKey::from_bytes(public)
        .and_then(|key| key.verify_strict(&labelled(label, message), &Signature::from_bytes(signature)))
        .is_ok()
}

/// A WireGuard public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WgPublicKey(pub [u8; 32]);

impl WgPublicKey {
    /// Reads WireGuard's own text form: base64 of 32 bytes.
    pub fn parse(text: &str) -> Option<Self> {
        BASE64.decode(text.trim().as_bytes()).ok()?.try_into().ok().map(Self)
    }
}

/// A node's WireGuard key pair, derived from an Ed25519 seed of its own so that its owner can prove it.
#[derive(Clone)]
pub struct WgSecret {
    signing: SigningKey,
}

impl WgSecret {
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self { signing: SigningKey::from_bytes(seed) }
    }

    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.signing.to_bytes())
    }

    pub fn public(&self) -> WgPublicKey {
        WgPublicKey(self.signing.verifying_key().to_montgomery().to_bytes())
    }

    /// The X25519 scalar, for the tunnel.
    pub fn x25519(&self) -> StaticSecret {
        StaticSecret::from(self.signing.to_scalar_bytes())
    }

    /// Shows that `node` owns this key.
    pub fn prove(&self, node: &NodeId) -> WgProof {
        WgProof {
            ed25519: self.signing.verifying_key().to_bytes(),
            signature: self.signing.sign(&labelled(LABEL_WG_PROOF, &node.0)).to_bytes(),
        }
    }
}

/// The Ed25519 form of a WireGuard key and its signature over the owner's node id: nobody can claim another's key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WgProof {
    pub ed25519: [u8; 32],
    pub signature: [u8; 64],
}

impl WgProof {
    pub fn holds(&self, node: &NodeId, key: &WgPublicKey) -> bool {
        let Ok(ed25519) = VerifyingKey::from_bytes(&self.ed25519) else {
            return false;
        };
        ed25519.to_montgomery().to_bytes() == key.0 && verify(&self.ed25519, LABEL_WG_PROOF, &node.0, &self.signature)
    }
}

macro_rules! redacted {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(hidden)"))
            }
        }
    )*};
}

redacted!(ClusterSecret, Key32, PresharedKey, ProbeKey, SignKey, WgSecret);

impl fmt::Display for WgPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(&self.0))
    }
}

impl fmt::Debug for WgPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WgPublicKey({self})")
    }
}

fn labelled(label: &str, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(label.len() + 1 + message.len());
    bytes.extend_from_slice(label.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(message);
    bytes
}

fn expand(hkdf: &Hkdf<Sha256>, label: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    hkdf.expand(label, &mut key).expect("32 bytes are within HKDF-SHA256's limit");
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: u8) -> ClusterSecret {
        let mut bytes = [byte; 32];
        bytes[0] = 1;
        ClusterSecret::from_bytes(bytes)
    }

    #[test]
    fn wireguard_key_is_the_same_by_both_roads() {
        let wg = WgSecret::from_seed(&[7; 32]);
        assert_eq!(x25519_dalek::PublicKey::from(&wg.x25519()).to_bytes(), wg.public().0);
    }

    #[test]
    fn a_proof_binds_key_and_owner() {
        let wg = WgSecret::from_seed(&[7; 32]);
        let (owner, other) = (NodeId([1; 32]), NodeId([2; 32]));
        let proof = wg.prove(&owner);
        assert!(proof.holds(&owner, &wg.public()));
        assert!(!proof.holds(&other, &wg.public()));
        assert!(!proof.holds(&owner, &WgSecret::from_seed(&[8; 32]).public()));
    }

    #[test]
    fn pair_psk_is_symmetric_and_differs_by_pair_and_cluster() {
        let (a, b, c) = [1, 2, 3].map(|n| (NodeId([n; 32]), WgPublicKey([n; 32]))).into();
        let keys = secret(9).derive();
        assert_eq!(keys.pair_psk(a, b), keys.pair_psk(b, a));
        assert_ne!(keys.pair_psk(a, b), keys.pair_psk(a, c));
        assert_ne!(keys.pair_psk(a, b), secret(8).derive().pair_psk(a, b));
    }

    #[test]
    fn probe_keys_are_one_per_direction_and_pair() {
        let [(a, a_wg), (b, b_wg), (c, c_wg)] = [1, 2, 3].map(|n| (NodeId([n; 32]), WgSecret::from_seed(&[n; 32])));
        let keys = secret(9).derive();
        let at_a = keys.probe_keys((a, &a_wg), (b, b_wg.public())).unwrap();
        let at_b = keys.probe_keys((b, &b_wg), (a, a_wg.public())).unwrap();
        let bytes = |key: &ProbeKey| (*key.key.as_bytes(), key.tag);
        assert_eq!(bytes(&at_a.send), bytes(&at_b.receive));
        assert_eq!(bytes(&at_a.receive), bytes(&at_b.send));
        assert_ne!(at_a.send.tag, at_a.receive.tag);
        let other_pair = keys.probe_keys((a, &a_wg), (c, c_wg.public())).unwrap();
        let other_cluster = secret(8).derive().probe_keys((a, &a_wg), (b, b_wg.public())).unwrap();
        for other in [&other_pair.send, &other_cluster.send, &at_a.receive] {
            assert_ne!(at_a.send.key.as_bytes(), other.key.as_bytes());
            assert_ne!(at_a.send.tag, other.tag);
        }
        // Points of small order (RFC 7748, 7): the shared secret is all zeros.
        for small_order in [[0; 32], std::array::from_fn(|at| u8::from(at == 0))] {
            assert!(keys.probe_keys((a, &a_wg), (b, WgPublicKey(small_order))).is_none());
        }
    }

    #[test]
    fn secret_text_names_what_is_wrong() {
        assert_eq!(ClusterSecret::parse("not base64!").unwrap_err(), ParseSecretError::NotBase64);
        assert_eq!(ClusterSecret::parse("AAAA").unwrap_err(), ParseSecretError::WrongLength(3));
        assert_eq!(ClusterSecret::parse(&BASE64.encode(&[5; 32])).unwrap_err(), ParseSecretError::NotRandom);
        let text = secret(3).to_text();
        assert_eq!(ClusterSecret::parse(&format!(" {}\n", *text)).unwrap(), secret(3));
    }

    #[test]
    fn debug_shows_no_secret_byte() {
        let canary = *b"canary-canary-canary-canary-0123";
        let secret = ClusterSecret::from_bytes(canary);
        let shown = format!(
            "{secret:?} {:?} {:?} {:?} {:?}",
            secret.derive(),
            SignKey::from_seed(&canary),
            WgSecret::from_seed(&canary),
            PresharedKey(canary)
        );
        assert!(!shown.contains("canary") && !shown.contains("99, 97, 110"), "{shown}");
        assert!(shown.contains("hidden"));
    }

    #[test]
    fn a_signature_is_bound_to_its_label() {
        let key = SignKey::from_seed(&[1; 32]);
        let signature = key.sign("meshspan/v1 a", b"message");
        assert!(verify(&key.public(), "meshspan/v1 a", b"message", &signature));
        assert!(!verify(&key.public(), "meshspan/v1 b", b"message", &signature));
        assert!(!verify(&key.public(), "meshspan/v1 a", b"massage", &signature));
    }
}
