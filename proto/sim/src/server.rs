//! Discovery servers of a run: the real server machine, restarts that lose everything, and one that rolls records back.

use std::collections::BTreeMap;
use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::{NodeId, ServerId};
use mesh_common::limits::{MAX_CONNECTIONS, MAX_NAMESPACES, MAX_SLOTS_PER_NAMESPACE, SLOT_TTL};
use mesh_common::time::Instant;
use mesh_proto::discovery::server::{Server, ServerConfig};
use mesh_proto::random::SplitMix64;
use mesh_proto::relay::switch::RelayLimits;
use mesh_proto::wire::frame::Frame;
use mesh_proto::wire::session::ServerMessage;

/// A server as a machine: it may be down.
#[derive(Debug)]
pub struct Rendezvous {
    pub machine: Option<Server>,
    /// Ports and other addresses of its STUN service, which the world runs.
    pub stun_ports: Vec<u16>,
    pub stun_alt: Vec<SocketAddr>,
    random: SplitMix64,
    /// Set for the server that serves old records.
    rolls_back: Option<BTreeMap<NodeId, Bytes>>,
}

impl Rendezvous {
    pub fn new(seed: u64, rolls_back: bool) -> Self {
        Self {
            machine: None,
            stun_ports: Vec::new(),
            stun_alt: Vec::new(),
            random: SplitMix64::new(seed),
            rolls_back: rolls_back.then(BTreeMap::new),
        }
    }

    /// Starts with an empty store and another instance.
    pub fn start(&mut self) {
        let config = ServerConfig {
            instance: self.random.next_u64(),
            slot_ttl: SLOT_TTL,
            only_namespaces: BTreeSet::new(),
            stun_ports: self.stun_ports.clone(),
            stun_alt: self.stun_alt.clone(),
            relay: Some(RelayLimits::default()),
            own_names: BTreeSet::new(),
            max_connections: MAX_CONNECTIONS,
            max_namespaces: MAX_NAMESPACES,
            max_slots_per_namespace: MAX_SLOTS_PER_NAMESPACE,
            max_stored_bytes: mesh_common::limits::MAX_STORED_BYTES,
        };
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&self.random.next_u64().to_le_bytes());
        self.machine = Some(Server::new(config, seed));
    }

    /// What a client really gets for this message: a hostile server often gives the oldest record it ever saw.
    pub fn tamper(&mut self, message: Bytes) -> Bytes {
        let Some(oldest) = &mut self.rolls_back else {
            return message;
        };
        let Ok(ServerMessage::Frame(bytes)) = ServerMessage::decode(&message) else {
            return message;
        };
        let Ok(frame) = Frame::parse(bytes.clone()) else {
            return message;
        };
        let old = oldest.entry(frame.node()).or_insert(bytes);
        if self.random.below(2) == 0 {
            return message;
        }
        ServerMessage::Frame(old.clone()).encode()
    }
}

/// A connection between an agent and a server: two reliable ordered streams of messages, which wait while they are cut.
#[derive(Debug)]
pub struct Carrier {
    pub host: usize,
    /// The start of the agent that dialled.
    pub run: u32,
    pub server_id: ServerId,
    pub server: usize,
    pub is_up: bool,
    /// The agent's end is closed.
    pub hung_up: bool,
    /// The client has seen a whole snapshot.
    pub synced: bool,
    pub to_server: Stream,
    pub to_agent: Stream,
}

/// One direction. `None` is its end.
#[derive(Debug, Default)]
pub struct Stream {
    queue: VecDeque<(Instant, Option<Bytes>)>,
    newest: Instant,
}

impl Stream {
    /// Puts a message in; gives when it is to be taken out.
    pub fn push(&mut self, message: Option<Bytes>, delay: Duration, now: Instant) -> Instant {
        self.newest = self.newest.max(now + delay);
        self.queue.push_back((self.newest, message));
        self.newest
    }

    /// The next message that has arrived.
    pub fn pop(&mut self, now: Instant) -> Option<Option<Bytes>> {
        if self.queue.front()?.0 > now {
            return None;
        }
        self.queue.pop_front().map(|(_, message)| message)
    }
}
