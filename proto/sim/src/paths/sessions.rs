//! Carriers between agents and servers: streams of control messages, and beside them relayed datagrams, which are lost and
//! overtake as datagrams do unless the carrier runs over TCP.

use bytes::Bytes;
use mesh_common::id::ServerId;
use mesh_proto::discovery::server::{ConnId, ServerEvent};

use super::socket;
use super::world::{Event, World};
use crate::link::Place;
use crate::server::{Carrier, Stream};

impl World {
    pub(super) fn dial(&mut self, host: usize, server_id: ServerId) {
        self.next_carrier += 1;
        let id = self.next_carrier;
        let machine = &self.machines[host];
        let carrier = Carrier {
            host,
            run: machine.host.run,
            server_id,
            server: server_id.0,
            is_up: false,
            hung_up: false,
            synced: false,
            to_server: Stream::default(),
            to_agent: Stream::default(),
        };
        self.carrier_uplinks.insert(id, machine.uplink);
        let delay = self.links.stream_delay(self.place_of_host(host), Place::Server(server_id.0)) * 2;
        self.carriers.insert(id, carrier);
        self.carrier_of.insert((host, server_id), id);
        self.clock.after(delay, Event::CarrierUp(id));
    }

    pub(super) fn carrier_up(&mut self, id: u64) {
        let now = self.clock.now();
        if !self.is_whole(id) {
            // Nobody answers: the agent gives up by itself.
            return;
        }
        let remote = self.seen_address(id);
        let Some(carrier) = self.carriers.get_mut(&id) else { return };
        carrier.is_up = true;
        let (host, run, server, server_id) = (carrier.host, carrier.run, carrier.server, carrier.server_id);
        let mut exporter = [0; 32];
        exporter[..8].copy_from_slice(&id.to_le_bytes());
        let Some(machine) = &mut self.servers[server].machine else {
            return self.lose_carrier(id, "connection refused");
        };
        machine.handle_connected(ConnId(id), remote, exporter, now);
        let plan = &self.server_plans[server];
        let addresses = vec![plan.v4.into(), plan.v6.into()];
        if let Some(agent) = self.agent_of(host, run) {
            agent.handle_connected(server_id, exporter, addresses, now);
            self.touch(host);
        }
        self.touch_server(server);
    }

    pub(super) fn transmit(&mut self, host: usize, server: ServerId, message: Bytes) {
        if let Some(id) = self.carrier_of.get(&(host, server)).copied() {
            self.push(id, true, Some(message));
        }
    }

    /// A relayed datagram on its way to the server.
    pub(super) fn relay(&mut self, host: usize, server: ServerId, message: Bytes) {
        self.judge.note_relayed(host, self.clock.now());
        self.trace(|trace| format!("{host} sends {} by relay {}", trace.describe_relayed(&message), server.0));
        if let Some(id) = self.carrier_of.get(&(host, server)).copied() {
            self.push_relayed(id, true, message);
        }
    }

    pub(super) fn hang_up(&mut self, host: usize, server: ServerId) {
        if let Some(id) = self.carrier_of.remove(&(host, server))
            && let Some(carrier) = self.carriers.get_mut(&id)
        {
            carrier.hung_up = true;
            if carrier.is_up {
                self.push(id, true, None);
            } else {
                self.carriers.remove(&id);
            }
        }
    }

    /// The carrier breaks: both ends learn of it now.
    pub(super) fn lose_carrier(&mut self, id: u64, reason: &str) {
        let now = self.clock.now();
        let Some(carrier) = self.carriers.remove(&id) else { return };
        let (host, server) = (carrier.host, carrier.server);
        if let Some(machine) = &mut self.servers[server].machine {
            machine.handle_disconnected(ConnId(id), now);
            self.touch_server(server);
        }
        if carrier.hung_up {
            return;
        }
        self.carrier_of.remove(&(host, carrier.server_id));
        self.trace(|_| format!("{host} loses its session with {server}: {reason}"));
        if let Some(agent) = self.agent_of(host, carrier.run) {
            agent.handle_disconnected(carrier.server_id, reason, now);
            self.touch(host);
        }
    }

    fn push(&mut self, id: u64, to_server: bool, message: Option<Bytes>) {
        let now = self.clock.now();
        let Some(carrier) = self.carriers.get(&id).filter(|_| self.is_whole(id)) else { return };
        let ends = (self.place_of_host(carrier.host), Place::Server(carrier.server));
        let delay = self.links.stream_delay(ends.0, ends.1);
        let Some(carrier) = self.carriers.get_mut(&id) else { return };
        let stream = if to_server { &mut carrier.to_server } else { &mut carrier.to_agent };
        let at = stream.push(message, delay, now);
        self.clock.at(at, Event::Stream { carrier: id, to_server });
    }

    fn push_relayed(&mut self, id: u64, to_server: bool, message: Bytes) {
        let Some(carrier) = self.carriers.get(&id).filter(|_| self.is_whole(id)) else { return };
        let (host, server) = (carrier.host, carrier.server);
        if self.machines[host].relays_in_order || !self.passes_udp(host) {
            return self.push(id, to_server, Some(message));
        }
        let ends = (self.place_of_host(host), Place::Server(server));
        let (from, to) = if to_server { ends } else { (ends.1, ends.0) };
        for delay in self.links.carry(from, to).into_iter().flatten() {
            self.clock.after(delay, Event::Relay { carrier: id, to_server, message: message.clone() });
        }
    }

    /// A relayed datagram arrives at one end of its carrier.
    pub(super) fn take_relayed(&mut self, id: u64, to_server: bool, message: &Bytes) {
        if self.is_whole(id) {
            self.hand_over(id, to_server, message);
        }
    }

    /// Hands over what has arrived.
    pub(super) fn pump(&mut self, id: u64, to_server: bool) {
        let now = self.clock.now();
        loop {
            if !self.is_whole(id) {
                return;
            }
            let Some(carrier) = self.carriers.get_mut(&id) else { return };
            let stream = if to_server { &mut carrier.to_server } else { &mut carrier.to_agent };
            match stream.pop(now) {
                None => return,
                Some(None) => return self.lose_carrier(id, "closed by the server"),
                Some(Some(message)) => self.hand_over(id, to_server, &message),
            }
        }
    }

    fn hand_over(&mut self, id: u64, to_server: bool, message: &Bytes) {
        let now = self.clock.now();
        let Some(carrier) = self.carriers.get(&id).filter(|carrier| carrier.is_up) else { return };
        let (host, run, server, server_id) = (carrier.host, carrier.run, carrier.server, carrier.server_id);
        if to_server {
            if let Some(machine) = &mut self.servers[server].machine {
                machine.handle_message(ConnId(id), message, now);
                self.touch_server(server);
            }
        } else if !carrier.hung_up
            && let Some(agent) = self.agent_of(host, run)
        {
            agent.handle_message(server_id, message, now);
            self.touch(host);
        }
    }

    /// Carries out what a server wants after any input to it.
    pub(super) fn touch_server(&mut self, server: usize) {
        let now = self.clock.now();
        while let Some(event) = self.servers[server].machine.as_mut().and_then(|machine| machine.poll_event()) {
            match event {
                ServerEvent::Wake(conn) => self.send_all(server, conn),
                ServerEvent::Close(conn) => {
                    self.send_all(server, conn);
                    self.push(conn.0, false, None);
                }
                _ => {}
            }
        }
        let machine = self.servers[server].machine.as_ref();
        let Some((at, _)) = machine.and_then(|machine| machine.poll_timeout()) else { return };
        if self.server_wakes[server].is_none_or(|wake| at < wake) {
            let at = at.max(now);
            self.server_wakes[server] = Some(at);
            self.clock.at(at, Event::ServerWake(server));
        }
    }

    fn send_all(&mut self, server: usize, conn: ConnId) {
        let now = self.clock.now();
        while let Some(machine) = &mut self.servers[server].machine
            && let Some(message) = machine.poll_transmit(conn, now)
        {
            self.push(conn.0, false, Some(message));
        }
        while let Some(message) = self.servers[server].machine.as_mut().and_then(|machine| machine.poll_relay(conn)) {
            self.push_relayed(conn.0, false, message);
        }
    }

    /// Whether both ends of a carrier can still reach each other by it: its host has not moved since.
    fn is_whole(&self, id: u64) -> bool {
        let Some(carrier) = self.carriers.get(&id) else { return false };
        let machine = &self.machines[carrier.host];
        machine.is_online && self.carrier_uplinks.get(&id) == Some(&machine.uplink)
    }

    pub(super) fn passes_udp(&self, host: usize) -> bool {
        let routers = self.internet.routers_before(self.machines[host].uplink().network);
        routers.iter().all(|router| !self.internet.nat(*router).blocks_udp())
    }

    /// Where the server sees this carrier come from.
    fn seen_address(&self, id: u64) -> std::net::SocketAddr {
        let host = self.carriers.get(&id).map_or(0, |carrier| carrier.host);
        let uplink = self.machines[host].uplink();
        let outermost = self.internet.routers_before(uplink.network).last().copied();
        let own = uplink.source(std::net::Ipv4Addr::UNSPECIFIED.into()).expect("every host has IPv4");
        socket(outermost.map_or(own, |router| self.internet.nat(router).outer().into()))
    }
}
