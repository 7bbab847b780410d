//! From what was seen to the words of RFC 4787. Pure functions.

use std::net::SocketAddr;

use mesh_common::nat::{Filtering, Mapping};

/// One destination and the address it saw us at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sighting {
    pub(super) destination: SocketAddr,
    pub(super) mapped: SocketAddr,
    /// It sent to us before we ever sent to it, and was not heard. A router that takes such a datagram for its own gives our
    /// own next one to that destination another port, whatever its mapping is.
    pub(super) knocked: bool,
}

/// What one server could tell of filtering; `None` = it could not, or was not asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Doors {
    /// Its other port was heard, which we had not spoken to.
    pub(super) other_port: Option<bool>,
    /// Its other address was heard.
    pub(super) other_address: Option<bool>,
}

pub(super) fn mapping(seen: &[Sighting]) -> Mapping {
    let quiet: Vec<Sighting> = seen.iter().copied().filter(|sighting| !sighting.knocked).collect();
    match mapping_of(&quiet) {
        // Two undisturbed addresses agree: what a disturbed one saw is the disturbance.
        Mapping::EndpointIndependent => Mapping::EndpointIndependent,
        _ => mapping_of(seen),
    }
}

fn mapping_of(seen: &[Sighting]) -> Mapping {
    let pairs = || seen.iter().enumerate().flat_map(|(place, a)| seen[place + 1..].iter().map(move |b| (a, b)));
    let is_one_address = |(a, b): &(&Sighting, &Sighting)| a.destination.ip() == b.destination.ip();
    let differs = |(a, b): &(&Sighting, &Sighting)| a.mapped != b.mapped;
    if pairs().any(|pair| is_one_address(&pair) && differs(&pair)) {
        Mapping::AddressAndPortDependent
    } else if pairs().any(|pair| differs(&pair)) {
        Mapping::AddressDependent
    } else if pairs().any(|pair| !is_one_address(&pair)) {
        Mapping::EndpointIndependent
    } else if pairs().any(|(a, b)| a.destination != b.destination) {
        Mapping::PortIndependent
    } else {
        Mapping::Unknown
    }
}

/// One server that was heard is proof; that another was not may have other reasons.
pub(super) fn filtering(doors: &[Doors]) -> Filtering {
    if doors.iter().any(|door| door.other_address == Some(true)) {
        Filtering::EndpointIndependent
    } else if doors.iter().any(|door| door.other_port == Some(true)) {
        Filtering::AddressDependent
    } else if doors.iter().any(|door| door.other_port == Some(false)) {
        Filtering::AddressAndPortDependent
    } else {
        Filtering::Unknown
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn seen(sightings: &[(&str, u16)]) -> Vec<Sighting> {
        let sighting = |(destination, port): &(&str, u16)| Sighting {
            destination: destination.parse().unwrap(),
            mapped: ([203, 0, 113, 7], *port).into(),
            knocked: false,
        };
        sightings.iter().map(sighting).collect()
    }

    #[test]
    fn a_mapping_is_what_two_destinations_tell() {
        let (a1, a2, b1) = ("192.0.2.1:3478", "192.0.2.1:3479", "192.0.2.2:3478");
        for (sightings, expected) in [
            (&[][..], Mapping::Unknown),
            (&[(a1, 1)], Mapping::Unknown),
            (&[(a1, 1), (a2, 1)], Mapping::PortIndependent),
            (&[(a1, 1), (a2, 2)], Mapping::AddressAndPortDependent),
            (&[(a1, 1), (b1, 1)], Mapping::EndpointIndependent),
            (&[(a1, 1), (b1, 2)], Mapping::AddressDependent),
            (&[(a1, 1), (a2, 1), (b1, 1)], Mapping::EndpointIndependent),
            (&[(a1, 1), (a2, 1), (b1, 2)], Mapping::AddressDependent),
            (&[(a1, 1), (a2, 2), (b1, 3)], Mapping::AddressAndPortDependent),
        ] {
            assert_eq!(mapping(&seen(sightings)), expected, "{sightings:?}");
        }
    }

    #[test]
    fn a_destination_that_knocked_first_is_no_witness_against_two_that_did_not() {
        let mut sightings = seen(&[("192.0.2.1:3478", 1), ("192.0.2.2:3478", 1), ("192.0.2.1:3479", 2)]);
        assert_eq!(mapping(&sightings), Mapping::AddressAndPortDependent);
        sightings[2].knocked = true;
        assert_eq!(mapping(&sightings), Mapping::EndpointIndependent);
        // Without a second address its word stands: the stricter reading.
        sightings.remove(1);
        assert_eq!(mapping(&sightings), Mapping::AddressAndPortDependent);
    }

    #[test]
    fn a_filter_is_as_open_as_the_most_open_answer() {
        let doors = |other_port, other_address| Doors { other_port, other_address };
        for (doors, expected) in [
            (&[][..], Filtering::Unknown),
            (&[doors(None, None)], Filtering::Unknown),
            (&[doors(Some(false), None)], Filtering::AddressAndPortDependent),
            (&[doors(Some(false), Some(false))], Filtering::AddressAndPortDependent),
            (&[doors(Some(true), None)], Filtering::AddressDependent),
            (&[doors(Some(true), Some(false))], Filtering::AddressDependent),
            (&[doors(Some(true), Some(true))], Filtering::EndpointIndependent),
            (&[doors(Some(false), None), doors(Some(true), None)], Filtering::AddressDependent),
            (&[doors(None, Some(false))], Filtering::Unknown),
        ] {
            assert_eq!(filtering(doors), expected, "{doors:?}");
        }
    }
}
