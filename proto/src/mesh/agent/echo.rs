//! Echoes that a person asked for: one probe over one path, and how long its answer took.
//!
//! Bounded and stateless towards the peer: an echo is a ping like any other, told apart by its number alone. It takes
//! nothing from the paths' own measurements and gives nothing to them.

use std::collections::BTreeMap;
use std::time::Duration;

use mesh_common::id::ServerId;
use mesh_common::key::WgPublicKey;
use mesh_common::time::Instant;

use super::{Agent, AgentEvent};
use crate::device::{Endpoint, PeerReport};
use crate::path::agent::ProbeTransmit;
use crate::path::exchange::PING_IDS;
use crate::wire::probe::Probe;

/// Numbers of echoes have this bit, those of path agents do not.
const ECHO_BIT: u32 = !PING_IDS;
/// Unanswered echoes that are remembered.
const MAX_WAITING: usize = 64;
/// An answer after this long is none.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Which path an echo takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// The one that data takes now.
    Any,
    Relay,
    Direct,
}

/// One echo that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EchoId(u32);

/// Why there is no way to send an echo.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EchoError {
    #[error("it is no member of this mesh")]
    UnknownPeer,
    #[error("no relay reaches it now")]
    NoRelay,
    #[error("there is no direct path to it: {0}")]
    NoDirectPath(String),
    #[error("there is no path to it yet")]
    NoPath,
}

#[derive(Debug, Default)]
pub(super) struct Echoes {
    last: u32,
    waiting: BTreeMap<u32, Waiting>,
}

#[derive(Debug)]
struct Waiting {
    peer: WgPublicKey,
    sent_at: Instant,
}

impl Echoes {
    fn begin(&mut self, peer: WgPublicKey, now: Instant) -> u32 {
        self.waiting.retain(|_, waiting| now.since(waiting.sent_at) < ANSWER_TIME);
        if self.waiting.len() >= MAX_WAITING {
            self.waiting.pop_first();
        }
        self.last = self.last.wrapping_add(1);
        let id = self.last | ECHO_BIT;
        self.waiting.insert(id, Waiting { peer, sent_at: now });
        id
    }

    /// The round trip time, if this answers an echo.
    fn end(&mut self, peer: &WgPublicKey, id: u32, now: Instant) -> Option<Duration> {
        let waiting = self.waiting.get(&id).filter(|waiting| waiting.peer == *peer)?;
        let rtt = now.since(waiting.sent_at);
        self.waiting.remove(&id);
        (rtt < ANSWER_TIME).then_some(rtt)
    }
}

impl Agent {
    /// Sends one echo. It counts as demand, so a path is looked for while somebody asks.
    pub fn send_echo(&mut self, peer: &WgPublicKey, via: Via, now: Instant) -> Result<EchoId, EchoError> {
        if !self.paths.contains_key(peer) {
            return Err(EchoError::UnknownPeer);
        }
        self.handle_peer_report(peer, &PeerReport::Demand, now);
        let to = self.echo_endpoint(peer, via, now)?;
        let id = self.echoes.begin(*peer, now);
        let probe = Probe::Ping { id, heard: 0 };
        self.send_probe(peer, ProbeTransmit { to, probe, ttl: None, pad_to: None }, now);
        Ok(EchoId(id))
    }

    /// Whether this pong answered an echo.
    pub(super) fn handle_echo(&mut self, peer: &WgPublicKey, id: u32, from: Endpoint, now: Instant) -> bool {
        if id & ECHO_BIT == 0 {
            return false;
        }
        if let Some(rtt) = self.echoes.end(peer, id, now) {
            self.events.push_back(AgentEvent::Echoed { echo: EchoId(id), from, rtt });
        }
        true
    }

    fn relay_to(&self, peer: &WgPublicKey) -> Option<ServerId> {
        let peer = self.peers.iter().find(|known| known.key == *peer)?;
        self.relays_to(&peer.node).first().copied()
    }

    fn echo_endpoint(&self, peer: &WgPublicKey, via: Via, now: Instant) -> Result<Endpoint, EchoError> {
        let path = self.paths.get(peer).ok_or(EchoError::UnknownPeer)?;
        match via {
            Via::Any => path.route().primary.ok_or(EchoError::NoPath),
            Via::Relay => self.relay_to(peer).map(Endpoint::Relay).ok_or(EchoError::NoRelay),
            Via::Direct => {
                let view = path.view(now);
                let carrying = view.endpoint.into_iter().chain(view.second).find(|endpoint| !endpoint.is_relay());
                carrying.ok_or_else(|| EchoError::NoDirectPath(view.why_not_direct.unwrap_or_default()))
            }
        }
    }
}
