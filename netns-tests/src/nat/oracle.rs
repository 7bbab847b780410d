//! Which pairs of sites must get a direct path. Written from DESIGN.md 5, for this lab alone.

use super::{Filtering, Kind, Mapping};

/// How a pair must end up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    Direct,
    /// Traffic must flow; a direct path is a bonus.
    Relay,
}

/// Where the two sides stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pair {
    /// Behind different outermost routers.
    Apart(Kind, Kind),
    /// Behind one home router, on one network.
    SameNat(Kind),
}

impl Pair {
    pub fn expect(self) -> Expect {
        match self {
            // They reach each other's own address; no router is asked.
            Self::SameNat(_) => Expect::Direct,
            Self::Apart(a, b) if !a.passes_udp() || !b.passes_udp() => Expect::Relay,
            Self::Apart(a, b) if is_hard(a, b) || is_hard(b, a) => Expect::Relay,
            Self::Apart(..) => Expect::Direct,
        }
    }
}

/// One side sends from an address that the other cannot know, and the other hears known ones only.
fn is_hard(a: Kind, b: Kind) -> bool {
    a.mapping() != Mapping::EndpointIndependent && b.filtering() == Filtering::AddressAndPortDependent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oracle_agrees_with_every_pair_that_was_punched_by_hand() {
        use Kind::{CgnatEdmApdf, CgnatEimApdf, CgnatEimEif, EdmApdf, EimAdf, EimApdf, EimEif, Open, UdpBlocked};
        for (a, b, expect) in [
            (Open, Open, Expect::Direct),
            (Open, EdmApdf, Expect::Direct),
            (EimEif, EdmApdf, Expect::Direct),
            (EimAdf, EdmApdf, Expect::Direct),
            (EimAdf, CgnatEdmApdf, Expect::Direct),
            (EimApdf, EimApdf, Expect::Direct),
            (CgnatEimEif, CgnatEimApdf, Expect::Direct),
            (EimApdf, EdmApdf, Expect::Relay),
            // The home router of the carrier's customer filters by port, whatever the carrier does.
            (CgnatEimEif, EdmApdf, Expect::Relay),
            (EdmApdf, EdmApdf, Expect::Relay),
            (CgnatEdmApdf, CgnatEimApdf, Expect::Relay),
            (Open, UdpBlocked, Expect::Relay),
            (UdpBlocked, UdpBlocked, Expect::Relay),
        ] {
            assert_eq!(Pair::Apart(a, b).expect(), expect, "{a} with {b}");
            assert_eq!(Pair::Apart(b, a).expect(), expect, "{b} with {a}");
        }
        assert_eq!(Pair::SameNat(EdmApdf).expect(), Expect::Direct);
    }
}
