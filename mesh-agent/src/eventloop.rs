//! One node that is switched on: the only place where the machine meets the world.
//!
//! Owns the order of things: one input, then everything the machine has to say, then the next. Refuses policy: it moves
//! bytes, carries out steps and reports facts. Nothing here ends the loop but a signal or the machine itself; what fails on
//! the host is reported to the machine and shown in `status`.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use ipnet::{IpNet, Ipv6Net};
use mesh_common::config::{BackendChoice, Config};
use mesh_common::host_name::HostName;
use mesh_common::id::ServerId;
use mesh_common::key::ClusterSecret;
use mesh_common::limits::FWMARK;
use mesh_common::time::Instant;
use mesh_proto::device::{Action, Endpoint, Link, Observed};
use mesh_proto::mesh::agent::{Agent, AgentEvent, Announced, OwnClaim, Start, StepError};
use mesh_proto::mesh::settings::Settings;
use mesh_proto::path::agent::PathPolicy;
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};
use zeroize::Zeroizing;

use crate::api::ApiRequest;
use crate::backend::{Backend, Place};
use crate::clock;
use crate::dataplane::UdpSockets;
use crate::device::{ApplyError, HostDevice, HostWatch, ObserveError};
use crate::io::carriers::{CarrierEvent, Carriers};
use crate::io::port_mapping::PortMapping;
use crate::io::session::{Dialer, ServerAddress};
use crate::services::{Answer, Services, Wish};
use crate::speedtest::service::Service as Speedtest;
use crate::state::State;
use crate::status::Status;
use crate::{device, node_settings, secrets, status};

mod inquiries;

use self::inquiries::Inquiries;

/// How often tunnels in use run their timers.
const TUNNEL_TICK: Duration = Duration::from_millis(250);
/// Bursts of netlink events are looked at once.
const HOST_SETTLE: Duration = Duration::from_millis(20);
/// A host whose network never rests is looked at this often at most: a look costs about 5 ms with 1000 routes.
const HOST_PAUSE: Duration = Duration::from_millis(200);
/// Bursts of records are written to disk once.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// Until members that could not be written are tried again.
const STORE_RETRY: Duration = Duration::from_secs(10);
/// How long a router may take to hear that its port is not needed any more: the process ends without its answer.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);
/// A departure that takes longer is cut short; what is left on the host is named.
const LEAVE_LIMIT: Duration = Duration::from_secs(10);

/// Why a node stopped.
#[derive(Debug)]
pub enum Ended {
    /// A signal: the link goes with the process, the fail-closed floor stays.
    Terminated,
    /// It said farewell and cleaned the host. The configuration to go on with.
    Left(Departure),
}

pub struct Node<'a> {
    config: Config,
    secret: ClusterSecret,
    servers: Vec<ServerAddress>,
    host_name: HostName,
    /// The configured one, or the one that this node moved to.
    listen_port: u16,
    agent: Agent,
    backend: Backend,
    host: HostDevice,
    watch: HostWatch,
    carriers: Carriers,
    ports: PortMapping,
    speedtest: Option<Speedtest>,
    /// Of this agent's local API.
    socket: PathBuf,
    state: &'a mut State,
    started_at_ms: u64,
    store_at: Option<Instant>,
    observe_at: Option<Instant>,
    /// When the host was last looked at.
    looked_at: Instant,
    leaving: Option<Leaving>,
    inquiries: Inquiries,
    ready: bool,
    /// The backend lost its link and has no other yet.
    link_lost: bool,
    store_failed: bool,
    host_problem: Option<String>,
    /// The last picture of the host.
    observed: Observed,
}

impl fmt::Debug for Node<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("node", &self.agent.node_id()).finish_non_exhaustive()
    }
}

/// The node is gone from this process.
#[derive(Debug)]
pub struct Departure {
    pub config: Box<Config>,
    /// Who is to be told whether the new configuration is in force.
    pub waiting: Vec<Answer>,
    /// Nothing is left on the host. Otherwise the floor stands until the node is back.
    pub is_clean: bool,
}

/// Why a run of the node is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    Left { is_clean: bool },
    MovedPort,
}

/// A departure under way, and who waits for it.
struct Leaving {
    config: Box<Config>,
    give_up_at: Instant,
    waiting: Vec<Answer>,
}

impl<'a> Node<'a> {
    /// Opens everything a node needs; fails with what is missing before anything is announced.
    pub async fn start(config: Config, state: &'a mut State, socket: &Path) -> anyhow::Result<Self> {
        let mut settings = node_settings::load(&config).await?;
        let host_name = settings.host_name.clone();
        let secret = secrets::cluster_secret(&config.cluster.secret)?;
        let mut host = HostDevice::new(&settings.link_name, state.dir())?;
        let backend = open_backend(config.mesh.backend, &mut settings, state).await?;
        host.set_link(backend.index(), settings.listen_port);
        let watch = HostWatch::start().context("cannot watch the host's network by netlink")?;
        let carriers = Carriers::new(Dialer::new().context("cannot open sockets for discovery servers")?);
        let mut seed = Zeroizing::new([0; 32]);
        let mut instance = [0; 16];
        getrandom::fill(seed.as_mut_slice()).context("the operating system gives no randomness")?;
        getrandom::fill(&mut instance).context("the operating system gives no randomness")?;
        let started_at_ms = clock::unix_ms();
        let start = Start {
            keys: secret.derive(),
            identity: state.identity().clone(),
            wg: state.wg().clone(),
            path_policy: PathPolicy::default(),
            instance,
            seed: *seed,
            unix_ms: started_at_ms,
            last_seq: state.reserved_seq(),
            claim: state.claim().map(|(addr, claimed_at_ms)| OwnClaim { addr, claimed_at_ms }),
            announced: Announced { since_ms: state.announced().0.clone(), at_ms: state.announced().1 },
            marks: state.load_marks()?,
            frames: state.load_frames()?,
        };
        let listen_port = settings.listen_port;
        let mut agent = Agent::new(settings, start, clock::now());
        agent.handle_device(backend.kind().capabilities(), clock::now());
        if let Err(error) = device::mark(state.dir()) {
            tracing::warn!(
                "{} cannot be written ({error}): a start with mesh.enabled: false will not remove what this run leaves",
                state.dir().display()
            );
        }
        tracing::info!(
            node = %agent.node_id().short(),
            overlay_v6 = %agent.overlay_v6(),
            interface = %config.mesh.interface_name.as_str(),
            port = listen_port,
            backend = backend.kind().name(),
            cached_members = agent.members().iter().count(),
            "mesh is on"
        );
        Ok(Self {
            servers: node_settings::servers(&config),
            host_name,
            listen_port,
            config,
            secret,
            agent,
            backend,
            host,
            watch,
            carriers,
            ports: PortMapping::default(),
            speedtest: None,
            socket: socket.to_owned(),
            state,
            started_at_ms,
            store_at: None,
            observe_at: Some(clock::now()),
            looked_at: Instant::ORIGIN,
            leaving: None,
            inquiries: Inquiries::default(),
            ready: false,
            link_lost: false,
            store_failed: false,
            host_problem: None,
            observed: Observed::default(),
        })
    }

    /// Runs until a signal or until the node has left.
    pub async fn run(mut self, services: &mut Services) -> anyhow::Result<Ended> {
        let mut tunnels = interval(TUNNEL_TICK);
        tunnels.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            match self.drain(services).await {
                Some(Done::Left { is_clean }) => {
                    self.give_port_back().await;
                    return Ok(self.leave(is_clean));
                }
                Some(Done::MovedPort) => {
                    self.give_port_back().await;
                    let config = Box::new(self.config.clone());
                    return Ok(self.start_anew(config, Vec::new()));
                }
                None => {}
            }
            if !self.backend.is_running() {
                bail!("a thread of the data plane died, which is a bug: the log above says where");
            }
            let (wake_at, _why) = self.next_wake();
            tokio::select! {
                wish = services.next() => {
                    if let Some(ended) = self.grant(wish).await? {
                        return Ok(ended);
                    }
                }
                (server, event) = self.carriers.next() => {
                    let now = clock::now();
                    match event {
                        CarrierEvent::Connected { exporter, addresses, .. } => {
                            self.agent.handle_connected(server, exporter, addresses, now);
                        }
                        CarrierEvent::Message(message) => self.agent.handle_message(server, &message, now),
                        CarrierEvent::Closed(reason) => self.agent.handle_disconnected(server, &reason, now),
                    }
                }
                (request, outcome) = self.ports.next() => self.agent.handle_mapping(request, outcome, clock::now()),
                () = self.backend.wait() => self.report_peers().await,
                _ = tunnels.tick() => {
                    self.backend.handle_timeout(clock::now());
                    self.report_peers().await;
                }
                () = self.watch.changed() => {
                    let at = (clock::now() + HOST_SETTLE).max(self.looked_at + HOST_PAUSE);
                    self.observe_at = Some(self.observe_at.map_or(at, |before| before.min(at)));
                }
                () = sleep_until(clock::deadline(wake_at)) => self.agent.handle_timeout(clock::now()),
            }
        }
    }

    fn next_wake(&self) -> (Instant, &'static str) {
        let own = [
            self.store_at.map(|at| (at, "write members to disk")),
            self.observe_at.map(|at| (at, "look at the host")),
            self.leaving.as_ref().map(|leaving| (leaving.give_up_at, "stop waiting for the departure")),
        ];
        let own = own.into_iter().flatten().chain(self.inquiries.poll_timeout());
        own.chain(self.agent.poll_timeout())
            .min_by_key(|(at, _)| *at)
            .unwrap_or_else(|| (clock::now() + Duration::from_secs(3600), "nothing is due"))
    }

    /// Does all that is due and all that the machine asks for. `Some` when that ends this run of the node.
    async fn drain(&mut self, services: &mut Services) -> Option<Done> {
        loop {
            while let Some((server, message)) = self.agent.poll_transmit() {
                self.carriers.send(server, message);
            }
            let now = clock::now();
            if let Some(event) = self.agent.poll_event() {
                match event {
                    AgentEvent::Stopped => return Some(Done::Left { is_clean: true }),
                    AgentEvent::MovePort(port) if self.move_port(port) => return Some(Done::MovedPort),
                    other => self.carry_out(other).await,
                }
            } else if self.observe_at.is_some_and(|at| now >= at) || self.is_link_newly_lost() {
                self.observe_at = None;
                if let Some(observed) = self.observe().await {
                    self.observed = observed.clone();
                    self.agent.handle_observed(observed, clock::now());
                }
            } else if self.store_at.is_some_and(|at| now >= at) {
                self.store_at = None;
                self.store_members();
            } else if self.leaving.as_ref().is_some_and(|leaving| now >= leaving.give_up_at) {
                tracing::warn!("the departure is not complete: run `mesh-agent cleanup` for what is left on this host");
                return Some(Done::Left { is_clean: false });
            } else {
                break;
            }
        }
        self.end_inquiries(clock::now());
        if self.ready {
            services.ready();
        }
        None
    }

    /// The link was deleted and the host does not know yet.
    fn is_link_newly_lost(&mut self) -> bool {
        self.backend.link_lost() && !std::mem::replace(&mut self.link_lost, true)
    }

    async fn carry_out(&mut self, event: AgentEvent) {
        match event {
            AgentEvent::Dial(server) => self.carriers.dial(server, self.servers[server.0].clone()),
            AgentEvent::HangUp(server) => self.carriers.hang_up(server),
            AgentEvent::ReserveSeq(seq) => {
                let written = self.state.reserve_seq(seq);
                self.note_written(written);
                self.agent.handle_seq_reserved(seq, clock::now());
            }
            AgentEvent::StoreClaim(claim) => {
                let written = self.state.set_claim(Some((claim.addr, claim.claimed_at_ms)));
                self.note_written(written);
            }
            AgentEvent::StoreAnnounced(since_ms) => {
                let written = self.state.set_announced(since_ms, clock::unix_ms());
                self.note_written(written);
            }
            AgentEvent::StoreMembers => {
                self.store_at.get_or_insert_with(|| clock::now() + STORE_PAUSE);
            }
            AgentEvent::SetRoute(peer, route) => self.backend.set_route(&peer, &route),
            AgentEvent::SendRaw { to, bytes, ttl } => self.backend.send_raw(to.into(), &bytes, ttl),
            AgentEvent::SendFrom { socket, to, bytes, ttl } => {
                self.backend.send_raw(Endpoint::Extra(socket, to), &bytes, ttl);
            }
            AgentEvent::OpenSockets { peer, family, count } => {
                let opened = self.backend.open_extra(&peer, family, count);
                self.agent.handle_sockets(&peer, &opened, clock::now());
            }
            AgentEvent::MapPort(request) => self.ports.start(request),
            AgentEvent::CloseSockets(closed) => self.backend.close_extra(&closed),
            AgentEvent::SendRelay { server, message } => self.carriers.send_relay(server, message),
            AgentEvent::Relayed { server, peer, datagram } => self.backend.handle_relayed(&peer, server, &datagram),
            AgentEvent::Echoed { echo, from, rtt } => self.end_ping(echo, from, rtt),
            AgentEvent::StartHandshake(peer) => {
                if !self.backend.start_handshake(&peer) {
                    tracing::debug!(%peer, "no endpoint to start a handshake with");
                }
            }
            AgentEvent::Apply(steps) => self.apply(steps).await,
            AgentEvent::Stopped | AgentEvent::MovePort(_) => {}
        }
    }

    /// Whether the port is kept and a new start would have it. The configured one stays the one that peers without an agent
    /// and port forwardings are told, so the log names it.
    fn move_port(&mut self, port: u16) -> bool {
        if let Err(error) = UdpSockets::bind(port, FWMARK) {
            tracing::debug!(%error, "this host has another use for the port");
            self.agent.handle_port_taken(port, clock::now());
            return false;
        }
        let configured = self.config.mesh.listen_port;
        let written = self.state.set_moved_port(configured, port);
        if !self.note_written(written) {
            // Without a memory of it the next start would be back on the shared port, and move again.
            return false;
        }
        tracing::warn!(
            "another node behind the same NAT has UDP port {configured}: this one starts anew on port {port} and keeps it; \
             set mesh.listenPort to choose one yourself"
        );
        true
    }

    async fn apply(&mut self, steps: Vec<Action>) {
        let mut failures = Vec::new();
        let mut note = |step: &Action, result: anyhow::Result<()>| {
            if let Err(error) = result {
                let not_permitted = matches!(error.downcast_ref(), Some(ApplyError::NotPermitted { .. }));
                failures.push((step.clone(), StepError { text: format!("{error:#}"), not_permitted }));
            }
        };
        for group in steps.chunk_by(|one, next| is_of_route(one) && is_of_route(next)) {
            if !matches!(group[0], Action::SetPeer(..) | Action::RemovePeer(_)) {
                // Many peers are put into force at once, and before a packet can be routed to them.
                self.backend.publish().await;
            }
            if !is_of_route(&group[0]) {
                note(&group[0], self.apply_step(&group[0]).await);
                continue;
            }
            let results = self.host.apply_routes(group).await;
            group.iter().zip(results).for_each(|(step, result)| note(step, result.map_err(Into::into)));
        }
        if let Some(observed) = self.observe().await {
            self.ready |= observed.link.is_some();
            self.observed = observed;
        } else if let Some(step) = steps.first().cloned() {
            // The last picture stands, and the machine waits before it asks for more.
            let text = self.host_problem.clone().unwrap_or_default();
            failures.push((step, StepError { text, not_permitted: false }));
        }
        self.agent.handle_applied(failures, self.observed.clone(), clock::now());
    }

    async fn apply_step(&mut self, step: &Action) -> anyhow::Result<()> {
        match step {
            Action::CreateLink(link) => self.create_link(link).await?,
            Action::UpdateLink(link) => self.host.configure_link(link).await?,
            Action::SetPeer(key, spec) => {
                self.backend.set_peer(*key, spec.clone());
                if let Some(route) = self.agent.route_of(key) {
                    self.backend.set_route(key, route);
                }
            }
            Action::RemovePeer(key) => self.backend.remove_peer(key),
            _ => self.host.apply(step).await?,
        }
        Ok(())
    }

    /// The link that was made at the start is used first; one that was deleted is made anew.
    async fn create_link(&mut self, link: &Link) -> anyhow::Result<()> {
        if !self.backend.link_lost() {
            match self.host.configure_link(link).await {
                Err(error) if error.is_missing_link() => {}
                other => {
                    other?;
                    self.serve_speedtests();
                    return Ok(());
                }
            }
        }
        self.backend.make_link(&link.name).await?;
        self.host.set_link(self.backend.index(), link.listen_port);
        self.link_lost = false;
        self.host.configure_link(link).await?;
        self.serve_speedtests();
        Ok(())
    }

    /// On the link as it is now, or not at all.
    fn serve_speedtests(&mut self) {
        self.speedtest = None;
        let mesh = &self.config.mesh;
        if !mesh.speedtest {
            return;
        }
        let overlay = [IpNet::V4(mesh.overlay_v4_pool), IpNet::V6(overlay_v6_net(self.agent.overlay_v6()))];
        match Speedtest::start(mesh.interface_name.as_str(), overlay, &self.socket) {
            Ok(service) => self.speedtest = Some(service),
            Err(error) => tracing::warn!(%error, "peers cannot test how fast the tunnel to this node is"),
        }
    }

    async fn observe(&mut self) -> Option<Observed> {
        self.looked_at = clock::now();
        self.backend.publish().await;
        match self.host.observe().await {
            Ok(observed) => {
                self.host_problem = None;
                Some(Observed { peers: self.backend.peers(), ..observed })
            }
            Err(error) => {
                let text = error.to_string();
                if self.host_problem.as_ref() != Some(&text) {
                    tracing::warn!("{text}");
                }
                if !matches!(error, ObserveError::ForeignLink { .. }) {
                    self.observe_at = Some(clock::now() + Duration::from_secs(1));
                }
                self.host_problem = Some(text);
                None
            }
        }
    }

    async fn report_peers(&mut self) {
        let now = clock::now();
        for (peer, report) in self.backend.handle_control(now).await {
            self.agent.handle_peer_report(&peer, &report, now);
        }
        if self.backend.take_changed() {
            self.observe_at = Some(now);
        }
        for datagram in self.backend.take_control() {
            self.agent.handle_datagram(datagram.source, &datagram.bytes, now);
        }
        for (peer, server, datagram) in self.backend.take_relayed() {
            if let Some(message) = self.agent.relay(server, &peer, &datagram, now) {
                self.carriers.send_relay(server, message);
            }
        }
    }

    fn store_members(&mut self) {
        let written = self.state.store_frames(&self.agent.frames());
        let written = written.and_then(|()| self.state.store_marks(self.agent.members().marks()));
        if self.note_written(written) {
            return;
        }
        self.store_at = Some(clock::now() + STORE_RETRY);
    }

    /// So that it has the members of the last second too, and knows for how long the node was away.
    fn store_for_the_next_start(&mut self) {
        if self.store_at.is_some() {
            self.store_members();
        }
        if let Some(since_ms) = self.agent.announced().cloned() {
            let written = self.state.set_announced(since_ms, clock::unix_ms());
            self.note_written(written);
        }
    }

    /// A full disk is no reason to stop: said once, until it works again.
    fn note_written(&mut self, written: Result<(), crate::state::StateError>) -> bool {
        let failed = written.is_err();
        match written {
            Err(error) if !self.store_failed => tracing::warn!("{error}; the node goes on from memory"),
            Ok(()) if self.store_failed => tracing::info!("the state directory can be written again"),
            _ => {}
        }
        self.store_failed = failed;
        !failed
    }

    async fn grant(&mut self, wish: Wish) -> anyhow::Result<Option<Ended>> {
        match wish {
            Wish::Terminate => {
                tracing::info!("stopping; routes fail closed until the next start");
                self.store_for_the_next_start();
                self.give_port_back().await;
                self.keep_only_the_floor().await;
                return Ok(Some(Ended::Terminated));
            }
            Wish::Reload { config, answer } => return Ok(self.reload(config, answer).await),
            Wish::Api(ApiRequest::Status(answer)) => {
                // The asker may have gone.
                let _gone = answer.send(Box::new(self.status()));
            }
            Wish::Api(ApiRequest::Ping(request, answer)) => self.start_ping(request, answer),
            Wish::Api(ApiRequest::Netcheck(answer)) => self.start_netcheck(answer),
            Wish::Api(ApiRequest::Leave(answer)) if !self.agent.has_session() => {
                let error =
                    "no discovery server is connected, so the members cannot be told: try again, or `mesh-agent down`";
                let _gone = answer.send(Err(error.to_owned()));
            }
            Wish::Api(ApiRequest::Leave(answer)) => {
                let mut config = Box::new(self.config.clone());
                config.mesh.enabled = false;
                self.start_leaving(config, Some(answer));
            }
            // Services reads the configuration first.
            Wish::Api(ApiRequest::Reload(_)) => {}
        }
        Ok(None)
    }

    /// Takes a new configuration. What cannot change in place (cluster, interface, port, backend) takes the node down and up again.
    async fn reload(&mut self, config: Box<Config>, answer: Option<Answer>) -> Option<Ended> {
        if let Some(leaving) = &mut self.leaving {
            // The newest configuration is the one to go on with, on or off.
            leaving.config = config;
            leaving.waiting.extend(answer);
            return None;
        }
        if !config.mesh.enabled {
            self.start_leaving(config, answer);
            return None;
        }
        let loaded = node_settings::load(&config).await;
        let secret = secrets::cluster_secret(&config.cluster.secret);
        match (loaded, secret) {
            (Err(error), _) => respond(answer, Err(format!("{error:#}"))),
            (_, Err(error)) => respond(answer, Err(error.to_string())),
            (Ok(_), Ok(secret)) if secret != self.secret || config.cluster.id != self.config.cluster.id => {
                tracing::info!("the new configuration is of another cluster: leaving this one");
                self.start_leaving(config, answer);
            }
            (Ok(mut settings), Ok(_)) => {
                match self.needs_restart(&config).await {
                    Ok(false) => {}
                    Ok(true) => {
                        tracing::info!(
                            "the new configuration changes interface, port or backend: starting anew; routes fail closed meanwhile"
                        );
                        self.give_port_back().await;
                        return Some(self.start_anew(config, answer.into_iter().collect()));
                    }
                    Err(error) => {
                        respond(answer, Err(format!("{error:#}")));
                        return None;
                    }
                }
                settings.listen_port = self.listen_port;
                self.set_servers(node_settings::servers(&config));
                self.host_name = settings.host_name.clone();
                let served = |config: &Config| (config.mesh.speedtest, config.mesh.overlay_v4_pool);
                let before = served(&self.config);
                self.config = *config;
                if served(&self.config) != before {
                    self.serve_speedtests();
                }
                self.agent.handle_settings(settings, clock::now());
                tracing::info!("the new configuration is in force");
                respond(answer, Ok(()));
            }
        }
        None
    }

    /// Ends this run of the node for one with other sockets or another link.
    fn start_anew(&mut self, config: Box<Config>, waiting: Vec<Answer>) -> Ended {
        self.store_for_the_next_start();
        Ended::Left(Departure { config, waiting, is_clean: false })
    }

    /// Fails where a start with this configuration would.
    async fn needs_restart(&mut self, config: &Config) -> anyhow::Result<bool> {
        let (now, new) = (&self.config.mesh, &config.mesh);
        let is_backend_another = now.backend != new.backend && self.backend.needs_restart(new.backend).await?;
        Ok(is_backend_another || now.interface_name != new.interface_name || now.listen_port != new.listen_port)
    }

    /// A session whose server is expected to hold another key from now on ends at once.
    fn set_servers(&mut self, servers: Vec<ServerAddress>) {
        for (place, (before, now)) in self.servers.iter().zip(&servers).enumerate() {
            if before != now {
                self.carriers.hang_up(ServerId(place));
                self.agent.handle_disconnected(ServerId(place), "its configuration changed", clock::now());
            }
        }
        self.servers = servers;
    }

    /// Before the process ends: what is neither floor nor rule goes.
    async fn keep_only_the_floor(&mut self) {
        let restored = self.observed.loosened.iter().map(|link| Action::RestoreRpFilter { link: link.clone() });
        for step in restored.chain([Action::RemoveMssClamp]) {
            if let Err(error) = self.host.apply(&step).await {
                tracing::debug!(%error, "not undone at the end");
            }
        }
    }

    /// The router is told that nobody is here any more; one that does not answer forgets by itself.
    async fn give_port_back(&mut self) {
        self.agent.handle_stop(clock::now());
        let heard = timeout(RELEASE_LIMIT, async {
            loop {
                while let Some(event) = self.agent.poll_event() {
                    if let AgentEvent::MapPort(request) = event {
                        self.ports.start(request);
                    }
                }
                if self.ports.is_idle() {
                    return;
                }
                let (request, outcome) = self.ports.next().await;
                self.agent.handle_mapping(request, outcome, clock::now());
            }
        });
        if heard.await.is_err() {
            tracing::debug!("the router did not say that it gave up the port of this node");
        }
    }

    fn start_leaving(&mut self, config: Box<Config>, answer: Option<Answer>) {
        let leaving = self.leaving.get_or_insert_with(|| Leaving {
            config,
            give_up_at: clock::now() + LEAVE_LIMIT,
            waiting: Vec::new(),
        });
        leaving.waiting.extend(answer);
        self.agent.handle_leave(clock::now());
    }

    /// The threads and sockets go; whoever waits is told what came of it, or once the next configuration is in force.
    fn leave(mut self, is_clean: bool) -> Ended {
        if let Err(error) = self.state.store_frames(&[]) {
            tracing::warn!("{error}");
        }
        let Some(leaving) = self.leaving.take() else { return Ended::Terminated };
        let mut departure = Departure { config: leaving.config, waiting: leaving.waiting, is_clean };
        if is_clean {
            if let Err(error) = device::unmark(self.state.dir()) {
                tracing::warn!("{error}");
            }
            tracing::info!("mesh is off; nothing of it is left on this host");
        } else {
            for answer in departure.waiting.drain(..) {
                respond(Some(answer), Err("not all of the mesh could be removed: run `mesh-agent cleanup`".to_owned()));
            }
        }
        Ended::Left(departure)
    }

    fn status(&self) -> Status {
        self.with_facts(status::fill::running)
    }

    fn with_facts<T>(&self, show: impl FnOnce(&status::fill::Facts<'_>) -> T) -> T {
        let view = self.agent.view(clock::now());
        show(&status::fill::Facts {
            config: &self.config,
            view: &view,
            carriers: &self.carriers,
            counters: &|key| self.backend.counters(key),
            engine: &self.backend.stats(),
            offloads: self.backend.offloads(),
            started_at_ms: self.started_at_ms,
            backend: &self.backend.status(),
            backend_problem: self.backend.refused(),
            is_ready: self.ready,
            host_problem: self.host_problem.as_deref(),
            host_name: self.host_name.as_str(),
            is_state_dir_failing: self.store_failed,
            now: clock::now(),
        })
    }
}

fn is_of_route(step: &Action) -> bool {
    matches!(step, Action::AddRoute(_) | Action::RemoveRoute(_))
}

/// Where the own IPv6 addresses of all members are.
fn overlay_v6_net(own: Ipv6Addr) -> Ipv6Net {
    Ipv6Net::new(own, 64).expect("64 is a prefix length").trunc()
}

/// Opens what carries the packets, on the port that the node moved to or else on the configured one; `settings` then has it.
async fn open_backend(choice: BackendChoice, settings: &mut Settings, state: &State) -> anyhow::Result<Backend> {
    let place = Place { link_name: &settings.link_name, listen_port: settings.listen_port, secret: state.wg() };
    let Some(moved) = state.moved_port(settings.listen_port) else { return Backend::open(choice, &place).await };
    match Backend::open(choice, &Place { listen_port: moved, ..place }).await {
        Ok(backend) => {
            settings.listen_port = moved;
            Ok(backend)
        }
        Err(error) => {
            tracing::warn!("{error:#}; trying the configured port {}", place.listen_port);
            Backend::open(choice, &place).await
        }
    }
}

/// Tells whoever asked, and the log.
fn respond(answer: Option<Answer>, result: Result<(), String>) {
    if let Err(error) = &result {
        tracing::warn!("the new configuration is not in force: {error}");
    }
    // The asker may have gone.
    let _gone = answer.map(|answer| answer.send(result));
}
