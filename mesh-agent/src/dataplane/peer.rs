//! One peer as the threads see it: its tunnel behind a lock, where its packets go, and what control should hear of it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use arc_swap::ArcSwap;
use mesh_common::id::ServerId;
use mesh_common::key::WgPublicKey;
use mesh_common::limits::REKEY_TIMEOUT;
use mesh_common::time::Instant;
use mesh_proto::device::{Endpoint, PeerCounters, PeerReport, PeerRoute};
use mesh_proto::wg::Tunnel;

use super::io::Arrival;
use super::traffic::Traffic;

/// Demand and roaming are reported at most this often a peer.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// A peer whose packets come from ever other endpoints is reported this often: it may send on two paths at once.
const ROAMING_PAUSE: Duration = Duration::from_millis(250);
/// A tunnel with nothing to do for this long needs no timers: three times a session's life, when its keys are erased.
const TIMERS_AFTER_USE: Duration = Duration::from_secs(3 * 180 + 5);
/// WireGuard answers data within 10 s, with an empty packet if there is nothing to say.
const SILENCE: Duration = Duration::from_secs(12);
/// Who finds a tunnel taken offers its processor so often before it sleeps. The other thread has it for a super-packet, some
/// 40 µs; to sleep and be woken costs both more. Measured in turns: 7 % less CPU a byte, loaded round trips 13 % shorter (p99).
const LOCK_YIELDS: usize = 60;

#[derive(Debug)]
pub(super) struct Peer<T> {
    pub(super) key: WgPublicKey,
    /// 24 bits.
    pub(super) index: u32,
    pub(super) counters: Counters,
    keepalive: bool,
    inside: Mutex<Inside<T>>,
    path: ArcSwap<Path>,
    reports: Mutex<Reports>,
}

/// What a thread needs alone.
#[derive(Debug)]
pub(super) struct Inside<T> {
    pub(super) tunnel: T,
    pub(super) traffic: Traffic,
}

/// Where a datagram came from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    Direct(Arrival),
    /// A relay, and whom it names as the sender.
    Relay(ServerId, WgPublicKey),
}

impl Source {
    pub(super) fn endpoint(self) -> Endpoint {
        match self {
            Self::Direct(arrival) => arrival.endpoint(),
            Self::Relay(server, _) => Endpoint::Relay(server),
        }
    }

    /// Whom a relay names as the sender.
    pub(super) fn named_sender(self) -> Option<WgPublicKey> {
        match self {
            Self::Direct(_) => None,
            Self::Relay(_, peer) => Some(peer),
        }
    }

    /// The address it counts as where handshakes are limited by address: what was relayed has one of the discard prefix
    /// (RFC 6666) for each peer, whichever relay it took.
    pub(super) fn limited_as(self) -> IpAddr {
        match self {
            Self::Direct(arrival) => arrival.source.ip(),
            Self::Relay(_, peer) => {
                let [a, b, c, d, e, f, g, h, ..] = peer.0;
                Ipv6Addr::from([1, 0, 0, 0, 0, 0, 0, 0, a, b, c, d, e, f, g, h]).into()
            }
        }
    }
}

/// Where datagrams to a peer go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Path {
    pub(super) route: PeerRoute,
    /// Where the last handshake completed, and when.
    proven: Option<(Endpoint, Instant)>,
}

impl Path {
    /// While control still fans out, it knows no path that works: then what a handshake has proven is better than its
    /// guess, and answers to a new peer do not wait until control has chosen.
    pub(super) fn data_target(&self) -> Option<Endpoint> {
        match self.route.primary {
            Some(primary) if self.route.handshake_fan_out.is_empty() => Some(primary),
            guess => self.proven().or(guess),
        }
    }

    /// Where data goes as well.
    pub(super) fn second_target(&self) -> Option<Endpoint> {
        self.route.second.filter(|second| self.data_target() != Some(*second))
    }

    pub(super) fn handshake_targets(&self) -> BTreeSet<Endpoint> {
        endpoints(&self.route).chain(self.proven()).collect()
    }

    /// Whether anything may go out over a relay.
    pub(super) fn has_relay(&self) -> bool {
        endpoints(&self.route).chain(self.proven()).any(Endpoint::is_relay)
    }

    fn proven(&self) -> Option<Endpoint> {
        self.proven.map(|(endpoint, _)| endpoint)
    }

    /// When both sides begin at once, one handshake completes directly and the other over the relay: the order does not
    /// matter, the direct path is the better one.
    fn prove(&self, endpoint: Endpoint, at: Instant) -> Self {
        let direct = self
            .proven
            .filter(|(proven, before)| endpoint.is_relay() && !proven.is_relay() && at.since(*before) < REKEY_TIMEOUT);
        Self { route: self.route.clone(), proven: direct.or(Some((endpoint, at))) }
    }

    fn follows(&self, route: &PeerRoute) -> bool {
        let is_nowhere = endpoints(route).next().is_none();
        is_nowhere || self.proven().is_none_or(|proven| endpoints(route).any(|endpoint| endpoint == proven))
    }
}

fn endpoints(route: &PeerRoute) -> impl Iterator<Item = Endpoint> {
    route.primary.into_iter().chain(route.second).chain(route.handshake_fan_out.iter().copied())
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    rx_bytes: AtomicU64,
    tx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    tx_packets: AtomicU64,
    rx_foreign_source: AtomicU64,
    last_handshake: Moment,
    last_rx: Moment,
    /// When the tunnel last did anything.
    last_used: Moment,
    /// Since when packets went out and nothing authentic came back.
    unanswered: Moment,
}

/// An instant that threads share; the latest wins.
#[derive(Debug, Default)]
struct Moment(AtomicU64);

impl Moment {
    fn get(&self) -> Option<Instant> {
        let nanos = self.0.load(Ordering::Relaxed).checked_sub(1)?;
        Some(Instant::from_origin(Duration::from_nanos(nanos)))
    }

    /// True when `at` is later than what was there.
    fn advance(&self, at: Instant) -> bool {
        let stored = Self::stored(at);
        self.0.fetch_max(stored, Ordering::Relaxed) < stored
    }

    /// Sets it unless it is set.
    fn begin(&self, at: Instant) {
        if self.0.load(Ordering::Relaxed) == 0 {
            self.0.store(Self::stored(at), Ordering::Relaxed);
        }
    }

    fn clear(&self) {
        if self.0.load(Ordering::Relaxed) != 0 {
            self.0.store(0, Ordering::Relaxed);
        }
    }

    /// 0 is "never".
    fn stored(at: Instant) -> u64 {
        u64::try_from(at.since_origin().as_nanos()).unwrap_or(u64::MAX).saturating_add(1)
    }
}

/// What control has not heard yet: newest only, or sums, so it needs no queue.
#[derive(Debug, Default)]
struct Reports {
    demand: bool,
    handshake: Option<Endpoint>,
    roamed: Option<Endpoint>,
    traffic: Traffic,
    /// The peer stands in control's list.
    listed: bool,
    demand_at: Option<Instant>,
    roamed_at: Option<(Endpoint, Instant)>,
}

impl<T: Tunnel> Peer<T> {
    pub(super) fn new(key: WgPublicKey, index: u32, tunnel: T, keepalive: bool, path: Path) -> Self {
        Self {
            key,
            index,
            counters: Counters::default(),
            keepalive,
            inside: Mutex::new(Inside { tunnel, traffic: Traffic::default() }),
            path: ArcSwap::from_pointee(path),
            reports: Mutex::default(),
        }
    }

    /// The tunnel and its traffic. A thread that panicked with them in hand leaves them usable: sessions renew themselves.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inside<T>> {
        for _ in 0..LOCK_YIELDS {
            match self.inside.try_lock() {
                Ok(inside) => return inside,
                Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => thread::yield_now(),
            }
        }
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn path(&self) -> arc_swap::Guard<Arc<Path>> {
        self.path.load()
    }

    /// A proven endpoint outlives a new route only if it is part of it.
    pub(super) fn set_route(&self, route: &PeerRoute) {
        self.path.rcu(|path| Path { route: route.clone(), proven: path.proven.filter(|_| path.follows(route)) });
    }

    /// Whether the tunnel's timers may have something to do.
    pub(super) fn needs_timers(&self, now: Instant) -> bool {
        self.keepalive || self.was_used_within(TIMERS_AFTER_USE, now)
    }

    /// Whether the tunnel did anything in the time before `now`.
    pub(super) fn was_used_within(&self, time: Duration, now: Instant) -> bool {
        self.counters.last_used.get().is_some_and(|at| now.since(at) < time)
    }

    pub(super) fn used(&self, now: Instant) {
        self.counters.last_used.advance(now);
    }

    pub(super) fn count_sent(&self, packets: u64, bytes: u64, now: Instant) {
        if packets > 0 {
            self.counters.unanswered.begin(now);
        }
        self.counters.tx_packets.fetch_add(packets, Ordering::Relaxed);
        self.counters.tx_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts opened packets and that something authentic came.
    pub(super) fn count_received(&self, packets: u64, bytes: u64, now: Instant) {
        self.counters.rx_packets.fetch_add(packets, Ordering::Relaxed);
        self.counters.rx_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.counters.last_rx.advance(now);
        self.counters.unanswered.clear();
    }

    /// Packets go out on a session and the peer, which would have answered by now if only to keep alive, says nothing.
    pub(super) fn is_silent(&self, now: Instant) -> bool {
        self.counters.unanswered.get().is_some_and(|since| now.since(since) >= SILENCE)
    }

    pub(super) fn count_foreign_source(&self) {
        self.counters.rx_foreign_source.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read_counters(&self) -> PeerCounters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        PeerCounters {
            rx_bytes: load(&counters.rx_bytes),
            tx_bytes: load(&counters.tx_bytes),
            rx_packets: load(&counters.rx_packets),
            tx_packets: load(&counters.tx_packets),
            rx_foreign_source: load(&counters.rx_foreign_source),
            last_handshake: counters.last_handshake.get(),
            last_rx: counters.last_rx.get(),
        }
    }

    /// Notes a handshake that the tunnel completed since the last look, with the source that completed it. Like the other
    /// `note_*` it returns true when the peer must be put on control's list.
    pub(super) fn note_handshake(&self, tunnel: &T, source: Endpoint, now: Instant) -> bool {
        let Some(age) = tunnel.since_handshake(now) else { return false };
        let at = Instant::from_origin(now.since_origin().saturating_sub(age));
        if !self.counters.last_handshake.advance(at) {
            return false;
        }
        self.path.rcu(|path| path.prove(source, at));
        let mut reports = self.reports();
        reports.handshake = Some(source);
        reports.list()
    }

    /// Notes authentic data from elsewhere than where ours goes.
    pub(super) fn note_source(&self, source: Endpoint, now: Instant) -> bool {
        if self.path().data_target() == Some(source) {
            return false;
        }
        let mut reports = self.reports();
        let pause = |last| if last == source { REPORT_INTERVAL } else { ROAMING_PAUSE };
        let recent = |(last, at)| now.since(at) < pause(last);
        if reports.roamed_at.is_some_and(recent) {
            return false;
        }
        reports.roamed_at = Some((source, now));
        reports.roamed = Some(source);
        reports.list()
    }

    pub(super) fn note_demand(&self, now: Instant) -> bool {
        let mut reports = self.reports();
        if reports.demand_at.is_some_and(|at| now.since(at) < REPORT_INTERVAL) {
            return false;
        }
        reports.demand_at = Some(now);
        reports.demand = true;
        reports.list()
    }

    /// Notes what went over each path since the last look.
    pub(super) fn note_traffic(&self) -> bool {
        let traffic = std::mem::take(&mut self.lock().traffic);
        if traffic.is_empty() {
            return false;
        }
        let mut reports = self.reports();
        reports.traffic.merge(traffic);
        reports.list()
    }

    pub(super) fn take_reports(&self) -> Vec<PeerReport> {
        let mut reports = self.reports();
        reports.listed = false;
        let demand = std::mem::take(&mut reports.demand).then_some(PeerReport::Demand);
        let handshake = reports.handshake.take().map(|endpoint| PeerReport::Handshake { endpoint });
        let roamed = reports.roamed.take().map(|endpoint| PeerReport::Roamed { endpoint });
        let traffic = std::mem::take(&mut reports.traffic);
        let traffic = (!traffic.is_empty()).then(|| PeerReport::Traffic(traffic.into_paths()));
        demand.into_iter().chain(roamed).chain(handshake).chain(traffic).collect()
    }

    fn reports(&self) -> MutexGuard<'_, Reports> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reports {
    fn list(&mut self) -> bool {
        !std::mem::replace(&mut self.listed, true)
    }
}
