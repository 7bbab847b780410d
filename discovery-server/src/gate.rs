//! How many strangers may be in the doorway: handshakes in flight, in all and by address.
//!
//! A pass is held from the first packet until the carrier is up or has failed; what does not fit is turned away at once,
//! so a flood costs a counter.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_common::limits::MAX_UNPROVEN_PER_IP;

/// Handshakes in flight in all.
const MAX_HALF_OPEN: usize = 2048;
/// From this many on, QUIC clients must prove their address with a Retry first.
const RETRY_FROM: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    half_open: usize,
    by_address: HashMap<IpAddr, usize>,
    turned_away: u64,
}

/// One place in the doorway, given back when dropped.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    address: Option<IpAddr>,
}

impl Gate {
    /// A place for a client whose address is proven (TCP, or QUIC after a Retry).
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Pass> {
        self.admit(Some(source(address)))
    }

    /// A place for a client that may have forged its address: not counted against that address.
    pub(crate) fn enter_unproven(self: &Arc<Self>) -> Option<Pass> {
        self.admit(None)
    }

    /// Whether QUIC clients must prove their address before they get a place.
    pub(crate) fn crowded(&self) -> bool {
        self.lock().half_open >= RETRY_FROM
    }

    /// Handshakes refused so far.
    pub(crate) fn turned_away(&self) -> u64 {
        self.lock().turned_away
    }

    fn admit(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Pass> {
        let mut state = self.lock();
        let taken = address.and_then(|address| state.by_address.get(&address)).copied().unwrap_or(0);
        if state.half_open >= MAX_HALF_OPEN || taken >= MAX_UNPROVEN_PER_IP {
            state.turned_away += 1;
            return None;
        }
        state.half_open += 1;
        if let Some(address) = address {
            state.by_address.insert(address, taken + 1);
        }
        Some(Pass { gate: self.clone(), address })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.half_open -= 1;
        if let Some(address) = self.address
            && let Some(count) = state.by_address.get_mut(&address)
        {
            *count -= 1;
            if *count == 0 {
                state.by_address.remove(&address);
            }
        }
    }
}

/// Who is counted as one source: an IPv4 address, or an IPv6 /64, which one host may use freely.
pub(crate) fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_address_cannot_fill_the_doorway() {
        let gate = Arc::new(Gate::default());
        let greedy = "2001:db8::1".parse().unwrap();
        let same_site = "2001:db8::2".parse().unwrap();
        let passes: Vec<_> = (0..MAX_UNPROVEN_PER_IP).map(|_| gate.enter(greedy).unwrap()).collect();
        assert!(gate.enter(same_site).is_none());
        assert!(gate.enter("192.0.2.1".parse().unwrap()).is_some());
        assert_eq!(gate.turned_away(), 1);
        drop(passes);
        assert!(gate.enter(same_site).is_some());
        assert!(gate.lock().by_address.is_empty());
    }

    #[test]
    fn forged_addresses_meet_the_total_and_ask_for_a_retry_long_before() {
        let gate = Arc::new(Gate::default());
        let passes: Vec<_> = std::iter::from_fn(|| gate.enter_unproven()).collect();
        assert_eq!(passes.len(), MAX_HALF_OPEN);
        assert!(gate.crowded());
        drop(passes);
        assert!(!gate.crowded());
    }

    #[test]
    fn mapped_ipv4_counts_as_ipv4() {
        assert_eq!(source("::ffff:192.0.2.7".parse().unwrap()), "192.0.2.7".parse::<IpAddr>().unwrap());
    }
}
