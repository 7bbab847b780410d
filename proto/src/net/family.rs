//! One address family: when its servers are asked, and what is concluded.
//!
//! A check asks all of them everything: at the start, when servers or the network change, when an answer contradicts what is
//! known, and every five minutes. Behind a NAT one of them is asked again every 25 s in between, so that the mapping that
//! peers are told of stays. What is known stands until something else is: servers that fall silent take nothing back, unless
//! the network changed since.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::nat::{Mapping, NatClass};
use mesh_common::time::Instant;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::classify::{self, Sighting};
use super::exchange::Exchange;
use super::reflector::{Reflector, Site};
use super::report::FamilyReport;
use crate::random::SplitMix64;
use crate::wire::stun::Change;

/// Between two checks of a network that does not change.
const CHECK_EVERY: Duration = Duration::from_secs(300);
/// After a check that left a question open; doubles, as long as nobody answers up to the second of these only.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_BLOCKED_MAX: Duration = Duration::from_secs(60);
/// NATs forget a UDP mapping after 30 s or more.
const REFRESH_MIN: Duration = Duration::from_secs(22);
const REFRESH_MAX: Duration = Duration::from_secs(25);
/// Paths of many peers fall silent at once: one question for all of them.
const DOUBT_PAUSE: Duration = Duration::from_secs(2);

/// What all of this node's questions share: who we are, fresh transactions, and what is to be sent.
pub(super) struct Desk {
    /// Addresses of this host, and the port of its WireGuard socket.
    pub(super) own: (BTreeSet<IpAddr>, u16),
    seed: Zeroizing<[u8; 32]>,
    asked: u64,
    random: SplitMix64,
    /// Emptied by the caller after each input; an input adds one datagram a question.
    pub(super) transmits: VecDeque<(SocketAddr, Bytes)>,
}

#[derive(Debug, Default)]
pub(super) struct FamilyNet {
    reflectors: Vec<Reflector>,
    checking: bool,
    /// `None` = there is nobody to ask.
    check_at: Option<Instant>,
    retry: Duration,
    refresh: Option<Exchange>,
    refresh_at: Option<Instant>,
    hairpin: Option<Exchange>,
    /// The mapping that was tested for hairpinning.
    hairpin_of: Option<SocketAddr>,
    /// The network changed and no answer came since.
    stale: bool,
    report: FamilyReport,
}

impl FamilyNet {
    pub(super) fn report(&self) -> &FamilyReport {
        &self.report
    }

    /// Those of the same place stay with what they know.
    pub(super) fn set_sites(&mut self, sites: Vec<Site>, desk: &mut Desk, now: Instant) {
        if sites.iter().eq(self.reflectors.iter().map(Reflector::site)) {
            return;
        }
        let mut before = std::mem::take(&mut self.reflectors);
        for site in sites {
            let known = before.iter().position(|reflector| *reflector.site() == site);
            self.reflectors.push(match known {
                Some(place) => before.swap_remove(place),
                None => {
                    let mut new = Reflector::new(site);
                    new.begin(true, desk, now);
                    new
                }
            });
        }
        if self.reflectors.is_empty() {
            *self = Self { report: std::mem::take(&mut self.report), ..Self::default() };
        } else if !self.checking {
            self.begin_check(desk, now);
        }
        self.handle_timeout(desk, now);
    }

    pub(super) fn handle_network_changed(&mut self, desk: &mut Desk, now: Instant) {
        self.stale = true;
        self.retry = Duration::ZERO;
        self.hairpin_of = None;
        if !self.reflectors.is_empty() {
            self.begin_check(desk, now);
            self.handle_timeout(desk, now);
        }
    }

    /// Asks everything again, as far as that is not under way.
    pub(super) fn handle_check(&mut self, desk: &mut Desk, now: Instant) {
        if !self.reflectors.is_empty() && !self.checking {
            self.begin_check(desk, now);
            self.handle_timeout(desk, now);
        }
    }

    /// What was refreshed a moment ago is not doubted.
    pub(super) fn handle_doubt(&mut self, desk: &mut Desk, now: Instant) {
        if let Some(at) = self.refresh_at.as_mut().filter(|at| at.since(now) + DOUBT_PAUSE < REFRESH_MIN) {
            *at = now;
            self.handle_timeout(desk, now);
        }
    }

    pub(super) fn is_checking(&self) -> bool {
        self.checking
    }

    fn begin_check(&mut self, desk: &mut Desk, now: Instant) {
        self.checking = true;
        self.check_at = None;
        self.refresh = None;
        self.refresh_at = None;
        for reflector in &mut self.reflectors {
            reflector.begin(!self.report.udp_blocked, desk, now);
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let reflectors = self.reflectors.iter().filter_map(Reflector::poll_timeout);
        let single = self.refresh.iter().chain(&self.hairpin).filter_map(Exchange::poll_timeout);
        let questions = reflectors.chain(single).map(|at| (at, "ask a STUN server again"));
        let plans = [
            self.check_at.map(|at| (at, "check the NAT")),
            self.refresh_at.map(|at| (at, "keep the NAT mapping alive")),
        ];
        questions.chain(plans.into_iter().flatten()).min_by_key(|(at, _)| *at)
    }

    pub(super) fn handle_timeout(&mut self, desk: &mut Desk, now: Instant) {
        if self.check_at.is_some_and(|at| now >= at) {
            self.begin_check(desk, now);
        }
        if self.refresh_at.take_if(|at| now >= *at).is_some() {
            let heard = self.reflectors.iter().find(|reflector| reflector.mapped().is_some());
            self.refresh = heard.map(|reflector| desk.question(reflector.site().first, now));
        }
        for reflector in &mut self.reflectors {
            reflector.handle_timeout(desk, now);
        }
        for single in [&mut self.refresh, &mut self.hairpin].into_iter().flatten() {
            single.handle_timeout(now).into_iter().for_each(|datagram| desk.send(datagram));
        }
        if self.hairpin.take_if(|hairpin| hairpin.is_over()).is_some() {
            self.report.hairpin = Some(false);
        }
        if self.refresh.take_if(|refresh| refresh.is_over()).is_some() {
            self.begin_check(desk, now);
            self.handle_timeout(desk, now);
        }
        self.conclude(desk, now);
    }

    /// Whether the answer is one to us.
    pub(super) fn handle_answer(
        &mut self,
        source: SocketAddr,
        transaction: &[u8; 12],
        mapped: SocketAddr,
        desk: &mut Desk,
        now: Instant,
    ) -> bool {
        let refreshed = self
            .refresh
            .take_if(|refresh| refresh.handle_answer(source, transaction, mapped))
            .map(|refresh| refresh.to());
        if let Some(asked) = refreshed {
            let known = self.reflectors.iter().find(|reflector| reflector.site().first == asked);
            if known.and_then(Reflector::mapped) == Some(mapped) {
                self.plan_refresh(desk, now);
            } else {
                self.begin_check(desk, now);
            }
            self.handle_timeout(desk, now);
            return true;
        }
        let mut reflectors = self.reflectors.iter_mut();
        let known = reflectors.any(|reflector| reflector.handle_answer(source, transaction, mapped, desk, now));
        if known {
            self.stale = false;
            self.handle_timeout(desk, now);
        }
        known
    }

    /// Whether the request is one of ours that came back through the NAT.
    pub(super) fn handle_request(&mut self, source: SocketAddr, transaction: &[u8; 12]) -> bool {
        let is_ours = self.hairpin.take_if(|hairpin| hairpin.handle_answer(source, transaction, source)).is_some();
        if is_ours {
            self.report.hairpin = Some(true);
        }
        is_ours
    }

    /// Addresses are told as soon as they are seen, classes when all is answered or given up.
    fn conclude(&mut self, desk: &mut Desk, now: Instant) {
        if !self.checking {
            return;
        }
        let sightings = self.sightings(desk);
        let reflexive = self.reflexive(&sightings);
        let is_over = self.reflectors.iter().all(Reflector::is_idle);
        if !sightings.is_empty() && (is_over || reflexive.iter().any(|mapped| self.is_news(*mapped))) {
            self.report.is_translated = Some(reflexive.iter().any(|mapped| !desk.is_own(*mapped)));
            self.report.keeps_port = Some(sightings.iter().all(|sighting| sighting.mapped.port() == desk.own.1));
            self.report.reflexive = reflexive;
            self.test_hairpin(desk, now);
        }
        if !is_over {
            return;
        }
        self.checking = false;
        self.report.udp_blocked = sightings.is_empty();
        if !sightings.is_empty() {
            self.report.nat = self.class(&sightings);
        } else if self.stale {
            self.report = FamilyReport { udp_blocked: true, ..FamilyReport::default() };
        }
        let is_complete = self.reflectors.iter().all(Reflector::is_complete);
        let longest = if sightings.is_empty() { RETRY_BLOCKED_MAX } else { CHECK_EVERY };
        self.retry = if is_complete { Duration::ZERO } else { (self.retry * 2).clamp(RETRY_MIN, longest) };
        let pause = if is_complete { CHECK_EVERY } else { self.retry };
        self.check_at = Some(now + desk.random.between(pause * 9 / 10, pause));
        self.plan_refresh(desk, now);
    }

    /// Of those who see us through a NAT, if anybody does: a server on the same LAN knows nothing of it.
    fn sightings(&self, desk: &Desk) -> Vec<Sighting> {
        let all = || self.reflectors.iter().flat_map(Reflector::sightings);
        let translated: Vec<Sighting> = all().filter(|sighting| !desk.is_own(sighting.mapped)).collect();
        if translated.is_empty() { all().collect() } else { translated }
    }

    /// One for each external address, in the order of the servers: where the mapping depends on the server, one is as good as
    /// another.
    fn reflexive(&self, sightings: &[Sighting]) -> Vec<SocketAddr> {
        let mut reflexive: Vec<SocketAddr> = Vec::new();
        for mapped in self.witnesses(sightings).filter_map(Reflector::mapped) {
            if !reflexive.iter().any(|known| known.ip() == mapped.ip()) {
                reflexive.push(mapped);
            }
        }
        reflexive
    }

    fn witnesses(&self, sightings: &[Sighting]) -> impl Iterator<Item = &Reflector> {
        let is_witness = |at: &SocketAddr| sightings.iter().any(|sighting| sighting.destination == *at);
        self.reflectors.iter().filter(move |reflector| is_witness(&reflector.site().first))
    }

    /// Another port is none where each server sees another one anyway.
    fn is_news(&self, mapped: SocketAddr) -> bool {
        let mapping = self.report.nat.mapping;
        let is_dependent = mapping.is_proven() && mapping.is_endpoint_dependent();
        let is_known = |known: &SocketAddr| *known == mapped || is_dependent && known.ip() == mapped.ip();
        !self.report.reflexive.iter().any(is_known)
    }

    fn class(&self, sightings: &[Sighting]) -> NatClass {
        let doors: Vec<_> = self.witnesses(sightings).map(Reflector::doors).collect();
        let mapping = match self.report.is_translated {
            Some(false) => Mapping::EndpointIndependent,
            _ => classify::mapping(sightings),
        };
        NatClass { mapping, filtering: classify::filtering(&doors) }
    }

    /// Once for each mapping.
    fn test_hairpin(&mut self, desk: &mut Desk, now: Instant) {
        let mapped = self.report.reflexive.first().copied().filter(|mapped| !desk.is_own(*mapped));
        if self.hairpin_of != mapped {
            self.hairpin_of = mapped;
            self.report.hairpin = None;
            self.hairpin = mapped.map(|mapped| desk.question_from(mapped, Change::NONE, Vec::new(), now));
        }
    }

    fn plan_refresh(&mut self, desk: &mut Desk, now: Instant) {
        let is_translated = self.report.is_translated == Some(true);
        self.refresh_at = is_translated.then(|| now + desk.random.between(REFRESH_MIN, REFRESH_MAX));
    }
}

impl Desk {
    pub(super) fn new(seed: [u8; 32]) -> Self {
        let mut desk = Self {
            own: (BTreeSet::new(), 0),
            seed: Zeroizing::new(seed),
            asked: 0,
            random: SplitMix64::new(0),
            transmits: VecDeque::new(),
        };
        let [a, b, c, d, e, f, g, h, ..] = desk.transaction();
        desk.random = SplitMix64::new(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        desk
    }

    fn is_own(&self, mapped: SocketAddr) -> bool {
        self.own.0.contains(&mapped.ip()) && self.own.1 == mapped.port()
    }

    /// A question to this socket, which is to answer itself.
    pub(super) fn question(&mut self, to: SocketAddr, now: Instant) -> Exchange {
        self.question_from(to, Change::NONE, vec![to], now)
    }

    pub(super) fn question_from(
        &mut self,
        to: SocketAddr,
        change: Change,
        from: Vec<SocketAddr>,
        now: Instant,
    ) -> Exchange {
        Exchange::new(to, change, from, self.transaction(), now)
    }

    pub(super) fn send(&mut self, datagram: (SocketAddr, Bytes)) {
        self.transmits.push_back(datagram);
    }

    /// Nobody who saw some of them can guess another: who forges an answer has to.
    fn transaction(&mut self) -> [u8; 12] {
        self.asked += 1;
        let hash = Sha256::new().chain_update(b"meshspan/v1 stun").chain_update(self.seed.as_slice());
        let hash: [u8; 32] = hash.chain_update(self.asked.to_le_bytes()).finalize().into();
        let mut transaction = [0; 12];
        transaction.copy_from_slice(&hash[..12]);
        transaction
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("own", &self.own).field("asked", &self.asked).finish_non_exhaustive()
    }
}
