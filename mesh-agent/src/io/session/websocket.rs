//! The WebSocket carrier: one binary message each, over TLS on TCP.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use mesh_common::config::{HostPort, ProxyUrl};
use mesh_common::limits::MAX_MESSAGE;
use mesh_proto::wire::session::{ALPN, EXPORTER_LABEL, WEBSOCKET_PATH};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::pinned::{Pinned, sni};
use super::{
    Carrier, CarrierError, CarrierKind, CarrierReceiver, CarrierSender, Failure, Receiving, Sending, ServerAddress,
    marked, proxy,
};

const BUFFER: usize = 16 * 1024;
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

type Socket = WebSocketStream<TlsStream<TcpStream>>;

#[derive(Debug)]
pub(super) struct Sender(SplitSink<Socket, Message>);

#[derive(Debug)]
pub(super) struct Receiver(SplitStream<Socket>);

pub(super) async fn dial(to: SocketAddr, server: &ServerAddress) -> Result<Carrier, Failure> {
    let stream = marked::connect(to).await.map_err(|error| unreachable(&error))?;
    dial_over(stream, server).await
}

pub(super) async fn dial_through(proxy: &ProxyUrl, port: u16, server: &ServerAddress) -> Result<Carrier, Failure> {
    let stream = proxy::connect(proxy, &HostPort { host: server.host.clone(), port }).await?;
    dial_over(stream, server).await
}

async fn dial_over(stream: TcpStream, server: &ServerAddress) -> Result<Carrier, Failure> {
    let remote = stream.peer_addr().map_err(|error| unreachable(&error))?;
    let pinned = Pinned::new(server.pin);
    let connector = TlsConnector::from(Arc::new(pinned.config(b"http/1.1")));
    let stream =
        connector.connect(sni(&server.host), stream).await.map_err(|error| pinned.or(handshake_failure(&error)))?;
    let exporter = stream
        .get_ref()
        .1
        .export_keying_material([0; 32], EXPORTER_LABEL, Some(&[]))
        .map_err(|_| Failure::NotADiscoveryServer("it gave no TLS exporter".to_owned()))?;

    let not_ours = |reason: String| Failure::NotADiscoveryServer(reason);
    let https = server.to_string();
    let authority = https.trim_start_matches("https://");
    let mut request = format!("wss://{authority}{WEBSOCKET_PATH}")
        .into_client_request()
        .map_err(|error| not_ours(error.to_string()))?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(ALPN));
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER)
        .max_write_buffer_size(BUFFER + 2 * MAX_MESSAGE)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    let (socket, _) = client_async_with_config(request, stream, Some(config)).await.map_err(|error| match error {
        Error::Http(response) => not_ours(format!("it answers HTTP status {}", response.status().as_u16())),
        Error::Io(_) => Failure::HungUp,
        other => not_ours(other.to_string()),
    })?;
    let (sink, stream) = socket.split();
    Ok(Carrier {
        kind: CarrierKind::WebSocket,
        remote,
        addresses: Vec::new(),
        proxy: None,
        exporter,
        relay: None,
        sender: CarrierSender(Sending::WebSocket(Sender(sink))),
        receiver: CarrierReceiver(Receiving::WebSocket(Receiver(stream))),
    })
}

impl Sender {
    pub(super) async fn send(&mut self, message: Bytes) -> Result<(), CarrierError> {
        self.0.send(Message::Binary(message)).await.map_err(|error| describe(&error))
    }

    pub(super) async fn close(mut self) {
        // A server that does not take the goodbye in time learns of the end by its own timeout.
        let _ = timeout(CLOSE_TIMEOUT, self.0.close()).await;
    }
}

impl Receiver {
    pub(super) async fn next(&mut self) -> Option<Result<Bytes, CarrierError>> {
        loop {
            match self.0.next().await? {
                Ok(Message::Binary(message)) if message.is_empty() => {}
                Ok(Message::Binary(message)) => return Some(Ok(message)),
                Ok(Message::Ping(_) | Message::Pong(_)) => {}
                Ok(Message::Close(_)) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => return None,
                Ok(Message::Text(_) | Message::Frame(_)) => {
                    return Some(Err(CarrierError(
                        "the server does not keep to the protocol: a text message".to_owned(),
                    )));
                }
                Err(error) => return Some(Err(describe(&error))),
            }
        }
    }
}

fn describe(error: &Error) -> CarrierError {
    CarrierError(format!("the connection over TCP broke: {error}"))
}

fn unreachable(error: &io::Error) -> Failure {
    match error.kind() {
        ErrorKind::ConnectionRefused => Failure::Refused,
        ErrorKind::TimedOut => Failure::TimedOut,
        _ => Failure::Unreachable(error.to_string()),
    }
}

fn handshake_failure(error: &io::Error) -> Failure {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidMessage(_) | rustls::Error::InappropriateMessage { .. }) => Failure::NotTls,
        Some(other) => Failure::NotADiscoveryServer(other.to_string()),
        None => Failure::HungUp,
    }
}
