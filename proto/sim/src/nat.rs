//! What a NAT or a firewall does to UDP: mapping, filtering, expiry, hairpin and forwarded ports, in the words of RFC 4787.
//!
//! A pure machine on (source, destination, now). IPv4 is translated to one outer address; IPv6 passes untranslated and is
//! only filtered. Filtering is per internal endpoint as in RFC 4787, section 5: what that endpoint sent through any of its
//! mappings opens them all. Who is behind and before it is for [`crate::internet`] to know.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_common::time::Instant;
use mesh_proto::random::SplitMix64;

/// External ports that are drawn come from here.
const DRAWN_PORTS: std::ops::Range<u16> = 20_000..60_000;
/// How long a router that answers for itself remembers a datagram that no mapping wanted.
const KNOCK_MEMORY: Duration = Duration::from_secs(30);

/// What of the remote end makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dependence {
    EndpointIndependent,
    AddressDependent,
    AddressAndPortDependent,
}

impl Dependence {
    pub const ALL: [Self; 3] = [Self::EndpointIndependent, Self::AddressDependent, Self::AddressAndPortDependent];
}

/// Mapping and filtering: the class of a NAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct NatKind {
    pub mapping: Dependence,
    pub filtering: Dependence,
}

impl NatKind {
    /// No NAT at all, or one that is as good as none.
    pub const OPEN: Self =
        Self { mapping: Dependence::EndpointIndependent, filtering: Dependence::EndpointIndependent };

    pub fn all() -> impl Iterator<Item = Self> {
        Dependence::ALL.into_iter().flat_map(|mapping| Dependence::ALL.map(|filtering| Self { mapping, filtering }))
    }

    pub fn name(self) -> &'static str {
        use Dependence::{AddressAndPortDependent as Port, AddressDependent as Address, EndpointIndependent as None};
        match (self.mapping, self.filtering) {
            (None, None) => "eim-eif",
            (None, Address) => "eim-adf",
            (None, Port) => "eim-apdf",
            (Address, None) => "adm-eif",
            (Address, Address) => "adm-adf",
            (Address, Port) => "adm-apdf",
            (Port, None) => "apdm-eif",
            (Port, Address) => "apdm-adf",
            (Port, Port) => "apdm-apdf",
        }
    }
}

/// How external ports are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortChoice {
    /// The internal port while it is free.
    Preserving,
    /// One after the other.
    Sequential,
    Random,
}

/// What a router does, for its whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NatPlan {
    pub kind: NatKind,
    pub ports: PortChoice,
    /// What is unused for this long is forgotten.
    pub expiry: Duration,
    /// Inbound datagrams keep a mapping alive too; outbound ones always do.
    pub inbound_refreshes: bool,
    /// A datagram from inside to an external endpoint of this router comes back in.
    pub hairpins: bool,
    /// An inbound datagram that no mapping wants is remembered as the router's own flow; a later outbound one between the
    /// same endpoints then gets another port (Linux without a drop policy on INPUT).
    pub renumbers_after_knock: bool,
}

#[derive(Debug)]
pub struct Nat {
    plan: NatPlan,
    outer: Ipv4Addr,
    blocks_udp: bool,
    random: SplitMix64,
    next_port: u16,
    mappings: BTreeMap<MappingKey, Mapping>,
    by_port: BTreeMap<u16, MappingKey>,
    /// When each internal endpoint last used its way to a remote one.
    sessions: BTreeMap<(SocketAddr, SocketAddr), Instant>,
    forwarded: BTreeMap<u16, SocketAddr>,
    knocks: BTreeMap<(u16, SocketAddr), Instant>,
}

/// An internal endpoint and as much of the remote one as the mapping depends on.
type MappingKey = (SocketAddr, Option<IpAddr>, Option<u16>);

#[derive(Debug)]
struct Mapping {
    port: u16,
    used: Instant,
}

impl Nat {
    pub fn new(plan: NatPlan, outer: Ipv4Addr, seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        Self {
            plan,
            outer,
            blocks_udp: false,
            next_port: DRAWN_PORTS.start + random.below(1000) as u16,
            random,
            mappings: BTreeMap::new(),
            by_port: BTreeMap::new(),
            sessions: BTreeMap::new(),
            forwarded: BTreeMap::new(),
            knocks: BTreeMap::new(),
        }
    }

    pub fn plan(&self) -> &NatPlan {
        &self.plan
    }

    pub fn outer(&self) -> Ipv4Addr {
        self.outer
    }

    pub fn blocks_udp(&self) -> bool {
        self.blocks_udp
    }

    pub fn block_udp(&mut self, blocks: bool) {
        self.blocks_udp = blocks;
    }

    /// Whether a port of this router always leads to this internal endpoint.
    pub fn forwards_to(&self, internal: SocketAddr) -> bool {
        self.forwarded.values().any(|target| *target == internal)
    }

    /// A port mapping: the external port belongs to this internal endpoint both ways, whoever asks.
    pub fn forward(&mut self, port: u16, internal: SocketAddr) {
        self.forwarded.insert(port, internal);
    }

    /// The external port is nobody's any more.
    pub fn withdraw(&mut self, port: u16) {
        self.forwarded.remove(&port);
    }

    /// The router forgets all flows and its outer address becomes this one. Ports are chosen anew: none is preserved.
    pub fn rebind(&mut self, outer: Ipv4Addr) {
        self.outer = outer;
        self.plan.ports = PortChoice::Random;
        self.mappings.clear();
        self.by_port.clear();
        self.sessions.clear();
        self.knocks.clear();
    }

    /// A datagram from inside: its source as the outside sees it. `None` = it does not pass.
    pub fn outbound(&mut self, source: SocketAddr, destination: SocketAddr, now: Instant) -> Option<SocketAddr> {
        if self.blocks_udp {
            return None;
        }
        self.forget_expired(now);
        self.sessions.insert((source, destination), now);
        if source.is_ipv6() {
            return Some(source);
        }
        let forwarded = self.forwarded.iter().find(|(_, internal)| **internal == source).map(|(port, _)| *port);
        let port = forwarded.unwrap_or_else(|| self.mapped_port(source, destination, now));
        Some(SocketAddr::new(self.outer.into(), port))
    }

    /// A datagram from outside: where it goes inside. `None` = it does not pass.
    pub fn inbound(&mut self, source: SocketAddr, destination: SocketAddr, now: Instant) -> Option<SocketAddr> {
        if self.blocks_udp {
            return None;
        }
        self.forget_expired(now);
        if destination.is_ipv6() {
            return self.admits(destination, source, now).then_some(destination);
        }
        if let Some(internal) = self.forwarded.get(&destination.port()) {
            return Some(*internal);
        }
        let key = self.by_port.get(&destination.port()).copied().filter(|(internal, ..)| {
            let internal = *internal;
            self.admits(internal, source, now)
        });
        let Some(key) = key else {
            if self.plan.renumbers_after_knock {
                self.knocks.insert((destination.port(), source), now);
            }
            return None;
        };
        if self.plan.inbound_refreshes
            && let Some(mapping) = self.mappings.get_mut(&key)
        {
            mapping.used = now;
        }
        Some(key.0)
    }

    /// A datagram from inside to the router's own outer address: its new source, and where inside it goes.
    pub fn hairpin(
        &mut self,
        source: SocketAddr,
        destination: SocketAddr,
        now: Instant,
    ) -> Option<(SocketAddr, SocketAddr)> {
        if !self.plan.hairpins {
            return None;
        }
        let external = self.outbound(source, destination, now)?;
        let internal = self.inbound(external, destination, now)?;
        Some((external, internal))
    }

    /// Whether the filter lets this remote endpoint through to the internal one, and the session that says so lives on.
    fn admits(&mut self, internal: SocketAddr, remote: SocketAddr, now: Instant) -> bool {
        let lowest = SocketAddr::new(remote.ip(), 0);
        let highest = SocketAddr::new(remote.ip(), u16::MAX);
        let (first, last) = match self.plan.kind.filtering {
            Dependence::AddressAndPortDependent => (remote, remote),
            Dependence::AddressDependent => (lowest, highest),
            // Anybody, once there is a mapping; where nothing is mapped it is the firewall that is open.
            Dependence::EndpointIndependent => return true,
        };
        let mut sessions = self.sessions.range_mut((internal, first)..=(internal, last)).peekable();
        let admits = sessions.peek().is_some();
        if self.plan.inbound_refreshes {
            sessions.for_each(|(_, used)| *used = now);
        }
        admits
    }

    fn mapped_port(&mut self, source: SocketAddr, destination: SocketAddr, now: Instant) -> u16 {
        let exact = (source, Some(destination.ip()), Some(destination.port()));
        let key = match self.plan.kind.mapping {
            Dependence::EndpointIndependent => (source, None, None),
            Dependence::AddressDependent => (source, Some(destination.ip()), None),
            Dependence::AddressAndPortDependent => exact,
        };
        let usual = self.mappings.get(&key).map(|mapping| mapping.port);
        let wanted = usual.unwrap_or(source.port());
        // The flow that knocked holds this pair of endpoints: ours needs another port.
        let clashes = self.knocks.contains_key(&(wanted, destination)) || self.mappings.contains_key(&exact);
        let key = if clashes { exact } else { key };
        if let Some(mapping) = self.mappings.get_mut(&key) {
            mapping.used = now;
            return mapping.port;
        }
        let port = self.free_port(source.port(), clashes);
        self.mappings.insert(key, Mapping { port, used: now });
        self.by_port.insert(port, key);
        port
    }

    fn free_port(&mut self, internal: u16, clashes: bool) -> u16 {
        let is_taken = |nat: &Self, port| nat.by_port.contains_key(&port) || nat.forwarded.contains_key(&port);
        if self.plan.ports == PortChoice::Preserving && !clashes && !is_taken(self, internal) {
            return internal;
        }
        loop {
            let port = if self.plan.ports == PortChoice::Sequential {
                self.next_port =
                    if self.next_port + 1 < DRAWN_PORTS.end { self.next_port + 1 } else { DRAWN_PORTS.start };
                self.next_port
            } else {
                DRAWN_PORTS.start + self.random.below(u64::from(DRAWN_PORTS.end - DRAWN_PORTS.start)) as u16
            };
            if !is_taken(self, port) {
                return port;
            }
        }
    }

    fn forget_expired(&mut self, now: Instant) {
        let expiry = self.plan.expiry;
        let by_port = &mut self.by_port;
        self.mappings.retain(|_, mapping| {
            let is_live = now.since(mapping.used) < expiry;
            if !is_live {
                by_port.remove(&mapping.port);
            }
            is_live
        });
        self.sessions.retain(|_, used| now.since(*used) < expiry);
        self.knocks.retain(|_, at| now.since(*at) < KNOCK_MEMORY);
    }
}

#[cfg(test)]
mod tests;
