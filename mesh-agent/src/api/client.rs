//! The command line's side of the socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::HOST;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{ANSWER_TIMEOUT, ApiError, PingOutcome, PingRequest};
use crate::status::Status;
use crate::status::net::Netcheck;

/// The longest answer that is read: a status of 1024 members with all they may announce, and room.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

pub async fn status(socket: &Path) -> Result<Status, ApiError> {
    answer(socket, call(socket, Method::GET, "/v1/status").await?)
}

/// Has the agent read its configuration again.
pub async fn reload(socket: &Path) -> Result<(), ApiError> {
    call(socket, Method::POST, "/v1/reload").await.map(drop)
}

/// Has the agent tell all members that this node leaves.
pub async fn leave(socket: &Path) -> Result<(), ApiError> {
    call(socket, Method::POST, "/v1/leave").await.map(drop)
}

/// Has the agent send one probe.
pub async fn ping(socket: &Path, request: &PingRequest) -> Result<PingOutcome, ApiError> {
    let via = serde_json::to_value(request.via).unwrap_or_default();
    let path = format!("/v1/ping?peer={}&via={}", escaped(&request.peer), via.as_str().unwrap_or_default());
    answer(socket, call(socket, Method::POST, &path).await?)
}

/// Has the agent look at the network anew.
pub async fn netcheck(socket: &Path) -> Result<Netcheck, ApiError> {
    answer(socket, call(socket, Method::POST, "/v1/netcheck").await?)
}

fn answer<T: DeserializeOwned>(socket: &Path, body: Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(&body).map_err(|error| broken(socket, &format!("{error} (is it of another version?)")))
}

/// Whatever a person types, as part of a URL.
fn escaped(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

async fn call(socket: &Path, method: Method, path: &str) -> Result<Bytes, ApiError> {
    // The agent answers within its own limit, a dead one never: a little longer tells the two apart.
    let limit = ANSWER_TIMEOUT + Duration::from_secs(5);
    match tokio::time::timeout(limit, exchange(socket, method, path)).await {
        Ok(result) => result,
        Err(_) => Err(broken(socket, &format!("nothing for {} seconds", limit.as_secs()))),
    }
}

async fn exchange(socket: &Path, method: Method, path: &str) -> Result<Bytes, ApiError> {
    let stream = UnixStream::connect(socket).await.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ApiError::NotRunning { socket: socket.to_owned() }
        }
        io::ErrorKind::PermissionDenied => ApiError::Permission { socket: socket.to_owned() },
        _ => ApiError::Io { socket: socket.to_owned(), source },
    })?;
    let unexpected = |error: hyper::Error| broken(socket, &error.to_string());
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(unexpected)?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "agent")
        .body(Empty::<Bytes>::new())
        .map_err(|error| broken(socket, &error.to_string()))?;
    let response = sender.send_request(request).await.map_err(unexpected)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    driver.abort();
    let body = body.map_err(|error| broken(socket, &error.to_string()))?.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    let said = serde_json::from_slice::<serde_json::Value>(&body).ok();
    let said = said.as_ref().and_then(|json| json["error"].as_str()).unwrap_or("no reason given");
    match status {
        StatusCode::NOT_FOUND => Err(ApiError::TooOld { socket: socket.to_owned() }),
        StatusCode::BAD_REQUEST => Err(ApiError::Wrong(said.to_owned())),
        StatusCode::FORBIDDEN => Err(ApiError::Permission { socket: socket.to_owned() }),
        StatusCode::CONFLICT | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
            Err(ApiError::Refused(said.to_owned()))
        }
        _ => Err(broken(socket, &format!("{status}: {said}"))),
    }
}

fn broken(socket: &Path, what: &str) -> ApiError {
    ApiError::Broken { socket: socket.to_owned(), what: what.to_owned() }
}
