//! The event loop of one run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::ServerId;
use mesh_common::time::Instant;
use mesh_proto::device::Action;
use mesh_proto::mesh::agent::Agent;
use mesh_proto::net::port_mapping::{Grant, MappingFailure, MappingId};
use mesh_proto::random::SplitMix64;
use mesh_proto::wire::stun;

use super::judge::{Judge, Talk};
use super::plan::{BUSY, Fault, Plan, PlannedServer, STUN_PORTS, Uplink};
use super::port_mapping::Mapper;
use super::trace::Trace;
use super::{Options, Outcome};
use crate::clock::Clock;
use crate::host::{Effect, Host};
use crate::internet::{DEFAULT_TTL, Flight, Internet, NetworkId, Node, RouterId};
use crate::kernel::Decision;
use crate::link::{Links, Place};
use crate::nat::NatKind;
use crate::oracle;
use crate::packet::{Body, Kind, Packet};
use crate::server::{Carrier, Rendezvous};

const ENGINE_TICK: Duration = Duration::from_millis(250);
/// Packets of a stream while it is watched closely, and after that.
const BUSY_INTERVAL: Duration = Duration::from_millis(5);
const STEADY_INTERVAL: Duration = Duration::from_millis(50);
/// After the last packet the run goes on for this long, so that what is under way arrives.
const LAST_ARRIVALS: Duration = Duration::from_secs(3);
/// How long they talk when they talk again.
const RESUMED: Duration = Duration::from_secs(8);
/// From one machine of a network to another.
const LAN_DELAY: Duration = Duration::from_micros(400);

#[derive(Debug)]
pub(super) enum Event {
    Start(usize),
    Wake(usize),
    Tick(usize),
    /// The next packet of this talk.
    Say(usize),
    Datagram {
        flight: Flight,
        bytes: Bytes,
    },
    Reserved {
        host: usize,
        run: u32,
        seq: u64,
    },
    Apply {
        host: usize,
        run: u32,
        actions: Vec<Action>,
    },
    Observe(usize),
    Online(usize),
    ServerWake(usize),
    CarrierUp(u64),
    Stream {
        carrier: u64,
        to_server: bool,
    },
    Relay {
        carrier: u64,
        to_server: bool,
        message: Bytes,
    },
    /// What a router answered.
    Mapped {
        host: usize,
        run: u32,
        id: MappingId,
        outcome: Result<Grant, MappingFailure>,
    },
    ForgetPorts,
    RestartMappers,
    Fault,
    FaultEnds,
    Silence,
    Resume,
    End,
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) host: Host,
    pub(super) uplinks: [Uplink; 2],
    /// Which uplink it is on, or comes to next.
    pub(super) uplink: usize,
    pub(super) is_online: bool,
    pub(super) relays_in_order: bool,
    pub(super) suspended_until: Option<Instant>,
    wake: Option<Instant>,
}

impl Machine {
    pub(super) fn uplink(&self) -> &Uplink {
        &self.uplinks[self.uplink]
    }
}

#[derive(Debug)]
pub(super) struct World {
    options: Options,
    pub(super) clock: Clock<Event>,
    pub(super) random: SplitMix64,
    pub(super) internet: Internet,
    pub(super) links: Links,
    pub(super) machines: Vec<Machine>,
    pub(super) servers: Vec<Rendezvous>,
    pub(super) server_plans: Vec<PlannedServer>,
    pub(super) carriers: BTreeMap<u64, Carrier>,
    /// On which uplink of its host each carrier was opened.
    pub(super) carrier_uplinks: BTreeMap<u64, usize>,
    pub(super) carrier_of: BTreeMap<(usize, ServerId), u64>,
    pub(super) next_carrier: u64,
    pub(super) server_wakes: Vec<Option<Instant>>,
    pub(super) mappers: BTreeMap<RouterId, Mapper>,
    pub(super) fault: Option<Fault>,
    pub(super) judge: Judge,
    classes: [NatKind; 2],
    is_troubled: bool,
    loses: bool,
    busy_until: Instant,
    /// When all talks stop, and start again.
    quiet_at: Instant,
    resume_at: Option<Instant>,
    ended: bool,
    events: u64,
    trace: Trace,
}

impl World {
    pub(super) fn new(plan: Plan, options: Options) -> Self {
        let mut clock = Clock::default();
        let mut random = SplitMix64::new(options.seed ^ 0x0070_6174_6873);
        let at = |after: Duration| Instant::ORIGIN + after;
        let links = Links::new(plan.weather, random.next_u64());
        let servers: Vec<Rendezvous> = plan
            .servers
            .iter()
            .map(|server| {
                let mut rendezvous = Rendezvous::new(random.next_u64(), false);
                rendezvous.stun_ports = STUN_PORTS.to_vec();
                rendezvous.stun_alt =
                    server.alternate.map(|alternate| (alternate, STUN_PORTS[0]).into()).into_iter().collect();
                rendezvous.start();
                rendezvous
            })
            .collect();
        let talks: Vec<Talk> = plan.pairs.iter().flat_map(|(a, b)| [Talk::new(*a, *b), Talk::new(*b, *a)]).collect();
        let demand_at = at(plan.demand_at);
        for talk in 0..talks.len() {
            // The first of a pair begins; the other has something to say at once, or a moment later.
            let later = if talk % 2 == 0 || random.below(2) == 0 { 0 } else { random.below(500) };
            clock.at(demand_at + Duration::from_millis(later), Event::Say(talk));
        }
        let mut machines = Vec::new();
        for (host, planned) in plan.hosts.into_iter().enumerate() {
            clock.at(at(planned.starts), Event::Start(host));
            clock.at(at(planned.starts), Event::Tick(host));
            let mut plan = planned.plan;
            plan.path_policy = options.policy;
            machines.push(Machine {
                host: Host::new(plan),
                uplinks: planned.uplinks,
                uplink: 0,
                is_online: true,
                relays_in_order: planned.relays_in_order,
                suspended_until: None,
                wake: None,
            });
        }
        for restarts in plan.mappers.iter().filter_map(|mapper| mapper.restarts) {
            clock.at(at(restarts), Event::RestartMappers);
        }
        let mappers = plan.mappers.into_iter().map(|mapper| (mapper.router, Mapper::new(mapper))).collect();
        let fault = plan.fault.map(|(after, fault)| {
            clock.at(at(after), Event::Fault);
            clock.at(at(after) + fault.lasts(), Event::FaultEnds);
            fault
        });
        clock.at(at(plan.quiet_at), Event::Silence);
        let end = match plan.resume_at {
            Some(resume) => {
                clock.at(at(resume), Event::Resume);
                clock.at(at(resume) + RESUMED, Event::Silence);
                resume + RESUMED
            }
            None => plan.quiet_at,
        };
        clock.at(at(end) + LAST_ARRIVALS, Event::End);
        let loses = plan.weather.loss.1 > 0;
        let mut world = Self {
            options,
            clock,
            random,
            internet: plan.internet,
            links,
            machines,
            server_wakes: vec![None; servers.len()],
            servers,
            server_plans: plan.servers,
            carriers: BTreeMap::new(),
            carrier_uplinks: BTreeMap::new(),
            carrier_of: BTreeMap::new(),
            next_carrier: 0,
            mappers,
            fault,
            judge: Judge::new(talks, loses),
            classes: plan.classes,
            is_troubled: plan.is_troubled,
            loses,
            busy_until: demand_at + BUSY,
            quiet_at: at(plan.quiet_at),
            resume_at: plan.resume_at.map(at),
            ended: false,
            events: 0,
            trace: Trace::default(),
        };
        if options.traces {
            world.trace = Trace::new(world.machines.iter().map(|machine| &machine.host));
        }
        (0..world.machines.len()).for_each(|host| world.tell_gateway(host));
        world.note_addresses();
        world
    }

    pub(super) fn run(mut self) -> Outcome {
        let must_be_direct = self.must_be_direct(0, 1);
        while !self.ended {
            let Some(event) = self.clock.advance() else { break };
            self.events += 1;
            self.handle(event);
        }
        let summary = self.judge.finish(self.clock.now());
        Outcome {
            seed: self.options.seed,
            classes: self.classes,
            is_troubled: self.is_troubled,
            loses: self.loses,
            fault: self.fault,
            must_be_direct,
            was_direct: summary.was_direct,
            first_byte: summary.first_byte,
            to_direct: summary.to_direct,
            violations: summary.violations,
            delivered: summary.delivered,
            events: self.events,
            trace: self.trace.into_lines(),
        }
    }

    fn handle(&mut self, event: Event) {
        let now = self.clock.now();
        let Some(event) = self.unless_suspended(event) else { return };
        match event {
            Event::Start(host) => {
                self.machines[host].host.start(now);
                self.touch(host);
            }
            Event::Wake(host) => {
                if self.machines[host].wake == Some(now) {
                    self.machines[host].wake = None;
                    if let Some(agent) = &mut self.machines[host].host.agent {
                        agent.handle_timeout(now);
                        self.touch(host);
                    }
                }
            }
            Event::Tick(host) => {
                self.machines[host].host.engine.tick(now);
                self.touch(host);
                self.clock.after(ENGINE_TICK, Event::Tick(host));
            }
            Event::Say(talk) => self.say(talk),
            Event::Datagram { flight, bytes } => self.arrive(flight, bytes),
            Event::Reserved { host, run, seq } => {
                if let Some(agent) = self.agent_of(host, run) {
                    agent.handle_seq_reserved(seq, now);
                    self.touch(host);
                }
            }
            Event::Apply { host, run, actions } => {
                if self.agent_of(host, run).is_some() {
                    self.machines[host].host.apply(actions, || false, now);
                    self.touch(host);
                }
            }
            Event::Observe(host) => {
                self.machines[host].host.observe(now);
                self.touch(host);
            }
            Event::Online(host) => self.come_online(host),
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
            Event::Stream { carrier, to_server } => self.pump(carrier, to_server),
            Event::Relay { carrier, to_server, message } => self.take_relayed(carrier, to_server, &message),
            Event::Mapped { host, run, id, outcome } => {
                if let Some(agent) = self.agent_of(host, run) {
                    agent.handle_mapping(id, outcome, now);
                    self.touch(host);
                }
            }
            Event::ForgetPorts => self.forget_ports(),
            Event::RestartMappers => self.restart_mappers(),
            Event::Fault => self.begin_fault(),
            Event::FaultEnds => self.end_fault(),
            Event::Silence => self.judge.note_silence(now),
            Event::Resume => self.resume(),
            Event::End => self.ended = true,
        }
    }

    /// A suspended host does nothing: its timers and streams wait, datagrams to it are lost.
    fn unless_suspended(&mut self, event: Event) -> Option<Event> {
        let host = match &event {
            Event::Wake(host) | Event::Tick(host) | Event::Observe(host) => *host,
            Event::Reserved { host, .. } | Event::Apply { host, .. } | Event::Mapped { host, .. } => *host,
            Event::Say(talk) => self.judge.talk(*talk).from,
            Event::Stream { carrier, to_server: false } => self.carriers.get(carrier)?.host,
            Event::CarrierUp(carrier) => self.carriers.get(carrier)?.host,
            Event::Relay { carrier, to_server: false, .. } => {
                let host = self.carriers.get(carrier)?.host;
                let is_awake = self.machines[host].suspended_until.is_none();
                return is_awake.then_some(event);
            }
            _ => return Some(event),
        };
        match self.machines[host].suspended_until {
            Some(until) => {
                if let Event::Wake(host) = event {
                    self.machines[host].wake = Some(until);
                }
                self.clock.at(until, event);
                None
            }
            None => Some(event),
        }
    }

    /// Carries out what a host wants after any input to it.
    pub(super) fn touch(&mut self, host: usize) {
        let now = self.clock.now();
        loop {
            let effects = self.machines[host].host.drain(now);
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                self.carry_out(host, effect);
            }
        }
        self.trace_routes(host);
        let machine = &mut self.machines[host];
        let Some((at, _)) = machine.host.agent.as_ref().and_then(|agent| agent.poll_timeout()) else {
            return;
        };
        if machine.wake.is_none_or(|wake| at < wake) {
            let at = at.max(now);
            machine.wake = Some(at);
            self.clock.at(at, Event::Wake(host));
        }
    }

    fn carry_out(&mut self, host: usize, effect: Effect) {
        let run = self.machines[host].host.run;
        match effect {
            Effect::Dial(server) => self.dial(host, server),
            Effect::HangUp(server) => self.hang_up(host, server),
            Effect::Transmit(server, message) => self.transmit(host, server, message),
            Effect::Reserved(seq) => {
                let delay = self.pause(1, 5);
                self.clock.after(delay, Event::Reserved { host, run, seq });
            }
            Effect::Apply(actions) => {
                let delay = self.pause(1, 15);
                self.clock.after(delay, Event::Apply { host, run, actions });
            }
            Effect::Send { port, to, bytes, ttl } => self.send(host, (port, to), bytes, ttl),
            Effect::MapPort(request) => self.map_port(host, &request),
            Effect::Relay(server, message) => self.relay(host, server, message),
            Effect::Deliver(key, from, packet) => {
                if let Some(packet) = Packet::decode(&packet) {
                    let sender = usize::from(packet.body.from);
                    let is_theirs = self.machines.get(sender).is_some_and(|machine| machine.host.key() == key);
                    self.trace(|_| format!("{host} has a packet of {sender} by {from}"));
                    if is_theirs && packet.body.kind == Kind::Ping {
                        self.judge.note_delivered(sender, host, packet.body.sent, from, self.clock.now());
                    }
                }
            }
            Effect::MembersChanged | Effect::Stopped => {}
        }
    }

    /// A datagram leaves a host from this port.
    fn send(&mut self, host: usize, (port, to): (u16, SocketAddr), bytes: Bytes, ttl: Option<u8>) {
        let now = self.clock.now();
        let uplink = self.machines[host].uplink();
        let (network, source) = (uplink.network, uplink.source(to.ip()).filter(|_| self.machines[host].is_online));
        self.judge.note_datagram(host, (port, to), &bytes, now);
        let Some(source) = source else { return };
        let flight = self.internet.send(network, SocketAddr::new(source, port), to, ttl.unwrap_or(DEFAULT_TTL), now);
        self.trace(|trace| {
            let what = trace.describe(&bytes);
            match &flight {
                Some(flight) => format!("{host} sends {what} to {to} as {} (ttl {ttl:?})", flight.source),
                None => format!("{host} sends {what} to {to}, lost on its way out (ttl {ttl:?})"),
            }
        });
        if let Some(flight) = flight {
            self.travel(self.place_of_host(host), flight, bytes);
        }
    }

    /// The datagram is under way from here.
    fn travel(&mut self, from: Place, flight: Flight, bytes: Bytes) {
        if flight.network != NetworkId::CORE {
            let delay = LAN_DELAY + self.pause(0, 2);
            return self.clock.after(delay, Event::Datagram { flight, bytes });
        }
        let Some(node) = self.internet.at_core(flight.destination.ip()) else {
            return;
        };
        let delays = self.links.carry(from, place_of(node));
        if delays[0].is_none() {
            self.trace(|_| format!("lost between {} and {}", flight.source, flight.destination));
        }
        for delay in delays.into_iter().flatten() {
            self.clock.after(delay, Event::Datagram { flight, bytes: bytes.clone() });
        }
    }

    fn arrive(&mut self, flight: Flight, bytes: Bytes) {
        let now = self.clock.now();
        let Some(arrival) = self.internet.arrive(flight, now) else {
            let Flight { source, destination, .. } = flight;
            self.trace(|trace| format!("{} from {source} to {destination} is not let in", trace.describe(&bytes)));
            return;
        };
        let (source, at) = (arrival.source, arrival.destination);
        match arrival.node {
            Node::Host(host) => {
                let Some(path) = self.machines[host].host.path_at(at.port(), source) else { return };
                if self.machines[host].suspended_until.is_some() {
                    return;
                }
                self.trace(|trace| format!("{host} gets {} from {source}", trace.describe(&bytes)));
                self.machines[host].host.receive(&bytes, path, now);
                self.touch(host);
            }
            Node::Server(server) => self.answer_stun(server, source, at, &bytes),
            Node::Router(_) => {}
        }
    }

    fn answer_stun(&mut self, server: usize, source: SocketAddr, at: SocketAddr, bytes: &[u8]) {
        let now = self.clock.now();
        if self.servers[server].machine.is_none() || !STUN_PORTS.contains(&at.port()) {
            return;
        }
        let Some(answer) = stun::answer(bytes, source) else { return };
        let plan = self.server_plans[server];
        let port =
            if answer.from.port { STUN_PORTS.into_iter().find(|port| *port != at.port()) } else { Some(at.port()) };
        let ip = match (answer.from.address, plan.alternate) {
            (false, _) => Some(at.ip()),
            (true, Some(alternate)) if at.ip() == IpAddr::V4(plan.v4) => Some(alternate.into()),
            (true, Some(_)) if at.is_ipv4() => Some(plan.v4.into()),
            (true, _) => None,
        };
        let (Some(ip), Some(port)) = (ip, port) else { return };
        let flight = self.internet.send(NetworkId::CORE, SocketAddr::new(ip, port), source, DEFAULT_TTL, now);
        if let Some(flight) = flight {
            self.travel(Place::Server(server), flight, answer.bytes.into());
        }
    }

    /// An application sends the next packet of its stream.
    fn say(&mut self, index: usize) {
        let now = self.clock.now();
        let is_silent = now >= self.quiet_at && self.resume_at.is_none_or(|resume| now < resume);
        let is_over = self.resume_at.is_some_and(|resume| now >= resume + RESUMED);
        if is_silent || is_over {
            return;
        }
        let talk = self.judge.talk(index);
        let (from, to) = (talk.from, talk.to);
        let key = self.machines[to].host.key();
        let packet = Packet {
            source: IpAddr::V6(self.machines[from].host.overlay_v6()),
            destination: IpAddr::V6(self.machines[to].host.overlay_v6()),
            body: Body { kind: Kind::Ping, from: number(from), to: number(to), sent: now },
        };
        let host = &mut self.machines[from].host;
        if host.kernel.decide(packet.destination) == Decision::Mesh {
            host.engine.send(&packet.encode(), packet.destination, now);
        }
        let targets = host.engine.data_targets(&key);
        let is_first = self.judge.talk(index).is_first();
        if is_first {
            let relay_rtt = self.relay_rtt(from, to);
            let must_be_direct = self.must_be_direct(from, to);
            self.check_report(from);
            self.judge.note_first(index, relay_rtt, must_be_direct, now);
        }
        self.judge.note_sent(index, &targets, now);
        self.touch(from);
        let is_busy = index.is_multiple_of(2) && now < self.busy_until;
        let pause = if is_busy { BUSY_INTERVAL } else { STEADY_INTERVAL };
        self.clock.after(pause, Event::Say(index));
    }

    fn resume(&mut self) {
        let now = self.clock.now();
        self.busy_until = now + BUSY / 2;
        self.judge.note_resumed(now);
        for talk in 0..self.judge.talks() {
            let later = if talk % 2 == 0 { 0 } else { self.random.below(300) };
            self.clock.at(now + Duration::from_millis(later), Event::Say(talk));
        }
    }

    /// Whether this host has found out by now what its NAT is.
    fn check_report(&mut self, host: usize) {
        let now = self.clock.now();
        let machine = &self.machines[host];
        let side = machine.uplink().side(&self.internet);
        if let Some(agent) = &machine.host.agent {
            self.judge.note_report(host, &side, agent.view(now).net.v4.nat, now);
        }
    }

    /// From one host to the other by the best relay and back.
    fn relay_rtt(&self, a: usize, b: usize) -> Duration {
        let ends = [a, b].map(|host| self.place_of_host(host));
        let one_way =
            |server| ends.iter().map(|end| self.links.distance(*end, Place::Server(server))).sum::<Duration>();
        (0..self.servers.len()).map(one_way).min().unwrap_or_default() * 2
    }

    pub(super) fn must_be_direct(&self, a: usize, b: usize) -> bool {
        let [a, b] = [a, b].map(|host| self.machines[host].uplink().side(&self.internet));
        oracle::must_be_direct(&a, &b)
    }

    /// What stands for a host at the core: its outermost router, or itself.
    pub(super) fn place_of_host(&self, host: usize) -> Place {
        let routers = self.internet.routers_before(self.machines[host].uplink().network);
        routers.last().map_or(Place::Host(host), |router| place_of(Node::Router(*router)))
    }

    pub(super) fn agent_of(&mut self, host: usize, run: u32) -> Option<&mut Agent> {
        let host = &mut self.machines[host].host;
        host.agent.as_mut().filter(|_| host.run == run)
    }

    /// Where datagrams for each host may go: where it is, and what stands for it outside.
    pub(super) fn note_addresses(&mut self) {
        for host in 0..self.machines.len() {
            let uplink = self.machines[host].uplink();
            let routers = self.internet.routers_before(uplink.network);
            let outer = routers.iter().map(|router| IpAddr::V4(self.internet.nat(*router).outer()));
            let addresses: BTreeSet<IpAddr> = uplink.addresses.iter().map(|net| net.addr()).chain(outer).collect();
            self.judge.note_addresses(host, addresses);
        }
        let servers = self.server_plans.iter();
        let servers = servers
            .flat_map(|server| [Some(IpAddr::V4(server.v4)), Some(server.v6.into()), server.alternate.map(IpAddr::V4)]);
        self.judge.note_servers(servers.flatten().collect());
    }

    pub(super) fn trace(&mut self, line: impl FnOnce(&Trace) -> String) {
        self.trace.note(self.clock.now(), line);
    }

    fn trace_routes(&mut self, host: usize) {
        let others = if self.trace.is_on() { self.machines.len() } else { 0 };
        for other in (0..others).filter(|other| *other != host) {
            let route = self.machines[host].host.engine.data_targets(&self.machines[other].host.key());
            self.trace.note_route(self.clock.now(), host, other, route);
        }
    }

    pub(super) fn pause(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        self.random.between(Duration::from_millis(least_ms), Duration::from_millis(most_ms))
    }
}

fn place_of(node: Node) -> Place {
    match node {
        Node::Host(host) => Place::Host(host),
        Node::Server(server) => Place::Server(server),
        Node::Router(router) => Place::Router(router.number()),
    }
}

fn number(host: usize) -> u16 {
    u16::try_from(host).expect("a run has few hosts")
}
