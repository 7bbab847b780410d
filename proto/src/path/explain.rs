//! Why two nodes have no direct path, and what their owners can do, in words without NAT jargon.

use mesh_common::limits::LISTEN_PORT;
use mesh_common::nat::{Filtering, Mapping, NatClass};

/// What the explanation is drawn from; pairs are IPv4, IPv6.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts<'a> {
    pub(super) own_nat: [NatClass; 2],
    pub(super) peer_nat: [NatClass; 2],
    pub(super) families: Families,
    /// The UDP port that would have to be opened.
    pub(super) port: Option<u16>,
    /// The first round of probes is under way.
    pub(super) is_looking: bool,
    /// What came of guessing ports, where that is the only way.
    pub(super) guessing: Option<String>,
    /// A path answers probes and carries nothing.
    pub(super) unheard: Option<&'a str>,
}

/// Whether each side has an address of each family.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Families {
    pub(super) own: [bool; 2],
    pub(super) peer: [bool; 2],
}

pub(super) fn why(facts: &Facts<'_>) -> String {
    if let Some(reason) = facts.unheard {
        return format!(
            "{reason} on the direct path: a firewall in between treats them differently, or drops large packets; the path is \
             tried again in a minute"
        );
    }
    let port = facts.port.unwrap_or(LISTEN_PORT);
    let Some(family) = (0..2).rev().find(|family| facts.families.own[*family] && facts.families.peer[*family]) else {
        return no_common_family(facts.families);
    };
    let common: Vec<usize> =
        (0..2).filter(|family| facts.families.own[*family] && facts.families.peer[*family]).collect();
    // The reason that counts is that of the family in which most is possible.
    let family = common.iter().copied().find(|family| !is_hopeless(facts, *family)).unwrap_or(family.min(common[0]));
    let (own, peer) = (facts.own_nat[family], facts.peer_nat[family]);
    if is_hopeless(facts, family) {
        let guessing = facts.guessing.as_ref().map(|words| format!("; {words}")).unwrap_or_default();
        return format!(
            "{}: hole punching cannot work{guessing}; open UDP port {port} on one side, or enable port mapping on one router",
            both_nats(own, peer)
        );
    }
    if facts.is_looking {
        return "a direct path is being looked for".to_owned();
    }
    let unknown = [own, peer].iter().any(|nat| nat.mapping == Mapping::Unknown || nat.filtering == Filtering::Unknown);
    let nats = format!("this node {}, the peer {}", behind(own), behind(peer));
    if unknown {
        format!(
            "no address of the peer answers; {nats}: a firewall may block UDP; allow UDP port {port} in on one side, or see \
             `mesh-agent netcheck`"
        )
    } else {
        format!(
            "no address of the peer answers although hole punching should work ({nats}): a firewall of a host or site blocks \
             UDP; allow UDP port {port} in on one side"
        )
    }
}

/// One side's port differs for each destination and the other lets in only whom it has written to at that very port.
fn is_hopeless(facts: &Facts<'_>, family: usize) -> bool {
    let (own, peer) = (facts.own_nat[family], facts.peer_nat[family]);
    let is_dependent =
        |nat: NatClass| matches!(nat.mapping, Mapping::AddressDependent | Mapping::AddressAndPortDependent);
    let is_strict = |nat: NatClass| nat.filtering == Filtering::AddressAndPortDependent;
    is_dependent(own) && is_strict(peer) || is_dependent(peer) && is_strict(own)
}

fn both_nats(own: NatClass, peer: NatClass) -> String {
    if own == peer {
        return format!("both sides are behind a NAT that {}", habits(own));
    }
    format!("this node {}, the peer {}", behind(own), behind(peer))
}

fn behind(nat: NatClass) -> String {
    match (nat.mapping, nat.filtering) {
        (Mapping::Unknown, Filtering::Unknown) => "is behind a NAT or firewall of unknown kind".to_owned(),
        (Mapping::EndpointIndependent, Filtering::EndpointIndependent) => "can be reached by anyone".to_owned(),
        _ => format!("is behind a NAT that {}", habits(nat)),
    }
}

/// What a NAT does, in the third person singular.
pub fn habits(nat: NatClass) -> String {
    let mapping = match nat.mapping {
        Mapping::Unknown => None,
        Mapping::EndpointIndependent | Mapping::PortIndependent => Some("keeps one public port"),
        Mapping::AddressDependent => Some("uses another public port for each address it talks to"),
        Mapping::AddressAndPortDependent => Some("uses another public port for each destination"),
    };
    let filtering = match nat.filtering {
        Filtering::Unknown => None,
        Filtering::EndpointIndependent => Some("lets everyone in"),
        Filtering::AddressDependent => Some("lets in only addresses that were written to"),
        Filtering::AddressAndPortDependent => Some("lets in only the very address and port that was written to"),
    };
    match (mapping, filtering) {
        (Some(mapping), Some(filtering)) => format!("{mapping} and {filtering}"),
        (Some(habit), None) | (None, Some(habit)) => habit.to_owned(),
        (None, None) => "is of unknown kind".to_owned(),
    }
}

fn no_common_family(families: Families) -> String {
    let name = |has: [bool; 2]| match has {
        [true, true] => "IPv4 and IPv6",
        [true, false] => "IPv4 only",
        [false, true] => "IPv6 only",
        [false, false] => "no address",
    };
    let (own, peer) = (name(families.own), name(families.peer));
    if families.peer == [false; 2] {
        return "the peer announces no address: it is reached over the relay until it does".to_owned();
    }
    if families.own == [false; 2] {
        return "this node has no address to be reached at: UDP may be blocked here, or no network is up".to_owned();
    }
    format!("this node has {own}, the peer has {peer}: only a relay speaks both")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nat(mapping: Mapping, filtering: Filtering) -> NatClass {
        NatClass { mapping, filtering }
    }

    const EASY: (Mapping, Filtering) = (Mapping::EndpointIndependent, Filtering::AddressAndPortDependent);
    const HARD: (Mapping, Filtering) = (Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent);

    fn v4(own: (Mapping, Filtering), peer: (Mapping, Filtering)) -> Facts<'static> {
        Facts {
            own_nat: [nat(own.0, own.1), NatClass::default()],
            peer_nat: [nat(peer.0, peer.1), NatClass::default()],
            families: Families { own: [true, false], peer: [true, false] },
            ..Facts::default()
        }
    }

    #[test]
    fn hard_pairs_are_named_with_what_helps() {
        assert_eq!(
            why(&v4(HARD, HARD)),
            "both sides are behind a NAT that uses another public port for each destination and lets in only the very address and \
             port that was written to: hole punching cannot work; open UDP port 51872 on one side, or enable port mapping on one \
             router"
        );
        let mixed = why(&Facts { port: Some(4000), ..v4(EASY, HARD) });
        assert_eq!(
            mixed,
            "this node is behind a NAT that keeps one public port and lets in only the very address and port that was written to, \
             the peer is behind a NAT that uses another public port for each destination and lets in only the very address and \
             port that was written to: hole punching cannot work; open UDP port 4000 on one side, or enable port mapping on one \
             router"
        );
    }

    #[test]
    fn a_pair_that_should_work_points_at_firewalls() {
        let text = why(&v4(EASY, EASY));
        assert!(text.contains("hole punching should work") && text.contains("allow UDP port 51872"), "{text}");
        let text = why(&v4(EASY, (Mapping::Unknown, Filtering::Unknown)));
        assert!(text.contains("unknown kind") && text.contains("netcheck"), "{text}");
        assert_eq!(why(&Facts { is_looking: true, ..v4(EASY, EASY) }), "a direct path is being looked for");
    }

    #[test]
    fn the_family_in_which_most_is_possible_is_spoken_of() {
        let both = Families { own: [true; 2], peer: [true; 2] };
        let mut facts = Facts { families: both, ..v4(HARD, HARD) };
        facts.own_nat[1] = nat(EASY.0, EASY.1);
        facts.peer_nat[1] = facts.own_nat[1];
        assert!(why(&facts).contains("hole punching should work"), "IPv6 is not translated: a firewall it is");
    }

    #[test]
    fn other_causes_have_words_of_their_own() {
        let apart = Facts { families: Families { own: [true, false], peer: [false, true] }, ..v4(EASY, EASY) };
        assert_eq!(why(&apart), "this node has IPv4 only, the peer has IPv6 only: only a relay speaks both");
        let silent = Facts { families: Families { own: [true, false], peer: [false; 2] }, ..v4(EASY, EASY) };
        assert!(why(&silent).starts_with("the peer announces no address"));
        let unheard = Facts { unheard: Some("probes pass, tunnel data does not"), ..v4(EASY, EASY) };
        assert!(why(&unheard).starts_with("probes pass, tunnel data does not on the direct path"));
    }
}
