//! What a node tells its peers, inside the seal.
//!
//! [`Record`] is validated: decoding refuses a host name that is no DNS label, lists over their limits, prefixes with host
//! bits, an extension that must be understood and is not. Which prefixes are honoured is policy and not decided here.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::host_name::HostName;
use mesh_common::key::{WgProof, WgPublicKey};
use mesh_common::limits::{MAX_CANDIDATES, MAX_PREFIXES, RECORD_SIZES};
use mesh_common::nat::{Filtering, Mapping, NatClass};
use serde::{Deserialize, Serialize};

use crate::wire::address::{WireAddr, WirePrefix};
use crate::wire::codec::{self, Bytes64, List};

/// The longest body: the largest plaintext without its u16 length.
pub const MAX_BODY: usize = RECORD_SIZES[RECORD_SIZES.len() - 1] - 2;
/// Extensions in one record: far more than any version will define.
pub const MAX_EXTENSIONS: usize = 64;
/// An extension with this bit in its tag must be understood, or the record is ignored.
pub const EXTENSION_MUST_UNDERSTAND: u16 = 1 << 15;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub wg_key: WgPublicKey,
    pub wg_proof: WgProof,
    pub host_name: HostName,
    pub overlay_v6: Ipv6Addr,
    /// Absent until the node has seen its peers' and chosen a free one.
    pub overlay_v4: Option<OverlayV4>,
    pub prefixes: Vec<PrefixClaim>,
    pub excluded_prefixes: Vec<IpNet>,
    pub candidates: Vec<Candidate>,
    pub nat_v4: NatClass,
    pub nat_v6: NatClass,
    /// Random per start of the agent.
    pub instance: [u8; 16],
    /// Unix milliseconds by the node's clock; shown, never decided upon.
    pub started_at_ms: u64,
    /// Whole seconds on the wire.
    pub valid_for: Duration,
    pub wire_min: u8,
    pub wire_max: u8,
    pub features: u64,
    /// Opaque; empty in v1.
    pub admission: Vec<u8>,
    /// Extensions in order of appearance; a tag with bit 15 must be understood, or the record is ignored. None is known in v1.
    pub ext: Vec<(u16, Vec<u8>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverlayV4 {
    pub addr: Ipv4Addr,
    pub claimed_at_ms: u64,
}

/// A prefix behind the node, and since when it announces it: the smallest (since, node id) owns a prefix everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixClaim {
    pub prefix: IpNet,
    /// Unix milliseconds by the node's clock.
    pub since_ms: u64,
}

/// An address at which the node may be reached from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Candidate {
    pub kind: CandidateKind,
    pub addr: SocketAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CandidateKind {
    /// An address of one of the node's interfaces.
    Host,
    /// Written by the node's operator.
    Static,
    /// Seen by a STUN or discovery server.
    Reflexive,
    /// Opened on the router by a port mapping protocol.
    Mapped,
}

/// Why a record cannot be written. The node itself is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeRecordError {
    #[error("the record needs {0} bytes, the largest frame holds 4094: announce fewer prefixes or candidates")]
    TooLarge(usize),
    #[error("the record has {count} {what}, peers accept at most {limit}: announce fewer")]
    TooMany { what: &'static str, count: usize, limit: usize },
}

/// Why bytes are not a record. Their author is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeRecordError {
    #[error("it is malformed")]
    Malformed,
    #[error("it has extension {0:#06x}, which must be understood and is not known")]
    UnknownExtension(u16),
}

impl Record {
    /// The body of a frame. Candidates and prefixes are written in their one form (no IPv4 inside IPv6, no host bits, no
    /// scopes); `valid_for` loses its fraction of a second and saturates at 136 years.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeRecordError> {
        check_count("prefixes", self.prefixes.len(), MAX_PREFIXES)?;
        check_count("excluded prefixes", self.excluded_prefixes.len(), MAX_PREFIXES)?;
        check_count("candidates", self.candidates.len(), MAX_CANDIDATES)?;
        check_count("extensions", self.ext.len(), MAX_EXTENSIONS)?;
        check_count("bytes of admission", self.admission.len(), MAX_BODY)?;
        let bytes = WireRecord::from(self).to_bytes();
        if bytes.len() > MAX_BODY {
            return Err(EncodeRecordError::TooLarge(bytes.len()));
        }
        Ok(bytes)
    }

    /// Reads the body of a frame; trailing bytes are refused.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeRecordError> {
        let wire: WireRecord = codec::deserialize(bytes, MAX_BODY).map_err(|_| DecodeRecordError::Malformed)?;
        if let Some((tag, _)) = wire.ext.0.iter().find(|(tag, _)| tag & EXTENSION_MUST_UNDERSTAND != 0) {
            return Err(DecodeRecordError::UnknownExtension(*tag));
        }
        wire.into_record().ok_or(DecodeRecordError::Malformed)
    }
}

fn check_count(what: &'static str, count: usize, limit: usize) -> Result<(), EncodeRecordError> {
    if count > limit { Err(EncodeRecordError::TooMany { what, count, limit }) } else { Ok(()) }
}

/// The bytes of a record, field by field, in this order.
#[derive(Serialize, Deserialize)]
struct WireRecord {
    wg_key: [u8; 32],
    wg_ed25519: [u8; 32],
    wg_signature: Bytes64,
    host_name: HostName,
    overlay_v6: [u8; 16],
    overlay_v4: Option<([u8; 4], u64)>,
    /// Each with its since_ms.
    prefixes: List<(WirePrefix, u64), MAX_PREFIXES>,
    excluded_prefixes: List<WirePrefix, MAX_PREFIXES>,
    candidates: List<(u8, WireAddr), MAX_CANDIDATES>,
    nat_v4: [u8; 2],
    nat_v6: [u8; 2],
    instance: [u8; 16],
    started_at_ms: u64,
    valid_for_s: u32,
    wire_min: u8,
    wire_max: u8,
    features: u64,
    admission: List<u8, MAX_BODY>,
    ext: List<(u16, List<u8, MAX_BODY>), MAX_EXTENSIONS>,
}

impl From<&Record> for WireRecord {
    fn from(record: &Record) -> Self {
        let claim = |claim: &PrefixClaim| (WirePrefix(claim.prefix), claim.since_ms);
        let candidate = |candidate: &Candidate| (candidate_byte(candidate.kind), WireAddr(candidate.addr));
        Self {
            wg_key: record.wg_key.0,
            wg_ed25519: record.wg_proof.ed25519,
            wg_signature: record.wg_proof.signature.into(),
            host_name: record.host_name.clone(),
            overlay_v6: record.overlay_v6.octets(),
            overlay_v4: record.overlay_v4.map(|v4| (v4.addr.octets(), v4.claimed_at_ms)),
            prefixes: List(record.prefixes.iter().map(claim).collect()),
            excluded_prefixes: List(record.excluded_prefixes.iter().copied().map(WirePrefix).collect()),
            candidates: List(record.candidates.iter().map(candidate).collect()),
            nat_v4: nat_bytes(record.nat_v4),
            nat_v6: nat_bytes(record.nat_v6),
            instance: record.instance,
            started_at_ms: record.started_at_ms,
            valid_for_s: u32::try_from(record.valid_for.as_secs()).unwrap_or(u32::MAX),
            wire_min: record.wire_min,
            wire_max: record.wire_max,
            features: record.features,
            admission: List(record.admission.clone()),
            ext: List(record.ext.iter().map(|(tag, value)| (*tag, List(value.clone()))).collect()),
        }
    }
}

impl WireRecord {
    fn to_bytes(&self) -> Vec<u8> {
        codec::serialize(self, usize::MAX).expect("only a limit can fail, and there is none")
    }

    /// `None` for a value that no kind or class has.
    fn into_record(self) -> Option<Record> {
        let claim = |(prefix, since_ms): (WirePrefix, u64)| PrefixClaim { prefix: prefix.0, since_ms };
        let candidate = |(kind, addr): (u8, WireAddr)| Some(Candidate { kind: candidate_kind(kind)?, addr: addr.0 });
        Some(Record {
            wg_key: WgPublicKey(self.wg_key),
            wg_proof: WgProof { ed25519: self.wg_ed25519, signature: self.wg_signature.into() },
            host_name: self.host_name,
            overlay_v6: self.overlay_v6.into(),
            overlay_v4: self.overlay_v4.map(|(addr, claimed_at_ms)| OverlayV4 { addr: addr.into(), claimed_at_ms }),
            prefixes: self.prefixes.0.into_iter().map(claim).collect(),
            excluded_prefixes: self.excluded_prefixes.0.into_iter().map(|prefix| prefix.0).collect(),
            candidates: self.candidates.0.into_iter().map(candidate).collect::<Option<_>>()?,
            nat_v4: nat_class(self.nat_v4)?,
            nat_v6: nat_class(self.nat_v6)?,
            instance: self.instance,
            started_at_ms: self.started_at_ms,
            valid_for: Duration::from_secs(self.valid_for_s.into()),
            wire_min: self.wire_min,
            wire_max: self.wire_max,
            features: self.features,
            admission: self.admission.0,
            ext: self.ext.0.into_iter().map(|(tag, value)| (tag, value.0)).collect(),
        })
    }
}

pub(super) fn candidate_byte(kind: CandidateKind) -> u8 {
    match kind {
        CandidateKind::Host => 0,
        CandidateKind::Static => 1,
        CandidateKind::Reflexive => 2,
        CandidateKind::Mapped => 3,
    }
}

pub(super) fn candidate_kind(byte: u8) -> Option<CandidateKind> {
    Some(match byte {
        0 => CandidateKind::Host,
        1 => CandidateKind::Static,
        2 => CandidateKind::Reflexive,
        3 => CandidateKind::Mapped,
        _ => return None,
    })
}

/// Mapping, then filtering.
pub(super) fn nat_bytes(class: NatClass) -> [u8; 2] {
    let mapping = match class.mapping {
        Mapping::Unknown => 0,
        Mapping::EndpointIndependent => 1,
        Mapping::AddressDependent => 2,
        Mapping::AddressAndPortDependent => 3,
        Mapping::PortIndependent => 4,
    };
    let filtering = match class.filtering {
        Filtering::Unknown => 0,
        Filtering::EndpointIndependent => 1,
        Filtering::AddressDependent => 2,
        Filtering::AddressAndPortDependent => 3,
    };
    [mapping, filtering]
}

pub(super) fn nat_class([mapping, filtering]: [u8; 2]) -> Option<NatClass> {
    let mapping = match mapping {
        0 => Mapping::Unknown,
        1 => Mapping::EndpointIndependent,
        2 => Mapping::AddressDependent,
        3 => Mapping::AddressAndPortDependent,
        4 => Mapping::PortIndependent,
        _ => return None,
    };
    let filtering = match filtering {
        0 => Filtering::Unknown,
        1 => Filtering::EndpointIndependent,
        2 => Filtering::AddressDependent,
        3 => Filtering::AddressAndPortDependent,
        _ => return None,
    };
    Some(NatClass { mapping, filtering })
}

#[cfg(test)]
pub(crate) mod tests;
