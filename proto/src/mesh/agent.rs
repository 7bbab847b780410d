//! The composed machine of one node: sessions with servers, members, paths, and what should be on the host.
//!
//! Owns all policy of an agent that is switched on; an agent that is off has none of these. It never touches the host: it
//! gives [`AgentEvent`]s and learns what came of them. Built in two places, the shell and the simulator.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use mesh_common::addr;
use mesh_common::id::{NodeId, ServerId};
use mesh_common::key::{ClusterKeys, PresharedKey, SignKey, WgProof, WgPublicKey, WgSecret};
use mesh_common::limits::RECONCILE_INTERVAL;
use mesh_common::time::Instant;
use sha2::{Digest as _, Sha256};

use crate::device::{
    Action, Capabilities, Endpoint, Family, Observed, PeerReport, PeerRoute, Route, RouteKind, SocketId,
};
use crate::discovery::client::Client;
use crate::mesh::members::Members;
use crate::mesh::path_table::PathTable;
use crate::mesh::peer::Peer;
use crate::mesh::settings::Settings;
use crate::net::port_mapping::{MappingRequest, PortMapper};
use crate::net::report::NetReport;
use crate::path::agent::{PathAgent, PathEvent, PathPolicy, PathState};
use crate::path::hard::Turn;
use crate::random::SplitMix64;
use crate::wire::session::SessionError;

mod consequences;
mod echo;
mod guessing;
mod net;
mod paths;
mod port;
mod port_mapping;
mod publish;
mod sessions;
#[cfg(test)]
mod tests;
mod view;

pub use echo::{EchoError, EchoId, Via};
pub use paths::Dropped;
pub use publish::{Announced, OwnClaim};
pub use view::{PeerView, ServerView, View};

/// Records come in bursts: what follows from them is worked out once per burst.
const SETTLE: Duration = Duration::from_millis(5);
/// The same while a server tells all it lists: the end of that is worth waiting for, unless it is slow.
const LISTING_SETTLE: Duration = Duration::from_millis(200);
/// Pause after steps that failed on the host; doubles up to [`RECONCILE_INTERVAL`].
const RETRY_FAILED_STEPS: Duration = Duration::from_secs(1);
/// How long a floor of the last run waits for its member after the first snapshot: a server that restarted hears of a member
/// when that one notices (15 s at most) and has waited for its next attempt (30 s at most).
const ORPHAN_FLOOR_WAIT: Duration = Duration::from_secs(60);
/// How long a farewell waits for servers to store it.
const FAREWELL_WAIT: Duration = Duration::from_secs(2);
/// Peers that are greeted after a restart.
const MAX_WAKES: usize = 64;

/// What one start of an agent begins with.
#[derive(Debug)]
pub struct Start {
    pub keys: ClusterKeys,
    pub identity: SignKey,
    pub wg: WgSecret,
    /// Random per start.
    pub instance: [u8; 16],
    /// 32 random bytes: nonces and jitter are drawn from them.
    pub seed: [u8; 32],
    /// The wall clock at the start; sequence numbers begin here, nothing else is decided by it.
    pub unix_ms: u64,
    /// The highest sequence number ever reserved.
    pub last_seq: u64,
    pub claim: Option<OwnClaim>,
    pub announced: Announced,
    /// Highest sequence number seen of each node.
    pub marks: BTreeMap<NodeId, u64>,
    pub path_policy: PathPolicy,
    /// Frames of the last run's members, verbatim.
    pub frames: Vec<Bytes>,
}

/// What the shell has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentEvent {
    /// Open a carrier to this server; answer by `handle_connected` or `handle_disconnected`.
    Dial(ServerId),
    /// Send what is queued for this server, then close its carrier.
    HangUp(ServerId),
    /// Write this sequence number to disk, then call `handle_seq_reserved`.
    ReserveSeq(u64),
    /// Keep the overlay IPv4 address for the next start.
    StoreClaim(OwnClaim),
    /// Keep since when (unix milliseconds) each prefix is announced, and that it is announced now, for the next start.
    StoreAnnounced(BTreeMap<IpNet, u64>),
    /// Members changed: keep `frames()` and `marks()` for the next start.
    StoreMembers,
    SetRoute(WgPublicKey, PeerRoute),
    /// Send these bytes from the WireGuard port: a probe, or a question to a STUN server.
    SendRaw {
        to: SocketAddr,
        bytes: Bytes,
        /// The IP time to live, where it is not the host's own.
        ttl: Option<u8>,
    },
    /// Open sockets beside the main pair, then call `handle_sockets` with those that could be opened.
    OpenSockets {
        peer: WgPublicKey,
        family: Family,
        count: u16,
    },
    /// The same as [`Self::SendRaw`], from a socket that was opened for it.
    SendFrom {
        socket: SocketId,
        to: SocketAddr,
        bytes: Bytes,
        ttl: Option<u8>,
    },
    CloseSockets(Vec<SocketId>),
    /// Put this to the router, then call `handle_mapping`.
    MapPort(MappingRequest),
    /// Hand this message to the server's carrier, ahead of nothing: it may be lost like a datagram.
    SendRelay {
        server: ServerId,
        message: Bytes,
    },
    /// A datagram of this peer's tunnel came through a relay.
    Relayed {
        server: ServerId,
        peer: WgPublicKey,
        datagram: Bytes,
    },
    /// An echo was answered, from there and after this long.
    Echoed {
        echo: EchoId,
        from: Endpoint,
        rtt: Duration,
    },
    StartHandshake(WgPublicKey),
    /// Keep this UDP port in the place of the configured one and start anew with it; [`Agent::handle_port_taken`] when this
    /// host has no such port to give.
    MovePort(u16),
    /// Carry out these steps in order, then call `handle_applied`.
    Apply(Vec<Action>),
    /// The farewell is said and the host is clean: the machine has nothing left to do.
    Stopped,
}

#[derive(Debug)]
pub struct Agent {
    settings: Settings,
    keys: ClusterKeys,
    identity: SignKey,
    wg: WgSecret,
    wg_public: WgPublicKey,
    wg_proof: WgProof,
    instance: [u8; 16],
    started: (Instant, u64),
    random: SplitMix64,
    nonces: publish::Nonces,
    members: Members,
    clients: BTreeMap<ServerId, Client>,
    server_facts: BTreeMap<ServerId, ServerFacts>,
    net: NetReport,
    mapper: PortMapper,
    /// When a server first told all members it knows.
    synced_at: Option<Instant>,
    /// What stood on the host before the first step, without a member that accounts for it.
    orphan_floor: BTreeSet<Route>,
    paths: PathTable,
    path_policy: PathPolicy,
    device: Capabilities,
    /// Who of the paths may guess ports, and what the others were told.
    guessing_turns: (Option<WgPublicKey>, Turn),
    probing: paths::Probing,
    /// Paths that had an input since they were last drained.
    stirred: BTreeSet<WgPublicKey>,
    echoes: echo::Echoes,
    static_routes: BTreeMap<WgPublicKey, PeerRoute>,
    peers: Vec<Peer>,
    /// Derived once for each pair of keys.
    preshared_keys: BTreeMap<(WgPublicKey, NodeId), PresharedKey>,
    /// Peers that counted as down when the desired state was last worked out.
    down: BTreeSet<WgPublicKey>,
    observed: Option<Observed>,
    /// What is announced, since when.
    own_prefixes: BTreeMap<IpNet, u64>,
    /// The same of the last run, until the host's addresses are known.
    last_run_prefixes: BTreeMap<IpNet, u64>,
    /// What the shell was last asked to store of it in this run, and when.
    stored_prefixes: Option<(BTreeMap<IpNet, u64>, Instant)>,
    publisher: publish::Publisher,
    port_move: port::PortMove,
    rp_filter_denied: BTreeSet<String>,
    /// Steps are with the shell.
    applying: bool,
    last_steps: Option<Vec<Action>>,
    applied_once: bool,
    failed: BTreeMap<String, String>,
    retry_pause: Duration,
    retry_at: Option<Instant>,
    /// When what follows from new facts is to be worked out.
    due: Option<Instant>,
    /// The same for facts about the host and the paths alone: no member is judged anew for them.
    reconcile_due: Option<Instant>,
    next_tick: Instant,
    leaving: Option<Leaving>,
    clone_seen: bool,
    events: VecDeque<AgentEvent>,
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepError {
    /// For people: names the object and the fix.
    pub text: String,
    /// The host does not let us, and will not the next time either.
    pub not_permitted: bool,
}

/// What a server last told about us and itself.
#[derive(Debug, Clone, Default)]
struct ServerFacts {
    observed: Option<SocketAddr>,
    /// What its name resolved to.
    addresses: Vec<IpAddr>,
    stun_ports: Vec<u16>,
    stun_alt: Vec<SocketAddr>,
    /// And when it said so last.
    refused: Option<(SessionError, Instant)>,
    lost: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Leaving {
    /// Servers that have not stored the farewell by then go without it; `None` once that time has come.
    give_up_at: Option<Instant>,
    said: bool,
    stopped: bool,
}

impl Agent {
    pub fn new(settings: Settings, start: Start, now: Instant) -> Self {
        let own = start.identity.node_id();
        let mut members = Members::new(start.keys.clone(), settings.cluster_id.clone(), own, start.marks);
        members.set_own_seq(start.last_seq);
        members.set_denied(settings.deny_nodes.clone());
        let nonces = publish::Nonces::new(start.seed);
        let mapper = PortMapper::new(settings.port_mapping, pcp_nonce(&start.identity), nonces.mapper_seed());
        let mut agent = Self {
            settings,
            keys: start.keys,
            identity: start.identity,
            wg_public: start.wg.public(),
            wg_proof: start.wg.prove(&own),
            wg: start.wg,
            instance: start.instance,
            started: (now, start.unix_ms),
            random: SplitMix64::new(nonces.seed()),
            net: NetReport::new(nonces.stun_seed()),
            mapper,
            nonces,
            members,
            clients: BTreeMap::new(),
            server_facts: BTreeMap::new(),
            synced_at: None,
            orphan_floor: BTreeSet::new(),
            paths: PathTable::default(),
            path_policy: start.path_policy,
            device: Capabilities::USERSPACE,
            guessing_turns: (None, Turn::None),
            probing: paths::Probing::new(now),
            stirred: BTreeSet::new(),
            echoes: echo::Echoes::default(),
            static_routes: BTreeMap::new(),
            peers: Vec::new(),
            preshared_keys: BTreeMap::new(),
            down: BTreeSet::new(),
            observed: None,
            own_prefixes: BTreeMap::new(),
            last_run_prefixes: start.announced.held_at(start.unix_ms),
            stored_prefixes: None,
            publisher: publish::Publisher::new(start.last_seq, start.claim),
            port_move: port::PortMove::default(),
            rp_filter_denied: BTreeSet::new(),
            applying: false,
            last_steps: None,
            applied_once: false,
            failed: BTreeMap::new(),
            retry_pause: RETRY_FAILED_STEPS,
            retry_at: None,
            due: Some(now),
            reconcile_due: None,
            next_tick: now + RECONCILE_INTERVAL,
            leaving: None,
            clone_seen: false,
            events: VecDeque::new(),
        };
        for frame in start.frames {
            // A damaged or foreign frame in the cache is counted like any other.
            let _counted = agent.members.admit(frame, now);
        }
        agent.set_own_prefixes(now);
        agent.connect_servers(now);
        agent
    }

    pub fn node_id(&self) -> NodeId {
        self.identity.node_id()
    }

    pub fn overlay_v6(&self) -> Ipv6Addr {
        addr::overlay_v6(&self.settings.cluster_id, &self.identity.node_id())
    }

    pub fn overlay_v4(&self) -> Option<Ipv4Addr> {
        self.publisher.claim.map(|claim| claim.addr)
    }

    /// Whether any server hears us now.
    pub fn has_session(&self) -> bool {
        !self.connected().is_empty()
    }

    /// Where packets of this peer go now, for a device that has just learned of it.
    pub fn route_of(&self, key: &WgPublicKey) -> Option<&PeerRoute> {
        self.paths.get(key).map(PathAgent::route).or_else(|| self.static_routes.get(key))
    }

    pub fn members(&self) -> &Members {
        &self.members
    }

    /// What was last to be stored by [`AgentEvent::StoreAnnounced`], to be stored once more at a stop.
    pub fn announced(&self) -> Option<&BTreeMap<IpNet, u64>> {
        self.stored_prefixes.as_ref().map(|(since_ms, _)| since_ms)
    }

    /// Frames of all members, for the cache.
    pub fn frames(&self) -> Vec<Bytes> {
        self.members.iter().map(|(_, member)| member.frame.as_bytes().clone()).collect()
    }

    /// The operator changed the settings; identity and cluster stay.
    pub fn handle_settings(&mut self, settings: Settings, now: Instant) {
        // Who was denied is unknown by now: a new session brings the whole snapshot.
        let is_undenied = !settings.deny_nodes.is_superset(&self.settings.deny_nodes);
        let servers_changed = is_undenied || settings.servers != self.settings.servers;
        self.members.set_denied(settings.deny_nodes.clone());
        // A static peer whose endpoint was changed starts there anew; the others stay where they were heard last.
        let kept = |key: &WgPublicKey| {
            let endpoint = |settings: &Settings| {
                settings.static_peers.iter().find(|peer| peer.public_key == *key).map(|peer| peer.endpoint)
            };
            endpoint(&self.settings) == endpoint(&settings)
        };
        self.static_routes.retain(|key, _| kept(key));
        self.settings = settings;
        self.set_own_prefixes(now);
        if servers_changed {
            self.disconnect_servers(now);
            self.members.forget_servers_from(ServerId(self.settings.servers.len()));
            self.connect_servers(now);
        }
        self.tell_net_host(now);
        self.mapper.handle_switch(self.settings.port_mapping, now);
        self.tell_mapper_host(now);
        self.rp_filter_denied.clear();
        self.work_out_at(now);
        self.settle(now);
    }

    /// What is on the host now, whoever changed it.
    pub fn handle_observed(&mut self, observed: Observed, now: Instant) {
        if self.observed.as_ref() != Some(&observed) {
            // Somebody changed the host: what that needs does not wait for the next try of a step that failed.
            self.retry_at = None;
        }
        self.take_observed(observed, now);
    }

    /// What came of the steps: those that failed with their reasons, and what is on the host after them.
    pub fn handle_applied(&mut self, failures: Vec<(Action, StepError)>, observed: Observed, now: Instant) {
        self.applying = false;
        if failures.is_empty() {
            self.retry_at = None;
        } else {
            self.retry_at = Some(now + self.retry_pause);
            self.retry_pause = (self.retry_pause * 2).min(RECONCILE_INTERVAL);
            self.last_steps = None;
        }
        let mut failed = Vec::new();
        for (action, error) in failures {
            if let (Action::LoosenRpFilter { link }, true) = (&action, error.not_permitted) {
                self.rp_filter_denied.insert(link.clone());
                self.work_out_at(now);
            }
            failed.push((view::step(&action), error.text));
        }
        let before = std::mem::replace(&mut self.failed, failed.iter().cloned().collect());
        failed.retain(|(step, error)| before.get(step) != Some(error));
        // Said once: it is tried again and again, and one that fails takes those after it with it. `status` lists all.
        match &failed[..] {
            [] => {}
            [(step, error)] => tracing::warn!(%error, "a step on this host failed: {step}"),
            [(step, error), others @ ..] => {
                tracing::warn!(%error, "a step on this host failed: {step}, and {} others after it", others.len())
            }
        }
        if !self.applied_once && observed.link.is_some() {
            self.applied_once = true;
            let woken: Vec<WgPublicKey> = self.paths.keys().take(MAX_WAKES).copied().collect();
            for key in woken {
                self.stirred.insert(key);
                self.paths.with(&key, |path| path.handle_wake(now));
            }
        }
        self.take_observed(observed, now);
    }

    /// What the device can do that carries the peers from now on; the userspace one is assumed before.
    pub fn handle_device(&mut self, device: Capabilities, now: Instant) {
        self.device = device;
        self.stirred.extend(self.paths.keys());
        self.paths.with_each(|_, path| path.handle_device(device, now));
        self.settle(now);
    }

    pub fn handle_peer_report(&mut self, peer: &WgPublicKey, report: &PeerReport, now: Instant) {
        if matches!(report, PeerReport::Handshake { .. } | PeerReport::Roamed { .. }) {
            self.members.note_evidence(peer, now);
        }
        if self.paths.contains_key(peer) {
            self.with_path(peer, now, |path| path.handle_report(report, now));
        } else if let (Some(route), PeerReport::Handshake { endpoint } | PeerReport::Roamed { endpoint }) =
            (self.static_routes.get_mut(peer), report)
        {
            let moved = PeerRoute { primary: Some(*endpoint), ..PeerRoute::default() };
            if *route != moved {
                *route = moved.clone();
                self.events.push_back(AgentEvent::SetRoute(*peer, moved));
            }
        }
        self.settle(now);
    }

    /// A carrier is up; `addresses` are what the server's name resolved to.
    pub fn handle_connected(&mut self, server: ServerId, exporter: [u8; 32], addresses: Vec<IpAddr>, now: Instant) {
        if let Some(client) = self.clients.get_mut(&server) {
            self.server_facts.entry(server).or_default().addresses = addresses;
            client.handle_connected(exporter, now);
        }
        self.settle(now);
    }

    pub fn handle_disconnected(&mut self, server: ServerId, reason: &str, now: Instant) {
        if let Some(client) = self.clients.get_mut(&server) {
            client.handle_disconnected(reason, now);
        }
        self.settle(now);
    }

    pub fn handle_message(&mut self, server: ServerId, message: &[u8], now: Instant) {
        if let Some(client) = self.clients.get_mut(&server) {
            client.handle_message(message, now);
        }
        self.settle(now);
    }

    /// The reserved sequence number is on disk, or could not be written and the wall clock must do.
    pub fn handle_seq_reserved(&mut self, seq: u64, now: Instant) {
        self.seal_and_publish(seq, now);
        self.settle(now);
    }

    /// Say farewell, clean the host, stop. For `leave`, `down` and `enabled: false`, never for a restart.
    pub fn handle_leave(&mut self, now: Instant) {
        if self.leaving.is_none() {
            tracing::info!("leaving the mesh");
            self.leaving = Some(Leaving { give_up_at: Some(now + FAREWELL_WAIT), said: false, stopped: false });
            self.mapper.handle_stop(now);
            self.work_out_at(now);
        }
        self.settle(now);
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        for client in self.clients.values_mut() {
            client.handle_timeout(now);
        }
        for key in self.paths.due(now) {
            self.with_path(&key, now, |path| path.handle_timeout(now));
        }
        self.handle_keys_timeout(now);
        self.net.handle_timeout(now);
        self.mapper.handle_timeout(now);
        if now >= self.next_tick {
            self.next_tick = now + RECONCILE_INTERVAL;
            let connected = self.connected();
            for node in self.members.expire(&connected, now) {
                tracing::info!(node = %node.short(), "member expired: nobody lists it and nothing came from it");
                self.events.push_back(AgentEvent::StoreMembers);
            }
            self.work_out_at(now);
        }
        if self.publisher.is_due(now) {
            self.work_out_at(now);
        }
        if self.retry_at.is_some_and(|at| now >= at) {
            self.retry_at = None;
            self.reconcile_at(now);
        }
        self.settle(now);
    }

    /// The next message for a server.
    pub fn poll_transmit(&mut self) -> Option<(ServerId, Bytes)> {
        self.clients.iter_mut().find_map(|(server, client)| Some((*server, client.poll_transmit()?)))
    }

    pub fn poll_event(&mut self) -> Option<AgentEvent> {
        self.events.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let clients = self.clients.values().filter_map(Client::poll_timeout);
        let own = [
            self.paths.poll_timeout(),
            self.due.map(|at| (at, "work out what new facts mean")),
            self.reconcile_due.map(|at| (at, "take the host to where it should be")),
            self.retry_at.map(|at| (at, "try failed steps again")),
            self.leaving
                .and_then(|leaving| leaving.give_up_at)
                .map(|at| (at, "stop waiting for servers to store the farewell")),
            self.publisher.poll_timeout(),
            self.net.poll_timeout(),
            self.mapper.poll_timeout(),
            Some((self.next_tick, "compare desired and observed")),
        ];
        let own = own.into_iter().flatten().chain(self.probing.poll_timeout());
        clients.chain(own).min_by_key(|(at, _)| *at)
    }
}

impl Agent {
    fn take_observed(&mut self, observed: Observed, now: Instant) {
        let addresses = |host: &Observed| -> Vec<_> {
            // Pods come and go without the network of the host changing.
            let real = host.underlay.iter().filter(|link| link.virtual_kind.is_none() && !link.addresses.is_empty());
            real.map(|link| (link.name.clone(), link.addresses.clone())).collect()
        };
        let is_elsewhere = self.observed.as_ref().is_none_or(|before| before.underlay != observed.underlay);
        let moved = self.observed.as_ref().is_some_and(|before| addresses(before) != addresses(&observed));
        if self.observed.is_none() && !self.clients.is_empty() && !self.settings.allow_down_peer_bypass {
            let floor = observed.routes.iter().filter(|route| route.kind == RouteKind::Unreachable);
            self.orphan_floor = floor.cloned().collect();
        }
        self.observed = Some(observed);
        self.tell_net_host(now);
        self.tell_mapper_host(now);
        if moved {
            tracing::info!("the network of this host changed");
            self.net.handle_network_changed(now);
            self.mapper.handle_network_changed(now);
            self.rp_filter_denied.clear();
            for client in self.clients.values_mut() {
                client.handle_network_changed(now);
            }
            self.stirred.extend(self.paths.keys());
            self.paths.with_each(|_, path| path.handle_network_changed(now));
        }
        if is_elsewhere {
            self.work_out_at(now);
        } else {
            self.reconcile_at(now);
        }
        self.settle(now);
    }

    /// Moves what the parts have to say into the queue, and works out the consequences when they are due.
    fn settle(&mut self, now: Instant) {
        self.drain_clients(now);
        self.drain_net(now);
        self.drain_mapper(now);
        if self.due.is_some_and(|due| due <= now) {
            (self.due, self.reconcile_due) = (None, None);
            self.work_out(now);
            self.drain_clients(now);
        } else if self.reconcile_due.is_some_and(|due| due <= now) {
            self.reconcile_due = None;
            self.reconcile(now);
        }
        self.drain_paths(now);
        self.finish_leaving(now);
    }

    /// What the paths that changed have to say: a mesh has many, and most inputs concern one.
    fn drain_paths(&mut self, now: Instant) {
        if !self.stirred.is_empty() {
            self.guess_ports(now);
        }
        self.send_probes(now);
        let mut has_silent_path = false;
        while let Some(key) = self.stirred.pop_first() {
            while let Some(event) = self.paths.poll_event(&key) {
                match event {
                    PathEvent::Route(route) => self.events.push_back(AgentEvent::SetRoute(key, route)),
                    PathEvent::StartHandshake => self.events.push_back(AgentEvent::StartHandshake(key)),
                    PathEvent::OpenSockets { family, count } => {
                        self.events.push_back(AgentEvent::OpenSockets { peer: key, family, count });
                    }
                    PathEvent::CloseSockets(left) => self.leave_sockets(&key, left, now),
                    PathEvent::FellSilent => has_silent_path = true,
                }
            }
        }
        if has_silent_path {
            self.net.handle_doubt(now);
            self.mapper.handle_doubt(now);
            self.drain_net(now);
            self.drain_mapper(now);
        }
    }

    fn finish_leaving(&mut self, now: Instant) {
        let Some(leaving) = self.leaving.as_mut().filter(|leaving| !leaving.stopped) else { return };
        if leaving.give_up_at.is_some_and(|at| now >= at) {
            leaving.give_up_at = None;
        }
        let is_farewell_due = leaving.give_up_at.is_some();
        if !std::mem::replace(&mut leaving.said, true) {
            // Who says farewell gives its prefixes up.
            self.store_announced(BTreeMap::new(), now);
            self.reserve_seq(now);
            return;
        }
        // With a session about to come back, the farewell is worth the wait.
        let connected = self.connected();
        let is_heard = !connected.is_empty() || self.clients.is_empty();
        let is_farewell_done = !is_farewell_due || is_heard && self.publisher.is_stored_by(&connected);
        let is_clean = !self.applying && self.retry_at.is_none() && self.due.or(self.reconcile_due).is_none();
        if is_farewell_done && is_clean {
            self.disconnect_servers(now);
            self.leaving = Some(Leaving { give_up_at: None, said: true, stopped: true });
            self.events.push_back(AgentEvent::Stopped);
        }
    }

    fn underlay(&self) -> &[crate::device::UnderlayLink] {
        self.observed.as_ref().map_or(&[], |observed| &observed.underlay)
    }

    fn work_out_at(&mut self, at: Instant) {
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    fn reconcile_at(&mut self, at: Instant) {
        self.reconcile_due = Some(self.reconcile_due.map_or(at, |due| due.min(at)));
    }

    fn unix_ms(&self, now: Instant) -> u64 {
        let (at, unix_ms) = self.started;
        unix_ms.saturating_add(u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX))
    }

    fn log_path(&self, key: &WgPublicKey, state: PathState) {
        let peer = self.peers.iter().find(|peer| peer.key == *key);
        let member = peer.and_then(|peer| self.members.get(&peer.node));
        let Some(host_name) = member.map(|member| &member.record.host_name) else {
            return;
        };
        match state {
            PathState::Up { endpoint } => {
                tracing::info!(peer = %host_name, %endpoint, "peer is up")
            }
            PathState::Down { .. } => {
                tracing::warn!(peer = %host_name, "peer is down: no endpoint of it answers")
            }
            PathState::Idle | PathState::Connecting { .. } => {
                tracing::debug!(peer = %host_name, ?state, "path changed")
            }
        }
    }
}

/// The same at every start, and nobody else's.
fn pcp_nonce(identity: &SignKey) -> [u8; 12] {
    let hash: [u8; 32] = Sha256::digest(identity.sign("meshspan/v1 pcp nonce", &[])).into();
    let mut nonce = [0; 12];
    nonce.copy_from_slice(&hash[..12]);
    nonce
}

fn is_down(state: PathState) -> bool {
    matches!(state, PathState::Down { .. })
}
