//! The kernel's WireGuard as the event loop holds it: peers and routes in, reports and counters out.
//!
//! ```text
//!  packets ── mesh0 (kernel) ── UDP port ───────────────── peers with a session and a direct path
//!                 │                 ▲ ▼ raw sockets: probes and STUN, from and to the same port
//!                 └─ loopback ── proxy ── relays, other sockets, peers without a session
//! ```
//! Everything runs on the control thread. Netlink is asked often while something is about to change, four times a second in
//! use, once in two seconds at rest, and never for more than a twentieth of the time.
//!
//! Invariants:
//! - What the kernel has is compared with what was written at each look; what somebody else changed shows as a difference of
//!   [`KernelDevice::peers`], and is mended by the same steps as everything else.
//! - An endpoint is written only where [`peer`] says that it differs, so that roaming is kept.
//! - Bytes from the network or from other programs of this host cost a counter, and a bounded share of a turn.

mod netlink;
mod peer;
mod proxy;
mod raw;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use mesh_common::id::ServerId;
use mesh_common::key::{WgPublicKey, WgSecret};
use mesh_common::limits::FWMARK;
use mesh_common::time::Instant;
use mesh_proto::device::{Endpoint, Family, PeerCounters, PeerReport, PeerRoute, PeerSpec, SocketId};
use mesh_proto::wire::demux::{Datagram, WireGuardKind, classify};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::sleep_until;

use self::netlink::{DeviceState, WgNetlink};
use self::peer::{Entrance, Peer};
use self::proxy::Proxy;
use self::raw::{Heard, RawSockets};
use crate::clock;
use crate::dataplane::{ControlDatagram, EngineStats, ExtraSockets};
use crate::device::{WireguardLink, remove_leftover};

/// A handshake message went by: the kernel knows more in a moment.
const LOOK_SOON: Duration = Duration::from_millis(3);
const LOOK_HOT: Duration = Duration::from_millis(20);
const HOT: Duration = Duration::from_millis(500);
const LOOK_ACTIVE: Duration = Duration::from_millis(250);
const ACTIVE: Duration = Duration::from_secs(10);
const LOOK_IDLE: Duration = Duration::from_secs(2);
/// A look is not repeated before this many times what it took.
const LOOK_SHARE: u32 = 20;
/// Datagrams that one turn takes from each kind of socket: the event loop has other work.
const TURN: usize = 256;
const MAX_DATAGRAM: usize = 65_535;

/// Why the kernel's WireGuard is not to be had here.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("this kernel has no WireGuard ({0}): load the module `wireguard`")]
    NoModule(#[source] io::Error),
    #[error("not permitted to make a WireGuard link ({0}): run as root or give the agent CAP_NET_ADMIN")]
    NoNetAdmin(#[source] io::Error),
    #[error("not permitted to open raw sockets ({0}): run as root or give the agent CAP_NET_RAW")]
    NoNetRaw(#[source] io::Error),
    #[error("link {name} exists already: another agent holds it; stop that one or set mesh.interfaceName")]
    Busy { name: String },
    #[error("another agent or WireGuard is on UDP port {port}: stop it or set mesh.listenPort")]
    PortInUse { port: u16 },
    #[error("loopback does not work ({0}): ip link set lo up")]
    NoLoopback(#[source] io::Error),
    #[error("cannot {what} ({source})")]
    Failed { what: &'static str, source: io::Error },
}

impl KernelError {
    fn of_link(name: &str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOENT) => Self::NoModule(source),
            Some(libc::EPERM | libc::EACCES) => Self::NoNetAdmin(source),
            Some(libc::EEXIST) => Self::Busy { name: name.to_owned() },
            _ => Self::Failed { what: "make a WireGuard link", source },
        }
    }
}

/// The peers of one link of the kernel's, and the sockets beside it. All methods are for the one control thread.
pub struct KernelDevice {
    netlink: WgNetlink,
    /// `None` once it was deleted, until it is made again.
    link: Option<WireguardLink>,
    secret: WgSecret,
    port: u16,
    raw: RawSockets,
    proxy: Proxy,
    extra: ExtraSockets,
    extra_ready: AsyncFd<OwnedFd>,
    extra_owners: BTreeMap<SocketId, WgPublicKey>,
    peers: BTreeMap<WgPublicKey, Peer>,
    by_address: BTreeMap<Ipv4Addr, WgPublicKey>,
    /// Proxy addresses given so far: none is given twice.
    numbered: u32,
    /// Peers with something that the kernel should be told.
    dirty: BTreeSet<WgPublicKey>,
    /// Peers that the kernel has and nobody wants.
    unwanted: BTreeSet<WgPublicKey>,
    /// Somebody else changed the device; told once.
    has_changed: bool,
    refused: Option<String>,
    reports: Vec<(WgPublicKey, PeerReport)>,
    datagrams: Vec<ControlDatagram>,
    relayed: Vec<(WgPublicKey, ServerId, Bytes)>,
    drops: Drops,
    looked_at: Instant,
    look_took: Duration,
    look_at: Instant,
    hot_until: Instant,
    active_until: Instant,
    more: Notify,
    buffer: Box<[u8]>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Drops {
    out_no_endpoint: u64,
    out_not_sent: u64,
    out_control_not_sent: u64,
    extra_not_opened: u64,
    in_not_delivered: u64,
    in_unknown: u64,
    relayed_unknown_peer: u64,
}

/// Whether the kernel's WireGuard could be used here, without touching anything that is in use.
pub async fn probe() -> Result<(), KernelError> {
    let name = format!("msprobe{}", std::process::id() % 10_000_000);
    let link = WireguardLink::create(&name).await.map_err(|error| KernelError::of_link(&name, error))?;
    let opened = WgNetlink::open().map_err(|source| KernelError::Failed { what: "open generic netlink", source });
    let mut netlink = opened?;
    netlink.get(link.index()).await.map_err(|source| KernelError::Failed { what: "ask WireGuard", source })?;
    RawSockets::open(0, FWMARK).map(drop).map_err(not_raw)
}

/// The public key of a WireGuard link.
pub(crate) async fn public_key_of(index: u32) -> io::Result<Option<WgPublicKey>> {
    Ok(WgNetlink::open()?.get(index).await?.public_key)
}

fn not_raw(error: io::Error) -> KernelError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => KernelError::NoNetRaw(error),
        _ => KernelError::Failed { what: "open raw sockets", source: error },
    }
}

impl KernelDevice {
    /// Makes the link, which can have the port once it is up. A link that this node left when it was killed is deleted first.
    pub async fn open(name: &str, port: u16, secret: &WgSecret) -> Result<Self, KernelError> {
        let netlink =
            WgNetlink::open().map_err(|source| KernelError::Failed { what: "open generic netlink", source })?;
        let raw = RawSockets::open(port, FWMARK).map_err(not_raw)?;
        let proxy = Proxy::open(port).map_err(KernelError::NoLoopback)?;
        let extra = ExtraSockets::new(FWMARK);
        let extra = extra.map_err(|source| KernelError::Failed { what: "watch sockets", source })?;
        let watched = extra.descriptor().try_clone_to_owned().and_then(raw::watch);
        let extra_ready = watched.map_err(|source| KernelError::Failed { what: "watch sockets", source })?;
        let now = clock::now();
        let mut device = Self {
            netlink,
            link: None,
            secret: secret.clone(),
            port,
            raw,
            proxy,
            extra,
            extra_ready,
            extra_owners: BTreeMap::new(),
            peers: BTreeMap::new(),
            by_address: BTreeMap::new(),
            numbered: 0,
            dirty: BTreeSet::new(),
            unwanted: BTreeSet::new(),
            has_changed: false,
            refused: None,
            reports: Vec::new(),
            datagrams: Vec::new(),
            relayed: Vec::new(),
            drops: Drops::default(),
            looked_at: now,
            look_took: Duration::ZERO,
            look_at: now,
            hot_until: now,
            active_until: now,
            more: Notify::new(),
            buffer: vec![0; MAX_DATAGRAM].into(),
        };
        device.make_link(name).await?;
        Ok(device)
    }

    /// Makes the link anew after it was deleted, and gives it all peers.
    pub async fn make_link(&mut self, name: &str) -> Result<(), KernelError> {
        self.link = None;
        let gone = remove_leftover(name, &self.secret.public()).await;
        if gone.map_err(|error| KernelError::of_link(name, error))? {
            tracing::info!("deleted link {name}, which this node left when it was killed");
        }
        let link = WireguardLink::create(name).await.map_err(|error| KernelError::of_link(name, error))?;
        let reopened = self.netlink.reopen();
        reopened.map_err(|source| KernelError::Failed { what: "open generic netlink", source })?;
        let set = self.netlink.set_device(link.index(), &self.secret, self.port, FWMARK).await;
        set.map_err(|source| KernelError::Failed { what: "set key and port of the WireGuard link", source })?;
        link.try_up().await.map_err(|source| match source.raw_os_error() {
            Some(libc::EADDRINUSE) => KernelError::PortInUse { port: self.port },
            _ => KernelError::Failed { what: "bring the WireGuard link up", source },
        })?;
        self.link = Some(link);
        self.unwanted.clear();
        self.peers.values_mut().for_each(Peer::forget);
        self.dirty.extend(self.peers.keys());
        self.more.notify_one();
        Ok(())
    }

    /// The link's index, while there is one.
    pub fn index(&self) -> Option<u32> {
        self.link.as_ref().map(WireguardLink::index)
    }

    pub fn link_lost(&self) -> bool {
        self.link.is_none()
    }

    /// Somebody else changed the device since this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.has_changed)
    }

    /// Why the kernel did not take what it was last told.
    pub fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    pub fn set_peer(&mut self, key: WgPublicKey, spec: PeerSpec) {
        self.unwanted.remove(&key);
        let address = proxy::address(self.numbered);
        let (proxy, own) = (self.proxy.endpoint(address), self.secret.public());
        let peer = self.peers.entry(key).or_insert_with(|| {
            self.by_address.insert(address, key);
            self.numbered += 1;
            Peer::new(spec.clone(), address, proxy, own < key)
        });
        peer.set_spec(spec);
        self.mark(key);
    }

    pub fn remove_peer(&mut self, key: &WgPublicKey) {
        if let Some(peer) = self.peers.remove(key) {
            self.by_address.remove(&peer.address);
        }
        self.dirty.remove(key);
        self.unwanted.insert(*key);
        self.more.notify_one();
    }

    /// Tells the kernel all changes so far. What it refuses shows as a difference of [`Self::peers`].
    pub async fn publish(&mut self) {
        let Some(index) = self.index() else { return };
        if self.dirty.is_empty() && self.unwanted.is_empty() {
            return;
        }
        let now = clock::now();
        let removal = netlink::PeerChange { remove: true, ..netlink::PeerChange::default() };
        let mut changes: Vec<_> = self.unwanted.iter().map(|key| (*key, removal.clone())).collect();
        for key in std::mem::take(&mut self.dirty) {
            let change = self.peers.get_mut(&key).and_then(|peer| peer.take_change(now));
            changes.extend(change.map(|change| (key, change)));
        }
        if changes.iter().any(|(_, change)| change.poke) {
            self.expect_change(now);
        }
        match self.netlink.set_peers(index, &changes).await {
            Ok(()) => {
                self.unwanted.clear();
                self.refused = None;
            }
            Err((done, error)) => {
                for (key, _) in &changes[done..] {
                    if let Some(peer) = self.peers.get_mut(key) {
                        peer.not_written();
                    }
                }
                self.note_error(&error, "change peers");
            }
        }
    }

    /// Where the packets of a peer go from now on; unknown peers are ignored. This device sends to the primary alone.
    pub fn set_route(&mut self, key: &WgPublicKey, route: &PeerRoute) {
        if let Some(peer) = self.peers.get_mut(key) {
            peer.set_route(route.primary);
            self.mark(*key);
        }
    }

    /// Has the kernel send an initiation, or sends its last one again where that still counts. False when the peer is unknown.
    pub fn start_handshake(&mut self, key: &WgPublicKey) -> bool {
        let now = clock::now();
        let Some(peer) = self.peers.get_mut(key) else { return false };
        match peer.start_handshake(now) {
            Some((initiation, to)) => {
                self.send_outgoing(*key, to, &initiation);
                self.expect_change(now);
            }
            None => self.mark(*key),
        }
        true
    }

    /// Peers as the kernel has them.
    pub fn peers(&self) -> BTreeMap<WgPublicKey, PeerSpec> {
        let known = self.peers.iter().filter_map(|(key, peer)| Some((*key, peer.written()?.clone())));
        let empty = PeerSpec { preshared_key: None, allowed_ips: BTreeSet::new(), keepalive: None, generation: 0 };
        known.chain(self.unwanted.iter().map(|key| (*key, empty.clone()))).collect()
    }

    pub fn counters(&self, key: &WgPublicKey) -> PeerCounters {
        self.peers.get(key).map(Peer::counters).unwrap_or_default()
    }

    pub fn stats(&self) -> EngineStats {
        let drops = &self.drops;
        let named = [
            ("out_no_endpoint", drops.out_no_endpoint),
            ("out_not_sent", drops.out_not_sent),
            ("out_control_not_sent", drops.out_control_not_sent),
            ("extra_not_opened", drops.extra_not_opened),
            ("in_not_delivered", drops.in_not_delivered),
            ("in_unknown", drops.in_unknown),
            ("relayed_unknown_peer", drops.relayed_unknown_peer),
        ];
        EngineStats { drops: named.into_iter().collect() }
    }

    pub fn take_relayed(&mut self) -> Vec<(WgPublicKey, ServerId, Bytes)> {
        std::mem::take(&mut self.relayed)
    }

    /// Takes a WireGuard datagram that a relay brought from the peer `sender`.
    pub fn handle_relayed(&mut self, sender: &WgPublicKey, server: ServerId, datagram: &[u8]) {
        self.deliver(*sender, Endpoint::Relay(server), datagram);
    }

    pub fn take_control(&mut self) -> Vec<ControlDatagram> {
        std::mem::take(&mut self.datagrams)
    }

    /// Sends a probe or a STUN message from WireGuard's port, or from another socket.
    pub fn send_raw(&mut self, to: Endpoint, datagram: &[u8], ttl: Option<u8>) {
        let is_sent = match to {
            Endpoint::Direct(at) => self.raw.send(at, datagram, ttl),
            Endpoint::Extra(socket, at) => self.send_extra(socket, at, datagram, ttl),
            Endpoint::Relay(_) => false,
        };
        self.drops.out_control_not_sent += u64::from(!is_sent);
    }

    /// Opens sockets beside WireGuard's port for a peer, as many of `count` as it can.
    pub fn open_extra(&mut self, peer: &WgPublicKey, family: Family, count: u16) -> Vec<SocketId> {
        let opened = self.extra.open(family, count);
        let open = self.extra.load();
        for socket in opened.iter().filter_map(|id| open.get(id)) {
            // Datagrams are handed on one by one here: they must not come joined. Where the kernel cannot join it cannot stop.
            let _cannot = setsockopt(socket.socket(), sockopt::UdpGroSegment, &false);
        }
        drop(open);
        self.extra_owners.extend(opened.iter().map(|socket| (*socket, *peer)));
        self.drops.extra_not_opened += u64::from(opened.len() < usize::from(count));
        opened
    }

    pub fn close_extra(&mut self, closed: &[SocketId]) {
        self.extra.close(closed);
        for socket in closed {
            self.extra_owners.remove(socket);
        }
    }

    /// Waits until [`Self::handle_control`] has something to do. Safe to drop at any time.
    pub async fn wait(&self) {
        tokio::select! {
            () = self.more.notified() => {}
            () = self.raw.readable() => {}
            () = self.proxy.readable() => {}
            ready = self.extra_ready.readable() => drop(ready),
            () = sleep_until(clock::deadline(self.look_at)) => {}
        }
    }

    /// Takes what came, looks at the kernel when that is due, tells it what follows, and gives what happened to peers.
    pub async fn handle_control(&mut self, now: Instant) -> Vec<(WgPublicKey, PeerReport)> {
        self.take_heard(now);
        self.take_outgoing(now);
        self.take_extra();
        // Before the look: what was not written yet is nobody else's change.
        self.publish().await;
        if now >= self.look_at {
            self.look(now).await;
            self.publish().await;
        }
        std::mem::take(&mut self.reports)
    }

    fn mark(&mut self, key: WgPublicKey) {
        if self.dirty.insert(key) {
            self.more.notify_one();
        }
    }

    fn expect_change(&mut self, now: Instant) {
        self.hot_until = now + HOT;
        let earliest = self.looked_at + self.look_took * LOOK_SHARE;
        self.look_at = self.look_at.min((now + LOOK_SOON).max(earliest));
    }

    fn take_heard(&mut self, now: Instant) {
        for _ in 0..TURN {
            match self.raw.receive() {
                Some(Heard::Control { source, bytes }) => {
                    self.datagrams.push(ControlDatagram { source: Endpoint::Direct(source), bytes });
                }
                Some(Heard::Handshake { .. }) => self.expect_change(now),
                None => return,
            }
        }
        self.more.notify_one();
    }

    /// What the kernel sent to peers that it cannot reach by itself.
    fn take_outgoing(&mut self, now: Instant) {
        for _ in 0..TURN {
            let mut buffer = std::mem::take(&mut self.buffer);
            let received = self.proxy.receive(&mut buffer);
            if let Some((address, length)) = received {
                self.take_outgoing_of(address, &buffer[..length], now);
            }
            self.buffer = buffer;
            if received.is_none() {
                return;
            }
        }
        self.more.notify_one();
    }

    fn take_outgoing_of(&mut self, address: Ipv4Addr, datagram: &[u8], now: Instant) {
        let Datagram::WireGuard(kind) = classify(datagram) else { return };
        let Some(key) = self.by_address.get(&address).copied() else { return };
        let Some(peer) = self.peers.get_mut(&key) else { return };
        let outgoing = peer.take_outgoing(kind, datagram, now);
        let needs_change = peer.needs_change(now);
        self.active_until = now + ACTIVE;
        if outgoing.is_demand {
            self.reports.push((key, PeerReport::Demand));
        }
        if matches!(kind, WireGuardKind::Initiation | WireGuardKind::Response) {
            self.expect_change(now);
        }
        if needs_change {
            self.mark(key);
        }
        self.send_outgoing(key, outgoing.to, datagram);
    }

    fn send_outgoing(&mut self, key: WgPublicKey, to: Option<Endpoint>, datagram: &[u8]) {
        let is_sent = match to {
            Some(Endpoint::Relay(server)) => {
                self.relayed.push((key, server, Bytes::copy_from_slice(datagram)));
                self.more.notify_one();
                return;
            }
            Some(Endpoint::Direct(at)) => self.raw.send(at, datagram, None),
            Some(Endpoint::Extra(socket, at)) => self.send_extra(socket, at, datagram, None),
            None => {
                self.drops.out_no_endpoint += 1;
                return;
            }
        };
        self.drops.out_not_sent += u64::from(!is_sent);
    }

    fn send_extra(&self, socket: SocketId, to: std::net::SocketAddr, datagram: &[u8], ttl: Option<u8>) -> bool {
        let open = self.extra.load();
        open.get(&socket).is_some_and(|socket| raw::send_now(socket.socket(), to, &[datagram], ttl).is_ok())
    }

    fn take_extra(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..TURN {
            let ready: Vec<_> = self.extra.ready().collect();
            if ready.is_empty() {
                // Nothing more: the next that comes wakes again.
                let _empty = self
                    .extra_ready
                    .try_io(Interest::READABLE, |_| -> io::Result<()> { Err(io::ErrorKind::WouldBlock.into()) });
                break;
            }
            for (id, socket) in ready {
                let Ok((length, source)) = raw::receive_now(socket.socket(), &mut buffer) else { continue };
                let from = Endpoint::Extra(id, source);
                match (classify(&buffer[..length]), self.extra_owners.get(&id).copied()) {
                    (Datagram::Probe, _) => {
                        let bytes = Bytes::copy_from_slice(&buffer[..length]);
                        self.datagrams.push(ControlDatagram { source: from, bytes });
                    }
                    (Datagram::WireGuard(_), Some(owner)) => self.deliver(owner, from, &buffer[..length]),
                    _ => self.drops.in_unknown += 1,
                }
            }
        }
        self.buffer = buffer;
    }

    /// Puts a datagram of a peer, which came over a path that the kernel does not see, before the kernel.
    fn deliver(&mut self, key: WgPublicKey, from: Endpoint, datagram: &[u8]) {
        let now = clock::now();
        let Some(peer) = self.peers.get_mut(&key) else {
            self.drops.relayed_unknown_peer += 1;
            return;
        };
        let Datagram::WireGuard(kind) = classify(datagram) else {
            self.drops.in_unknown += 1;
            return;
        };
        let entrance = peer.take_incoming(kind, datagram.len(), from, now);
        let address = peer.address;
        let is_delivered = match entrance {
            Entrance::Proxy => self.proxy.send(address, datagram),
            Entrance::From(source) => self.raw.inject(source, datagram),
        };
        self.drops.in_not_delivered += u64::from(!is_delivered);
        self.active_until = now + ACTIVE;
        if kind != WireGuardKind::Data {
            self.expect_change(now);
        }
    }

    /// Asks the kernel for everything, and notes what is not as it was written.
    async fn look(&mut self, now: Instant) {
        let Some(index) = self.index() else {
            self.look_at = now + LOOK_IDLE;
            return;
        };
        let begun = clock::now();
        let answered = self.netlink.get(index).await;
        self.looked_at = clock::now();
        self.look_took = self.looked_at.since(begun);
        match answered {
            Ok(device) => {
                if self.peers.values().all(|peer| peer.written().is_some()) {
                    self.refused = None;
                }
                self.take_look(index, device, now).await;
            }
            Err(error) => self.note_error(&error, "ask for peers"),
        }
        let pause = if now < self.hot_until {
            LOOK_HOT
        } else if now < self.active_until {
            LOOK_ACTIVE
        } else {
            LOOK_IDLE
        };
        self.look_at = self.looked_at + pause.max(self.look_took * LOOK_SHARE);
    }

    async fn take_look(&mut self, index: u32, device: DeviceState, now: Instant) {
        let is_ours =
            (device.public_key, device.listen_port, device.fwmark) == (Some(self.secret.public()), self.port, FWMARK);
        if !is_ours {
            tracing::warn!("somebody changed key, port or mark of the WireGuard link: setting them back");
            self.has_changed = true;
            if let Err(error) = self.netlink.restore_device(index, &self.secret, self.port, FWMARK).await {
                self.note_error(&error, "set back the WireGuard link");
            }
        }
        for key in device.peers.keys().filter(|key| !self.peers.contains_key(*key)) {
            if self.unwanted.insert(*key) {
                tracing::warn!(peer = %key, "somebody added a peer to the WireGuard link: removing it");
                self.has_changed = true;
            }
        }
        let mut found = device.peers;
        let mut marked = Vec::new();
        for (key, peer) in &mut self.peers {
            match found.remove(key) {
                Some(state) => {
                    let reports = peer.observe(state, now);
                    if reports.iter().any(|report| !matches!(report, PeerReport::Roamed { .. })) {
                        self.active_until = now + ACTIVE;
                    }
                    self.reports.extend(reports.into_iter().map(|report| (*key, report)));
                    if !peer.is_as_written() {
                        tracing::warn!(peer = %key, "somebody changed a peer of the WireGuard link: setting it back");
                        self.has_changed = true;
                    }
                }
                None if peer.written().is_some() => {
                    tracing::warn!(peer = %key, "somebody removed a peer from the WireGuard link: setting it again");
                    peer.forget();
                    self.has_changed = true;
                }
                None => {}
            }
            if peer.written().is_some() && peer.needs_change(now) {
                marked.push(*key);
            }
        }
        self.dirty.extend(marked);
    }

    fn note_error(&mut self, error: &io::Error, what: &str) {
        if error.raw_os_error() == Some(libc::ENODEV) {
            self.link = None;
            self.has_changed = true;
            return;
        }
        let text = format!("cannot {what}: {error}");
        if self.refused.as_ref() != Some(&text) {
            tracing::warn!("the kernel's WireGuard: {text}");
        }
        self.refused = Some(text);
        self.has_changed = true;
    }
}

impl fmt::Debug for KernelDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelDevice")
            .field("link", &self.link)
            .field("peers", &self.peers.len())
            .finish_non_exhaustive()
    }
}
