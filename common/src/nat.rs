//! The words of RFC 4787 for what a NAT does to UDP.
//!
//! What was not seen is not claimed: an unknown class is read as the strictest one it may be, for explanations and for what
//! is tried. A firewall without a NAT has a filtering and keeps every mapping.

use serde::{Deserialize, Serialize};

/// How external ports are chosen (RFC 4787, 4.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Mapping {
    #[default]
    Unknown,
    EndpointIndependent,
    /// Another address gets another external port; whether another port does as well may not be known.
    AddressDependent,
    AddressAndPortDependent,
    /// Another port gets the same external port; nobody could tell whether another address does, because all that was
    /// asked has one address. Nearly always endpoint-independent.
    PortIndependent,
}

impl Mapping {
    /// Whether a peer may see another external port than a server does: unless the contrary was seen.
    pub fn is_endpoint_dependent(self) -> bool {
        self != Self::EndpointIndependent
    }

    /// Whether [`Self::is_endpoint_dependent`] was seen and is not just assumed.
    pub fn is_proven(self) -> bool {
        !matches!(self, Self::Unknown | Self::PortIndependent)
    }
}

/// Which inbound datagrams a mapping lets in (RFC 4787, 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Filtering {
    #[default]
    Unknown,
    EndpointIndependent,
    /// At worst: another port of an address that was spoken to gets in; whether a stranger does may not be known.
    AddressDependent,
    AddressAndPortDependent,
}

impl Filtering {
    /// Whether only the very address and port that was spoken to gets in: unless the contrary was seen.
    pub fn is_strict(self) -> bool {
        matches!(self, Self::Unknown | Self::AddressAndPortDependent)
    }
}

/// What a node knows of the NAT in front of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct NatClass {
    pub mapping: Mapping,
    pub filtering: Filtering,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_seen_is_read_as_the_stricter() {
        use Mapping::{AddressAndPortDependent, AddressDependent, EndpointIndependent, PortIndependent, Unknown};
        for (mapping, is_dependent, is_proven) in [
            (Unknown, true, false),
            (PortIndependent, true, false),
            (EndpointIndependent, false, true),
            (AddressDependent, true, true),
            (AddressAndPortDependent, true, true),
        ] {
            assert_eq!(
                (mapping.is_endpoint_dependent(), mapping.is_proven()),
                (is_dependent, is_proven),
                "{mapping:?}"
            );
        }
        for (filtering, is_strict) in [
            (Filtering::Unknown, true),
            (Filtering::AddressAndPortDependent, true),
            (Filtering::AddressDependent, false),
            (Filtering::EndpointIndependent, false),
        ] {
            assert_eq!(filtering.is_strict(), is_strict, "{filtering:?}");
        }
    }
}
