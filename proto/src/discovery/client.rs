//! An agent's session with one server: connect, prove, publish, watch, keep alive, come back.
//!
//! Owns backoff and cursors. Holds no records: frames pass through as events, unverified.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::NodeId;
use mesh_common::key::{ClusterKeys, SignKey};
use mesh_common::time::Instant;

use crate::wire::frame::Frame;
use crate::wire::session::{Binding, SessionError};

#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Host and port as configured; part of the signed transcript.
    pub server_name: String,
    pub keys: ClusterKeys,
    pub identity: SignKey,
    pub instance: [u8; 16],
    /// Bind to the server's challenge instead of the TLS exporter.
    pub proxied: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientEvent {
    /// Open a carrier to the server, then call `handle_connected` or `handle_disconnected`.
    Dial,
    /// Close the carrier that is open.
    HangUp,
    /// The server accepted the proof.
    Welcomed {
        observed: SocketAddr,
        stun_ports: Vec<u16>,
    },
    /// A frame of some member, not verified yet.
    Frame(Bytes),
    /// The snapshot is whole: `listed` are all nodes this server lists.
    Synced {
        listed: std::collections::BTreeSet<NodeId>,
    },
    /// The server lists this node no longer: a hint.
    Gone(NodeId),
    /// Our own frame of this sequence number is stored.
    Stored { seq: u64 },
    /// The server refused something.
    Refused(SessionError),
    /// The session ended for this reason; the client comes back by itself after `retry_in`.
    Lost { reason: String, retry_in: Duration },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientState {
    /// Waiting for the next attempt.
    Waiting {
        until: Instant,
    },
    Dialing,
    /// The carrier is up, the proof is not answered yet.
    Proving,
    /// Accepted; the first snapshot is under way.
    Syncing,
    Live,
    Stopped,
}

#[derive(Debug)]
pub struct Client {}

impl Client {
    /// Starts at once: the first event is `Dial`. `seed` draws the jitter.
    pub fn new(config: ClientConfig, seed: u64, now: Instant) -> Self {
        todo!()
    }

    /// A carrier is up; its TLS exporter value.
    pub fn handle_connected(&mut self, exporter: [u8; 32], now: Instant) {
        todo!()
    }

    /// Dialling failed or the carrier broke; `reason` is for people (it names wrong pins, refused connections and so on).
    pub fn handle_disconnected(&mut self, reason: &str, now: Instant) {
        todo!()
    }

    pub fn handle_message(&mut self, message: &[u8], now: Instant) {
        todo!()
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        todo!()
    }

    /// The host's network changed: try again at once when waiting.
    pub fn handle_network_changed(&mut self, now: Instant) {
        todo!()
    }

    /// The node's own newest frame: put now, and again after every reconnect, until a newer one replaces it.
    pub fn publish(&mut self, frame: Frame, now: Instant) {
        todo!()
    }

    /// Ends the session for good (after pending messages were polled, `HangUp`).
    pub fn stop(&mut self) {
        todo!()
    }

    pub fn state(&self) -> ClientState {
        todo!()
    }

    /// Malformed or unknown messages of this server so far.
    pub fn malformed(&self) -> u64 {
        todo!()
    }

    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        todo!()
    }

    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        todo!()
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        todo!()
    }
}
