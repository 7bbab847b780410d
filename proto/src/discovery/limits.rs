//! Budgets of the server machine: what one slot and one address may cost, and the words that refusals use.
//!
//! Owns token buckets and bounded per-address counters. Every table has a fixed size; a full one forgets its oldest entry,
//! so an attacker with many addresses can wash out counters and never memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use mesh_common::limits::{
    MAX_FAILED_PROOFS_PER_MINUTE, MAX_UNPROVEN_PER_IP, NEW_NAMESPACES_PER_IP_PER_HOUR, PUT_BURST, PUT_INTERVAL,
};
use mesh_common::time::Instant;

/// Why something was refused or dropped: the limit's name in errors to agents, and the key in the server's statistics.
pub mod reason {
    pub const MAX_CONNECTIONS: &str = "max-connections";
    pub const UNPROVEN_PER_IP: &str = "unproven-connections-per-ip";
    pub const FAILED_PROOFS_PER_IP: &str = "failed-proofs-per-ip";
    pub const NEW_NAMESPACES_PER_IP: &str = "new-namespaces-per-ip";
    pub const MAX_NAMESPACES: &str = "max-namespaces";
    pub const ONLY_NAMESPACE: &str = "only-namespace";
    pub const MAX_SLOTS: &str = "max-slots-per-namespace";
    pub const MAX_MEMORY: &str = "max-memory";
    pub const SESSIONS_PER_NAMESPACE: &str = "sessions-per-namespace";
    pub const SESSIONS_PER_NODE: &str = "sessions-per-node";
    pub const PUTS_PER_SLOT: &str = "puts-per-slot";
    pub const MAX_MESSAGE: &str = "max-message";
    pub const QUEUED_REPLIES: &str = "queued-replies";
    pub const HELLO_TIMEOUT: &str = "hello-timeout";
    pub const IDLE: &str = "session-idle";
    pub const BAD_PROOF: &str = "bad-proof";
    /// A challenge-bound proof for a name that is not the server's own.
    pub const OWN_NAME: &str = "own-name";
    pub const NONCE_LIFETIME: &str = "nonce-lifetime";
    pub const MALFORMED: &str = "malformed";
    pub const UNKNOWN_MESSAGE: &str = "unknown-message";
    /// A message that is not valid at this point of the session.
    pub const OUT_OF_ORDER: &str = "out-of-order";
    pub const BAD_FRAME: &str = "bad-frame";
    /// A frame of another node or another namespace than the session's.
    pub const FOREIGN_FRAME: &str = "foreign-frame";
    pub const STALE_FRAME: &str = "stale-frame";
    pub const DRAINING: &str = "draining";
    pub const RELAY_CLIENT_BYTES: &str = "relay-client-bytes";
    pub const RELAY_NAMESPACE_BYTES: &str = "relay-namespace-bytes";
    /// A datagram for a node that has no session here.
    pub const RELAY_NO_PEER: &str = "relay-no-peer";
    /// A datagram that waited for its receiver until newer ones took its place.
    pub const RELAY_QUEUE: &str = "relay-queue";
    /// A datagram that waited in the fullest queue when all queues together were full.
    pub const RELAY_MEMORY: &str = "relay-memory";
    pub const RELAY_OFF: &str = "relay-off";
}

/// Sessions of one node at once: an agent has one for each carrier, and a flapping one leaves dead ones for `SESSION_IDLE`.
/// One more closes the oldest.
pub const MAX_SESSIONS_PER_NODE: u32 = 8;
/// Sessions of one namespace beyond two for each slot.
pub const SPARE_SESSIONS_PER_NAMESPACE: usize = 16;
/// When a full server is worth asking again.
pub const FULL_RETRY_AFTER: Duration = Duration::from_secs(30);
/// When an address has room for another unproven connection: honest ones prove themselves within a round trip, and all nodes
/// of a site behind one NAT want in after a restart.
pub const UNPROVEN_RETRY_AFTER: Duration = Duration::from_secs(2);
/// How long after its last slot and session a namespace is forgotten.
pub const EMPTY_NAMESPACE_TTL: Duration = Duration::from_secs(60);
/// A closed connection whose carrier does not end is forgotten after this long.
pub const CLOSE_GRACE: Duration = Duration::from_secs(10);
/// Addresses counted at once, in each of the two counters.
const MAX_COUNTED_ADDRESSES: usize = 65_536;
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// A limit was met: its name, and when asking again makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded {
    pub limit: &'static str,
    pub retry_after: Duration,
}

/// A burst of [`PUT_BURST`], then one each [`PUT_INTERVAL`].
#[derive(Debug, Clone)]
pub struct PutBudget {
    tokens: u32,
    refilled: Instant,
}

impl PutBudget {
    pub fn new(now: Instant) -> Self {
        Self { tokens: PUT_BURST, refilled: now }
    }

    /// Takes one token, or says when there is one.
    pub fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let passed = now.since(self.refilled);
        let earned = passed.as_nanos() / PUT_INTERVAL.as_nanos();
        let room = PUT_BURST - self.tokens;
        match u32::try_from(earned) {
            Ok(earned) if earned < room => {
                self.tokens += earned;
                self.refilled += PUT_INTERVAL * earned;
            }
            _ => {
                self.tokens = PUT_BURST;
                self.refilled = now;
            }
        }
        if self.tokens == 0 {
            return Err((self.refilled + PUT_INTERVAL).since(now));
        }
        self.tokens -= 1;
        Ok(())
    }
}

/// What counts as one address: an IPv4 address, or an IPv6 /64, since a host has all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Site(IpAddr);

impl Site {
    pub fn of(addr: IpAddr) -> Self {
        match addr.to_canonical() {
            IpAddr::V6(v6) => {
                let mut octets = v6.octets();
                octets[8..].fill(0);
                Self(IpAddr::from(octets))
            }
            v4 => Self(v4),
        }
    }
}

/// Everything counted by address.
#[derive(Debug)]
pub struct SiteBudgets {
    /// Bounded by the connections there are.
    unproven: BTreeMap<Site, usize>,
    failed_proofs: Windows,
    new_namespaces: Windows,
}

impl Default for SiteBudgets {
    fn default() -> Self {
        Self {
            unproven: BTreeMap::new(),
            failed_proofs: Windows::new(MINUTE, MAX_COUNTED_ADDRESSES),
            new_namespaces: Windows::new(HOUR, MAX_COUNTED_ADDRESSES),
        }
    }
}

impl SiteBudgets {
    /// Admits a connection that has not proven anything yet; paired with [`Self::close_unproven`].
    pub fn open_unproven(&mut self, site: Site) -> Result<(), Exceeded> {
        let count = self.unproven.entry(site).or_default();
        if *count >= MAX_UNPROVEN_PER_IP {
            return Err(Exceeded { limit: reason::UNPROVEN_PER_IP, retry_after: UNPROVEN_RETRY_AFTER });
        }
        *count += 1;
        Ok(())
    }

    pub fn close_unproven(&mut self, site: Site) {
        if let Some(count) = self.unproven.get_mut(&site) {
            *count -= 1;
            if *count == 0 {
                self.unproven.remove(&site);
            }
        }
    }

    /// Counts a proof that did not hold. `false` = too many of late, it gets no answer. Proofs that hold are never counted, so
    /// honest nodes behind the same NAT or proxy get in all the while.
    pub fn answer_failed_proof(&mut self, site: Site, now: Instant) -> bool {
        self.failed_proofs.count(site, MAX_FAILED_PROOFS_PER_MINUTE, now).is_ok()
    }

    /// Counts a namespace that this address opens.
    pub fn open_namespace(&mut self, site: Site, now: Instant) -> Result<(), Exceeded> {
        self.new_namespaces
            .count(site, NEW_NAMESPACES_PER_IP_PER_HOUR, now)
            .map_err(|retry_after| Exceeded { limit: reason::NEW_NAMESPACES_PER_IP, retry_after })
    }
}

/// One counter an address, each over a window that starts with its first count.
#[derive(Debug)]
struct Windows {
    length: Duration,
    capacity: usize,
    counts: BTreeMap<Site, (Instant, u32)>,
    by_start: BTreeSet<(Instant, Site)>,
}

impl Windows {
    fn new(length: Duration, capacity: usize) -> Self {
        Self { length, capacity, counts: BTreeMap::new(), by_start: BTreeSet::new() }
    }

    /// Counts one, or says how long until the window ends when there were `limit` already.
    fn count(&mut self, site: Site, limit: u32, now: Instant) -> Result<(), Duration> {
        self.forget_ended(now);
        if let Some((start, count)) = self.counts.get_mut(&site) {
            if *count >= limit {
                return Err((*start + self.length).since(now));
            }
            *count += 1;
            return Ok(());
        }
        if self.counts.len() >= self.capacity
            && let Some((_, oldest)) = self.by_start.pop_first()
        {
            self.counts.remove(&oldest);
        }
        self.counts.insert(site, (now, 1));
        self.by_start.insert((now, site));
        Ok(())
    }

    fn forget_ended(&mut self, now: Instant) {
        while let Some((start, site)) = self.by_start.first().copied() {
            if start + self.length > now {
                break;
            }
            self.by_start.pop_first();
            self.counts.remove(&site);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_origin(Duration::from_secs(seconds))
    }

    fn site(last: u8) -> Site {
        Site::of(IpAddr::from([192, 0, 2, last]))
    }

    #[test]
    fn puts_come_in_a_burst_then_one_a_second() {
        let mut budget = PutBudget::new(at(0));
        for _ in 0..PUT_BURST {
            budget.take(at(0)).unwrap();
        }
        assert_eq!(budget.take(at(0)), Err(PUT_INTERVAL));
        let half = at(0) + Duration::from_millis(500);
        assert_eq!(budget.take(half), Err(Duration::from_millis(500)));
        budget.take(at(1)).unwrap();
        assert!(budget.take(at(1)).is_err());
        // A long rest fills the burst and no more.
        for _ in 0..PUT_BURST {
            budget.take(at(10_000)).unwrap();
        }
        assert!(budget.take(at(10_000)).is_err());
    }

    #[test]
    fn an_address_is_an_ipv4_address_or_an_ipv6_64() {
        let of = |text: &str| Site::of(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn unproven_connections_meet_their_limit_and_leave_room_again() {
        let mut budgets = SiteBudgets::default();
        for _ in 0..MAX_UNPROVEN_PER_IP {
            budgets.open_unproven(site(1)).unwrap();
        }
        assert_eq!(budgets.open_unproven(site(1)).unwrap_err().limit, reason::UNPROVEN_PER_IP);
        budgets.open_unproven(site(2)).unwrap();
        budgets.close_unproven(site(1));
        budgets.open_unproven(site(1)).unwrap();
        for _ in 0..MAX_UNPROVEN_PER_IP {
            budgets.close_unproven(site(1));
        }
        budgets.close_unproven(site(2));
        assert!(budgets.unproven.is_empty(), "nothing is kept of addresses without connections");
    }

    #[test]
    fn a_window_counts_to_its_limit_and_starts_anew() {
        let mut windows = Windows::new(MINUTE, 8);
        for _ in 0..3 {
            windows.count(site(1), 3, at(0)).unwrap();
        }
        assert_eq!(windows.count(site(1), 3, at(20)), Err(Duration::from_secs(40)));
        windows.count(site(2), 3, at(20)).unwrap();
        windows.count(site(1), 3, at(60)).unwrap();
    }

    #[test]
    fn a_full_counter_forgets_its_oldest_address_only() {
        let mut windows = Windows::new(HOUR, 2);
        for last in 1..=3 {
            windows.count(site(last), 1, at(u64::from(last))).unwrap();
        }
        assert_eq!((windows.counts.len(), windows.by_start.len()), (2, 2));
        assert!(windows.count(site(3), 1, at(4)).is_err());
        windows.count(site(1), 1, at(4)).unwrap();
    }
}
