//! The session between an agent and a discovery server: messages, the same over every carrier.
//!
//! A message is `type u8 | body`, body by [`crate::wire::codec`]. A stream carrier (QUIC, one bidirectional stream that the
//! agent opens) puts a u32 length before each; a WebSocket carrier makes each one binary message. An unknown type is
//! counted and skipped; a body that does not decode ends the session. Relay and Relayed travel beside
//! the stream of QUIC, as a datagram each where that fits: they may be lost and overtake each other, nothing else may.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use mesh_common::id::{Namespace, NodeId};
use mesh_common::key::{self, ClusterKeys, SignKey};
use mesh_common::limits::{MAX_MESSAGE, MAX_RELAY_PAYLOAD};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::wire;
use crate::wire::codec;
use body::{WireCursor, WireError, WireHello, WireWelcome, from_millis, millis, mode_byte};

mod body;

/// ALPN of the QUIC carrier, and the WebSocket subprotocol.
pub const ALPN: &str = "meshspan/1";
/// Path of the WebSocket carrier.
pub const WEBSOCKET_PATH: &str = "/meshspan/v1";
/// Label of the TLS exporter that binds a Hello to its connection; context empty, 32 bytes.
pub const EXPORTER_LABEL: &[u8] = b"EXPORTER-meshspan-v1";
/// The longest server name in a Hello: a DNS name or address with a port, and some room.
pub const MAX_SERVER_NAME: usize = 300;
/// STUN ports in a Welcome.
pub const MAX_STUN_PORTS: usize = 8;
/// Alternate STUN addresses in a Welcome.
pub const MAX_STUN_ALT: usize = 4;
/// The longest name of a limit in an error.
pub const MAX_LIMIT_NAME: usize = 64;

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
    /// Hand these bytes to another node of the namespace, if it is there: a datagram, 1 to [`MAX_RELAY_PAYLOAD`] bytes.
    Relay {
        to: NodeId,
        payload: Bytes,
    },
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
    /// A datagram from another node of the namespace, by its session.
    Relayed {
        from: NodeId,
        payload: Bytes,
    },
    /// This server does not reach that node: what was to be relayed to it is lost.
    NoPeer(NodeId),
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
    /// Whether the server relays.
    pub relay: bool,
    /// Other addresses of the STUN service, to tell more about a NAT; often none.
    pub stun_alt: Vec<SocketAddr>,
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
        let mut hello = Self {
            namespace: keys.namespace,
            node: identity.node_id(),
            instance,
            role: ROLE_NODE,
            server_name: server_name.to_owned(),
            mode: binding.mode(),
            wire_max: wire::VERSION,
            membership_signature: [0; 64],
            identity_signature: [0; 64],
        };
        let transcript = hello.transcript(binding);
        hello.membership_signature = keys.membership.sign(LABEL_MEMBERSHIP, &transcript);
        hello.identity_signature = identity.sign(LABEL_IDENTITY, &transcript);
        hello
    }

    /// Whether both signatures hold for this binding.
    pub fn verify(&self, binding: Binding) -> bool {
        let transcript = self.transcript(binding);
        self.mode == binding.mode()
            && key::verify(&self.namespace.0, LABEL_MEMBERSHIP, &transcript, &self.membership_signature)
            && key::verify(&self.node.0, LABEL_IDENTITY, &transcript, &self.identity_signature)
    }

    /// What both keys sign: every field has a fixed length or its length before it.
    fn transcript(&self, binding: Binding) -> Vec<u8> {
        let (Binding::Exporter(value) | Binding::Challenge(value)) = binding;
        let mut bytes = Vec::with_capacity(128 + self.server_name.len());
        bytes.push(mode_byte(self.mode));
        bytes.extend_from_slice(&self.namespace.0);
        bytes.extend_from_slice(&self.node.0);
        bytes.extend_from_slice(&self.instance);
        bytes.extend_from_slice(&[self.role, self.wire_max]);
        bytes.extend_from_slice(&(self.server_name.len() as u64).to_le_bytes());
        bytes.extend_from_slice(self.server_name.as_bytes());
        bytes.extend_from_slice(&value);
        bytes
    }
}

impl Binding {
    pub fn mode(&self) -> BindingMode {
        match self {
            Self::Exporter(_) => BindingMode::Exporter,
            Self::Challenge(_) => BindingMode::Challenge,
        }
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
        match self {
            Self::Hello(hello) => message(HELLO, &WireHello::from(&**hello)),
            Self::Put(frame) => raw_message(PUT, frame),
            Self::Watch(cursor) => message(WATCH, &cursor.map(WireCursor::from)),
            Self::Ping(number) => message(PING, number),
            Self::Relay { to, payload } => Self::relay(to, payload),
        }
    }

    /// The bytes of a Relay. The payload is one that fits: 1 to [`MAX_RELAY_PAYLOAD`] bytes.
    pub fn relay(to: &NodeId, payload: &[u8]) -> Bytes {
        addressed(RELAY, to, payload)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (kind, body) = split(bytes)?;
        Ok(match kind {
            HELLO => Self::Hello(Box::new(decode::<WireHello>(body)?.into_hello()?)),
            PUT => Self::Put(Bytes::copy_from_slice(body)),
            WATCH => Self::Watch(decode::<Option<WireCursor>>(body)?.map(Cursor::from)),
            PING => Self::Ping(decode(body)?),
            RELAY => {
                let (to, payload) = split_addressed(body)?;
                Self::Relay { to, payload }
            }
            unknown => return Err(DecodeError::UnknownType(unknown)),
        })
    }
}

impl ServerMessage {
    pub fn encode(&self) -> Bytes {
        match self {
            Self::Challenge(nonce) => message(CHALLENGE, nonce),
            Self::Welcome(welcome) => message(WELCOME, &WireWelcome::from(welcome)),
            Self::Stored { seq } => message(STORED, seq),
            Self::Restart => message(RESTART, &()),
            Self::Frame(frame) => raw_message(FRAME, frame),
            Self::Gone(node) => message(GONE, &node.0),
            Self::Synced(cursor) => message(SYNCED, &WireCursor::from(*cursor)),
            Self::Pong(number) => message(PONG, number),
            Self::Drain { retry_after } => message(DRAIN, &millis(*retry_after)),
            Self::Error(error) => message(ERROR, &WireError::from(error)),
            Self::Relayed { from, payload } => Self::relayed(from, payload),
            Self::NoPeer(node) => message(NO_PEER, &node.0),
        }
    }

    /// The bytes of a Relayed, from the payload of a Relay.
    pub fn relayed(from: &NodeId, payload: &[u8]) -> Bytes {
        addressed(RELAYED, from, payload)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (kind, body) = split(bytes)?;
        Ok(match kind {
            CHALLENGE => Self::Challenge(decode(body)?),
            WELCOME => Self::Welcome(decode::<WireWelcome>(body)?.into()),
            STORED => Self::Stored { seq: decode(body)? },
            RESTART => {
                decode::<()>(body)?;
                Self::Restart
            }
            FRAME => Self::Frame(Bytes::copy_from_slice(body)),
            GONE => Self::Gone(NodeId(decode(body)?)),
            SYNCED => Self::Synced(decode::<WireCursor>(body)?.into()),
            PONG => Self::Pong(decode(body)?),
            DRAIN => Self::Drain { retry_after: from_millis(decode(body)?) },
            ERROR => Self::Error(decode::<WireError>(body)?.into_error()?),
            RELAYED => {
                let (from, payload) = split_addressed(body)?;
                Self::Relayed { from, payload }
            }
            NO_PEER => Self::NoPeer(NodeId(decode(body)?)),
            unknown => return Err(DecodeError::UnknownType(unknown)),
        })
    }
}

/// Whether a message of a server is a Relayed one: it may be dropped, where others wait.
pub fn is_relayed(message: &[u8]) -> bool {
    message.first() == Some(&RELAYED)
}

/// Cuts a byte stream into messages: u32 length, then that many bytes, at most [`MAX_MESSAGE`](mesh_common::limits::MAX_MESSAGE).
///
/// After [`TooLong`] the stream has no beginning of a message any more: every later call says the same.
#[derive(Debug, Default)]
pub struct Deframer {
    buffer: BytesMut,
    broken: Option<TooLong>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a message of {0} bytes is over the limit")]
pub struct TooLong(pub u32);

impl Deframer {
    /// What it buffers at most. A driver that takes the messages out after each push never meets it.
    pub const MAX_BUFFERED: usize = 256 * 1024;

    /// Adds bytes of the stream. More than [`Self::MAX_BUFFERED`] of unread ones break it, so memory stays bounded.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.broken.is_some() {
            return;
        }
        let total = self.buffer.len().saturating_add(bytes.len());
        if total > Self::MAX_BUFFERED {
            self.fail(TooLong(u32::try_from(total).unwrap_or(u32::MAX)));
            return;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message.
    pub fn next_message(&mut self) -> Result<Option<Bytes>, TooLong> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let Some(len) = self.buffer.first_chunk().copied().map(u32::from_le_bytes) else { return Ok(None) };
        let Some(len) = usize::try_from(len).ok().filter(|len| *len <= MAX_MESSAGE) else {
            return Err(self.fail(TooLong(len)));
        };
        if self.buffer.len() < LENGTH_LEN + len {
            return Ok(None);
        }
        self.buffer.advance(LENGTH_LEN);
        Ok(Some(self.buffer.split_to(len).freeze()))
    }

    fn fail(&mut self, error: TooLong) -> TooLong {
        self.buffer = BytesMut::new();
        *self.broken.insert(error)
    }
}

/// A message with its length before it, for a stream carrier.
pub fn enframe(message: &[u8]) -> Bytes {
    let len = u32::try_from(message.len()).expect("a message is at most MAX_MESSAGE bytes");
    let mut bytes = BytesMut::with_capacity(LENGTH_LEN + message.len());
    bytes.put_u32_le(len);
    bytes.put_slice(message);
    bytes.freeze()
}

/// What a Relay or Relayed adds to its payload.
pub const RELAY_OVERHEAD: usize = 1 + 32;

const LENGTH_LEN: usize = 4;
const ROLE_NODE: u8 = 0;
const LABEL_MEMBERSHIP: &str = "meshspan/v1 hello membership";
const LABEL_IDENTITY: &str = "meshspan/v1 hello identity";

const HELLO: u8 = 0x01;
const PUT: u8 = 0x02;
const WATCH: u8 = 0x03;
const PING: u8 = 0x04;
const RELAY: u8 = 0x05;

const CHALLENGE: u8 = 0x81;
const WELCOME: u8 = 0x82;
const STORED: u8 = 0x83;
const RESTART: u8 = 0x84;
const FRAME: u8 = 0x85;
const GONE: u8 = 0x86;
const SYNCED: u8 = 0x87;
const PONG: u8 = 0x88;
const DRAIN: u8 = 0x89;
const ERROR: u8 = 0x8a;
const RELAYED: u8 = 0x8b;
const NO_PEER: u8 = 0x8c;

fn message(kind: u8, body: &impl Serialize) -> Bytes {
    codec::serialize(&(kind, body), usize::MAX).expect("only a limit can fail, and there is none").into()
}

/// Frames travel as they are: they carry their own lengths.
fn raw_message(kind: u8, body: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(1 + body.len());
    bytes.put_u8(kind);
    bytes.put_slice(body);
    bytes.freeze()
}

/// A datagram and whose it is: the payload travels as it is.
fn addressed(kind: u8, node: &NodeId, payload: &[u8]) -> Bytes {
    debug_assert!((1..=MAX_RELAY_PAYLOAD).contains(&payload.len()), "{} bytes", payload.len());
    let mut bytes = BytesMut::with_capacity(RELAY_OVERHEAD + payload.len());
    bytes.put_u8(kind);
    bytes.put_slice(&node.0);
    bytes.put_slice(payload);
    bytes.freeze()
}

fn split_addressed(body: &[u8]) -> Result<(NodeId, Bytes), DecodeError> {
    match body.split_first_chunk() {
        Some((node, payload)) if (1..=MAX_RELAY_PAYLOAD).contains(&payload.len()) => {
            Ok((NodeId(*node), Bytes::copy_from_slice(payload)))
        }
        _ => Err(DecodeError::Malformed),
    }
}

fn split(bytes: &[u8]) -> Result<(u8, &[u8]), DecodeError> {
    match bytes.split_first() {
        Some((kind, body)) if bytes.len() <= MAX_MESSAGE => Ok((*kind, body)),
        _ => Err(DecodeError::Malformed),
    }
}

fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, DecodeError> {
    codec::deserialize(body, MAX_MESSAGE).map_err(|_| DecodeError::Malformed)
}

#[cfg(test)]
mod tests;
