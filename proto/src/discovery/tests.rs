//! Client and server in one thread: whatever breaks, both ends meet again. And what the tests below share.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::{Namespace, NodeId};
use mesh_common::key::{ClusterKeys, ClusterSecret, SignKey};
use mesh_common::limits::{MAX_NAMESPACES, MAX_SLOTS_PER_NAMESPACE, MAX_STORED_BYTES, SESSION_IDLE, SLOT_TTL};
use mesh_common::time::Instant;

use super::client::{Client, ClientConfig, ClientEvent, ClientState};
use super::server::{ConnId, Server, ServerConfig, ServerEvent};
use crate::random::SplitMix64;
use crate::relay::switch::RelayLimits;
use crate::wire::frame::{Frame, Kind};

pub(super) fn at(seconds: u64) -> Instant {
    Instant::from_origin(Duration::from_secs(seconds))
}

/// The keys of cluster `n`.
pub(super) fn keys(n: u8) -> ClusterKeys {
    let mut secret = [n; 32];
    secret[0] = !n;
    ClusterSecret::from_bytes(secret).derive()
}

pub(super) fn identity(n: u8) -> SignKey {
    SignKey::from_seed(&[n; 32])
}

pub(super) fn node(n: u8) -> NodeId {
    identity(n).node_id()
}

/// A frame as a server sees it: well formed and signed, its content sealed for others.
pub(super) fn frame(namespace: Namespace, of: u8, kind: Kind, seq: u64) -> Frame {
    let ciphertext = [0; 512 + 16];
    let header = Frame::header(kind, &namespace, &node(of), seq, &[0; 24], 512 + 16);
    Frame::assemble(header, &ciphertext, &identity(of))
}

pub(super) fn server_config() -> ServerConfig {
    ServerConfig {
        instance: 1,
        slot_ttl: SLOT_TTL,
        only_namespaces: BTreeSet::new(),
        stun_ports: vec![3478, 3479],
        stun_alt: Vec::new(),
        relay: Some(RelayLimits::default()),
        own_names: BTreeSet::new(),
        max_connections: 1000,
        max_namespaces: MAX_NAMESPACES,
        max_slots_per_namespace: MAX_SLOTS_PER_NAMESPACE,
        max_stored_bytes: MAX_STORED_BYTES,
    }
}

pub(super) fn client_config(n: u8) -> ClientConfig {
    ClientConfig {
        server_name: "disc.example:7443".to_owned(),
        keys: keys(1),
        identity: identity(n),
        instance: [n; 16],
        proxied: false,
    }
}

/// One server and some agents on carriers that lose nothing until they are cut.
struct Pair {
    server: Option<Server>,
    agents: Vec<Agent>,
    /// Which agent a connection belongs to.
    carriers: BTreeMap<ConnId, usize>,
    next_conn: u64,
    instance: u64,
    own_names: BTreeSet<String>,
    now: Instant,
}

struct Agent {
    client: Client,
    conn: Option<ConnId>,
    /// What the agent knows of the others: newest frame bytes, and who is listed.
    frames: BTreeMap<NodeId, Bytes>,
    listed: BTreeSet<NodeId>,
    welcomes: u32,
    lost: Vec<String>,
}

impl Pair {
    fn new(agents: u8, proxied: bool, seed: u64) -> Self {
        let now = at(1);
        let agents = (1..=agents)
            .map(|n| {
                let mut client = Client::new(ClientConfig { proxied, ..client_config(n) }, seed + u64::from(n), now);
                client.publish(frame(keys(1).namespace, n, Kind::Record, 1), now);
                Agent {
                    client,
                    conn: None,
                    frames: BTreeMap::new(),
                    listed: BTreeSet::new(),
                    welcomes: 0,
                    lost: Vec::new(),
                }
            })
            .collect();
        let mut pair = Self {
            server: None,
            agents,
            carriers: BTreeMap::new(),
            next_conn: 0,
            instance: 0,
            own_names: BTreeSet::from(["disc.example".to_owned()]),
            now,
        };
        pair.start_server();
        pair
    }

    fn start_server(&mut self) {
        self.instance += 1;
        let config = ServerConfig { instance: self.instance, own_names: self.own_names.clone(), ..server_config() };
        self.server = Some(Server::new(config, [u8::try_from(self.instance).unwrap(); 32]));
    }

    fn kill_server(&mut self) {
        self.server = None;
        let cut: Vec<ConnId> = self.carriers.keys().copied().collect();
        for conn in cut {
            self.cut(conn);
        }
    }

    /// The carrier breaks, both ends hear of it.
    fn cut(&mut self, conn: ConnId) {
        if let Some(agent) = self.carriers.remove(&conn) {
            self.agents[agent].conn = None;
            self.agents[agent].client.handle_disconnected("connection reset", self.now);
        }
        if let Some(server) = &mut self.server {
            server.handle_disconnected(conn, self.now);
        }
    }

    /// Carries everything both sides have to say at this moment.
    fn settle(&mut self) {
        while self.step_agents() | self.step_server() {}
    }

    fn step_agents(&mut self) -> bool {
        let mut busy = false;
        for index in 0..self.agents.len() {
            let agent = &mut self.agents[index];
            while let Some(message) = agent.client.poll_transmit() {
                busy = true;
                if let (Some(conn), Some(server)) = (agent.conn, &mut self.server) {
                    server.handle_message(conn, &message, self.now);
                }
            }
            while let Some(event) = self.agents[index].client.poll_event() {
                busy = true;
                self.handle_client_event(index, event);
            }
        }
        busy
    }

    fn handle_client_event(&mut self, index: usize, event: ClientEvent) {
        let agent = &mut self.agents[index];
        match event {
            ClientEvent::Dial => match &mut self.server {
                Some(server) => {
                    self.next_conn += 1;
                    let conn = ConnId(self.next_conn);
                    let remote = SocketAddr::from(([192, 0, 2, u8::try_from(index).unwrap()], 4000));
                    let exporter = [u8::try_from(self.next_conn % 251).unwrap(); 32];
                    agent.conn = Some(conn);
                    self.carriers.insert(conn, index);
                    server.handle_connected(conn, remote, exporter, self.now);
                    agent.client.handle_connected(exporter, self.now);
                }
                None => agent.client.handle_disconnected("connection refused", self.now),
            },
            ClientEvent::HangUp => {
                if let Some(conn) = agent.conn.take() {
                    self.carriers.remove(&conn);
                    if let Some(server) = &mut self.server {
                        server.handle_disconnected(conn, self.now);
                    }
                }
            }
            ClientEvent::Welcomed { .. } => agent.welcomes += 1,
            ClientEvent::Frame(bytes) => {
                agent.frames.insert(Frame::parse(bytes.clone()).unwrap().node(), bytes);
            }
            ClientEvent::Synced { listed } => agent.listed = listed,
            ClientEvent::Gone(node) => {
                agent.listed.remove(&node);
            }
            ClientEvent::Lost { reason, .. } => agent.lost.push(reason),
            ClientEvent::Stored { .. }
            | ClientEvent::Refused(_)
            | ClientEvent::Relayed { .. }
            | ClientEvent::NoPeer(_) => {}
        }
    }

    fn step_server(&mut self) -> bool {
        let mut busy = false;
        while let Some(event) = self.server.as_mut().and_then(Server::poll_event) {
            busy = true;
            match event {
                ServerEvent::Wake(conn) => self.deliver(conn),
                ServerEvent::Close(conn) => {
                    self.deliver(conn);
                    self.cut(conn);
                }
                _ => {}
            }
        }
        busy
    }

    fn deliver(&mut self, conn: ConnId) {
        while let Some(message) = self.server.as_mut().and_then(|server| server.poll_transmit(conn, self.now)) {
            if let Some(agent) = self.carriers.get(&conn) {
                self.agents[*agent].client.handle_message(&message, self.now);
            }
        }
    }

    /// Runs until `end` by deadlines alone.
    fn run_until(&mut self, end: Instant) {
        loop {
            self.settle();
            let next = self
                .agents
                .iter()
                .filter_map(|agent| agent.client.poll_timeout())
                .chain(self.server.as_ref().and_then(Server::poll_timeout))
                .map(|(due, _)| due)
                .min();
            let Some(next) = next.filter(|next| *next <= end) else { break };
            assert!(next >= self.now, "a deadline was left behind");
            self.now = self.now.max(next);
            if let Some(server) = &mut self.server {
                server.handle_timeout(self.now);
            }
            for agent in &mut self.agents {
                agent.client.handle_timeout(self.now);
            }
        }
        self.now = end;
    }

    fn run_for(&mut self, duration: Duration) {
        self.run_until(self.now + duration);
    }

    /// Every agent is live, lists exactly the others, and has their newest frames.
    fn assert_converged(&self, newest: &BTreeMap<NodeId, u64>, context: &str) {
        for (index, agent) in self.agents.iter().enumerate() {
            let own = node(u8::try_from(index + 1).unwrap());
            assert_eq!(agent.client.state(), ClientState::Live, "agent {index}, {context}: {:?}", agent.lost.last());
            let others: BTreeSet<NodeId> = newest.keys().filter(|node| **node != own).copied().collect();
            assert_eq!(agent.listed, others, "agent {index}, {context}");
            for other in others {
                let seq = Frame::parse(agent.frames[&other].clone()).unwrap().seq();
                assert_eq!(seq, newest[&other], "agent {index}, {context}");
            }
        }
    }
}

fn newest(agents: u8, seq: u64) -> BTreeMap<NodeId, u64> {
    (1..=agents).map(|n| (node(n), seq)).collect()
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn agents_find_each_other_at_once() {
    for proxied in [false, true] {
        let mut pair = Pair::new(4, proxied, 1);
        pair.settle();
        pair.assert_converged(&newest(4, 1), if proxied { "by challenge" } else { "by exporter" });
    }
}

#[test]
fn a_quiet_session_stays_up_for_hours() {
    let mut pair = Pair::new(2, false, 2);
    pair.run_for(SECOND * 3 * 3600);
    pair.assert_converged(&newest(2, 1), "after three hours");
    assert!(pair.agents.iter().all(|agent| agent.lost.is_empty() && agent.welcomes == 1));
}

#[test]
fn a_change_reaches_everybody_and_a_farewell_unlists() {
    let mut pair = Pair::new(3, false, 3);
    pair.settle();
    pair.agents[0].client.publish(frame(keys(1).namespace, 1, Kind::Record, 2), pair.now);
    pair.settle();
    let mut expected = newest(3, 1);
    expected.insert(node(1), 2);
    pair.assert_converged(&expected, "a newer record");

    pair.agents[0].client.publish(frame(keys(1).namespace, 1, Kind::Tombstone, 3), pair.now);
    pair.settle();
    pair.agents[0].client.stop();
    pair.settle();
    assert!(pair.agents[0].conn.is_none(), "stopping hangs up");
    for agent in &pair.agents[1..] {
        assert!(!agent.listed.contains(&node(1)));
        assert_eq!(Frame::parse(agent.frames[&node(1)].clone()).unwrap().kind(), Kind::Tombstone);
    }
    pair.run_for(SECOND * 300);
    assert_eq!(pair.agents[0].client.poll_timeout(), None, "a stopped client wants nothing");
}

#[test]
fn a_killed_server_comes_back_as_another_instance() {
    let mut pair = Pair::new(3, false, 4);
    pair.settle();
    pair.kill_server();
    pair.run_for(SECOND * 40);
    assert!(pair.agents[0].lost.iter().any(|reason| reason.contains("refused")));
    pair.start_server();
    pair.run_for(SECOND * 30);
    pair.assert_converged(&newest(3, 1), "after the restart");
}

#[test]
fn a_drained_server_has_everybody_back_within_the_spread() {
    let mut pair = Pair::new(3, false, 5);
    pair.settle();
    pair.server.as_mut().unwrap().handle_shutdown(SECOND * 5, pair.now);
    pair.settle();
    assert!(pair.carriers.is_empty(), "clients hang up by themselves");
    pair.start_server();
    pair.run_for(SECOND * 5);
    pair.assert_converged(&newest(3, 1), "after the drain");
}

#[test]
fn a_carrier_that_dies_without_a_word_is_noticed_by_both_ends() {
    let mut pair = Pair::new(2, false, 6);
    pair.settle();
    // Packets vanish: neither end hears of the other, and nobody says so.
    let conn = pair.agents[0].conn.take().unwrap();
    pair.carriers.remove(&conn);
    pair.run_for(SESSION_IDLE + SECOND * 2);
    assert!(pair.agents[0].lost[0].contains("silent"), "{:?}", pair.agents[0].lost);
    pair.assert_converged(&newest(2, 1), "on a new carrier");
    assert_eq!(pair.server.as_ref().unwrap().stats().refused["session-idle"], 1);
}

#[test]
fn an_agent_that_was_away_resumes_without_a_snapshot() {
    let mut pair = Pair::new(3, false, 7);
    pair.settle();
    let sent = |pair: &Pair| pair.server.as_ref().unwrap().stats().frames_sent;
    let before = sent(&pair);
    pair.cut(pair.agents[0].conn.unwrap());
    pair.agents[1].client.publish(frame(keys(1).namespace, 2, Kind::Record, 2), pair.now);
    pair.run_for(SECOND * 2);
    let mut expected = newest(3, 1);
    expected.insert(node(2), 2);
    pair.assert_converged(&expected, "after the gap");
    // One to its author, one to the agent that stayed, one to the one that was away: no frame was told twice.
    assert_eq!(sent(&pair) - before, 3);
}

#[test]
fn any_order_of_cuts_restarts_and_changes_converges() {
    for seed in 0..60 {
        let mut random = SplitMix64::new(seed);
        let mut pair = Pair::new(4, seed % 3 == 0, seed * 1000);
        let mut expected = newest(4, 1);
        for _ in 0..30 {
            match random.below(6) {
                0 => pair.kill_server(),
                1 if pair.server.is_none() => pair.start_server(),
                2 => {
                    let carriers: Vec<ConnId> = pair.carriers.keys().copied().collect();
                    if !carriers.is_empty() {
                        let index = usize::try_from(random.below(carriers.len() as u64)).unwrap();
                        pair.cut(carriers[index]);
                    }
                }
                3 => {
                    let of = u8::try_from(random.below(4)).unwrap() + 1;
                    let seq = expected[&node(of)] + 1;
                    expected.insert(node(of), seq);
                    let frame = frame(keys(1).namespace, of, Kind::Record, seq);
                    pair.agents[usize::from(of) - 1].client.publish(frame, pair.now);
                }
                4 if pair.server.is_some() => {
                    pair.server.as_mut().unwrap().handle_shutdown(SECOND, pair.now);
                    pair.settle();
                    pair.kill_server();
                }
                _ => {}
            }
            pair.run_for(random.between(Duration::ZERO, SECOND * 20));
        }
        if pair.server.is_none() {
            pair.start_server();
        }
        pair.run_for(SECOND * 31);
        pair.assert_converged(&expected, &format!("seed {seed}"));
    }
}
