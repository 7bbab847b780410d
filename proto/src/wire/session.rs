//! The session between an agent and a discovery server: messages, the same over every carrier.
//!
//! A message is `type u8 | body`, body by [`crate::wire::codec`]. A stream carrier (QUIC, one bidirectional stream that the
//! agent opens) puts a u32 length before each; a WebSocket carrier makes each one binary message. An unknown type is
//! counted and skipped; a body that does not decode ends the session.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::{Namespace, NodeId};
use mesh_common::key::{ClusterKeys, SignKey};

/// ALPN of the QUIC carrier, and the WebSocket subprotocol.
pub const ALPN: &str = "meshspan/1";
/// Path of the WebSocket carrier.
pub const WEBSOCKET_PATH: &str = "/meshspan/v1";
/// Label of the TLS exporter that binds a Hello to its connection; context empty, 32 bytes.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-meshspan-v1";

/// From agent to server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientMessage {
    Hello(Box<Hello>),
    /// Publish the node's own frame.
    Put(Bytes),
    /// Follow the namespace from here on; `None` = from the start.
    Watch(Option<Cursor>),
    /// Keeps the session alive; answered by `Pong` with the same number.
    Ping(u64),
}

/// From server to agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerMessage {
    /// To be signed in place of a TLS exporter by agents behind a TLS-terminating proxy. Sent first on every connection.
    Challenge([u8; 32]),
    Welcome(Welcome),
    /// The server has stored this sequence number of the node's own frame.
    Stored {
        seq: u64,
    },
    /// Everything before is void: a whole snapshot follows, ended by `Synced`.
    Restart,
    /// A member's newest frame, within a snapshot or as a delta.
    Frame(Bytes),
    /// A hint: the server lists this node no longer.
    Gone(NodeId),
    /// All up to this cursor has been sent.
    Synced(Cursor),
    Pong(u64),
    /// The server stops soon: come back after this long, jittered by the agent.
    Drain {
        retry_after: Duration,
    },
    Error(SessionError),
}

/// A point in the history of one server instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub server_instance: u64,
    pub version: u64,
}

/// How a Hello is bound to the connection it came on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// The TLS exporter of this connection.
    Exporter([u8; 32]),
    /// The server's challenge; only where the agent's configuration says `proxied: true`.
    Challenge([u8; 32]),
}

/// Proof of membership and identity: both keys sign one transcript.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub namespace: Namespace,
    pub node: NodeId,
    pub instance: [u8; 16],
    /// 0 = node; others are for later.
    pub role: u8,
    /// The server's name as written in the agent's configuration (host and port).
    pub server_name: String,
    /// Says which binding was signed, not its value.
    pub mode: BindingMode,
    pub wire_max: u8,
    pub membership_signature: [u8; 64],
    pub identity_signature: [u8; 64],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindingMode {
    Exporter,
    Challenge,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    pub server_instance: u64,
    /// The agent's address as the server sees it.
    pub observed: SocketAddr,
    /// UDP ports of the STUN service; empty when there is none.
    pub stun_ports: Vec<u16>,
    pub slot_ttl: Duration,
    pub max_slots: u32,
}

/// Why a request was not carried out, and when to ask again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}{}", if limit.is_empty() { String::new() } else { format!(" ({limit})") })]
pub struct SessionError {
    pub code: ErrorCode,
    /// The limit that was met, in the words of the server's flags and metrics; empty when none was.
    pub limit: String,
    pub retry_after: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ErrorCode {
    #[error("the proof of membership did not hold")]
    AuthFailed,
    #[error("the server serves other clusters only")]
    NamespaceRefused,
    #[error("the cluster has no free slot on this server")]
    ClusterFull,
    #[error("the server is full")]
    ServerFull,
    #[error("too many requests")]
    RateLimited,
    #[error("the message is not valid here")]
    Protocol,
    #[error("the frame is not valid")]
    BadFrame,
    #[error("the frame is older than the stored one")]
    Stale,
    #[error("the message is too large")]
    TooLarge,
}

impl Hello {
    /// Signs a Hello with both keys.
    pub fn sign(
        keys: &ClusterKeys,
        identity: &SignKey,
        instance: [u8; 16],
        server_name: &str,
        binding: Binding,
    ) -> Self {
        todo!()
    }

    /// Whether both signatures hold for this binding.
    pub fn verify(&self, binding: Binding) -> bool {
        todo!()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("message type {0} is not known")]
    UnknownType(u8),
    #[error("the message is malformed")]
    Malformed,
}

impl ClientMessage {
    pub fn encode(&self) -> Bytes {
        todo!()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}

impl ServerMessage {
    pub fn encode(&self) -> Bytes {
        todo!()
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        todo!()
    }
}

/// Cuts a byte stream into messages: u32 length, then that many bytes, at most [`MAX_MESSAGE`](mesh_common::limits::MAX_MESSAGE).
#[derive(Debug, Default)]
pub struct Deframer {}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes is over the limit")]
pub struct TooLong(pub u32);

impl Deframer {
    pub fn push(&mut self, bytes: &[u8]) {
        todo!()
    }

    /// The next whole message.
    pub fn next_message(&mut self) -> Result<Option<Bytes>, TooLong> {
        todo!()
    }
}

/// A message with its length before it, for a stream carrier.
pub fn enframe(message: &[u8]) -> Bytes {
    todo!()
}
