//! Two path agents, each behind a small NAT, a relay, and a tunnel that counts: what goes in arrives or does not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use mesh_common::id::ServerId;
use mesh_common::nat::{Filtering, Mapping, NatClass};
use mesh_common::time::Instant;

use crate::device::{Capabilities, Endpoint, PathTraffic, PeerReport, SocketId};
use crate::path::agent::{PathAgent, PathEvent, PathPolicy};
use crate::random::SplitMix64;
use crate::wire::probe::Probe;
use crate::wire::record::{Candidate, CandidateKind};

pub(super) const RELAY: ServerId = ServerId(0);

pub(super) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nat {
    /// An address of its own and no filter.
    Open,
    /// Endpoint-independent mapping, address and port-dependent filtering.
    Easy,
    /// Both dependent on address and port.
    Hard,
    /// Mapping dependent on address and port, no filter: each destination sees a source of its own, and all may answer.
    Anew,
}

#[derive(Debug, Clone)]
enum Payload {
    Probe(Probe, Option<u16>),
    Initiation,
    Response,
    Data(u64),
}

#[derive(Debug)]
enum Event {
    /// To this side, from where.
    Arrive(usize, Endpoint, Payload),
    /// This side's next tunnel packet.
    Packet(usize),
    /// This side's device reports.
    Report(usize),
    /// This side's host opened as many sockets as it could.
    Opened(usize, u16),
}

#[derive(Debug)]
pub(super) struct Side {
    pub(super) agent: PathAgent,
    nat: Nat,
    device: Capabilities,
    port: u16,
    mappings: BTreeMap<(Option<SocketId>, SocketAddr), u16>,
    written_to: BTreeSet<(u16, SocketAddr)>,
    /// Those beside the main one that are open now, and as many as its host has room for.
    pub(super) sockets: Vec<SocketId>,
    pub(super) room_for_sockets: u16,
    /// When guesses left.
    pub(super) guesses: Vec<Instant>,
    has_session: bool,
    /// While the device fans out: where the last handshake completed.
    proven: Option<Endpoint>,
    queued: u64,
    next: u64,
    pub(super) got: BTreeSet<u64>,
    /// When something arrived that had not before.
    pub(super) arrivals: Vec<Instant>,
    traffic: BTreeMap<Endpoint, (u64, u64)>,
    pub(super) probes: u64,
    pub(super) routes: u64,
}

/// What is broken.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Faults {
    /// Direct datagrams from this side are lost.
    pub(super) direct: [bool; 2],
    /// Direct tunnel data is lost, handshakes and probes pass.
    pub(super) data: bool,
    pub(super) relay: bool,
    /// Direct datagrams longer than this are lost.
    pub(super) max_len: Option<u16>,
}

#[derive(Debug)]
pub(super) struct Pair {
    pub(super) sides: [Side; 2],
    pub(super) now: Instant,
    pub(super) faults: Faults,
    loss_percent: u64,
    delay: (u64, u64),
    relay_delay: u64,
    random: SplitMix64,
    events: BTreeMap<(Instant, u64), Event>,
    order: u64,
    sending: [Option<Duration>; 2],
}

impl Pair {
    pub(super) fn new(nats: [Nat; 2], seed: u64) -> Self {
        Self::with_policy(nats, seed, PathPolicy::default())
    }

    pub(super) fn with_policy(nats: [Nat; 2], seed: u64, policy: PathPolicy) -> Self {
        println!("MESHSPAN_SEED={seed}");
        let side = |at: usize| Side {
            agent: PathAgent::new(seed ^ (at as u64 + 1), policy),
            nat: nats[at],
            device: Capabilities::USERSPACE,
            port: 51872,
            mappings: BTreeMap::new(),
            written_to: BTreeSet::new(),
            sockets: Vec::new(),
            room_for_sockets: u16::MAX,
            guesses: Vec::new(),
            has_session: false,
            proven: None,
            queued: 0,
            next: 0,
            got: BTreeSet::new(),
            arrivals: Vec::new(),
            traffic: BTreeMap::new(),
            probes: 0,
            routes: 0,
        };
        let mut pair = Self {
            sides: [side(0), side(1)],
            now: Instant::from_origin(Duration::from_secs(100)),
            faults: Faults::default(),
            loss_percent: 0,
            delay: (20, 40),
            relay_delay: 30,
            random: SplitMix64::new(seed),
            events: BTreeMap::new(),
            order: 0,
            sending: [None; 2],
        };
        for at in 0..2 {
            pair.announce(at);
            let class = |nat| match nat {
                Nat::Open => (Mapping::EndpointIndependent, Filtering::EndpointIndependent),
                Nat::Easy => (Mapping::EndpointIndependent, Filtering::AddressAndPortDependent),
                Nat::Hard => (Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent),
                Nat::Anew => (Mapping::AddressAndPortDependent, Filtering::EndpointIndependent),
            };
            let class = |nat| {
                let (mapping, filtering) = class(nat);
                [NatClass { mapping, filtering }, NatClass::default()]
            };
            let now = pair.now;
            pair.sides[at].agent.handle_nat(class(nats[at]), class(nats[1 - at]), now);
            // Two hosts do not look at the same moment.
            let first = pair.random.between(millis(1), millis(250));
            pair.after(at, first, Event::Report(at));
        }
        pair
    }

    pub(super) fn with_relay(mut self) -> Self {
        self.set_relay(true);
        self
    }

    /// What each side's device can do.
    pub(super) fn with_devices(mut self, devices: [Capabilities; 2]) -> Self {
        for (at, device) in devices.into_iter().enumerate() {
            let now = self.now;
            self.sides[at].device = device;
            self.sides[at].agent.handle_device(device, now);
            self.drain(at);
        }
        self
    }

    pub(super) fn with_loss(mut self, percent: u64) -> Self {
        self.loss_percent = percent;
        self
    }

    pub(super) fn set_relay(&mut self, is_up: bool) {
        self.faults.relay = !is_up;
        for at in 0..2 {
            let now = self.now;
            self.sides[at].agent.handle_relays(if is_up { &[RELAY] } else { &[] }, now);
            self.drain(at);
        }
    }

    /// Sends a tunnel packet each so often from this side; `None` stops.
    pub(super) fn send_every(&mut self, at: usize, gap: Option<Duration>) {
        let was_idle = self.sending[at].is_none();
        self.sending[at] = gap;
        if was_idle && gap.is_some() {
            self.after(at, Duration::ZERO, Event::Packet(at));
        }
    }

    pub(super) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.step(end) {}
        self.now = end;
    }

    /// Runs until this holds; how long that took, `None` when it was not within this time.
    pub(super) fn run_until(&mut self, limit: Duration, mut holds: impl FnMut(&Self) -> bool) -> Option<Duration> {
        let start = self.now;
        while !holds(self) {
            if !self.step(start + limit) {
                return None;
            }
        }
        Some(self.now.since(start))
    }

    pub(super) fn is_direct(&self, at: usize) -> bool {
        self.sides[at].agent.route().primary.is_some_and(|primary| !primary.is_relay())
    }

    pub(super) fn are_direct(&self) -> bool {
        self.is_direct(0) && self.is_direct(1)
    }

    pub(super) fn is_relayed(&self, at: usize) -> bool {
        self.sides[at].agent.route().primary == Some(Endpoint::Relay(RELAY))
    }

    /// The longest time in which nothing new came, from then to now.
    pub(super) fn longest_gap(&self, at: usize, since: Instant) -> Duration {
        let arrivals = self.sides[at].arrivals.iter().copied().filter(|arrival| *arrival > since);
        let mut last = since;
        let mut longest = Duration::ZERO;
        for arrival in arrivals.chain([self.now]) {
            longest = longest.max(arrival.since(last));
            last = arrival;
        }
        longest
    }

    /// How many packets of the other side have not come, those of the last moments left out.
    pub(super) fn lost(&self, at: usize) -> u64 {
        let sent = self.sides[1 - at].next.saturating_sub(50);
        (0..sent).filter(|number| !self.sides[at].got.contains(number)).count() as u64
    }

    /// The NAT of this side forgets everything and gives other ports.
    pub(super) fn rebind(&mut self, at: usize) {
        let side = &mut self.sides[at];
        side.mappings.clear();
        side.written_to.clear();
        side.port = side.port.wrapping_add(1000);
    }

    pub(super) fn public(&self, at: usize) -> SocketAddr {
        ([203, 0, 113, 1 + at as u8], self.sides[at].port).into()
    }

    /// Tells both agents where this side is.
    pub(super) fn announce(&mut self, at: usize) {
        let kind = if self.sides[at].nat == Nat::Open { CandidateKind::Host } else { CandidateKind::Reflexive };
        let private = Candidate { kind: CandidateKind::Host, addr: ([10, 0, at as u8, 1], 51872).into() };
        let candidates = [Candidate { kind, addr: self.public(at) }, private];
        let now = self.now;
        self.sides[at].agent.handle_own_candidates(&candidates, now);
        self.drain(at);
        self.sides[1 - at].agent.handle_candidates(&candidates, now);
        self.drain(1 - at);
    }

    fn after(&mut self, _at: usize, delay: Duration, event: Event) {
        self.order += 1;
        self.events.insert((self.now + delay, self.order), event);
    }

    /// One event or timeout at or before `end`; false when there is none.
    fn step(&mut self, end: Instant) -> bool {
        let event = self.events.first_key_value().map(|((at, _), _)| *at);
        let timer = (0..2).filter_map(|at| Some((self.sides[at].agent.poll_timeout()?.0, at))).min();
        match (event, timer) {
            (event, Some((due, at))) if due <= end && event.is_none_or(|event| due <= event) => {
                assert!(due >= self.now, "a timeout of the past: {:?}", self.sides[at].agent.poll_timeout());
                self.now = due;
                self.sides[at].agent.handle_timeout(due);
                assert!(
                    self.sides[at].agent.poll_timeout().is_none_or(|(next, _)| next > due),
                    "the same timeout again: {:?}",
                    self.sides[at].agent.poll_timeout()
                );
                self.drain(at);
            }
            (Some(due), _) if due <= end => {
                let ((due, _), event) = self.events.pop_first().unwrap();
                self.now = due;
                self.handle(event);
            }
            _ => return false,
        }
        true
    }

    fn handle(&mut self, event: Event) {
        let now = self.now;
        match event {
            Event::Packet(at) => {
                let Some(gap) = self.sending[at] else { return };
                self.after(at, gap, Event::Packet(at));
                if self.sides[at].has_session {
                    self.send_data(at);
                } else {
                    self.sides[at].queued += 1;
                    if self.sides[at].queued == 1 {
                        self.handshake(at);
                        self.sides[at].agent.handle_report(&PeerReport::Demand, now);
                    }
                }
                self.drain(at);
            }
            Event::Report(at) => {
                self.after(at, millis(250), Event::Report(at));
                let traffic = std::mem::take(&mut self.sides[at].traffic);
                if !traffic.is_empty() {
                    let path = |(endpoint, (sent, received))| PathTraffic { endpoint, sent, received };
                    let report = PeerReport::Traffic(traffic.into_iter().map(path).collect());
                    self.sides[at].agent.handle_report(&report, now);
                    self.drain(at);
                }
            }
            Event::Opened(at, count) => {
                let side = &mut self.sides[at];
                let opened: Vec<SocketId> = (0..count.min(side.room_for_sockets)).map(SocketId).collect();
                side.sockets.extend(&opened);
                side.agent.handle_sockets(&opened, now);
                self.drain(at);
            }
            Event::Arrive(at, from, _)
                if from.socket().is_some_and(|socket| !self.sides[at].sockets.contains(&socket)) => {}
            Event::Arrive(at, from, payload) => {
                match payload {
                    Payload::Probe(probe, _) => self.sides[at].agent.handle_probe(from, &probe, now),
                    Payload::Initiation => {
                        self.session(at, from);
                        self.send(at, from, Payload::Response, None);
                    }
                    Payload::Response => self.session(at, from),
                    Payload::Data(number) => {
                        if self.sides[at].got.insert(number) {
                            self.sides[at].arrivals.push(now);
                            self.sides[at].traffic.entry(from).or_default().1 += 1;
                        }
                        if self.data_targets(at).first() != Some(&from) {
                            self.sides[at].agent.handle_report(&PeerReport::Roamed { endpoint: from }, now);
                        }
                    }
                }
                self.drain(at);
            }
        }
    }

    fn session(&mut self, at: usize, endpoint: Endpoint) {
        let now = self.now;
        self.sides[at].has_session = true;
        self.sides[at].proven = Some(endpoint);
        self.sides[at].agent.handle_report(&PeerReport::Handshake { endpoint }, now);
        self.drain(at);
        for _ in 0..std::mem::take(&mut self.sides[at].queued) {
            self.send_data(at);
        }
    }

    fn drain(&mut self, at: usize) {
        loop {
            if let Some(guess) = self.sides[at].agent.poll_guess() {
                self.sides[at].guesses.push(self.now);
                self.send(at, guess.to, Payload::Probe(guess.probe, guess.pad_to), guess.ttl);
            } else if let Some(transmit) = self.sides[at].agent.poll_transmit() {
                self.sides[at].probes += 1;
                self.send(at, transmit.to, Payload::Probe(transmit.probe, transmit.pad_to), transmit.ttl);
            } else if let Some(event) = self.sides[at].agent.poll_event() {
                match event {
                    PathEvent::StartHandshake => self.handshake(at),
                    PathEvent::Route(route) => {
                        self.sides[at].routes += 1;
                        let is_single = route.second.is_none() && route.handshake_fan_out.is_empty();
                        assert!(self.sides[at].device.several_endpoints || is_single, "{route:?}");
                    }
                    PathEvent::OpenSockets { count, .. } => self.after(at, millis(2), Event::Opened(at, count)),
                    PathEvent::CloseSockets(sockets) => self.sides[at].sockets.retain(|open| !sockets.contains(open)),
                    PathEvent::FellSilent => {}
                }
            } else {
                return;
            }
        }
    }

    fn handshake(&mut self, at: usize) {
        let route = self.sides[at].agent.route().clone();
        let targets = route.primary.into_iter().chain(route.second).chain(route.handshake_fan_out);
        for target in targets.collect::<BTreeSet<_>>() {
            self.send(at, target, Payload::Initiation, None);
        }
    }

    fn data_targets(&self, at: usize) -> Vec<Endpoint> {
        let route = self.sides[at].agent.route();
        match route.primary {
            Some(primary) if route.handshake_fan_out.is_empty() => {
                [Some(primary), route.second].into_iter().flatten().collect()
            }
            guess => self.sides[at].proven.or(guess).into_iter().collect(),
        }
    }

    fn send_data(&mut self, at: usize) {
        let number = self.sides[at].next;
        self.sides[at].next += 1;
        for target in self.data_targets(at) {
            self.sides[at].traffic.entry(target).or_default().0 += 1;
            self.send(at, target, Payload::Data(number), None);
        }
    }

    fn send(&mut self, at: usize, to: Endpoint, payload: Payload, ttl: Option<u8>) {
        let other = 1 - at;
        match to {
            Endpoint::Relay(relay) => {
                if !self.faults.relay {
                    self.after(other, millis(self.relay_delay), Event::Arrive(other, Endpoint::Relay(relay), payload));
                }
            }
            Endpoint::Direct(target) | Endpoint::Extra(_, target) => {
                let Some(source) = self.translate(at, to.socket(), target) else { return };
                let is_lost = self.random.below(100) < self.loss_percent;
                let is_data = matches!(payload, Payload::Data(_));
                let len = if let Payload::Probe(_, Some(len)) = payload { len } else { 0 };
                let is_blocked = self.faults.direct[at]
                    || self.faults.data && is_data
                    || self.faults.max_len.is_some_and(|max| len > max)
                    || ttl.is_some();
                let socket = self.socket_behind(other, target.port());
                if is_lost || is_blocked || !self.is_let_in(other, target, source) {
                    return;
                }
                let from = socket.map_or(Endpoint::Direct(source), |socket| Endpoint::Extra(socket, source));
                let delay = self.random.between(millis(self.delay.0), millis(self.delay.1));
                self.after(other, delay, Event::Arrive(other, from, payload));
            }
        }
    }

    /// The public source of a datagram of this side, which its NAT remembers. `None` for private destinations.
    fn translate(&mut self, at: usize, socket: Option<SocketId>, target: SocketAddr) -> Option<SocketAddr> {
        let public = self.public(at);
        if !target.ip().to_string().starts_with("203.0.113.") {
            return None;
        }
        let side = &mut self.sides[at];
        let port = match side.nat {
            Nat::Open | Nat::Easy => side.port,
            Nat::Hard | Nat::Anew => {
                let next = side.port + 1 + 7 * side.mappings.len() as u16;
                *side.mappings.entry((socket, target)).or_insert(next)
            }
        };
        side.written_to.insert((port, target));
        Some(SocketAddr::new(public.ip(), port))
    }

    /// Which socket beside the main one has this public port.
    fn socket_behind(&self, at: usize, port: u16) -> Option<SocketId> {
        let mut mappings = self.sides[at].mappings.iter();
        mappings.find(|(_, mapped)| **mapped == port).and_then(|((socket, _), _)| *socket)
    }

    fn is_let_in(&self, at: usize, target: SocketAddr, source: SocketAddr) -> bool {
        let side = &self.sides[at];
        self.public(at).ip() == target.ip()
            && match side.nat {
                Nat::Open => target.port() == side.port,
                Nat::Anew => target.port() == side.port || side.mappings.values().any(|port| *port == target.port()),
                Nat::Easy | Nat::Hard => side.written_to.contains(&(target.port(), source)),
            }
    }
}
