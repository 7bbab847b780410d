//! The sessions with all servers: what they say, and who of them is there.

use std::collections::BTreeSet;

use bytes::Bytes;
use mesh_common::id::ServerId;
use mesh_common::time::Instant;

use super::{Agent, AgentEvent, LISTING_SETTLE, SETTLE, ServerFacts};
use crate::discovery::client::{Client, ClientConfig, ClientEvent, ClientState};
use crate::mesh::members::Admission;

impl Agent {
    pub(super) fn drain_clients(&mut self, now: Instant) {
        let next = |(server, client): (&ServerId, &mut Client)| Some((*server, client.poll_event()?));
        while let Some((server, event)) = self.clients.iter_mut().find_map(next) {
            self.handle_client_event(server, event, now);
        }
    }

    pub(super) fn handle_client_event(&mut self, server: ServerId, event: ClientEvent, now: Instant) {
        let name = &self.settings.servers[server.0].name;
        let facts = self.server_facts.entry(server).or_default();
        match event {
            ClientEvent::Dial => self.events.push_back(AgentEvent::Dial(server)),
            ClientEvent::HangUp => self.events.push_back(AgentEvent::HangUp(server)),
            ClientEvent::Welcomed { observed, stun_ports, stun_alt, .. } => {
                tracing::info!(server = %name, %observed, "connected to discovery server");
                let addresses = std::mem::take(&mut facts.addresses);
                *facts =
                    ServerFacts { observed: Some(observed), addresses, stun_ports, stun_alt, ..ServerFacts::default() };
                self.tell_net_servers(now);
                self.tell_mapper_seen(now);
                self.work_out_at(now);
            }
            ClientEvent::Frame(bytes) => self.handle_frame(server, bytes, now),
            ClientEvent::Synced { listed } => {
                let changed = self.members.set_listing(server, &listed);
                if self.synced_at.is_none() {
                    tracing::info!(server = %name, members = self.members.iter().count(), "learned the members of the cluster");
                    self.synced_at = Some(now);
                    self.work_out_at(now);
                } else if changed || self.due.is_some() {
                    self.work_out_at(now + SETTLE);
                }
            }
            ClientEvent::Gone(node) => {
                self.members.unlist(server, &node);
                self.work_out_at(now + SETTLE);
            }
            ClientEvent::Stored { seq } => {
                facts.refused = None;
                self.publisher.handle_stored(server, seq);
            }
            ClientEvent::Relayed { from, payload } => self.handle_relayed(server, from, payload, now),
            ClientEvent::NoPeer(node) => self.handle_no_peer(server, node, now),
            ClientEvent::Refused(error) => {
                // A relay over its limit says so each second.
                if facts.refused.as_ref().is_none_or(|(before, _)| before.limit != error.limit) {
                    tracing::warn!(server = %name, %error, "the discovery server refused a request");
                }
                facts.refused = Some((error, now));
            }
            ClientEvent::Lost { reason, retry_in } => {
                tracing::warn!(server = %name, %reason, ?retry_in, "no session with the discovery server");
                facts.lost = Some(reason);
                self.work_out_at(now);
            }
        }
    }

    fn handle_frame(&mut self, server: ServerId, bytes: Bytes, now: Instant) {
        let is_listing = self.clients.get(&server).is_some_and(|client| client.state() == ClientState::Syncing);
        let settle = if is_listing { LISTING_SETTLE } else { SETTLE };
        match self.members.admit_listed(bytes, server, now) {
            Ok((_, Admission::Known)) => {}
            Ok((_, Admission::Listed { is_first: true })) => self.work_out_at(now + settle),
            // Another relay may reach it: all that changes.
            Ok((node, Admission::Listed { is_first: false })) => self.sync_relays_to(&node, now),
            Ok((_, Admission::OwnIdentity { seq })) => self.handle_own_identity(seq, now),
            Ok((node, admission)) => {
                let host_name = self.members.get(&node).map(|member| member.record.host_name.clone());
                match admission {
                    Admission::New => {
                        tracing::info!(node = %node.short(), ?host_name, "member joined")
                    }
                    Admission::Left => tracing::info!(node = %node.short(), "member left"),
                    _ => tracing::debug!(node = %node.short(), ?host_name, "member updated"),
                }
                self.events.push_back(AgentEvent::StoreMembers);
                self.work_out_at(now + settle);
            }
            Err(rejection) => tracing::debug!(%rejection, "a record was not accepted"),
        }
    }

    /// Somebody used a number of ours: ours go on after it, or no server would take them.
    fn handle_own_identity(&mut self, seq: u64, now: Instant) {
        self.members.set_own_seq(seq);
        self.publisher.jump_past(seq);
        self.work_out_at(now);
        // Before we have spoken it may be of a run that the state directory forgot: put back from a backup, or not writable
        // then. That run does not answer; an agent that lives goes beyond our number as soon as it hears of it.
        if self.publisher.frame().is_some() && !self.clone_seen {
            self.clone_seen = true;
            tracing::warn!(
                node = %self.node_id().short(),
                "another agent runs with this node's identity: give every machine its own state directory"
            );
        }
    }

    pub(super) fn connect_servers(&mut self, now: Instant) {
        for (place, server) in self.settings.servers.iter().enumerate() {
            let config = ClientConfig {
                server_name: server.name.clone(),
                keys: self.keys.clone(),
                identity: self.identity.clone(),
                instance: self.instance,
                proxied: server.proxied,
            };
            let mut client = Client::new(config, self.random.next_u64(), now);
            if let Some(frame) = self.publisher.frame() {
                client.publish(frame.clone(), now);
            }
            self.clients.insert(ServerId(place), client);
        }
    }

    pub(super) fn disconnect_servers(&mut self, now: Instant) {
        for (server, mut client) in std::mem::take(&mut self.clients) {
            client.stop();
            self.events.push_back(AgentEvent::HangUp(server));
        }
        self.server_facts.clear();
        self.tell_net_servers(now);
    }

    pub(super) fn connected(&self) -> BTreeSet<ServerId> {
        let is_live = |client: &Client| matches!(client.state(), ClientState::Syncing | ClientState::Live);
        self.clients.iter().filter(|(_, client)| is_live(client)).map(|(server, _)| *server).collect()
    }
}
