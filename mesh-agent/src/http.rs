//! Health and metrics over plain HTTP: `/livez`, `/readyz`, `/metrics`. Off unless an address is configured.
//!
//! Reads the same status as the command line; decides nothing. Refuses a `Host` that is a name, so that no web page can
//! make a browser read a node's metrics by a name that it points here.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::api::ApiHandle;
use crate::status::port_mapping::PortMappingState;
use crate::status::{NodeState, PeerState, ServerState, Status};

const MAX_CONNECTIONS: usize = 16;
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// Pause after a failed accept: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Labels = Vec<(&'static str, String)>;

pub async fn bind(addr: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr)
        .await
        .with_context(|| format!("cannot listen on {addr} for metrics and health (agent.http)"))
}

pub async fn serve(listener: TcpListener, agent: ApiHandle) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let agent = agent.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, agent.clone()));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(CONNECTION_LIMIT)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            // A client that broke off or was too slow is its own loss.
            let _ended = tokio::time::timeout(CONNECTION_LIMIT, connection).await;
            drop(slot);
        });
    }
}

async fn answer(request: Request<Incoming>, agent: ApiHandle) -> Result<Response<Full<Bytes>>, Infallible> {
    if !is_addressed_by_number(&request) {
        return Ok(text(StatusCode::FORBIDDEN, "use an address, not a name\n"));
    }
    let path = request.uri().path();
    if !matches!(path, "/livez" | "/readyz" | "/metrics") {
        return Ok(text(StatusCode::NOT_FOUND, "mesh-agent: /livez /readyz /metrics\n"));
    }
    let Ok(status) = agent.status().await else {
        return Ok(text(StatusCode::SERVICE_UNAVAILABLE, "the agent does not answer\n"));
    };
    Ok(match path {
        "/livez" => text(StatusCode::OK, "ok\n"),
        "/readyz" if matches!(status.node.state, NodeState::Running | NodeState::Disabled) => {
            text(StatusCode::OK, "ok\n")
        }
        "/readyz" => {
            let problems: String = status.node.problems.iter().map(|problem| format!("{}\n", problem.what)).collect();
            text(StatusCode::SERVICE_UNAVAILABLE, problems)
        }
        _ => {
            let mut response = text(StatusCode::OK, metrics(&status));
            let open_metrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(open_metrics));
            response
        }
    })
}

fn is_addressed_by_number(request: &Request<Incoming>) -> bool {
    let Some(host) = request.headers().get(HOST).and_then(|host| host.to_str().ok()) else { return true };
    host == "localhost"
        || host.starts_with("localhost:")
        || host.parse::<SocketAddr>().is_ok()
        || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
}

fn metrics(status: &Status) -> String {
    let mut registry = Registry::with_prefix("meshspan");
    let gauge = |registry: &mut Registry, name: &str, help: &str| {
        let family = Family::<Labels, Gauge>::default();
        registry.register(name, help, family.clone());
        family
    };
    let set = |family: &Family<Labels, Gauge>, labels: Labels, value: u64| {
        family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
    };

    let up = gauge(&mut registry, "node_up", "1 while the mesh is on and nothing is wrong");
    set(&up, Vec::new(), u64::from(status.node.state == NodeState::Running));
    let peers = gauge(&mut registry, "peers", "Peers by state");
    for (name, state) in [
        ("idle", PeerState::Idle),
        ("connecting", PeerState::Connecting),
        ("up", PeerState::Up),
        ("down", PeerState::Down),
    ] {
        let count = status.peers.iter().filter(|peer| peer.state == state).count();
        set(&peers, vec![("state", name.to_owned())], count as u64);
    }
    let servers = gauge(&mut registry, "discovery_server_connected", "1 while there is a session with the server");
    for server in &status.servers {
        let connected = u64::from(server.state == ServerState::Connected);
        set(&servers, vec![("endpoint", server.endpoint.clone())], connected);
    }
    let rx = gauge(&mut registry, "peer_receive_bytes", "Inner bytes received from a peer");
    let tx = gauge(&mut registry, "peer_transmit_bytes", "Inner bytes sent to a peer");
    let age = gauge(&mut registry, "peer_handshake_age_seconds", "Since the last handshake with a peer");
    for peer in &status.peers {
        let labels = vec![("peer", peer.host_name.clone()), ("public_key", peer.public_key.clone())];
        set(&rx, labels.clone(), peer.rx_bytes);
        set(&tx, labels.clone(), peer.tx_bytes);
        if let Some(age_ms) = peer.last_handshake_ms_ago {
            set(&age, labels, age_ms / 1000);
        }
    }
    let mapped = gauge(&mut registry, "port_mapped", "1 while peers are told of a port of the router");
    let is_mapped = status.node.net.port_mapping.state == PortMappingState::Mapped;
    set(&mapped, Vec::new(), u64::from(is_mapped));
    let events = gauge(&mut registry, "events", "Drops and refusals since the agent's start, by name");
    for (name, count) in &status.counters {
        set(&events, vec![("name", name.clone())], *count);
    }
    let mut out = String::new();
    encode(&mut out, &registry).expect("writing to a string does not fail");
    out
}
