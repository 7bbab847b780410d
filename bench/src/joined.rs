//! The composed agent in a mesh: it has learned all members from a server and the host is as it wants it.
//!
//! The driver here does what the shell does, without I/O: it answers every event, and stops at the steps for the host.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::limits::{MAX_SLOTS_PER_NAMESPACE, SLOT_TTL};
use mesh_common::time::Instant;
use mesh_proto::device::{Action, Observed};
use mesh_proto::mesh::agent::{Agent, AgentEvent, Start};
use mesh_proto::mesh::members::ServerId;
use mesh_proto::wire::session::{Cursor, ServerMessage, Welcome};

use crate::member::{Member, cluster_keys, frames};
use crate::node::{bare_host, carry_out, settings};

/// The agent waits this long for more news before it works out what they mean; a little more here.
const SETTLED: Duration = Duration::from_millis(6);
const SERVER: ServerId = ServerId(0);

/// A joined agent and its host.
#[derive(Debug)]
pub struct Joined {
    agent: Agent,
    host: Observed,
    now: Instant,
    version: u64,
}

impl Joined {
    /// An agent that knows the members 1 to `count`.
    pub fn among(count: u16) -> Self {
        let own = Member::numbered(0);
        let start = Start {
            keys: cluster_keys(),
            wg_public: own.wg.public(),
            wg_proof: own.wg.prove(&own.identity.node_id()),
            identity: own.identity,
            instance: [9; 16],
            seed: [8; 32],
            unix_ms: 10_000,
            last_seq: 0,
            claim: None,
            marks: BTreeMap::new(),
            frames: Vec::new(),
        };
        let now = Instant::ORIGIN;
        let mut joined = Self { agent: Agent::new(settings(), start, now), host: bare_host(), now, version: 0 };
        joined.agent.handle_observed(joined.host.clone(), now);
        joined.settle();
        let welcome = Welcome {
            server_instance: 1,
            observed: SocketAddr::from(([192, 0, 2, 10], 40_000)),
            stun_ports: Vec::new(),
            slot_ttl: SLOT_TTL,
            max_slots: u32::try_from(MAX_SLOTS_PER_NAMESPACE).unwrap_or(u32::MAX),
        };
        joined.hear(&ServerMessage::Welcome(welcome).encode());
        joined.hear(&ServerMessage::Restart.encode());
        for frame in frames(count) {
            joined.hear(&ServerMessage::Frame(frame).encode());
        }
        joined.hear_synced();
        joined.settle();
        joined
    }

    /// A changed record as the server sends it. `seq` is the version.
    pub fn news_of(&self, number: u16, seq: u64) -> Bytes {
        let frame = Member::numbered(number).changed_frame(&cluster_keys(), seq);
        ServerMessage::Frame(frame.as_bytes().clone()).encode()
    }

    /// The agent hears a message and works out what to do: the steps for the host, which are not carried out yet.
    pub fn react(&mut self, message: &[u8]) -> Vec<Action> {
        self.hear(message);
        self.now += SETTLED;
        self.agent.handle_timeout(self.now);
        self.drain()
    }

    /// Carries out steps of [`Self::react`] and whatever follows from them, until the agent wants nothing more.
    pub fn apply(&mut self, mut steps: Vec<Action>) {
        while !steps.is_empty() {
            carry_out(&mut self.host, &steps);
            self.agent.handle_applied(Vec::new(), self.host.clone(), self.now);
            steps = self.drain();
        }
    }

    /// Peers that the host holds.
    pub fn peers(&self) -> usize {
        self.host.peers.len()
    }

    fn hear(&mut self, message: &[u8]) {
        self.agent.handle_message(SERVER, message, self.now);
    }

    fn hear_synced(&mut self) {
        self.version += 1;
        let cursor = Cursor { server_instance: 1, version: self.version };
        self.hear(&ServerMessage::Synced(cursor).encode());
    }

    fn settle(&mut self) {
        self.now += SETTLED;
        self.agent.handle_timeout(self.now);
        let steps = self.drain();
        self.apply(steps);
    }

    /// Answers every event but the steps, and takes what is to be sent off the agent.
    fn drain(&mut self) -> Vec<Action> {
        let mut steps = Vec::new();
        while let Some(event) = self.agent.poll_event() {
            match event {
                AgentEvent::Dial(server) => self.agent.handle_connected(server, [7; 32], self.now),
                AgentEvent::ReserveSeq(seq) => self.agent.handle_seq_reserved(seq, self.now),
                AgentEvent::Apply(actions) => steps.extend(actions),
                _ => {}
            }
        }
        while self.agent.poll_transmit().is_some() {}
        steps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_joined_agent_reacts_to_a_changed_record_with_its_steps() {
        let mut joined = Joined::among(30);
        assert_eq!(joined.peers(), 30);
        for seq in 2..6 {
            let steps = joined.react(&joined.news_of(5, seq));
            assert_eq!(steps.len(), 3, "version {seq}: {steps:?}");
            joined.apply(steps);
            assert_eq!(joined.react(&joined.news_of(5, seq)), [], "version {seq} again");
        }
    }
}
