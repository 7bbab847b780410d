//! Who is a member: the one place where a frame becomes one.
//!
//! Snapshot, delta, cache file and peer all come through [`Members::admit`], so no road is checked less than another. The
//! set is a function of the frames seen, not of their order, number or road. What a server says about absence is a hint: a
//! member leaves by its signed farewell, or when nobody lists it and nothing came from it for as long as its record says.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use mesh_common::id::{NodeId, ServerId};
use mesh_common::key::{ClusterKeys, WgPublicKey};
use mesh_common::limits::{INCUMBENT_LIVE, MAX_MEMBERS};
use mesh_common::time::Instant;

use crate::sealed::{self, OpenError, Opened};
use crate::wire::frame::{Frame, ParseFrameError};
use crate::wire::record::Record;

#[derive(Debug, Clone)]
pub struct Member {
    pub record: Record,
    pub frame: Frame,
    /// When a record, a handshake or authentic traffic last spoke for it.
    pub last_evidence: Instant,
    /// Servers that list it, by what each last said.
    pub listed_by: BTreeSet<ServerId>,
}

impl Member {
    /// Whether it is there as far as anyone knows: listed, or heard of within a WireGuard session's life.
    pub fn is_live(&self, now: Instant) -> bool {
        !self.listed_by.is_empty() || now.since(self.last_evidence) < INCUMBENT_LIVE
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    New,
    /// A newer record; `restarted` when its agent is another process than before.
    Updated {
        restarted: bool,
    },
    /// The frame that is already known.
    Known,
    /// The known frame, from a server that did not list its node before; `is_first` when no server did.
    Listed {
        is_first: bool,
    },
    Left,
    /// A frame of our own identity with a number above all that we have used: somebody else made it.
    OwnIdentity {
        seq: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Rejection {
    #[error("it is no frame: {0}")]
    Shape(RejectedShape),
    #[error("it is older than what the node said before")]
    Stale,
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("its WireGuard key is another member's")]
    KeyTaken,
    #[error("the node is in denyNodes")]
    Denied,
    #[error("the cluster has more members than this version keeps")]
    TooMany,
}

/// [`ParseFrameError`] without its values, to count by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum RejectedShape {
    #[error("wrong length")]
    Length,
    #[error("wrong magic")]
    Magic,
    #[error("unknown suite or kind")]
    Unknown,
}

#[derive(Debug)]
pub struct Members {
    keys: ClusterKeys,
    cluster_id: String,
    own: NodeId,
    own_seq: u64,
    deny: BTreeSet<NodeId>,
    members: BTreeMap<NodeId, Member>,
    /// Who of the members has which WireGuard key.
    by_key: BTreeMap<WgPublicKey, NodeId>,
    /// The highest sequence number seen of each node, members or not: nothing older is ever admitted.
    marks: BTreeMap<NodeId, u64>,
    rejected: BTreeMap<Rejection, u64>,
}

impl Members {
    pub fn new(keys: ClusterKeys, cluster_id: String, own: NodeId, marks: BTreeMap<NodeId, u64>) -> Self {
        Self {
            keys,
            cluster_id,
            own,
            own_seq: 0,
            deny: BTreeSet::new(),
            members: BTreeMap::new(),
            by_key: BTreeMap::new(),
            marks,
            rejected: BTreeMap::new(),
        }
    }

    /// The newest sequence number this node has used itself.
    pub fn set_own_seq(&mut self, seq: u64) {
        self.own_seq = self.own_seq.max(seq);
    }

    /// Nodes that are refused from now on; members among them are removed.
    pub fn set_denied(&mut self, deny: BTreeSet<NodeId>) {
        for node in &deny {
            self.remove(node);
        }
        self.deny = deny;
    }

    /// Judges a frame that came from anywhere but a server's listing (cache, peer).
    pub fn admit(&mut self, bytes: Bytes, now: Instant) -> Result<(NodeId, Admission), Rejection> {
        let admission = self.judge(bytes, now);
        if let Err(rejection) = admission {
            *self.rejected.entry(rejection).or_default() += 1;
        }
        admission
    }

    /// Judges a frame from a server and notes that the server lists its node.
    pub fn admit_listed(
        &mut self,
        bytes: Bytes,
        server: ServerId,
        now: Instant,
    ) -> Result<(NodeId, Admission), Rejection> {
        let (node, admission) = self.admit(bytes, now)?;
        let Some(member) = self.members.get_mut(&node) else { return Ok((node, admission)) };
        let is_first = member.listed_by.is_empty();
        let is_news = member.listed_by.insert(server) && admission == Admission::Known;
        Ok((node, if is_news { Admission::Listed { is_first } } else { admission }))
    }

    /// The whole listing of one server; members it does not list keep standing. Whether it changed who lists whom.
    pub fn set_listing(&mut self, server: ServerId, listed: &BTreeSet<NodeId>) -> bool {
        let mut changed = false;
        for (node, member) in &mut self.members {
            changed |=
                if listed.contains(node) { member.listed_by.insert(server) } else { member.listed_by.remove(&server) };
        }
        changed
    }

    /// Servers from this place on are configured no longer: what they listed counts no longer.
    pub fn forget_servers_from(&mut self, first: ServerId) {
        for member in self.members.values_mut() {
            member.listed_by.retain(|server| *server < first);
        }
    }

    /// A server stopped listing a node.
    pub fn unlist(&mut self, server: ServerId, node: &NodeId) {
        if let Some(member) = self.members.get_mut(node) {
            member.listed_by.remove(&server);
        }
    }

    /// A handshake or authentic traffic spoke for the owner of this key.
    pub fn note_evidence(&mut self, key: &WgPublicKey, now: Instant) {
        let node = self.by_key.get(key);
        if let Some(member) = node.and_then(|node| self.members.get_mut(node)) {
            member.last_evidence = now;
        }
    }

    /// Removes members that nobody lists and that were silent for as long as their records say. `connected` servers'
    /// listings count; what a server said before it was lost does not keep a member for ever.
    pub fn expire(&mut self, connected: &BTreeSet<ServerId>, now: Instant) -> Vec<NodeId> {
        let is_expired = |member: &Member| {
            member.listed_by.is_disjoint(connected) && now.since(member.last_evidence) >= member.record.valid_for
        };
        let expired: Vec<_> =
            self.members.iter().filter(|(_, member)| is_expired(member)).map(|(node, _)| *node).collect();
        for node in &expired {
            self.remove(node);
        }
        expired
    }

    /// The earliest time at which [`Self::expire`] could remove someone.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.members.values().map(|member| member.last_evidence + member.record.valid_for).min()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.members.iter()
    }

    pub fn get(&self, node: &NodeId) -> Option<&Member> {
        self.members.get(node)
    }

    pub fn marks(&self) -> &BTreeMap<NodeId, u64> {
        &self.marks
    }

    /// Refused frames by reason.
    pub fn rejected(&self) -> &BTreeMap<Rejection, u64> {
        &self.rejected
    }

    fn judge(&mut self, bytes: Bytes, now: Instant) -> Result<(NodeId, Admission), Rejection> {
        let frame = Frame::parse(bytes).map_err(|error| Rejection::Shape(error.into()))?;
        let node = frame.node();
        if let Some(known) = self.members.get(&node)
            && known.frame == frame
        {
            return Ok((node, Admission::Known));
        }
        if frame.namespace() != self.keys.namespace {
            return Err(OpenError::ForeignNamespace.into());
        }
        if node == self.own {
            return self.judge_own(&frame);
        }
        if self.marks.get(&node).is_some_and(|mark| *mark > frame.seq()) {
            return Err(Rejection::Stale);
        }
        if self.deny.contains(&node) {
            return Err(Rejection::Denied);
        }
        let opened = sealed::open(&self.keys, &self.cluster_id, &frame)?;
        let Opened::Record(record) = opened else {
            let is_news = self.remove(&node).is_some() || self.marks.get(&node) != Some(&frame.seq());
            self.mark(node, frame.seq());
            return Ok((node, if is_news { Admission::Left } else { Admission::Known }));
        };
        // A frame at the mark is the member's own, seen before a restart of ours; a member that is there has that frame.
        if self.members.get(&node).is_some_and(|known| known.frame.seq() >= frame.seq()) {
            return Err(Rejection::Stale);
        }
        // Only nodes that share a seed can both prove one key; the smaller id keeps it, whoever came first.
        if let Some(holder) = self.by_key.get(&record.wg_key).copied().filter(|holder| *holder != node) {
            if holder < node {
                return Err(Rejection::KeyTaken);
            }
            self.remove(&holder);
        }
        if !self.members.contains_key(&node) && self.members.len() >= MAX_MEMBERS {
            return Err(Rejection::TooMany);
        }
        self.mark(node, frame.seq());
        let previous = self.remove(&node);
        let admission = match &previous {
            None => Admission::New,
            Some(previous) => Admission::Updated { restarted: previous.record.instance != record.instance },
        };
        let listed_by = previous.map(|previous| previous.listed_by).unwrap_or_default();
        self.by_key.insert(record.wg_key, node);
        self.members.insert(node, Member { record: *record, frame, last_evidence: now, listed_by });
        Ok((node, admission))
    }

    fn remove(&mut self, node: &NodeId) -> Option<Member> {
        let member = self.members.remove(node)?;
        self.by_key.remove(&member.record.wg_key);
        Some(member)
    }

    fn judge_own(&self, frame: &Frame) -> Result<(NodeId, Admission), Rejection> {
        if frame.seq() <= self.own_seq {
            return Ok((self.own, Admission::Known));
        }
        sealed::open(&self.keys, &self.cluster_id, frame)?;
        Ok((self.own, Admission::OwnIdentity { seq: frame.seq() }))
    }

    /// Bounded: beyond four marks a member slot, those of nodes that left are given up, lowest number first.
    fn mark(&mut self, node: NodeId, seq: u64) {
        self.marks.insert(node, seq);
        if self.marks.len() > 4 * MAX_MEMBERS {
            let gone = self.marks.iter().filter(|(node, _)| !self.members.contains_key(node));
            if let Some(oldest) = gone.min_by_key(|(_, seq)| **seq).map(|(node, _)| *node) {
                self.marks.remove(&oldest);
            }
        }
    }
}

impl From<ParseFrameError> for RejectedShape {
    fn from(error: ParseFrameError) -> Self {
        match error {
            ParseFrameError::Length(_) => Self::Length,
            ParseFrameError::Magic => Self::Magic,
            ParseFrameError::Suite(_) | ParseFrameError::Kind(_) => Self::Unknown,
        }
    }
}
