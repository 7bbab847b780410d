//! The model of the data plane: one model tunnel a peer, allowed IPs both ways, endpoints as the agent set them.
//!
//! Does what mesh-agent's engine does, without threads: looks the destination up, seals, sends an initiation to every endpoint
//! of the route, checks the inner source before it delivers, and reports demand, handshakes and roaming.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use bytes::Bytes;
use mesh_common::allowed_ips::AllowedIps;
use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;
use mesh_proto::device::{Endpoint, PeerReport, PeerRoute, PeerSpec};
use mesh_proto::random::SplitMix64;
use mesh_proto::wg::{Opened, Sealed, Tunnel};

use crate::packet;
use crate::tunnel::{ModelTunnel, receiver_index, sender_key};

/// Room for every packet of the simulation and for a handshake.
const BUFFER: usize = 256;
/// The model tunnel limits nobody by address.
const UNLIMITED: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// What the engine wants done or known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    Send(Endpoint, Bytes),
    Report(WgPublicKey, PeerReport),
    /// An inner packet of this peer that passed the source check.
    Deliver(WgPublicKey, Vec<u8>),
}

#[derive(Debug)]
pub struct Engine {
    own: WgPublicKey,
    random: SplitMix64,
    peers: BTreeMap<WgPublicKey, Peer>,
    /// Endpoints outlive a tunnel that is made anew.
    routes: BTreeMap<WgPublicKey, PeerRoute>,
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

impl Engine {
    pub fn new(own: WgPublicKey, seed: u64) -> Self {
        Self {
            own,
            random: SplitMix64::new(seed),
            peers: BTreeMap::new(),
            routes: BTreeMap::new(),
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
        self.routes.clear();
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
        self.routes.insert(key, route);
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
                self.send_to_primary(&key, datagram);
            }
            Sealed::Handshake(initiation) => {
                let initiation = Bytes::copy_from_slice(initiation);
                self.send_everywhere(&key, &initiation);
                self.outputs.push(Output::Report(key, PeerReport::Demand));
            }
            Sealed::Queued => self.outputs.push(Output::Report(key, PeerReport::Demand)),
            Sealed::Dropped(_) => {}
        }
        true
    }

    pub fn receive(&mut self, datagram: &[u8], source: Endpoint, now: Instant) {
        let key = match receiver_index(datagram) {
            Some(index) => self.by_index.get(&(index >> 8)).copied(),
            None => sender_key(datagram),
        };
        let Some(key) = key else { return };
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
                output = Some(Output::Deliver(key, packet.to_vec()));
            }
            Opened::Keepalive => is_data = true,
            Opened::Reply(datagram) | Opened::Established(Some(datagram)) => {
                output = Some(Output::Send(source, Bytes::copy_from_slice(datagram)));
            }
            Opened::Established(None) => {}
            Opened::Dropped(_) => return,
        }
        let after = peer.tunnel.since_handshake(now);
        let is_new = after.is_some() && before.is_none_or(|before| after < Some(before));
        if is_new {
            let report = PeerReport::Handshake { endpoint: source };
            self.outputs.push(Output::Report(key, report));
        } else if is_data && self.primary(&key) != Some(source) {
            let report = PeerReport::Roamed { endpoint: source };
            self.outputs.push(Output::Report(key, report));
        }
        match output {
            Some(Output::Deliver(_, packet)) if !self.may_come_from(&key, &packet) => {
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
                self.outputs.push(Output::Report(key, PeerReport::Demand));
            } else {
                self.send_to_primary(&key, datagram);
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
        while let Some(datagram) = peer.tunnel.flush(&mut buffer, now) {
            let datagram = Bytes::copy_from_slice(datagram);
            self.outputs.push(Output::Send(endpoint, datagram));
        }
    }

    fn primary(&self, key: &WgPublicKey) -> Option<Endpoint> {
        self.routes.get(key).and_then(|route| route.primary)
    }

    fn send_to_primary(&mut self, key: &WgPublicKey, datagram: Bytes) {
        if let Some(primary) = self.primary(key) {
            self.outputs.push(Output::Send(primary, datagram));
        }
    }

    fn send_everywhere(&mut self, key: &WgPublicKey, datagram: &Bytes) {
        let Some(route) = self.routes.get(key) else {
            return;
        };
        let endpoints = route.primary.iter().chain(&route.handshake_fan_out);
        let sends = endpoints.map(|endpoint| Output::Send(*endpoint, datagram.clone()));
        self.outputs.extend(sends);
    }
}
