//! The data plane as the control thread holds it: peers and routes in, reports and counters out.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::ServerId;
use mesh_common::key::WgPublicKey;
use mesh_common::limits::REJECT_AFTER_TIME;
use mesh_common::time::Instant;
use mesh_proto::device::{Endpoint, Family, PeerCounters, PeerReport, PeerRoute, PeerSpec, SocketId};

use super::control::Outbox;
use super::drops::{Drop, EngineStats};
use super::io::{DatagramSocket, PacketDevice};
use super::offloads::Offloads;
use super::queues::ControlDatagram;
use super::shared::Shared;
use super::table::PeerTable;
use super::tun::Tun;
use super::tunnel::{BoringTunnels, TunnelFactory};
use super::udp::UdpSockets;
use super::{inbound, outbound, scheduling};

/// The clock of the whole agent: the data threads read it once a batch.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// Handshake messages that one call of [`Engine::handle_control`] handles, about 12 ms: the event loop has other work.
const HANDSHAKES_A_CALL: usize = 64;
const LIMITS_INTERVAL: Duration = Duration::from_secs(1);

/// Tunnels to all peers, and the threads that move their packets. All methods are for the one control thread; none waits.
pub struct Engine<F: TunnelFactory = BoringTunnels, D: PacketDevice = Tun, S: DatagramSocket = UdpSockets> {
    shared: Arc<Shared<F::Tunnel, D, S>>,
    factory: Arc<F>,
    peers: PeerTable<F::Tunnel>,
    /// The threads do not know all of `peers` yet.
    unpublished: bool,
    outbox: Outbox,
    limits_reset: Option<Instant>,
    threads: Vec<JoinHandle<()>>,
}

impl<F: TunnelFactory, D: PacketDevice, S: DatagramSocket> Engine<F, D, S> {
    /// Starts the threads: two for each socket, which are all on one port and one at least, and a queue of the link for each.
    /// Without a link packets wait for [`Self::replace_link`]; handshakes work all the same.
    pub fn start(link: Option<Vec<D>>, sockets: Vec<S>, factory: F, clock: Clock) -> io::Result<Self> {
        if sockets.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(|error| io::Error::other(error.to_string()))?;
        let factory = Arc::new(factory);
        let doorman = Arc::clone(&factory);
        let is_for_us = Box::new(move |initiation: &[u8]| doorman.is_for_us(initiation));
        let mut engine = Self {
            shared: Arc::new(Shared::new(link, sockets, clock, is_for_us)?),
            factory,
            peers: PeerTable::new(u64::from_le_bytes(seed)),
            unpublished: false,
            outbox: Outbox::new(),
            limits_reset: None,
            threads: Vec::new(),
        };
        for lane in 0..engine.shared.lanes.len() {
            engine.spawn(format!("mesh-out-{lane}"), lane, outbound::run)?;
            engine.spawn(format!("mesh-in-{lane}"), lane, inbound::run)?;
        }
        Ok(engine)
    }

    /// Adds or changes a peer. Its session survives a change of allowed IPs; any other change makes the tunnel anew, with a
    /// handshake at once where the old one was in use: the peer may have made a session with it that only it still has. The
    /// data threads see it after [`Self::publish`].
    pub fn set_peer(&mut self, key: WgPublicKey, spec: PeerSpec) {
        let (factory, now) = (&self.factory, self.shared.now());
        let make = |index| factory.make(&key, &spec, index, now);
        let before = self.peers.by_key(&key).cloned();
        let changed = self.peers.set(key, spec.clone(), make);
        self.changed(changed);
        let is_anew = |before: &Arc<_>| self.peers.by_key(&key).is_some_and(|after| !Arc::ptr_eq(before, after));
        if before.is_some_and(|before| is_anew(&before) && before.was_used_within(REJECT_AFTER_TIME, now)) {
            self.start_handshake(&key);
        }
    }

    pub fn remove_peer(&mut self, key: &WgPublicKey) {
        let changed = self.peers.remove(key);
        self.changed(changed);
    }

    /// Lets the data threads see all changes of peers so far: call it after a series of them, and before routes lead there.
    /// What was not published is with the next `handle_*` call, for which [`Self::wait`] wakes.
    pub fn publish(&mut self) {
        if std::mem::take(&mut self.unpublished) {
            self.shared.snapshot.store(Arc::new(self.peers.snapshot()));
        }
    }

    /// Where the packets of a peer go from now on; unknown peers are ignored. While there is a fan-out, data goes to where
    /// the last handshake completed, if that is one of the route's endpoints, else to the primary; without one it goes
    /// nowhere but where the route says. What goes over a relay comes out of [`Self::take_relayed`].
    pub fn set_route(&mut self, key: &WgPublicKey, route: &PeerRoute) {
        if let Some(peer) = self.peers.by_key(key) {
            peer.set_route(route);
        }
    }

    /// Sends an initiation to the primary and the whole fan-out. False when the peer or its endpoints are unknown.
    pub fn start_handshake(&mut self, key: &WgPublicKey) -> bool {
        self.publish();
        let now = self.shared.now();
        self.peers.by_key(key).is_some_and(|peer| self.outbox.start_handshake(&self.shared, peer, now))
    }

    /// Goes on with another link: the last one was deleted. Sessions stay.
    pub fn replace_link(&mut self, queues: Vec<D>) {
        self.shared.link.store(Some(Arc::new(queues)));
        self.shared.link_lost.store(false, Ordering::Release);
        self.shared.lanes.iter().for_each(|lane| lane.outbound.wake());
    }

    /// The link failed since the last [`Self::replace_link`]: its link was deleted.
    pub fn link_lost(&self) -> bool {
        self.shared.link_lost.load(Ordering::Acquire)
    }

    pub fn peers(&self) -> BTreeMap<WgPublicKey, PeerSpec> {
        self.peers.specs()
    }

    /// Counters of inner packets and their bytes; zeros for an unknown peer.
    pub fn counters(&self, key: &WgPublicKey) -> PeerCounters {
        self.peers.by_key(key).map_or_else(PeerCounters::default, |peer| peer.read_counters())
    }

    pub fn stats(&self) -> EngineStats {
        self.shared.drops.stats()
    }

    /// What the kernel does in whole super-packets at the moment.
    pub fn offloads(&self) -> Offloads {
        let link = self.shared.link.load();
        let device = link.as_ref().and_then(|link| link.first()).map(D::offloads).unwrap_or_default();
        Offloads { device, socket: self.shared.sender().offloads() }
    }

    /// Datagrams to hand to relays, oldest first: each with its peer and the relay to reach it by.
    pub fn take_relayed(&mut self) -> Vec<(WgPublicKey, ServerId, Bytes)> {
        self.shared.control.take_relayed()
    }

    /// Takes a WireGuard datagram that a relay brought from the peer `sender`; what answers it goes back over the same relay.
    pub fn handle_relayed(&mut self, sender: &WgPublicKey, server: ServerId, datagram: &[u8]) {
        self.publish();
        let (source, now) = ((server, *sender), self.shared.now());
        self.outbox.handle_relayed(&self.shared, &*self.factory, &self.peers, source, datagram, now);
    }

    /// Probes and STUN messages that came since the last call.
    pub fn take_control(&mut self) -> Vec<ControlDatagram> {
        self.shared.control.take_datagrams()
    }

    /// Sends a probe or a STUN message from the socket that carries WireGuard, or from another one of ours; `ttl` = how many hops it may take at most.
    /// What the kernel does not take is lost and counted.
    pub fn send_raw(&mut self, to: Endpoint, datagram: &[u8], ttl: Option<u8>) {
        if !self.shared.sender().send_one(to, datagram, ttl) {
            self.shared.drops.count(Drop::OutControlNotSent);
        }
    }

    /// Opens sockets beside the main pair, as many of `count` as it can. What comes to them is taken like the pair's.
    pub fn open_extra(&mut self, family: Family, count: u16) -> Vec<SocketId> {
        let opened = self.shared.sender().open_extra(family, count);
        if opened.len() < usize::from(count) {
            self.shared.drops.count(Drop::ExtraNotOpened);
        }
        opened
    }

    pub fn close_extra(&mut self, closed: &[SocketId]) {
        self.shared.sender().close_extra(closed);
    }

    /// Waits until [`Self::handle_control`] or a `take_*` has something to give, or the link is lost. Safe to drop at any time.
    pub async fn wait(&self) {
        self.shared.control.notify.notified().await;
    }

    /// Handles waiting handshakes and gives what happened to peers since the last call: per peer only the newest of each
    /// kind, demand and roaming at most once a second, traffic as often as [`Self::handle_timeout`] looks.
    pub fn handle_control(&mut self, now: Instant) -> Vec<(WgPublicKey, PeerReport)> {
        self.publish();
        for handled in 0..=HANDSHAKES_A_CALL {
            let Some(message) = self.shared.control.next_handshake() else { break };
            self.outbox.handle_handshake(&self.shared, &*self.factory, &self.peers, &message, now);
            if handled == HANDSHAKES_A_CALL {
                self.shared.control.notify.notify_one();
            }
        }
        let mut reports = Vec::new();
        for peer in self.shared.control.take_reporting() {
            // A peer that was removed or made anew since has nothing more to say.
            let current = self.peers.by_key(&peer.key).is_some_and(|current| Arc::ptr_eq(current, &peer));
            let taken = peer.take_reports();
            if current {
                reports.extend(taken.into_iter().map(|report| (peer.key, report)));
            }
        }
        reports
    }

    /// Runs the timers of peers in use, and looks at their traffic for the next [`Self::handle_control`]; call every 250 ms.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.publish();
        if self.limits_reset.is_none_or(|at| now.since(at) >= LIMITS_INTERVAL) {
            self.limits_reset = Some(now);
            self.factory.reset_limits();
        }
        for peer in self.peers.peers().filter(|peer| peer.needs_timers(now)) {
            self.outbox.handle_timeout(&self.shared, peer, now);
            if peer.note_traffic() {
                self.shared.control.list(peer);
            }
        }
    }

    /// False when a data thread ended though nobody asked it to: a bug, and the agent must be started anew.
    pub fn is_running(&self) -> bool {
        self.threads.iter().all(|thread| !thread.is_finished())
    }

    /// Ends and joins the threads, which leave their polls at once. Packets go nowhere from then on.
    pub fn stop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or("data").to_owned();
            if thread.join().is_err() {
                tracing::error!(thread = name, "a data thread had panicked");
            }
        }
    }

    fn changed(&mut self, changed: bool) {
        if changed && !std::mem::replace(&mut self.unpublished, true) {
            self.shared.control.notify.notify_one();
        }
    }

    fn spawn(&mut self, name: String, lane: usize, run: fn(&Shared<F::Tunnel, D, S>, usize)) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let carry = move || {
            if let Err(error) = scheduling::yield_to_running() {
                tracing::debug!(%error, "a data thread is scheduled like any other");
            }
            run(&shared, lane);
        };
        self.threads.push(thread::Builder::new().name(name).spawn(carry)?);
        Ok(())
    }
}

impl<F: TunnelFactory, D: PacketDevice, S: DatagramSocket> ops::Drop for Engine<F, D, S> {
    fn drop(&mut self) {
        self.stop();
    }
}

impl<F: TunnelFactory, D: PacketDevice, S: DatagramSocket> fmt::Debug for Engine<F, D, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
