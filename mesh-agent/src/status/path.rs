//! The path to a peer: what carries, what was tried, and why it is not a direct one.

use std::fmt;
use std::net::SocketAddr;

use mesh_common::nat::{Filtering, Mapping, NatClass};
use mesh_proto::path::explain;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// `None` while nothing carries.
    pub tier: Option<Tier>,
    /// The relay's server, `https://host:port`, while one carries.
    pub relay: Option<String>,
    /// Where packets go as well, while it is not sure that the path carries.
    pub second: Option<String>,
    /// Microseconds.
    pub rtt_us: Option<u64>,
    /// The largest packet that the path takes; `None` = as large as the interface's.
    pub mtu: Option<u16>,
    /// Why no direct path carries, and what would help.
    pub why_not_direct: Option<String>,
    /// Until the addresses below are probed again.
    pub next_retry_in_ms: Option<u64>,
    pub last_switch: Option<SwitchStatus>,
    /// How often another path took over.
    pub switches: u64,
    pub probes_sent: u64,
    pub probes_received: u64,
    /// From the first packet that wanted to go there to a tunnel that carries, the last time.
    pub time_to_first_byte_ms: Option<u64>,
    /// The same to a direct path.
    pub time_to_direct_ms: Option<u64>,
    /// Every address that is tried or was, best first.
    pub tried: Vec<TriedAddress>,
}

/// How near a path is, the nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// In a subnet this node is connected to.
    Lan,
    /// To an address of the peer, or of the NAT before it.
    Direct,
    /// Through a discovery server, which sees ciphertext.
    Relay,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchStatus {
    pub ms_ago: u64,
    pub from: Option<String>,
    pub to: Option<String>,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TriedAddress {
    pub address: SocketAddr,
    pub kind: AddressKind,
    pub rtt_us: Option<u64>,
    /// What came of it last, in words.
    pub last: String,
    /// Failures since it answered last.
    pub failures: u32,
}

/// How an address of a peer came to be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AddressKind {
    /// On a link of the peer.
    Host,
    /// From the peer's configuration.
    Static,
    /// A port on the peer's router, by PCP, NAT-PMP or UPnP.
    Mapped,
    /// Where servers see the peer.
    Reflexive,
    /// Where the peer's probes came from.
    PeerReflexive,
}

/// What a node does to UDP on its way, each IP version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatStatus {
    pub v4: Nat,
    pub v6: Nat,
}

/// In the words of RFC 4787.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nat {
    pub mapping: MappingWord,
    pub filtering: FilteringWord,
}

/// How external ports are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MappingWord {
    #[default]
    Unknown,
    /// At least as good: no second server address was there to tell whether it is endpoint-independent.
    PortIndependent,
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

/// What is let in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FilteringWord {
    #[default]
    Unknown,
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

impl Nat {
    pub fn is_known(&self) -> bool {
        *self != Self::default()
    }

    fn class(self) -> NatClass {
        NatClass {
            mapping: match self.mapping {
                MappingWord::Unknown => Mapping::Unknown,
                MappingWord::PortIndependent => Mapping::PortIndependent,
                MappingWord::EndpointIndependent => Mapping::EndpointIndependent,
                MappingWord::AddressDependent => Mapping::AddressDependent,
                MappingWord::AddressAndPortDependent => Mapping::AddressAndPortDependent,
            },
            filtering: match self.filtering {
                FilteringWord::Unknown => Filtering::Unknown,
                FilteringWord::EndpointIndependent => Filtering::EndpointIndependent,
                FilteringWord::AddressDependent => Filtering::AddressDependent,
                FilteringWord::AddressAndPortDependent => Filtering::AddressAndPortDependent,
            },
        }
    }
}

impl From<NatClass> for Nat {
    fn from(class: NatClass) -> Self {
        Self {
            mapping: match class.mapping {
                Mapping::Unknown => MappingWord::Unknown,
                Mapping::PortIndependent => MappingWord::PortIndependent,
                Mapping::EndpointIndependent => MappingWord::EndpointIndependent,
                Mapping::AddressDependent => MappingWord::AddressDependent,
                Mapping::AddressAndPortDependent => MappingWord::AddressAndPortDependent,
            },
            filtering: match class.filtering {
                Filtering::Unknown => FilteringWord::Unknown,
                Filtering::EndpointIndependent => FilteringWord::EndpointIndependent,
                Filtering::AddressDependent => FilteringWord::AddressDependent,
                Filtering::AddressAndPortDependent => FilteringWord::AddressAndPortDependent,
            },
        }
    }
}

/// What it does, then the class of it.
impl fmt::Display for Nat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_known() {
            return f.write_str("unknown");
        }
        let mapping = match self.mapping {
            MappingWord::Unknown => "unknown",
            MappingWord::PortIndependent => "at least port-independent",
            MappingWord::EndpointIndependent => "endpoint-independent",
            MappingWord::AddressDependent => "address-dependent",
            MappingWord::AddressAndPortDependent => "address- and port-dependent",
        };
        let filtering = match self.filtering {
            FilteringWord::Unknown => "unknown",
            FilteringWord::EndpointIndependent => "endpoint-independent",
            FilteringWord::AddressDependent => "address-dependent",
            FilteringWord::AddressAndPortDependent => "address- and port-dependent",
        };
        write!(f, "{} (mapping {mapping}, filtering {filtering})", explain::habits(self.class()))
    }
}
