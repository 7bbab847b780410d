//! The paths of all peers, and which of them have something to do.
//!
//! A node with a thousand peers hears of one at a time: what is due next, and who guesses ports or wants to, is kept beside
//! the paths and brought up to date after each input to one of them, so that no input costs a look at all the others.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;

use crate::path::agent::{PathAgent, PathEvent, ProbeTransmit};

#[derive(Debug, Default)]
pub(super) struct PathTable {
    rows: BTreeMap<WgPublicKey, Row>,
    deadlines: BTreeSet<(Instant, WgPublicKey)>,
    /// Those with [`PathAgent::may_guess_soon`].
    guessers: BTreeSet<WgPublicKey>,
}

#[derive(Debug)]
struct Row {
    path: PathAgent,
    /// As in `deadlines`, and what for.
    due: Option<(Instant, &'static str)>,
}

impl PathTable {
    pub(super) fn get(&self, key: &WgPublicKey) -> Option<&PathAgent> {
        self.rows.get(key).map(|row| &row.path)
    }

    pub(super) fn contains_key(&self, key: &WgPublicKey) -> bool {
        self.rows.contains_key(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &WgPublicKey> {
        self.rows.keys()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&WgPublicKey, &PathAgent)> {
        self.rows.iter().map(|(key, row)| (key, &row.path))
    }

    /// Puts a new path in where there is none. True when it did.
    pub(super) fn add(&mut self, key: WgPublicKey, new: impl FnOnce() -> PathAgent) -> bool {
        let Entry::Vacant(vacant) = self.rows.entry(key) else { return false };
        vacant.insert(Row { path: new(), due: None });
        self.with(&key, |_| ());
        true
    }

    /// An input to one path; `None` when there is no such path.
    pub(super) fn with<T>(&mut self, key: &WgPublicKey, input: impl FnOnce(&mut PathAgent) -> T) -> Option<T> {
        let row = self.rows.get_mut(key)?;
        let output = input(&mut row.path);
        let due = row.path.poll_timeout();
        if due != row.due {
            let at = |due: Option<(Instant, &'static str)>| due.map(|(at, _)| (at, *key));
            if at(due) != at(row.due) {
                row.due.take().map(|(at, _)| self.deadlines.remove(&(at, *key)));
                self.deadlines.extend(at(due));
            }
            row.due = due;
        }
        if row.path.may_guess_soon() {
            self.guessers.insert(*key);
        } else if !self.guessers.is_empty() {
            self.guessers.remove(key);
        }
        Some(output)
    }

    /// An input to every path.
    pub(super) fn with_each(&mut self, mut input: impl FnMut(&WgPublicKey, &mut PathAgent)) {
        let keys: Vec<WgPublicKey> = self.rows.keys().copied().collect();
        for key in keys {
            self.with(&key, |path| input(&key, path));
        }
    }

    pub(super) fn retain(&mut self, mut is_kept: impl FnMut(&WgPublicKey, &PathAgent) -> bool) {
        let (deadlines, guessers) = (&mut self.deadlines, &mut self.guessers);
        self.rows.retain(|key, row| {
            let is_kept = is_kept(key, &row.path);
            if !is_kept {
                guessers.remove(key);
                row.due.map(|(at, _)| deadlines.remove(&(at, *key)));
            }
            is_kept
        });
    }

    /// Whose time has come.
    pub(super) fn due(&self, now: Instant) -> Vec<WgPublicKey> {
        self.deadlines.iter().take_while(|(at, _)| *at <= now).map(|(_, key)| *key).collect()
    }

    pub(super) fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let (_, key) = self.deadlines.first()?;
        self.rows.get(key)?.due
    }

    /// Paths that guess ports, hold sockets to guess with, or may want to guess without another input.
    pub(super) fn guessers(&self) -> impl Iterator<Item = (&WgPublicKey, &PathAgent)> {
        self.guessers.iter().filter_map(|key| Some((key, self.get(key)?)))
    }

    pub(super) fn poll_event(&mut self, key: &WgPublicKey) -> Option<PathEvent> {
        self.rows.get_mut(key)?.path.poll_event()
    }

    pub(super) fn poll_transmit(&mut self, key: &WgPublicKey) -> Option<ProbeTransmit> {
        self.rows.get_mut(key)?.path.poll_transmit()
    }

    pub(super) fn poll_guess(&mut self, key: &WgPublicKey) -> Option<ProbeTransmit> {
        self.rows.get_mut(key)?.path.poll_guess()
    }
}
