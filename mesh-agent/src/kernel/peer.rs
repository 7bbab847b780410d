//! One peer of the kernel's device: what it should be told, and what follows from what it says.
//!
//! The kernel sends to one endpoint and follows the peer's authenticated packets by itself. So an endpoint is written only
//! when the wanted one changes, or when the kernel has one of another kind than is wanted: a proxied peer that went direct by
//! itself, a direct one that came back to its proxy. What the kernel roamed to among direct addresses stays.
//!
//! Two kernels that initiate at once both fail: each forgets its own initiation over the other's, and so refuses the answer.
//! They try again after the same 5 s, and may fail again and again. So the one with the smaller key begins anew soon.
//!
//! A peer's endpoint is its proxy address until it has a session and a direct path: then all its initiations pass the proxy,
//! which is how demand is seen.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::limits::{REJECT_AFTER_TIME, REKEY_TIMEOUT};
use mesh_common::time::Instant;
use mesh_proto::device::{Endpoint, PathTraffic, PeerCounters, PeerReport, PeerSpec};
use mesh_proto::wire::demux::WireGuardKind;

use super::netlink::{PeerChange, PeerState};

/// A proxied peer that the kernel roamed away from its proxy is brought back after this: the path that it roamed to carries
/// one way at least, and is perhaps about to be chosen.
const ASTRAY: Duration = Duration::from_millis(250);
/// An answer to an initiation that crossed ours has made a session within this, or is refused. Answers that take longer are
/// lost with the tunnel that is made anew; the next ones are not.
const CROSSED: Duration = Duration::from_millis(400);
/// An initiation so soon after one was asked for is no sign of a packet that wants to go out.
const ASKED_FOR: Duration = Duration::from_secs(2);
const DEMAND_PAUSE: Duration = Duration::from_secs(1);
/// The kernel tells bytes, not datagrams. Full ones are assumed, so that a count is never too high.
const DATAGRAM_BYTES: u64 = 1452;
/// The longest handshake message.
const INITIATION_BYTES: u64 = 148;

#[derive(Debug)]
pub(super) struct Peer {
    /// As it should be.
    spec: PeerSpec,
    /// As it was written, or found; `None` when the kernel does not have it.
    written: Option<PeerSpec>,
    /// Its place among the proxy's addresses, and the endpoint that this is.
    pub(super) address: Ipv4Addr,
    proxy: SocketAddr,
    /// The path that carries.
    route: Option<Endpoint>,
    /// The endpoint that was written last, `None` to have it written again.
    endpoint: Option<SocketAddr>,
    /// It is to be taken out and put in again: that ends its session.
    renew: bool,
    poke: bool,
    poked: Option<Instant>,
    state: PeerState,
    /// When the last handshake was seen of the tunnel that it has.
    session: Option<Instant>,
    last_rx: Option<Instant>,
    demanded: Option<Instant>,
    /// Since when the kernel has a direct endpoint and should have the proxy's.
    astray: Option<Instant>,
    /// The kernel's last initiation that nothing has answered yet.
    initiation: Option<(Bytes, Instant)>,
    /// Of two initiations that cross this side's is made anew.
    begins_again: bool,
    /// Since when the kernel knows an initiation of the peer, and its own may be forgotten over it.
    crossed: Option<Instant>,
    /// Where the last initiation came from that the proxy brought: its answer goes back there.
    initiated_from: Option<Endpoint>,
    /// Where the last datagram came from that the proxy brought.
    heard_from: Option<Endpoint>,
    proxied: Proxied,
}

/// What went through the proxy since the kernel was last asked.
#[derive(Debug, Default)]
struct Proxied {
    /// Data, sent and received.
    datagrams: BTreeMap<Endpoint, (u64, u64)>,
    sent_bytes: u64,
    received_bytes: u64,
}

/// What becomes of a datagram that the kernel sent to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) to: Option<Endpoint>,
    /// A packet wants to go out, and nobody was told yet.
    pub(super) is_demand: bool,
}

/// How a datagram is put before the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entrance {
    Proxy,
    /// As if it had come from there: the kernel stays with that address.
    From(SocketAddr),
}

impl Peer {
    /// One side alone has `begins_again`.
    pub(super) fn new(spec: PeerSpec, address: Ipv4Addr, proxy: SocketAddr, begins_again: bool) -> Self {
        Self {
            spec,
            written: None,
            address,
            proxy,
            route: None,
            endpoint: None,
            renew: false,
            poke: false,
            poked: None,
            state: PeerState::default(),
            session: None,
            last_rx: None,
            demanded: None,
            astray: None,
            initiation: None,
            begins_again,
            crossed: None,
            initiated_from: None,
            heard_from: None,
            proxied: Proxied::default(),
        }
    }

    pub(super) fn set_spec(&mut self, spec: PeerSpec) {
        self.spec = spec;
    }

    pub(super) fn set_route(&mut self, route: Option<Endpoint>) {
        self.route = route;
    }

    /// As the kernel has it, which is as it should be until somebody else changes it.
    pub(super) fn written(&self) -> Option<&PeerSpec> {
        self.written.as_ref()
    }

    /// The device was made anew, or somebody took the peer out of it.
    pub(super) fn forget(&mut self) {
        self.written = None;
        self.end_session();
        self.state = PeerState::default();
    }

    fn end_session(&mut self) {
        self.session = None;
        self.endpoint = None;
        self.initiation = None;
        self.crossed = None;
        self.state.last_handshake = (0, 0);
    }

    pub(super) fn has_session(&self, now: Instant) -> bool {
        self.session.is_some_and(|at| now.since(at) < REJECT_AFTER_TIME)
    }

    /// Where the kernel should send by itself.
    fn wanted_endpoint(&self, now: Instant) -> SocketAddr {
        match self.route {
            Some(Endpoint::Direct(at)) if self.has_session(now) => at,
            _ => self.proxy,
        }
    }

    /// It has a session, and something that the kernel should be told.
    pub(super) fn needs_change(&self, now: Instant) -> bool {
        self.written.as_ref() != Some(&self.spec)
            || self.renew
            || self.poke
            || self.endpoint != Some(self.wanted_endpoint(now))
    }

    /// What the kernel is to be told, as if that were done: [`Self::not_written`] takes it back.
    pub(super) fn take_change(&mut self, now: Instant) -> Option<PeerChange> {
        let is_anew = match &self.written {
            Some(written) => {
                self.renew
                    || written.preshared_key != self.spec.preshared_key
                    || written.generation != self.spec.generation
            }
            None => false,
        };
        let is_used = self.has_session(now);
        if is_anew || self.written.is_none() {
            self.end_session();
            // The peer may have made a session with the old one that only it still has.
            self.poke |= is_anew && is_used;
        }
        let endpoint = self.wanted_endpoint(now);
        let keepalive =
            |spec: &PeerSpec| spec.keepalive.map_or(0, |time| u16::try_from(time.as_secs()).unwrap_or(u16::MAX));
        let wanted = &self.spec;
        let mut change = PeerChange { remove: is_anew, ..PeerChange::default() };
        match self.written.as_ref().filter(|_| !is_anew) {
            None => {
                change.set = true;
                change.preshared_key = Some(wanted.preshared_key.clone());
                change.allowed_ips = Some(wanted.allowed_ips.iter().copied().collect());
                change.keepalive = Some(keepalive(wanted));
                change.endpoint = Some(endpoint);
            }
            Some(written) => {
                if written.allowed_ips != wanted.allowed_ips {
                    change.allowed_ips = Some(wanted.allowed_ips.iter().copied().collect());
                }
                if written.keepalive != wanted.keepalive || self.poke {
                    change.keepalive = Some(keepalive(wanted));
                }
                if self.endpoint != Some(endpoint) && self.state.endpoint != Some(endpoint) {
                    change.endpoint = Some(endpoint);
                }
            }
        }
        change.poke = std::mem::take(&mut self.poke);
        if change.poke {
            self.poked = Some(now);
        }
        self.renew = false;
        self.written = Some(self.spec.clone());
        self.endpoint = Some(endpoint);
        if let Some(endpoint) = change.endpoint {
            self.state.endpoint = Some(endpoint);
            self.astray = None;
        }
        (change != PeerChange::default()).then_some(change)
    }

    pub(super) fn not_written(&mut self) {
        self.written = None;
    }

    /// Wants a handshake now. `Some` when the last initiation still counts: it goes there again.
    pub(super) fn start_handshake(&mut self, now: Instant) -> Option<(Bytes, Option<Endpoint>)> {
        if let Some((bytes, at)) = &self.initiation
            && now.since(*at) < REKEY_TIMEOUT
        {
            return Some((bytes.clone(), self.route));
        }
        // With a session the kernel would not begin another.
        self.renew |= self.has_session(now);
        self.poke = true;
        None
    }

    /// The kernel sent this to the proxy.
    pub(super) fn take_outgoing(&mut self, kind: WireGuardKind, datagram: &[u8], now: Instant) -> Outgoing {
        self.proxied.sent_bytes += datagram.len() as u64;
        let mut is_demand = false;
        let to = match kind {
            WireGuardKind::Initiation => {
                self.initiation = Some((Bytes::copy_from_slice(datagram), now));
                let was_asked_for = self.poked.is_some_and(|at| now.since(at) < ASKED_FOR);
                is_demand = !was_asked_for && self.demanded.is_none_or(|at| now.since(at) >= DEMAND_PAUSE);
                if is_demand {
                    self.demanded = Some(now);
                }
                self.route
            }
            WireGuardKind::Response | WireGuardKind::CookieReply => self.initiated_from.or(self.route),
            WireGuardKind::Data => {
                if let Some(route) = self.route {
                    self.proxied.datagrams.entry(route).or_default().0 += 1;
                }
                if self.wanted_endpoint(now) != self.proxy {
                    // A datagram that was under way when the endpoint was written brought the kernel back.
                    self.endpoint = None;
                    self.state.endpoint = Some(self.proxy);
                }
                self.route
            }
        };
        Outgoing { to, is_demand }
    }

    /// A datagram of the peer came over this path, which the kernel cannot see.
    pub(super) fn take_incoming(
        &mut self,
        kind: WireGuardKind,
        length: usize,
        from: Endpoint,
        now: Instant,
    ) -> Entrance {
        self.proxied.received_bytes += length as u64;
        match kind {
            WireGuardKind::Initiation => self.initiated_from = Some(from),
            WireGuardKind::Data => self.proxied.datagrams.entry(from).or_default().1 += 1,
            WireGuardKind::Response | WireGuardKind::CookieReply => {}
        }
        match self.wanted_endpoint(now) {
            // The kernel would follow it back to the proxy.
            wanted if kind == WireGuardKind::Data && wanted != self.proxy => {
                Entrance::From(self.state.endpoint.filter(|at| *at != self.proxy).unwrap_or(wanted))
            }
            _ => {
                self.heard_from = Some(from);
                Entrance::Proxy
            }
        }
    }

    /// What the kernel says of it now.
    pub(super) fn observe(&mut self, state: PeerState, now: Instant) -> Vec<PeerReport> {
        let mut reports = Vec::new();
        let before = std::mem::replace(&mut self.state, state);
        let state = &self.state;
        let has_new_session = state.last_handshake != before.last_handshake && state.last_handshake != (0, 0);
        let path = match state.endpoint {
            Some(at) if at == self.proxy => self.heard_from.or(self.route),
            at => at.map(Endpoint::Direct),
        };
        if has_new_session {
            self.session = Some(now);
            self.initiation = None;
            self.crossed = None;
            reports.extend(path.map(|endpoint| PeerReport::Handshake { endpoint }));
        }
        if let Some(at) = state.endpoint.filter(|at| *at != self.proxy && before.endpoint != Some(*at))
            && self.route != Some(Endpoint::Direct(at))
            && !has_new_session
        {
            reports.push(PeerReport::Roamed { endpoint: Endpoint::Direct(at) });
        }
        let received = state.rx_bytes.saturating_sub(before.rx_bytes);
        let sent = state.tx_bytes.saturating_sub(before.tx_bytes);
        if received > 0 {
            self.last_rx = Some(now);
            self.note_crossing(now);
        }
        self.end_crossing(now);
        let traffic = self.take_traffic(sent, received, has_new_session);
        if !traffic.is_empty() {
            reports.push(PeerReport::Traffic(traffic));
        }
        // What was written is what it has, or somebody changed it.
        if let Some(written) = &mut self.written {
            written.preshared_key.clone_from(&self.state.preshared_key);
            written.allowed_ips.clone_from(&self.state.allowed_ips);
            let seconds = self.state.keepalive;
            written.keepalive = (seconds != 0).then(|| Duration::from_secs(seconds.into()));
        }
        self.judge_endpoint(now);
        reports
    }

    /// Whether the kernel has what it was given: false when somebody changed it since.
    pub(super) fn is_as_written(&self) -> bool {
        self.written.as_ref() == Some(&self.spec)
    }

    /// Something authentic came and made no session.
    fn note_crossing(&mut self, now: Instant) {
        let is_open = self.initiation.as_ref().is_some_and(|(_, at)| now.since(*at) < REKEY_TIMEOUT);
        if self.begins_again && is_open && !self.has_session(now) {
            self.crossed.get_or_insert(now);
        }
    }

    fn end_crossing(&mut self, now: Instant) {
        if self.crossed.is_some_and(|since| now.since(since) >= CROSSED) {
            self.crossed = None;
            self.renew = true;
            self.poke = true;
        }
    }

    fn judge_endpoint(&mut self, now: Instant) {
        let wanted = self.wanted_endpoint(now);
        let is_astray = match self.state.endpoint {
            Some(at) if at == wanted => false,
            // Roaming is the kernel's.
            Some(at) if at != self.proxy && wanted != self.proxy => false,
            Some(at) if at == self.proxy => {
                self.endpoint = None;
                false
            }
            Some(_) => true,
            None => {
                self.endpoint = None;
                false
            }
        };
        self.astray = is_astray.then(|| self.astray.unwrap_or(now));
        if self.astray.is_some_and(|since| now.since(since) >= ASTRAY) {
            self.endpoint = None;
        }
    }

    /// By path: the proxy counted its own, the rest of the kernel's bytes went straight.
    fn take_traffic(&mut self, sent: u64, received: u64, with_handshake: bool) -> Vec<PathTraffic> {
        let Proxied { mut datagrams, sent_bytes, received_bytes } = std::mem::take(&mut self.proxied);
        if received == 0 {
            // Nothing of what came was authentic.
            datagrams.values_mut().for_each(|(_, received)| *received = 0);
        }
        let handshake = if with_handshake { INITIATION_BYTES } else { 0 };
        let direct = |all: u64, proxied: u64| match all.saturating_sub(proxied + handshake) {
            0 => 0,
            bytes => (bytes / DATAGRAM_BYTES).max(1),
        };
        let (sent, received) = (direct(sent, sent_bytes), direct(received, received_bytes));
        let at = match (self.state.endpoint.filter(|at| *at != self.proxy), self.route) {
            (Some(at), _) => Some(Endpoint::Direct(at)),
            (None, Some(Endpoint::Direct(at))) => Some(Endpoint::Direct(at)),
            (None, _) => None,
        };
        if let Some(at) = at {
            let entry = datagrams.entry(at).or_default();
            (entry.0, entry.1) = (entry.0 + sent, entry.1 + received);
        }
        let moved = datagrams.into_iter().filter(|(_, (sent, received))| *sent > 0 || *received > 0);
        moved.map(|(endpoint, (sent, received))| PathTraffic { endpoint, sent, received }).collect()
    }

    /// Bytes are those of WireGuard's messages; the kernel counts no packets.
    pub(super) fn counters(&self) -> PeerCounters {
        PeerCounters {
            rx_bytes: self.state.rx_bytes,
            tx_bytes: self.state.tx_bytes,
            last_handshake: self.session,
            last_rx: self.last_rx,
            ..PeerCounters::default()
        }
    }
}

#[cfg(test)]
mod tests;
