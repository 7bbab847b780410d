//! Which pairs must find a direct path, told from how their networks are built. Shared with nobody: neither with what finds
//! paths nor with the model that carries datagrams.
//!
//! By family, with each side's routers composed to their strictest mapping and filtering (a forwarded port counts as
//! endpoint-independent in both): a direct path must exist if UDP passes both ways and
//! (a) they share a network, or both have IPv6; or
//! (b) their outermost routers differ, and not one side maps by endpoint while the other filters by address and port; or
//! (c) they share the outermost router, it hairpins, and (b) holds otherwise.
//! For all others the relay must carry, and a direct path is a bonus.
//!
//! Two things beyond the strictest of each. A router that gives a flow another port after a knock at it counts as mapping by
//! endpoint: who knocks first is luck. And where an inner router maps by endpoint, one that filters further out sees
//! another internal endpoint for every remote one. No two of them share what they opened, so together they filter by
//! address and port whatever the outer one does alone.

use crate::nat::{Dependence, NatKind};

/// A host's place, as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// The number of its network.
    pub network: usize,
    /// From the inside.
    pub routers: Vec<Hop>,
    /// It has an IPv6 address that no router translates.
    pub has_v6: bool,
}

/// A router before a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// The number of the router.
    pub router: usize,
    pub kind: NatKind,
    /// A port leads to the host.
    pub is_forwarded: bool,
    pub hairpins: bool,
    pub blocks_udp: bool,
    /// A flow that was knocked at before it began gets another port.
    pub renumbers: bool,
}

impl Side {
    /// What its routers are together.
    pub fn kind(&self) -> NatKind {
        let class = |hop: &Hop| match hop {
            Hop { is_forwarded: true, .. } => NatKind::OPEN,
            Hop { renumbers: true, kind, .. } => NatKind { mapping: Dependence::AddressAndPortDependent, ..*kind },
            Hop { kind, .. } => *kind,
        };
        let kinds: Vec<NatKind> = self.routers.iter().map(class).collect();
        let mapping = kinds.iter().map(|kind| kind.mapping).max().unwrap_or(Dependence::EndpointIndependent);
        let strictest = kinds.iter().map(|kind| kind.filtering).max().unwrap_or(Dependence::EndpointIndependent);
        let is_dependent = |kind: &NatKind| kind.mapping != Dependence::EndpointIndependent;
        let inner = kinds.iter().position(is_dependent).unwrap_or(kinds.len());
        let filters_beyond = kinds.iter().skip(inner + 1).any(|kind| kind.filtering != Dependence::EndpointIndependent);
        let filtering = if filters_beyond { Dependence::AddressAndPortDependent } else { strictest };
        NatKind { mapping, filtering }
    }

    fn passes_udp(&self) -> bool {
        self.routers.iter().all(|hop| !hop.blocks_udp)
    }
}

/// Whether the two must have a direct path.
pub fn must_be_direct(a: &Side, b: &Side) -> bool {
    if a.network == b.network {
        return true;
    }
    if !a.passes_udp() || !b.passes_udp() {
        return false;
    }
    if a.has_v6 && b.has_v6 {
        return true;
    }
    let defeats = |one: NatKind, other: NatKind| {
        one.mapping != Dependence::EndpointIndependent && other.filtering == Dependence::AddressAndPortDependent
    };
    let (left, right) = (a.kind(), b.kind());
    if defeats(left, right) || defeats(right, left) {
        return false;
    }
    match (a.routers.last(), b.routers.last()) {
        (Some(left), Some(right)) if left.router == right.router => left.hairpins,
        _ => true,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn hop(router: usize, kind: &str) -> Hop {
        let kind = NatKind::all().find(|other| other.name() == kind).unwrap();
        Hop { router, kind, is_forwarded: false, hairpins: false, blocks_udp: false, renumbers: false }
    }

    fn side(network: usize, routers: &[Hop]) -> Side {
        Side { network, routers: routers.to_vec(), has_v6: false }
    }

    #[test]
    fn a_pair_is_direct_unless_one_maps_by_endpoint_and_the_other_filters_by_port() {
        let relayed = |left: &str, right: &str| !must_be_direct(&side(1, &[hop(1, left)]), &side(2, &[hop(2, right)]));
        let mut pairs = Vec::new();
        for left in NatKind::all() {
            for right in NatKind::all().filter(|right| left <= *right) {
                assert_eq!(relayed(left.name(), right.name()), relayed(right.name(), left.name()));
                if relayed(left.name(), right.name()) {
                    pairs.push((left.name(), right.name()));
                }
            }
        }
        assert_eq!(pairs.len(), 6 + 6 + 5, "{pairs:?}");
        assert!(relayed("eim-apdf", "apdm-eif") && relayed("adm-apdf", "adm-apdf") && relayed("adm-adf", "eim-apdf"));
        assert!(
            !relayed("eim-apdf", "eim-apdf") && !relayed("apdm-adf", "apdm-adf") && !relayed("apdm-apdf", "eim-adf")
        );
    }

    #[test]
    fn a_lan_and_ipv6_need_no_luck_and_blocked_udp_has_none() {
        let hard = [hop(1, "apdm-apdf")];
        let other = [hop(2, "apdm-apdf")];
        assert!(must_be_direct(&side(1, &hard), &side(1, &hard)));
        let with_v6 = |network, routers| Side { has_v6: true, ..side(network, routers) };
        assert!(must_be_direct(&with_v6(1, &hard), &with_v6(2, &other)));
        assert!(!must_be_direct(&with_v6(1, &hard), &side(2, &other)));
        let blocked = [Hop { blocks_udp: true, ..hop(2, "eim-eif") }];
        assert!(!must_be_direct(&side(1, &[]), &side(2, &blocked)));
        assert!(must_be_direct(&side(1, &[]), &side(0, &[])));
    }

    #[test]
    fn behind_one_router_it_has_to_hairpin() {
        let pair =
            |shared| must_be_direct(&side(1, &[hop(1, "eim-apdf"), shared]), &side(2, &[hop(2, "eim-adf"), shared]));
        assert!(!pair(hop(9, "eim-apdf")));
        assert!(pair(Hop { hairpins: true, ..hop(9, "eim-apdf") }));
        assert!(!pair(Hop { hairpins: true, ..hop(9, "apdm-apdf") }));
    }

    #[test]
    fn routers_in_a_row_are_as_strict_as_the_strictest_and_a_forwarded_port_lifts_one() {
        let kind = |routers: &[Hop]| side(1, routers).kind().name();
        assert_eq!(kind(&[]), "eim-eif");
        assert_eq!(kind(&[hop(1, "eim-apdf"), hop(2, "apdm-eif")]), "apdm-apdf");
        assert_eq!(kind(&[hop(1, "apdm-eif"), hop(2, "eim-adf")]), "apdm-apdf", "every mapping is filtered for itself");
        assert_eq!(kind(&[Hop { renumbers: true, ..hop(1, "eim-apdf") }]), "apdm-apdf");
        assert_eq!(kind(&[Hop { is_forwarded: true, ..hop(1, "apdm-apdf") }, hop(2, "eim-adf")]), "eim-adf");
    }
}
