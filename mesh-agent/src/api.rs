//! The local API: HTTP and JSON over a Unix socket, between the running agent and its command line.
//!
//! `GET /v1/status` for whoever may open the socket (0660); `POST /v1/reload`, `/v1/leave`, `/v1/netcheck` and
//! `/v1/ping?peer=NAME&via=PATH` only for root and the agent's own user, by the credentials the kernel gives. Requests go to the event loop over a bounded queue; connections
//! are bounded in number and time, so a stuck client costs one slot for a while and nothing more.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::status::Status;
use crate::status::net::Netcheck;

pub mod client;
mod server;

pub use server::{BindError, bind, serve};

/// Requests the event loop may be behind by.
const QUEUE: usize = 16;
/// How long the event loop may take for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// What the event loop is asked. Each is answered once; a dropped sender counts as a failure.
#[derive(Debug)]
pub enum ApiRequest {
    Status(oneshot::Sender<Box<Status>>),
    /// Read the configuration again; answered when the new one is in force, or why it is not.
    Reload(oneshot::Sender<Result<(), String>>),
    /// Publish the signed leave; answered when a server has it, or why none has.
    Leave(oneshot::Sender<Result<(), String>>),
    /// Send one probe to a peer; answered when its answer comes, or when none can come any more.
    Ping(PingRequest, oneshot::Sender<Result<PingOutcome, String>>),
    /// Look at the network anew; answered when servers said what they see, or after a while.
    Netcheck(oneshot::Sender<Result<Box<Netcheck>, String>>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PingRequest {
    /// A host name, or the start of a node id or public key.
    pub peer: String,
    pub via: PingVia,
}

/// The path that a ping takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PingVia {
    /// Where packets go now.
    #[default]
    Any,
    Relay,
    Direct,
}

/// What came of a ping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum PingOutcome {
    Reply {
        peer: String,
        /// Of the peer, in the mesh.
        address: Option<IpAddr>,
        via: PingVia,
        /// An address, or the relay's server.
        endpoint: String,
        rtt_us: u64,
    },
    /// No answer in time.
    Lost { peer: String, via: PingVia, waited_ms: u64 },
    /// There is no such path now.
    NoPath { peer: String, why: String },
}

/// The API's way to the event loop.
#[derive(Debug, Clone)]
pub struct ApiHandle {
    requests: mpsc::Sender<ApiRequest>,
}

/// The two ends between API and event loop.
pub fn channel() -> (ApiHandle, mpsc::Receiver<ApiRequest>) {
    let (requests, receiver) = mpsc::channel(QUEUE);
    (ApiHandle { requests }, receiver)
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    #[error("the agent has too many requests: try again")]
    Busy,
    #[error("the agent is stopping")]
    Stopping,
    #[error("the agent did not answer within {} seconds", ANSWER_TIMEOUT.as_secs())]
    Timeout,
}

impl ApiHandle {
    pub async fn status(&self) -> Result<Box<Status>, HandleError> {
        self.ask(ApiRequest::Status).await
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> ApiRequest) -> Result<T, HandleError> {
        let (sender, answer) = oneshot::channel();
        self.requests.try_send(request(sender)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => HandleError::Busy,
            mpsc::error::TrySendError::Closed(_) => HandleError::Stopping,
        })?;
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(HandleError::Stopping),
            Err(_) => Err(HandleError::Timeout),
        }
    }
}

/// Why the command line got no answer.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("no agent answers on {}: start it with `systemctl start mesh-agent` or `mesh-agent run`", socket.display())]
    NotRunning { socket: PathBuf },
    #[error("{} may not be used by this user: run as root", socket.display())]
    Permission { socket: PathBuf },
    #[error("the agent refused: {0}")]
    Refused(String),
    /// What was asked for is not there.
    #[error("{0}")]
    Wrong(String),
    #[error(
        "the agent on {} is of an older version and cannot do this: restart it, for instance with `systemctl restart mesh-agent`",
        socket.display()
    )]
    TooOld { socket: PathBuf },
    #[error("the agent on {} did not answer as expected: {what}", socket.display())]
    Broken { socket: PathBuf, what: String },
    #[error("the socket {} failed", socket.display())]
    Io { socket: PathBuf, source: io::Error },
}

#[cfg(test)]
mod tests;
