//! What carries the packets: this process, or the kernel's WireGuard. The event loop drives either by the same calls.
//!
//! Owns the choice between them, and says it: [`Backend::status`] is shown in `status`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use anyhow::Context as _;
use bytes::Bytes;
use mesh_common::config::BackendChoice;
use mesh_common::id::ServerId;
use mesh_common::key::{WgPublicKey, WgSecret};
use mesh_common::limits::FWMARK;
use mesh_common::time::Instant;
use mesh_proto::device::{Capabilities, Endpoint, Family, PeerCounters, PeerReport, PeerRoute, PeerSpec, SocketId};
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::dataplane::{BoringTunnels, ControlDatagram, Engine, EngineStats, Offloads, Tun, UdpSockets};
use crate::device::remove_leftover;
use crate::kernel::{self, KernelDevice, KernelError};
use crate::status::BackendStatus;

/// More than this many a direction would wait for each other: one peer's packets are sealed one after the other.
const MOST_LANES: usize = 4;
const MUST_BE_KERNEL: &str = "mesh.backend is kernel; auto or userspace would do without";

/// Which one it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendKind {
    Kernel,
    Userspace,
}

impl BackendKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        }
    }

    pub fn capabilities(self) -> Capabilities {
        match self {
            Self::Kernel => Capabilities::KERNEL,
            Self::Userspace => Capabilities::USERSPACE,
        }
    }
}

/// Where a backend is to be opened.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    pub link_name: &'a str,
    pub listen_port: u16,
    pub secret: &'a WgSecret,
}

/// All methods are for the one control thread.
#[derive(Debug)]
pub struct Backend {
    inner: Inner,
    /// Why it is not the kernel's, where that was to be tried.
    why_not_kernel: Option<String>,
}

#[derive(Debug)]
enum Inner {
    Userspace { engine: Box<Engine<BoringTunnels, Tun, UdpSockets>>, index: u32 },
    Kernel(Box<KernelDevice>),
}

impl Inner {
    async fn kernel(place: &Place<'_>) -> Result<Self, KernelError> {
        let device = KernelDevice::open(place.link_name, place.listen_port, place.secret).await?;
        Ok(Self::Kernel(Box::new(device)))
    }

    async fn userspace(place: &Place<'_>) -> anyhow::Result<Self> {
        // A kernel link that this node left when it was killed has the name. Without the module there is none.
        let _none = remove_leftover(place.link_name, &place.secret.public()).await;
        let lanes = lanes();
        let sockets = UdpSockets::bind_lanes(place.listen_port, FWMARK, lanes)?;
        let (link, index) = make_tun(place.link_name, lanes)?;
        let engine = Engine::start(Some(link), sockets, BoringTunnels::new(place.secret), Arc::new(clock::now))
            .context("cannot start the data plane")?;
        Ok(Self::Userspace { engine: Box::new(engine), index })
    }
}

/// How many threads carry packets in each direction: one for two processors, since both directions of a flow are busy.
fn lanes() -> usize {
    thread::available_parallelism().map_or(1, |processors| (processors.get() / 2).clamp(1, MOST_LANES))
}

/// A link with a queue for each lane, and its index.
fn make_tun(name: &str, lanes: usize) -> anyhow::Result<(Vec<Tun>, u32)> {
    let queues = Tun::create(name, lanes)?;
    let index = queues.first().context("a link has a queue")?.index();
    Ok((queues, index))
}

impl Backend {
    /// Makes the link and takes the port. Must be called inside a tokio runtime.
    pub async fn open(choice: BackendChoice, place: &Place<'_>) -> anyhow::Result<Self> {
        let mut why_not_kernel = None;
        if choice != BackendChoice::Userspace {
            match Inner::kernel(place).await {
                Ok(inner) => return Ok(Self { inner, why_not_kernel }),
                Err(error) if choice == BackendChoice::Kernel => return Err(error).context(MUST_BE_KERNEL),
                Err(error) => why_not_kernel = Some(error.to_string()),
            }
        }
        Ok(Self { inner: Inner::userspace(place).await?, why_not_kernel })
    }

    /// Whether a node that has this one needs a start for what is chosen now. An error where that start would fail; nothing that
    /// is in use is touched to find out.
    pub async fn needs_restart(&mut self, choice: BackendChoice) -> anyhow::Result<bool> {
        let probed = match (choice, self.kind()) {
            (BackendChoice::Userspace, kind) => return Ok(kind == BackendKind::Kernel),
            (_, BackendKind::Kernel) => return Ok(false),
            (_, BackendKind::Userspace) => kernel::probe().await,
        };
        match probed {
            Ok(()) => Ok(true),
            Err(error) if choice == BackendChoice::Kernel => Err(error).context(MUST_BE_KERNEL),
            Err(error) => {
                self.why_not_kernel = Some(error.to_string());
                Ok(false)
            }
        }
    }

    pub fn kind(&self) -> BackendKind {
        match &self.inner {
            Inner::Userspace { .. } => BackendKind::Userspace,
            Inner::Kernel(_) => BackendKind::Kernel,
        }
    }

    pub fn status(&self) -> BackendStatus {
        BackendStatus { kind: self.kind(), why_not_kernel: self.why_not_kernel.clone() }
    }

    /// The link's index, while it is known to be there.
    pub fn index(&self) -> Option<u32> {
        match &self.inner {
            Inner::Userspace { index, .. } => Some(*index),
            Inner::Kernel(device) => device.index(),
        }
    }

    /// Makes the link anew that was deleted.
    pub async fn make_link(&mut self, name: &str) -> anyhow::Result<()> {
        match &mut self.inner {
            Inner::Userspace { engine, index } => {
                let (link, made) = make_tun(name, lanes())?;
                *index = made;
                engine.replace_link(link);
            }
            Inner::Kernel(device) => device.make_link(name).await?,
        }
        Ok(())
    }

    pub fn link_lost(&self) -> bool {
        match &self.inner {
            Inner::Userspace { engine, .. } => engine.link_lost(),
            Inner::Kernel(device) => device.link_lost(),
        }
    }

    /// Somebody else changed the device since this was last asked: look at it.
    pub fn take_changed(&mut self) -> bool {
        match &mut self.inner {
            Inner::Userspace { .. } => false,
            Inner::Kernel(device) => device.take_changed(),
        }
    }

    /// Why the device did not take what it was last told.
    pub fn refused(&self) -> Option<&str> {
        match &self.inner {
            Inner::Userspace { .. } => None,
            Inner::Kernel(device) => device.refused(),
        }
    }

    pub fn set_peer(&mut self, key: WgPublicKey, spec: PeerSpec) {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.set_peer(key, spec),
            Inner::Kernel(device) => device.set_peer(key, spec),
        }
    }

    pub fn remove_peer(&mut self, key: &WgPublicKey) {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.remove_peer(key),
            Inner::Kernel(device) => device.remove_peer(key),
        }
    }

    /// Puts all changes of peers so far into force.
    pub async fn publish(&mut self) {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.publish(),
            Inner::Kernel(device) => device.publish().await,
        }
    }

    pub fn set_route(&mut self, key: &WgPublicKey, route: &PeerRoute) {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.set_route(key, route),
            Inner::Kernel(device) => device.set_route(key, route),
        }
    }

    pub fn start_handshake(&mut self, key: &WgPublicKey) -> bool {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.start_handshake(key),
            Inner::Kernel(device) => device.start_handshake(key),
        }
    }

    pub fn peers(&self) -> BTreeMap<WgPublicKey, PeerSpec> {
        match &self.inner {
            Inner::Userspace { engine, .. } => engine.peers(),
            Inner::Kernel(device) => device.peers(),
        }
    }

    pub fn counters(&self, key: &WgPublicKey) -> PeerCounters {
        match &self.inner {
            Inner::Userspace { engine, .. } => engine.counters(key),
            Inner::Kernel(device) => device.counters(key),
        }
    }

    pub fn stats(&self) -> EngineStats {
        match &self.inner {
            Inner::Userspace { engine, .. } => engine.stats(),
            Inner::Kernel(device) => device.stats(),
        }
    }

    /// What the host's network does for the data threads; `None` where there are none.
    pub fn offloads(&self) -> Option<Offloads> {
        match &self.inner {
            Inner::Userspace { engine, .. } => Some(engine.offloads()),
            Inner::Kernel(_) => None,
        }
    }

    pub fn take_relayed(&mut self) -> Vec<(WgPublicKey, ServerId, Bytes)> {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.take_relayed(),
            Inner::Kernel(device) => device.take_relayed(),
        }
    }

    pub fn handle_relayed(&mut self, sender: &WgPublicKey, server: ServerId, datagram: &[u8]) {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.handle_relayed(sender, server, datagram),
            Inner::Kernel(device) => device.handle_relayed(sender, server, datagram),
        }
    }

    pub fn take_control(&mut self) -> Vec<ControlDatagram> {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.take_control(),
            Inner::Kernel(device) => device.take_control(),
        }
    }

    pub fn send_raw(&mut self, to: Endpoint, datagram: &[u8], ttl: Option<u8>) {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.send_raw(to, datagram, ttl),
            Inner::Kernel(device) => device.send_raw(to, datagram, ttl),
        }
    }

    pub fn open_extra(&mut self, peer: &WgPublicKey, family: Family, count: u16) -> Vec<SocketId> {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.open_extra(family, count),
            Inner::Kernel(device) => device.open_extra(peer, family, count),
        }
    }

    pub fn close_extra(&mut self, closed: &[SocketId]) {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.close_extra(closed),
            Inner::Kernel(device) => device.close_extra(closed),
        }
    }

    /// Waits until [`Self::handle_control`] or a `take_*` has something to give. Safe to drop at any time.
    pub async fn wait(&self) {
        match &self.inner {
            Inner::Userspace { engine, .. } => engine.wait().await,
            Inner::Kernel(device) => device.wait().await,
        }
    }

    pub async fn handle_control(&mut self, now: Instant) -> Vec<(WgPublicKey, PeerReport)> {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.handle_control(now),
            Inner::Kernel(device) => device.handle_control(now).await,
        }
    }

    /// Call every 250 ms. The kernel has its own timers.
    pub fn handle_timeout(&mut self, now: Instant) {
        match &mut self.inner {
            Inner::Userspace { engine, .. } => engine.handle_timeout(now),
            Inner::Kernel(_) => {}
        }
    }

    /// False when a data thread ended though nobody asked it to.
    pub fn is_running(&self) -> bool {
        match &self.inner {
            Inner::Userspace { engine, .. } => engine.is_running(),
            Inner::Kernel(_) => true,
        }
    }
}
