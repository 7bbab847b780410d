//! Carriers to a discovery server: QUIC and WebSocket over TLS, raced; the first that is up wins.
//!
//! QUIC goes first, TCP follows 200 ms later, a proxy where there is one 200 ms after that, and port 443 after the configured
//! one, because many firewalls pass nothing else. A server is known by the pin of its public key: names and dates of certificates mean nothing here. Every socket
//! carries the mark of our own traffic, so that the mesh's routes never catch it.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use mesh_common::config::{Pin, ProxyUrl};
use mesh_common::limits::CONNECT_TIMEOUT;
use quinn::Endpoint;
use tokio::time::{Instant, sleep, sleep_until};

use super::relay_queue::RelayQueue;

mod marked;
mod pinned;
pub mod proxy;
mod quic;
mod websocket;

/// The port that is tried after the configured one.
const FALLBACK_PORT: u16 = 443;
/// How long QUIC is alone.
const TCP_DELAY: Duration = Duration::from_millis(200);
/// How long the direct ways are alone.
const PROXY_DELAY: Duration = Duration::from_millis(400);
/// How long the configured port is alone.
const FALLBACK_DELAY: Duration = Duration::from_millis(400);
/// Between two addresses of one name.
const ADDRESS_DELAY: Duration = Duration::from_millis(100);
const MAX_ADDRESSES: usize = 6;
/// What QUIC still gets after every TCP attempt has failed: a server that is down refuses TCP and is silent on UDP.
const QUIC_GRACE: Duration = Duration::from_secs(1);

/// A server as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerAddress {
    /// A name or an address, without brackets.
    pub host: String,
    pub port: u16,
    /// SHA-256 of the server's public key (SPKI).
    pub pin: [u8; 32],
    /// What TCP may take where it does not get through directly.
    pub proxy: Option<ProxyUrl>,
}

/// Opens carriers. Made once, inside a tokio runtime: it owns the UDP sockets of all QUIC sessions, and clones share them.
#[derive(Debug, Clone)]
pub struct Dialer {
    v4: Option<Endpoint>,
    v6: Option<Endpoint>,
}

/// A carrier that is up, its server known to hold the pinned key.
#[derive(Debug)]
pub struct Carrier {
    pub kind: CarrierKind,
    pub remote: SocketAddr,
    /// All addresses of the server's name; none when only a proxy could resolve it.
    pub addresses: Vec<IpAddr>,
    /// The proxy it goes through.
    pub proxy: Option<ProxyUrl>,
    /// The TLS exporter value that binds a Hello to this carrier.
    pub exporter: [u8; 32],
    pub sender: CarrierSender,
    pub receiver: CarrierReceiver,
    /// Where relayed messages go and come from; `None` = with the other messages.
    pub relay: Option<RelayLane>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CarrierKind {
    Quic,
    WebSocket,
}

/// The sending half. Dropping both halves ends the carrier at once; [`CarrierSender::close`] delivers first.
#[derive(Debug)]
pub struct CarrierSender(Sending);

/// The receiving half.
#[derive(Debug)]
pub struct CarrierReceiver(Receiving);

/// A lane for messages that may be lost, beside the one for those that may not.
#[derive(Debug)]
pub struct RelayLane {
    pub sender: RelaySender,
    pub receiver: RelayReceiver,
}

/// The sending half of a lane for messages that may be lost.
#[derive(Debug)]
pub struct RelaySender(quic::RelaySender);

/// The receiving half.
#[derive(Debug)]
pub struct RelayReceiver(quic::RelayReceiver);

#[derive(Debug)]
enum Sending {
    Quic(quic::Sender),
    WebSocket(websocket::Sender),
}

#[derive(Debug)]
enum Receiving {
    Quic(quic::Receiver),
    WebSocket(websocket::Receiver),
}

/// Why a carrier broke, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CarrierError(String);

/// Why no carrier came up, for people. The words concern the configured port; the fallback never speaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    #[error("the name {host} does not resolve ({reason}): check the endpoint in the configuration and this node's DNS")]
    NameNotResolved { host: String, reason: String },
    #[error("nothing answers at {endpoint} ({reason}): is the server running, is the port open for UDP and TCP?")]
    NothingAnswers { endpoint: String, reason: String },
    #[error(
        "the server at {endpoint} has key {found}, the configuration expects {expected}: if the server was set up anew, \
         put its new pin into the configuration; if not, somebody stands between"
    )]
    WrongPin { endpoint: String, found: String, expected: String },
    #[error("{endpoint} does not speak TLS: is it a discovery server?")]
    NotTls { endpoint: String },
    #[error("{endpoint} answers but is not a discovery server ({reason}): check host and port")]
    NotADiscoveryServer { endpoint: String, reason: String },
    #[error("the proxy {proxy} {reason}")]
    Proxy { proxy: String, reason: String },
    #[error("{endpoint} closes connections during the handshake: is it a discovery server, is it overloaded?")]
    HungUp { endpoint: String },
}

/// Why one attempt failed, from the least telling to the most.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Failure {
    /// No way there from this host, at least for this address.
    Unreachable(String),
    TimedOut,
    Refused,
    HungUp,
    NotTls,
    NotADiscoveryServer(String),
    Proxy {
        proxy: String,
        reason: String,
    },
    WrongPin([u8; 32]),
}

struct Attempt {
    way: Way,
    port: u16,
    after: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Quic(IpAddr),
    Tcp(IpAddr),
    /// By TCP through the proxy, which resolves the server's name.
    Proxy,
}

impl Dialer {
    /// Opens the UDP sockets. A family that the host lacks is left out; none at all is an error.
    pub fn new() -> io::Result<Self> {
        let v4 = quic::endpoint(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let v6 = quic::endpoint(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        match (v4, v6) {
            (Err(error), Err(_)) => Err(error),
            (v4, v6) => Ok(Self { v4: v4.ok(), v6: v6.ok() }),
        }
    }

    /// Opens a carrier, or says within 5 s why not. Dropping the future ends all attempts.
    pub async fn dial(&self, server: &ServerAddress) -> Result<Carrier, DialError> {
        let mut deadline = Instant::now() + CONNECT_TIMEOUT;
        let resolving = resolve(server);
        tokio::pin!(resolving);
        let mut addresses = None;
        let mut racing = FuturesUnordered::new();
        if server.proxy.is_some() {
            racing.extend(plan_proxy(server.port).into_iter().map(|attempt| self.run(attempt, server)));
        }
        let mut tcp_left = racing.len();
        let mut told: Option<Failure> = None;
        while addresses.is_none() || !racing.is_empty() {
            let (outcome, attempt) = tokio::select! {
                resolved = &mut resolving, if addresses.is_none() => {
                    let found = match resolved {
                        Ok(found) if !found.is_empty() => found,
                        // The proxy may know the name.
                        _ if server.proxy.is_some() => Vec::new(),
                        Ok(_) => return Err(server.unresolved("it has no address".to_owned())),
                        Err(error) => return Err(server.unresolved(error.to_string())),
                    };
                    let plan = plan(&found, server.port);
                    tcp_left += plan.iter().filter(|attempt| matches!(attempt.way, Way::Tcp(_))).count();
                    racing.extend(plan.into_iter().map(|attempt| self.run(attempt, server)));
                    addresses = Some(found);
                    continue;
                }
                Some(ended) = racing.next() => ended,
                () = sleep_until(deadline) => break,
            };
            let failure = match outcome {
                Ok(carrier) => {
                    let proxy = server.proxy.clone().filter(|_| attempt.way == Way::Proxy);
                    return Ok(Carrier { addresses: addresses.unwrap_or_default(), proxy, ..carrier });
                }
                Err(failure) => failure,
            };
            tracing::debug!(way = ?attempt.way, port = attempt.port, ?failure, "a carrier did not come up");
            if attempt.port == server.port {
                told = told.max(Some(failure));
            }
            if !matches!(attempt.way, Way::Quic(_)) {
                tcp_left -= 1;
                if tcp_left == 0 {
                    deadline = deadline.min(Instant::now() + QUIC_GRACE);
                }
            }
        }
        if addresses.is_none() && told.is_none() {
            return Err(server.unresolved("no answer in time".to_owned()));
        }
        // Silence on UDP says nothing, TCP attempts that are still open do.
        let silent = (tcp_left > 0).then_some(Failure::TimedOut);
        Err(server.explain(told.max(silent).unwrap_or(Failure::TimedOut)))
    }

    async fn run(&self, attempt: Attempt, server: &ServerAddress) -> (Result<Carrier, Failure>, Attempt) {
        sleep(attempt.after).await;
        let carrier = match (attempt.way, &server.proxy) {
            (Way::Quic(ip), _) => match if ip.is_ipv4() { &self.v4 } else { &self.v6 } {
                Some(endpoint) => quic::dial(endpoint, SocketAddr::new(ip, attempt.port), server).await,
                None => Err(Failure::Unreachable("no such address family here".to_owned())),
            },
            (Way::Tcp(ip), _) => websocket::dial(SocketAddr::new(ip, attempt.port), server).await,
            (Way::Proxy, Some(proxy)) => websocket::dial_through(proxy, attempt.port, server).await,
            (Way::Proxy, None) => unreachable!("planned only where there is a proxy"),
        };
        (carrier, attempt)
    }
}

impl CarrierSender {
    /// Hands one message to the carrier. Not cancel-safe: a cancelled send may leave half a message behind.
    pub async fn send(&mut self, message: Bytes) -> Result<(), CarrierError> {
        match &mut self.0 {
            Sending::Quic(sender) => sender.send(message).await,
            Sending::WebSocket(sender) => sender.send(message).await,
        }
    }

    /// Delivers what was sent, for a second at most, and ends the carrier.
    pub async fn close(self) {
        match self.0 {
            Sending::Quic(sender) => sender.close().await,
            Sending::WebSocket(sender) => sender.close().await,
        }
    }
}

impl CarrierReceiver {
    /// The next message; `None` when the server ended the carrier in order. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Bytes, CarrierError>> {
        match &mut self.0 {
            Receiving::Quic(receiver) => receiver.next().await,
            Receiving::WebSocket(receiver) => receiver.next().await,
        }
    }
}

impl RelaySender {
    /// Sends what the queue holds and gets. Never returns: that the carrier broke is told where its other messages come in.
    pub async fn run(self, queue: &RelayQueue) {
        self.0.run(queue).await;
    }
}

impl RelayReceiver {
    /// The next message; waits for ever when the carrier broke. Cancel-safe.
    pub async fn next(&mut self) -> Bytes {
        self.0.next().await
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "https://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "https://{}:{}", self.host, self.port)
        }
    }
}

impl ServerAddress {
    fn unresolved(&self, reason: String) -> DialError {
        DialError::NameNotResolved { host: self.host.clone(), reason }
    }

    fn explain(&self, failure: Failure) -> DialError {
        let endpoint = self.to_string();
        match failure {
            Failure::TimedOut => DialError::NothingAnswers { endpoint, reason: "no answer in time".to_owned() },
            Failure::Refused => DialError::NothingAnswers { endpoint, reason: "connection refused".to_owned() },
            Failure::Unreachable(reason) => DialError::NothingAnswers { endpoint, reason },
            Failure::HungUp => DialError::HungUp { endpoint },
            Failure::Proxy { proxy, reason } => DialError::Proxy { proxy, reason },
            Failure::NotTls => DialError::NotTls { endpoint },
            Failure::NotADiscoveryServer(reason) => DialError::NotADiscoveryServer { endpoint, reason },
            Failure::WrongPin(found) => {
                DialError::WrongPin { endpoint, found: Pin(found).to_string(), expected: Pin(self.pin).to_string() }
            }
        }
    }
}

/// In the resolver's order of preference, the families taking turns.
async fn resolve(server: &ServerAddress) -> io::Result<Vec<IpAddr>> {
    if let Ok(ip) = server.host.parse() {
        return Ok(vec![ip]);
    }
    let mut found: Vec<IpAddr> = Vec::new();
    for address in tokio::net::lookup_host((server.host.as_str(), server.port)).await? {
        if !found.contains(&address.ip()) {
            found.push(address.ip());
        }
    }
    Ok(interleave(found))
}

fn interleave(found: Vec<IpAddr>) -> Vec<IpAddr> {
    let first_is_v6 = found.first().is_some_and(IpAddr::is_ipv6);
    let (mut first, mut other): (Vec<_>, Vec<_>) = found.into_iter().partition(|ip| ip.is_ipv6() == first_is_v6);
    let mut turns = Vec::new();
    first.reverse();
    other.reverse();
    while turns.len() < MAX_ADDRESSES {
        let before = turns.len();
        turns.extend(first.pop());
        turns.extend(other.pop());
        if turns.len() == before {
            break;
        }
    }
    turns
}

fn plan(addresses: &[IpAddr], port: u16) -> Vec<Attempt> {
    let mut plan = Vec::new();
    for (port, port_delay) in ports(port) {
        let mut after = port_delay;
        for ip in addresses {
            plan.push(Attempt { way: Way::Quic(*ip), port, after });
            plan.push(Attempt { way: Way::Tcp(*ip), port, after: after + TCP_DELAY });
            after += ADDRESS_DELAY;
        }
    }
    plan
}

fn plan_proxy(port: u16) -> Vec<Attempt> {
    let attempt = |(port, after): (u16, Duration)| Attempt { way: Way::Proxy, port, after: after + PROXY_DELAY };
    ports(port).map(attempt).collect()
}

/// The ports to try, and when.
fn ports(port: u16) -> impl Iterator<Item = (u16, Duration)> {
    let fallback = (port != FALLBACK_PORT).then_some((FALLBACK_PORT, FALLBACK_DELAY));
    std::iter::once((port, Duration::ZERO)).chain(fallback)
}

#[cfg(test)]
mod tests;
