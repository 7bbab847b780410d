//! Paths as the machine drives them: which relays reach a peer, probes sealed and opened, calls filled in, the budget kept.
//!
//! Owns probe keys, replay windows and the node's probe budget. Which path is probed and when is
//! [`PathAgent`](crate::path::agent::PathAgent)'s to decide; nothing of a datagram is believed here before its key opened
//! it, its instance is the one of the peer's record or answered us, and its counter is new.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use mesh_common::id::{NodeId, ServerId};
use mesh_common::key::{ProbeKeys, WgPublicKey};
use mesh_common::limits::{PROBE_BURST, PROBE_INTERVAL};
use mesh_common::time::Instant;

use super::{Agent, AgentEvent, SETTLE, is_down};
use crate::device::Endpoint;
use crate::mesh::members::Admission;
use crate::path::agent::{PathAgent, ProbeTransmit};
use crate::path::replay::ReplayWindow;
use crate::wire::demux::{self, Datagram};
use crate::wire::frame;
use crate::wire::probe::{self, Opened, Probe};

/// Paths of many peers change together: routes follow once for all of them.
const MTU_SETTLE: Duration = Duration::from_millis(100);

/// A budget that is spent is looked at again when this many are earned, unless something else happens before.
const PROBES_A_WAKE: u32 = 4;

/// Keys of probes take a key agreement each (55 us): of many new peers so many are derived at once, and what else is to be
/// done comes between.
const KEYS_AT_ONCE: usize = 32;

/// Probes to and from all peers.
#[derive(Debug)]
pub(super) struct Probing {
    links: BTreeMap<WgPublicKey, Link>,
    by_tag: BTreeMap<[u8; 8], WgPublicKey>,
    /// Links whose keys are not derived yet.
    keyless: BTreeSet<WgPublicKey>,
    /// When the next of them are due.
    keys_at: Option<Instant>,
    budget: Budget,
    /// Paths that may have something to send; the others were asked since they last changed.
    pending: BTreeSet<WgPublicKey>,
    /// What a path has given and the budget had no room for.
    waiting: BTreeMap<WgPublicKey, ProbeTransmit>,
    /// Who was served last: a node with many peers probes them all alike.
    last_served: Option<WgPublicKey>,
    /// When the budget has room for those that wait.
    again_at: Option<Instant>,
    dropped: BTreeMap<Dropped, u64>,
}

/// The probe channel to one peer.
#[derive(Debug)]
struct Link {
    node: NodeId,
    /// Derived when the first probe goes out, or soon.
    keys: Option<ProbeKeys>,
    sent: u64,
    /// Which start of the peer's agent its record is of.
    recorded: [u8; 16],
    /// Which one the window is of: that, or one that answered us since.
    instance: [u8; 16],
    /// The one that spoke before it.
    ended: Option<[u8; 16]>,
    window: ReplayWindow,
    /// The sequence number of our frame that this peer was handed last.
    offered: Option<u64>,
}

/// Why a datagram that looked like one of ours was not believed: the name of its counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Dropped {
    #[error("probe_malformed")]
    Malformed,
    #[error("probe_unknown_key")]
    UnknownKey,
    #[error("probe_forged")]
    Forged,
    /// Of a start of the peer's agent whose record we do not have: its frame comes with its call.
    #[error("probe_unknown_instance")]
    UnknownInstance,
    #[error("probe_replayed")]
    Replayed,
    /// A relay says that it is from one node, its key that it is from another.
    #[error("probe_foreign_sender")]
    ForeignSender,
    #[error("relayed_unknown_sender")]
    UnknownSender,
    #[error("relayed_unknown_payload")]
    UnknownPayload,
}

impl Dropped {
    pub const ALL: [Self; 8] = [
        Self::Malformed,
        Self::UnknownKey,
        Self::Forged,
        Self::UnknownInstance,
        Self::Replayed,
        Self::ForeignSender,
        Self::UnknownSender,
        Self::UnknownPayload,
    ];
}

/// A burst of probes, then one each interval: whatever peers announce, this node sends no more.
#[derive(Debug)]
struct Budget {
    tokens: u32,
    refilled: Instant,
}

impl Probing {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            links: BTreeMap::new(),
            by_tag: BTreeMap::new(),
            keyless: BTreeSet::new(),
            keys_at: None,
            budget: Budget { tokens: PROBE_BURST, refilled: now },
            pending: BTreeSet::new(),
            waiting: BTreeMap::new(),
            last_served: None,
            again_at: None,
            dropped: BTreeMap::new(),
        }
    }

    pub(super) fn poll_timeout(&self) -> impl Iterator<Item = (Instant, &'static str)> {
        let budget = self.again_at.map(|at| (at, "the probe budget"));
        budget.into_iter().chain(self.keys_at.map(|at| (at, "the keys of probes")))
    }

    /// Every reason, also those that nothing was dropped for.
    pub(super) fn dropped(&self) -> impl Iterator<Item = (Dropped, u64)> {
        Dropped::ALL.into_iter().map(|why| (why, self.dropped.get(&why).copied().unwrap_or_default()))
    }

    fn count(&mut self, why: Dropped) {
        *self.dropped.entry(why).or_default() += 1;
    }
}

impl Link {
    /// From now on it is another start of the peer's agent that speaks.
    fn begin(&mut self, instance: [u8; 16]) {
        self.ended = Some(std::mem::replace(&mut self.instance, instance));
        self.window = ReplayWindow::default();
        self.offered = None;
    }
}

impl Budget {
    /// `None` when a probe may go out now, else when.
    fn wait(&mut self, now: Instant) -> Option<Instant> {
        let earned = now.since(self.refilled).as_nanos() / PROBE_INTERVAL.as_nanos();
        let room = PROBE_BURST - self.tokens;
        match u32::try_from(earned) {
            Ok(earned) if earned < room => {
                self.tokens += earned;
                self.refilled += PROBE_INTERVAL * earned;
            }
            _ => {
                self.tokens = PROBE_BURST;
                self.refilled = now;
            }
        }
        (self.tokens == 0).then(|| self.refilled + PROBE_INTERVAL * PROBES_A_WAKE)
    }

    fn take(&mut self) {
        self.tokens = self.tokens.saturating_sub(1);
    }
}

impl Agent {
    /// A probe or a STUN answer that came to the WireGuard port, or a probe that came to another socket of ours.
    pub fn handle_datagram(&mut self, source: Endpoint, bytes: &[u8], now: Instant) {
        match (demux::classify(bytes), source) {
            (Datagram::Probe, Endpoint::Direct(_) | Endpoint::Extra(..)) => self.handle_probe(source, None, bytes, now),
            (Datagram::Stun, Endpoint::Direct(source)) => self.net.handle_stun(source, bytes, now),
            _ => self.probing.count(Dropped::Malformed),
        }
        self.settle(now);
    }

    /// The message that carries a datagram of the data plane to a peer behind a relay; `None` while that relay does not.
    pub fn relay(&mut self, server: ServerId, peer: &WgPublicKey, datagram: &[u8], now: Instant) -> Option<Bytes> {
        let node = self.probing.links.get(peer)?.node;
        self.clients.get_mut(&server)?.relay(&node, datagram, now)
    }

    /// What a member sent us through a relay.
    pub(super) fn handle_relayed(&mut self, server: ServerId, from: NodeId, payload: Bytes, now: Instant) {
        if payload.starts_with(frame::MAGIC) {
            return self.handle_offered_frame(payload, now);
        }
        let Some(peer) = self.peers.iter().find(|peer| peer.node == from).map(|peer| peer.key) else {
            return self.probing.count(Dropped::UnknownSender);
        };
        match demux::classify(&payload) {
            Datagram::WireGuard(_) => self.events.push_back(AgentEvent::Relayed { server, peer, datagram: payload }),
            Datagram::Probe => self.handle_probe(Endpoint::Relay(server), Some(from), &payload, now),
            Datagram::Stun | Datagram::Unknown => self.probing.count(Dropped::UnknownPayload),
        }
    }

    /// A relay has no way to this node now.
    pub(super) fn handle_no_peer(&mut self, server: ServerId, node: NodeId, now: Instant) {
        let key = self.peers.iter().find(|peer| peer.node == node).map(|peer| peer.key);
        if let Some(key) = key {
            self.with_path(&key, now, |path| path.handle_no_peer(server, now));
        }
    }

    /// A peer hands us its own record: it learned of us before a server told us of it. Listing is the server's to do.
    fn handle_offered_frame(&mut self, bytes: Bytes, now: Instant) {
        if let Ok((node, Admission::New | Admission::Updated { .. } | Admission::Left)) = self.members.admit(bytes, now)
        {
            tracing::debug!(node = %node.short(), "a peer handed over its record");
            self.events.push_back(AgentEvent::StoreMembers);
            self.work_out_at(now + SETTLE);
        }
    }

    fn handle_probe(&mut self, from: Endpoint, sender: Option<NodeId>, bytes: &[u8], now: Instant) {
        let opened = self.open_probe(sender, bytes);
        match opened.and_then(|(peer, opened)| self.admit_probe(peer, from, opened, now)) {
            Ok((peer, probe)) => self.handle_authentic_probe(peer, from, probe, now),
            Err(why) => self.probing.count(why),
        }
    }

    fn open_probe(&mut self, sender: Option<NodeId>, bytes: &[u8]) -> Result<(WgPublicKey, Opened), Dropped> {
        let tag = probe::tag(bytes).ok_or(Dropped::Malformed)?;
        let peer = *self.probing.by_tag.get(&tag).ok_or(Dropped::UnknownKey)?;
        let link = self.probing.links.get(&peer).ok_or(Dropped::UnknownKey)?;
        if sender.is_some_and(|sender| sender != link.node) {
            return Err(Dropped::ForeignSender);
        }
        let keys = link.keys.as_ref().ok_or(Dropped::UnknownKey)?;
        let opened = probe::open(&keys.receive, bytes).map_err(|_| Dropped::Forged)?;
        Ok((peer, opened))
    }

    /// Whether a probe is new, and of a start of the peer's agent that is known.
    ///
    /// A peer that started anew while it reaches no server has nobody to tell us so. Its ping, which may be an old one of
    /// another start, is answered and believed nothing; its pong to a ping of ours can only be of now, and makes its start known,
    /// but that of the start before, which may have answered that ping too.
    fn admit_probe(
        &mut self,
        peer: WgPublicKey,
        from: Endpoint,
        opened: Opened,
        now: Instant,
    ) -> Result<(WgPublicKey, Probe), Dropped> {
        let link = self.probing.links.get_mut(&peer).ok_or(Dropped::UnknownKey)?;
        if opened.instance != link.instance {
            match opened.probe {
                Probe::Pong { id, .. }
                    if link.ended != Some(opened.instance)
                        && self.paths.get(&peer).is_some_and(|path| path.awaits(id)) =>
                {
                    tracing::debug!(%peer, "a peer answers that started anew");
                    link.begin(opened.instance);
                }
                Probe::Ping { id, .. } => {
                    self.with_path(&peer, now, |path| path.answer_unknown_start(from, id, now));
                    return Err(Dropped::UnknownInstance);
                }
                Probe::Pong { .. } | Probe::Call(_) => return Err(Dropped::UnknownInstance),
            }
        }
        if !link.window.accept(opened.counter) {
            return Err(Dropped::Replayed);
        }
        Ok((peer, opened.probe))
    }

    fn handle_authentic_probe(&mut self, peer: WgPublicKey, from: Endpoint, probe: Probe, now: Instant) {
        self.members.note_evidence(&peer, now);
        if let Probe::Pong { id, .. } = probe
            && self.handle_echo(&peer, id, from, now)
        {
            return;
        }
        let probe = match probe {
            Probe::Call(mut call) => {
                call.candidates = self.surroundings(now).usable_candidates(&call.candidates);
                Probe::Call(call)
            }
            other => other,
        };
        self.with_path(&peer, now, |path| path.handle_probe(from, &probe, now));
    }

    /// Keeps the paths' surroundings up to date: keys, relays, NAT classes.
    pub(super) fn sync_probing(&mut self, now: Instant) {
        let peers: BTreeMap<WgPublicKey, (NodeId, [u8; 16])> =
            self.peers.iter().map(|peer| (peer.key, (peer.node, peer.instance))).collect();
        let probing = &mut self.probing;
        probing.links.retain(|key, link| {
            let is_kept = peers.get(key).is_some_and(|(node, _)| *node == link.node);
            if !is_kept {
                probing.keyless.remove(key);
                if let Some(keys) = &link.keys {
                    probing.by_tag.remove(&keys.receive.tag);
                }
            }
            is_kept
        });
        for (key, (node, instance)) in &peers {
            match probing.links.get_mut(key) {
                Some(link) if link.recorded == *instance => {}
                Some(link) => {
                    link.recorded = *instance;
                    if link.instance != *instance {
                        link.begin(*instance);
                    }
                }
                None => {
                    let window = ReplayWindow::default();
                    let (recorded, instance) = (*instance, *instance);
                    let link = Link {
                        node: *node,
                        keys: None,
                        sent: 0,
                        recorded,
                        instance,
                        ended: None,
                        window,
                        offered: None,
                    };
                    probing.links.insert(*key, link);
                    probing.keyless.insert(*key);
                }
            }
        }
        self.derive_some_keys(now);
        self.sync_relays(now);
    }

    fn derive_some_keys(&mut self, now: Instant) {
        let some: Vec<WgPublicKey> = self.probing.keyless.iter().take(KEYS_AT_ONCE).copied().collect();
        some.iter().for_each(|peer| self.derive_keys(peer));
        self.probing.keys_at = (!self.probing.keyless.is_empty()).then_some(now);
    }

    fn derive_keys(&mut self, peer: &WgPublicKey) {
        if !self.probing.keyless.remove(peer) {
            return;
        }
        let Some(link) = self.probing.links.get_mut(peer) else { return };
        link.keys = self.keys.probe_keys((self.identity.node_id(), &self.wg), (link.node, *peer));
        match &link.keys {
            Some(keys) => drop(self.probing.by_tag.insert(keys.receive.tag, *peer)),
            // The key is one that nobody honest has: such a peer is never probed.
            None => drop(self.probing.links.remove(peer)),
        }
    }

    /// The keys of more new peers, when their time has come.
    pub(super) fn handle_keys_timeout(&mut self, now: Instant) {
        if self.probing.keys_at.is_some_and(|at| now >= at) {
            self.derive_some_keys(now);
        }
    }

    /// Tells every path what surrounds it: relays that reach its peer, our own candidates and subnets, the NATs of both.
    pub(super) fn sync_relays(&mut self, now: Instant) {
        let own = self.candidates();
        let subnets = self.connected_subnets();
        let nat = [self.net.report().v4.nat, self.net.report().v6.nat];
        for peer in &self.peers {
            let relays = self.relays_to(&peer.node);
            let Some(member) = self.members.get(&peer.node) else { continue };
            self.paths.with(&peer.key, |path| {
                path.handle_own_candidates(&own, now);
                path.handle_subnets(&subnets, now);
                path.handle_nat(nat, [member.record.nat_v4, member.record.nat_v6], now);
                path.handle_relays(&relays, now);
            });
            self.stirred.insert(peer.key);
        }
    }

    /// Tells the path to this node which relays reach it now.
    pub(super) fn sync_relays_to(&mut self, node: &NodeId, now: Instant) {
        let Some(key) = self.members.get(node).map(|member| member.record.wg_key) else { return };
        let relays = self.relays_to(node);
        if self.paths.with(&key, |path| path.handle_relays(&relays, now)).is_some() {
            self.stirred.insert(key);
        }
    }

    /// Servers that relay, hear us and list this node, in the order of the configuration.
    pub(super) fn relays_to(&self, node: &NodeId) -> Vec<ServerId> {
        let Some(member) = self.members.get(node) else { return Vec::new() };
        let offering = self.clients.iter().filter(|(_, client)| client.offers_relay());
        offering.map(|(server, _)| *server).filter(|server| member.listed_by.contains(server)).collect()
    }

    fn connected_subnets(&self) -> Vec<IpNet> {
        let addresses = self.underlay().iter().flat_map(|link| &link.addresses);
        addresses.filter(|net| net.prefix_len() < net.max_prefix_len()).map(IpNet::trunc).collect()
    }

    /// Seals and sends what the paths want to probe, in turns, as far as the budget goes; the rest waits for its turn.
    pub(super) fn send_probes(&mut self, now: Instant) {
        self.probing.again_at = None;
        self.probing.pending.extend(&self.stirred);
        let mut last = self.probing.last_served;
        while let Some(key) = self.next_in_turn(last) {
            last = Some(key);
            while let Some(transmit) = self.next_probe(&key) {
                if let Some(at) = self.probing.budget.wait(now) {
                    self.probing.again_at = Some(at);
                    self.probing.waiting.insert(key, transmit);
                    return;
                }
                self.probing.budget.take();
                self.probing.last_served = Some(key);
                self.send_probe(&key, transmit, now);
            }
            self.probing.pending.remove(&key);
        }
    }

    fn next_probe(&mut self, peer: &WgPublicKey) -> Option<ProbeTransmit> {
        self.probing.waiting.remove(peer).or_else(|| self.paths.poll_transmit(peer))
    }

    fn next_in_turn(&self, last: Option<WgPublicKey>) -> Option<WgPublicKey> {
        let pending = &self.probing.pending;
        let after = last.and_then(|last| pending.range((Bound::Excluded(last), Bound::Unbounded)).next());
        after.or_else(|| pending.first()).copied()
    }

    pub(super) fn send_probe(&mut self, peer: &WgPublicKey, transmit: ProbeTransmit, now: Instant) {
        let ProbeTransmit { to, probe, ttl, pad_to } = transmit;
        if matches!(probe, Probe::Call(_)) {
            self.offer_frame(peer, to, now);
        }
        let nonce = self.nonces.next();
        self.derive_keys(peer);
        let Some(link) = self.probing.links.get_mut(peer) else { return };
        let Some(keys) = &link.keys else { return };
        link.sent += 1;
        let bytes = probe::seal(&keys.send, &self.instance, link.sent, nonce, &probe, pad_to);
        match to {
            Endpoint::Direct(to) => self.events.push_back(AgentEvent::SendRaw { to, bytes, ttl }),
            Endpoint::Extra(socket, to) => self.events.push_back(AgentEvent::SendFrom { socket, to, bytes, ttl }),
            Endpoint::Relay(server) => {
                let node = link.node;
                let message = self.clients.get_mut(&server).and_then(|client| client.relay(&node, &bytes, now));
                if let Some(message) = message {
                    self.events.push_back(AgentEvent::SendRelay { server, message });
                }
            }
        }
    }

    /// With the first call to a start of a peer's agent goes our record: a server may not have told it of us yet.
    fn offer_frame(&mut self, peer: &WgPublicKey, to: Endpoint, now: Instant) {
        let (Endpoint::Relay(server), Some(frame)) = (to, self.publisher.frame()) else { return };
        let Some(link) = self.probing.links.get_mut(peer) else { return };
        if link.offered.replace(frame.seq()) == Some(frame.seq()) {
            return;
        }
        let message = self.clients.get_mut(&server).and_then(|client| client.relay(&link.node, frame.as_bytes(), now));
        if let Some(message) = message {
            self.events.push_back(AgentEvent::SendRelay { server, message });
        }
    }

    /// One input to a path, and the log line where it changes what the path is.
    pub(super) fn with_path(&mut self, peer: &WgPublicKey, now: Instant, input: impl FnOnce(&mut PathAgent)) {
        let judged = |path: &PathAgent| (path.state(now), path.mtu(), path.tunnel_generation());
        let judged = self.paths.with(peer, |path| {
            let before = judged(path);
            input(path);
            (before, judged(path))
        });
        let Some(((state_before, mtu_before, tunnel_before), (state, mtu, tunnel))) = judged else { return };
        self.stirred.insert(*peer);
        if state != state_before {
            self.log_path(peer, state);
        }
        if is_down(state) != self.down.contains(peer) || tunnel != tunnel_before {
            self.reconcile_at(now);
        } else if mtu != mtu_before {
            self.reconcile_at(now + MTU_SETTLE);
        }
    }
}
