//! How large a packet a path carries, found by padded pings: the largest first, each size a bounded number of times.

use std::time::Duration;

use mesh_common::limits::LINK_MTU;
use mesh_common::time::Instant;

/// What a relay carries for certain: IPv6's minimum.
pub const RELAY_MTU: u16 = 1280;
/// What WireGuard adds to a packet: header and tag.
const WIREGUARD_OVERHEAD: u16 = 32;
/// Ethernet; a DS-Lite or GRE tunnel on the way, PPPoE with more; what every IPv6 path carries.
const SIZES: [u16; 4] = [LINK_MTU, 1400, 1360, 1280];
/// Pings of one size: one or two may be lost for other reasons.
const TRIES: u8 = 3;
const PATIENCE: Duration = Duration::from_millis(250);
/// A path that did not carry the largest is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum MtuSearch {
    #[default]
    Unknown,
    Asking {
        size: usize,
        tries: u8,
        next: Instant,
    },
    Known {
        mtu: u16,
        at: Instant,
    },
}

/// The length of the datagram that carries a packet of this size.
pub(super) fn datagram_len(mtu: u16) -> u16 {
    mtu + WIREGUARD_OVERHEAD
}

impl MtuSearch {
    pub(super) fn known(self) -> Option<u16> {
        match self {
            Self::Known { mtu, .. } => Some(mtu),
            Self::Unknown | Self::Asking { .. } => None,
        }
    }

    pub(super) fn due(self) -> Option<Instant> {
        match self {
            Self::Unknown => None,
            Self::Asking { next, .. } => Some(next),
            Self::Known { mtu, at } => (mtu < LINK_MTU).then_some(at + ASK_AGAIN),
        }
    }

    /// The path was chosen to carry: asks unless it is known.
    pub(super) fn begin(&mut self, now: Instant) {
        if *self == Self::Unknown {
            *self = Self::Asking { size: 0, tries: 0, next: now };
        }
    }

    /// The size to ask for now.
    pub(super) fn poll(&mut self, rtt: Duration, now: Instant) -> Option<u16> {
        if self.due().is_none_or(|due| now < due) {
            return None;
        }
        let (size, tries) = match *self {
            Self::Asking { size, tries, .. } if tries < TRIES => (size, tries),
            Self::Asking { size, .. } if size + 1 < SIZES.len() => (size + 1, 0),
            Self::Asking { .. } => {
                *self = Self::Known { mtu: RELAY_MTU, at: now };
                return None;
            }
            Self::Unknown | Self::Known { .. } => (0, 0),
        };
        *self = Self::Asking { size, tries: tries + 1, next: now + PATIENCE + rtt };
        Some(SIZES[size])
    }

    pub(super) fn answered(&mut self, mtu: u16, now: Instant) {
        if self.known().is_none_or(|known| known < mtu) {
            *self = Self::Known { mtu, at: now };
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Asks a path that carries packets up to `limit`; gives what was found and how many pings that took.
    fn search(limit: u16, mut lost: u8) -> (Option<u16>, u32) {
        let (mut search, mut now, mut pings) = (MtuSearch::default(), Instant::ORIGIN, 0);
        search.begin(now);
        while search.known().is_none() {
            now = now.max(search.due().unwrap());
            let Some(size) = search.poll(Duration::from_millis(40), now) else { continue };
            pings += 1;
            if lost > 0 {
                lost -= 1;
            } else if size <= limit {
                search.answered(size, now);
            }
        }
        (search.known(), pings)
    }

    #[test]
    fn the_largest_size_that_passes_is_found_in_a_bounded_number_of_pings() {
        for (limit, found) in [(1500, 1420), (1420, 1420), (1419, 1400), (1380, 1360), (1300, 1280), (576, 1280)] {
            let (mtu, pings) = search(limit, 0);
            assert_eq!(mtu, Some(found), "limit {limit}");
            assert!(pings <= 12, "{pings}");
        }
        assert_eq!(search(1500, 2).0, Some(1420), "two lost pings change nothing");
    }

    #[test]
    fn only_a_path_that_carried_less_is_asked_again() {
        let full = MtuSearch::Known { mtu: LINK_MTU, at: Instant::ORIGIN };
        assert_eq!(full.due(), None);
        let mut small = MtuSearch::Known { mtu: 1360, at: Instant::ORIGIN };
        assert_eq!(small.poll(Duration::ZERO, Instant::ORIGIN + ASK_AGAIN), Some(1420));
    }
}
