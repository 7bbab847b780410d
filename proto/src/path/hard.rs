//! Hard NATs: one side's port differs for each destination, the other lets in only the very address and port it wrote to.
//!
//! Chance finds a path then. The side with the many ports opens [`SOCKETS`] sockets and writes to the other's one public port
//! from each; the other writes from its one socket to [`GUESSES`] ports of the first side's public address. Whatever pair of
//! ports both have written through is a path: 256 × 1024 out of 64512 give 98 %. The first datagrams of the many sockets die
//! on the way, as in [`round`](super::round): a NAT that is knocked at before its own side has written changes its port. In
//! the end they are sent once more with the usual time to live: behind two NATs the first ones opened only the inner one, and
//! what the other side has guessed by then is let in.
//!
//! Owns the decision to try, both schedules and which sockets are kept; an answer is then judged like any other probe.
//! Bounded: [`BATCH`] probes each [`PACE`], beside the node's budget; one peer at a time, which the node sees to by
//! [`PathAgent::handle_guessing_turn`]; once in [`AGAIN`] a peer; never two sides that both change their ports; only the public
//! address that the peer itself announces is written to.

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_common::nat::{Mapping, NatClass};
use mesh_common::time::Instant;

use crate::device::{Endpoint, Family, SocketId};
use crate::path::agent::{PathAgent, PathEvent, ProbeTransmit};
use crate::path::candidate::{Remote, RemoteKind};
use crate::path::round::OPENER_TTL;
use crate::wire::probe::{Call, Probe};

/// Sockets of the side whose NAT maps each of them to another port.
pub const SOCKETS: u16 = 256;
/// Ports that the other side writes to.
const GUESSES: u16 = 1024;
/// NATs give ports from here on.
const FIRST_PORT: u16 = 1024;
const PORTS: u32 = 65_536 - FIRST_PORT as u32;
/// Prime to [`PORTS`] and about 0.618 of it: whatever row of ports a NAT gives, guesses are spread evenly over it.
const STRIDE: u32 = 39_871;
/// 400 probes a second.
const PACE: Duration = Duration::from_millis(10);
const BATCH: usize = 4;
/// When the many sockets write once more: all guesses are out by then.
const SECOND_PASS: Duration = Duration::from_millis(2900);
/// Both schedules are over, and answers had their time.
const LASTS: Duration = Duration::from_millis(5500);
/// A direct path is wanted for this long: the usual probes had their chance.
const PATIENCE: Duration = Duration::from_secs(3);
const AGAIN: Duration = Duration::from_secs(600);
/// The peer did not want to, or did not hear it.
const ASK_AGAIN: Duration = Duration::from_secs(60);
/// When the peer is asked, and when it is given up.
const CALLS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(300), Duration::from_secs(1)];
const NO_ANSWER: Duration = Duration::from_secs(2);
/// A socket on which something came within this long may be the one that the peer chose.
const HEARD: Duration = Duration::from_secs(5);
/// Sockets that one peer keeps while both sides agree on one.
pub const MAX_KEPT: usize = 4;

#[derive(Debug, Default)]
pub(super) struct Guessing {
    turn: Turn,
    /// The peer was asked in vain: until then it is not asked again.
    asked_until: Option<Instant>,
    /// Ports were guessed: until then they are not again, whoever asks.
    rests_until: Option<Instant>,
    stage: Stage,
    /// Those that are open for this peer.
    sockets: BTreeSet<SocketId>,
    probes: VecDeque<ProbeTransmit>,
    last: Option<Outcome>,
}

/// One peer of a node guesses at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Turn {
    /// Others are at it.
    #[default]
    None,
    /// It may begin if the peer asks for it.
    IfAsked,
    Own,
}

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Idle,
    /// The peer is asked to begin together with us.
    Asking {
        since: Instant,
        calls: usize,
    },
    Running(Run),
}

#[derive(Debug)]
struct Run {
    began: Instant,
    next: Instant,
    sent: usize,
    role: Role,
    /// Where the row of guessed ports begins.
    first: u32,
}

/// What this side has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Write to this address from many sockets.
    ManySockets { to: SocketAddr },
    /// Write to many ports of this address.
    ManyPorts { at: IpAddr },
}

/// How the last try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Found,
    InVain { at: Instant },
    NoSockets { at: Instant },
}

impl PathAgent {
    pub fn handle_guessing_turn(&mut self, turn: Turn, now: Instant) {
        if self.guessing.turn == turn {
            return;
        }
        self.guessing.turn = turn;
        if turn == Turn::None {
            self.guessing.stage = Stage::Idle;
            self.guessing.probes.clear();
        }
        self.settle(now);
    }

    /// It would begin if it had its turn.
    pub fn wants_to_guess(&self, now: Instant) -> bool {
        self.guessing_begins().is_some_and(|at| now >= at) && self.may_want_to_guess(now)
    }

    /// It guesses, has sockets to guess with, or would begin by the passing of time alone.
    pub fn may_guess_soon(&self) -> bool {
        self.is_guessing() || self.sockets() > 0 || self.guessing_begins().is_some()
    }

    /// The sockets that [`PathEvent::OpenSockets`] asked for; none when the host has no room for them.
    pub fn handle_sockets(&mut self, sockets: &[SocketId], now: Instant) {
        self.guessing.sockets.extend(sockets);
        if sockets.is_empty() && matches!(self.guessing.stage, Stage::Running(_)) {
            self.end_guessing(Outcome::NoSockets { at: now });
        }
        self.settle(now);
    }

    /// It has its turn and uses it.
    pub fn is_guessing(&self) -> bool {
        !matches!(self.guessing.stage, Stage::Idle)
    }

    /// How many sockets of its own this peer's path has.
    pub fn sockets(&self) -> usize {
        self.guessing.sockets.len()
    }

    pub fn open_sockets(&self) -> impl Iterator<Item = SocketId> {
        self.guessing.sockets.iter().copied()
    }

    /// Another path opened these sockets and needs them no more: gives those that became this one's own since it needs them.
    ///
    /// A NAT that filters nothing lets a peer in by a socket that was opened for its neighbour at the same public address.
    pub fn adopt_sockets(&mut self, left: &BTreeSet<SocketId>, now: Instant) -> BTreeSet<SocketId> {
        let adopted = self.needed(left, now);
        if !adopted.is_empty() {
            self.guessing.sockets.extend(&adopted);
            self.settle(now);
        }
        adopted
    }

    /// A probe of the guessing, which has a budget of its own.
    pub fn poll_guess(&mut self) -> Option<ProbeTransmit> {
        self.guessing.probes.pop_front()
    }

    /// What came of it, in words for people.
    pub(super) fn guessing_words(&self, now: Instant) -> Option<String> {
        let ago = |at: Instant| now.since(at).as_secs() / 60;
        match (&self.guessing.stage, self.guessing.last) {
            (Stage::Running(_), _) => Some("ports are being guessed now".to_owned()),
            (_, Some(Outcome::InVain { at })) => Some(format!("guessing ports found none {} min ago", ago(at))),
            (_, Some(Outcome::NoSockets { at })) => {
                Some(format!("this host had no room for sockets to guess ports with {} min ago", ago(at)))
            }
            (_, Some(Outcome::Found) | None) => None,
        }
    }

    /// The peer wants to begin, or answers that it has begun.
    pub(super) fn take_guessing_call(&mut self, from: Endpoint, call: &Call, now: Instant) {
        let Some(role) = self.guessing_role() else { return };
        let begins = match &self.guessing.stage {
            Stage::Idle => call.answer_wanted && self.may_guess(now),
            Stage::Asking { .. } => true,
            Stage::Running(_) => false,
        };
        if begins {
            self.begin_guessing(role, now);
        }
        if call.answer_wanted && matches!(self.guessing.stage, Stage::Running(_)) {
            self.call(from, Call { guess_ports: true, ..Call::default() });
        }
    }

    /// Does what is due: asks the peer, sends the next probes, ends.
    pub(super) fn guess(&mut self, now: Instant) {
        match &mut self.guessing.stage {
            Stage::Idle => {
                if self.guessing.turn == Turn::Own && self.wants_to_guess(now) {
                    self.guessing.stage = Stage::Asking { since: now, calls: 0 };
                    self.ask_to_guess(now);
                }
            }
            Stage::Asking { since, .. } => {
                if now.since(*since) >= NO_ANSWER || self.is_direct_trusted(now) {
                    self.guessing.asked_until = Some(now + ASK_AGAIN);
                    self.guessing.stage = Stage::Idle;
                } else {
                    self.ask_to_guess(now);
                }
            }
            Stage::Running(run) => {
                let is_over = now.since(run.began) >= LASTS;
                if self.is_direct_trusted(now) {
                    self.end_guessing(Outcome::Found);
                } else if is_over {
                    self.end_guessing(Outcome::InVain { at: now });
                } else {
                    self.send_guesses(now);
                }
            }
        }
        self.close_sockets(now);
    }

    /// When [`Self::guess`] has something to do by itself.
    pub(super) fn guessing_due(&self) -> Option<Instant> {
        let kept = self.guessing.sockets.iter().filter_map(|socket| self.heard_on(*socket)).map(|at| at + HEARD);
        let stage = match &self.guessing.stage {
            Stage::Idle => self.guessing_begins(),
            Stage::Asking { since, calls } => {
                Some(*since + CALLS.get(*calls).copied().unwrap_or(NO_ANSWER).min(NO_ANSWER))
            }
            Stage::Running(run) => Some(run.next.min(run.began + LASTS)),
        };
        stage.into_iter().chain(kept).filter(|at| *at > self.judged_at).min()
    }

    /// Both NATs are known, one side guesses ports and the other opens many: which is ours. IPv4 first.
    fn guessing_role(&self) -> Option<Role> {
        [Family::V4, Family::V6].into_iter().zip(self.own_nat.into_iter().zip(self.peer_nat)).find_map(
            |(family, (own, peer))| {
                let is_many_sockets = is_defeated(own, peer);
                if !is_many_sockets && !is_defeated(peer, own) {
                    return None;
                }
                let is_public =
                    |remote: &Remote| remote.kind == RemoteKind::Reflexive && Family::of(remote.addr.ip()) == family;
                let reflexive = self.remotes.all().into_iter().find(is_public)?.addr;
                Some(match is_many_sockets {
                    true => Role::ManySockets { to: reflexive },
                    false => Role::ManyPorts { at: reflexive.ip() },
                })
            },
        )
    }

    /// When the usual probes have failed for long enough, if they have to.
    fn guessing_begins(&self) -> Option<Instant> {
        let wanted = self.wanted_direct_since.filter(|_| self.may_want_to_guess(self.judged_at))?;
        self.guessing_role()?;
        [self.guessing.asked_until, self.guessing.rests_until, Some(wanted + PATIENCE)].into_iter().flatten().max()
    }

    fn may_want_to_guess(&self, now: Instant) -> bool {
        self.policy.guess_ports && self.primary.is_some_and(Endpoint::is_relay) && self.is_active(now)
    }

    fn may_guess(&self, now: Instant) -> bool {
        self.guessing.turn != Turn::None
            && self.may_want_to_guess(now)
            && self.guessing.rests_until.is_none_or(|at| now >= at)
    }

    fn ask_to_guess(&mut self, now: Instant) {
        let Stage::Asking { since, calls } = &mut self.guessing.stage else { return };
        let since = *since;
        let is_due = |calls: usize| CALLS.get(calls).is_some_and(|after| now >= since + *after);
        if is_due(*calls) {
            while is_due(*calls) {
                *calls += 1;
            }
            if let Some(relay) = self.best_relay(now) {
                self.call(Endpoint::Relay(relay), Call { answer_wanted: true, guess_ports: true, ..Call::default() });
            }
        }
    }

    fn begin_guessing(&mut self, role: Role, now: Instant) {
        if let Role::ManySockets { to } = role {
            self.events.push_back(PathEvent::OpenSockets { family: Family::of(to.ip()), count: SOCKETS });
        }
        let first = self.random.below(u64::from(PORTS)) as u32;
        self.guessing.rests_until = Some(now + AGAIN);
        self.guessing.stage = Stage::Running(Run { began: now, next: now, sent: 0, role, first });
    }

    fn end_guessing(&mut self, outcome: Outcome) {
        self.guessing.last = Some(outcome);
        self.guessing.stage = Stage::Idle;
        self.guessing.probes.clear();
    }

    /// The next few probes, if they are due. What should have gone out while the machine slept is not made up for.
    fn send_guesses(&mut self, now: Instant) {
        let Stage::Running(run) = &mut self.guessing.stage else { return };
        if now < run.next {
            return;
        }
        run.next = now + PACE;
        let (role, row, first) = (run.role, run.first, run.sent);
        let total = match role {
            Role::ManyPorts { .. } => usize::from(GUESSES),
            // Until they are open nothing is sent.
            Role::ManySockets { .. } if now.since(run.began) < SECOND_PASS => self.guessing.sockets.len(),
            Role::ManySockets { .. } => self.guessing.sockets.len() * 2,
        };
        let last = total.min(first + BATCH);
        run.sent = last.max(first);
        if last >= total {
            run.next = match role {
                Role::ManySockets { .. } if self.guessing.sockets.is_empty() => run.next,
                Role::ManySockets { .. } if now.since(run.began) < SECOND_PASS => run.began + SECOND_PASS,
                _ => run.began + LASTS,
            };
        }
        for at in first..last {
            let (to, ttl) = match role {
                Role::ManyPorts { at: ip } => (Endpoint::Direct(self.guessed_port(ip, row, at)), None),
                Role::ManySockets { to } => {
                    let open = &self.guessing.sockets;
                    let Some(socket) = open.iter().nth(at % open.len().max(1)).copied() else { return };
                    (Endpoint::Extra(socket, to), Some(OPENER_TTL).filter(|_| at < open.len()))
                }
            };
            self.probes_sent += 1;
            let probe = Probe::Ping { id: self.draw_id(), heard: 0 };
            self.guessing.probes.push_back(ProbeTransmit { to, probe, ttl, pad_to: None });
        }
    }

    /// The first guess is that somebody leads the peer's own port to it.
    fn guessed_port(&self, ip: IpAddr, row: u32, at: usize) -> SocketAddr {
        let host = self.remotes.all().into_iter().find(|remote| remote.kind == RemoteKind::Host);
        let port = match (at, host) {
            (0, Some(host)) => host.addr.port(),
            _ => {
                let step = u32::try_from(at).expect("guesses are few") * STRIDE;
                u16::try_from(u32::from(FIRST_PORT) + (row + step) % PORTS).expect("it is below the last port")
            }
        };
        SocketAddr::new(ip, port)
    }

    /// Closes those that nobody needs: all but those in use, or heard on a moment ago.
    fn close_sockets(&mut self, now: Instant) {
        if self.guessing.sockets.is_empty() || matches!(self.guessing.stage, Stage::Running(_)) {
            return;
        }
        let kept = self.needed(&self.guessing.sockets, now);
        let closed: BTreeSet<SocketId> = self.guessing.sockets.difference(&kept).copied().collect();
        if closed.is_empty() {
            return;
        }
        self.guessing.sockets = kept;
        let is_gone = |endpoint: Endpoint| endpoint.socket().is_some_and(|socket| closed.contains(&socket));
        self.tracks.retain(|endpoint, _| !is_gone(*endpoint));
        self.last_proven = self.last_proven.filter(|endpoint| !is_gone(*endpoint));
        self.events.push_back(PathEvent::CloseSockets(closed));
    }

    /// Of these those in use, and the few on which something came a moment ago.
    fn needed(&self, sockets: &BTreeSet<SocketId>, now: Instant) -> BTreeSet<SocketId> {
        let used = [self.primary, self.before.map(|before| before.endpoint), self.route().second];
        let used = used.into_iter().flatten().filter_map(Endpoint::socket).filter(|socket| sockets.contains(socket));
        let heard = sockets.iter().filter_map(|socket| Some((self.heard_on(*socket)?, *socket)));
        let mut heard: Vec<(Instant, SocketId)> = heard.filter(|(at, _)| now.since(*at) < HEARD).collect();
        heard.sort_unstable_by(|a, b| b.cmp(a));
        used.chain(heard.into_iter().take(MAX_KEPT).map(|(_, socket)| socket)).collect()
    }

    fn heard_on(&self, socket: SocketId) -> Option<Instant> {
        let tracks = self.tracks.iter().filter(|(endpoint, _)| endpoint.socket() == Some(socket));
        tracks.filter_map(|(_, track)| track.last_seen).max()
    }
}

/// The side of `own` maps by destination, and that of `peer` keeps its port and filters by address and port.
fn is_defeated(own: NatClass, peer: NatClass) -> bool {
    let changes_ports =
        |nat: NatClass| matches!(nat.mapping, Mapping::AddressDependent | Mapping::AddressAndPortDependent);
    let keeps_port = matches!(peer.mapping, Mapping::EndpointIndependent | Mapping::PortIndependent);
    changes_ports(own) && keeps_port && peer.filtering.is_strict()
}
