//! A port of the router before this node, led to its WireGuard socket: when to ask for one, how long to keep it, what of the
//! answer to believe.
//!
//! Owns the policy; the shell puts one [`MappingRequest`] to the router at a time and reports what came of it. One protocol
//! after the other, PCP, NAT-PMP, UPnP, until one works; renewed at half of its life; asked for anew when the router or our
//! address on its network changes, and renewed at once when a path falls silent or servers see us elsewhere: a router that
//! restarted has forgotten. IPv4 only: IPv6 is not translated, and what a firewall filters is opened by both sides sending.
//!
//! A router is anybody on the local network who says so, and may itself stand behind a carrier's NAT. What it tells is
//! announced as it stands or not at all: a public address at which servers see this node too is, see [`Doubt`] for the rest.
//! A mapping that is not announced is kept and renewed all the same: behind two NATs it opens the inner one, and the address
//! at which servers see us leads through it then.
//!
//! Bounded: one request under way, [`MAX_ABANDONED`] whose answers do not matter any more, [`REST_MAX`] between rounds in
//! vain. An answer costs a counter.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_common::addr::is_public_v4;
use mesh_common::time::Instant;

use crate::device::Gateway;
use crate::random::SplitMix64;

#[cfg(test)]
mod tests;

/// What is asked for. After a crash the router forgets this node's port within that time.
pub const LIFETIME: Duration = Duration::from_secs(3600);
/// A router that gives less cannot be kept up with.
const LIFETIME_MIN: Duration = Duration::from_secs(20);
/// What was granted within this long is not doubted.
const DOUBT_PAUSE: Duration = Duration::from_secs(10);
/// Between two tries to renew, at least.
const RENEW_RETRY: Duration = Duration::from_secs(2);
/// After a round in vain; doubles.
const REST_MIN: Duration = Duration::from_secs(60);
pub const REST_MAX: Duration = Duration::from_secs(1800);
/// A shell that says nothing for this long has lost the request.
const GIVE_UP: Duration = Duration::from_secs(20);
/// Requests under way whose answer matters only in that what it grants is given back.
const MAX_ABANDONED: usize = 4;

/// How routers are asked, in the order in which they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MappingProtocol {
    Pcp,
    NatPmp,
    Upnp,
}

impl MappingProtocol {
    pub const ALL: [Self; 3] = [Self::Pcp, Self::NatPmp, Self::Upnp];
}

impl fmt::Display for MappingProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pcp => "PCP",
            Self::NatPmp => "NAT-PMP",
            Self::Upnp => "UPnP",
        })
    }
}

/// A number is never given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MappingId(pub u64);

/// One exchange with the router, UDP only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappingRequest {
    pub id: MappingId,
    pub protocol: MappingProtocol,
    pub gateway: Gateway,
    pub internal_port: u16,
    /// What PCP knows the owner of a mapping by: the same over restarts.
    pub nonce: [u8; 12],
    pub ask: Ask,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// For a new mapping or more life for the one that we have.
    Map { external_port: u16, external_address: Option<Ipv4Addr>, lifetime: Duration },
    /// Gives the mapping back. Nobody waits for the answer.
    Release { external_port: u16 },
}

/// What the router says it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// `None` when it does not say.
    pub address: Option<Ipv4Addr>,
    pub port: u16,
    /// `None` = until it is given back.
    pub lifetime: Option<Duration>,
    /// Seconds since it lost its memory, where the protocol has them.
    pub epoch: Option<u32>,
}

/// Why there is no mapping, by this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MappingFailure {
    #[error("no answer")]
    NoAnswer,
    /// In the router's words, or those of its error code.
    #[error("refused: {0}")]
    Refused(String),
    #[error("an answer that makes no sense: {0}")]
    Malformed(String),
}

impl MappingFailure {
    fn counter(&self) -> &'static str {
        match self {
            Self::NoAnswer => "no_answer",
            Self::Refused(_) => "refused",
            Self::Malformed(_) => "malformed",
        }
    }
}

/// Why a mapping is not announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubt {
    /// The router does not know its own address.
    Untold,
    /// There is another NAT behind the router, or it lies.
    NotPublic { told: Ipv4Addr },
    /// Servers see this node at another address: a second uplink, another NAT, or a lie.
    Elsewhere { told: Ipv4Addr, seen: Ipv4Addr },
    /// No server could say where it sees us.
    Unseen,
}

/// Where servers see this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Whether that is another address than the host's; `None` when nobody said.
    pub is_translated: Option<bool>,
    pub at: BTreeSet<Ipv4Addr>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MapperEvent {
    Request(MappingRequest),
    /// What is announced is another address than before, or none.
    Announced,
    /// A new mapping: the NAT may be seen as another one now.
    Remapped,
}

/// What stands, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapperView {
    pub state: MapperState,
    /// Who is asked.
    pub router: Option<Ipv4Addr>,
    /// When the mapping is renewed, or all protocols are tried again.
    pub next: Option<Instant>,
    /// What came of each protocol's last try with this router; absent = it was not asked.
    pub tried: BTreeMap<MappingProtocol, Result<(), MappingFailure>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MapperState {
    /// By the configuration.
    Off,
    /// Nothing translates this node's address, or there is no router.
    NotNeeded,
    Asking,
    Mapped {
        protocol: MappingProtocol,
        external: SocketAddr,
    },
    Doubted {
        protocol: MappingProtocol,
        port: u16,
        doubt: Doubt,
    },
    Failed,
}

#[derive(Debug)]
pub struct PortMapper {
    is_on: bool,
    gateway: Option<Gateway>,
    port: u16,
    seen: Seen,
    nonce: [u8; 12],
    random: SplitMix64,
    last_id: u64,
    /// Where all that follows belongs to.
    site: Option<Site>,
    asked: Option<Asked>,
    held: Option<Held>,
    /// Protocols that this round has still to try.
    left: VecDeque<MappingProtocol>,
    rest: Duration,
    /// The next round.
    round_at: Option<Instant>,
    tried: BTreeMap<MappingProtocol, Result<(), MappingFailure>>,
    abandoned: BTreeMap<MappingId, MappingRequest>,
    /// The last external port, to be asked for again.
    wanted_port: u16,
    announced: Option<SocketAddr>,
    counters: BTreeMap<String, u64>,
    events: VecDeque<MapperEvent>,
}

/// Who is asked, and for which socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Site {
    gateway: Gateway,
    port: u16,
}

#[derive(Debug)]
struct Asked {
    request: MappingRequest,
    give_up_at: Instant,
}

#[derive(Debug)]
struct Held {
    protocol: MappingProtocol,
    grant: Grant,
    since: Instant,
    expires: Instant,
    renew_at: Instant,
    /// Its doubt is counted once.
    is_doubt_counted: bool,
}

impl PortMapper {
    /// `nonce` is this node's secret and the same at every start; `seed` is random.
    pub fn new(is_on: bool, nonce: [u8; 12], seed: u64) -> Self {
        Self {
            is_on,
            gateway: None,
            port: 0,
            seen: Seen::default(),
            nonce,
            random: SplitMix64::new(seed),
            last_id: 0,
            site: None,
            asked: None,
            held: None,
            left: VecDeque::new(),
            rest: REST_MIN,
            round_at: None,
            tried: BTreeMap::new(),
            abandoned: BTreeMap::new(),
            wanted_port: 0,
            announced: None,
            counters: BTreeMap::new(),
            events: VecDeque::new(),
        }
    }

    /// The external address that peers may be told.
    pub fn announced(&self) -> Option<SocketAddr> {
        self.announced
    }

    /// Whether a request is under way.
    pub fn is_asking(&self) -> bool {
        self.asked.is_some()
    }

    /// `port_mapping_*`, since the start.
    pub fn counters(&self) -> &BTreeMap<String, u64> {
        &self.counters
    }

    pub fn handle_switch(&mut self, is_on: bool, now: Instant) {
        self.is_on = is_on;
        self.settle(now);
    }

    /// The router of this host's default route, and the port of the WireGuard socket.
    pub fn handle_host(&mut self, gateway: Option<Gateway>, port: u16, now: Instant) {
        self.gateway = gateway;
        self.port = port;
        self.settle(now);
    }

    pub fn handle_seen(&mut self, seen: Seen, now: Instant) {
        if self.seen == seen {
            return;
        }
        let moved = !self.seen.at.is_empty() && self.seen.at != seen.at;
        self.seen = seen;
        if moved {
            self.handle_doubt(now);
        }
        self.settle(now);
    }

    /// The same router may be another one now.
    pub fn handle_network_changed(&mut self, now: Instant) {
        if self.site.is_some() {
            self.begin_round(now);
        }
        self.settle(now);
    }

    /// Something that passes the router fell silent: perhaps it forgot the mapping.
    pub fn handle_doubt(&mut self, now: Instant) {
        if let Some(held) = self.held.as_mut().filter(|held| now.since(held.since) >= DOUBT_PAUSE) {
            held.renew_at = held.renew_at.min(now);
        }
        self.settle(now);
    }

    /// Somebody wants to know how things stand.
    pub fn handle_check(&mut self, now: Instant) {
        if self.held.is_none() && self.asked.is_none() && self.site.is_some() {
            self.begin_round(now);
        }
        self.handle_doubt(now);
    }

    /// Nothing is asked for any more, and what is held is given back.
    pub fn handle_stop(&mut self, now: Instant) {
        self.handle_switch(false, now);
    }

    /// What came of a request.
    pub fn handle_outcome(&mut self, id: MappingId, outcome: Result<Grant, MappingFailure>, now: Instant) {
        if let Some(request) = self.abandoned.remove(&id) {
            if let Ok(grant) = outcome {
                self.release(&request, grant.port);
            }
        } else if let Some(asked) = self.asked.take_if(|asked| asked.request.id == id) {
            self.conclude(&asked.request, outcome.and_then(plausible), now);
        }
        self.settle(now);
    }

    pub fn handle_timeout(&mut self, now: Instant) {
        if let Some(asked) = self.asked.take_if(|asked| now >= asked.give_up_at) {
            self.conclude(&asked.request, Err(MappingFailure::NoAnswer), now);
            self.abandon(asked.request);
        }
        self.settle(now);
    }

    pub fn poll_event(&mut self) -> Option<MapperEvent> {
        self.events.pop_front()
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let asked = self.asked.as_ref();
        let held = self.held.as_ref();
        let idle = asked.is_none();
        [
            asked.map(|asked| (asked.give_up_at, "give up a request to the router")),
            held.map(|held| (held.expires, "a port mapping runs out")),
            held.filter(|_| idle).map(|held| (held.renew_at, "renew a port mapping")),
            self.round_at.filter(|_| idle).map(|at| (at, "ask the router for a port")),
        ]
        .into_iter()
        .flatten()
        .min_by_key(|(at, _)| *at)
    }

    pub fn view(&self) -> MapperView {
        let held = self.held.as_ref();
        let state = match (held, self.announced) {
            _ if !self.is_on => MapperState::Off,
            _ if self.site.is_none() => MapperState::NotNeeded,
            (Some(held), Some(external)) => MapperState::Mapped { protocol: held.protocol, external },
            (Some(held), None) => {
                let doubt = self.judge(&held.grant).err().unwrap_or(Doubt::Unseen);
                MapperState::Doubted { protocol: held.protocol, port: held.grant.port, doubt }
            }
            (None, _) if self.asked.is_some() => MapperState::Asking,
            (None, _) => MapperState::Failed,
        };
        MapperView {
            state,
            router: self.site.map(|site| site.gateway.router),
            next: held.map(|held| held.renew_at).or(self.round_at),
            tried: self.tried.clone(),
        }
    }

    /// Where a request belongs to, if one makes sense.
    fn wanted_site(&self) -> Option<Site> {
        let gateway = self.gateway.filter(|_| self.is_on && self.port != 0)?;
        let is_translated = self.seen.is_translated.unwrap_or(!is_public_v4(gateway.client));
        is_translated.then_some(Site { gateway, port: self.port })
    }

    /// Does what is due.
    fn settle(&mut self, now: Instant) {
        let wanted = self.wanted_site();
        if wanted != self.site {
            self.leave_site();
            self.site = wanted;
            if wanted.is_some() {
                self.begin_round(now);
            }
        }
        if self.held.take_if(|held| now >= held.expires).is_some() {
            tracing::info!("the router's port mapping ran out and could not be renewed");
            self.begin_round(now);
        }
        if self.asked.is_none() {
            if let Some(held) = &self.held {
                if now >= held.renew_at {
                    let (protocol, grant) = (held.protocol, held.grant);
                    self.left = MappingProtocol::ALL.into_iter().filter(|other| *other != protocol).collect();
                    self.ask(protocol, grant.port, grant.address, now);
                }
            } else if self.round_at.is_some_and(|at| now >= at) {
                self.round_at = None;
                self.go_on(now);
            }
        }
        self.announce();
    }

    fn announce(&mut self) {
        let verdict = self.held.as_ref().map(|held| self.judge(&held.grant));
        let counts = matches!(&verdict, Some(Err(doubt)) if *doubt != Doubt::Unseen);
        if let Some(held) = self.held.as_mut().filter(|held| counts && !held.is_doubt_counted) {
            held.is_doubt_counted = true;
            self.count("not_believed");
        }
        let announced = verdict.and_then(Result::ok);
        if self.announced != announced {
            match announced {
                Some(external) => tracing::info!(%external, "the router leads a port to this node"),
                None => tracing::info!("no port of the router leads to this node any more"),
            }
            self.announced = announced;
            self.events.push_back(MapperEvent::Announced);
        }
    }

    /// The address as the router tells it, or why it is not believed.
    fn judge(&self, grant: &Grant) -> Result<SocketAddr, Doubt> {
        let told = grant.address.filter(|told| !told.is_unspecified()).ok_or(Doubt::Untold)?;
        if !is_public_v4(told) {
            return Err(Doubt::NotPublic { told });
        }
        match self.seen.at.first() {
            None => Err(Doubt::Unseen),
            Some(_) if self.seen.at.contains(&told) => Ok(SocketAddr::new(IpAddr::V4(told), grant.port)),
            Some(seen) => Err(Doubt::Elsewhere { told, seen: *seen }),
        }
    }

    /// Tries all protocols, first the one that worked last; with a mapping in hand, that one at once.
    fn begin_round(&mut self, now: Instant) {
        let mut left = MappingProtocol::ALL.to_vec();
        left.sort_by_key(|protocol| self.tried.get(protocol) != Some(&Ok(())));
        let asked = self.asked.as_ref().map(|asked| asked.request.protocol);
        self.left = left.into_iter().filter(|protocol| Some(*protocol) != asked).collect();
        self.rest = REST_MIN;
        match &mut self.held {
            Some(held) => held.renew_at = held.renew_at.min(now),
            None => self.round_at = Some(now),
        }
    }

    fn conclude(&mut self, request: &MappingRequest, outcome: Result<Grant, MappingFailure>, now: Instant) {
        let protocol = request.protocol;
        self.tried.insert(protocol, outcome.as_ref().map(|_| ()).map_err(Clone::clone));
        match outcome {
            Ok(grant) => self.hold(protocol, grant, now),
            Err(failure) => {
                tracing::debug!(%protocol, router = %request.gateway.router, "no port mapping: {failure}");
                self.count(&format!("{}: {protocol}", failure.counter()));
                self.go_on(now);
            }
        }
    }

    /// After a try in vain: the next protocol, or a rest.
    fn go_on(&mut self, now: Instant) {
        if let Some(protocol) = self.left.pop_front() {
            self.ask(protocol, self.wanted_port, None, now);
        } else if let Some(held) = &mut self.held {
            let remaining = held.expires.since(now);
            held.renew_at = now + self.random.between(remaining / 3, remaining / 2).max(RENEW_RETRY);
        } else {
            self.left = MappingProtocol::ALL.into();
            self.round_at = Some(now + self.random.between(self.rest * 9 / 10, self.rest));
            self.rest = (self.rest * 2).min(REST_MAX);
        }
    }

    fn hold(&mut self, protocol: MappingProtocol, grant: Grant, now: Instant) {
        let life = grant.lifetime.unwrap_or(LIFETIME).min(LIFETIME * 2);
        let before = self.held.take();
        if before.as_ref().is_some_and(|before| has_restarted(before, &grant, now)) {
            self.count("router_restarted");
        }
        let is_known = before.as_ref().is_some_and(|before| {
            (before.protocol, before.grant.address, before.grant.port) == (protocol, grant.address, grant.port)
        });
        if !is_known {
            self.events.push_back(MapperEvent::Remapped);
        }
        self.wanted_port = grant.port;
        self.rest = REST_MIN;
        self.left.clear();
        self.round_at = None;
        self.held = Some(Held {
            protocol,
            grant,
            since: now,
            expires: now + life,
            renew_at: now + self.random.between(life * 9 / 20, life / 2),
            is_doubt_counted: is_known && before.is_some_and(|before| before.is_doubt_counted),
        });
    }

    fn ask(&mut self, protocol: MappingProtocol, port: u16, external_address: Option<Ipv4Addr>, now: Instant) {
        let Some(site) = self.site else { return };
        let external_port = if port == 0 { site.port } else { port };
        let ask = Ask::Map { external_port, external_address, lifetime: LIFETIME };
        let request = self.request(protocol, site, ask);
        self.events.push_back(MapperEvent::Request(request.clone()));
        self.asked = Some(Asked { request, give_up_at: now + GIVE_UP });
    }

    fn request(&mut self, protocol: MappingProtocol, site: Site, ask: Ask) -> MappingRequest {
        self.last_id += 1;
        MappingRequest {
            id: MappingId(self.last_id),
            protocol,
            gateway: site.gateway,
            internal_port: site.port,
            nonce: self.nonce,
            ask,
        }
    }

    fn leave_site(&mut self) {
        if let Some(asked) = self.asked.take() {
            self.abandon(asked.request);
        }
        if let (Some(held), Some(site)) = (self.held.take(), self.site) {
            let ask = Ask::Release { external_port: held.grant.port };
            let request = self.request(held.protocol, site, ask);
            self.events.push_back(MapperEvent::Request(request));
        }
        self.left.clear();
        self.round_at = None;
        self.tried.clear();
    }

    fn abandon(&mut self, request: MappingRequest) {
        if self.abandoned.len() >= MAX_ABANDONED {
            self.abandoned.pop_first();
        }
        self.abandoned.insert(request.id, request);
    }

    /// What an abandoned request was granted after all.
    fn release(&mut self, request: &MappingRequest, external_port: u16) {
        let site = Site { gateway: request.gateway, port: request.internal_port };
        // The same mapping may be held by now, by another answer.
        if self.site == Some(site) {
            return;
        }
        let request = self.request(request.protocol, site, Ask::Release { external_port });
        self.events.push_back(MapperEvent::Request(request));
    }

    fn count(&mut self, name: &str) {
        *self.counters.entry(format!("port_mapping_{name}")).or_default() += 1;
    }
}

/// What a router can mean that answers like that.
fn plausible(grant: Grant) -> Result<Grant, MappingFailure> {
    if grant.port == 0 {
        return Err(MappingFailure::Malformed("it mapped port 0".to_owned()));
    }
    match grant.lifetime {
        Some(lifetime) if lifetime < LIFETIME_MIN => {
            Err(MappingFailure::Malformed(format!("it maps the port for {} s only", lifetime.as_secs())))
        }
        _ => Ok(grant),
    }
}

/// Its clock ran otherwise than ours (RFC 6887, 8.5): it lost its memory in between.
fn has_restarted(before: &Held, grant: &Grant, now: Instant) -> bool {
    let (Some(then), Some(epoch)) = (before.grant.epoch, grant.epoch) else { return false };
    let ours = now.since(before.since).as_secs();
    let Some(theirs) = u64::from(epoch).checked_sub(u64::from(then)) else { return true };
    ours + 2 < theirs - theirs / 16 || theirs + 2 < ours - ours / 16
}
