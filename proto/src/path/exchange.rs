//! Pings, pongs and calls of one peer: what is sent, what is answered, and what an answer tells.
//!
//! Bounded: 20 pongs a second to one source, [`MAX_QUEUED`] probes waiting, tracks only of addresses that are known or spoke.

use std::time::Duration;

use mesh_common::time::Instant;

use crate::device::Endpoint;
use crate::path::agent::{PathAgent, ProbeTransmit};
use crate::path::candidate::Change;
use crate::path::mtu;
use crate::path::round::OPENER_TTL;
use crate::path::track::{Purpose, Track};
use crate::wire::probe::{Call, Probe};

/// A round's worth to every address; more wait for a budget that will not come.
const MAX_QUEUED: usize = 64;
const MAX_TRACKS: usize = 48;
/// Numbers of pings: the highest bit is for echoes that a person asks for, whose answers do not come here.
pub(crate) const PING_IDS: u32 = u32::MAX >> 1;
const PONGS_PER_SECOND: u32 = 20;
/// A ping of the peer proves nothing yet: it is pinged back, but not more often than this.
pub(super) const PING_BACK: Duration = Duration::from_millis(100);
/// A call is answered at most this often.
const CALL_ANSWER: Duration = Duration::from_millis(200);

/// New sources of a peer that are pinged back within a second.
const PING_BACKS_PER_SECOND: u32 = 8;

/// Pings of starts of the peer's agent that are not known are answered this often, from all sources: old ones that somebody
/// repeats cost the answers to the peer nothing.
const UNKNOWN_STARTS_PER_SECOND: u32 = 8;

/// What was sent within the second that began then.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    since: Instant,
    spent: u32,
}

impl PathAgent {
    pub(super) fn ping(&mut self, to: Endpoint, purpose: Purpose, now: Instant) {
        let id = self.draw_id();
        let track = self.track(to);
        track.sent_ping(id, purpose, now);
        let heard = track.received;
        let (ttl, pad_to) = match purpose {
            Purpose::Check => (None, None),
            Purpose::Open => (Some(OPENER_TTL), None),
            Purpose::Mtu(size) => (None, Some(mtu::datagram_len(size))),
        };
        self.transmit(ProbeTransmit { to, probe: Probe::Ping { id, heard }, ttl, pad_to });
    }

    /// Any bits of a draw are as good as others.
    pub(super) fn draw_id(&mut self) -> u32 {
        (self.random.next_u64() & u64::from(PING_IDS)) as u32
    }

    /// A call with these flags, and what the peer should know of us.
    pub(super) fn call(&mut self, to: Endpoint, flags: Call) {
        let [nat_v4, nat_v6] = self.own_nat;
        let call = Call { nat_v4, nat_v6, candidates: self.own.clone(), ..flags };
        self.transmit(ProbeTransmit { to, probe: Probe::Call(call), ttl: None, pad_to: None });
    }

    pub(super) fn take_ping(&mut self, from: Endpoint, id: u32, heard: u32, now: Instant) {
        if self.may_pong(from, now) {
            let observed = from.direct();
            let probe = Probe::Pong { id, heard: self.track(from).received, observed };
            self.transmit(ProbeTransmit { to: from, probe, ttl: None, pad_to: None });
        }
        self.take_heard(from, heard, now);
        let Some(at) = from.direct() else { return };
        let is_new = self.remotes.observe(at, self.primary.and_then(Endpoint::direct), now);
        if !self.may_ping_back(from, now) {
            return;
        }
        if is_new && self.round.is_some() {
            // The round pings it back.
            return self.join_round(now);
        }
        let track = self.track(from);
        let is_proven = track.is_trusted(now) && track.last_pong.is_some_and(|pong| now.since(pong) < PING_FRESH);
        let was_pinged = track.last_ping.is_some_and(|ping| now.since(ping) < PING_BACK);
        if !is_proven && !was_pinged {
            self.ping(from, Purpose::Check, now);
        }
    }

    /// Behind NATs that map each destination anew, each ping of one side shows the other a new source: without a wish for a
    /// path, or with one as good, an answer is enough. Otherwise two such nodes would ping each other for ever.
    fn may_ping_back(&mut self, from: Endpoint, now: Instant) -> bool {
        if !self.is_worth_asking(from, now) {
            return false;
        }
        if self.tracks.get(&from).is_some_and(|track| track.last_pong.is_some()) {
            return true;
        }
        within(&mut self.ping_backs, PING_BACKS_PER_SECOND, now)
    }

    /// A start of the peer's agent that nobody has told us of asks: it hears that we are here, and nothing else comes of it.
    pub(crate) fn answer_unknown_start(&mut self, from: Endpoint, id: u32, now: Instant) {
        if within(&mut self.unknown_starts, UNKNOWN_STARTS_PER_SECOND, now) {
            let probe = Probe::Pong { id, heard: 0, observed: from.direct() };
            self.transmit(ProbeTransmit { to: from, probe, ttl: None, pad_to: None });
        }
    }

    /// Whether a ping of this number waits for its answer.
    pub(crate) fn awaits(&self, id: u32) -> bool {
        self.tracks.values().any(|track| track.awaits(id))
    }

    pub(super) fn take_pong(&mut self, from: Endpoint, id: u32, heard: u32, now: Instant) {
        // A peer with several addresses may answer from another one; a relay is not such an address.
        let fits = |to: &Endpoint| if from.is_relay() { *to == from } else { !to.is_relay() };
        let asked = self.tracks.iter().find(|(to, track)| fits(to) && track.awaits(id)).map(|(to, _)| *to);
        let Some(to) = asked else { return };
        let Some(answered) = self.track(to).answered(id, now) else { return };
        self.track(to).answered_from = Some(from).filter(|from| *from != to);
        if let Some(size) = answered.mtu {
            self.track(to).mtu.answered(size, now);
        }
        self.take_heard(to, heard, now);
        if let (Some(round), Endpoint::Direct(at)) = (&mut self.round, to) {
            round.end(at);
        }
        if !to.is_relay() {
            self.consider(to, now);
        }
    }

    pub(super) fn take_call(&mut self, from: Endpoint, call: &Call, now: Instant) {
        if !from.is_relay() {
            return;
        }
        self.peer_nat = [call.nat_v4, call.nat_v6];
        let is_new = self.remotes.call(&call.candidates) == Change::New;
        if call.guess_ports {
            return self.take_guessing_call(from, call, now);
        }
        if call.answer_wanted {
            self.last_called = Some(now);
            self.is_at_rest = false;
            if self.last_call_answer.is_none_or(|at| now.since(at) >= CALL_ANSWER) {
                self.last_call_answer = Some(now);
                self.call(from, Call::default());
            }
        }
        if call.answer_wanted || is_new {
            self.hunt_for_peer(now);
        }
        // It knows: it need not be called.
        if let Some(round) = &mut self.round {
            round.called();
        }
    }

    pub(super) fn note_seen(&mut self, from: Endpoint, now: Instant) {
        self.track(from).last_seen = Some(now);
        if let Endpoint::Relay(server) = from {
            self.absent.remove(&server);
        }
    }

    /// What is known of a path; a new one displaces one that was silent the longest.
    pub(super) fn track(&mut self, endpoint: Endpoint) -> &mut Track {
        if !self.tracks.contains_key(&endpoint) && self.tracks.len() >= MAX_TRACKS {
            let kept = [self.primary, self.last_proven, self.before.map(|before| before.endpoint)];
            let free = self.tracks.iter().filter(|(at, _)| !kept.contains(&Some(**at)));
            if let Some(oldest) = free.min_by_key(|(_, track)| track.last_seen).map(|(at, _)| *at) {
                self.tracks.remove(&oldest);
            }
        }
        self.tracks.entry(endpoint).or_default()
    }

    fn transmit(&mut self, transmit: ProbeTransmit) {
        if self.transmits.len() >= MAX_QUEUED {
            self.transmits.pop_front();
        }
        self.probes_sent += 1;
        self.transmits.push_back(transmit);
    }

    fn may_pong(&mut self, to: Endpoint, now: Instant) -> bool {
        self.pongs.retain(|_, budget| now.since(budget.since) < Duration::from_secs(1));
        if self.pongs.len() >= MAX_TRACKS && !self.pongs.contains_key(&to) {
            return false;
        }
        let budget = self.pongs.entry(to).or_insert(Budget { since: now, spent: 0 });
        budget.spent += 1;
        budget.spent <= PONGS_PER_SECOND
    }
}

/// Spends one; whether it was there.
fn within(budget: &mut Option<Budget>, per_second: u32, now: Instant) -> bool {
    let current = budget.filter(|budget| now.since(budget.since) < Duration::from_secs(1));
    let budget = budget.insert(current.unwrap_or(Budget { since: now, spent: 0 }));
    budget.spent = budget.spent.saturating_add(1);
    budget.spent <= per_second
}

/// An answer within this long needs no ping back.
const PING_FRESH: Duration = Duration::from_secs(1);
