//! Puts one request to the router and reports what came of it: PCP and NAT-PMP by `crab_nat`, UPnP by `igd-next`.
//!
//! Refuses policy: who is asked, when and what is believed is `mesh_proto::net::port_mapping`. The other end is anybody on the
//! local network, so each request has a thread and a time limit of its own: an answer that takes long to read, or that a
//! library does not survive, costs a failure and stops nothing else. What is read is bounded: a PCP answer by 1100 bytes, a
//! document of UPnP by 1 MiB. UPnP documents are fetched from the router's own address only.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::thread;
use std::time::Duration;

use crab_nat::{InternetProtocol, PortMappingOptions, PortMappingType, TimeoutConfig, natpmp, pcp};
use futures_util::future::{pending, select_ok};
use igd_next::aio::Gateway;
use igd_next::aio::tokio::{Tokio, search_gateway};
use igd_next::{AddPortError, PortMappingProtocol, SearchOptions};
use mesh_proto::net::port_mapping::{Ask, Grant, MappingFailure, MappingId, MappingProtocol, MappingRequest};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// A router that says yes does so within milliseconds; UPnP takes a search and three exchanges.
const LIMIT: Duration = Duration::from_secs(8);
/// At 0, 250 and 750 ms; given up after 1.75 s.
const TIMEOUTS: TimeoutConfig = TimeoutConfig {
    initial_timeout: Duration::from_millis(250),
    max_retries: 2,
    max_retry_timeout: Some(Duration::from_secs(1)),
};
const SEARCH_LIMIT: Duration = Duration::from_secs(3);
const SSDP_PORT: u16 = 1900;
/// How the mapping is called on the router's pages.
const DESCRIPTION: &str = "meshspan";

type Outcome = Result<Grant, MappingFailure>;

/// Requests under way.
#[derive(Debug, Default)]
pub struct PortMapping {
    asked: JoinSet<(MappingId, Outcome)>,
}

impl PortMapping {
    /// The outcome comes by [`Self::next`] within [`LIMIT`], whatever the other end does.
    pub fn start(&mut self, request: MappingRequest) {
        let id = request.id;
        let (done, outcome) = oneshot::channel();
        let started = thread::Builder::new().name("port-mapping".into()).spawn(move || {
            // Whoever asked may have given up.
            let _gone = done.send(ask(&request));
        });
        let limit = LIMIT + Duration::from_secs(1);
        self.asked.spawn(async move {
            let outcome = match (started, timeout(limit, outcome).await) {
                (Err(error), _) => Err(MappingFailure::Refused(format!("this host starts no thread for it: {error}"))),
                (Ok(_), Err(_)) => Err(MappingFailure::NoAnswer),
                (Ok(_), Ok(Err(_))) => Err(MappingFailure::Malformed("it cannot be read at all".to_owned())),
                (Ok(_), Ok(Ok(outcome))) => outcome,
            };
            (id, outcome)
        });
    }

    /// What came of the next request that is over. Cancel-safe; waits for ever while there is none.
    pub async fn next(&mut self) -> (MappingId, Outcome) {
        loop {
            match self.asked.join_next().await {
                Some(Ok(outcome)) => return outcome,
                // Only the end of the process cancels one.
                Some(Err(_)) => {}
                None => pending().await,
            }
        }
    }

    pub fn is_idle(&self) -> bool {
        self.asked.is_empty()
    }
}

/// Blocks for at most [`LIMIT`].
fn ask(request: &MappingRequest) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| MappingFailure::Refused(format!("this host has no room for it: {error}")))?;
    let exchange = async {
        match request.protocol {
            MappingProtocol::Pcp => by_pcp(request).await,
            MappingProtocol::NatPmp => by_nat_pmp(request).await,
            MappingProtocol::Upnp => by_upnp(request).await,
        }
    };
    runtime.block_on(async { timeout(LIMIT, exchange).await.unwrap_or(Err(MappingFailure::NoAnswer)) })
}

async fn by_pcp(request: &MappingRequest) -> Outcome {
    let gateway = request.gateway.router.into();
    let client = IpAddr::V4(request.gateway.client);
    let port = port(request.internal_port)?;
    let word = |n: usize| u32::from_be_bytes(std::array::from_fn(|byte| request.nonce[4 * n + byte]));
    let nonce = [word(0), word(1), word(2)];
    match request.ask {
        Ask::Map { external_port, external_address, lifetime } => {
            let base = pcp::BaseMapRequest::new(gateway, client, InternetProtocol::Udp, port);
            let options = options(external_port, lifetime);
            let mapping = pcp::port_mapping(base, Some(nonce), external_address.map(IpAddr::V4), options).await;
            let mapping = mapping.map_err(|failure| pcp_failure(&failure))?;
            let address = match mapping.mapping_type() {
                PortMappingType::Pcp { external_ip: IpAddr::V4(address), .. } => Some(address),
                _ => None,
            };
            Ok(grant(&mapping, address))
        }
        Ask::Release { external_port } => {
            let range = pcp::DropMappingRange::Single { protocol: InternetProtocol::Udp, internal_port: port };
            let dropped = pcp::try_drop_mapping(gateway, client, nonce, range, Some(TIMEOUTS)).await;
            dropped.map(|()| given_back(external_port)).map_err(|failure| pcp_failure(&failure))
        }
    }
}

async fn by_nat_pmp(request: &MappingRequest) -> Outcome {
    let gateway = request.gateway.router.into();
    let port = port(request.internal_port)?;
    match request.ask {
        Ask::Map { external_port, lifetime, .. } => {
            let options = options(external_port, lifetime);
            let mapping = natpmp::port_mapping(gateway, InternetProtocol::Udp, port, options).await;
            let mapping = mapping.map_err(|failure| nat_pmp_failure(&failure))?;
            let address = natpmp::external_address(gateway, Some(TIMEOUTS)).await;
            Ok(grant(&mapping, address.ok()))
        }
        Ask::Release { external_port } => {
            let dropped = natpmp::try_drop_mapping(gateway, InternetProtocol::Udp, Some(port), Some(TIMEOUTS)).await;
            dropped.map(|()| given_back(external_port)).map_err(|failure| nat_pmp_failure(&failure))
        }
    }
}

async fn by_upnp(request: &MappingRequest) -> Outcome {
    let router = find_router(request).await?;
    let local = SocketAddr::new(request.gateway.client.into(), request.internal_port);
    match request.ask {
        Ask::Map { external_port, lifetime, .. } => {
            let seconds = u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX);
            let mut lease = Some(lifetime);
            let mut added = router.add_port(PortMappingProtocol::UDP, external_port, local, seconds, DESCRIPTION).await;
            if matches!(added, Err(AddPortError::OnlyPermanentLeasesSupported)) {
                lease = None;
                added = router.add_port(PortMappingProtocol::UDP, external_port, local, 0, DESCRIPTION).await;
            }
            let port = match added {
                Ok(()) => external_port,
                Err(AddPortError::PortInUse) => {
                    let seconds = if lease.is_some() { seconds } else { 0 };
                    let other = router.add_any_port(PortMappingProtocol::UDP, local, seconds, DESCRIPTION).await;
                    other.map_err(|error| upnp_failure(&error))?
                }
                Err(error) => return Err(upnp_failure(&error)),
            };
            let address = match router.get_external_ip().await {
                Ok(IpAddr::V4(address)) => Some(address),
                _ => None,
            };
            Ok(Grant { address, port, lifetime: lease, epoch: None })
        }
        Ask::Release { external_port } => {
            let removed = router.remove_port(PortMappingProtocol::UDP, external_port).await;
            removed.map(|()| given_back(external_port)).map_err(|error| upnp_failure(&error))
        }
    }
}

/// Asks the router itself and everybody, since some routers hear only the latter; only the router's own answer counts.
async fn find_router(request: &MappingRequest) -> Result<Gateway<Tokio>, MappingFailure> {
    let router = IpAddr::V4(request.gateway.router);
    let search = |everybody: bool| async move {
        let mut options = SearchOptions::default();
        options.bind_addr = SocketAddr::new(request.gateway.client.into(), 0);
        if !everybody {
            options.broadcast_address = SocketAddr::new(router, SSDP_PORT);
        }
        options.timeout = Some(SEARCH_LIMIT);
        match search_gateway(options).await {
            Ok(found) if found.addr.ip() == router => Ok(found),
            Ok(_) | Err(_) => Err(MappingFailure::NoAnswer),
        }
    };
    let (found, _) = select_ok([Box::pin(search(false)), Box::pin(search(true))]).await?;
    Ok(found)
}

fn port(port: u16) -> Result<NonZeroU16, MappingFailure> {
    NonZeroU16::new(port).ok_or_else(|| MappingFailure::Refused("there is no port to map".to_owned()))
}

fn options(external_port: u16, lifetime: Duration) -> PortMappingOptions {
    PortMappingOptions {
        external_port: NonZeroU16::new(external_port),
        lifetime_seconds: Some(u32::try_from(lifetime.as_secs()).unwrap_or(u32::MAX)),
        timeout_config: Some(TIMEOUTS),
    }
}

fn grant(mapping: &crab_nat::PortMapping, address: Option<std::net::Ipv4Addr>) -> Grant {
    Grant {
        address,
        port: mapping.external_port().get(),
        lifetime: Some(Duration::from_secs(mapping.lifetime().into())),
        epoch: Some(mapping.gateway_epoch()),
    }
}

/// Nobody reads it.
fn given_back(port: u16) -> Grant {
    Grant { address: None, port, lifetime: None, epoch: None }
}

fn pcp_failure(failure: &pcp::Failure) -> MappingFailure {
    match failure {
        // A port that nobody listens on is refused at once.
        pcp::Failure::Socket(_) | pcp::Failure::Timeout => MappingFailure::NoAnswer,
        pcp::Failure::Nonce | pcp::Failure::InvalidResponse(_) => MappingFailure::Malformed(brief(failure)),
        _ => MappingFailure::Refused(brief(failure)),
    }
}

fn nat_pmp_failure(failure: &natpmp::Failure) -> MappingFailure {
    match failure {
        natpmp::Failure::Socket(_) | natpmp::Failure::Timeout => MappingFailure::NoAnswer,
        natpmp::Failure::InvalidResponse(_) => MappingFailure::Malformed(brief(failure)),
        _ => MappingFailure::Refused(brief(failure)),
    }
}

fn upnp_failure(error: &dyn std::error::Error) -> MappingFailure {
    MappingFailure::Refused(brief(error))
}

/// What others wrote is shown to people, and kept short.
fn brief(error: &(impl std::fmt::Display + ?Sized)) -> String {
    error.to_string().chars().filter(|c| !c.is_control()).take(160).collect()
}
