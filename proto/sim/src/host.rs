//! A simulated machine: the real agent, a model kernel, a model engine, and a disk that survives a restart.
//!
//! Does what mesh-agent's event loop does: turns the agent's events into effects and feeds back what came of them. What takes
//! time or crosses the network is an [`Effect`] for the world.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::Bytes;
use ipnet::IpNet;
use mesh_common::addr;
use mesh_common::id::{NodeId, ServerId};
use mesh_common::key::{ClusterKeys, SignKey, WgPublicKey, WgSecret};
use mesh_common::time::Instant;
use mesh_proto::device::{Action, Endpoint, SocketId, UnderlayLink};
use mesh_proto::mesh::agent::{Agent, AgentEvent, Announced, OwnClaim, Start, StepError};
use mesh_proto::mesh::settings::Settings;
use mesh_proto::net::port_mapping::MappingRequest;
use mesh_proto::path::agent::PathPolicy;
use mesh_proto::random::SplitMix64;
use mesh_proto::wire::demux::{self, Datagram};

use crate::engine::{Engine, Output};
use crate::kernel::Kernel;

/// Where a kernel takes ports from that nobody asked for.
const EPHEMERAL_PORTS: std::ops::Range<u16> = 32_768..61_000;

/// What a host is for its whole life.
#[derive(Debug)]
pub struct HostPlan {
    pub keys: ClusterKeys,
    pub identity: SignKey,
    pub wg: WgSecret,
    pub settings: Settings,
    pub site: usize,
    pub underlay: Vec<UnderlayLink>,
    pub rp_filter_read_only: bool,
    /// Where its pods are.
    pub pods: Option<IpNet>,
    /// Its wall clock at the origin of virtual time.
    pub unix_ms: u64,
    pub seed: u64,
    pub sabotage: Option<Sabotage>,
    /// What of its paths is switched off.
    pub path_policy: PathPolicy,
}

/// A broken host, to see the model turn red.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// Delivers inner packets whatever their source.
    DeliversForeignSources,
    /// Says that steps were done and does none.
    IgnoresSteps,
    /// Never makes the floor.
    OmitsFloor,
    /// Forgets the highest sequence numbers it saw, at every restart.
    ForgetsMarks,
}

/// What survives a restart.
#[derive(Debug, Default, Clone)]
pub struct Disk {
    pub last_seq: u64,
    pub claim: Option<OwnClaim>,
    pub announced: Announced,
    pub marks: BTreeMap<NodeId, u64>,
    pub frames: Vec<Bytes>,
}

/// What the world has to do for a host.
#[derive(Debug)]
pub enum Effect {
    Dial(ServerId),
    HangUp(ServerId),
    Transmit(ServerId, Bytes),
    /// The disk took this number; tell the agent a moment later.
    Reserved(u64),
    /// Steps to carry out a moment later.
    Apply(Vec<Action>),
    /// From this port of the host, with its own TTL unless it says another.
    Send {
        port: u16,
        to: SocketAddr,
        bytes: Bytes,
        ttl: Option<u8>,
    },
    /// A question to the router before the host.
    MapPort(MappingRequest),
    /// A message that its carrier may lose like a datagram.
    Relay(ServerId, Bytes),
    Deliver(WgPublicKey, Endpoint, Vec<u8>),
    MembersChanged,
    /// The agent said farewell and cleaned up: it is to be dropped.
    Stopped,
}

#[derive(Debug)]
pub struct Host {
    pub plan: HostPlan,
    pub kernel: Kernel,
    pub engine: Engine,
    pub disk: Disk,
    pub agent: Option<Agent>,
    /// Which start of the agent this is: what was meant for an older one is void.
    pub run: u32,
    /// The ports of sockets beside the main one.
    sockets: BTreeMap<SocketId, u16>,
    last_socket: u16,
    node: NodeId,
    key: WgPublicKey,
    overlay_v6: Ipv6Addr,
    random: SplitMix64,
}

impl Host {
    pub fn new(plan: HostPlan) -> Self {
        let node = plan.identity.node_id();
        let mut engine = Engine::new(plan.wg.public(), plan.seed);
        engine.delivers_foreign_sources = plan.sabotage == Some(Sabotage::DeliversForeignSources);
        Self {
            kernel: Kernel::new(plan.underlay.clone(), plan.rp_filter_read_only),
            engine,
            disk: Disk::default(),
            agent: None,
            run: 0,
            sockets: BTreeMap::new(),
            last_socket: 0,
            random: SplitMix64::new(plan.seed ^ 0x5eed),
            node,
            key: plan.wg.public(),
            overlay_v6: addr::overlay_v6(&plan.settings.cluster_id, &node),
            plan,
        }
    }

    pub fn node(&self) -> NodeId {
        self.node
    }

    pub fn key(&self) -> WgPublicKey {
        self.key
    }

    pub fn overlay_v6(&self) -> Ipv6Addr {
        self.overlay_v6
    }

    pub fn overlay_v4(&self) -> Option<Ipv4Addr> {
        self.disk.claim.map(|claim| claim.addr)
    }

    /// The address of a pod of this host.
    pub fn pod(&self) -> Option<IpAddr> {
        let hosts = self.plan.pods.map(|pods| pods.hosts().nth(4));
        hosts.flatten()
    }

    /// Whether an inner packet for this address ends here.
    pub fn is_local(&self, addr: IpAddr) -> bool {
        addr == IpAddr::V6(self.overlay_v6())
            || self.overlay_v4().map(IpAddr::V4) == Some(addr)
            || self.plan.pods.is_some_and(|pods| pods.contains(&addr))
    }

    /// Starts the agent from what is on disk.
    pub fn start(&mut self, now: Instant) {
        self.run += 1;
        let mut words = || self.random.next_u64().to_le_bytes();
        let instance = [words(), words()].concat();
        let seed = [words(), words(), words(), words()].concat();
        let marks = if self.plan.sabotage == Some(Sabotage::ForgetsMarks) {
            self.disk.frames.clear();
            BTreeMap::new()
        } else {
            self.disk.marks.clone()
        };
        let start = Start {
            keys: self.plan.keys.clone(),
            identity: self.plan.identity.clone(),
            wg: self.plan.wg.clone(),
            path_policy: self.plan.path_policy,
            instance: instance.try_into().expect("two words are 16 bytes"),
            seed: seed.try_into().expect("four words are 32 bytes"),
            unix_ms: unix_ms(&self.plan, now),
            last_seq: self.disk.last_seq,
            claim: self.disk.claim,
            announced: self.disk.announced.clone(),
            marks,
            frames: self.disk.frames.clone(),
        };
        let mut agent = Agent::new(self.plan.settings.clone(), start, now);
        agent.handle_observed(self.kernel.observe(self.engine.specs()), now);
        self.agent = Some(agent);
    }

    /// The process dies: the link and its routes go, the floor and the rules stay.
    pub fn kill(&mut self) {
        self.agent = None;
        self.sockets.clear();
        self.kernel.delete_link();
        self.engine.stop();
    }

    /// Carries out steps; `fails` picks those that the host does not let happen.
    pub fn apply(&mut self, actions: Vec<Action>, mut fails: impl FnMut() -> bool, now: Instant) -> bool {
        let mut failures = Vec::new();
        for action in actions {
            let result = if fails() {
                Err(StepError { text: "the simulated host is out of memory".into(), not_permitted: false })
            } else {
                self.step(&action)
            };
            if let Err(error) = result {
                failures.push((action, error));
            }
        }
        let clean = failures.is_empty();
        let observed = self.kernel.observe(self.engine.specs());
        if let Some(agent) = &mut self.agent {
            agent.handle_applied(failures, observed, now);
        }
        clean
    }

    /// Tells the agent what is on the host.
    pub fn observe(&mut self, now: Instant) {
        let observed = self.kernel.observe(self.engine.specs());
        if let Some(agent) = &mut self.agent {
            agent.handle_observed(observed, now);
        }
    }

    /// Which path a datagram takes that comes from there to this port; `None` when no socket of ours is on it.
    pub fn path_at(&self, port: u16, source: SocketAddr) -> Option<Endpoint> {
        if port == self.plan.settings.listen_port {
            return Some(source.into());
        }
        let socket = self.sockets.iter().find(|(_, open)| **open == port);
        socket.map(|(socket, _)| Endpoint::Extra(*socket, source))
    }

    /// A datagram at a socket: a tunnel's is the engine's, all else the agent's.
    pub fn receive(&mut self, datagram: &[u8], source: Endpoint, now: Instant) {
        if let Datagram::WireGuard(_) = demux::classify(datagram) {
            self.engine.receive(datagram, source, now);
        } else if let Some(agent) = &mut self.agent {
            agent.handle_datagram(source, datagram, now);
        }
    }

    /// Moves what agent and engine have to say into effects, until neither says more.
    pub fn drain(&mut self, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        loop {
            let outputs = self.engine.take_outputs();
            let Some(agent) = &mut self.agent else {
                break;
            };
            let mut quiet = outputs.is_empty();
            for output in outputs {
                match output {
                    Output::Send(_, Endpoint::Direct(to), bytes) => {
                        let port = self.plan.settings.listen_port;
                        effects.push(Effect::Send { port, to, bytes, ttl: None });
                    }
                    Output::Send(_, Endpoint::Extra(socket, to), bytes) => {
                        let port = self.sockets.get(&socket).copied();
                        effects.extend(port.map(|port| Effect::Send { port, to, bytes, ttl: None }));
                    }
                    Output::Send(key, Endpoint::Relay(server), datagram) => {
                        let message = agent.relay(server, &key, &datagram, now);
                        effects.extend(message.map(|message| Effect::Relay(server, message)));
                    }
                    Output::Deliver(key, from, packet) => effects.push(Effect::Deliver(key, from, packet)),
                    Output::Report(key, report) => agent.handle_peer_report(&key, &report, now),
                }
            }
            while let Some((server, message)) = agent.poll_transmit() {
                quiet = false;
                effects.push(Effect::Transmit(server, message));
            }
            while let Some(event) = agent.poll_event() {
                quiet = false;
                match event {
                    AgentEvent::Dial(server) => effects.push(Effect::Dial(server)),
                    AgentEvent::HangUp(server) => effects.push(Effect::HangUp(server)),
                    AgentEvent::ReserveSeq(seq) => {
                        self.disk.last_seq = seq;
                        effects.push(Effect::Reserved(seq));
                    }
                    AgentEvent::StoreClaim(claim) => self.disk.claim = Some(claim),
                    AgentEvent::StoreAnnounced(since_ms) => {
                        let at_ms = unix_ms(&self.plan, now);
                        self.disk.announced = Announced { since_ms, at_ms };
                    }
                    AgentEvent::StoreMembers => {
                        self.disk.marks = agent.members().marks().clone();
                        self.disk.frames = agent.frames();
                        effects.push(Effect::MembersChanged);
                    }
                    AgentEvent::SetRoute(key, route) => self.engine.set_route(key, route),
                    AgentEvent::StartHandshake(key) => self.engine.start_handshake(&key, now),
                    AgentEvent::SendRaw { to, bytes, ttl } => {
                        let port = self.plan.settings.listen_port;
                        effects.push(Effect::Send { port, to, bytes, ttl });
                    }
                    AgentEvent::SendFrom { socket, to, bytes, ttl } => {
                        let port = self.sockets.get(&socket).copied();
                        effects.extend(port.map(|port| Effect::Send { port, to, bytes, ttl }));
                    }
                    AgentEvent::OpenSockets { peer, count, .. } => {
                        let mut opened = Vec::new();
                        while opened.len() < usize::from(count) {
                            let port = EPHEMERAL_PORTS.start
                                + self.random.below(u64::from(EPHEMERAL_PORTS.end - EPHEMERAL_PORTS.start)) as u16;
                            if self.sockets.values().all(|taken| *taken != port) {
                                self.last_socket = self.last_socket.wrapping_add(1);
                                self.sockets.insert(SocketId(self.last_socket), port);
                                opened.push(SocketId(self.last_socket));
                            }
                        }
                        agent.handle_sockets(&peer, &opened, now);
                    }
                    AgentEvent::MapPort(request) => effects.push(Effect::MapPort(request)),
                    AgentEvent::CloseSockets(closed) => self.sockets.retain(|socket, _| !closed.contains(socket)),
                    AgentEvent::SendRelay { server, message } => effects.push(Effect::Relay(server, message)),
                    AgentEvent::Relayed { server, peer, datagram } => {
                        self.engine.receive_relayed(&datagram, server, &peer, now);
                    }
                    // A move is a new start, and those are the scenario's to plan.
                    AgentEvent::Echoed { .. } | AgentEvent::MovePort(_) => {}
                    AgentEvent::Apply(actions) => effects.push(Effect::Apply(actions)),
                    AgentEvent::Stopped => effects.push(Effect::Stopped),
                }
            }
            if quiet {
                break;
            }
        }
        effects
    }

    /// The underlay link and source address for a datagram of our own socket to this destination.
    pub fn underlay_source(&self, destination: IpAddr) -> Option<IpAddr> {
        let addresses = || self.plan.underlay.iter().flat_map(|link| &link.addresses);
        let connected = addresses().find(|net| net.contains(&destination));
        let first = || addresses().find(|net| net.addr().is_ipv4() == destination.is_ipv4());
        connected.or_else(first).map(IpNet::addr)
    }

    /// The underlay link that holds this address.
    pub fn link_of(&self, addr: IpAddr) -> Option<&str> {
        let holds = |link: &&UnderlayLink| link.addresses.iter().any(|net| net.addr() == addr);
        let link = self.plan.underlay.iter().find(holds);
        link.map(|link| link.name.as_str())
    }

    fn step(&mut self, action: &Action) -> Result<(), StepError> {
        match (self.plan.sabotage, action) {
            (Some(Sabotage::IgnoresSteps), _) => return Ok(()),
            (Some(Sabotage::OmitsFloor), Action::AddRoute(route))
                if route.kind == mesh_proto::device::RouteKind::Unreachable =>
            {
                return Ok(());
            }
            _ => {}
        }
        match action {
            Action::CreateLink(_) | Action::DeleteLink { .. } => self.engine.clear(),
            Action::SetPeer(key, spec) => {
                if self.kernel.link.is_none() {
                    return Err(StepError { text: "there is no interface for peers".into(), not_permitted: false });
                }
                self.engine.set_peer(*key, spec.clone());
            }
            Action::RemovePeer(key) => self.engine.remove_peer(key),
            _ => {}
        }
        self.kernel.apply(action)
    }
}

/// The wall clock of a host.
fn unix_ms(plan: &HostPlan, now: Instant) -> u64 {
    plan.unix_ms + u64::try_from(now.since_origin().as_millis()).unwrap_or(u64::MAX)
}
