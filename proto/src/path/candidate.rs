//! Where a peer may be reached: what its record announces, what its last call said, and where its probes came from.
//!
//! Bounded: [`MAX_CANDIDATES`] from the record, as many from a call, [`MAX_PEER_REFLEXIVE`] observed. Judges an address only
//! by itself; whether it is one of ours, of a filter or of the overlay is judged before it comes here.

use std::net::SocketAddr;

use mesh_common::addr;
use mesh_common::limits::MAX_CANDIDATES;
use mesh_common::time::Instant;

use crate::wire::record::{Candidate, CandidateKind};

/// Observed sources that are remembered for a peer: a NAT that maps each destination anew shows one for each of our addresses.
pub const MAX_PEER_REFLEXIVE: usize = 4;

/// What an address of a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RemoteKind {
    Host,
    Static,
    Mapped,
    Reflexive,
    /// An authentic probe came from it, and nobody announced it.
    PeerReflexive,
    /// Not an address: the peer behind a relay.
    Relay,
}

impl From<CandidateKind> for RemoteKind {
    fn from(kind: CandidateKind) -> Self {
        match kind {
            CandidateKind::Host => Self::Host,
            CandidateKind::Static => Self::Static,
            CandidateKind::Reflexive => Self::Reflexive,
            CandidateKind::Mapped => Self::Mapped,
        }
    }
}

/// An address that is worth a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    pub kind: RemoteKind,
    pub addr: SocketAddr,
}

/// What a new list of addresses brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    None,
    /// Addresses went, or their order changed.
    Gone,
    /// An address was not known before.
    New,
}

impl Change {
    fn between(before: &[Remote], after: &[Remote], others: &[Remote]) -> Self {
        if before == after {
            Self::None
        } else if after.iter().all(|remote| before.contains(remote) || others.contains(remote)) {
            Self::Gone
        } else {
            Self::New
        }
    }
}

/// All known addresses of one peer.
#[derive(Debug, Clone, Default)]
pub struct Remotes {
    announced: Vec<Remote>,
    called: Vec<Remote>,
    observed: Vec<(SocketAddr, Instant)>,
}

impl Remotes {
    /// The candidates of the peer's record.
    pub fn announce(&mut self, candidates: &[Candidate]) -> Change {
        if usable(candidates).eq(self.announced.iter().copied()) {
            return Change::None;
        }
        let announced: Vec<Remote> = usable(candidates).collect();
        let change = Change::between(&self.announced, &announced, &self.called);
        self.announced = announced;
        change
    }

    /// The candidates of the peer's last call, fresher than those of its record.
    pub fn call(&mut self, candidates: &[Candidate]) -> Change {
        let called: Vec<Remote> = usable(candidates).collect();
        let change = Change::between(&self.called, &called, &self.announced);
        self.called = called;
        change
    }

    /// An authentic probe or packet came from this address. True when it was not known. The one that was silent the longest
    /// makes room, but never `kept`.
    pub fn observe(&mut self, at: SocketAddr, kept: Option<SocketAddr>, now: Instant) -> bool {
        if self.announced.iter().chain(&self.called).any(|remote| remote.addr == at) {
            return false;
        }
        if let Some((_, seen)) = self.observed.iter_mut().find(|(addr, _)| *addr == at) {
            *seen = now;
            return false;
        }
        if self.observed.len() >= MAX_PEER_REFLEXIVE {
            let oldest = self.observed.iter().filter(|(addr, _)| Some(*addr) != kept).min_by_key(|(_, seen)| *seen);
            let oldest = oldest.map(|(addr, _)| *addr);
            self.observed.retain(|(addr, _)| Some(*addr) != oldest);
        }
        self.observed.push((at, now));
        true
    }

    /// Every address once, best first: called, announced, observed. At most [`MAX_CANDIDATES`] and the observed ones.
    pub fn all(&self) -> Vec<Remote> {
        let mut all: Vec<Remote> = Vec::with_capacity(MAX_CANDIDATES + MAX_PEER_REFLEXIVE);
        for remote in self.called.iter().chain(&self.announced) {
            if all.len() < MAX_CANDIDATES && !all.iter().any(|known| known.addr == remote.addr) {
                all.push(*remote);
            }
        }
        for (addr, _) in &self.observed {
            if !all.iter().any(|known| known.addr == *addr) {
                all.push(Remote { kind: RemoteKind::PeerReflexive, addr: *addr });
            }
        }
        all
    }

    pub fn kind_of(&self, at: SocketAddr) -> Option<RemoteKind> {
        let told = self.called.iter().chain(&self.announced).find(|remote| remote.addr == at);
        let is_observed = || self.observed.iter().any(|(addr, _)| *addr == at);
        told.map(|remote| remote.kind).or_else(|| is_observed().then_some(RemoteKind::PeerReflexive))
    }
}

fn usable(candidates: &[Candidate]) -> impl Iterator<Item = Remote> {
    let usable =
        candidates.iter().filter(|candidate| candidate.addr.port() != 0 && addr::is_routable(candidate.addr.ip()));
    usable.take(MAX_CANDIDATES).map(|candidate| Remote { kind: candidate.kind.into(), addr: candidate.addr })
}
