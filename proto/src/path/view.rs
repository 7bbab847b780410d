//! What a path agent knows, for people: a read model that is never read back.

use std::time::Duration;

use mesh_common::time::Instant;

use crate::device::Endpoint;
use crate::path::agent::PathAgent;
use crate::path::candidate::{Remote, RemoteKind};
use crate::path::explain;
use crate::path::score::Tier;
use crate::path::track::Track;
use crate::wire::record::CandidateKind;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathView {
    /// How good the path is that carries; `None` while none does.
    pub tier: Option<Tier>,
    pub endpoint: Option<Endpoint>,
    /// Where data is sent as well, while it is not sure that `endpoint` carries.
    pub second: Option<Endpoint>,
    pub rtt: Option<Duration>,
    /// `None`: that of the link.
    pub mtu: Option<u16>,
    pub last_switch: Option<Switch>,
    /// How often the path that carries changed.
    pub switches: u64,
    pub probes_sent: u64,
    pub probes_received: u64,
    /// From the wish for a path to the first direct one, the last time.
    pub time_to_direct: Option<Duration>,
    /// From the wish for a path to a tunnel that carries, the last time.
    pub time_to_first_byte: Option<Duration>,
    /// Every address that is tried or was, best first.
    pub candidates: Vec<CandidateView>,
    /// When the candidates are probed again.
    pub next_retry: Option<Instant>,
    /// Why there is no direct path, and what would help; `None` while there is one, or nobody wants one.
    pub why_not_direct: Option<String>,
}

/// A change of the path that carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    pub at: Instant,
    pub from: Option<Endpoint>,
    pub to: Option<Endpoint>,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CandidateView {
    pub endpoint: Endpoint,
    pub kind: RemoteKind,
    pub rtt: Option<Duration>,
    /// What came of it last, in words.
    pub last: String,
    /// Rounds of probes, or trusts, that ended without an answer since the last one.
    pub failures: u32,
}

impl PathAgent {
    pub fn view(&self, now: Instant) -> PathView {
        let carries = self.primary.filter(|_| self.is_live(now));
        let track = carries.and_then(|endpoint| self.tracks.get(&endpoint));
        PathView {
            tier: carries.map(|endpoint| self.tier_of(endpoint)),
            endpoint: carries,
            second: self.route().second.filter(|_| carries.is_some()),
            rtt: track.and_then(Track::rtt),
            mtu: self.mtu(),
            last_switch: self.last_switch.clone(),
            switches: self.switches,
            probes_sent: self.probes_sent,
            probes_received: self.probes_received,
            time_to_direct: self.time_to_direct,
            time_to_first_byte: self.time_to_first_byte,
            candidates: self.remotes.all().iter().map(|remote| self.candidate_view(remote, now)).collect(),
            next_retry: self.next_round().filter(|at| *at > now),
            why_not_direct: self.why_not_direct(now),
        }
    }

    fn candidate_view(&self, remote: &Remote, now: Instant) -> CandidateView {
        let endpoint = Endpoint::Direct(remote.addr);
        let track = self.tracks.get(&endpoint);
        CandidateView {
            endpoint,
            kind: remote.kind,
            rtt: track.and_then(Track::rtt),
            last: track.map_or_else(|| "not tried yet".to_owned(), |track| last_result(track, now)),
            failures: track.map_or(0, |track| track.failures),
        }
    }

    /// Why the relay carries, or nothing does, in words of a user. `None` while a direct path carries or nobody wants any.
    fn why_not_direct(&self, now: Instant) -> Option<String> {
        let is_direct = self.primary.is_some_and(|primary| !primary.is_relay());
        let is_wanted = self.attempt.is_some() || self.primary.is_some_and(|primary| primary.is_relay());
        if is_direct || !is_wanted {
            return None;
        }
        let unheard =
            self.tracks.values().filter(|track| track.is_barred(now)).find_map(|track| track.failure.as_ref());
        Some(explain::why(&explain::Facts {
            own_nat: self.own_nat,
            peer_nat: self.peer_nat,
            families: explain::Families {
                own: [self.own.iter().any(|own| own.addr.is_ipv4()), self.own.iter().any(|own| own.addr.is_ipv6())],
                peer: [
                    self.remotes.all().iter().any(|remote| remote.addr.is_ipv4()),
                    self.remotes.all().iter().any(|remote| remote.addr.is_ipv6()),
                ],
            },
            port: self.own.iter().find(|own| own.kind == CandidateKind::Host).map(|own| own.addr.port()),
            is_looking: self.round.is_some() && self.rounds_in_vain == 0,
            guessing: self.guessing_words(now),
            unheard: unheard.map(|failure| failure.reason.as_str()),
        }))
    }
}

fn last_result(track: &Track, now: Instant) -> String {
    if let Some(until) = track.barred_until.filter(|until| now < *until) {
        let reason = track.failure.as_ref().map_or("it failed", |failure| failure.reason.as_str());
        return format!("{reason}; not used for another {} s", until.since(now).as_secs() + 1);
    }
    match (&track.failure, track.last_pong) {
        (Some(failure), _) => format!("{} ({} s ago)", failure.reason, now.since(failure.at).as_secs()),
        (None, Some(at)) => format!("answered {} s ago", now.since(at).as_secs()),
        (None, None) if track.last_ping.is_some() => "probed, no answer yet".to_owned(),
        (None, None) => "not tried yet".to_owned(),
    }
}
