//! What must hold in every run, judged from outside the agents: by packets, and by where the data plane sends them.
//!
//! A talk is one direction of a conversation, known by when each of its packets was sent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_common::limits::LISTEN_PORT;
use mesh_common::nat::{Filtering, Mapping, NatClass};
use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::wire::demux;

use super::is_tunnel_data;
use super::plan::Fault;
use crate::nat::{Dependence, NatKind};
use crate::oracle::Side;

/// What a first byte may take beyond two round trips by the relay.
const FIRST_BYTE_SLACK: Duration = Duration::from_millis(200);
/// A pair that must be direct is direct this long after its first packet, with losses and without.
const DIRECT_WITHIN: Duration = Duration::from_secs(3);
const DIRECT_WITHIN_LOSSY: Duration = Duration::from_secs(5);
/// After a fault is over, and the path agents' pauses have run.
const DIRECT_AGAIN_WITHIN: Duration = Duration::from_secs(13);
/// Nothing goes wrong: this long between two packets of a stream is a break.
const CALM_GAP: Duration = Duration::from_millis(500);
const CALM_GAP_LOSSY: Duration = Duration::from_secs(2);
/// The direct path dies, the relay is up.
const PATH_GAP: Duration = Duration::from_secs(3);
/// An uplink changes.
const UPLINK_GAP: Duration = Duration::from_secs(5);
/// What may still cross after the last packet: until then peers may speak.
const IDLE_AFTER: Duration = Duration::from_secs(60);
/// What was sent this long before the end has arrived or is lost.
const LAST_ARRIVALS: Duration = Duration::from_secs(2);
/// Probes of one node within a second.
const MAX_PROBES_A_SECOND: usize = 200;
/// The same where ports are guessed: those of the pace, and the first to each known address.
const MAX_GUESSES_A_SECOND: usize = 440;
/// Two peers at one public address are guessed at one after the other, so one port twice; other probes do not pause so long.
const GUESS_PAUSE: Duration = Duration::from_secs(2);
const SECOND: Duration = Duration::from_secs(1);

/// A broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    FirstByte {
        from: usize,
        to: usize,
        after: Option<Duration>,
        bound: Duration,
    },
    /// Data took the relay where the oracle says that a direct path exists.
    Relayed {
        from: usize,
        to: usize,
        after: Duration,
        since: &'static str,
    },
    /// Links lost nothing, and these did not arrive.
    Lost {
        from: usize,
        to: usize,
        packets: usize,
        first: Duration,
    },
    Gap {
        from: usize,
        to: usize,
        gap: Duration,
        bound: Duration,
    },
    /// A node says of its NAT what is not so, or does not know it.
    Misclassified {
        host: usize,
        truth: &'static str,
        reported: NatClass,
    },
    SentWhileIdle {
        host: usize,
        what: &'static str,
    },
    TooManyProbes {
        host: usize,
        within_a_second: usize,
    },
    ThirdParty {
        host: usize,
        to: SocketAddr,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

#[derive(Debug)]
pub(super) struct Talk {
    pub(super) from: usize,
    pub(super) to: usize,
    /// The first packet since it began or was taken up again, and the longest its first byte may take.
    began: Option<(Instant, Duration)>,
    first_byte: Option<Duration>,
    /// The last packet that found its data on a relay.
    last_relayed: Option<Instant>,
    must_be_direct: bool,
    /// From when on it must be direct, and after what.
    direct_from: Option<(Instant, &'static str)>,
    /// Sent and not arrived.
    missing: BTreeSet<Instant>,
    /// The newest arrival, or when the clock for the next one started.
    heard: Option<Instant>,
    gap_bound: Duration,
}

impl Talk {
    pub(super) fn new(from: usize, to: usize) -> Self {
        Self {
            from,
            to,
            began: None,
            first_byte: None,
            last_relayed: None,
            must_be_direct: false,
            direct_from: None,
            missing: BTreeSet::new(),
            heard: None,
            gap_bound: CALM_GAP,
        }
    }

    /// Nothing was said since it began, or since it was taken up again.
    pub(super) fn is_first(&self) -> bool {
        self.began.is_none()
    }
}

/// What came of the first pair.
#[derive(Debug)]
pub(super) struct Summary {
    pub(super) was_direct: bool,
    pub(super) first_byte: Option<Duration>,
    pub(super) to_direct: Option<Duration>,
    pub(super) violations: Vec<(Instant, Violation)>,
    pub(super) delivered: u64,
}

#[derive(Debug)]
pub(super) struct Judge {
    talks: Vec<Talk>,
    loses: bool,
    /// What does not arrive now counts as lost.
    is_counting: bool,
    silent_since: Option<Instant>,
    addresses: BTreeMap<usize, BTreeSet<IpAddr>>,
    servers: BTreeSet<IpAddr>,
    /// Probes of each host, and those of its guesses: the first one of any of its ports to any other, in a while.
    probes: BTreeMap<(usize, bool), VecDeque<Instant>>,
    /// When which port of which host sent its last probe where.
    probed: BTreeMap<(usize, u16, SocketAddr), Instant>,
    summary: Summary,
}

impl Judge {
    pub(super) fn new(talks: Vec<Talk>, loses: bool) -> Self {
        let summary =
            Summary { was_direct: false, first_byte: None, to_direct: None, violations: Vec::new(), delivered: 0 };
        Self {
            talks,
            loses,
            is_counting: !loses,
            silent_since: None,
            addresses: BTreeMap::new(),
            servers: BTreeSet::new(),
            probes: BTreeMap::new(),
            probed: BTreeMap::new(),
            summary,
        }
    }

    pub(super) fn talks(&self) -> usize {
        self.talks.len()
    }

    pub(super) fn talk(&self, index: usize) -> &Talk {
        &self.talks[index]
    }

    /// All addresses of a host so far, and those of the routers before it.
    pub(super) fn note_addresses(&mut self, host: usize, addresses: BTreeSet<IpAddr>) {
        self.addresses.entry(host).or_default().extend(addresses);
    }

    pub(super) fn note_servers(&mut self, addresses: BTreeSet<IpAddr>) {
        self.servers = addresses;
    }

    /// The first packet of a talk.
    pub(super) fn note_first(&mut self, index: usize, relay_rtt: Duration, must_be_direct: bool, now: Instant) {
        let direct_within = if self.loses { DIRECT_WITHIN_LOSSY } else { DIRECT_WITHIN };
        let gap_bound = if self.loses { CALM_GAP_LOSSY } else { CALM_GAP };
        let talk = &mut self.talks[index];
        talk.began = Some((now, relay_rtt * 2 + FIRST_BYTE_SLACK));
        talk.must_be_direct = must_be_direct;
        talk.direct_from = must_be_direct.then_some((now + direct_within, "the first packet"));
        talk.heard = None;
        talk.gap_bound = gap_bound;
    }

    /// A packet goes where these endpoints are.
    pub(super) fn note_sent(&mut self, index: usize, targets: &[Endpoint], now: Instant) {
        self.silent_since = None;
        let is_relayed = targets.first().is_none_or(|target| target.is_relay());
        let (is_counting, talk) = (self.is_counting, &mut self.talks[index]);
        if is_counting {
            talk.missing.insert(now);
        }
        if !is_relayed {
            return;
        }
        talk.last_relayed = Some(now);
        if let Some((from, since)) = talk.direct_from.filter(|(from, _)| now >= *from) {
            talk.direct_from = None;
            let violation = Violation::Relayed { from: talk.from, to: talk.to, after: now.since(from), since };
            self.break_rule(now, violation);
        }
    }

    /// A packet that was sent then has arrived by this path.
    pub(super) fn note_delivered(&mut self, from: usize, to: usize, sent: Instant, path: Endpoint, now: Instant) {
        self.summary.delivered += 1;
        let Some(index) = self.talks.iter().position(|talk| (talk.from, talk.to) == (from, to)) else { return };
        let talk = &mut self.talks[index];
        talk.missing.remove(&sent);
        if index == 0 && !path.is_relay() {
            self.summary.was_direct = true;
        }
        let Some((began, bound)) = talk.began.filter(|(began, _)| sent >= *began) else { return };
        let heard = talk.heard;
        talk.heard = Some(heard.map_or(now, |heard| heard.max(now)));
        match heard {
            None => {
                let after = now.since(began);
                talk.first_byte.get_or_insert(after);
                if after > bound && !self.loses {
                    self.break_rule(now, Violation::FirstByte { from, to, after: Some(after), bound });
                }
            }
            Some(heard) => {
                let (gap, bound) = (now.since(heard), talk.gap_bound);
                if gap > bound {
                    self.break_rule(now, Violation::Gap { from, to, gap, bound });
                }
            }
        }
    }

    /// What a node has found out of its NAT, and what that is.
    pub(super) fn note_report(&mut self, host: usize, truth: &Side, reported: NatClass, now: Instant) {
        if truth.routers.iter().any(|hop| hop.renumbers) {
            // A server's answer from its other port is a knock: what is found depends on what was asked first.
            return;
        }
        let mapping = truth.routers.iter().filter(|hop| !hop.is_forwarded).map(|hop| hop.kind.mapping).max();
        let mapping = mapping.unwrap_or(Dependence::EndpointIndependent);
        let is_mapping_right = match reported.mapping {
            Mapping::Unknown => self.loses || truth.routers.iter().any(|hop| hop.blocks_udp),
            Mapping::EndpointIndependent => mapping == Dependence::EndpointIndependent,
            Mapping::AddressDependent => mapping != Dependence::EndpointIndependent,
            Mapping::AddressAndPortDependent => mapping == Dependence::AddressAndPortDependent,
            Mapping::PortIndependent => mapping != Dependence::AddressAndPortDependent,
        };
        let filtering = match &truth.routers[..] {
            [] => Some(Dependence::EndpointIndependent),
            [hop] if hop.is_forwarded => Some(Dependence::EndpointIndependent),
            [hop] => Some(hop.kind.filtering),
            _ => None,
        };
        let is_filtering_right = filtering.is_none_or(|filtering| match reported.filtering {
            Filtering::Unknown => true,
            Filtering::EndpointIndependent => filtering == Dependence::EndpointIndependent,
            Filtering::AddressDependent => filtering != Dependence::AddressAndPortDependent,
            // An answer that was lost looks like one that was filtered.
            Filtering::AddressAndPortDependent => filtering == Dependence::AddressAndPortDependent || self.loses,
        });
        if !is_mapping_right || !is_filtering_right {
            let truth = NatKind { mapping, filtering: filtering.unwrap_or(Dependence::AddressAndPortDependent) }.name();
            self.break_rule(now, Violation::Misclassified { host, truth, reported });
        }
    }

    /// A datagram leaves a host from this port.
    pub(super) fn note_datagram(&mut self, host: usize, (port, to): (u16, SocketAddr), bytes: &[u8], now: Instant) {
        if self.servers.contains(&to.ip()) {
            return;
        }
        let is_probe = bytes.first() == Some(&demux::PROBE);
        if is_probe {
            let before = self.probed.insert((host, port, to), now);
            let is_guess = before.is_none_or(|before| now.since(before) >= GUESS_PAUSE) || port != LISTEN_PORT;
            let limit = if is_guess { MAX_GUESSES_A_SECOND } else { MAX_PROBES_A_SECOND };
            let probes = self.probes.entry((host, is_guess)).or_default();
            while probes.front().is_some_and(|at| now.since(*at) >= SECOND) {
                probes.pop_front();
            }
            probes.push_back(now);
            let within_a_second = probes.len();
            if within_a_second == limit + 1 {
                self.break_rule(now, Violation::TooManyProbes { host, within_a_second });
            }
        }
        // Its own is asked for a hairpin.
        if !self.addresses.values().any(|addresses| addresses.contains(&to.ip())) {
            self.break_rule(now, Violation::ThirdParty { host, to });
        }
        self.check_idle(
            host,
            if is_probe {
                "a probe"
            } else if is_tunnel_data(bytes) {
                "data"
            } else {
                "a handshake"
            },
            now,
        );
    }

    pub(super) fn note_relayed(&mut self, host: usize, now: Instant) {
        self.check_idle(host, "a relayed datagram", now);
    }

    /// The last packet was sent.
    pub(super) fn note_silence(&mut self, now: Instant) {
        self.check_unheard(now);
        self.silent_since = Some(now);
        for talk in &mut self.talks {
            talk.direct_from = None;
        }
    }

    /// All begin anew, as from an idle tunnel.
    pub(super) fn note_resumed(&mut self, now: Instant) {
        self.check_lost(now);
        for talk in &mut self.talks {
            talk.began = None;
        }
        self.is_counting = !self.loses;
    }

    pub(super) fn note_fault(&mut self, fault: Fault, must_be_direct: &[bool], now: Instant) {
        self.note_to_direct();
        self.check_lost(now);
        self.is_counting = false;
        let ends = now + fault.lasts();
        for (talk, must_be_direct) in self.talks.iter_mut().zip(must_be_direct) {
            let is_hit = match fault {
                Fault::Swap { host } | Fault::Suspend { host, .. } => talk.from == host || talk.to == host,
                // What a router does concerns all behind it.
                Fault::Rebind { .. } | Fault::UdpBlocked { .. } | Fault::Block { .. } | Fault::RelayRestart { .. } => {
                    true
                }
            };
            if !is_hit {
                continue;
            }
            let (bound, clock) = match fault {
                Fault::Swap { .. } | Fault::Rebind { .. } => (UPLINK_GAP, now),
                Fault::Suspend { .. } => (UPLINK_GAP, ends),
                Fault::Block { .. } | Fault::UdpBlocked { .. } => (PATH_GAP, now),
                Fault::RelayRestart { .. } => (UPLINK_GAP, ends),
            };
            talk.gap_bound = bound + if self.loses { SECOND } else { Duration::ZERO };
            talk.heard = talk.heard.map(|_| clock);
            talk.must_be_direct = *must_be_direct;
            talk.direct_from = must_be_direct.then_some((ends + DIRECT_AGAIN_WITHIN, "the fault"));
        }
    }

    pub(super) fn finish(mut self, now: Instant) -> Summary {
        self.note_to_direct();
        self.check_lost(now);
        if self.silent_since.is_none() {
            self.check_unheard(now);
        }
        self.summary.first_byte = self.talks[0].first_byte;
        self.summary
    }

    /// When the first talk became direct, unless it was taken down before.
    fn note_to_direct(&mut self) {
        let talk = &self.talks[0];
        if self.summary.to_direct.is_none()
            && self.summary.was_direct
            && let Some((began, _)) = talk.began
        {
            self.summary.to_direct = Some(talk.last_relayed.map_or(Duration::ZERO, |last| last.since(began)));
        }
    }

    fn check_idle(&mut self, host: usize, what: &'static str, now: Instant) {
        if self.silent_since.is_some_and(|since| now.since(since) > IDLE_AFTER) {
            self.break_rule(now, Violation::SentWhileIdle { host, what });
        }
    }

    /// What is missing has arrived since, is still under way, or is lost.
    fn check_lost(&mut self, now: Instant) {
        let mut broken = Vec::new();
        for talk in &mut self.talks {
            let missing = std::mem::take(&mut talk.missing);
            let lost: Vec<Instant> = missing.into_iter().filter(|sent| now.since(*sent) >= LAST_ARRIVALS).collect();
            if let Some(first) = lost.first() {
                let first = first.since_origin();
                broken.push(Violation::Lost { from: talk.from, to: talk.to, packets: lost.len(), first });
            }
        }
        for violation in broken {
            self.break_rule(now, violation);
        }
    }

    fn break_rule(&mut self, now: Instant, violation: Violation) {
        // A run with a broken rule breaks it often.
        if self.summary.violations.len() < 50 {
            self.summary.violations.push((now, violation));
        }
    }

    /// Talks that should have been heard by now and were not.
    fn check_unheard(&mut self, now: Instant) {
        let mut broken = Vec::new();
        for talk in &mut self.talks {
            let Some((_, bound)) = talk.began else { continue };
            match talk.heard.replace(now) {
                None => broken.push(Violation::FirstByte { from: talk.from, to: talk.to, after: None, bound }),
                Some(heard) if now.since(heard) > talk.gap_bound => {
                    let (gap, bound) = (now.since(heard), talk.gap_bound);
                    broken.push(Violation::Gap { from: talk.from, to: talk.to, gap, bound });
                }
                Some(_) => {}
            }
        }
        for violation in broken {
            self.break_rule(now, violation);
        }
    }
}

#[cfg(test)]
mod tests;
