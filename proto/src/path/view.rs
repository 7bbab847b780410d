//! What a path agent knows, for people: a read model that is never read back.

use std::time::Duration;

use mesh_common::time::Instant;

use crate::device::Endpoint;
use crate::path::candidate::RemoteKind;
use crate::path::score::Tier;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathView {
    /// How good the path is that carries; `None` while none does.
    pub tier: Option<Tier>,
    pub endpoint: Option<Endpoint>,
    /// Where data is sent as well, while it is not sure that `endpoint` carries.
    pub second: Option<Endpoint>,
    pub rtt: Option<Duration>,
    /// `None`: that of the link.
    pub mtu: Option<u16>,
    pub last_switch: Option<Switch>,
    /// How often the path that carries changed.
    pub switches: u64,
    pub probes_sent: u64,
    pub probes_received: u64,
    /// From the wish for a path to the first direct one, the last time.
    pub time_to_direct: Option<Duration>,
    /// Every address that is tried or was, best first.
    pub candidates: Vec<CandidateView>,
    /// When the candidates are probed again.
    pub next_retry: Option<Instant>,
    /// Why there is no direct path, and what would help; `None` while there is one, or nobody wants one.
    pub why_not_direct: Option<String>,
}

/// A change of the path that carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    pub at: Instant,
    pub from: Option<Endpoint>,
    pub to: Option<Endpoint>,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CandidateView {
    pub endpoint: Endpoint,
    pub kind: RemoteKind,
    pub rtt: Option<Duration>,
    /// What came of it last, in words.
    pub last: String,
    /// Rounds of probes, or trusts, that ended without an answer since the last one.
    pub failures: u32,
}
