//! Our own place in the network: servers and host as [`NetReport`](crate::net::report::NetReport) knows them, its datagrams,
//! and what follows when its report changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use mesh_common::config::HostPort;
use mesh_common::id::ServerId;
use mesh_common::nat::NatClass;
use mesh_common::time::Instant;

use super::{Agent, AgentEvent, ServerFacts};
use crate::discovery::client::Client;
use crate::net::report::StunServer;
use crate::wire::address::canonical;

impl Agent {
    /// Somebody wants to know how the network looks now: servers are asked again.
    pub fn check_net(&mut self, now: Instant) {
        self.net.handle_check(now);
        self.mapper.handle_check(now);
        self.clients.values_mut().for_each(|client| client.handle_check(now));
        self.settle(now);
    }

    /// Whether an answer to [`Self::check_net`] may still come.
    pub fn is_checking_net(&self) -> bool {
        self.net.is_checking() || self.mapper.is_asking() || self.clients.values().any(Client::is_measuring)
    }

    /// Servers came, went, or told where they answer STUN.
    pub(super) fn tell_net_servers(&mut self, now: Instant) {
        let stun = |(server, facts): (&ServerId, &ServerFacts)| {
            // What a name resolves to is a proxy's address there.
            let is_proxied = self.settings.servers[server.0].proxied;
            let addresses = if is_proxied { Vec::new() } else { facts.addresses.clone() };
            (*server, StunServer { addresses, ports: facts.stun_ports.clone(), alt: facts.stun_alt.clone() })
        };
        let servers: BTreeMap<_, _> = self.server_facts.iter().map(stun).collect();
        self.net.handle_servers(servers, now);
    }

    pub(super) fn tell_net_host(&mut self, now: Instant) {
        let addresses = self.underlay().iter().flat_map(|link| &link.addresses).map(IpNet::addr).collect();
        self.net.handle_host(addresses, self.settings.listen_port, now);
    }

    /// Where no peer can be: discovery servers listen there, or see us there.
    pub(super) fn taken_sockets(&self) -> BTreeSet<SocketAddr> {
        let of_server = |(server, facts): (&ServerId, &ServerFacts)| {
            let name = self.settings.servers[server.0].name.parse::<HostPort>();
            let ports: Vec<u16> = facts.stun_ports.iter().copied().chain(name.map(|name| name.port)).collect();
            let listens = |addr: &IpAddr| ports.iter().map(|port| SocketAddr::new(*addr, *port)).collect::<Vec<_>>();
            facts.addresses.iter().flat_map(listens).chain(facts.stun_alt.iter().copied()).collect::<Vec<_>>()
        };
        let servers = self.server_facts.iter().flat_map(of_server);
        let report = self.net.report();
        let own = report.v4.reflexive.iter().chain(&report.v6.reflexive).copied();
        servers.chain(own).chain(self.mapper.announced()).map(canonical).collect()
    }

    /// Sends what is asked; a new report makes a new record.
    pub(super) fn drain_net(&mut self, now: Instant) {
        while let Some((to, bytes)) = self.net.poll_transmit() {
            self.events.push_back(AgentEvent::SendRaw { to, bytes, ttl: None });
        }
        if self.net.poll_changed() {
            for (family, report) in [("IPv4", &self.net.report().v4), ("IPv6", &self.net.report().v6)] {
                let NatClass { mapping, filtering } = report.nat;
                let (at, udp_blocked) = (&report.reflexive, report.udp_blocked);
                tracing::debug!(family, ?at, ?mapping, ?filtering, udp_blocked, "how discovery servers see this node");
            }
            self.tell_mapper_seen(now);
            self.work_out_at(now);
        }
    }
}
