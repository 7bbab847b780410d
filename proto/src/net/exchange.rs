//! One STUN request, sent again until it is answered or given up.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::time::Instant;

use crate::wire::stun::{self, Change};

/// Pauses after each sending; after the last one the question is given up. An honest server that is a second away is too far
/// to tell anything in time, and with every fifth datagram lost each way one question of 500 stays open.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(80),
    Duration::from_millis(120),
    Duration::from_millis(160),
    Duration::from_millis(200),
    Duration::from_millis(200),
    Duration::from_millis(200),
];

#[derive(Debug)]
pub(super) struct Exchange {
    to: SocketAddr,
    change: Change,
    /// Where the answer may come from; empty = anywhere, when the transaction alone is the proof.
    from: Vec<SocketAddr>,
    transaction: [u8; 12],
    sent: usize,
    /// `None` = over.
    next_at: Option<Instant>,
    mapped: Option<SocketAddr>,
}

impl Exchange {
    /// Asks `to`, first at `now`.
    pub(super) fn new(
        to: SocketAddr,
        change: Change,
        from: Vec<SocketAddr>,
        transaction: [u8; 12],
        now: Instant,
    ) -> Self {
        Self { to, change, from, transaction, sent: 0, next_at: Some(now), mapped: None }
    }

    pub(super) fn to(&self) -> SocketAddr {
        self.to
    }

    pub(super) fn is_over(&self) -> bool {
        self.next_at.is_none()
    }

    /// The answer.
    pub(super) fn mapped(&self) -> Option<SocketAddr> {
        self.mapped
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.next_at
    }

    /// What is to be sent now.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Option<(SocketAddr, Bytes)> {
        self.next_at.filter(|at| now >= *at)?;
        self.next_at = PAUSES.get(self.sent).map(|pause| now + *pause);
        self.next_at?;
        self.sent += 1;
        Some((self.to, stun::binding_request(&self.transaction, self.change).into()))
    }

    /// Whether this is the answer, or a copy of it. A late one counts as long as the question is remembered.
    pub(super) fn handle_answer(&mut self, source: SocketAddr, transaction: &[u8; 12], mapped: SocketAddr) -> bool {
        if *transaction != self.transaction || !(self.from.is_empty() || self.from.contains(&source)) {
            return false;
        }
        self.mapped.get_or_insert(mapped);
        self.next_at = None;
        true
    }
}
