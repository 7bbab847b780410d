//! The router's port for this node: facts for [`PortMapper`](crate::net::port_mapping::PortMapper), its requests to the shell,
//! and what follows when what it announces changes.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use mesh_common::time::Instant;

use super::{Agent, AgentEvent};
use crate::net::port_mapping::{Grant, MapperEvent, MappingFailure, MappingId, Seen};

impl Agent {
    /// What came of [`AgentEvent::MapPort`].
    pub fn handle_mapping(&mut self, id: MappingId, outcome: Result<Grant, MappingFailure>, now: Instant) {
        self.mapper.handle_outcome(id, outcome, now);
        self.settle(now);
    }

    /// The process ends, without a farewell: what others hold for it is given back.
    pub fn handle_stop(&mut self, now: Instant) {
        self.mapper.handle_stop(now);
        self.drain_mapper(now);
    }

    pub(super) fn tell_mapper_host(&mut self, now: Instant) {
        let gateway = self.observed.as_ref().and_then(|observed| observed.gateway);
        self.mapper.handle_host(gateway, self.settings.listen_port, now);
    }

    /// STUN servers see the socket that the port is for. Without them a session at least tells the address.
    pub(super) fn tell_mapper_seen(&mut self, now: Instant) {
        let report = &self.net.report().v4;
        let v4 = |addr: IpAddr| match addr.to_canonical() {
            IpAddr::V4(addr) => Some(addr),
            IpAddr::V6(_) => None,
        };
        let mut at: BTreeSet<Ipv4Addr> = report.reflexive.iter().filter_map(|at| v4(at.ip())).collect();
        if at.is_empty() {
            at = self.server_facts.values().filter_map(|facts| v4(facts.observed?.ip())).collect();
        }
        self.mapper.handle_seen(Seen { is_translated: report.is_translated, at }, now);
    }

    pub(super) fn drain_mapper(&mut self, now: Instant) {
        while let Some(event) = self.mapper.poll_event() {
            match event {
                MapperEvent::Request(request) => self.events.push_back(AgentEvent::MapPort(request)),
                MapperEvent::Announced => self.work_out_at(now),
                MapperEvent::Remapped => {
                    self.net.handle_check(now);
                    self.drain_net(now);
                }
            }
        }
    }
}
