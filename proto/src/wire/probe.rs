//! Path probes: what two agents say to each other on the WireGuard port and over relays, sealed for one direction of a pair.
//!
//! ```text
//! 8d | "MP" | 01 | tag 8 | nonce 24 | ciphertext            associated data: the first 12 bytes
//! plaintext: type u8 | instance 16 | counter u64 | body | zeros
//! ```
//! The tag says whose key to take, so nothing is ever tried; what it says is believed only when the key opens the rest.
//! [`open`] proves the author. Freshness is the caller's: the instance must be that of the peer's record, and the counter new
//! to its [`ReplayWindow`](crate::path::replay::ReplayWindow). No probe is shorter than [`MIN_PROBE`], so that no answer is
//! longer than what it answers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::Bytes;
use chacha20poly1305::aead::AeadInPlace;
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305};
use mesh_common::key::{Key32, ProbeKey};
use mesh_common::limits::MAX_CANDIDATES;
use mesh_common::nat::NatClass;

use crate::wire::address::canonical;
use crate::wire::demux::PROBE;
use crate::wire::record::{Candidate, candidate_byte, candidate_kind, nat_bytes, nat_class};

/// Every probe has room for the longest pong.
pub const MIN_PROBE: usize = HEADER_LEN + PROLOGUE_LEN + PONG_LEN + TAG_LEN;
/// The longest probe: one that asks whether the largest datagram of a jumbo frame passes.
pub const MAX_PROBE: usize = 9000;

const HEADER_LEN: usize = 36;
const ASSOCIATED_LEN: usize = 12;
const PROLOGUE_LEN: usize = 1 + 16 + 8;
const PONG_LEN: usize = 4 + 4 + 19;
const TAG_LEN: usize = 16;
const MAGIC: [u8; 4] = [PROBE, b'M', b'P', 1];

const PING: u8 = 1;
const PONG: u8 = 2;
const CALL: u8 = 3;
const ANSWER_WANTED: u8 = 1;
const GUESS_PORTS: u8 = 2;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    Ping {
        id: u32,
        heard: u32,
    },
    Pong {
        /// The ping's.
        id: u32,
        heard: u32,
        /// Where the ping came from; `None` over a relay.
        observed: Option<SocketAddr>,
    },
    Call(Call),
}

/// "Probe me at these addresses, now": both sides must send before either NAT lets anything in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Call {
    pub answer_wanted: bool,
    /// "Let us find each other's ports by chance, now": see [`hard`](crate::path::hard).
    pub guess_ports: bool,
    pub nat_v4: NatClass,
    pub nat_v6: NatClass,
    /// Best first; what is over [`MAX_CANDIDATES`] is not sent.
    pub candidates: Vec<Candidate>,
}

/// A probe that the peer sealed: genuine, not yet known to be fresh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    pub instance: [u8; 16],
    pub counter: u64,
    pub probe: Probe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum OpenProbeError {
    #[error("it has not the shape of a probe")]
    Shape,
    #[error("it was sealed with another key or altered")]
    Sealed,
    #[error("its content is malformed")]
    Malformed,
}

/// Whose key a datagram asks for; `None` when it has not the shape of a probe.
pub fn tag(datagram: &[u8]) -> Option<[u8; 8]> {
    let is_probe = (MIN_PROBE..=MAX_PROBE).contains(&datagram.len()) && datagram.starts_with(&MAGIC);
    is_probe.then(|| datagram[MAGIC.len()..ASSOCIATED_LEN].try_into().expect("12 less 4 bytes are 8"))
}

/// Seals a probe. `nonce` is 24 fresh random bytes; the datagram has exactly `pad_to` bytes where that is enough for its
/// content and no more than [`MAX_PROBE`].
pub fn seal(
    key: &ProbeKey,
    instance: &[u8; 16],
    counter: u64,
    nonce: [u8; 24],
    probe: &Probe,
    pad_to: Option<u16>,
) -> Bytes {
    let mut plaintext = Vec::with_capacity(MIN_PROBE);
    let kind = match probe {
        Probe::Ping { .. } => PING,
        Probe::Pong { .. } => PONG,
        Probe::Call(_) => CALL,
    };
    plaintext.push(kind);
    plaintext.extend_from_slice(instance);
    plaintext.extend_from_slice(&counter.to_le_bytes());
    write_body(probe, &mut plaintext);
    let wanted = pad_to.map_or(MIN_PROBE, usize::from).clamp(MIN_PROBE, MAX_PROBE) - HEADER_LEN - TAG_LEN;
    if plaintext.len() < wanted {
        plaintext.resize(wanted, 0);
    }

    let mut datagram = Vec::with_capacity(HEADER_LEN + plaintext.len() + TAG_LEN);
    datagram.extend_from_slice(&MAGIC);
    datagram.extend_from_slice(&key.tag);
    let tag = cipher(&key.key)
        .encrypt_in_place_detached(&nonce.into(), &datagram, &mut plaintext)
        .expect("a few kilobytes are within the cipher's limit");
    datagram.extend_from_slice(&nonce);
    datagram.extend_from_slice(&plaintext);
    datagram.extend_from_slice(&tag);
    datagram.into()
}

/// Opens a datagram with the key that its [`tag`] named.
pub fn open(key: &ProbeKey, datagram: &[u8]) -> Result<Opened, OpenProbeError> {
    if tag(datagram) != Some(key.tag) {
        return Err(OpenProbeError::Shape);
    }
    let (header, sealed) = datagram.split_at(HEADER_LEN);
    let (associated, nonce) = header.split_at(ASSOCIATED_LEN);
    let (ciphertext, tag) = sealed.split_at(sealed.len() - TAG_LEN);
    let mut plaintext = ciphertext.to_vec();
    cipher(&key.key)
        .decrypt_in_place_detached(nonce.into(), associated, &mut plaintext, Tag::from_slice(tag))
        .map_err(|_| OpenProbeError::Sealed)?;
    parse(&plaintext).ok_or(OpenProbeError::Malformed)
}

fn cipher(key: &Key32) -> XChaCha20Poly1305 {
    XChaCha20Poly1305::new(key.as_bytes().into())
}

fn write_body(probe: &Probe, out: &mut Vec<u8>) {
    match probe {
        Probe::Ping { id, heard } => {
            out.extend_from_slice(&id.to_le_bytes());
            out.extend_from_slice(&heard.to_le_bytes());
        }
        Probe::Pong { id, heard, observed } => {
            out.extend_from_slice(&id.to_le_bytes());
            out.extend_from_slice(&heard.to_le_bytes());
            write_address(observed.unwrap_or(UNSPECIFIED), out);
        }
        Probe::Call(call) => {
            let flag = |is_set: bool, bit| if is_set { bit } else { 0 };
            out.push(flag(call.answer_wanted, ANSWER_WANTED) | flag(call.guess_ports, GUESS_PORTS));
            out.extend_from_slice(&nat_bytes(call.nat_v4));
            out.extend_from_slice(&nat_bytes(call.nat_v6));
            let candidates = &call.candidates[..call.candidates.len().min(MAX_CANDIDATES)];
            out.push(u8::try_from(candidates.len()).expect("sixteen fit a byte"));
            for candidate in candidates {
                out.push(candidate_byte(candidate.kind));
                write_address(candidate.addr, out);
            }
        }
    }
}

/// What stands for "no address".
const UNSPECIFIED: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

fn write_address(addr: SocketAddr, out: &mut Vec<u8>) {
    let addr = canonical(addr);
    match addr.ip() {
        IpAddr::V4(v4) => {
            out.push(4);
            out.extend_from_slice(&v4.octets());
        }
        IpAddr::V6(v6) => {
            out.push(6);
            out.extend_from_slice(&v6.octets());
        }
    }
    out.extend_from_slice(&addr.port().to_le_bytes());
}

/// Prologue, body, and nothing but zeros after it.
pub(crate) fn parse(plaintext: &[u8]) -> Option<Opened> {
    let mut reader = Reader(plaintext);
    let kind = reader.u8()?;
    let instance = reader.array()?;
    let counter = u64::from_le_bytes(reader.array()?);
    let probe = match kind {
        PING => Probe::Ping { id: reader.u32()?, heard: reader.u32()? },
        PONG => {
            let (id, heard, observed) = (reader.u32()?, reader.u32()?, reader.address()?);
            Probe::Pong { id, heard, observed: (observed != UNSPECIFIED).then_some(observed) }
        }
        CALL => Probe::Call(reader.call()?),
        _ => return None,
    };
    reader.0.iter().all(|byte| *byte == 0).then_some(Opened { instance, counter, probe })
}

/// What is left to read.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// IPv4 written as IPv6 is refused: one address has one form.
    fn address(&mut self) -> Option<SocketAddr> {
        let ip = match self.u8()? {
            4 => IpAddr::from(Ipv4Addr::from(self.array::<4>()?)),
            6 => IpAddr::from(Ipv6Addr::from(self.array::<16>()?)),
            _ => return None,
        };
        let addr = SocketAddr::new(ip, u16::from_le_bytes(self.array()?));
        (canonical(addr) == addr).then_some(addr)
    }

    fn call(&mut self) -> Option<Call> {
        let flags = self.u8().filter(|flags| flags & !(ANSWER_WANTED | GUESS_PORTS) == 0)?;
        let (answer_wanted, guess_ports) = (flags & ANSWER_WANTED != 0, flags & GUESS_PORTS != 0);
        let (nat_v4, nat_v6) = (nat_class(self.array()?)?, nat_class(self.array()?)?);
        let count = Some(usize::from(self.u8()?)).filter(|count| *count <= MAX_CANDIDATES)?;
        let mut candidates = Vec::with_capacity(count);
        for _ in 0..count {
            candidates.push(Candidate { kind: candidate_kind(self.u8()?)?, addr: self.address()? });
        }
        Some(Call { answer_wanted, guess_ports, nat_v4, nat_v6, candidates })
    }
}

#[cfg(test)]
mod tests;
