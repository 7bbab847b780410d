//! What is known of one path: pings and their answers, delay, tunnel datagrams both ways, and why it failed.
//!
//! Owns facts only; what follows from them is decided in [`crate::path::trust`]. Bounded: [`MAX_OUTSTANDING`] pings.

use std::collections::VecDeque;
use std::time::Duration;

use mesh_common::time::Instant;

use crate::device::Endpoint;
use crate::path::mtu::MtuSearch;

/// Pings whose answers are waited for: a round's worth.
const MAX_OUTSTANDING: usize = 16;
/// A delay nobody has measured yet.
const UNKNOWN_RTT: Duration = Duration::from_millis(200);
/// What a satellite needs; a path that is slower is judged as if it were not.
const MAX_JUDGED_RTT: Duration = Duration::from_secs(1);
/// One missed heartbeat: an answer that is this much later than usual is late.
const LATE: Duration = Duration::from_millis(500);
/// After this much more than the usual delay without any answer the path is dead.
const DEAD: Duration = Duration::from_millis(2000);
/// A datagram is in the counts of both sides after this: a report each quarter of a second, and some patience.
const REPORTED: Duration = Duration::from_millis(500);
/// Datagrams over this long of which the peer heard none: the path does not carry the tunnel. After a pause as long, those
/// that follow are judged for themselves.
const UNHEARD_TIME: Duration = Duration::from_secs(2);
const UNHEARD_DATAGRAMS: u64 = 20;

#[derive(Debug, Clone, Default)]
pub(super) struct Track {
    rtt: Option<Duration>,
    outstanding: VecDeque<Ping>,
    /// The last one whose answer is expected.
    pub(super) last_ping: Option<Instant>,
    pub(super) last_pong: Option<Instant>,
    /// When the newest ping left that was answered.
    pub(super) proven_at: Option<Instant>,
    /// Where the newest answer came from, when that was another address than was asked.
    pub(super) answered_from: Option<Endpoint>,
    /// When the first ping left that should have been answered since the last answer.
    waiting_since: Option<Instant>,
    /// Anything authentic came from there.
    pub(super) last_seen: Option<Instant>,
    /// It was proven, but not since something happened that may have ended it.
    pub(super) is_stale: bool,
    /// Tunnel datagrams over this path, ours.
    pub(super) sent: u64,
    /// Tunnel datagrams over this path, the peer's; wraps.
    pub(super) received: u32,
    pub(super) proof: Proof,
    pub(super) barred_until: Option<Instant>,
    pub(super) failure: Option<Failure>,
    pub(super) failures: u32,
    pub(super) mtu: MtuSearch,
}

/// Why a path was left, or what came of the last round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) at: Instant,
    pub(super) reason: String,
}

/// Whether what we send into the tunnel arrives: the peer tells how many datagrams it heard.
///
/// Either side's count lags behind the wire by a report, so what was sent just before an answer proves nothing. A path at rest
/// hears nothing either, and a pause ends what was seen before it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Proof {
    pub(super) heard: Option<u32>,
    /// What we had sent when that number moved last, or when those that follow began.
    sent: u64,
    unheard: Option<Unheard>,
}

/// When datagrams were sent that were not heard.
#[derive(Debug, Clone, Copy)]
struct Unheard {
    first: Instant,
    /// When the last of them began to flow, without a gap of [`REPORTED`].
    flows_since: Instant,
    last: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Ping {
    id: u32,
    at: Instant,
    mtu: Option<u16>,
}

/// A ping that was answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answered {
    pub(super) mtu: Option<u16>,
}

/// What a ping is sent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Its answer is expected: silence counts.
    Check,
    /// It opens our NAT and dies on the way.
    Open,
    /// It asks whether a packet of this size passes.
    Mtu(u16),
}

impl Track {
    pub(super) fn sent_ping(&mut self, id: u32, purpose: Purpose, now: Instant) {
        let mtu = if let Purpose::Mtu(size) = purpose { Some(size) } else { None };
        if self.outstanding.len() >= MAX_OUTSTANDING {
            self.outstanding.pop_front();
        }
        self.outstanding.push_back(Ping { id, at: now, mtu });
        if purpose == Purpose::Check {
            self.last_ping = Some(now);
            self.waiting_since = self.waiting_since.or(Some(now));
        }
    }

    /// `None` when no ping with this id waits for its answer.
    pub(super) fn answered(&mut self, id: u32, now: Instant) -> Option<Answered> {
        let at = self.outstanding.iter().position(|ping| ping.id == id)?;
        let ping = self.outstanding.remove(at)?;
        let sample = now.since(ping.at);
        if ping.mtu.is_none() {
            self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        }
        self.last_pong = Some(now);
        self.last_seen = Some(now);
        self.proven_at = self.proven_at.max(Some(ping.at));
        self.waiting_since = None;
        self.is_stale = false;
        // A path is barred for something that answers do not mend.
        if !self.is_barred(now) {
            self.failure = None;
            self.failures = 0;
        }
        Some(Answered { mtu: ping.mtu })
    }

    pub(super) fn awaits(&self, id: u32) -> bool {
        self.outstanding.iter().any(|ping| ping.id == id)
    }

    /// Something happened that may have ended this path: only a new answer proves it.
    pub(super) fn doubt(&mut self) {
        self.is_stale = self.last_pong.is_some() || self.is_stale;
        self.outstanding.clear();
        self.waiting_since = None;
    }

    pub(super) fn fail(&mut self, reason: String, now: Instant) {
        self.failure = Some(Failure { at: now, reason });
        self.failures = self.failures.saturating_add(1);
        self.doubt();
        self.is_stale = true;
    }

    pub(super) fn bar(&mut self, until: Instant) {
        self.barred_until = Some(until);
    }

    pub(super) fn is_barred(&self, now: Instant) -> bool {
        self.barred_until.is_some_and(|until| now < until)
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    pub(super) fn judged_rtt(&self) -> Duration {
        self.rtt.unwrap_or(UNKNOWN_RTT).min(MAX_JUDGED_RTT)
    }

    /// When the silence becomes suspicious.
    pub(super) fn late_at(&self) -> Option<Instant> {
        self.waiting_since.map(|since| since + LATE + self.judged_rtt())
    }

    /// When the silence is proof enough.
    pub(super) fn dead_at(&self) -> Option<Instant> {
        self.waiting_since.map(|since| since + DEAD + self.judged_rtt())
    }

    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.late_at().is_some_and(|at| now >= at)
    }

    pub(super) fn is_dead(&self, now: Instant) -> bool {
        self.dead_at().is_some_and(|at| now >= at)
    }

    pub(super) fn is_silent(&self, time: Duration, now: Instant) -> bool {
        self.waiting_since.is_some_and(|since| now.since(since) >= time)
    }

    /// Answers come: it was proven, nothing happened since, and no answer is late.
    pub(super) fn is_trusted(&self, now: Instant) -> bool {
        self.last_pong.is_some() && !self.is_stale && !self.is_late(now)
    }

    /// So many of our datagrams left over this path.
    pub(super) fn note_sent(&mut self, datagrams: u64, now: Instant) {
        if datagrams == 0 {
            return;
        }
        if self.proof.unheard.is_some_and(|unheard| now.since(unheard.last) > UNHEARD_TIME) {
            self.begin_proof();
        }
        self.sent += datagrams;
        let unheard = self.proof.unheard.get_or_insert(Unheard { first: now, flows_since: now, last: now });
        if now.since(unheard.last) >= REPORTED {
            unheard.flows_since = now;
        }
        unheard.last = now;
    }

    /// The peer says how many datagrams it heard on this path. True when that moved.
    pub(super) fn hear(&mut self, heard: u32) -> bool {
        let has_moved = self.proof.heard.is_some_and(|before| before != heard);
        if self.proof.heard != Some(heard) {
            self.begin_proof();
            self.proof.heard = Some(heard);
        }
        has_moved
    }

    /// From here on datagrams that are sent are expected to be heard.
    pub(super) fn begin_proof(&mut self) {
        (self.proof.sent, self.proof.unheard) = (self.sent, None);
    }

    /// At least [`UNHEARD_DATAGRAMS`] were sent over at least [`UNHEARD_TIME`], and the peer should have heard them and heard
    /// none.
    pub(super) fn is_unheard(&self, now: Instant) -> bool {
        self.proof.heard.is_some()
            && self.proof.unheard.is_some_and(|unheard| {
                unheard.last.since(unheard.first) >= UNHEARD_TIME && now.since(unheard.flows_since) >= REPORTED
            })
            && self.sent - self.proof.sent >= UNHEARD_DATAGRAMS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_origin(Duration::from_millis(millis))
    }

    fn heard() -> Track {
        let mut track = Track::default();
        track.hear(7);
        track
    }

    #[test]
    fn what_was_sent_just_before_an_answer_may_not_have_been_counted_there() {
        let mut track = heard();
        track.note_sent(1, at(1000));
        // Many more after a pause of less than two seconds.
        track.note_sent(1000, at(2900));
        track.note_sent(1000, at(3150));
        assert!(!track.is_unheard(at(3150)));
        track.note_sent(1000, at(3400));
        assert!(track.is_unheard(at(3400)));
        assert!(track.hear(8) && !track.is_unheard(at(3400)));
    }

    #[test]
    fn a_pause_is_no_silence() {
        // Enough since the pause for a proof, and enough only with those before it.
        for (each, is_unheard) in [(10, true), (1, false)] {
            let mut track = heard();
            track.note_sent(1000, at(1000));
            for resumed in (10_000..12_000).step_by(250) {
                track.note_sent(each, at(resumed));
                assert!(!track.is_unheard(at(resumed)), "{resumed}");
            }
            track.note_sent(each, at(12_000));
            assert_eq!(track.is_unheard(at(12_000)), is_unheard);
        }
    }
}
