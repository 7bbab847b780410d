//! The event loop: hosts, servers, links and faults of one run, until everything settled or its time is over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::ServerId;
use mesh_common::time::Instant;
use mesh_proto::device::Action;
use mesh_proto::discovery::server::{ConnId, ServerEvent};
use mesh_proto::random::SplitMix64;

use crate::clock::Clock;
use crate::host::{Effect, Host};
use crate::kernel::Decision;
use crate::link::{Links, Place};
use crate::model::{Model, Road, Violation, unsettled};
use crate::packet::{Body, Kind, Packet};
use crate::scenario::{Fault, Habit, Options, Scenario, uplink};
use crate::server::{Carrier, Rendezvous, Stream};

mod faults;
mod sessions;

/// After the last fault every pair must have exchanged data within this.
pub const SETTLE_TIME: Duration = Duration::from_secs(30);
const ENGINE_TICK: Duration = Duration::from_millis(250);
const PING_INTERVAL: Duration = Duration::from_secs(1);
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
const MISCHIEF_INTERVAL: Duration = Duration::from_millis(200);
/// Damage from outside is repaired within this, failing steps included.
const REPAIR_TIME: Duration = Duration::from_secs(8);

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    pub seed: u64,
    pub violations: Vec<(Instant, Violation)>,
    /// From the last fault until all was as it should be.
    pub settled_after: Option<Duration>,
    pub delivered: u64,
    pub events: u64,
    /// Forged inner packets that the hosts dropped.
    pub forged_dropped: u64,
}

#[derive(Debug)]
enum Event {
    Start(usize),
    Wake(usize),
    Tick(usize),
    Pings(usize),
    Datagram { to: usize, at: IpAddr, from: SocketAddr, bytes: Bytes },
    Reserved { host: usize, run: u32, seq: u64 },
    Apply { host: usize, run: u32, actions: Vec<Action>, members: BTreeSet<usize> },
    Observe(usize),
    ServerWake(usize),
    CarrierUp(u64),
    CarrierLost(u64),
    Stream { carrier: u64, to_server: bool },
    Fault(usize),
    FaultEnds(usize),
    Mischief,
    Check,
}

#[derive(Debug)]
pub struct World {
    seed: u64,
    clock: Clock<Event>,
    random: SplitMix64,
    links: Links,
    hosts: Vec<Host>,
    members: usize,
    servers: Vec<Rendezvous>,
    carriers: BTreeMap<u64, Carrier>,
    carrier_of: BTreeMap<(usize, ServerId), u64>,
    next_carrier: u64,
    /// Which host answers at an address, by the site that asks when the address is private.
    addresses: BTreeMap<(Option<usize>, IpAddr), usize>,
    moves: Vec<usize>,
    wakes: Vec<Option<Instant>>,
    server_wakes: Vec<Option<Instant>>,
    faults: Vec<(Duration, Fault)>,
    last_fault: Instant,
    habit: Habit,
    /// Hosts that are to join again as soon as they have left.
    joins_again: BTreeSet<usize>,
    contested: BTreeSet<ipnet::IpNet>,
    replayer: bool,
    old_frames: Vec<Bytes>,
    old_datagrams: Vec<(usize, IpAddr, Bytes)>,
    model: Model,
    rounds: u64,
    settled: Option<Duration>,
    finished: bool,
    events: u64,
}

/// Runs a seed to its end.
pub fn run(options: Options) -> Outcome {
    play(Scenario::new(options), options.seed)
}

fn play(scenario: Scenario, seed: u64) -> Outcome {
    let mut world = World::new(scenario, seed);
    while !world.finished {
        let Some(event) = world.clock.advance() else {
            break;
        };
        world.events += 1;
        world.handle(event);
    }
    Outcome {
        seed: world.seed,
        violations: world.model.violations,
        settled_after: world.settled,
        delivered: world.model.delivered,
        events: world.events,
        forged_dropped: world.hosts.iter().map(|host| host.engine.foreign_sources).sum(),
    }
}

impl World {
    fn new(scenario: Scenario, seed: u64) -> Self {
        let mut clock = Clock::default();
        for (host, at) in scenario.starts.iter().enumerate() {
            clock.after(*at, Event::Start(host));
            clock.after(*at, Event::Tick(host));
            clock.after(*at, Event::Pings(host));
        }
        for (index, (at, fault)) in scenario.faults.iter().enumerate() {
            clock.after(*at, Event::Fault(index));
            clock.after(*at + fault.lasts(), Event::FaultEnds(index));
        }
        let last_fault = clock.now() + scenario.last_fault;
        clock.at(last_fault, Event::Check);
        clock.after(MISCHIEF_INTERVAL, Event::Mischief);
        let mut random = SplitMix64::new(seed);
        let servers = (0..scenario.servers)
            .map(|server| {
                let rolls_back = scenario.rolls_back && server + 1 == scenario.servers;
                let mut server = Rendezvous::new(random.next_u64(), rolls_back);
                server.start();
                server
            })
            .collect();
        let hosts: Vec<Host> = scenario.hosts.into_iter().map(Host::new).collect();
        let members = scenario.members;
        let keys = hosts[..members].iter().map(Host::key).collect();
        let mut world = Self {
            seed,
            clock,
            links: Links::new(scenario.weather, random.next_u64()),
            random,
            members,
            servers,
            carriers: BTreeMap::new(),
            carrier_of: BTreeMap::new(),
            next_carrier: 0,
            addresses: BTreeMap::new(),
            moves: vec![0; hosts.len()],
            wakes: vec![None; hosts.len()],
            server_wakes: vec![None; scenario.servers],
            faults: scenario.faults,
            last_fault,
            habit: scenario.habit,
            joins_again: BTreeSet::new(),
            contested: scenario.contested,
            replayer: scenario.replayer,
            old_frames: Vec::new(),
            old_datagrams: Vec::new(),
            model: Model::new(keys, hosts.len(), last_fault),
            hosts,
            rounds: 0,
            settled: None,
            finished: false,
            events: 0,
        };
        world.list_addresses();
        world
    }

    fn handle(&mut self, event: Event) {
        let now = self.clock.now();
        match event {
            Event::Start(host) => {
                if self.hosts[host].agent.is_none() {
                    self.model.note_started(host);
                    self.hosts[host].start(now);
                    self.touch(host);
                }
            }
            Event::Wake(host) => {
                if self.wakes[host] == Some(now) {
                    self.wakes[host] = None;
                    if let Some(agent) = &mut self.hosts[host].agent {
                        agent.handle_timeout(now);
                        self.touch(host);
                    }
                }
            }
            Event::Tick(host) => {
                if self.hosts[host].agent.is_some() {
                    self.hosts[host].engine.tick(now);
                    self.touch(host);
                }
                self.clock.after(ENGINE_TICK, Event::Tick(host));
            }
            Event::Pings(host) => {
                self.ping(host);
                self.clock.after(PING_INTERVAL, Event::Pings(host));
            }
            Event::Datagram { to, at, from, bytes } => self.receive(to, at, from, &bytes),
            Event::Reserved { host, run, seq } => {
                if let Some(agent) = self.agent_of(host, run) {
                    agent.handle_seq_reserved(seq, now);
                    self.touch(host);
                }
            }
            Event::Apply { host, run, actions, members } => self.apply(host, run, actions, &members),
            Event::Observe(host) => {
                self.hosts[host].observe(now);
                self.touch(host);
            }
            Event::ServerWake(server) => {
                if self.server_wakes[server] == Some(now) {
                    self.server_wakes[server] = None;
                    if let Some(machine) = &mut self.servers[server].machine {
                        machine.handle_timeout(now);
                        self.touch_server(server);
                    }
                }
            }
            Event::CarrierUp(carrier) => self.carrier_up(carrier),
            Event::CarrierLost(carrier) => self.lose_carrier(carrier, "connection timed out"),
            Event::Stream { carrier, to_server } => self.pump(carrier, to_server),
            Event::Fault(index) => self.begin_fault(index),
            Event::FaultEnds(index) => self.end_fault(index),
            Event::Mischief => {
                self.make_mischief();
                self.clock.after(MISCHIEF_INTERVAL, Event::Mischief);
            }
            Event::Check => self.check(),
        }
    }

    /// Carries out what a host wants after any input to it.
    fn touch(&mut self, host: usize) {
        loop {
            let now = self.clock.now();
            let effects = self.hosts[host].drain(now);
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                self.carry_out(host, effect);
            }
        }
        let agent = self.hosts[host].agent.as_ref();
        let Some((at, _)) = agent.and_then(|agent| agent.poll_timeout()) else {
            return;
        };
        if self.wakes[host].is_none_or(|wake| at < wake) {
            let at = at.max(self.clock.now());
            self.wakes[host] = Some(at);
            self.clock.at(at, Event::Wake(host));
        }
    }

    fn carry_out(&mut self, host: usize, effect: Effect) {
        let now = self.clock.now();
        let run = self.hosts[host].run;
        match effect {
            Effect::Dial(server) => self.dial(host, server),
            Effect::HangUp(server) => self.hang_up(host, server),
            Effect::Transmit(server, message) => self.transmit(host, server, message),
            Effect::Reserved(seq) => {
                let delay = self.pause(1, 5);
                self.clock.after(delay, Event::Reserved { host, run, seq });
            }
            Effect::Apply(actions) => {
                if host < self.members {
                    self.model.check_steps(host, &actions, now);
                }
                let members = self.members_of(host);
                let delay = self.pause(1, 15);
                self.clock.after(delay, Event::Apply { host, run, actions, members });
            }
            Effect::Send { to, bytes, .. } => self.send_datagram(host, to, bytes),
            // Its hosts have no router.
            Effect::MapPort(_) => {}
            Effect::Relay(server, message) => self.transmit(host, server, message),
            Effect::Deliver(key, _, packet) => {
                if let Some(packet) = Packet::decode(&packet) {
                    self.deliver(host, &key, packet);
                }
            }
            Effect::MembersChanged => self.check_members(host),
            Effect::Stopped => self.stopped(host),
        }
    }

    fn apply(&mut self, host: usize, run: u32, actions: Vec<Action>, members: &BTreeSet<usize>) {
        let now = self.clock.now();
        if self.agent_of(host, run).is_none() {
            return;
        }
        let (mut random, is_bad_time) = (self.random.clone(), now < self.last_fault);
        let fails = || is_bad_time && random.below(400) == 0;
        let clean = self.hosts[host].apply(actions, fails, now);
        self.random.next_u64();
        if clean && host < self.members && !self.hosts[host].plan.settings.allow_down_peer_bypass {
            self.model.note_applied(host, members);
        }
        self.touch(host);
    }

    fn send_datagram(&mut self, host: usize, to: SocketAddr, bytes: Bytes) {
        let sender = &self.hosts[host];
        let Some(source) = sender.underlay_source(to.ip()) else {
            return;
        };
        let local = (Some(sender.plan.site), to.ip());
        let receiver = self.addresses.get(&local).or_else(|| self.addresses.get(&(None, to.ip())));
        let Some(receiver) = receiver.copied() else {
            return;
        };
        let listen_port = sender.plan.settings.listen_port;
        if to.port() != self.hosts[receiver].plan.settings.listen_port {
            return;
        }
        let from = SocketAddr::new(source, listen_port);
        if self.replayer && self.random.below(50) == 0 && self.old_datagrams.len() < 200 {
            self.old_datagrams.push((receiver, to.ip(), bytes.clone()));
        }
        let delays = self.links.carry(Place::Host(host), Place::Host(receiver));
        for delay in delays.into_iter().flatten() {
            let event = Event::Datagram { to: receiver, at: to.ip(), from, bytes: bytes.clone() };
            self.clock.after(delay, event);
        }
    }

    fn receive(&mut self, to: usize, at: IpAddr, from: SocketAddr, bytes: &[u8]) {
        let now = self.clock.now();
        let host = &mut self.hosts[to];
        let Some(link) = host.link_of(at).map(ToOwned::to_owned) else {
            return;
        };
        if host.agent.is_none() || !host.kernel.accepts(&link, from.ip()) {
            return;
        }
        host.receive(bytes, from.into(), now);
        self.touch(to);
    }

    /// One round of pings from this host. Its applications go on while its agent is down.
    fn ping(&mut self, host: usize) {
        let now = self.clock.now();
        if host >= self.members {
            return;
        }
        self.check_members(host);
        self.rounds += 1;
        let is_end = now >= self.last_fault;
        for other in (0..self.members).filter(|other| *other != host) {
            if is_end {
                for road in Road::ALL {
                    if !self.model.has_answer(host, other, road) {
                        self.ping_one(host, other, road);
                    }
                }
            } else if self.talks_now(host, other) {
                let road = Road::ALL[self.random.below(3) as usize];
                self.ping_one(host, other, road);
            }
        }
        if self.random.below(8) == 0 {
            self.forge(host);
        }
        self.touch(host);
    }

    /// Whether these two exchange data in this round.
    fn talks_now(&mut self, host: usize, other: usize) -> bool {
        let one_in = match self.habit {
            Habit::WithEverybody => 6,
            Habit::WithFew if (host + other).is_multiple_of(12) => 4,
            Habit::WithFew => 1200,
        };
        self.random.below(one_in) == 0
    }

    fn ping_one(&mut self, host: usize, other: usize, road: Road) {
        let source = road.address(&self.hosts[host]);
        let destination = road.address(&self.hosts[other]);
        if let (Some(source), Some(destination)) = (source, destination) {
            let body = Body { kind: Kind::Ping, from: number(host), to: number(other), sent: self.clock.now() };
            self.route_out(host, Packet { source, destination, body });
        }
    }

    /// A member sends in the name of another one.
    fn forge(&mut self, host: usize) {
        let mut other = || self.random.below(self.members as u64) as usize;
        let (victim, to) = (other(), other());
        if victim == host || victim == to || host == to {
            return;
        }
        let packet = Packet {
            source: IpAddr::V6(self.hosts[victim].overlay_v6()),
            destination: IpAddr::V6(self.hosts[to].overlay_v6()),
            body: Body { kind: Kind::Forged, from: number(host), to: number(to), sent: self.clock.now() },
        };
        self.route_out(host, packet);
    }

    /// An application's packet leaves a host.
    fn route_out(&mut self, host: usize, packet: Packet) {
        let now = self.clock.now();
        match self.hosts[host].kernel.decide(packet.destination) {
            Decision::Mesh => {
                let engine = &mut self.hosts[host].engine;
                engine.send(&packet.encode(), packet.destination, now);
            }
            Decision::Underlay => {
                let to = usize::from(packet.body.to);
                let road = self.road_to(to, packet.destination);
                self.model.check_underlay(host, to, road, now);
            }
            Decision::Unreachable => {}
        }
    }

    /// An inner packet came out of the tunnel of `key`.
    fn deliver(&mut self, host: usize, key: &mesh_common::key::WgPublicKey, packet: Packet) {
        let now = self.clock.now();
        self.model.check_delivery(host, key, &packet, &self.hosts, now);
        if !self.hosts[host].is_local(packet.destination) {
            return;
        }
        let Body { kind, from, sent, .. } = packet.body;
        match kind {
            Kind::Ping => {
                let body = Body { kind: Kind::Pong, from: number(host), to: from, sent };
                let answer = Packet { source: packet.destination, destination: packet.source, body };
                self.route_out(host, answer);
            }
            Kind::Pong => {
                let from = usize::from(from);
                let road = self.road_to(from, packet.source);
                self.model.note_answer(host, from, road, sent);
            }
            Kind::Forged => {}
        }
    }

    fn road_to(&self, host: usize, addr: IpAddr) -> Road {
        match addr {
            IpAddr::V6(_) => Road::OverlayV6,
            addr if self.hosts[host].pod() == Some(addr) => Road::Pod,
            IpAddr::V4(_) => Road::OverlayV4,
        }
    }

    fn check(&mut self) {
        let now = self.clock.now();
        let hosts = &self.hosts[..self.members];
        let passed = now.since(self.last_fault);
        let problems = unsettled(hosts, &self.model, &self.contested, now);
        if problems.is_empty() {
            self.settled = Some(passed);
            self.finished = true;
        } else if passed >= SETTLE_TIME {
            self.model.break_rule(now, Violation::NotConverged(problems));
            self.finished = true;
        } else {
            self.clock.after(CHECK_INTERVAL, Event::Check);
        }
    }

    fn check_members(&mut self, host: usize) {
        let now = self.clock.now();
        if let Some(agent) = self.hosts[host].agent.as_ref().filter(|_| host < self.members) {
            self.model.check_members(host, agent.members(), now);
        }
    }

    /// The hosts that are members as this host sees it.
    fn members_of(&self, host: usize) -> BTreeSet<usize> {
        let Some(agent) = &self.hosts[host].agent else {
            return BTreeSet::new();
        };
        let is_known = |other: &usize| agent.members().get(&self.hosts[*other].node()).is_some();
        (0..self.members).filter(is_known).collect()
    }

    fn agent_of(&mut self, host: usize, run: u32) -> Option<&mut mesh_proto::mesh::agent::Agent> {
        let host = &mut self.hosts[host];
        host.agent.as_mut().filter(|_| host.run == run)
    }

    /// Public addresses for everybody, private ones for their site.
    fn list_addresses(&mut self) {
        self.addresses.clear();
        for (index, host) in self.hosts.iter().enumerate() {
            for link in host.plan.underlay.iter().filter(|link| link.virtual_kind.is_none()) {
                let site = (link.name == "lan0").then_some(host.plan.site);
                let entries = link.addresses.iter().map(|net| ((site, net.addr()), index));
                self.addresses.extend(entries);
            }
        }
    }

    fn pause(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        let (least, most) = (Duration::from_millis(least_ms), Duration::from_millis(most_ms));
        self.random.between(least, most)
    }
}

fn number(host: usize) -> u16 {
    u16::try_from(host).expect("a run has few hosts")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A farewell takes as long as the servers and the host need for it, and nobody who says "join" meanwhile is forgotten.
    #[test]
    fn a_host_that_is_to_join_again_before_it_has_left_joins_when_it_has() {
        let options = Options { seed: 1, agents: 3, sabotage: None };
        let leave = Fault::Leave { host: 1, lasts: Duration::from_millis(1) };
        let at = Duration::from_secs(5);
        let scenario = Scenario { faults: vec![(at, leave)], last_fault: at, ..Scenario::new(options) };
        let outcome = play(scenario, options.seed);
        assert_eq!(outcome.violations, []);
        assert!(outcome.settled_after.is_some());
    }
}
