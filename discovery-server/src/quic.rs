//! The QUIC carrier: one bidirectional stream per connection, opened by the agent, and datagrams for what is relayed.
//!
//! Refuses 0-RTT, resumption and other streams, but one in each direction for what is relayed and fits no datagram. When many handshakes are in flight, clients prove their address
//! by a Retry before any state is kept for them.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use mesh_common::limits::{HELLO_TIMEOUT, MAX_MESSAGE, SESSION_IDLE, SESSION_KEEPALIVE};
use mesh_proto::wire::session::{Deframer, EXPORTER_LABEL, enframe};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, Incoming, RecvStream, SendStream, TransportConfig,
    VarInt,
};
use ring::hmac;
use tokio::time::timeout;
use tracing::debug;

use crate::connection::{self, Broken, Inbound, Outbound, RelayLane};
use crate::gate::{Gate, Pass};
use crate::hub::Hub;

mod relay;

/// Bytes in flight from one client: a burst of its own messages, and nothing more to say.
const RECEIVE_WINDOW: u32 = 64 * 1024;
/// Bytes in flight to one client.
const SEND_WINDOW: u64 = 256 * 1024;
/// Datagrams that were received and wait for this task, in bytes.
const RECEIVED_DATAGRAMS: usize = 256 * 1024;
/// Datagrams handed to QUIC that wait for the congestion window, in bytes: room for one. QUIC sends datagrams before streams, and
/// on a full line a second one would keep the control stream waiting for ever.
const UNSENT_DATAGRAMS: usize = 2 * 1024;
/// Packets of connections that wait for `accept`, in bytes.
const INCOMING_BUFFER: u64 = 16 * 1024;
const MAX_INCOMING: usize = 1024;

/// Opens the endpoint on a bound socket.
///
/// `reset_seed` is the same after a restart: a client of the former process then learns at its next packet that its
/// connection is gone, instead of waiting until it times out (RFC 9000, 10.3).
pub(crate) fn endpoint(
    socket: UdpSocket,
    tls: rustls::ServerConfig,
    reset_seed: &[u8; 32],
) -> anyhow::Result<Endpoint> {
    let crypto = QuicServerConfig::try_from(tls).context("the TLS provider lacks QUIC's initial cipher")?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport()?));
    config.max_incoming(MAX_INCOMING).incoming_buffer_size(INCOMING_BUFFER);
    config.migration(true);
    let mut shared = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, reset_seed)));
    // Agents may one day share their port with other protocols: the fixed bit stays fixed.
    shared.grease_quic_bit(false);
    shared.cid_generator(|| Box::new(RandomIds));
    Endpoint::new(shared, Some(config), socket, Arc::new(quinn::TokioRuntime))
        .context("cannot start QUIC on its UDP socket")
}

/// Accepts until the endpoint is closed. What goes wrong with one connection stays with it.
pub(crate) async fn accept(endpoint: Endpoint, hub: Arc<Hub>, gate: Arc<Gate>) {
    while let Some(incoming) = endpoint.accept().await {
        let proven = incoming.remote_address_validated();
        if !proven && gate.crowded() && incoming.may_retry() {
            // Failing to send is the network's loss of one packet.
            let _ = incoming.retry();
            continue;
        }
        let pass = if proven { gate.enter(incoming.remote_address().ip()) } else { gate.enter_unproven() };
        match pass {
            Some(pass) => {
                tokio::spawn(serve(incoming, pass, hub.clone()));
            }
            None => incoming.ignore(),
        }
    }
}

async fn serve(incoming: Incoming, pass: Pass, hub: Arc<Hub>) {
    let opened = timeout(HELLO_TIMEOUT, async {
        let connection = incoming.accept().map_err(|e| e.to_string())?.await.map_err(|e| e.to_string())?;
        let (send, receive) = connection.accept_bi().await.map_err(|e| e.to_string())?;
        Ok::<_, String>((connection, send, receive))
    });
    let (connection, send, receive) = match opened.await {
        Ok(Ok(opened)) => opened,
        Ok(Err(reason)) => return debug!(reason, "a QUIC handshake failed"),
        Err(_) => return debug!("a QUIC client opened no stream in time"),
    };
    drop(pass);
    let mut exporter = [0; 32];
    if connection.export_keying_material(&mut exporter, EXPORTER_LABEL, &[]).is_err() {
        return debug!("a QUIC connection gave no exporter");
    }
    let session = hub.connect(connection.remote_address(), exporter);
    let outbound = QuicOut { send };
    let inbound = QuicIn { receive, deframer: Deframer::default() };
    tokio::select! {
        () = connection::serve(&session, RelayLane::Own, outbound, inbound) => {}
        () = relay::send(&session, &connection) => {}
        () = relay::receive(&session, &connection) => {}
    }
    connection.close(VarInt::from_u32(0), b"");
}

fn transport() -> anyhow::Result<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(Some(RECEIVED_DATAGRAMS))
        .datagram_send_buffer_size(UNSENT_DATAGRAMS)
        .keep_alive_interval(Some(SESSION_KEEPALIVE))
        .max_idle_timeout(Some(idle(SESSION_IDLE)?));
    Ok(transport)
}

fn idle(after: Duration) -> anyhow::Result<quinn::IdleTimeout> {
    after.try_into().context("the idle timeout does not fit QUIC")
}

/// Connection ids that say nothing of the process that made them. quinn's own carry a hash under a key of the process, and
/// packets with an id of a former process are then dropped unanswered: its clients would never see the reset.
#[derive(Debug)]
struct RandomIds;

const ID_LEN: usize = 8;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_LEN];
        getrandom::fill(&mut id).expect("the operating system gave randomness for the TLS key of this process");
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

struct QuicOut {
    send: SendStream,
}

impl Outbound for QuicOut {
    async fn send(&mut self, message: Bytes) -> Result<(), Broken> {
        self.send.write_chunk(enframe(&message)).await.map_err(|_| Broken)
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    async fn close(&mut self) {
        if self.send.finish().is_ok() {
            // Until the client has all of it, or went away.
            let _ = self.send.stopped().await;
        }
    }
}

struct QuicIn {
    receive: RecvStream,
    deframer: Deframer,
}

impl Inbound for QuicIn {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(message) = self.deframer.next_message().ok()? {
                return Some(message);
            }
            let chunk = self.receive.read_chunk(MAX_MESSAGE, true).await.ok()??;
            self.deframer.push(&chunk.bytes);
        }
    }
}
