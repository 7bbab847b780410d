//! What must hold in every run, judged from outside the agents: from packets, steps and frames, by keys and addresses that
//! the simulator itself gave out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use mesh_common::id::NodeId;
use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;
use mesh_proto::device::Action;
use mesh_proto::mesh::members::Members;

use crate::host::Host;
use crate::packet::{Kind, Packet};

/// Which address of the other host a ping is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Road {
    OverlayV6,
    OverlayV4,
    Pod,
}

impl Road {
    pub const ALL: [Self; 3] = [Self::OverlayV6, Self::OverlayV4, Self::Pod];

    /// The address of this host on this road.
    pub fn address(self, host: &Host) -> Option<IpAddr> {
        match self {
            Self::OverlayV6 => Some(IpAddr::V6(host.overlay_v6())),
            Self::OverlayV4 => host.overlay_v4().map(IpAddr::V4),
            Self::Pod => host.pod(),
        }
    }
}

/// A broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// An inner packet came out of a peer's tunnel with a source that is not that peer's.
    ForeignSource { at: usize, packet: String },
    /// A frame older than one that was accepted before stands at this host.
    Rollback { at: usize, node: NodeId, mark: u64, seq: u64 },
    /// A key that is no admitted member's was to be a peer.
    Unadmitted { at: usize, key: WgPublicKey },
    /// A packet to a mesh address took the underlay.
    Leak { at: usize, to: usize, road: Road },
    /// A host that left still holds something of ours.
    NotClean { at: usize },
    /// What should be true 30 s after the last fault and is not.
    NotConverged(Vec<String>),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

#[derive(Debug, Default)]
pub struct Model {
    members: BTreeSet<WgPublicKey>,
    /// Highest sequence number that each host ever held of each node.
    marks: Vec<BTreeMap<NodeId, u64>>,
    /// Hosts whose addresses must not leave by the underlay of this host.
    guarded: Vec<BTreeSet<usize>>,
    /// Damage from outside may leak until then.
    excused: Vec<Instant>,
    ever_left: BTreeSet<usize>,
    leaving: BTreeSet<usize>,
    /// Who had an answer of whom by which road since [`Self::count_from`].
    answered: BTreeSet<(usize, usize, Road)>,
    count_from: Instant,
    pub violations: Vec<(Instant, Violation)>,
    pub delivered: u64,
}

impl Model {
    /// `members`: the keys of all nodes that hold the cluster's secret.
    pub fn new(members: BTreeSet<WgPublicKey>, hosts: usize, count_from: Instant) -> Self {
        Self {
            members,
            marks: vec![BTreeMap::new(); hosts],
            guarded: vec![BTreeSet::new(); hosts],
            excused: vec![Instant::ORIGIN; hosts],
            count_from,
            ..Self::default()
        }
    }

    pub fn check_steps(&mut self, at: usize, actions: &[Action], now: Instant) {
        for action in actions {
            if let Action::SetPeer(key, _) = action
                && !self.members.contains(key)
            {
                self.break_rule(now, Violation::Unadmitted { at, key: *key });
            }
        }
    }

    pub fn check_members(&mut self, at: usize, members: &Members, now: Instant) {
        let mut broken = Vec::new();
        for (node, member) in members.iter() {
            let seq = member.frame.seq();
            let mark = self.marks[at].entry(*node).or_default();
            if seq < *mark {
                broken.push(Violation::Rollback { at, node: *node, mark: *mark, seq });
            }
            *mark = seq.max(*mark);
        }
        for violation in broken {
            self.break_rule(now, violation);
        }
    }

    /// The host carried out all steps while these hosts were members for it.
    pub fn note_applied(&mut self, at: usize, members: &BTreeSet<usize>) {
        if self.leaving.contains(&at) {
            return;
        }
        let staying = members.iter().copied().filter(|member| !self.ever_left.contains(member));
        self.guarded[at].extend(staying);
    }

    /// The host says farewell: its prefixes may be anybody's.
    pub fn note_leaving(&mut self, host: usize) {
        self.ever_left.insert(host);
        self.leaving.insert(host);
        self.guarded[host].clear();
        for guarded in &mut self.guarded {
            guarded.remove(&host);
        }
    }

    pub fn note_started(&mut self, host: usize) {
        self.leaving.remove(&host);
    }

    pub fn excuse_leaks(&mut self, at: usize, until: Instant) {
        self.excused[at] = self.excused[at].max(until);
    }

    /// A packet of an application at `at` for this host took the underlay.
    pub fn check_underlay(&mut self, at: usize, to: usize, road: Road, now: Instant) {
        let guarded = road != Road::OverlayV4 && self.guarded[at].contains(&to);
        if guarded && now >= self.excused[at] {
            self.break_rule(now, Violation::Leak { at, to, road });
        }
    }

    /// An inner packet came out of the tunnel of `key` at `at`.
    pub fn check_delivery(&mut self, at: usize, key: &WgPublicKey, packet: &Packet, hosts: &[Host], now: Instant) {
        self.delivered += 1;
        let sender = hosts.get(usize::from(packet.body.from));
        // Who is not a forger writes the address it holds at that moment, so the true sender decides.
        let is_theirs = packet.body.kind != Kind::Forged && sender.is_some_and(|sender| sender.key() == *key);
        if !is_theirs {
            let packet = format!("{packet:?}");
            self.break_rule(now, Violation::ForeignSource { at, packet });
        }
    }

    pub fn note_answer(&mut self, at: usize, from: usize, road: Road, sent: Instant) {
        if sent >= self.count_from {
            self.answered.insert((at, from, road));
        }
    }

    pub fn has_answer(&self, at: usize, from: usize, road: Road) -> bool {
        self.answered.contains(&(at, from, road))
    }

    pub fn break_rule(&mut self, now: Instant, violation: Violation) {
        // One run with a broken rule breaks it often.
        if self.violations.len() < 100 || matches!(violation, Violation::NotConverged(_)) {
            self.violations.push((now, violation));
        }
    }
}

/// What is not as it should be at the end; empty when all is.
pub fn unsettled(hosts: &[Host], model: &Model, contested: &BTreeSet<ipnet::IpNet>, now: Instant) -> Vec<String> {
    let mut problems = Vec::new();
    let mut silent = 0;
    for a in 0..hosts.len() {
        for b in (0..hosts.len()).filter(|b| *b != a) {
            for road in Road::ALL {
                if !model.has_answer(a, b, road) {
                    silent += 1;
                    if silent <= 8 {
                        let path = hosts[a].agent.as_ref().and_then(|agent| {
                            let view = agent.view(now);
                            let peer = view.peers.into_iter().find(|peer| peer.key == hosts[b].key());
                            peer.map(|peer| format!("{:?} {:?}", peer.state, peer.candidates))
                        });
                        problems.push(format!("{a} had no answer of {b} by {road:?}: {path:?}"));
                    }
                }
            }
        }
    }
    if silent > 8 {
        problems.push(format!("{silent} pairs and roads in all"));
    }
    let mut v4 = BTreeMap::new();
    for (index, host) in hosts.iter().enumerate() {
        match host.agent.as_ref().map(|agent| agent.overlay_v4()) {
            Some(Some(addr)) => {
                if let Some(other) = v4.insert(addr, index) {
                    problems.push(format!("{other} and {index} both hold {addr}"));
                }
            }
            _ => problems.push(format!("{index} has no overlay IPv4 address")),
        }
    }
    let everybody: BTreeSet<NodeId> = hosts.iter().map(Host::node).collect();
    let mut owners: BTreeMap<ipnet::IpNet, BTreeMap<NodeId, usize>> = BTreeMap::new();
    for (index, host) in hosts.iter().enumerate() {
        let Some(agent) = &host.agent else { continue };
        let mut known: BTreeSet<NodeId> = agent.members().iter().map(|(node, _)| *node).collect();
        known.insert(host.node());
        if known != everybody {
            problems.push(format!("{index} knows {} of {} members", known.len(), everybody.len()));
        }
        problems.extend(unsettled_host(index, host, agent, now));
        let view = agent.view(now);
        for prefix in contested {
            if let Some(owner) = owner(host, &view, prefix) {
                owners.entry(*prefix).or_default().insert(owner, index);
            }
        }
    }
    for (prefix, owners) in owners {
        if owners.len() > 1 {
            problems.push(format!("{prefix} has several owners: {owners:?}"));
        }
    }
    problems
}

/// The host holds what its agent wants and nothing else.
fn unsettled_host(index: usize, host: &Host, agent: &mesh_proto::mesh::agent::Agent, now: Instant) -> Option<String> {
    use mesh_proto::device::{Family, RouteKind};
    let view = agent.view(now);
    if view.clone_seen {
        return Some(format!("{index} takes a run of its own for a clone"));
    }
    let failed = view.failed_steps;
    if !failed.is_empty() {
        return Some(format!("{index} has failed steps: {failed:?}"));
    }
    if host.kernel.link.is_none() {
        return Some(format!("{index} has no mesh interface"));
    }
    if host.kernel.rules != BTreeSet::from(Family::ALL) {
        return Some(format!("{index} lacks a rule"));
    }
    let is_foreign = |kind: &RouteKind| matches!(kind, RouteKind::Foreign { .. });
    let foreign = host.kernel.routes.iter().find(|route| is_foreign(&route.kind));
    foreign.map(|route| format!("{index} has a foreign route {}", route.prefix))
}

/// Who owns a prefix as this host sees it. `None` when it has its own reasons not to route it.
pub fn owner(host: &Host, view: &mesh_proto::mesh::agent::View, prefix: &ipnet::IpNet) -> Option<NodeId> {
    use mesh_proto::mesh::peer::Verdict;
    let verdicts = view.peers.iter().flat_map(|peer| {
        let verdicts = peer.prefixes.iter().filter(|(announced, _)| announced == prefix);
        verdicts.map(move |(_, verdict)| (peer.node, verdict))
    });
    for (node, verdict) in verdicts {
        match verdict {
            Verdict::Routed => return node,
            Verdict::OwnedBy(owner) => return Some(*owner),
            _ => {}
        }
    }
    let own = &host.plan.settings.prefixes;
    own.contains(prefix).then(|| host.node())
}
