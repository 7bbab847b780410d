//! One round of probes to every address of a peer: what goes where, when, with which time to live.
//!
//! Bounded: [`MAX_PROBES`] an address a round. A reflexive address is behind the peer's NAT, and some NATs punish a datagram that
//! comes before theirs went out by another port for the peer; so the first ones to it open our NAT and die on the way.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_common::time::Instant;

use crate::path::candidate::{Remote, RemoteKind};

/// Probes one address gets in a round.
pub const MAX_PROBES: usize = 12;
/// Own NAT, then one hop less than to any other.
pub const OPENER_TTL: u8 = 2;
/// A new round at once, whoever asks for it, at most this often.
pub(super) const MIN_PAUSE: Duration = Duration::from_secs(1);
/// Pauses between rounds while the relay carries.
const PAUSES: [Duration; 5] = [
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(20),
    Duration::from_secs(40),
    Duration::from_secs(60),
];

/// Milliseconds after the start of the round, and whether it is an opener.
type Schedule = [(u64, bool); MAX_PROBES];
const OPEN_ADDRESS: Schedule = schedule([0, 100, 250, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000], 0);
const BEHIND_NAT: Schedule = schedule([0, 120, 250, 450, 750, 1250, 2250, 3250, 4250, 5250, 6250, 7250], 2);
/// When the peer is called, until it is heard: over QUIC a relay may lose a message.
const CALLS: [u64; 5] = [0, 300, 1000, 2000, 3500];

const fn schedule(millis: [u64; MAX_PROBES], openers: usize) -> Schedule {
    let mut schedule = [(0, false); MAX_PROBES];
    let mut at = 0;
    while at < MAX_PROBES {
        schedule[at] = (millis[at], at < openers);
        at += 1;
    }
    schedule
}

/// The pause after the n-th round in vain.
pub(super) fn pause(rounds: usize) -> Duration {
    PAUSES[rounds.min(PAUSES.len() - 1)]
}

#[derive(Debug, Clone)]
pub(super) struct Round {
    pub(super) started: Instant,
    entries: Vec<Entry>,
    calls: usize,
}

#[derive(Debug, Clone)]
struct Entry {
    remote: Remote,
    started: Instant,
    /// It worked a moment ago: no NAT needs to be spared.
    is_open: bool,
    sent: usize,
    is_over: bool,
}

/// A probe that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) addr: SocketAddr,
    pub(super) is_opener: bool,
}

/// What became of an address when its round ended without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unanswered {
    pub(super) addr: SocketAddr,
    pub(super) probes: usize,
}

impl Round {
    pub(super) fn new(now: Instant) -> Self {
        Self { started: now, entries: Vec::new(), calls: 0 }
    }

    /// Probes this address too, from now on.
    pub(super) fn add(&mut self, remote: Remote, is_open: bool, now: Instant) {
        if !self.entries.iter().any(|entry| entry.remote.addr == remote.addr) {
            self.entries.push(Entry { remote, started: now, is_open, sent: 0, is_over: false });
        }
    }

    /// No more probes to this address in this round.
    pub(super) fn end(&mut self, addr: SocketAddr) {
        for entry in self.entries.iter_mut().filter(|entry| entry.remote.addr == addr) {
            entry.is_over = true;
        }
    }

    /// Ends every address for which this holds, without an outcome.
    pub(super) fn end_where(&mut self, mut is_over: impl FnMut(&Remote) -> bool) {
        for entry in self.entries.iter_mut().filter(|entry| !entry.is_over) {
            entry.is_over = is_over(&entry.remote);
        }
    }

    /// The next probe that is due.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Due> {
        let entry = self.entries.iter_mut().find(|entry| entry.due().is_some_and(|due| due <= now))?;
        let (_, is_opener) = entry.schedule()[entry.sent];
        entry.sent += 1;
        // What should have gone out while the machine slept is left out.
        while entry.due().is_some_and(|due| due <= now) {
            entry.sent += 1;
        }
        Some(Due { addr: entry.remote.addr, is_opener })
    }

    /// Addresses that got all their probes, the last one a second ago, without an answer. Each once.
    pub(super) fn take_unanswered(&mut self, now: Instant) -> Vec<Unanswered> {
        let mut unanswered = Vec::new();
        for entry in &mut self.entries {
            if !entry.is_over && entry.sent >= MAX_PROBES && now >= entry.patience_ends() {
                entry.is_over = true;
                unanswered.push(Unanswered { addr: entry.remote.addr, probes: entry.sent });
            }
        }
        unanswered
    }

    /// Whether the peer is to be called now.
    pub(super) fn poll_call(&mut self, now: Instant) -> bool {
        let is_due = self.call_due().is_some_and(|due| due <= now);
        while self.call_due().is_some_and(|due| due <= now) {
            self.calls += 1;
        }
        is_due
    }

    /// The peer has called: it knows.
    pub(super) fn called(&mut self) {
        self.calls = CALLS.len();
    }

    pub(super) fn is_over(&self) -> bool {
        self.entries.iter().all(|entry| entry.is_over) && self.calls >= CALLS.len()
    }

    pub(super) fn next(&self) -> Option<Instant> {
        let entries = self.entries.iter().filter(|entry| !entry.is_over);
        entries.map(|entry| entry.due().unwrap_or(entry.patience_ends())).chain(self.call_due()).min()
    }

    fn call_due(&self) -> Option<Instant> {
        CALLS.get(self.calls).map(|millis| self.started + Duration::from_millis(*millis))
    }
}

impl Entry {
    fn schedule(&self) -> &'static Schedule {
        match self.remote.kind {
            RemoteKind::Reflexive if !self.is_open => &BEHIND_NAT,
            _ => &OPEN_ADDRESS,
        }
    }

    fn due(&self) -> Option<Instant> {
        let (millis, _) = self.schedule().get(self.sent).filter(|_| !self.is_over)?;
        Some(self.started + Duration::from_millis(*millis))
    }

    fn patience_ends(&self) -> Instant {
        let (last, _) = self.schedule()[MAX_PROBES - 1];
        self.started + Duration::from_millis(last + 1000)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn remote(kind: RemoteKind) -> Remote {
        Remote { kind, addr: ([192, 0, 2, 1], 7).into() }
    }

    /// When probes leave in a round that starts at zero, in milliseconds; openers are negative, zero included as -1.
    fn times(kind: RemoteKind, is_open: bool) -> Vec<i64> {
        let mut round = Round::new(Instant::ORIGIN);
        round.add(remote(kind), is_open, Instant::ORIGIN);
        let mut times = Vec::new();
        while let Some(now) = round.next() {
            while let Some(due) = round.poll(now) {
                let millis = i64::try_from(now.since_origin().as_millis()).unwrap();
                times.push(if due.is_opener { -millis.max(1) } else { millis });
            }
            round.poll_call(now);
            round.take_unanswered(now);
        }
        assert!(round.is_over());
        times
    }

    #[test]
    fn probes_leave_on_time_and_openers_spare_the_peer_s_nat() {
        let open = [0, 100, 250, 500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000];
        for kind in [RemoteKind::Host, RemoteKind::Static, RemoteKind::Mapped, RemoteKind::PeerReflexive] {
            assert_eq!(times(kind, false), open);
        }
        assert_eq!(
            times(RemoteKind::Reflexive, false),
            [-1, -120, 250, 450, 750, 1250, 2250, 3250, 4250, 5250, 6250, 7250]
        );
        assert_eq!(times(RemoteKind::Reflexive, true), open, "it worked a moment ago");
    }

    #[test]
    fn after_a_sleep_probes_are_not_made_up_for() {
        let mut round = Round::new(Instant::ORIGIN);
        round.add(remote(RemoteKind::Host), false, Instant::ORIGIN);
        let late = Instant::ORIGIN + Duration::from_millis(2500);
        assert!(round.poll(late).is_some());
        assert_eq!(round.poll(late), None);
        assert!(round.poll_call(late) && !round.poll_call(late));
    }
}
