//! Carriers between agents and servers.

use super::*;

impl World {
    pub(super) fn dial(&mut self, host: usize, server_id: ServerId) {
        self.next_carrier += 1;
        let id = self.next_carrier;
        let carrier = Carrier {
            host,
            run: self.hosts[host].run,
            server_id,
            server: server_id.0,
            is_up: false,
            hung_up: false,
            synced: false,
            to_server: Stream::default(),
            to_agent: Stream::default(),
        };
        let delay = self.links.stream_delay(Place::Host(host), Place::Server(carrier.server)) * 2;
        self.carriers.insert(id, carrier);
        self.carrier_of.insert((host, server_id), id);
        self.clock.after(delay, Event::CarrierUp(id));
    }

    pub(super) fn carrier_up(&mut self, id: u64) {
        let now = self.clock.now();
        let Some(carrier) = self.carriers.get_mut(&id) else {
            return;
        };
        let (host, server, server_id) = (carrier.host, carrier.server, carrier.server_id);
        if self.links.is_cut(Place::Host(host), Place::Server(server)) {
            // Nobody answers: the agent gives up by itself.
            return;
        }
        carrier.is_up = true;
        let run = carrier.run;
        let remote = SocketAddr::new(uplink(host, self.moves[host]).into(), self.hosts[host].plan.settings.listen_port);
        let mut exporter = [0; 32];
        exporter[..8].copy_from_slice(&id.to_le_bytes());
        let Some(machine) = &mut self.servers[server].machine else {
            return self.lose_carrier(id, "connection refused");
        };
        machine.handle_connected(ConnId(id), remote, exporter, now);
        if let Some(agent) = self.agent_of(host, run) {
            agent.handle_connected(server_id, exporter, Vec::new(), now);
            self.touch(host);
        }
        self.touch_server(server);
    }

    pub(super) fn transmit(&mut self, host: usize, server: ServerId, message: Bytes) {
        if let Some(id) = self.carrier_of.get(&(host, server)).copied() {
            self.push(id, true, Some(message));
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
        let Some(carrier) = self.carriers.remove(&id) else {
            return;
        };
        let (host, server) = (carrier.host, carrier.server);
        if let Some(machine) = &mut self.servers[server].machine {
            machine.handle_disconnected(ConnId(id), now);
            self.touch_server(server);
        }
        if carrier.hung_up {
            return;
        }
        self.carrier_of.remove(&(host, carrier.server_id));
        if let Some(agent) = self.agent_of(host, carrier.run) {
            agent.handle_disconnected(carrier.server_id, reason, now);
            self.touch(host);
        }
    }

    fn push(&mut self, id: u64, to_server: bool, message: Option<Bytes>) {
        let now = self.clock.now();
        let Some(carrier) = self.carriers.get_mut(&id) else {
            return;
        };
        let ends = (Place::Host(carrier.host), Place::Server(carrier.server));
        let delay = self.links.stream_delay(ends.0, ends.1);
        let stream = if to_server { &mut carrier.to_server } else { &mut carrier.to_agent };
        let at = stream.push(message, delay, now);
        self.clock.at(at, Event::Stream { carrier: id, to_server });
    }

    /// Hands over what has arrived, unless the carrier is cut.
    pub(super) fn pump(&mut self, id: u64, to_server: bool) {
        let now = self.clock.now();
        loop {
            let Some(carrier) = self.carriers.get_mut(&id) else {
                return;
            };
            let (host, server, server_id) = (carrier.host, carrier.server, carrier.server_id);
            if self.links.is_cut(Place::Host(host), Place::Server(server)) {
                return;
            }
            let stream = if to_server { &mut carrier.to_server } else { &mut carrier.to_agent };
            let Some(message) = stream.pop(now) else {
                return;
            };
            let Some(message) = message else {
                return self.lose_carrier(id, "closed by the server");
            };
            if to_server {
                if let Some(machine) = &mut self.servers[server].machine {
                    machine.handle_message(ConnId(id), &message, now);
                    self.touch_server(server);
                }
            } else {
                let is_synced = matches!(
                    mesh_proto::wire::session::ServerMessage::decode(&message),
                    Ok(mesh_proto::wire::session::ServerMessage::Synced(_))
                );
                carrier.synced |= is_synced;
                let (run, hung_up) = (carrier.run, carrier.hung_up);
                if hung_up {
                    continue;
                }
                if let Some(agent) = self.agent_of(host, run) {
                    agent.handle_message(server_id, &message, now);
                    self.touch(host);
                }
            }
        }
    }

    /// Carries out what a server wants after any input to it.
    pub(super) fn touch_server(&mut self, server: usize) {
        let now = self.clock.now();
        loop {
            let Some(machine) = &mut self.servers[server].machine else {
                return;
            };
            let Some(event) = machine.poll_event() else {
                break;
            };
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
        let Some((at, _)) = machine.and_then(|machine| machine.poll_timeout()) else {
            return;
        };
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
            let message = self.servers[server].tamper(message);
            self.remember(&message);
            self.push(conn.0, false, Some(message));
        }
        while let Some(message) = self.servers[server].machine.as_mut().and_then(|machine| machine.poll_relay(conn)) {
            self.push(conn.0, false, Some(message));
        }
    }

    /// A message of the network's own making to an agent.
    pub(super) fn inject(&mut self, carrier: u64, to_server: bool, message: Bytes) {
        self.push(carrier, to_server, Some(message));
    }
}
