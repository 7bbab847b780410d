//! One run of the server: bind everything, say where it is, serve until a signal, let the clients go.

use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_common::config::HostPort;
use mesh_common::limits::{MAX_NAMESPACES, MAX_SLOTS_PER_NAMESPACE};
use mesh_proto::discovery::server::{Server, ServerConfig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use quinn::VarInt;
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use crate::config::{IdentityArgs, ServeArgs};
use crate::gate::Gate;
use crate::hub::Hub;
use crate::metrics::{Health, StunCounters};
use crate::tls::Identity;
use crate::{http, quic, socket, stun};

/// Clients asked to leave come back spread over the time that a server needs to take them all in, so that a small mesh waits
/// little for its relay: this for each, within bounds.
const RETURN_OF_ONE: Duration = Duration::from_millis(1);
const RETURN_SPREAD: RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(5);
/// How long clients get to leave by themselves.
const DRAIN: Duration = Duration::from_secs(2);
/// The last packets of QUIC.
const LAST_PACKETS: Duration = Duration::from_millis(300);
/// Descriptors beside one per session.
const OTHER_FILES: u64 = 256;

/// Serves until SIGTERM or SIGINT.
pub(crate) fn run(identity: &IdentityArgs, args: &ServeArgs) -> anyhow::Result<()> {
    let tls = Identity::load_or_make(&identity.key_source())?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(serve(identity, args, &tls))
}

/// Where agents find a server that listens on this address.
pub(crate) fn advertised(given: Option<&HostPort>, listens: SocketAddr) -> HostPort {
    if let Some(given) = given {
        return given.clone();
    }
    let ip =
        if listens.ip().is_unspecified() { socket::reachable_address().unwrap_or(listens.ip()) } else { listens.ip() };
    HostPort { host: ip.to_string(), port: listens.port() }
}

async fn serve(identity: &IdentityArgs, args: &ServeArgs, tls: &Identity) -> anyhow::Result<()> {
    raise_file_limit(args.max_connections());
    // Before anything is announced: a signal that comes early is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;

    let pair = socket::listen(identity.listen)?;
    let stun_sockets = stun::bind(args.stun, &args.stun_alt_address, pair.address)?;
    let health_listener = args.http.map(bind_health).transpose()?;
    let (stun_ports, stun_alt) = stun_sockets.as_ref().map(stun::Sockets::announced).unwrap_or_default();

    let hub = Hub::new(machine(args, stun_ports.clone(), stun_alt.clone())?);
    let gate = Arc::new(Gate::default());
    let counters = Arc::new(StunCounters::default());
    let health = Arc::new(Health::new(hub.clone(), gate.clone(), counters.clone()));
    let endpoint = quic::endpoint(pair.udp, tls.quic()?, &tls.reset_seed())?;
    let listener = tokio::net::TcpListener::from_std(pair.tcp).context("cannot serve the TCP port")?;
    let acceptor = TlsAcceptor::from(Arc::new(tls.https()?));

    // Both sets run until they are stopped: a task that ends by itself is a bug that a restart may cure.
    let mut doors = JoinSet::new();
    doors.spawn(quic::accept(endpoint.clone(), hub.clone(), gate.clone()));
    doors.spawn(http::accept_sessions(listener, acceptor, hub.clone(), gate));
    if let Some(sockets) = stun_sockets {
        doors.spawn(stun::serve(sockets.open()?, counters));
    }
    let mut house = JoinSet::new();
    house.spawn({
        let hub = hub.clone();
        async move { hub.keep_time().await }
    });
    let health_address = health_listener.as_ref().map(TcpListener::local_addr).transpose()?;
    if let Some(listener) = health_listener {
        let listener = tokio::net::TcpListener::from_std(listener).context("cannot serve the health port")?;
        house.spawn(http::accept_health(listener, health.clone()));
    }
    if let Some(interval) = sd_notify::watchdog_enabled() {
        house.spawn(feed_watchdog(interval / 2, hub.clone()));
    }

    let pin = tls.pin().to_string();
    announce(&format!("endpoint=https://{}\npin={pin}\n", advertised(identity.advertise.as_ref(), pair.address)));
    let open = args.only_namespaces().is_empty();
    info!(
        listen = %pair.address,
        stun = ?stun_ports,
        stun_alt = ?stun_alt,
        http = %health_address.map_or_else(|| "off".to_owned(), |address| address.to_string()),
        pin,
        access = if open { "open" } else { "closed" },
        relay = if args.relay().is_some() { "on" } else { "off" },
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    if open {
        warn!("open to every cluster, within public limits; use --only-namespace to serve your own only");
    }
    tell_service_manager(&[NotifyState::Ready]);

    let cause = tokio::select! {
        cause = stop_signal(&mut terminate, &mut interrupt) => cause,
        ended = doors.join_next() => bail!("a listener ended unexpectedly: {ended:?}"),
        ended = house.join_next() => bail!("a service ended unexpectedly: {ended:?}"),
    };

    tell_service_manager(&[NotifyState::Stopping]);
    health.stop();
    let sessions = hub.stats().connections;
    info!(cause, sessions, "stopping: clients are asked to come back later");
    endpoint.set_server_config(None);
    doors.abort_all();
    hub.shut_down(return_spread(sessions));
    let all_left = tokio::time::timeout(DRAIN, hub.emptied()).await.is_ok();
    endpoint.close(VarInt::from_u32(0), b"the server stops");
    // What is not acknowledged by now never will be.
    let _ = tokio::time::timeout(LAST_PACKETS, endpoint.wait_idle()).await;
    info!(all_left, "stopped");
    Ok(())
}

fn return_spread(sessions: u64) -> Duration {
    let all = RETURN_OF_ONE.saturating_mul(u32::try_from(sessions).unwrap_or(u32::MAX));
    all.clamp(*RETURN_SPREAD.start(), *RETURN_SPREAD.end())
}

fn machine(args: &ServeArgs, stun_ports: Vec<u16>, stun_alt: Vec<SocketAddr>) -> anyhow::Result<Server> {
    let mut seed = [0; 32];
    let mut instance = [0; 8];
    getrandom::fill(&mut seed).context("cannot read random bytes from the system")?;
    getrandom::fill(&mut instance).context("cannot read random bytes from the system")?;
    let config = ServerConfig {
        instance: u64::from_le_bytes(instance),
        slot_ttl: args.ttl(),
        only_namespaces: args.only_namespaces(),
        stun_ports,
        stun_alt,
        relay: args.relay(),
        own_names: args.own_names(),
        max_connections: args.max_connections(),
        max_namespaces: MAX_NAMESPACES,
        max_slots_per_namespace: MAX_SLOTS_PER_NAMESPACE,
        max_stored_bytes: args.max_stored_bytes(),
    };
    Ok(Server::new(config, seed))
}

fn bind_health(address: SocketAddr) -> anyhow::Result<TcpListener> {
    socket::bind_tcp(address).with_context(|| format!("cannot listen on {address}: choose a free address with --http"))
}

/// For scripts. Nobody has to read it.
fn announce(lines: &str) {
    let mut stdout = io::stdout();
    if let Err(error) = stdout.write_all(lines.as_bytes()).and_then(|()| stdout.flush()) {
        debug!(%error, "nobody reads standard output");
    }
}

async fn stop_signal(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// Each beat passes through the runtime and the machine's lock, so a stuck server is a silent one.
async fn feed_watchdog(every: Duration, hub: Arc<Hub>) {
    let mut beat = tokio::time::interval(every.max(Duration::from_millis(100)));
    loop {
        beat.tick().await;
        hub.stats();
        tell_service_manager(&[NotifyState::Watchdog]);
    }
}

fn tell_service_manager(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "the service manager does not listen");
    }
}

/// A TCP session is a file; the usual soft limit of 1024 is for programs that use select().
fn raise_file_limit(sessions: usize) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        debug!("the limit of open files stays as it is");
    }
    let wanted = sessions as u64 + OTHER_FILES;
    if hard < wanted {
        warn!(
            "{hard} open files are allowed, {sessions} sessions over TCP may need {wanted}: raise the limit (LimitNOFILE=) or lower --max-connections"
        );
    }
}
