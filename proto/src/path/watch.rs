//! What the path that carries is asked, how often, and when the machine must be woken for it.

use std::time::Duration;

use mesh_common::limits::LINK_MTU;
use mesh_common::time::Instant;

use crate::device::Endpoint;
use crate::path::agent::{ACTIVE, PathAgent};
use crate::path::mtu::RELAY_MTU;
use crate::path::track::{Purpose, Track};

const HEARTBEAT_ACTIVE: Duration = Duration::from_secs(1);
const HEARTBEAT_WARM: Duration = Duration::from_secs(3);
const HEARTBEAT_UNSURE: Duration = Duration::from_millis(250);
const RELAY_PING: Duration = Duration::from_secs(5);
/// The relay carries for good: packets are made to fit it.
const RELAY_REST: Duration = Duration::from_secs(3);
/// Other paths of the peer that are pinged while the one that carries is unsure.
const MAX_ALTERNATES: usize = 3;

impl PathAgent {
    /// When [`Self::settle`] has something to do by itself. What was due when it last ran is done.
    pub(super) fn next_due(&self) -> Option<(Instant, &'static str)> {
        let judged = self.judged_at;
        let always = [
            self.before.map(|before| (before.until, "stop to send twice")),
            self.relayed_since.map(|since| (since + RELAY_REST, "make packets fit the relay")),
            self.guessing_due().map(|at| (at, "guess the port of a peer")),
        ];
        let while_warm = self.warm_until().filter(|_| !self.is_at_rest).map(|until| {
            let primary = self.primary.and_then(|primary| self.tracks.get(&primary));
            [
                Some((until, "let a peer rest")),
                self.round.as_ref().and_then(|round| round.next()).map(|at| (at, "probe a peer's addresses")),
                self.next_round().map(|at| (at, "look for a direct path again")),
                self.heartbeat_due(judged).map(|at| (at, "ask whether a path answers")),
                primary.and_then(Track::late_at).map(|at| (at, "an answer is late")),
                primary.and_then(Track::dead_at).map(|at| (at, "give up a silent path")),
                primary.and_then(|track| track.mtu.due()).map(|at| (at, "find the MTU of a path")),
                self.absent.values().min().map(|at| (*at, "try a relay again")),
            ]
        });
        let due = always.into_iter().chain(while_warm.into_iter().flatten()).flatten();
        due.filter(|(at, _)| *at > judged).min_by_key(|(at, _)| *at)
    }

    /// When the next ping of the path that carries is due.
    pub(super) fn heartbeat_due(&self, now: Instant) -> Option<Instant> {
        let primary = self.primary?;
        let track = self.tracks.get(&primary);
        let pause = match primary {
            Endpoint::Relay(_) if self.is_active(now) => RELAY_PING,
            Endpoint::Relay(_) => return None,
            _ if self.is_unsure(now) && !track.is_some_and(|track| track.is_dead(now)) => HEARTBEAT_UNSURE,
            // The next answer decides: it need not wait.
            _ if track.is_some_and(|track| track.is_unheard(now)) => HEARTBEAT_UNSURE,
            _ if self.is_active(now) => HEARTBEAT_ACTIVE,
            _ => HEARTBEAT_WARM,
        };
        Some(track.and_then(|track| track.last_ping).map_or(now, |last| last + pause))
    }

    pub(super) fn heartbeat(&mut self, now: Instant) {
        if self.heartbeat_due(now).is_none_or(|due| due > now) {
            return;
        }
        let Some(primary) = self.primary else { return };
        self.ping(primary, Purpose::Check, now);
        if primary.is_relay() || !self.is_unsure(now) {
            return;
        }
        let is_alternate = |at: &Endpoint, track: &Track| {
            let was_seen = track.last_seen.is_some_and(|seen| now.since(seen) < ACTIVE);
            *at != primary && !at.is_relay() && was_seen && !track.is_barred(now)
        };
        let alternates = self.tracks.iter().filter(|(at, track)| is_alternate(at, track)).map(|(at, _)| *at);
        for alternate in alternates.take(MAX_ALTERNATES).collect::<Vec<_>>() {
            self.ping(alternate, Purpose::Check, now);
        }
    }

    pub(super) fn ask_mtu(&mut self, now: Instant) {
        if !self.is_direct_trusted(now) {
            return;
        }
        let Some(primary) = self.primary else { return };
        let track = self.track(primary);
        track.mtu.begin(now);
        let rtt = track.judged_rtt();
        if let Some(size) = track.mtu.poll(rtt, now) {
            self.ping(primary, Purpose::Mtu(size), now);
        }
    }

    pub(super) fn note_mtu(&mut self, now: Instant) {
        match self.primary {
            Some(Endpoint::Relay(_)) if self.relayed_since.is_some_and(|since| now.since(since) >= RELAY_REST) => {
                self.relayed_since = None;
                self.mtu = Some(RELAY_MTU);
            }
            Some(Endpoint::Relay(_)) => {}
            Some(direct) => {
                if let Some(known) = self.tracks.get(&direct).and_then(|track| track.mtu.known()) {
                    self.mtu = Some(known).filter(|known| *known < LINK_MTU);
                }
            }
            None => {}
        }
    }
}
