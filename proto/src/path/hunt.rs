//! Rounds of probes: when one begins, what it asks, and when it is over.

use std::time::Duration;

use mesh_common::time::Instant;

use crate::device::Endpoint;
use crate::path::agent::PathAgent;
use crate::path::candidate::{Remote, RemoteKind};
use crate::path::round::{self, Round};
use crate::path::score::Tier;
use crate::path::track::{Failure, Purpose};

/// A path that answered within this long may be probed without sparing its NAT.
const STILL_OPEN: Duration = Duration::from_secs(20);
/// Addresses no better than the one that answered get this long in a round, for the shortest delay among them.
const COMPARED_FOR: Duration = Duration::from_millis(1500);

impl PathAgent {
    /// Something changed that may make a better path: looks for one at once, if anybody wants it.
    pub(super) fn hunt_again(&mut self, now: Instant) {
        if self.is_used(now) {
            self.rounds_in_vain = 0;
            self.hunt_for_peer(now);
        }
    }

    /// The peer looks for a path to us and needs our probes.
    pub(super) fn hunt_for_peer(&mut self, now: Instant) {
        match &self.round {
            Some(running) if now.since(running.started) < round::MIN_PAUSE => self.join_round(now),
            _ if self.last_round.is_some_and(|at| now.since(at) < round::MIN_PAUSE) => {}
            _ => self.start_round(now),
        }
    }

    /// Addresses that came to be known while a round runs are probed in it.
    pub(super) fn join_round(&mut self, now: Instant) {
        let Some(mut round) = self.round.take() else { return };
        for remote in self.probed_remotes(now) {
            round.add(remote, self.is_still_open(&remote, now), now);
        }
        self.round = Some(round);
    }

    pub(super) fn run_round(&mut self, now: Instant) {
        let is_due = self.next_round().is_some_and(|at| at <= now);
        if is_due {
            self.rounds_in_vain += 1;
            self.start_round(now);
        }
        // Nobody looks for a path any more.
        let Some(mut round) = self.round.take().filter(|_| self.is_warm(now)) else { return };
        let proven = self.tier_proven_since(round.started, now);
        if let Some(best) = proven {
            let is_compared = now.since(round.started) < COMPARED_FOR;
            round.end_where(|remote| {
                let tier = self.tier(remote);
                tier > best || tier == best && !is_compared
            });
        }
        while let Some(due) = round.poll(now) {
            let purpose = if due.is_opener { Purpose::Open } else { Purpose::Check };
            self.ping(Endpoint::Direct(due.addr), purpose, now);
        }
        for unanswered in round.take_unanswered(now) {
            let reason = format!("no answer to {} probes", unanswered.probes);
            let track = self.track(Endpoint::Direct(unanswered.addr));
            track.failure = Some(Failure { at: now, reason });
            track.failures = track.failures.saturating_add(1);
        }
        if proven.is_some() || !self.is_used(now) {
            round.called();
        }
        if round.poll_call(now)
            && self.policy.call
            && let Some(relay) = self.best_relay(now)
        {
            self.call(Endpoint::Relay(relay), true);
        }
        self.round = Some(round).filter(|round| !round.is_over());
    }

    /// When the next round begins by itself: while tunnel data flows and no direct path is trusted.
    pub(super) fn next_round(&self) -> Option<Instant> {
        let (last, judged) = (self.last_round?, self.judged_at);
        let is_wanted = self.is_active(judged) && !self.is_direct_trusted(judged);
        is_wanted.then(|| last + round::pause(self.rounds_in_vain))
    }

    pub(super) fn tier(&self, remote: &Remote) -> Tier {
        let is_on_link = self.subnets.iter().any(|subnet| subnet.contains(&remote.addr.ip()));
        Tier::of(remote.kind, is_on_link)
    }

    pub(super) fn tier_of(&self, endpoint: Endpoint) -> Tier {
        match endpoint {
            Endpoint::Relay(_) => Tier::Relay,
            Endpoint::Direct(addr) => {
                let kind = self.remotes.kind_of(addr).unwrap_or(RemoteKind::PeerReflexive);
                self.tier(&Remote { kind, addr })
            }
        }
    }

    fn start_round(&mut self, now: Instant) {
        let mut round = Round::new(now);
        for remote in self.probed_remotes(now) {
            round.add(remote, self.is_still_open(&remote, now), now);
        }
        self.round = Some(round);
        self.last_round = Some(now);
    }

    fn probed_remotes(&self, now: Instant) -> Vec<Remote> {
        let mut remotes = self.remotes.all();
        for endpoint in [self.primary, self.last_proven].into_iter().flatten() {
            if let Some(addr) = endpoint.direct().filter(|at| !remotes.iter().any(|remote| remote.addr == *at)) {
                remotes.push(Remote { kind: RemoteKind::PeerReflexive, addr });
            }
        }
        let is_barred =
            |remote: &Remote| self.tracks.get(&Endpoint::Direct(remote.addr)).is_some_and(|track| track.is_barred(now));
        remotes.retain(|remote| !is_barred(remote));
        remotes
    }

    fn is_still_open(&self, remote: &Remote, now: Instant) -> bool {
        let track = self.tracks.get(&Endpoint::Direct(remote.addr));
        track.and_then(|track| track.last_seen).is_some_and(|seen| now.since(seen) < STILL_OPEN)
    }

    /// How good the path is that carries, if a ping that left after that moment was answered on it.
    fn tier_proven_since(&self, moment: Instant, now: Instant) -> Option<Tier> {
        let primary = self.primary.filter(|primary| !primary.is_relay())?;
        let track = self.tracks.get(&primary)?;
        let is_proven = track.proven_at.is_some_and(|at| at >= moment) && track.is_trusted(now);
        is_proven.then(|| self.tier_of(primary))
    }
}
