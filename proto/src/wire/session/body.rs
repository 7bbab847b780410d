//! The bodies of session messages as they lie on the wire, and what is checked when they are read.

use std::time::Duration;

use mesh_common::id::{Namespace, NodeId};
use serde::{Deserialize, Serialize};

use super::{
    BindingMode, Cursor, DecodeError, ErrorCode, Hello, MAX_LIMIT_NAME, MAX_SERVER_NAME, MAX_STUN_ALT, MAX_STUN_PORTS,
    SessionError, Welcome,
};
use crate::wire::address::WireAddr;
use crate::wire::codec::{Bytes64, List};

pub(super) fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

pub(super) fn from_millis(millis: u32) -> Duration {
    Duration::from_millis(millis.into())
}

/// Text of the other side may reach a terminal: printable ASCII of bounded length only.
fn check_text(text: String, max: usize) -> Result<String, DecodeError> {
    let printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
    if printable && text.len() <= max { Ok(text) } else { Err(DecodeError::Malformed) }
}

#[derive(Serialize, Deserialize)]
pub(super) struct WireHello {
    mode: u8,
    namespace: [u8; 32],
    node: [u8; 32],
    instance: [u8; 16],
    role: u8,
    wire_max: u8,
    server_name: String,
    membership_signature: Bytes64,
    identity_signature: Bytes64,
}

impl From<&Hello> for WireHello {
    fn from(hello: &Hello) -> Self {
        Self {
            mode: mode_byte(hello.mode),
            namespace: hello.namespace.0,
            node: hello.node.0,
            instance: hello.instance,
            role: hello.role,
            wire_max: hello.wire_max,
            server_name: hello.server_name.clone(),
            membership_signature: hello.membership_signature.into(),
            identity_signature: hello.identity_signature.into(),
        }
    }
}

impl WireHello {
    pub(super) fn into_hello(self) -> Result<Hello, DecodeError> {
        Ok(Hello {
            namespace: Namespace(self.namespace),
            node: NodeId(self.node),
            instance: self.instance,
            role: self.role,
            server_name: check_text(self.server_name, MAX_SERVER_NAME)?,
            mode: match self.mode {
                MODE_EXPORTER => BindingMode::Exporter,
                MODE_CHALLENGE => BindingMode::Challenge,
                _ => return Err(DecodeError::Malformed),
            },
            wire_max: self.wire_max,
            membership_signature: self.membership_signature.into(),
            identity_signature: self.identity_signature.into(),
        })
    }
}

const MODE_EXPORTER: u8 = 0;
const MODE_CHALLENGE: u8 = 1;

pub(super) fn mode_byte(mode: BindingMode) -> u8 {
    match mode {
        BindingMode::Exporter => MODE_EXPORTER,
        BindingMode::Challenge => MODE_CHALLENGE,
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct WireCursor {
    server_instance: u64,
    version: u64,
}

impl From<Cursor> for WireCursor {
    fn from(Cursor { server_instance, version }: Cursor) -> Self {
        Self { server_instance, version }
    }
}

impl From<WireCursor> for Cursor {
    fn from(WireCursor { server_instance, version }: WireCursor) -> Self {
        Self { server_instance, version }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct WireWelcome {
    server_instance: u64,
    observed: WireAddr,
    stun_ports: List<u16, MAX_STUN_PORTS>,
    slot_ttl_ms: u32,
    max_slots: u32,
    relay: bool,
    stun_alt: List<WireAddr, MAX_STUN_ALT>,
}

impl From<&Welcome> for WireWelcome {
    fn from(welcome: &Welcome) -> Self {
        Self {
            server_instance: welcome.server_instance,
            observed: WireAddr(welcome.observed),
            stun_ports: List(welcome.stun_ports.iter().copied().take(MAX_STUN_PORTS).collect()),
            slot_ttl_ms: millis(welcome.slot_ttl),
            max_slots: welcome.max_slots,
            relay: welcome.relay,
            stun_alt: List(welcome.stun_alt.iter().copied().take(MAX_STUN_ALT).map(WireAddr).collect()),
        }
    }
}

impl From<WireWelcome> for Welcome {
    fn from(wire: WireWelcome) -> Self {
        Self {
            server_instance: wire.server_instance,
            observed: wire.observed.0,
            stun_ports: wire.stun_ports.0,
            slot_ttl: from_millis(wire.slot_ttl_ms),
            max_slots: wire.max_slots,
            relay: wire.relay,
            stun_alt: wire.stun_alt.0.into_iter().map(|WireAddr(addr)| addr).collect(),
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct WireError {
    code: u8,
    limit: String,
    retry_after_ms: u32,
}

impl From<&SessionError> for WireError {
    fn from(error: &SessionError) -> Self {
        Self {
            code: code_byte(error.code),
            limit: error.limit.chars().take(MAX_LIMIT_NAME).collect(),
            retry_after_ms: millis(error.retry_after),
        }
    }
}

impl WireError {
    pub(super) fn into_error(self) -> Result<SessionError, DecodeError> {
        Ok(SessionError {
            code: error_code(self.code).ok_or(DecodeError::Malformed)?,
            limit: check_text(self.limit, MAX_LIMIT_NAME)?,
            retry_after: from_millis(self.retry_after_ms),
        })
    }
}

fn code_byte(code: ErrorCode) -> u8 {
    match code {
        ErrorCode::AuthFailed => 1,
        ErrorCode::NamespaceRefused => 2,
        ErrorCode::ClusterFull => 3,
        ErrorCode::ServerFull => 4,
        ErrorCode::RateLimited => 5,
        ErrorCode::Protocol => 6,
        ErrorCode::BadFrame => 7,
        ErrorCode::Stale => 8,
        ErrorCode::TooLarge => 9,
    }
}

pub(super) fn error_code(byte: u8) -> Option<ErrorCode> {
    Some(match byte {
        1 => ErrorCode::AuthFailed,
        2 => ErrorCode::NamespaceRefused,
        3 => ErrorCode::ClusterFull,
        4 => ErrorCode::ServerFull,
        5 => ErrorCode::RateLimited,
        6 => ErrorCode::Protocol,
        7 => ErrorCode::BadFrame,
        8 => ErrorCode::Stale,
        9 => ErrorCode::TooLarge,
        _ => return None,
    })
}
