//! Which path carries: promotion by answers, demotion by silence, and two paths at once while neither is sure.
//!
//! Everything here follows from what is known and `now`, worked out anew after every input. Data that came in proves one
//! direction, so only an answered ping makes a path trusted.

use std::time::Duration;

use mesh_common::id::ServerId;
use mesh_common::time::Instant;

use crate::device::{Endpoint, PathTraffic};
use crate::path::agent::{ACTIVE, Before, CALLED, PathAgent, PathEvent, WARM};
use crate::path::score::Score;
use crate::path::track::{Failure, Purpose, Track};
use crate::path::view::Switch;

/// A path from which data comes and to which none goes is asked at most this often.
const PING_BACK_PAUSE: Duration = Duration::from_secs(1);
/// A relay whose pings are not answered for this long is left for another.
const RELAY_SILENCE: Duration = Duration::from_secs(6);
/// Data goes over the old path too after a switch.
const DUAL: Duration = Duration::from_secs(1);
const BARRED: Duration = Duration::from_secs(60);
/// A path that failed within this long is not taken on the word of a handshake.
const DISTRUST: Duration = Duration::from_secs(60);

impl PathAgent {
    /// Works out what follows from everything known: the path that carries, what is due to be sent, the route.
    pub(super) fn settle(&mut self, now: Instant) {
        self.judged_at = self.judged_at.max(now);
        self.absent.retain(|_, until| now < *until);
        if !self.is_at_rest && !self.is_warm(now) {
            self.rest();
        }
        if self.before.is_some_and(|before| now >= before.until) {
            self.before = None;
        }
        self.choose(now);
        if self.is_warm(now) {
            self.run_round(now);
            self.heartbeat(now);
            self.ask_mtu(now);
        }
        self.guess(now);
        self.note_mtu(now);
        let route = self.wanted_route(now);
        if self.route().second.is_some()
            && route.second.is_none()
            && let Some(primary) = self.primary
        {
            // While data went out twice, the other copy may have been the one that was heard.
            self.track(primary).begin_proof();
        }
        self.set_route(route);
        self.due = self.next_due();
    }

    pub(super) fn is_active(&self, now: Instant) -> bool {
        self.last_active.is_some_and(|at| now.since(at) < ACTIVE)
    }

    /// Tunnel data, or the wish to send some, on this side: only that makes us look for paths and call the peer. If being called
    /// did, two nodes would keep each other awake for ever.
    pub(super) fn is_used(&self, now: Instant) -> bool {
        self.last_active.is_some_and(|at| now.since(at) < WARM)
    }

    /// Somebody uses this peer, or it called us a moment ago.
    pub(super) fn is_warm(&self, now: Instant) -> bool {
        self.warm_until().is_some_and(|until| now < until)
    }

    pub(super) fn warm_until(&self) -> Option<Instant> {
        self.last_active.map(|at| at + WARM).max(self.last_called.map(|at| at + CALLED))
    }

    /// Somebody uses this peer or wants to.
    pub(super) fn touch(&mut self, now: Instant) {
        self.last_active = Some(now);
        self.is_at_rest = false;
        if self.wanted_direct_since.is_none() && !self.is_direct_trusted(now) {
            self.wanted_direct_since = Some(now);
        }
    }

    pub(super) fn best_relay(&self, now: Instant) -> Option<ServerId> {
        self.available_relays(now).next()
    }

    pub(super) fn is_direct_trusted(&self, now: Instant) -> bool {
        self.primary.is_some_and(|primary| !primary.is_relay() && self.is_trusted(primary, now))
    }

    /// An answer came on this path: is it worth to be the one that carries?
    pub(super) fn consider(&mut self, to: Endpoint, now: Instant) {
        if self.tracks.get(&to).is_none_or(|track| track.is_barred(now)) {
            return;
        }
        let is_better = match self.primary {
            Some(primary) if primary == to => return,
            Some(Endpoint::Relay(_)) | None => true,
            Some(primary) if !self.is_trusted(primary, now) => true,
            Some(primary) => self.score(to).is_worth_leaving(&self.score(primary)),
        };
        if is_better {
            let reason = match self.primary {
                Some(primary) if !primary.is_relay() && self.is_trusted(primary, now) => "a better path answers",
                Some(primary) if !primary.is_relay() => "the path fell silent and this one answers",
                _ => "a direct path answers",
            };
            self.switch(Some(to), reason, now);
        }
    }

    /// The peer tells how many of our datagrams it heard on this path.
    pub(super) fn take_heard(&mut self, endpoint: Endpoint, heard: u32, now: Instant) {
        let has_moved = self.track(endpoint).hear(heard);
        if endpoint.is_relay() || self.primary != Some(endpoint) {
            return;
        }
        if has_moved {
            self.before = None;
        }
        let is_sure = self.route().second.is_none() && self.is_trusted(endpoint, now);
        let is_unheard = self.track(endpoint).is_unheard(now);
        if is_sure
            && is_unheard
            && let Some(relay) = self.best_relay(now)
        {
            let reason = "probes pass, tunnel data does not";
            self.track(endpoint).fail(reason.to_owned(), now);
            self.track(endpoint).bar(now + BARRED);
            self.switch(Some(Endpoint::Relay(relay)), reason, now);
            self.hunt_again(now);
        }
    }

    pub(super) fn take_handshake(&mut self, endpoint: Endpoint, now: Instant) {
        self.note_seen(endpoint, now);
        let relay = self.best_relay(now);
        let Some(at) = endpoint.direct() else {
            // Which relay carries is chosen by their order, not by who was first.
            if self.primary.is_none() {
                let relay = relay.map_or(endpoint, Endpoint::Relay);
                self.switch(Some(relay), "the peer answers over a relay", now);
            }
            return;
        };
        self.remotes.observe(at, self.primary.and_then(Endpoint::direct), now);
        let track = self.track(endpoint);
        let is_distrusted =
            track.is_barred(now) || track.failure.as_ref().is_some_and(|failure| now.since(failure.at) < DISTRUST);
        let is_taken = match self.primary {
            Some(primary) if primary == endpoint => false,
            Some(primary) if !primary.is_relay() => !self.is_trusted(primary, now),
            _ => relay.is_none() || self.sends_twice() && !is_distrusted,
        };
        if is_taken {
            self.switch(Some(endpoint), "the peer answers a handshake there", now);
        }
        let is_proven = self.is_trusted(endpoint, now);
        if !is_proven {
            self.ping(endpoint, Purpose::Check, now);
        }
    }

    pub(super) fn take_roamed(&mut self, endpoint: Endpoint, now: Instant) {
        self.note_seen(endpoint, now);
        let Some(at) = endpoint.direct() else { return };
        self.remotes.observe(at, self.primary.and_then(Endpoint::direct), now);
        self.ping_back(endpoint, now);
        let is_lost = self.primary.is_none_or(|primary| primary != endpoint && !self.is_trusted(primary, now));
        if is_lost && self.best_relay(now).is_none() {
            self.switch(Some(endpoint), "the peer sends from there", now);
        }
    }

    pub(super) fn take_traffic(&mut self, paths: &[PathTraffic], now: Instant) {
        if paths.iter().any(|path| path.sent > 0 || path.received > 0) {
            self.touch(now);
        }
        for path in paths {
            let track = self.track(path.endpoint);
            track.note_sent(path.sent, now);
            // Only its changes are looked at.
            track.received = track.received.wrapping_add((path.received & u64::from(u32::MAX)) as u32);
            if path.received == 0 {
                continue;
            }
            self.note_seen(path.endpoint, now);
            if let Some(at) = path.endpoint.direct().filter(|_| self.primary != Some(path.endpoint)) {
                self.remotes.observe(at, self.primary.and_then(Endpoint::direct), now);
                self.ping_back(path.endpoint, now);
            }
        }
        self.follow_peer_to_its_socket(paths, now);
    }

    /// Chance found several sockets that reach the peer, and it sends to another one than we send from: one is enough.
    fn follow_peer_to_its_socket(&mut self, paths: &[PathTraffic], now: Instant) {
        let is_own = |endpoint: Endpoint| endpoint.socket().is_some();
        let has_come = |endpoint: Endpoint| paths.iter().any(|path| path.endpoint == endpoint && path.received > 0);
        let Some(primary) = self.primary.filter(|primary| is_own(*primary) && !has_come(*primary)) else { return };
        let mut others = paths.iter().map(|path| path.endpoint).filter(|endpoint| *endpoint != primary);
        let chosen = others.find(|other| is_own(*other) && has_come(*other) && self.is_trusted(*other, now));
        if chosen.is_some() {
            self.switch(chosen, "the peer sends to this socket", now);
        }
    }

    /// No path is what it was: the network changed, here or there.
    pub(super) fn doubt_all(&mut self) {
        for track in self.tracks.values_mut() {
            track.doubt();
            track.proof = Default::default();
        }
    }

    /// Nothing answered a handshake: a direct path that did not answer a ping either is given up.
    pub(super) fn give_up_unanswered(&mut self, now: Instant) {
        let Some(attempt) = self.attempt else { return };
        let Some(primary) = self.primary.filter(|primary| !primary.is_relay()) else { return };
        let has_answered = |track: &Track| track.last_pong.is_some_and(|at| at > attempt.since);
        if !self.tracks.get(&primary).is_some_and(has_answered) {
            self.switch(None, "no answer to handshakes", now);
        }
    }

    pub(super) fn available_relays(&self, now: Instant) -> impl Iterator<Item = ServerId> {
        let is_there = move |relay: &ServerId| self.absent.get(relay).is_none_or(|until| now >= *until);
        self.relays.iter().copied().filter(is_there)
    }

    pub(super) fn is_trusted(&self, endpoint: Endpoint, now: Instant) -> bool {
        let is_trusted = |track: &Track| {
            if self.policy.trust_expiry { track.is_trusted(now) } else { track.last_pong.is_some() }
        };
        self.tracks.get(&endpoint).is_some_and(is_trusted)
    }

    /// Where answers come from that are asked for here, if that is elsewhere.
    fn answered_from(&self, endpoint: Endpoint) -> Option<Endpoint> {
        self.tracks.get(&endpoint)?.answered_from
    }

    fn score(&self, endpoint: Endpoint) -> Score {
        let track = self.tracks.get(&endpoint);
        let rtt = track.and_then(Track::rtt).unwrap_or(Duration::MAX);
        let is_symmetric = self.answered_from(endpoint).is_none();
        Score::new(self.tier_of(endpoint), is_symmetric, rtt, endpoint.direct())
    }

    /// Somebody wants a path, and what is heard from may be a better one than what carries.
    pub(super) fn is_worth_asking(&self, endpoint: Endpoint, now: Instant) -> bool {
        let is_better = match self.primary.filter(|_| self.is_direct_trusted(now)) {
            Some(primary) => {
                let answers = self.answered_from(primary) == Some(endpoint) && self.answered_from(endpoint).is_none();
                primary == endpoint || answers || self.tier_of(endpoint) < self.tier_of(primary)
            }
            None => true,
        };
        is_better && self.is_warm(now)
    }

    fn ping_back(&mut self, endpoint: Endpoint, now: Instant) {
        let track = self.track(endpoint);
        let was_pinged = track.last_ping.is_some_and(|at| now.since(at) < PING_BACK_PAUSE);
        if !was_pinged && !track.is_barred(now) && self.is_worth_asking(endpoint, now) {
            self.ping(endpoint, Purpose::Check, now);
        }
    }

    /// Leaves a path that can no longer carry.
    fn choose(&mut self, now: Instant) {
        let relay = self.best_relay(now);
        match self.primary {
            Some(Endpoint::Relay(server)) => {
                let is_available = self.available_relays(now).any(|relay| relay == server);
                let other = self.available_relays(now).find(|other| *other != server);
                let is_silent =
                    self.tracks.get(&Endpoint::Relay(server)).is_some_and(|track| track.is_silent(RELAY_SILENCE, now));
                if !is_available {
                    let next = other.map(Endpoint::Relay).or_else(|| self.best_direct(now));
                    self.switch(next, "its relay does not reach the peer", now);
                } else if is_silent && let Some(other) = other {
                    self.track(Endpoint::Relay(server)).doubt();
                    self.switch(Some(Endpoint::Relay(other)), "its relay fell silent", now);
                }
            }
            Some(direct) if self.policy.trust_expiry && self.is_warm(now) => {
                let Some(track) = self.tracks.get_mut(&direct).filter(|track| track.is_dead(now)) else { return };
                let reason = "no answer to probes any more";
                if let Some(relay) = relay {
                    track.fail(reason.to_owned(), now);
                    self.switch(Some(Endpoint::Relay(relay)), reason, now);
                } else if track.failure.is_none() {
                    track.failure = Some(Failure { at: now, reason: reason.to_owned() });
                    track.failures = track.failures.saturating_add(1);
                } else {
                    return;
                }
                self.events.push_back(PathEvent::FellSilent);
                self.hunt_again(now);
            }
            Some(_) => {}
            None => {
                if let Some(relay) = relay.filter(|_| self.is_live(now)) {
                    self.switch(Some(Endpoint::Relay(relay)), "no direct path is known", now);
                }
            }
        }
    }

    fn best_direct(&self, now: Instant) -> Option<Endpoint> {
        let trusted = self.tracks.keys().filter(|at| !at.is_relay() && self.is_trusted(**at, now)).copied();
        trusted.min_by_key(|at| {
            let score = self.score(*at);
            (score.tier, !score.is_symmetric, score.rtt)
        })
    }

    fn switch(&mut self, to: Option<Endpoint>, reason: &str, now: Instant) {
        let from = std::mem::replace(&mut self.primary, to);
        if let Some(direct) = from.filter(|from| !from.is_relay()) {
            self.last_proven = Some(direct);
        }
        self.before = None;
        self.relayed_since = None;
        match to {
            Some(direct) if !direct.is_relay() => {
                let works = |from: &Endpoint| match from {
                    Endpoint::Relay(server) => self.available_relays(now).any(|relay| relay == *server),
                    Endpoint::Direct(_) | Endpoint::Extra(..) => self.is_trusted(*from, now),
                };
                let old = from.filter(works).or_else(|| self.best_relay(now).map(Endpoint::Relay));
                self.before = old
                    .filter(|_| self.sends_twice() && from.is_some())
                    .map(|endpoint| Before { endpoint, until: now + DUAL });
                self.rounds_in_vain = 0;
                let is_proven = self.is_trusted(direct, now);
                let track = self.track(direct);
                track.begin_proof();
                if is_proven && let Some(since) = self.wanted_direct_since.take() {
                    self.time_to_direct = Some(now.since(since));
                }
            }
            Some(relay) => {
                self.relayed_since = Some(now);
                self.track(relay).doubt();
                self.wanted_direct_since = self.wanted_direct_since.or(Some(now).filter(|_| self.is_used(now)));
            }
            None => {}
        }
        self.switches += 1;
        self.last_switch = Some(Switch { at: now, from, to, reason: reason.to_owned() });
        if to.is_some() && self.attempt.is_some() && self.best_relay(now).is_none() {
            // A path opened while handshakes went unanswered: the next one need not wait.
            self.events.push_back(PathEvent::StartHandshake);
        }
    }

    /// Nobody used the peer for a while: its paths are as good as unknown, and nothing is sent until somebody does.
    fn rest(&mut self) {
        self.is_at_rest = true;
        self.round = None;
        self.rounds_in_vain = 0;
        self.wanted_direct_since = None;
        for track in self.tracks.values_mut() {
            track.doubt();
        }
    }

    /// The direct path that carries is not sure to: never proven, not proven since it was doubted, or an answer is late.
    pub(super) fn is_unsure(&self, now: Instant) -> bool {
        self.primary.is_some_and(|primary| !primary.is_relay() && !self.is_trusted(primary, now))
    }
}
