//! A small NAT: mapping × filtering × port preserving, with a lifetime.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_common::nat::{Filtering, Mapping};
use mesh_common::time::Instant;

use crate::random::SplitMix64;

#[derive(Debug, Clone, Copy)]
pub(super) struct NatKind {
    pub(super) mapping: Mapping,
    pub(super) filtering: Filtering,
    pub(super) keeps_port: bool,
    pub(super) hairpins: bool,
    pub(super) is_transparent: bool,
    pub(super) lifetime: Duration,
    /// As Linux does where the router takes an early datagram for its own.
    pub(super) renumbers_after_early_inbound: bool,
}

impl Default for NatKind {
    fn default() -> Self {
        Self {
            mapping: Mapping::EndpointIndependent,
            filtering: Filtering::AddressAndPortDependent,
            keeps_port: true,
            hairpins: false,
            is_transparent: false,
            lifetime: Duration::from_secs(120),
            renumbers_after_early_inbound: false,
        }
    }
}

impl NatKind {
    /// No translation.
    pub(super) fn none(filtering: Filtering) -> Self {
        Self { filtering, is_transparent: true, ..Self::default() }
    }
}

/// Which destinations share an external port.
type Key = (bool, Option<IpAddr>, Option<u16>);

pub(super) struct Nat {
    kind: NatKind,
    external: IpAddr,
    random: SplitMix64,
    entries: BTreeMap<Key, Entry>,
    /// Who was turned away where the router remembers it.
    knocked: BTreeSet<SocketAddr>,
    /// Hosts on the inner side.
    pub(super) lan: BTreeSet<IpAddr>,
}

struct Entry {
    outside: SocketAddr,
    /// When each destination was last spoken to.
    spoken_to: BTreeMap<SocketAddr, Instant>,
}

impl Nat {
    pub(super) fn new(kind: NatKind, external: IpAddr, seed: u64) -> Self {
        Self {
            kind,
            external,
            random: SplitMix64::new(seed),
            entries: BTreeMap::new(),
            knocked: BTreeSet::new(),
            lan: BTreeSet::new(),
        }
    }

    /// Forgets everything.
    pub(super) fn reboot(&mut self) {
        self.entries.clear();
    }

    /// What the destination sees as the source.
    pub(super) fn outbound(&mut self, inside: SocketAddr, to: SocketAddr, now: Instant) -> SocketAddr {
        if self.lan.contains(&to.ip()) {
            return inside;
        }
        let lifetime = self.kind.lifetime;
        self.entries.values_mut().for_each(|entry| entry.spoken_to.retain(|_, at| now.since(*at) < lifetime));
        self.entries.retain(|_, entry| !entry.spoken_to.is_empty());
        let is_translated = to.is_ipv4() && !self.kind.is_transparent;
        let (address, port) = match self.kind.mapping {
            _ if self.knocked.contains(&to) => (Some(to.ip()), Some(to.port())),
            Mapping::AddressDependent if is_translated => (Some(to.ip()), None),
            Mapping::AddressAndPortDependent if is_translated => (Some(to.ip()), Some(to.port())),
            _ => (None, None),
        };
        let is_free = |port| !self.entries.values().any(|entry| entry.outside.port() == port);
        let outside = if !is_translated {
            inside
        } else if self.kind.keeps_port && is_free(inside.port()) {
            SocketAddr::new(self.external, inside.port())
        } else {
            let drawn = std::iter::repeat_with(|| u16::try_from(20_000 + self.random.below(10_000)).unwrap());
            SocketAddr::new(self.external, drawn.into_iter().find(|port| is_free(*port)).unwrap())
        };
        let entry = self.entries.entry((to.is_ipv4(), address, port));
        let entry = entry.or_insert_with(|| Entry { outside, spoken_to: BTreeMap::new() });
        entry.spoken_to.insert(to, now);
        entry.outside
    }

    /// Whether a datagram to this external address gets in.
    pub(super) fn lets_in(&mut self, from: SocketAddr, outside: SocketAddr) -> bool {
        let filtering = self.kind.filtering;
        let is_let_in = self.lan.contains(&from.ip())
            || self.entries.values().filter(|entry| entry.outside == outside).any(|entry| match filtering {
                Filtering::EndpointIndependent => true,
                Filtering::AddressDependent => entry.spoken_to.keys().any(|known| known.ip() == from.ip()),
                _ => entry.spoken_to.contains_key(&from),
            });
        if !is_let_in && self.kind.renumbers_after_early_inbound {
            self.knocked.insert(from);
        }
        is_let_in
    }

    /// The source that the inner side sees of a datagram it sent to its own external address.
    pub(super) fn hairpin(&self, outside: SocketAddr, to: SocketAddr) -> Option<SocketAddr> {
        (self.kind.hairpins && self.entries.values().any(|entry| entry.outside == to)).then_some(outside)
    }

    /// Where this destination sees the node.
    pub(super) fn mapped_of(&self, destination: &str) -> SocketAddr {
        let destination = destination.parse().unwrap();
        self.entries.values().find(|entry| entry.spoken_to.contains_key(&destination)).unwrap().outside
    }
}
