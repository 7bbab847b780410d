//! What a node tells its peers, inside the seal.
//!
//! [`Record`] is validated: decoding refuses a host name that is no DNS label, lists over their limits, prefixes with host
//! bits, an extension that must be understood and is not. Which prefixes are honoured is policy and not decided here.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::host_name::HostName;
use mesh_common::key::{WgProof, WgPublicKey};
use mesh_common::nat::NatClass;

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
