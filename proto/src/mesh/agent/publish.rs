//! Our own record: when it is due, what it says, and who has stored it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::addr;
use mesh_common::id::ServerId;
use mesh_common::limits::{MAX_CANDIDATES, MAX_PREFIXES, RECORD_REFRESH, RECORD_VALID_FOR, SLOT_TTL};
use mesh_common::time::Instant;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::{Agent, AgentEvent};
use crate::device::Family;
use crate::mesh::peer::Verdict;
use crate::sealed;
use crate::wire::frame::Frame;
use crate::wire::record::{Candidate, CandidateKind, OverlayV4, PrefixClaim, Record};

/// Changes within this long of the last publication wait: a flapping link costs the mesh one record a second.
const PUBLISH_PAUSE: Duration = Duration::from_secs(1);
/// The same beside a clone: each answers what the other publishes.
const CLONE_PAUSE: Duration = Duration::from_secs(30);
/// How long after its last stored moment a node that was away still owns its prefixes. Servers list it for this long after
/// its last session, so nobody else can have been the owner in between; later somebody may, and runs.
const INCUMBENCY: Duration = SLOT_TTL;
/// While a prefix is contested, that we announce it is stored with every look at the host, but not more often than this.
const STORE_PAUSE: Duration = Duration::from_secs(15);

/// This node's overlay IPv4 address and since when it holds it (unix milliseconds).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnClaim {
    pub addr: Ipv4Addr,
    pub claimed_at_ms: u64,
}

/// What this node announced, each prefix since when, and when it last was stored that it does (unix milliseconds).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announced {
    pub since_ms: BTreeMap<IpNet, u64>,
    pub at_ms: u64,
}

impl Announced {
    /// What a node that starts now still holds of it.
    pub(super) fn held_at(self, unix_ms: u64) -> BTreeMap<IpNet, u64> {
        let away = Duration::from_millis(unix_ms.saturating_sub(self.at_ms));
        if away < INCUMBENCY { self.since_ms } else { BTreeMap::new() }
    }
}

#[derive(Debug)]
pub(super) struct Publisher {
    last_seq: u64,
    pub(super) claim: Option<OwnClaim>,
    /// The number that the shell is writing to disk.
    reserving: Option<u64>,
    published: Option<Published>,
    again_at: Option<Instant>,
}

#[derive(Debug)]
struct Published {
    frame: Frame,
    /// `None` = the farewell.
    record: Option<Record>,
    at: Instant,
    /// Since then nothing new goes out for this long.
    pause: Duration,
    stored_by: BTreeSet<ServerId>,
}

impl Publisher {
    pub(super) fn new(last_seq: u64, claim: Option<OwnClaim>) -> Self {
        Self { last_seq, claim, reserving: None, published: None, again_at: None }
    }

    pub(super) fn frame(&self) -> Option<&Frame> {
        self.published.as_ref().map(|published| &published.frame)
    }

    /// A number of ours that we do not know of is out there: ours go on after it.
    pub(super) fn jump_past(&mut self, seq: u64) {
        self.last_seq = self.last_seq.max(seq);
    }

    pub(super) fn handle_stored(&mut self, server: ServerId, seq: u64) {
        if let Some(published) = self.published.as_mut().filter(|published| published.frame.seq() == seq) {
            published.stored_by.insert(server);
        }
    }

    /// Whether the farewell is out and all of these servers have it.
    pub(super) fn is_stored_by(&self, servers: &BTreeSet<ServerId>) -> bool {
        let farewell = self.published.as_ref().filter(|published| published.record.is_none());
        farewell.is_some_and(|published| servers.is_subset(&published.stored_by))
    }

    pub(super) fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        self.again_at.map(|at| (at, "publish the own record"))
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.again_at.is_some_and(|at| now >= at)
    }

    /// The sequence number of the newest frame that is out.
    pub(super) fn published_seq(&self) -> Option<u64> {
        self.frame().map(Frame::seq)
    }
}

impl Agent {
    pub(super) fn publish_if_changed(&mut self, now: Instant) {
        self.publisher.again_at = None;
        if self.observed.is_none() || self.leaving.is_some() || self.publisher.reserving.is_some() {
            return;
        }
        if self.publisher.claim.is_none() && !self.may_claim(now) {
            return;
        }
        let record = self.record(now);
        let last_seq = self.publisher.last_seq;
        match &self.publisher.published {
            Some(published) if published.record.as_ref() == Some(&record) && published.frame.seq() == last_seq => {
                let refresh_at = published.at + RECORD_REFRESH;
                if now < refresh_at {
                    self.publisher.again_at = Some(refresh_at);
                    return;
                }
            }
            Some(published) if now < published.at + published.pause => {
                self.publisher.again_at = Some(published.at + published.pause);
                return;
            }
            _ => {}
        }
        self.reserve_seq(now);
    }

    pub(super) fn reserve_seq(&mut self, now: Instant) {
        let seq = (self.publisher.last_seq + 1).max(self.unix_ms(now));
        self.publisher.reserving = Some(seq);
        self.events.push_back(AgentEvent::ReserveSeq(seq));
    }

    pub(super) fn seal_and_publish(&mut self, seq: u64, now: Instant) {
        if self.publisher.reserving.take_if(|reserving| *reserving == seq).is_none() {
            return;
        }
        if seq <= self.publisher.last_seq {
            // Somebody went beyond it meanwhile.
            return self.reserve_seq(now);
        }
        self.publisher.last_seq = seq;
        self.members.set_own_seq(seq);
        let record = self.leaving.is_none().then(|| self.record(now));
        let nonce = self.nonces.next();
        let frame = match sealed::seal(&self.keys, &self.identity, seq, record.as_ref(), nonce) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::error!(%error, "our record cannot be sealed");
                return;
            }
        };
        for client in self.clients.values_mut() {
            client.publish(frame.clone(), now);
        }
        let first = self.publisher.published.is_none();
        if first && let Some(record) = &record {
            tracing::info!(
                overlay_v6 = %record.overlay_v6,
                candidates = record.candidates.len(),
                prefixes = record.prefixes.len(),
                "published our record"
            );
        }
        self.publisher.again_at = record.as_ref().map(|_| now + RECORD_REFRESH);
        let pause = if self.clone_seen { CLONE_PAUSE } else { PUBLISH_PAUSE };
        self.publisher.published = Some(Published { frame, record, at: now, pause, stored_by: BTreeSet::new() });
    }

    /// Keeps since when each prefix is announced, over a restart too; new ones since now.
    pub(super) fn set_own_prefixes(&mut self, now: Instant) {
        let since = self.unix_ms(now);
        // What is configured comes first: addresses are what a record can do without.
        let addresses = self.host_addresses().map(IpNet::from).filter(|_| self.settings.advertise_node_addresses);
        let mut seen = BTreeSet::new();
        let prefixes = self.settings.prefixes.iter().copied().chain(addresses);
        let prefixes: Vec<IpNet> = prefixes.filter(|prefix| seen.insert(*prefix)).take(MAX_PREFIXES).collect();
        let before = std::mem::take(&mut self.own_prefixes);
        let with_since = |prefix: IpNet| {
            let before = before.get(&prefix).or_else(|| self.last_run_prefixes.get(&prefix));
            (prefix, before.copied().unwrap_or(since))
        };
        self.own_prefixes = prefixes.into_iter().map(with_since).collect::<BTreeMap<_, _>>();
        // Without the host's addresses it is not known yet what is announced no longer.
        if self.observed.is_some() && self.leaving.is_none() {
            self.last_run_prefixes.clear();
            if self.announced() != Some(&self.own_prefixes) {
                self.store_announced(self.own_prefixes.clone(), now);
            }
        }
    }

    /// When we were last there matters only while somebody else wants a prefix of ours: without, a disk may rest.
    pub(super) fn store_announced_if_contested(&mut self, now: Instant) {
        let is_ours = |(prefix, _): &(IpNet, Verdict)| self.own_prefixes.contains_key(prefix);
        let is_old = self.stored_prefixes.as_ref().is_some_and(|(_, at)| now.since(*at) >= STORE_PAUSE);
        if is_old && self.peers.iter().flat_map(|peer| &peer.prefixes).any(is_ours) {
            self.store_announced(self.own_prefixes.clone(), now);
        }
    }

    pub(super) fn store_announced(&mut self, since_ms: BTreeMap<IpNet, u64>, now: Instant) {
        self.stored_prefixes = Some((since_ms.clone(), now));
        self.events.push_back(AgentEvent::StoreAnnounced(since_ms));
    }

    fn record(&mut self, now: Instant) -> Record {
        self.set_own_prefixes(now);
        Record {
            wg_key: self.wg_public,
            wg_proof: self.wg_proof,
            host_name: self.settings.host_name.clone(),
            overlay_v6: self.overlay_v6(),
            overlay_v4: self
                .publisher
                .claim
                .map(|claim| OverlayV4 { addr: claim.addr, claimed_at_ms: claim.claimed_at_ms }),
            prefixes: self
                .own_prefixes
                .iter()
                .map(|(prefix, since_ms)| PrefixClaim { prefix: *prefix, since_ms: *since_ms })
                .collect(),
            excluded_prefixes: Vec::new(),
            candidates: self.candidates(),
            nat_v4: self.net.report().v4.nat,
            nat_v6: self.net.report().v6.nat,
            instance: self.instance,
            started_at_ms: self.started.1,
            valid_for: RECORD_VALID_FOR,
            wire_min: 1,
            wire_max: 1,
            features: 0,
            admission: Vec::new(),
            ext: Vec::new(),
        }
    }

    /// Own addresses with the WireGuard port, where servers see us, and what the router leads here.
    pub(super) fn candidates(&self) -> Vec<Candidate> {
        let own: BTreeSet<IpAddr> = self.underlay().iter().flat_map(|link| &link.addresses).map(IpNet::addr).collect();
        let seen = Family::ALL.into_iter().flat_map(|family| self.seen_from_outside(family));
        let seen = seen.filter(|at| addr::is_routable(at.ip()) && !own.contains(&at.ip()));
        let host = self.host_addresses().map(|addr| SocketAddr::new(addr, self.settings.listen_port));
        // What opens a NAT comes first where there are too many.
        let mapped = self.mapper.announced().into_iter().map(|addr| Candidate { kind: CandidateKind::Mapped, addr });
        let all = mapped.chain(seen.map(|addr| Candidate { kind: CandidateKind::Reflexive, addr }));
        let all = all.chain(host.map(|addr| Candidate { kind: CandidateKind::Host, addr }));
        let all = all.filter(|candidate| self.settings.endpoint_filter.passes(candidate.addr.ip()));
        let mut known = BTreeSet::new();
        let all = all.filter(|candidate| known.insert(candidate.addr)).take(MAX_CANDIDATES);
        all.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// What STUN told. Until it did, and where each destination sees another port, the port may be the same outside.
    fn seen_from_outside(&self, family: Family) -> Vec<SocketAddr> {
        let port = self.settings.listen_port;
        let net = self.net.report().family(family);
        let mapping = net.nat.mapping;
        if net.reflexive.is_empty() {
            let seen = self.server_facts.values().filter_map(|facts| facts.observed).map(|at| at.ip().to_canonical());
            let seen: BTreeSet<IpAddr> = seen.filter(|addr| Family::of(*addr) == family).collect();
            seen.into_iter().map(|addr| SocketAddr::new(addr, port)).collect()
        } else if mapping.is_proven() && mapping.is_endpoint_dependent() {
            net.reflexive.iter().flat_map(|at| [*at, SocketAddr::new(at.ip(), port)]).collect()
        } else {
            net.reflexive.clone()
        }
    }

    /// Addresses of real interfaces that others may reach.
    fn host_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let real = self.underlay().iter().filter(|link| link.virtual_kind.is_none());
        real.flat_map(|link| link.addresses.iter().map(IpNet::addr)).filter(|addr| addr::is_routable(*addr))
    }
}

/// Fresh 24-byte nonces: SHA-256 over 32 random bytes of this start and a counter.
pub(super) struct Nonces {
    seed: Zeroizing<[u8; 32]>,
    counter: u64,
}

impl Nonces {
    pub(super) fn new(seed: [u8; 32]) -> Self {
        Self { seed: Zeroizing::new(seed), counter: 0 }
    }

    /// A seed for jitter.
    pub(super) fn seed(&self) -> u64 {
        let hash = self.hash(b"meshspan/v1 jitter", 0);
        u64::from_le_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
    }

    /// What STUN transactions are drawn from.
    pub(super) fn stun_seed(&self) -> [u8; 32] {
        self.hash(b"meshspan/v1 stun seed", 0)
    }

    /// Jitter of the port mapping's own, so that it leaves that of others as it was.
    pub(super) fn mapper_seed(&self) -> u64 {
        let hash = self.hash(b"meshspan/v1 mapper jitter", 0);
        u64::from_le_bytes([hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7]])
    }

    pub(super) fn next(&mut self) -> [u8; 24] {
        self.counter += 1;
        let hash = self.hash(b"meshspan/v1 nonce", self.counter);
        let mut nonce = [0; 24];
        nonce.copy_from_slice(&hash[..24]);
        nonce
    }

    fn hash(&self, label: &[u8], counter: u64) -> [u8; 32] {
        let hash = Sha256::new().chain_update(label).chain_update(self.seed.as_slice());
        hash.chain_update(counter.to_le_bytes()).finalize().into()
    }
}

impl std::fmt::Debug for Nonces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nonces(hidden)")
    }
}
