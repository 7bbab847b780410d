//! The server machine: every connection of every agent, and what each is told.
//!
//! Owns proofs, limits, the store and one cursor per watcher. Pull-based, so a slow reader costs no memory: the shell calls
//! [`Server::poll_transmit`] for a connection only when that connection's carrier can take more, and watch messages are
//! made at that moment from the newest state.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::{Namespace, NodeId};
use mesh_common::time::Instant;

/// A connection, numbered by the shell; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Random per start: cursors of another instance mean a whole snapshot.
    pub instance: u64,
    pub slot_ttl: Duration,
    /// Empty = open to every namespace within the public budgets.
    pub only_namespaces: BTreeSet<Namespace>,
    pub stun_ports: Vec<u16>,
    /// Host names (without port) this server answers a challenge-bound Hello for.
    pub own_names: BTreeSet<String>,
    pub max_connections: usize,
    pub max_namespaces: usize,
    pub max_slots_per_namespace: usize,
}

/// What the shell has to do beyond sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerEvent {
    /// This connection has something to send: poll it when its carrier can take more.
    Wake(ConnId),
    /// Send what is queued, then close the carrier.
    Close(ConnId),
    Joined {
        conn: ConnId,
        namespace: Namespace,
        node: NodeId,
    },
    Left {
        namespace: Namespace,
        node: NodeId,
    },
    NamespaceOpened(Namespace),
    NamespaceFreed(Namespace),
}

/// Totals for metrics and health.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerStats {
    pub connections: u64,
    pub namespaces: u64,
    pub slots: u64,
    pub stored_bytes: u64,
    pub hellos_accepted: u64,
    pub puts_accepted: u64,
    pub frames_sent: u64,
    /// Refusals and drops by reason, in the words of the error's limit or of the drop.
    pub refused: std::collections::BTreeMap<&'static str, u64>,
}

#[derive(Debug)]
pub struct Server {}

impl Server {
    /// `seed` is 32 random bytes: challenges are drawn from it.
    pub fn new(config: ServerConfig, seed: [u8; 32]) -> Self {
        todo!()
    }

    /// A carrier is up. `exporter` is its TLS exporter value. Refused at once (event `Close`) when the server is full.
    pub fn handle_connected(
        &mut self,
        conn: ConnId,
        remote: SocketAddr,
        exporter: [u8; 32],
        now: Instant,
    ) {
        todo!()
    }

    /// One whole message of a connection.
    pub fn handle_message(&mut self, conn: ConnId, message: &[u8], now: Instant) {
        todo!()
    }

    /// The carrier is gone.
    pub fn handle_disconnected(&mut self, conn: ConnId, now: Instant) {
        todo!()
    }

    /// Asks every client to come back later, spread over `spread`.
    pub fn handle_shutdown(&mut self, spread: Duration, now: Instant) {
        todo!()
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        todo!()
    }

    /// The next message for this connection, or `None` until its next `Wake`.
    pub fn poll_transmit(&mut self, conn: ConnId, now: Instant) -> Option<Bytes> {
        todo!()
    }

    pub fn poll_event(&mut self) -> Option<ServerEvent> {
        todo!()
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        todo!()
    }

    pub fn stats(&self) -> ServerStats {
        todo!()
    }
}
