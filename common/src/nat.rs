//! The words of RFC 4787 for what a NAT does to UDP.

use serde::{Deserialize, Serialize};

/// How external ports are chosen (RFC 4787, 4.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Mapping {
    #[default]
    Unknown,
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

/// Which inbound datagrams a mapping lets in (RFC 4787, 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Filtering {
    #[default]
    Unknown,
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

/// What a node knows of the NAT in front of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct NatClass {
    pub mapping: Mapping,
    pub filtering: Filtering,
}
