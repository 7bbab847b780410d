//! The bytes of the state files. Decoders refuse anything that a cut or a flipped digit could have made.

use bytes::{Buf, BufMut, Bytes};
use data_encoding::BASE64;
use mesh_common::key::{SignKey, WgSecret};
use mesh_common::limits::MAX_MEMBERS;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

/// `MSC1`, number of frames as u32, each frame with its length as u32 before it; little-endian, nothing behind.
const FRAMES_MAGIC: &[u8; 4] = b"MSC1";

/// `identity.json`. The node id and the WireGuard key are there to notice a changed seed.
#[derive(Serialize, Deserialize)]
pub(super) struct IdentityFile {
    version: u32,
    identity_seed: String,
    wireguard_seed: String,
    node_id: String,
    wireguard_public_key: String,
}

impl IdentityFile {
    pub(super) fn of(identity: &SignKey, wg: &WgSecret) -> Self {
        Self {
            version: 1,
            identity_seed: BASE64.encode(&*identity.seed()),
            wireguard_seed: BASE64.encode(&*wg.seed()),
            node_id: identity.node_id().to_string(),
            wireguard_public_key: wg.public().to_string(),
        }
    }

    pub(super) fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut bytes = Zeroizing::new(serde_json::to_vec_pretty(self).expect("text fields always serialize"));
        bytes.push(b'\n');
        bytes
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<(SignKey, WgSecret), &'static str> {
        if bytes.is_empty() {
            return Err("it is empty");
        }
        let file: Self = serde_json::from_slice(bytes).map_err(|_| "it is cut short or not JSON")?;
        if file.version != 1 {
            return Err("it was written by a newer version");
        }
        let identity = SignKey::from_seed(&*seed(&file.identity_seed)?);
        let wg = WgSecret::from_seed(&*seed(&file.wireguard_seed)?);
        if identity.node_id().to_string() != file.node_id || wg.public().to_string() != file.wireguard_public_key {
            return Err("its keys do not fit each other");
        }
        Ok((identity, wg))
    }
}

impl Drop for IdentityFile {
    fn drop(&mut self) {
        self.identity_seed.zeroize();
        self.wireguard_seed.zeroize();
    }
}

fn seed(text: &str) -> Result<Zeroizing<[u8; 32]>, &'static str> {
    let bytes = Zeroizing::new(BASE64.decode(text.as_bytes()).map_err(|_| "a key in it is not base64")?);
    bytes.as_slice().try_into().map(Zeroizing::new).map_err(|_| "a key in it has not 32 bytes")
}

pub(super) fn encode_frames(frames: &[Bytes]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8 + frames.iter().map(|frame| 4 + frame.len()).sum::<usize>());
    bytes.put_slice(FRAMES_MAGIC);
    bytes.put_u32_le(u32::try_from(frames.len()).expect("members are bounded"));
    for frame in frames {
        bytes.put_u32_le(u32::try_from(frame.len()).expect("frames are bounded"));
        bytes.put_slice(frame);
    }
    bytes
}

pub(super) fn decode_frames(bytes: &[u8]) -> Option<Vec<Bytes>> {
    let mut rest = bytes.strip_prefix(FRAMES_MAGIC)?;
    let count = usize::try_from(rest.try_get_u32_le().ok()?).ok()?;
    // A tombstone may be kept beside each member.
    if count > 2 * MAX_MEMBERS {
        return None;
    }
    let mut frames = Vec::new();
    for _ in 0..count {
        let len = usize::try_from(rest.try_get_u32_le().ok()?).ok()?;
        let (frame, after) = rest.split_at_checked(len)?;
        frames.push(Bytes::copy_from_slice(frame));
        rest = after;
    }
    rest.is_empty().then_some(frames)
}
