//! The QUIC carrier: one bidirectional stream, opened at once by an empty message, and beside it the lane of relayed messages:
//! datagrams, and a stream for those that fit none.
//!
//! The server sees a stream with its first bytes only, and it speaks first where a challenge is signed: hence the empty
//! message, which every receiver skips.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use bytes::Bytes;
use mesh_common::limits::{MAX_MESSAGE, SESSION_IDLE, SESSION_KEEPALIVE};
use mesh_proto::wire::session::{ALPN, Deframer, EXPORTER_LABEL, enframe};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{
    Connection, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, ReadError, RecvStream, SendStream,
    TransportConfig, VarInt,
};
use tokio::time::timeout;

use super::pinned::{Pinned, sni};
use super::{
    Carrier, CarrierError, CarrierKind, CarrierReceiver, CarrierSender, Failure, Receiving, Sending, ServerAddress,
    marked,
};

pub(super) use relay::{RelayReceiver, RelaySender};

mod relay;

/// Bytes in flight from the server: a snapshot comes in a few round trips.
const RECEIVE_WINDOW: u32 = 256 * 1024;
/// Datagrams that were received and wait for this task, in bytes.
const RECEIVED_DATAGRAMS: usize = 256 * 1024;
/// Datagrams handed to QUIC that wait for the congestion window, in bytes: room for one. QUIC sends datagrams before streams, and
/// on a full line a second one would keep the control stream waiting for ever.
const UNSENT_DATAGRAMS: usize = 2 * 1024;
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// QUIC's code for a TLS alert, the alert in its low byte (RFC 9001, 4.8).
const CRYPTO_ERROR: u64 = 0x100;

#[derive(Debug)]
pub(super) struct Sender {
    stream: SendStream,
    connection: Connection,
}

pub(super) struct Receiver {
    stream: RecvStream,
    deframer: Deframer,
    /// A connection ends when nobody holds it.
    _connection: Connection,
}

pub(super) fn endpoint(local: IpAddr) -> io::Result<Endpoint> {
    let socket = marked::udp(SocketAddr::new(local, 0))?;
    let mut config = EndpointConfig::default();
    config.grease_quic_bit(false);
    Endpoint::new(config, None, socket, Arc::new(quinn::TokioRuntime))
}

pub(super) async fn dial(endpoint: &Endpoint, to: SocketAddr, server: &ServerAddress) -> Result<Carrier, Failure> {
    let pinned = Pinned::new(server.pin);
    let crypto = QuicClientConfig::try_from(pinned.config(ALPN.as_bytes())).expect("ring has QUIC's initial cipher");
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    let connecting = endpoint
        .connect_with(config, to, &sni(&server.host).to_str())
        .map_err(|error| Failure::Unreachable(error.to_string()))?;
    let connection = connecting.await.map_err(|error| pinned.or(failure(&error)))?;
    let mut exporter = [0; 32];
    connection
        .export_keying_material(&mut exporter, EXPORTER_LABEL, &[])
        .map_err(|_| Failure::NotADiscoveryServer("it gave no TLS exporter".to_owned()))?;
    let (mut send, receive) = connection.open_bi().await.map_err(|error| failure(&error))?;
    send.write_all(&enframe(&[])).await.map_err(|error| Failure::Unreachable(error.to_string()))?;
    Ok(Carrier {
        kind: CarrierKind::Quic,
        remote: connection.remote_address(),
        addresses: Vec::new(),
        proxy: None,
        exporter,
        relay: Some(relay::lane(&connection)),
        sender: CarrierSender(Sending::Quic(Sender { stream: send, connection: connection.clone() })),
        receiver: CarrierReceiver(Receiving::Quic(Receiver {
            stream: receive,
            deframer: Deframer::default(),
            _connection: connection,
        })),
    })
}

impl Sender {
    pub(super) async fn send(&mut self, message: Bytes) -> Result<(), CarrierError> {
        self.stream.write_chunk(enframe(&message)).await.map_err(|_| match self.connection.close_reason() {
            Some(reason) => CarrierError(describe(&reason)),
            None => CarrierError("the server takes no more messages".to_owned()),
        })
    }

    pub(super) async fn close(mut self) {
        if self.stream.finish().is_ok() {
            // A server that does not acknowledge in time learns of the end by its own timeout.
            let _ = timeout(CLOSE_TIMEOUT, self.stream.stopped()).await;
        }
        self.connection.close(VarInt::from_u32(0), b"");
    }
}

impl Receiver {
    pub(super) async fn next(&mut self) -> Option<Result<Bytes, CarrierError>> {
        loop {
            match self.deframer.next_message() {
                Ok(Some(message)) if message.is_empty() => continue,
                Ok(Some(message)) => return Some(Ok(message)),
                Ok(None) => {}
                Err(error) => {
                    return Some(Err(CarrierError(format!("the server does not keep to the protocol: {error}"))));
                }
            }
            match self.stream.read_chunk(MAX_MESSAGE, true).await {
                Ok(Some(chunk)) => self.deframer.push(&chunk.bytes),
                Ok(None) => return None,
                Err(ReadError::ConnectionLost(
                    ConnectionError::ApplicationClosed(_) | ConnectionError::LocallyClosed,
                )) => {
                    return None;
                }
                Err(ReadError::ConnectionLost(reason)) => return Some(Err(CarrierError(describe(&reason)))),
                Err(other) => return Some(Err(CarrierError(format!("the server broke the stream off: {other}")))),
            }
        }
    }
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("stream", &self.stream.id()).finish_non_exhaustive()
    }
}

fn describe(reason: &ConnectionError) -> String {
    match reason {
        ConnectionError::TimedOut => "the server stopped answering".to_owned(),
        ConnectionError::Reset => "the server restarted".to_owned(),
        ConnectionError::ApplicationClosed(_) | ConnectionError::LocallyClosed => "the session was closed".to_owned(),
        other => format!("the QUIC connection broke: {other}"),
    }
}

fn failure(error: &ConnectionError) -> Failure {
    match error {
        ConnectionError::TimedOut => Failure::TimedOut,
        ConnectionError::VersionMismatch => Failure::NotADiscoveryServer("it speaks another QUIC version".to_owned()),
        ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) & !0xff == CRYPTO_ERROR => {
            Failure::NotADiscoveryServer("it refused our TLS over QUIC".to_owned())
        }
        ConnectionError::ConnectionClosed(_) | ConnectionError::ApplicationClosed(_) | ConnectionError::Reset => {
            Failure::HungUp
        }
        ConnectionError::TransportError(error) if u64::from(error.code) & !0xff == CRYPTO_ERROR => {
            Failure::NotADiscoveryServer("its TLS over QUIC does not fit".to_owned())
        }
        other => Failure::Unreachable(other.to_string()),
    }
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .datagram_receive_buffer_size(Some(RECEIVED_DATAGRAMS))
        .datagram_send_buffer_size(UNSENT_DATAGRAMS)
        .keep_alive_interval(Some(SESSION_KEEPALIVE))
        .max_idle_timeout(Some(IdleTimeout::try_from(SESSION_IDLE).expect("half a minute fits")));
    transport
}
