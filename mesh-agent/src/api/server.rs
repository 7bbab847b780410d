//! The agent's side of the socket.

use std::convert::Infallible;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use serde_json::json;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::{ApiHandle, ApiRequest, HandleError, PingRequest, PingVia};

const MAX_CONNECTIONS: usize = 32;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("another agent answers on {}: stop it, or give --socket", socket.display())]
    InUse { socket: PathBuf },
    #[error("{} is there and is no socket: remove it, or give --socket", socket.display())]
    NotASocket { socket: PathBuf },
    #[error("the socket {} cannot be made: {source}; give another place with --socket", socket.display())]
    Io { socket: PathBuf, source: io::Error },
}

/// Takes the socket: one whose agent is dead is replaced, a live one is refused.
pub fn bind(socket: &Path) -> Result<UnixListener, BindError> {
    let failed = |source| BindError::Io { socket: socket.to_owned(), source };
    if let Some(parent) = socket.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match fs::symlink_metadata(socket) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket { socket: socket.to_owned() });
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(socket) {
            Ok(_) => return Err(BindError::InUse { socket: socket.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(socket).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        },
    }
    let listener = UnixListener::bind(socket).map_err(failed)?;
    fs::set_permissions(socket, Permissions::from_mode(0o660)).map_err(failed)?;
    Ok(listener)
}

/// Answers until it is dropped.
pub async fn serve(listener: UnixListener, handle: ApiHandle) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let handle = handle.clone();
                tokio::spawn(async move {
                    let _slot = slot;
                    connection(stream, handle).await;
                });
            }
            Err(error) => {
                // Out of file descriptors, most likely: a pause lets others give some back.
                tracing::warn!(%error, "the local API could not accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: UnixStream, handle: ApiHandle) {
    let own = nix::unistd::geteuid().as_raw();
    let may_write = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own);
    let service = service_fn(move |request| {
        let handle = handle.clone();
        async move { Ok::<_, Infallible>(answer(&request, may_write, &handle).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection to the local API failed"),
        Err(_) => tracing::debug!("a connection to the local API was closed: it took too long"),
    }
}

pub(super) async fn answer<B>(request: &Request<B>, may_write: bool, handle: &ApiHandle) -> Response<Full<Bytes>> {
    let method = match request.uri().path() {
        "/v1/status" => Method::GET,
        "/v1/reload" | "/v1/leave" | "/v1/ping" | "/v1/netcheck" => Method::POST,
        path => return error(StatusCode::NOT_FOUND, &format!("there is no {path}")),
    };
    if *request.method() != method {
        let mut refused = error(StatusCode::METHOD_NOT_ALLOWED, &format!("use {method}"));
        let allowed = if method == Method::GET { "GET" } else { "POST" };
        refused.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static(allowed));
        return refused;
    }
    if method == Method::POST && !may_write {
        return error(StatusCode::FORBIDDEN, "only root and the agent's own user may change anything");
    }
    match request.uri().path() {
        "/v1/status" => match handle.ask(ApiRequest::Status).await {
            Ok(status) => reply_with(&*status),
            Err(failure) => unanswered(&failure),
        },
        "/v1/ping" => match ping_request(request.uri().query().unwrap_or_default()) {
            Ok(ping) => told(handle.ask(|answer| ApiRequest::Ping(ping, answer)).await),
            Err(what) => error(StatusCode::BAD_REQUEST, &what),
        },
        "/v1/netcheck" => told(handle.ask(ApiRequest::Netcheck).await),
        path => {
            let request = if path == "/v1/leave" { ApiRequest::Leave } else { ApiRequest::Reload };
            match handle.ask(request).await {
                Ok(Ok(())) => reply(StatusCode::OK, &json!({})),
                Ok(Err(refusal)) => error(StatusCode::CONFLICT, &refusal),
                Err(failure) => unanswered(&failure),
            }
        }
    }
}

/// An answer, or that what was asked for is not there.
fn told<T: Serialize>(answer: Result<Result<T, String>, HandleError>) -> Response<Full<Bytes>> {
    match answer {
        Ok(Ok(answer)) => reply_with(&answer),
        Ok(Err(what)) => error(StatusCode::BAD_REQUEST, &what),
        Err(failure) => unanswered(&failure),
    }
}

fn reply_with(answer: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_value(answer) {
        Ok(json) => reply(StatusCode::OK, &json),
        Err(failure) => error(StatusCode::INTERNAL_SERVER_ERROR, &failure.to_string()),
    }
}

fn ping_request(query: &str) -> Result<PingRequest, String> {
    let (mut peer, mut via) = (None, PingVia::Any);
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        let value = unescaped(value).ok_or_else(|| format!("{name} is not readable"))?;
        match name {
            "peer" => peer = Some(value),
            "via" => {
                via = serde_json::from_value(json!(value)).map_err(|_| "via is any, relay or direct".to_owned())?
            }
            _ => return Err(format!("there is no {name}")),
        }
    }
    Ok(PingRequest { peer: peer.ok_or("which peer?")?, via })
}

/// Text with `%XX` for what may not stand in a URL.
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = if byte == b'%' { Some(after.split_at_checked(2)?) } else { None };
        let (byte, after) = match escaped {
            Some((digits, after)) => (u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?, after),
            None => (byte, after),
        };
        bytes.push(byte);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

fn unanswered(failure: &HandleError) -> Response<Full<Bytes>> {
    let status = match failure {
        HandleError::Busy | HandleError::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        HandleError::Timeout => StatusCode::GATEWAY_TIMEOUT,
    };
    error(status, &failure.to_string())
}

fn error(status: StatusCode, what: &str) -> Response<Full<Bytes>> {
    reply(status, &json!({ "error": what }))
}

fn reply(status: StatusCode, body: &serde_json::Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
    response
}
