//! Everything that speaks HTTP: the WebSocket carrier inside TLS on the session port, and plain health and metrics.
//!
//! One request per connection, small headers, short deadlines. The session port answers people with a line of text and
//! agents with an upgrade; health is never served there.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_common::limits::{HELLO_TIMEOUT, MAX_MESSAGE};
use mesh_proto::wire::session::{ALPN, EXPORTER_LABEL, WEBSOCKET_PATH};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tracing::{debug, warn};

use crate::connection::{self, Broken, Inbound, Outbound, RelayLane};
use crate::gate::Gate;
use crate::hub::Hub;
use crate::metrics::Health;

/// A whole request head.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;
/// One request with its answer, handshake excluded.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// After an error of `accept` (no file descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const READ_BUFFER: usize = 4 * 1024;
const WRITE_BUFFER: usize = 16 * 1024;
/// What the kernel takes beyond what is in flight.
const UNSENT: u32 = 32 * 1024;

const NOT_A_PAGE: &str =
    "This is a Meshspan discovery server. Agents talk to it by themselves; there is nothing to see here.\n";

/// Accepts agents on the session port, for ever.
pub(crate) async fn accept_sessions(listener: TcpListener, tls: TlsAcceptor, hub: Arc<Hub>, gate: Arc<Gate>) {
    accept(listener, gate, move |stream, remote| {
        let (tls, hub) = (tls.clone(), hub.clone());
        async move {
            let stream = match timeout(HELLO_TIMEOUT, tls.accept(stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return debug!(%error, "a TLS handshake failed"),
                Err(_) => return debug!("a TLS handshake took too long"),
            };
            let Ok(exporter) = stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, Some(&[])) else {
                return debug!("a TLS connection gave no exporter");
            };
            let service = service_fn(move |request| {
                let answer = session_or_page(request, &hub, remote, exporter);
                async move { Ok::<_, Infallible>(answer) }
            });
            let serving = http1().serve_connection(TokioIo::new(stream), service).with_upgrades();
            if let Ok(Err(error)) = timeout(REQUEST_TIMEOUT, serving).await {
                debug!(%error, "an HTTPS request failed");
            }
        }
    })
    .await;
}

/// Answers `/livez`, `/readyz` and `/metrics` over plain HTTP, for ever.
pub(crate) async fn accept_health(listener: TcpListener, health: Arc<Health>) {
    let gate = Arc::new(Gate::default());
    accept(listener, gate, move |stream, _| {
        let health = health.clone();
        async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let answer = health_page(&request, &health);
                async move { Ok::<_, Infallible>(answer) }
            });
            let serving = http1().serve_connection(TokioIo::new(stream), service);
            if let Ok(Err(error)) = timeout(REQUEST_TIMEOUT, serving).await {
                debug!(%error, "a health request failed");
            }
        }
    })
    .await;
}

/// Accepts for ever; `serve` runs in a task of its own with a place in the doorway until it returns.
async fn accept<F, S>(listener: TcpListener, gate: Arc<Gate>, serve: S)
where
    F: Future<Output = ()> + Send + 'static,
    S: Fn(TcpStream, SocketAddr) -> F,
{
    let mut failing = false;
    loop {
        let (stream, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                if !failing {
                    warn!(%error, "cannot accept TCP connections, trying on");
                }
                failing = true;
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        failing = false;
        let Some(pass) = gate.enter(remote.ip()) else { continue };
        // Without it small messages wait for acknowledgements, and without the other whatever the kernel takes on a slow line
        // waits before them; a socket that refuses works all the same.
        let _ = stream.set_nodelay(true);
        let _ = SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
        let serving = serve(stream, remote);
        tokio::spawn(async move {
            serving.await;
            drop(pass);
        });
    }
}

fn http1() -> hyper::server::conn::http1::Builder {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS);
    builder
}

fn session_or_page(
    mut request: Request<Incoming>,
    hub: &Arc<Hub>,
    remote: SocketAddr,
    exporter: [u8; 32],
) -> Response<Full<Bytes>> {
    if request.uri().path() != WEBSOCKET_PATH {
        return text(StatusCode::NOT_FOUND, NOT_A_PAGE);
    }
    let accepted = match accept_upgrade(request.method(), request.headers()) {
        Ok(accepted) => accepted,
        Err(reason) => return text(StatusCode::BAD_REQUEST, reason),
    };
    tokio::spawn(serve_websocket(hyper::upgrade::on(&mut request), hub.clone(), remote, exporter));
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(ALPN));
    headers.insert(SEC_WEBSOCKET_ACCEPT, accepted);
    response
}

/// The value of `Sec-WebSocket-Accept`, or what the request lacks (RFC 6455, 4.2.1).
fn accept_upgrade(method: &Method, headers: &HeaderMap) -> Result<HeaderValue, &'static str> {
    let lists = |name: HeaderName, wanted: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|item| item.trim().eq_ignore_ascii_case(wanted))
    };
    if method != Method::GET || !lists(CONNECTION, "upgrade") || !lists(UPGRADE, "websocket") {
        return Err("This path is for WebSocket only.\n");
    }
    if !lists(SEC_WEBSOCKET_VERSION, "13") {
        return Err("WebSocket version 13 is needed.\n");
    }
    if !lists(SEC_WEBSOCKET_PROTOCOL, ALPN) {
        return Err("The WebSocket subprotocol meshspan/1 is needed.\n");
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or("Sec-WebSocket-Key is missing.\n")?;
    HeaderValue::from_str(&derive_accept_key(key.as_bytes())).map_err(|_| "Sec-WebSocket-Key is not valid.\n")
}

async fn serve_websocket(upgrade: OnUpgrade, hub: Arc<Hub>, remote: SocketAddr, exporter: [u8; 32]) {
    let upgraded = match upgrade.await {
        Ok(upgraded) => upgraded,
        Err(error) => return debug!(%error, "a WebSocket upgrade failed"),
    };
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(WRITE_BUFFER + 2 * MAX_MESSAGE)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    let (sink, stream) =
        WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await.split();
    let session = hub.connect(remote, exporter);
    connection::serve(&session, RelayLane::Shared, WebSocketOut { sink }, WebSocketIn { stream }).await;
}

type Socket = WebSocketStream<TokioIo<Upgraded>>;

struct WebSocketOut {
    sink: futures_util::stream::SplitSink<Socket, Message>,
}

impl Outbound for WebSocketOut {
    async fn send(&mut self, message: Bytes) -> Result<(), Broken> {
        self.sink.feed(Message::Binary(message)).await.map_err(|_| Broken)
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        self.sink.flush().await.map_err(|_| Broken)
    }

    async fn close(&mut self) {
        // The other end may be gone already.
        let _ = self.sink.close().await;
    }
}

struct WebSocketIn {
    stream: futures_util::stream::SplitStream<Socket>,
}

impl Inbound for WebSocketIn {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            match self.stream.next().await?.ok()? {
                Message::Binary(message) => return Some(message),
                Message::Ping(_) | Message::Pong(_) => {}
                Message::Text(_) | Message::Close(_) | Message::Frame(_) => return None,
            }
        }
    }
}

fn health_page(request: &Request<Incoming>, health: &Health) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "Only GET and HEAD are answered here.\n");
    }
    match request.uri().path() {
        "/livez" => text(StatusCode::OK, "ok\n"),
        "/readyz" if health.ready() => text(StatusCode::OK, "ok\n"),
        "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
        "/metrics" => {
            let mut response = text(StatusCode::OK, health.metrics());
            response.headers_mut().insert(
                CONTENT_TYPE,
                HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8"),
            );
            response
        }
        _ => text(StatusCode::NOT_FOUND, "There are /livez, /readyz and /metrics.\n"),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn upgrade(change: impl FnOnce(&mut HeaderMap)) -> Result<HeaderValue, &'static str> {
        let mut headers = HeaderMap::new();
        headers.insert(CONNECTION, HeaderValue::from_static("keep-alive, Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("WebSocket"));
        headers.insert(SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("other, meshspan/1"));
        headers.insert(SEC_WEBSOCKET_KEY, HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ=="));
        change(&mut headers);
        accept_upgrade(&Method::GET, &headers)
    }

    #[test]
    fn the_example_of_rfc_6455_is_answered_as_it_says() {
        assert_eq!(upgrade(|_| ()).unwrap(), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn what_an_upgrade_lacks_is_named() {
        for (header, named) in [
            (CONNECTION, "WebSocket only"),
            (UPGRADE, "WebSocket only"),
            (SEC_WEBSOCKET_VERSION, "version 13"),
            (SEC_WEBSOCKET_PROTOCOL, ALPN),
            (SEC_WEBSOCKET_KEY, "Sec-WebSocket-Key"),
        ] {
            let reason = upgrade(|headers| drop(headers.remove(&header))).unwrap_err();
            assert!(reason.contains(named), "{header}: {reason}");
        }
        assert!(accept_upgrade(&Method::POST, &HeaderMap::new()).is_err());
    }
}
