//! The model of the data plane: one model tunnel a peer, allowed IPs both ways, endpoints as the agent set them.
//!
//! Does what mesh-agent's engine does, without threads: looks the destination up, seals, sends an initiation to every endpoint
//! of the route and data to its one or two, checks the inner source before it delivers, and reports demand, handshakes,
//! roaming and what each path carried.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::allowed_ips::AllowedIps;
use mesh_common::id::ServerId;
use mesh_common::key::WgPublicKey;
use mesh_common::limits::REKEY_TIMEOUT;
use mesh_common::time::Instant;
use mesh_proto::device::{Endpoint, PathTraffic, PeerReport, PeerRoute, PeerSpec};
use mesh_proto::random::SplitMix64;
use mesh_proto::wg::{Opened, Sealed, Tunnel};

use crate::packet;
use crate::tunnel::{ModelTunnel, receiver_index, sender_key};

/// Room for every packet of the simulation and for a handshake.
const BUFFER: usize = 256;
/// The model tunnel limits nobody by address.
const UNLIMITED: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// Demand and roaming are reported at most this often a peer.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// What the engine wants done or known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    Send(WgPublicKey, Endpoint, Bytes),
    Report(WgPublicKey, PeerReport),
    /// An inner packet of this peer that passed the source check, and the path it came by.
    Deliver(WgPublicKey, Endpoint, Vec<u8>),
}

#[derive(Debug)]
pub struct Engine {
    own: WgPublicKey,
    random: SplitMix64,
    peers: BTreeMap<WgPublicKey, Peer>,
    /// Paths outlive a tunnel that is made anew.
    paths: BTreeMap<WgPublicKey, Path>,
    by_index: BTreeMap<u32, WgPublicKey>,
    allowed_ips: Option<AllowedIps<WgPublicKey>>,
    outputs: Vec<Output>,
    /// Delivers whatever source a peer writes: to see the model turn red.
    pub delivers_foreign_sources: bool,
    /// Inner packets dropped because of their source.
    pub foreign_sources: u64,
}

#[derive(Debug)]
struct Peer {
    spec: PeerSpec,
    index: u32,
    tunnel: ModelTunnel,
}

/// Where datagrams to a peer go, and what was told of it.
#[derive(Debug, Default)]
struct Path {
    route: PeerRoute,
    /// Where the last handshake completed, and when.
    proven: Option<(Endpoint, Instant)>,
    /// Transport datagrams since the last report: sent, received.
    traffic: BTreeMap<Endpoint, (u64, u64)>,
    demand_at: Option<Instant>,
    roamed_at: Option<(Endpoint, Instant)>,
}

impl Path {
    fn set_route(&mut self, route: PeerRoute) {
        let mut endpoints = endpoints(&route).peekable();
        let is_nowhere = endpoints.peek().is_none();
        let follows = is_nowhere || self.proven.is_none_or(|(proven, _)| endpoints.any(|endpoint| endpoint == proven));
        if !follows {
            self.proven = None;
        }
        drop(endpoints);
        self.route = route;
    }

    /// While the agent still fans out, it knows no path that works: then what a handshake has proven is better.
    fn data_target(&self) -> Option<Endpoint> {
        match self.route.primary {
            Some(primary) if self.route.handshake_fan_out.is_empty() => Some(primary),
            guess => self.proven.map(|(endpoint, _)| endpoint).or(guess),
        }
    }

    fn data_targets(&self) -> impl Iterator<Item = Endpoint> {
        let primary = self.data_target();
        primary.into_iter().chain(self.route.second.filter(|second| primary != Some(*second)))
    }

    fn handshake_targets(&self) -> BTreeSet<Endpoint> {
        endpoints(&self.route).chain(self.proven.map(|(endpoint, _)| endpoint)).collect()
    }

    /// When both sides begin at once, one handshake completes directly and the other over the relay: the direct path is the
    /// better one.
    fn prove(&mut self, endpoint: Endpoint, now: Instant) {
        let is_direct_fresh =
            self.proven.is_some_and(|(proven, at)| !proven.is_relay() && now.since(at) < REKEY_TIMEOUT);
        if !endpoint.is_relay() || !is_direct_fresh {
            self.proven = Some((endpoint, now));
        }
    }
}

fn endpoints(route: &PeerRoute) -> impl Iterator<Item = Endpoint> {
    route.primary.into_iter().chain(route.second).chain(route.handshake_fan_out.iter().copied())
}

impl Engine {
    pub fn new(own: WgPublicKey, seed: u64) -> Self {
        Self {
            own,
            random: SplitMix64::new(seed),
            peers: BTreeMap::new(),
            paths: BTreeMap::new(),
            by_index: BTreeMap::new(),
            allowed_ips: None,
            outputs: Vec::new(),
            delivers_foreign_sources: false,
            foreign_sources: 0,
        }
    }

    /// All peers and their sessions go, as when the link goes.
    pub fn clear(&mut self) {
        self.peers.clear();
        self.by_index.clear();
        self.allowed_ips = None;
    }

    /// The process goes: endpoints too.
    pub fn stop(&mut self) {
        self.clear();
        self.paths.clear();
        self.outputs.clear();
    }

    pub fn specs(&self) -> BTreeMap<WgPublicKey, PeerSpec> {
        let spec = |(key, peer): (&WgPublicKey, &Peer)| (*key, peer.spec.clone());
        self.peers.iter().map(spec).collect()
    }

    pub fn set_peer(&mut self, key: WgPublicKey, spec: PeerSpec) {
        self.allowed_ips = None;
        if let Some(peer) = self.peers.get_mut(&key) {
            let same_tunnel = peer.spec.generation == spec.generation
                && peer.spec.preshared_key == spec.preshared_key
                && peer.spec.keepalive == spec.keepalive;
            if same_tunnel {
                peer.spec = spec;
                return;
            }
        }
        self.remove_peer(&key);
        let index = loop {
            let index = self.random.below(1 << 24) as u32;
            if !self.by_index.contains_key(&index) {
                break index;
            }
        };
        let tunnel =
            ModelTunnel::new(self.own, key, spec.preshared_key.clone(), spec.keepalive, index, self.random.next_u64());
        self.by_index.insert(index, key);
        self.peers.insert(key, Peer { spec, index, tunnel });
    }

    pub fn remove_peer(&mut self, key: &WgPublicKey) {
        if let Some(peer) = self.peers.remove(key) {
            self.by_index.remove(&peer.index);
            self.allowed_ips = None;
        }
    }

    pub fn set_route(&mut self, key: WgPublicKey, route: PeerRoute) {
        self.paths.entry(key).or_default().set_route(route);
    }

    /// Where data to this peer goes now; what goes twice is named twice, the first first.
    pub fn data_targets(&self, key: &WgPublicKey) -> Vec<Endpoint> {
        self.paths.get(key).into_iter().flat_map(Path::data_targets).collect()
    }

    pub fn start_handshake(&mut self, key: &WgPublicKey, now: Instant) {
        let mut buffer = [0; BUFFER];
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let initiation = peer.tunnel.start_handshake(&mut buffer, now);
        if let Some(initiation) = initiation.map(Bytes::copy_from_slice) {
            self.send_everywhere(key, &initiation);
        }
    }

    /// A packet that the kernel routed to the mesh link. False when no peer takes it.
    pub fn send(&mut self, packet: &[u8], destination: IpAddr, now: Instant) -> bool {
        let peers = &self.peers;
        let table = self.allowed_ips.get_or_insert_with(|| {
            let entries = peers.iter().flat_map(|(key, peer)| {
                let prefixes = peer.spec.allowed_ips.iter();
                prefixes.map(move |prefix| (*prefix, *key))
            });
            entries.collect()
        });
        let Some(key) = table.lookup(destination).copied() else {
            return false;
        };
        let Some(peer) = self.peers.get_mut(&key) else {
            return false;
        };
        let mut buffer = [0; BUFFER];
        match peer.tunnel.seal(packet, &mut buffer, now) {
            Sealed::Data(datagram) => {
                let datagram = Bytes::copy_from_slice(datagram);
                self.send_data(&key, &datagram);
            }
            Sealed::Handshake(initiation) => {
                let initiation = Bytes::copy_from_slice(initiation);
                self.send_everywhere(&key, &initiation);
                self.report_demand(key, now);
            }
            Sealed::Queued => self.report_demand(key, now),
            Sealed::Dropped(_) => {}
        }
        true
    }

    pub fn receive(&mut self, datagram: &[u8], source: Endpoint, now: Instant) {
        if let Some(key) = self.peer_of(datagram) {
            self.open(key, datagram, source, now);
        }
    }

    /// What this server says is from this peer, and is not taken when it is another's.
    pub fn receive_relayed(&mut self, datagram: &[u8], server: ServerId, peer: &WgPublicKey, now: Instant) {
        if let Some(key) = self.peer_of(datagram).filter(|key| key == peer) {
            self.open(key, datagram, Endpoint::Relay(server), now);
        }
    }

    fn peer_of(&self, datagram: &[u8]) -> Option<WgPublicKey> {
        match receiver_index(datagram) {
            Some(index) => self.by_index.get(&(index >> 8)).copied(),
            None => sender_key(datagram),
        }
    }

    fn open(&mut self, key: WgPublicKey, datagram: &[u8], source: Endpoint, now: Instant) {
        let Some(peer) = self.peers.get_mut(&key) else {
            return;
        };
        let mut buffer = [0; BUFFER];
        let before = peer.tunnel.since_handshake(now);
        let opened = peer.tunnel.open(datagram, UNLIMITED, &mut buffer, now);
        let mut is_data = false;
        let mut output = None;
        match opened {
            Opened::Packet(packet) => {
                is_data = true;
                output = Some(Output::Deliver(key, source, packet.to_vec()));
            }
            Opened::Keepalive => is_data = true,
            Opened::Reply(datagram) | Opened::Established(Some(datagram)) => {
                output = Some(Output::Send(key, source, Bytes::copy_from_slice(datagram)));
            }
            Opened::Established(None) => {}
            Opened::Dropped(_) => return,
        }
        let after = peer.tunnel.since_handshake(now);
        let is_new = after.is_some() && before.is_none_or(|before| after < Some(before));
        let path = self.paths.entry(key).or_default();
        if is_data {
            path.traffic.entry(source).or_default().1 += 1;
        }
        if is_new {
            path.prove(source, now);
            let report = PeerReport::Handshake { endpoint: source };
            self.outputs.push(Output::Report(key, report));
        } else if is_data && path.data_target() != Some(source) {
            let is_recent = |(last, at)| last == source && now.since(at) < REPORT_INTERVAL;
            if !path.roamed_at.is_some_and(is_recent) {
                path.roamed_at = Some((source, now));
                let report = PeerReport::Roamed { endpoint: source };
                self.outputs.push(Output::Report(key, report));
            }
        }
        match output {
            Some(Output::Deliver(_, _, packet)) if !self.may_come_from(&key, &packet) => {
                self.foreign_sources += 1;
            }
            Some(output) => self.outputs.push(output),
            None => {}
        }
        if is_new {
            self.flush(&key, source, now);
        }
    }

    /// Runs every tunnel's timers.
    pub fn tick(&mut self, now: Instant) {
        let mut buffer = [0; BUFFER];
        let mut due = Vec::new();
        for (key, peer) in &mut self.peers {
            if let Some(datagram) = peer.tunnel.handle_timeout(&mut buffer, now) {
                due.push((*key, Bytes::copy_from_slice(datagram)));
            }
        }
        for (key, datagram) in due {
            if sender_key(&datagram).is_some() {
                // The tunnel wants a session and has none that works.
                self.send_everywhere(&key, &datagram);
                self.report_demand(key, now);
            } else {
                self.send_data(&key, &datagram);
            }
        }
        for (key, path) in &mut self.paths {
            let carried = std::mem::take(&mut path.traffic).into_iter();
            let carried: Vec<PathTraffic> =
                carried.map(|(endpoint, (sent, received))| PathTraffic { endpoint, sent, received }).collect();
            if !carried.is_empty() {
                self.outputs.push(Output::Report(*key, PeerReport::Traffic(carried)));
            }
        }
    }

    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    fn may_come_from(&self, key: &WgPublicKey, packet: &[u8]) -> bool {
        let Some(source) = packet::source(packet) else {
            return false;
        };
        let allowed = self.peers.get(key).is_some_and(|peer| {
            let mut prefixes = peer.spec.allowed_ips.iter();
            prefixes.any(|prefix| prefix.contains(&source))
        });
        allowed || self.delivers_foreign_sources
    }

    fn flush(&mut self, key: &WgPublicKey, endpoint: Endpoint, now: Instant) {
        let mut buffer = [0; BUFFER];
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let mut flushed = 0;
        while let Some(datagram) = peer.tunnel.flush(&mut buffer, now) {
            let datagram = Bytes::copy_from_slice(datagram);
            self.outputs.push(Output::Send(*key, endpoint, datagram));
            flushed += 1;
        }
        if flushed > 0 {
            self.paths.entry(*key).or_default().traffic.entry(endpoint).or_default().0 += flushed;
        }
    }

    fn report_demand(&mut self, key: WgPublicKey, now: Instant) {
        let path = self.paths.entry(key).or_default();
        if path.demand_at.is_none_or(|at| now.since(at) >= REPORT_INTERVAL) {
            path.demand_at = Some(now);
            self.outputs.push(Output::Report(key, PeerReport::Demand));
        }
    }

    fn send_data(&mut self, key: &WgPublicKey, datagram: &Bytes) {
        let Some(path) = self.paths.get_mut(key) else {
            return;
        };
        let targets: Vec<Endpoint> = path.data_targets().collect();
        for target in targets {
            path.traffic.entry(target).or_default().0 += 1;
            self.outputs.push(Output::Send(*key, target, datagram.clone()));
        }
    }

    fn send_everywhere(&mut self, key: &WgPublicKey, datagram: &Bytes) {
        let targets = self.paths.get(key).map(Path::handshake_targets).unwrap_or_default();
        let sends = targets.into_iter().map(|target| Output::Send(*key, target, datagram.clone()));
        self.outputs.extend(sends);
    }
}
