//! One peer as this node sees it: its record judged against ours, everyone else's and the local network.
//!
//! A pure function of settings, members and the underlay. Prefix owners are the same on every node: the smallest claim
//! (announced since, then node id) among live members. Only what concerns the local network differs from node to node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mesh_common::addr::{self, Claim, PrefixRefusal};
use mesh_common::id::NodeId;
use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;

use crate::device::UnderlayLink;
use crate::mesh::members::{Member, Members};
use crate::mesh::settings::Settings;
use crate::wire::record::{Candidate, CandidateKind};

/// A member as a WireGuard neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub node: NodeId,
    pub key: WgPublicKey,
    pub overlay_v6: Ipv6Addr,
    /// Its IPv4 address, unless an older claim holds it.
    pub overlay_v4: Option<Ipv4Addr>,
    /// Everything it announces, with what became of it.
    pub prefixes: Vec<(IpNet, Verdict)>,
    /// Where it may be reached, best first.
    pub candidates: Vec<Candidate>,
    /// Which start of its agent the record is of.
    pub instance: [u8; 16],
}

impl Peer {
    /// The prefixes that are routed to it, overlay addresses included.
    pub fn routed(&self) -> BTreeSet<IpNet> {
        let overlay = [Some(IpAddr::V6(self.overlay_v6)), self.overlay_v4.map(IpAddr::V4)];
        let announced = self.prefixes.iter().filter(|(_, verdict)| *verdict == Verdict::Routed);
        overlay.into_iter().flatten().map(IpNet::from).chain(announced.map(|(prefix, _)| *prefix)).collect()
    }
}

/// What becomes of an announced prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Routed,
    /// It lies inside a subnet this node is connected to: reached there, not through the mesh.
    LocalOverlap {
        subnet: IpNet,
        link: String,
    },
    /// An older claim holds it.
    OwnedBy(NodeId),
    Refused(PrefixRefusal),
    /// It lies inside the overlay's own address space.
    OverlaySpace,
    /// It would hide a peer's endpoint behind a strict reverse path filter that may not be loosened.
    RpFilter {
        link: String,
    },
}

/// Facts that peers are judged by.
#[derive(Debug)]
pub struct Surroundings<'a> {
    pub settings: &'a Settings,
    pub members: &'a Members,
    pub own: NodeId,
    pub own_overlay_v4: Option<(Ipv4Addr, Claim)>,
    /// What this node announces itself, since when (unix milliseconds).
    pub own_prefixes: &'a BTreeMap<IpNet, u64>,
    pub underlay: &'a [UnderlayLink],
    /// Underlay links whose strict filter could not be loosened.
    pub rp_filter_denied: &'a BTreeSet<String>,
    /// Sockets that are no peer's: those of discovery servers, and where they see our own.
    pub taken_sockets: BTreeSet<SocketAddr>,
    pub now: Instant,
}

impl Surroundings<'_> {
    /// Judges every member.
    pub fn peers(&self) -> Vec<Peer> {
        let shared = Shared {
            prefix_owners: self.prefix_owners(),
            v4_owners: self.v4_owners(),
            overlay_space: self.overlay_space(),
            own_addresses: self.own_addresses(),
        };
        let mut peers: Vec<_> = self.members.iter().map(|(node, member)| self.peer(*node, member, &shared)).collect();
        self.refuse_captured_endpoints(&mut peers);
        peers
    }

    fn peer(&self, node: NodeId, member: &Member, shared: &Shared) -> Peer {
        let record = &member.record;
        // Only the pool is free for the taking: any other address has an owner, announced or not.
        let in_pool = |addr: &Ipv4Addr| self.settings.overlay_v4_pool.contains(addr);
        let overlay_v4 = record.overlay_v4.map(|overlay| overlay.addr).filter(in_pool);
        let is_owner = |addr: &Ipv4Addr| shared.v4_owners.get(addr).is_some_and(|claim| claim.node == node);
        let overlay_v4 = overlay_v4.filter(is_owner);
        let announced: BTreeSet<IpNet> = record.prefixes.iter().map(|claim| claim.prefix).collect();
        Peer {
            node,
            key: record.wg_key,
            overlay_v6: record.overlay_v6,
            overlay_v4: overlay_v4.filter(|addr| self.local_overlap(IpNet::from(IpAddr::V4(*addr))).is_none()),
            prefixes: announced.into_iter().map(|prefix| (prefix, self.verdict(prefix, node, shared))).collect(),
            candidates: self.rank(&record.candidates, &shared.own_addresses, &shared.overlay_space),
            instance: record.instance,
        }
    }

    fn verdict(&self, prefix: IpNet, node: NodeId, shared: &Shared) -> Verdict {
        if let Err(refusal) = addr::check_prefix(prefix, self.settings.allow_wide_prefixes) {
            return Verdict::Refused(refusal);
        }
        if shared.overlay_space.iter().any(|space| space.contains(&prefix)) {
            return Verdict::OverlaySpace;
        }
        // What the operator wrote down for a static peer is not up for announcement.
        if self.settings.static_peers.iter().any(|peer| peer.allowed_ips.contains(&prefix)) {
            return Verdict::OwnedBy(self.own);
        }
        match shared.prefix_owners.get(&prefix) {
            Some(claim) if claim.node != node => return Verdict::OwnedBy(claim.node),
            _ => {}
        }
        match self.local_overlap(prefix) {
            Some((subnet, link)) => Verdict::LocalOverlap { subnet, link },
            None => Verdict::Routed,
        }
    }

    /// The smallest claim on every announced prefix, ours included. Members that are gone count only where nobody else
    /// announces the same.
    fn prefix_owners(&self) -> BTreeMap<IpNet, Claim> {
        let own = self.own_prefixes.iter().map(|(prefix, since)| (true, *prefix, self.own_claim(*since)));
        let others = self.members.iter().flat_map(|(node, member)| {
            let live = member.is_live(self.now);
            member.record.prefixes.iter().map(move |announced| {
                (live, announced.prefix, Claim { claimed_at_ms: announced.since_ms, node: *node })
            })
        });
        smallest_claims(own.chain(others))
    }

    fn v4_owners(&self) -> BTreeMap<Ipv4Addr, Claim> {
        let own = self.own_overlay_v4.map(|(addr, claim)| (true, addr, claim));
        let others = self.members.iter().filter_map(|(node, member)| {
            let overlay = member.record.overlay_v4?;
            let claim = Claim { claimed_at_ms: overlay.claimed_at_ms, node: *node };
            Some((member.is_live(self.now), overlay.addr, claim))
        });
        smallest_claims(own.into_iter().chain(others))
    }

    fn own_claim(&self, since_ms: u64) -> Claim {
        Claim { claimed_at_ms: since_ms, node: self.own }
    }

    fn overlay_space(&self) -> [IpNet; 2] {
        let mut prefix = [0; 16];
        prefix[..8].copy_from_slice(&addr::overlay_v6_prefix(&self.settings.cluster_id));
        let ula = Ipv6Net::new(Ipv6Addr::from(prefix), 64).expect("64 is a prefix length");
        [IpNet::V4(self.settings.overlay_v4_pool.trunc()), IpNet::V6(ula)]
    }

    /// The connected subnet that holds this prefix.
    fn local_overlap(&self, prefix: IpNet) -> Option<(IpNet, String)> {
        self.connected().find(|(subnet, _)| subnet.contains(&prefix)).map(|(subnet, link)| (subnet, link.to_owned()))
    }

    /// Subnets this node is connected to. A host address is no subnet.
    fn connected(&self) -> impl Iterator<Item = (IpNet, &str)> {
        self.underlay.iter().flat_map(|link| {
            let subnets = link.addresses.iter().filter(|net| net.prefix_len() < net.max_prefix_len());
            subnets.map(|net| (net.trunc(), link.name.as_str()))
        })
    }

    /// Of a subnet this node is connected to.
    fn is_broadcast(&self, addr: IpAddr) -> bool {
        let holds_hosts = |subnet: &IpNet| subnet.addr().is_ipv4() && subnet.prefix_len() < 31;
        self.connected().any(|(subnet, _)| holds_hosts(&subnet) && subnet.broadcast() == addr)
    }

    /// Those of a peer's candidates that may be tried from here, best first: addresses that packets can go to, that are no
    /// node's of the overlay, not our own and no server's, and that the operator's filter lets through.
    pub fn usable_candidates(&self, candidates: &[Candidate]) -> Vec<Candidate> {
        self.rank(candidates, &self.own_addresses(), &self.overlay_space())
    }

    fn own_addresses(&self) -> BTreeSet<IpAddr> {
        self.underlay.iter().flat_map(|link| link.addresses.iter().map(IpNet::addr)).collect()
    }

    fn rank(&self, candidates: &[Candidate], own: &BTreeSet<IpAddr>, overlay: &[IpNet; 2]) -> Vec<Candidate> {
        let usable = |at: &SocketAddr| {
            at.port() != 0
                && addr::is_routable(at.ip())
                && !own.contains(&at.ip())
                && !overlay.iter().any(|space| space.contains(&at.ip()))
                && !self.taken_sockets.contains(at)
                && self.settings.endpoint_filter.passes(at.ip())
                && !self.is_broadcast(at.ip())
        };
        let rank = |candidate: &Candidate| {
            let on_link = self.connected().any(|(subnet, _)| subnet.contains(&candidate.addr.ip()));
            let kind = match candidate.kind {
                CandidateKind::Static => 0,
                CandidateKind::Host => 1,
                CandidateKind::Mapped => 2,
                CandidateKind::Reflexive => 3,
            };
            (!on_link, kind, candidate.addr)
        };
        let mut ranked: Vec<Candidate> = candidates.to_vec();
        ranked.retain(|candidate| usable(&candidate.addr));
        ranked.sort_by_key(rank);
        let mut seen = BTreeSet::new();
        ranked.retain(|candidate| seen.insert(candidate.addr));
        ranked
    }

    /// A prefix that covers an endpoint makes the answers of that endpoint fail a strict reverse path filter.
    fn refuse_captured_endpoints(&self, peers: &mut [Peer]) {
        let Some(link) = self.rp_filter_denied.first() else {
            return;
        };
        let endpoints: BTreeSet<IpAddr> = peers
            .iter()
            .flat_map(|peer| &peer.candidates)
            .map(|candidate| candidate.addr.ip())
            .filter(IpAddr::is_ipv4)
            .collect();
        for (prefix, verdict) in peers.iter_mut().flat_map(|peer| &mut peer.prefixes) {
            if *verdict == Verdict::Routed && endpoints.iter().any(|endpoint| prefix.contains(endpoint)) {
                *verdict = Verdict::RpFilter { link: link.clone() };
            }
        }
    }
}

/// What judging one member needs of all of them.
struct Shared {
    prefix_owners: BTreeMap<IpNet, Claim>,
    v4_owners: BTreeMap<Ipv4Addr, Claim>,
    overlay_space: [IpNet; 2],
    own_addresses: BTreeSet<IpAddr>,
}

/// Live claims first, then the smallest.
fn smallest_claims<K: Ord>(claims: impl Iterator<Item = (bool, K, Claim)>) -> BTreeMap<K, Claim> {
    let mut best: BTreeMap<K, (bool, Claim)> = BTreeMap::new();
    for (live, key, claim) in claims {
        let entry = best.entry(key).or_insert((live, claim));
        if (!live, claim) < (!entry.0, entry.1) {
            *entry = (live, claim);
        }
    }
    best.into_iter().map(|(key, (_, claim))| (key, claim)).collect()
}

/// The first choice of overlay IPv4 address of a node that no live member holds. `None` when the pool is as good as full.
pub fn choose_overlay_v4(pool: Ipv4Net, members: &Members, own: &NodeId, now: Instant) -> Option<Ipv4Addr> {
    let taken: BTreeSet<Ipv4Addr> = members
        .iter()
        .filter(|(_, member)| member.is_live(now))
        .filter_map(|(_, member)| member.record.overlay_v4.map(|overlay| overlay.addr))
        .collect();
    let attempts = 4 * u32::try_from(taken.len()).unwrap_or(u32::MAX / 4) + 64;
    (0..attempts).filter_map(|attempt| addr::overlay_v4_choice(pool, own, attempt)).find(|addr| !taken.contains(addr))
}
