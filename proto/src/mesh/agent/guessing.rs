//! Who of the peers may guess ports now, and the sockets that this takes.
//!
//! One pair at a time, whoever began it; and none while other paths hold as many sockets as a node keeps.

use std::collections::BTreeSet;

use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;

use super::{Agent, AgentEvent};
use crate::device::SocketId;
use crate::path::hard::{MAX_KEPT, Turn};

/// The turn of this path.
pub(super) fn turn_of(key: &WgPublicKey, (next, others): (Option<WgPublicKey>, Turn)) -> Turn {
    if Some(*key) == next { Turn::Own } else { others }
}

impl Agent {
    /// What came of [`AgentEvent::OpenSockets`]: fewer than asked for, or none, when the host has no room.
    pub fn handle_sockets(&mut self, peer: &WgPublicKey, sockets: &[SocketId], now: Instant) {
        if self.paths.contains_key(peer) {
            self.with_path(peer, now, |path| path.handle_sockets(sockets, now));
        } else if !sockets.is_empty() {
            self.events.push_back(AgentEvent::CloseSockets(sockets.to_vec()));
        }
        self.settle(now);
    }

    /// Gives the turn to the one that guesses or else to one that wants to, and sends what it has to send.
    pub(super) fn guess_ports(&mut self, now: Instant) {
        let busy = self.paths.guessers().find(|(_, path)| path.is_guessing()).map(|(key, _)| *key);
        let others = self.paths.guessers().filter(|(key, _)| Some(**key) != busy);
        let kept: usize = others.map(|(_, path)| path.sockets()).sum();
        let others = if busy.is_some() || kept >= MAX_KEPT { Turn::None } else { Turn::IfAsked };
        let wanting = || self.paths.guessers().find(|(_, path)| path.wants_to_guess(now)).map(|(key, _)| *key);
        let next = busy.or_else(|| wanting().filter(|_| others == Turn::IfAsked));
        let turns = (next, others);
        if std::mem::replace(&mut self.guessing_turns, turns) != turns {
            self.paths.with_each(|key, path| path.handle_guessing_turn(turn_of(key, turns), now));
        }
        let Some(next) = next else { return };
        self.stirred.insert(next);
        while let Some(guess) = self.paths.poll_guess(&next) {
            self.send_probe(&next, guess, now);
        }
    }

    /// Paths of nodes that are no peers any more go, and their sockets with them.
    pub(super) fn keep_paths(&mut self, is_kept: impl Fn(&WgPublicKey) -> bool, now: Instant) {
        let mut left = Vec::new();
        self.paths.retain(|key, path| {
            let is_kept = is_kept(key);
            if !is_kept && path.sockets() > 0 {
                left.push((*key, path.open_sockets().collect()));
            }
            is_kept
        });
        for (key, sockets) in left {
            self.leave_sockets(&key, sockets, now);
        }
    }

    /// The path of this peer needs these sockets no more: other paths may.
    pub(super) fn leave_sockets(&mut self, owner: &WgPublicKey, mut left: BTreeSet<SocketId>, now: Instant) {
        let others: Vec<WgPublicKey> = self.paths.keys().filter(|key| *key != owner).copied().collect();
        for key in others {
            let adopted = self.paths.with(&key, |path| path.adopt_sockets(&left, now)).unwrap_or_default();
            if !adopted.is_empty() {
                self.stirred.insert(key);
            }
            left.retain(|socket| !adopted.contains(socket));
        }
        if !left.is_empty() {
            self.events.push_back(AgentEvent::CloseSockets(left.into_iter().collect()));
        }
    }
}
