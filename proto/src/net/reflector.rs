//! One address of a server, and what it is asked in which order.
//!
//! Filtering comes first: whether the server's other port and other address are heard says something only as long as we have
//! not spoken to them. Then these are spoken to, to see whether they see us where the first one did. So filtering is learned
//! once for each mapping: a second try would walk through the doors that the first one opened.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use mesh_common::time::Instant;

use super::classify::{Doors, Sighting};
use super::exchange::Exchange;
use super::family::Desk;
use crate::wire::stun::Change;

/// Where a server answers STUN, as far as one of its addresses is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Site {
    pub(super) first: SocketAddr,
    /// The same address, another port.
    pub(super) second: Option<SocketAddr>,
    /// Sockets on another address. The last of them answers when both are to be changed; the first one is spoken to.
    pub(super) other: Vec<SocketAddr>,
}

impl Site {
    pub(super) fn new(address: IpAddr, ports: &[u16], other: Vec<SocketAddr>) -> Option<Self> {
        let mut ports = ports.iter().filter(|port| **port != 0).map(|port| SocketAddr::new(address, *port));
        let first = ports.next()?;
        Some(Self { first, second: ports.find(|at| *at != first), other })
    }
}

#[derive(Debug)]
pub(super) struct Reflector {
    site: Site,
    stage: Stage,
    plain: Vec<Exchange>,
    other_port: Option<Exchange>,
    other_address: Option<Exchange>,
    /// What was learned of filtering, and for which mapping.
    doors: Option<(SocketAddr, Doors)>,
    seen: BTreeMap<SocketAddr, SocketAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    /// The first socket is asked, and who else is heard.
    Filtering,
    /// The others are asked.
    Mapping,
}

impl Reflector {
    pub(super) fn new(site: Site) -> Self {
        Self {
            site,
            stage: Stage::Idle,
            plain: Vec::new(),
            other_port: None,
            other_address: None,
            doors: None,
            seen: BTreeMap::new(),
        }
    }

    pub(super) fn site(&self) -> &Site {
        &self.site
    }

    pub(super) fn is_idle(&self) -> bool {
        self.stage == Stage::Idle
    }

    /// Whether all sockets that were asked for our address told it.
    pub(super) fn is_complete(&self) -> bool {
        self.mapped().is_some() && self.plain.iter().all(|exchange| exchange.mapped().is_some())
    }

    /// Where the first socket sees us.
    pub(super) fn mapped(&self) -> Option<SocketAddr> {
        self.seen.get(&self.site.first).copied()
    }

    pub(super) fn doors(&self) -> Doors {
        let known = self.doors.filter(|(mapping, _)| Some(*mapping) == self.mapped());
        known.map(|(_, doors)| doors).unwrap_or_default()
    }

    pub(super) fn sightings(&self) -> impl Iterator<Item = Sighting> {
        let doors = self.doors();
        let knocked = move |at: &SocketAddr| {
            Some(at) == self.site.second.as_ref() && doors.other_port == Some(false)
                || Some(at) == self.site.other.last() && doors.other_address == Some(false)
        };
        self.seen.iter().map(move |(at, mapped)| Sighting { destination: *at, mapped: *mapped, knocked: knocked(at) })
    }

    /// Asks everything anew; what concerns filtering at once only if an answer is to be `expected`.
    pub(super) fn begin(&mut self, expected: bool, desk: &mut Desk, now: Instant) {
        self.stage = Stage::Filtering;
        self.seen.clear();
        self.plain = vec![desk.question(self.site.first, now)];
        self.other_port = None;
        self.other_address = None;
        if self.doors.is_none() && expected {
            self.try_doors(desk, now);
        }
    }

    fn try_doors(&mut self, desk: &mut Desk, now: Instant) {
        let first = self.site.first;
        let mut ask =
            |change, from: Vec<SocketAddr>| (!from.is_empty()).then(|| desk.question_from(first, change, from, now));
        self.other_port = ask(Change::PORT, self.site.second.into_iter().collect());
        self.other_address = ask(Change::BOTH, self.site.other.clone());
    }

    fn exchanges(&mut self) -> impl Iterator<Item = &mut Exchange> {
        self.plain.iter_mut().chain(&mut self.other_port).chain(&mut self.other_address)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let doors = self.other_port.iter().chain(&self.other_address);
        self.plain.iter().chain(doors).filter_map(Exchange::poll_timeout).min()
    }

    pub(super) fn handle_timeout(&mut self, desk: &mut Desk, now: Instant) {
        self.exchanges().filter_map(|exchange| exchange.handle_timeout(now)).for_each(|datagram| desk.send(datagram));
        self.advance(desk, now);
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
        if !self.exchanges().any(|exchange| exchange.handle_answer(source, transaction, mapped)) {
            return false;
        }
        let answers = self.plain.iter().filter_map(|exchange| Some((exchange.to(), exchange.mapped()?)));
        self.seen = answers.collect();
        self.advance(desk, now);
        true
    }

    fn advance(&mut self, desk: &mut Desk, now: Instant) {
        let mapped = self.mapped();
        let asked = self.other_port.is_some() || self.other_address.is_some();
        if self.stage == Stage::Filtering && mapped.is_some() {
            self.doors = self.doors.filter(|(mapping, _)| Some(*mapping) == mapped);
            if self.doors.is_none() && !asked {
                self.try_doors(desk, now);
            }
        }
        if !self.exchanges().all(|exchange| exchange.is_over()) {
            return;
        }
        match (self.stage, mapped) {
            (Stage::Filtering, Some(mapped)) => {
                let heard = |door: &Option<Exchange>| door.as_ref().map(|exchange| exchange.mapped().is_some());
                let doors = Doors { other_port: heard(&self.other_port), other_address: heard(&self.other_address) };
                self.doors.get_or_insert((mapped, doors));
                self.stage = Stage::Mapping;
                let others = self.site.second.into_iter().chain(self.site.other.first().copied());
                self.plain.extend(others.map(|at| desk.question(at, now)));
                self.advance(desk, now);
            }
            _ => self.stage = Stage::Idle,
        }
    }
}
