//! The UDP port of a node that shares its public address with other nodes.
//!
//! A NAT leads one of its outer ports to one node only. Of nodes with one inner port all but one get another port outside,
//! and it is another one whenever the NAT forgets; port forwarding finds one of them at most. So of two such nodes the
//! newcomer, by the claims to their overlay addresses, moves to a port of its own: drawn from its identity, so it is the same at each start and wherever else
//! two of them meet.
//!
//! Owns the decision; the shell keeps the port and starts anew with it. Bounded: a node that moved already moves again only
//! after [`MOVE_AGAIN`], whatever members announce, and [`CHOICES`] ports are tried.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use mesh_common::addr::Claim;
use mesh_common::id::NodeId;
use mesh_common::time::Instant;
use sha2::{Digest, Sha256};

use super::{Agent, AgentEvent};
use crate::wire::record::{CandidateKind, Record};

/// A start is a burst of records and of STUN answers.
const SETTLES: Duration = Duration::from_millis(500);
/// A move is a new start of the node: no member can make us move more often.
const MOVE_AGAIN: Duration = Duration::from_secs(600);
/// Ports that a node may move to.
const CHOICES: u8 = 16;
/// Below the ports that Linux and Kubernetes (NodePort) give to others.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 10_000;

#[derive(Debug, Default)]
pub(super) struct PortMove {
    /// Since when another node has our port.
    shared_since: Option<Instant>,
    is_asked: bool,
    /// Other programs of this host have these.
    taken: BTreeSet<u16>,
}

impl Agent {
    /// The port that [`AgentEvent::MovePort`] asked for is another program's: another one is chosen.
    pub fn handle_port_taken(&mut self, port: u16, now: Instant) {
        self.port_move.taken.insert(port);
        self.port_move.is_asked = false;
        self.work_out_at(now);
        self.settle(now);
    }

    /// Asks to move when another node at our public address has our port and the right to it.
    pub(super) fn move_from_shared_port(&mut self, now: Instant) {
        let Some((_, ours)) = self.own_claim() else { return };
        let is_before_us = |(node, record): &(NodeId, &Record)| {
            let theirs = record.overlay_v4.map(|claim| Claim { claimed_at_ms: claim.claimed_at_ms, node: *node });
            theirs.is_some_and(|theirs| theirs < ours)
        };
        let port = self.settings.listen_port;
        let neighbours = self.neighbours(now);
        let is_shared = neighbours.iter().any(|peer| is_before_us(peer) && ports(peer.1).any(|at| at == port));
        let theirs: BTreeSet<u16> = neighbours.iter().flat_map(|(_, record)| ports(record)).collect();
        if !is_shared || self.port_move.is_asked {
            self.port_move.shared_since = None;
            return;
        }
        let since = *self.port_move.shared_since.get_or_insert(now);
        let rests_until = if self.choices().any(|own| own == port) { self.started.0 + MOVE_AGAIN } else { since };
        let move_at = rests_until.max(since + SETTLES);
        if now < move_at {
            return self.work_out_at(move_at);
        }
        let is_free = |own: &u16| !theirs.contains(own) && !self.port_move.taken.contains(own);
        let Some(chosen) = self.choices().find(is_free) else { return };
        tracing::info!(
            from = port,
            to = chosen,
            "another node behind the same NAT has our UDP port: moving to another"
        );
        self.port_move.is_asked = true;
        self.events.push_back(AgentEvent::MovePort(chosen));
    }

    /// Members that servers see at our own public address. IPv6 is not translated.
    fn neighbours(&self, now: Instant) -> Vec<(NodeId, &Record)> {
        let net = &self.net.report().v4;
        if net.is_translated != Some(true) {
            return Vec::new();
        }
        let own: BTreeSet<IpAddr> = net.reflexive.iter().map(|at| at.ip()).collect();
        let is_public = |kind| matches!(kind, CandidateKind::Reflexive | CandidateKind::Mapped);
        let is_here = |record: &Record| {
            record.candidates.iter().any(|at| is_public(at.kind) && own.contains(&at.addr.ip().to_canonical()))
        };
        let members = self.members.iter().filter(|(_, member)| member.is_live(now) && is_here(&member.record));
        members.map(|(node, member)| (*node, &member.record)).collect()
    }

    fn choices(&self) -> impl Iterator<Item = u16> {
        let node = self.identity.node_id();
        (0..CHOICES).map(move |number| {
            let hash = Sha256::new().chain_update(b"meshspan/v1 port").chain_update(node.0).chain_update([number]);
            let hash: [u8; 32] = hash.finalize().into();
            FIRST_PORT + u16::from_le_bytes([hash[0], hash[1]]) % PORTS
        })
    }
}

/// Where the node itself listens, as it says.
fn ports(record: &Record) -> impl Iterator<Item = u16> {
    record.candidates.iter().filter(|at| at.kind == CandidateKind::Host).map(|at| at.addr.port())
}
