//! What a server keeps: namespaces, in each one slot a node, and the order in which they changed.
//!
//! Owns slots, their lifetimes and the history that cursors point into. Refuses frames of unproven authors, older frames,
//! and more slots than the limit. Reads nothing of a frame but its header: the rest is sealed.
//!
//! # Invariants
//!
//! - Every change takes the next version of the server instance; a node stands in the history once, at its newest change.
//!   A reader is one [`Watcher`], so a slow one costs nothing and skips to the newest state of each node.
//! - `floor` is the newest change the history no longer holds: an older cursor starts over.
//! - A slot lives while a session of its node lives, then for the TTL. A tombstone stays for [`TOMBSTONE_TTL`] whoever is
//!   connected, so that no older frame comes back. What ended is a marker for readers that still list it; markers and
//!   tombstones are bounded by the number of slots, the oldest goes first.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::{Namespace, NodeId};
use mesh_common::limits::TOMBSTONE_TTL;
use mesh_common::time::Instant;

use super::limits::{EMPTY_NAMESPACE_TTL, PutBudget};
use crate::wire::frame::{Frame, Kind};
use crate::wire::session::Cursor;

#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Random per start: a cursor of another instance starts over.
    pub instance: u64,
    pub slot_ttl: Duration,
    pub max_namespaces: usize,
    pub max_slots_per_namespace: usize,
    /// Bytes of all stored frames together.
    pub max_stored_bytes: usize,
}

#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    /// The newest version given out.
    version: u64,
    spaces: BTreeMap<Namespace, Space>,
    /// Ends of slots (`Some`) and of empty namespaces (`None`).
    deadlines: BTreeSet<(Instant, Namespace, Option<NodeId>)>,
    slots: usize,
    stored_bytes: usize,
}

/// How a put ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// Readers have news.
    Changed,
    /// The same bytes are stored already.
    Unchanged,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PutError {
    #[error("the author has no session in this namespace")]
    NoSession,
    #[error("the node published too often; again in {0:?}")]
    RateLimited(Duration),
    #[error("a frame with this or a higher sequence number is stored")]
    Stale,
    #[error("the node did not sign this frame")]
    Signature,
    #[error("all slots of the namespace are taken")]
    Full,
    #[error("the memory for frames is used up")]
    Memory,
}

/// The server keeps no more namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("all namespaces of the server are taken")]
pub struct TooManyNamespaces;

/// A reader of one namespace: a point in its history.
#[derive(Debug, Clone)]
pub struct Watcher {
    position: u64,
    /// The snapshot goes up to here: markers of ended slots before it are of no interest.
    snapshot_end: u64,
    restart: bool,
    synced: bool,
}

/// What a reader is told next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// All before is void, a snapshot follows.
    Restart,
    Frame(Bytes),
    Gone(NodeId),
    /// All up to here was told.
    Synced(Cursor),
}

/// What time changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Expired {
    /// Readers of these have news.
    pub changed: BTreeSet<Namespace>,
    pub freed: BTreeSet<Namespace>,
}

#[derive(Debug)]
struct Space {
    nodes: BTreeMap<NodeId, Node>,
    /// Version to node, one entry for each node that has content.
    history: BTreeMap<u64, NodeId>,
    floor: u64,
    head: u64,
    sessions: usize,
    records: usize,
    /// Versions of tombstones and of markers, the oldest first.
    tombstones: BTreeSet<u64>,
    gone: BTreeSet<u64>,
    freed_at: Option<Instant>,
}

/// A node with a session or with content.
#[derive(Debug)]
struct Node {
    sessions: u32,
    puts: PutBudget,
    content: Content,
    /// Of the newest change; meaningless without content.
    version: u64,
    ends: Option<Instant>,
}

#[derive(Debug)]
enum Content {
    Nothing,
    Record(Frame),
    Tombstone(Frame),
    Gone,
}

impl Store {
    pub fn new(config: StoreConfig) -> Self {
        Self { config, version: 0, spaces: BTreeMap::new(), deadlines: BTreeSet::new(), slots: 0, stored_bytes: 0 }
    }

    pub fn namespaces(&self) -> usize {
        self.spaces.len()
    }

    pub fn has_namespace(&self, namespace: &Namespace) -> bool {
        self.spaces.contains_key(namespace)
    }

    /// Records stored, tombstones not counted.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Bytes of all frames stored, tombstones too.
    pub fn stored_bytes(&self) -> usize {
        self.stored_bytes
    }

    /// Sessions of one node.
    pub fn sessions(&self, namespace: &Namespace, node: &NodeId) -> u32 {
        self.spaces.get(namespace).and_then(|space| space.nodes.get(node)).map_or(0, |node| node.sessions)
    }

    /// A session of this node began; opens the namespace where needed.
    pub fn attach(&mut self, namespace: Namespace, node: NodeId, now: Instant) -> Result<(), TooManyNamespaces> {
        if !self.spaces.contains_key(&namespace) {
            if self.spaces.len() >= self.config.max_namespaces {
                return Err(TooManyNamespaces);
            }
            self.spaces.insert(namespace, Space::new(self.version));
        }
        let space = self.spaces.get_mut(&namespace).expect("made above");
        space.sessions += 1;
        let entry = space.nodes.entry(node).or_insert_with(|| Node::new(now));
        entry.sessions += 1;
        if matches!(entry.content, Content::Record(_))
            && let Some(ends) = entry.ends.take()
        {
            self.deadlines.remove(&(ends, namespace, Some(node)));
        }
        self.update_emptiness(namespace, now);
        Ok(())
    }

    /// A session of this node ended; paired with [`Self::attach`]. The last one starts the slot's TTL.
    pub fn detach(&mut self, namespace: Namespace, node: NodeId, now: Instant) {
        let Some(space) = self.spaces.get_mut(&namespace) else { return };
        let Some(entry) = space.nodes.get_mut(&node).filter(|entry| entry.sessions > 0) else { return };
        space.sessions -= 1;
        entry.sessions -= 1;
        if entry.sessions == 0 {
            match entry.content {
                Content::Record(_) => {
                    let ends = now + self.config.slot_ttl;
                    entry.ends = Some(ends);
                    self.deadlines.insert((ends, namespace, Some(node)));
                }
                Content::Nothing => {
                    space.nodes.remove(&node);
                }
                Content::Tombstone(_) | Content::Gone => {}
            }
        }
        self.update_emptiness(namespace, now);
    }

    /// Stores a node's own frame. Checks, cheap first: session, equal bytes, rate, sequence number, signature, room.
    pub fn put(&mut self, frame: &Frame, now: Instant) -> Result<Put, PutError> {
        let (namespace, node) = (frame.namespace(), frame.node());
        let max_slots = self.config.max_slots_per_namespace;
        let is_memory_full = self.stored_bytes + frame.as_bytes().len() > self.config.max_stored_bytes;
        let space = self.spaces.get_mut(&namespace).ok_or(PutError::NoSession)?;
        let full = space.records >= max_slots;
        let entry = space.nodes.get_mut(&node).filter(|entry| entry.sessions > 0).ok_or(PutError::NoSession)?;
        let stored = entry.content.frame();
        if stored.is_some_and(|stored| stored.as_bytes() == frame.as_bytes()) {
            return Ok(Put::Unchanged);
        }
        let stored_seq = stored.map(Frame::seq);
        entry.puts.take(now).map_err(PutError::RateLimited)?;
        if stored_seq.is_some_and(|stored| frame.seq() <= stored) {
            return Err(PutError::Stale);
        }
        if !frame.verify() {
            return Err(PutError::Signature);
        }
        if is_memory_full && stored_seq.is_none() {
            return Err(PutError::Memory);
        }
        match frame.kind() {
            Kind::Record => {
                if full && !matches!(entry.content, Content::Record(_)) {
                    return Err(PutError::Full);
                }
                self.change(namespace, node, Content::Record(frame.clone()), None);
            }
            Kind::Tombstone => {
                let ends = now + TOMBSTONE_TTL;
                self.change(namespace, node, Content::Tombstone(frame.clone()), Some(ends));
                self.bound_tombstones(namespace);
            }
        }
        self.update_emptiness(namespace, now);
        Ok(Put::Changed)
    }

    /// Follows a namespace from `cursor` on, or from the start when it is not one of this instance's history.
    pub fn watch(&self, namespace: &Namespace, cursor: Option<Cursor>) -> Watcher {
        let known = cursor.filter(|cursor| {
            cursor.server_instance == self.config.instance
                && self.spaces.get(namespace).is_some_and(|space| (space.floor..=space.head).contains(&cursor.version))
        });
        Watcher {
            position: known.map_or(0, |cursor| cursor.version),
            snapshot_end: 0,
            restart: known.is_none(),
            synced: false,
        }
    }

    /// What a reader has to be told next; what is superseded meanwhile is not. A node reads its own frames too: one that it
    /// did not make is of a clone.
    pub fn next(&self, namespace: &Namespace, watcher: &mut Watcher) -> Option<Change> {
        let space = self.spaces.get(namespace)?;
        if watcher.restart || watcher.position.max(watcher.snapshot_end) < space.floor {
            *watcher = Watcher { position: 0, snapshot_end: space.head, restart: false, synced: false };
            return Some(Change::Restart);
        }
        let news = space.history.range((Bound::Excluded(watcher.position), Bound::Unbounded));
        for (version, node) in news {
            watcher.position = *version;
            let change = match space.nodes.get(node).and_then(|entry| entry.content.frame()) {
                Some(frame) => Change::Frame(frame.as_bytes().clone()),
                None if *version <= watcher.snapshot_end => continue,
                None => Change::Gone(*node),
            };
            watcher.synced = false;
            return Some(change);
        }
        watcher.position = watcher.position.max(space.head);
        if watcher.synced {
            return None;
        }
        watcher.synced = true;
        Some(Change::Synced(Cursor { server_instance: self.config.instance, version: watcher.position }))
    }

    /// Ends what is due.
    pub fn handle_timeout(&mut self, now: Instant) -> Expired {
        let mut expired = Expired::default();
        while let Some((due, namespace, node)) = self.deadlines.first().copied() {
            if due > now {
                break;
            }
            self.deadlines.pop_first();
            match node {
                Some(node) => {
                    self.change(namespace, node, Content::Gone, None);
                    self.bound_gone(namespace);
                    self.update_emptiness(namespace, now);
                    expired.changed.insert(namespace);
                }
                None => {
                    self.spaces.remove(&namespace);
                    expired.freed.insert(namespace);
                }
            }
        }
        expired
    }

    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let (due, _, node) = self.deadlines.first()?;
        Some((*due, if node.is_some() { "the end of a slot" } else { "the end of an empty namespace" }))
    }

    /// Gives a node new content at the next version, and keeps every index and total right.
    fn change(&mut self, namespace: Namespace, node: NodeId, content: Content, ends: Option<Instant>) {
        let space = self.spaces.get_mut(&namespace).expect("content belongs to an open namespace");
        let entry = space.nodes.get_mut(&node).expect("content belongs to a known node");
        match &entry.content {
            Content::Nothing => {}
            Content::Record(frame) => {
                space.records -= 1;
                self.slots -= 1;
                self.stored_bytes -= frame.as_bytes().len();
            }
            Content::Tombstone(frame) => {
                space.tombstones.remove(&entry.version);
                self.stored_bytes -= frame.as_bytes().len();
            }
            Content::Gone => {
                space.gone.remove(&entry.version);
            }
        }
        space.history.remove(&entry.version);
        self.version += 1;
        match &content {
            Content::Nothing => unreachable!("only the bound on markers takes content away"),
            Content::Record(frame) => {
                space.records += 1;
                self.slots += 1;
                self.stored_bytes += frame.as_bytes().len();
            }
            Content::Tombstone(frame) => {
                space.tombstones.insert(self.version);
                self.stored_bytes += frame.as_bytes().len();
            }
            Content::Gone => {
                space.gone.insert(self.version);
            }
        }
        space.history.insert(self.version, node);
        space.head = self.version;
        entry.version = self.version;
        entry.content = content;
        if let Some(old) = std::mem::replace(&mut entry.ends, ends) {
            self.deadlines.remove(&(old, namespace, Some(node)));
        }
        if let Some(ends) = ends {
            self.deadlines.insert((ends, namespace, Some(node)));
        }
    }

    fn bound_tombstones(&mut self, namespace: Namespace) {
        let space = self.spaces.get(&namespace).expect("called after a change in it");
        if space.tombstones.len() <= self.config.max_slots_per_namespace {
            return;
        }
        let oldest = space.tombstones.first().and_then(|version| space.history.get(version)).copied();
        self.change(namespace, oldest.expect("a tombstone stands in the history"), Content::Gone, None);
        self.bound_gone(namespace);
    }

    fn bound_gone(&mut self, namespace: Namespace) {
        let space = self.spaces.get_mut(&namespace).expect("called after a change in it");
        while space.gone.len() > self.config.max_slots_per_namespace {
            let version = space.gone.pop_first().expect("there is more than none");
            let node = space.history.remove(&version).expect("a marker stands in the history");
            space.floor = version;
            let entry = space.nodes.get_mut(&node).expect("a node in the history has content");
            entry.content = Content::Nothing;
            if entry.sessions == 0 {
                space.nodes.remove(&node);
            }
        }
    }

    fn update_emptiness(&mut self, namespace: Namespace, now: Instant) {
        let Some(space) = self.spaces.get_mut(&namespace) else { return };
        let empty = space.sessions == 0 && space.records == 0 && space.tombstones.is_empty();
        match (empty, space.freed_at) {
            (true, None) => {
                let freed_at = now + EMPTY_NAMESPACE_TTL;
                space.freed_at = Some(freed_at);
                self.deadlines.insert((freed_at, namespace, None));
            }
            (false, Some(freed_at)) => {
                space.freed_at = None;
                self.deadlines.remove(&(freed_at, namespace, None));
            }
            _ => {}
        }
    }
}

impl Space {
    /// `floor` is the newest version of the instance: a cursor into an earlier life of this namespace is below it, or has seen
    /// that life's end.
    fn new(floor: u64) -> Self {
        Self {
            nodes: BTreeMap::new(),
            history: BTreeMap::new(),
            floor,
            head: floor,
            sessions: 0,
            records: 0,
            tombstones: BTreeSet::new(),
            gone: BTreeSet::new(),
            freed_at: None,
        }
    }
}

impl Node {
    fn new(now: Instant) -> Self {
        Self { sessions: 0, puts: PutBudget::new(now), content: Content::Nothing, version: 0, ends: None }
    }
}

impl Content {
    fn frame(&self) -> Option<&Frame> {
        match self {
            Self::Record(frame) | Self::Tombstone(frame) => Some(frame),
            Self::Nothing | Self::Gone => None,
        }
    }
}

#[cfg(test)]
mod tests;
