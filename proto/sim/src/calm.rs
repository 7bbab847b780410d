//! A few hosts and one server on a network that loses and delays nothing, for scenarios written by hand.
//!
//! Carries what agents and server say to each other and runs their timers. Datagrams between hosts go nowhere: who is live
//! is known from the server alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::addr::OVERLAY_V4_POOL;
use mesh_common::config::EndpointFilter;
use mesh_common::host_name::HostName;
use mesh_common::id::{NodeId, ServerId};
use mesh_common::key::{ClusterSecret, SignKey, WgSecret};
use mesh_common::limits::{LINK_MTU, LISTEN_PORT};
use mesh_common::time::Instant;
use mesh_proto::device::UnderlayLink;
use mesh_proto::discovery::server::{ConnId, ServerEvent};
use mesh_proto::mesh::agent::View;
use mesh_proto::mesh::settings::{ServerSettings, Settings};
use mesh_proto::path::agent::PathPolicy;
use mesh_proto::wire::session::ClientMessage;

use crate::host::{Effect, Host, HostPlan};
use crate::model;
use crate::server::Rendezvous;

/// Two ends that go on answering each other at one moment would never let time pass.
const MOST_MESSAGES_AT_ONCE: u32 = 10_000;

#[derive(Debug)]
pub struct Calm {
    pub hosts: Vec<Host>,
    pub now: Instant,
    server: Rendezvous,
    carriers: BTreeMap<ConnId, usize>,
    next_conn: u64,
    /// Records that each host sent to the server.
    puts: Vec<u32>,
}

impl Calm {
    /// Nobody is started but the server.
    pub fn new(plans: Vec<HostPlan>) -> Self {
        let mut server = Rendezvous::new(1, false);
        server.start();
        let hosts: Vec<Host> = plans.into_iter().map(Host::new).collect();
        let puts = vec![0; hosts.len()];
        Self { hosts, now: Instant::ORIGIN, server, carriers: BTreeMap::new(), next_conn: 0, puts }
    }

    pub fn start(&mut self, host: usize) {
        self.hosts[host].start(self.now);
        self.settle();
    }

    /// The process dies and its carrier with it.
    pub fn kill(&mut self, host: usize) {
        self.hosts[host].kill();
        self.cut(host);
        self.settle();
    }

    /// Farewell, until the agent has stopped.
    pub fn leave(&mut self, host: usize) {
        let now = self.now;
        self.agent(host, |agent| agent.handle_leave(now));
        self.settle();
        self.run_for(Duration::from_secs(5));
        assert!(self.hosts[host].agent.is_none(), "host {host} has not stopped");
    }

    pub fn change_settings(&mut self, host: usize, change: impl FnOnce(&mut Settings)) {
        let now = self.now;
        let settings = &mut self.hosts[host].plan.settings;
        change(settings);
        let settings = settings.clone();
        self.agent(host, |agent| agent.handle_settings(settings, now));
        self.settle();
    }

    pub fn run_for(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(next) = self.next_deadline().filter(|next| *next <= end) {
            self.now = self.now.max(next);
            let now = self.now;
            for host in 0..self.hosts.len() {
                self.agent(host, |agent| agent.handle_timeout(now));
            }
            if let Some(server) = &mut self.server.machine {
                server.handle_timeout(now);
            }
            self.settle();
        }
        self.now = end;
    }

    pub fn view(&self, host: usize) -> View {
        self.hosts[host].agent.as_ref().expect("the agent runs").view(self.now)
    }

    /// Who owns a prefix, as each running host sees it.
    pub fn owners(&self, prefix: IpNet) -> BTreeSet<Option<NodeId>> {
        let running = self.hosts.iter().filter_map(|host| Some((host, host.agent.as_ref()?)));
        running.map(|(host, agent)| model::owner(host, &agent.view(self.now), &prefix)).collect()
    }

    pub fn puts(&self, host: usize) -> u32 {
        self.puts[host]
    }

    fn agent(&mut self, host: usize, with: impl FnOnce(&mut mesh_proto::mesh::agent::Agent)) {
        if let Some(agent) = &mut self.hosts[host].agent {
            with(agent);
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let agents = self.hosts.iter().filter_map(|host| host.agent.as_ref()?.poll_timeout());
        let server = self.server.machine.as_ref().and_then(|server| server.poll_timeout());
        agents.chain(server).map(|(due, _)| due).min()
    }

    /// Carries everything that both sides have to say at this moment.
    fn settle(&mut self) {
        for _ in 0..MOST_MESSAGES_AT_ONCE {
            let mut is_quiet = true;
            for host in 0..self.hosts.len() {
                for effect in self.hosts[host].drain(self.now) {
                    is_quiet = false;
                    self.carry_out(host, effect);
                }
            }
            while let Some(event) = self.server.machine.as_mut().and_then(|server| server.poll_event()) {
                is_quiet = false;
                self.carry_out_at_server(&event);
            }
            if is_quiet {
                return;
            }
        }
        panic!("they never stop talking at {:?}", self.now.since_origin());
    }

    fn carry_out(&mut self, host: usize, effect: Effect) {
        let now = self.now;
        match effect {
            Effect::Dial(server_id) => self.dial(host, server_id),
            Effect::HangUp(_) => self.cut(host),
            Effect::Transmit(_, message) => {
                let conn = self.carriers.iter().find(|(_, at)| **at == host).map(|(conn, _)| *conn);
                if let (Some(conn), Some(server)) = (conn, &mut self.server.machine) {
                    self.puts[host] += u32::from(matches!(ClientMessage::decode(&message), Ok(ClientMessage::Put(_))));
                    server.handle_message(conn, &message, now);
                }
            }
            Effect::Reserved(seq) => self.agent(host, |agent| agent.handle_seq_reserved(seq, now)),
            Effect::Apply(actions) => {
                self.hosts[host].apply(actions, || false, now);
            }
            Effect::Stopped => self.kill(host),
            Effect::Send { .. }
            | Effect::MapPort(_)
            | Effect::Relay(..)
            | Effect::Deliver(..)
            | Effect::MembersChanged => {}
        }
    }

    fn carry_out_at_server(&mut self, event: &ServerEvent) {
        let (ServerEvent::Wake(conn) | ServerEvent::Close(conn)) = event else { return };
        let now = self.now;
        while let Some(message) = self.server.machine.as_mut().and_then(|server| server.poll_transmit(*conn, now)) {
            if let Some(host) = self.carriers.get(conn).copied() {
                self.agent(host, |agent| agent.handle_message(ServerId(0), &message, now));
            }
        }
        if let (ServerEvent::Close(_), Some(host)) = (event, self.carriers.get(conn).copied()) {
            self.cut(host);
            self.agent(host, |agent| agent.handle_disconnected(ServerId(0), "closed by the server", now));
        }
    }

    fn dial(&mut self, host: usize, server_id: ServerId) {
        self.next_conn += 1;
        let (conn, now) = (ConnId(self.next_conn), self.now);
        let remote = SocketAddr::from(([203, 0, 113, octet(host)], LISTEN_PORT));
        let exporter = [octet(host); 32];
        let Some(server) = &mut self.server.machine else { return };
        server.handle_connected(conn, remote, exporter, now);
        self.carriers.insert(conn, host);
        self.agent(host, |agent| agent.handle_connected(server_id, exporter, Vec::new(), now));
    }

    fn cut(&mut self, host: usize) {
        let now = self.now;
        let cut: Vec<ConnId> = self.carriers.iter().filter(|(_, at)| **at == host).map(|(conn, _)| *conn).collect();
        for conn in cut {
            self.carriers.remove(&conn);
            if let Some(server) = &mut self.server.machine {
                server.handle_disconnected(conn, now);
            }
        }
    }
}

/// A host of one cluster with the identity and the WireGuard key of this number, and these prefixes.
pub fn plan(number: u8, prefixes: &[IpNet]) -> HostPlan {
    let mut secret = [7; 32];
    secret[0] = 1;
    let address = IpNet::new([192, 0, 2, number].into(), 24).expect("24 is a length");
    HostPlan {
        keys: ClusterSecret::from_bytes(secret).derive(),
        identity: SignKey::from_seed(&[number; 32]),
        wg: WgSecret::from_seed(&[100 + number; 32]),
        settings: Settings {
            cluster_id: "calm".to_owned(),
            host_name: HostName::try_from(format!("node-{number}")).expect("it is a DNS label"),
            servers: vec![ServerSettings { name: "server.example:7443".to_owned(), proxied: false }],
            link_name: "mesh0".to_owned(),
            listen_port: LISTEN_PORT,
            mtu: LINK_MTU,
            overlay_v4_pool: OVERLAY_V4_POOL,
            prefixes: prefixes.iter().copied().collect(),
            advertise_node_addresses: true,
            endpoint_filter: EndpointFilter::default(),
            port_mapping: true,
            static_peers: Vec::new(),
            deny_nodes: BTreeSet::new(),
            allow_down_peer_bypass: false,
            allow_wide_prefixes: false,
        },
        site: 0,
        underlay: vec![UnderlayLink {
            name: "eth0".to_owned(),
            addresses: vec![address],
            rp_filter: 0,
            virtual_kind: None,
        }],
        rp_filter_read_only: false,
        pods: None,
        unix_ms: 1_800_000_000_000,
        seed: u64::from(number),
        sabotage: None,
        path_policy: PathPolicy::default(),
    }
}

fn octet(host: usize) -> u8 {
    u8::try_from(host + 1).expect("a calm mesh has few hosts")
}
