//! What goes wrong, and who makes it so.

use mesh_proto::device::{PeerRoute, RouteKind};
use mesh_proto::wire::frame::Frame;
use mesh_proto::wire::session::{ClientMessage, ServerMessage};

use super::*;

impl World {
    pub(super) fn begin_fault(&mut self, index: usize) {
        let now = self.clock.now();
        match self.faults[index].1.clone() {
            Fault::ServerDown { server, .. } => {
                self.servers[server].machine = None;
                let broken: Vec<u64> = self.carriers_where(|carrier| carrier.server == server);
                for carrier in broken {
                    self.lose_carrier(carrier, "connection reset");
                }
            }
            Fault::Island { places, .. } => {
                self.links.cut(index as u64, places);
                let links = &self.links;
                let crossing: Vec<u64> = self
                    .carriers
                    .iter()
                    .filter(|(_, carrier)| links.is_cut(Place::Host(carrier.host), Place::Server(carrier.server)))
                    .map(|(id, _)| *id)
                    .collect();
                // Some break, the others wait for better times.
                for carrier in crossing {
                    if self.random.below(2) == 0 {
                        let delay = self.pause(0, 5000);
                        self.clock.after(delay, Event::CarrierLost(carrier));
                    }
                }
            }
            Fault::AgentRestart { host, .. } => self.kill(host),
            Fault::Leave { host, .. } => {
                if let Some(agent) = &mut self.hosts[host].agent {
                    agent.handle_leave(now);
                    self.model.note_leaving(host);
                    self.touch(host);
                }
            }
            Fault::LinkDeleted { host } => {
                self.hosts[host].kernel.delete_link();
                self.hosts[host].engine.clear();
                self.notice(host);
            }
            Fault::RoutesRemoved { host } => {
                self.model.excuse_leaks(host, now + REPAIR_TIME);
                let random = &mut self.random;
                self.hosts[host].kernel.lose_routes(|_| random.below(3) == 0);
                self.notice(host);
            }
            Fault::RulesRemoved { host } => {
                self.model.excuse_leaks(host, now + REPAIR_TIME);
                self.hosts[host].kernel.rules.clear();
                self.notice(host);
            }
            Fault::ForeignRoute { host } => {
                let prefix = "203.0.113.0/24".parse().expect("a prefix");
                self.hosts[host].kernel.add_foreign_route(prefix, 50);
                self.notice(host);
            }
            Fault::Moved { host } => self.move_uplink(host),
        }
    }

    pub(super) fn end_fault(&mut self, index: usize) {
        let now = self.clock.now();
        match self.faults[index].1.clone() {
            Fault::ServerDown { server, .. } if self.servers[server].machine.is_none() => {
                self.servers[server].start();
            }
            Fault::Island { .. } => {
                self.links.heal(index as u64);
                for carrier in self.carriers_where(|_| true) {
                    for to_server in [true, false] {
                        self.clock.at(now, Event::Stream { carrier, to_server });
                    }
                }
            }
            Fault::Leave { host, .. } if self.hosts[host].agent.is_some() => {
                self.joins_again.insert(host);
            }
            Fault::AgentRestart { host, .. } | Fault::Leave { host, .. } => {
                self.clock.at(now, Event::Start(host));
            }
            _ => {}
        }
    }

    /// The agent of a host said farewell and thinks that its host is clean.
    pub(super) fn stopped(&mut self, host: usize) {
        let now = self.clock.now();
        let kernel = &self.hosts[host].kernel;
        let is_foreign = |kind: &RouteKind| matches!(kind, RouteKind::Foreign { .. });
        let is_clean = kernel.link.is_none()
            && kernel.rules.is_empty()
            && kernel.mss_clamp != mesh_proto::device::MssClamp::Present
            && kernel.routes.iter().all(|route| is_foreign(&route.kind))
            && self.hosts[host].engine.specs().is_empty();
        if !is_clean {
            self.model.break_rule(now, Violation::NotClean { at: host });
        }
        self.hosts[host].agent = None;
        self.hosts[host].engine.stop();
        self.drop_carriers(host);
        if self.joins_again.remove(&host) {
            self.clock.at(now, Event::Start(host));
        }
    }

    /// Frames that were sent once, for the replayer.
    pub(super) fn remember(&mut self, message: &Bytes) {
        if self.old_frames.len() < 400
            && self.random.below(8) == 0
            && let Ok(ServerMessage::Frame(frame)) = ServerMessage::decode(message)
        {
            self.old_frames.push(frame);
        }
    }

    /// Strangers knock, old frames and datagrams come back.
    pub(super) fn make_mischief(&mut self) {
        let now = self.clock.now();
        for stranger in self.members..self.hosts.len() {
            let victim = self.random.below(self.members as u64) as usize;
            let key = self.hosts[victim].key();
            let at = SocketAddr::new(
                uplink(victim, self.moves[victim]).into(),
                self.hosts[victim].plan.settings.listen_port,
            );
            // It knows everything of its victim but the secret.
            let engine = &mut self.hosts[stranger].engine;
            engine.set_peer(
                key,
                mesh_proto::device::PeerSpec {
                    preshared_key: None,
                    allowed_ips: BTreeSet::new(),
                    keepalive: None,
                    generation: 0,
                },
            );
            engine.set_route(key, PeerRoute { primary: Some(at.into()), ..PeerRoute::default() });
            engine.start_handshake(&key, now);
            self.touch(stranger);
        }
        let strangers_frames =
            self.hosts[self.members..].iter().filter_map(|host| host.agent.as_ref()).flat_map(|agent| agent.frames());
        let mut frames: Vec<Bytes> = strangers_frames.collect();
        if self.replayer {
            frames.extend(self.pick_old_frame());
            if let Some((to, at, bytes)) = self.pick_old_datagram() {
                let from = SocketAddr::new(uplink(200, 0).into(), 4444);
                self.clock.at(now, Event::Datagram { to, at, from, bytes });
            }
        }
        for frame in frames {
            self.push_frame(frame);
        }
    }

    /// Puts a frame where it does not belong: into what a server tells an agent, and into what an agent publishes.
    fn push_frame(&mut self, frame: Bytes) {
        let synced = self.carriers_where(|carrier| carrier.synced && !carrier.hung_up);
        let Some(count) = std::num::NonZeroU64::new(synced.len() as u64) else {
            return;
        };
        let carrier = synced[self.random.below(count.get()) as usize];
        self.inject(carrier, false, ServerMessage::Frame(frame.clone()).encode());
        // Its own author's session may carry it: the server keeps the newest.
        let author = Frame::parse(frame.clone()).map(|frame| frame.node());
        let of_author =
            synced.into_iter().find(|id| author.is_ok_and(|node| self.hosts[self.carriers[id].host].node() == node));
        if let Some(carrier) = of_author {
            self.inject(carrier, true, ClientMessage::Put(frame).encode());
        }
    }

    fn pick_old_frame(&mut self) -> Option<Bytes> {
        let index = self.random.below(self.old_frames.len() as u64) as usize;
        self.old_frames.get(index).cloned()
    }

    fn pick_old_datagram(&mut self) -> Option<(usize, IpAddr, Bytes)> {
        let index = self.random.below(self.old_datagrams.len() as u64) as usize;
        self.old_datagrams.get(index).cloned()
    }

    fn kill(&mut self, host: usize) {
        if self.hosts[host].agent.is_some() {
            self.check_members(host);
            self.hosts[host].kill();
            self.drop_carriers(host);
        }
    }

    /// The process is gone: some servers hear of it, others find out.
    fn drop_carriers(&mut self, host: usize) {
        for id in self.carriers_where(|carrier| carrier.host == host) {
            let silent = self.random.below(2) == 0;
            let Some(carrier) = self.carriers.get_mut(&id) else {
                continue;
            };
            let server_id = carrier.server_id;
            carrier.hung_up = true;
            self.carrier_of.remove(&(host, server_id));
            if !silent {
                self.lose_carrier(id, "");
            }
        }
    }

    fn move_uplink(&mut self, host: usize) {
        // One move is enough to lose an address, more would need more networks.
        let from: IpAddr = uplink(host, self.moves[host]).into();
        self.moves[host] = 1 - self.moves[host].min(1);
        let to: IpAddr = uplink(host, self.moves[host]).into();
        let machine = &mut self.hosts[host];
        for links in [&mut machine.plan.underlay, &mut machine.kernel.underlay] {
            for net in links.iter_mut().flat_map(|link| &mut link.addresses) {
                if net.addr() == from {
                    *net = ipnet::IpNet::new(to, net.prefix_len()).expect("the same length fits");
                }
            }
        }
        self.list_addresses();
        self.notice(host);
    }

    /// The host's agent sees what happened a moment later.
    fn notice(&mut self, host: usize) {
        let delay = self.pause(20, 1000);
        self.clock.after(delay, Event::Observe(host));
    }

    fn carriers_where(&self, chosen: impl Fn(&Carrier) -> bool) -> Vec<u64> {
        let chosen = self.carriers.iter().filter(|(_, carrier)| chosen(carrier));
        chosen.map(|(id, _)| *id).collect()
    }
}
