//! The one [`Server`] machine and everybody who drives it.
//!
//! Each call locks the machine for one mutation, drains its events and turns them into wake-ups; the lock is never held
//! across an await. One connection is one [`Session`]; dropping it tells the machine that the carrier is gone.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::time::Instant;
use mesh_proto::discovery::server::{ConnId, Server, ServerEvent, ServerStats};
use tokio::sync::Notify;
use tracing::{debug, info};

pub(crate) struct Hub {
    inner: Mutex<Inner>,
    origin: std::time::Instant,
    /// The machine's next deadline may have moved.
    rearm: Notify,
    /// A session ended.
    left: Notify,
}

struct Inner {
    server: Server,
    signals: HashMap<ConnId, Arc<Signal>>,
    next_id: u64,
}

#[derive(Default)]
struct Signal {
    /// For each lane one: who drives it need not be the same.
    wake: Notify,
    wake_relay: Notify,
    close: Notify,
    closing: AtomicBool,
}

/// One carrier's place in the machine.
pub(crate) struct Session {
    hub: Arc<Hub>,
    id: ConnId,
    signal: Arc<Signal>,
}

impl Hub {
    pub(crate) fn new(server: Server) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner { server, signals: HashMap::new(), next_id: 0 }),
            origin: std::time::Instant::now(),
            rearm: Notify::new(),
            left: Notify::new(),
        })
    }

    /// A carrier is up.
    pub(crate) fn connect(self: &Arc<Self>, remote: SocketAddr, exporter: [u8; 32]) -> Session {
        let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
        let signal = Arc::new(Signal::default());
        let id = self.with(|inner, now| {
            let id = ConnId(inner.next_id);
            inner.next_id += 1;
            inner.signals.insert(id, signal.clone());
            inner.server.handle_connected(id, remote, exporter, now);
            id
        });
        Session { hub: self.clone(), id, signal }
    }

    /// Asks every client to leave and to come back within `spread`.
    pub(crate) fn shut_down(&self, spread: Duration) {
        self.with(|inner, now| inner.server.handle_shutdown(spread, now));
    }

    /// Returns when no session is left.
    pub(crate) async fn emptied(&self) {
        loop {
            let left = self.left.notified();
            if self.lock().signals.is_empty() {
                return;
            }
            left.await;
        }
    }

    /// Keeps the machine's deadlines, for ever.
    pub(crate) async fn keep_time(&self) {
        loop {
            let rearmed = self.rearm.notified();
            let deadline = self.lock().server.poll_timeout();
            let Some((deadline, _)) = deadline else {
                rearmed.await;
                continue;
            };
            let at = self.origin + deadline.since_origin();
            tokio::select! {
                () = tokio::time::sleep_until(at.into()) => self.with(|inner, now| inner.server.handle_timeout(now)),
                () = rearmed => {}
            }
        }
    }

    pub(crate) fn stats(&self) -> ServerStats {
        self.lock().server.stats()
    }

    fn now(&self) -> Instant {
        Instant::from_origin(self.origin.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The machine does not panic on input; if it ever did, the others' sessions are worth more than the poison.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One mutation, then all its events, then the clock.
    fn with<T>(&self, mutate: impl FnOnce(&mut Inner, Instant) -> T) -> T {
        let mut inner = self.lock();
        let before = inner.server.poll_timeout();
        let value = mutate(&mut inner, self.now());
        while let Some(event) = inner.server.poll_event() {
            inner.dispatch(event);
        }
        if inner.server.poll_timeout() != before {
            self.rearm.notify_one();
        }
        value
    }
}

impl Inner {
    fn dispatch(&self, event: ServerEvent) {
        match event {
            ServerEvent::Wake(conn) => {
                if let Some(signal) = self.signals.get(&conn) {
                    signal.wake.notify_one();
                    signal.wake_relay.notify_one();
                }
            }
            ServerEvent::Close(conn) => {
                if let Some(signal) = self.signals.get(&conn) {
                    signal.closing.store(true, Ordering::Release);
                    signal.wake.notify_one();
                    signal.close.notify_one();
                }
            }
            ServerEvent::Joined { conn, namespace, node } => {
                debug!(connection = conn.0, namespace = %head(&namespace.0), node = %node.short(), "member joined");
            }
            ServerEvent::Left { namespace, node } => {
                debug!(namespace = %head(&namespace.0), node = %node.short(), "member left");
            }
            ServerEvent::NamespaceOpened(namespace) => info!(namespace = %head(&namespace.0), "cluster opened"),
            ServerEvent::NamespaceFreed(namespace) => info!(namespace = %head(&namespace.0), "cluster forgotten"),
        }
    }
}

impl Session {
    /// One whole message of the client.
    pub(crate) fn message(&self, message: &[u8]) {
        self.hub.with(|inner, now| inner.server.handle_message(self.id, message, now));
    }

    /// The next message to the client; `None` until [`Session::woken`].
    pub(crate) fn next(&self) -> Option<Bytes> {
        self.hub.with(|inner, now| inner.server.poll_transmit(self.id, now))
    }

    /// The next relayed datagram for the client; `None` until [`Session::relay_woken`].
    pub(crate) fn next_relayed(&self) -> Option<Bytes> {
        self.hub.with(|inner, _| inner.server.poll_relay(self.id))
    }

    /// Returns when there may be a relayed datagram to send.
    pub(crate) async fn relay_woken(&self) {
        self.signal.wake_relay.notified().await;
    }

    /// Returns when there may be something to send, or to close.
    pub(crate) async fn woken(&self) {
        self.signal.wake.notified().await;
    }

    /// Whether the carrier is to be closed once everything is sent.
    pub(crate) fn closing(&self) -> bool {
        self.signal.closing.load(Ordering::Acquire)
    }

    /// Returns when the machine wants the carrier closed.
    pub(crate) async fn close_wanted(&self) {
        self.signal.close.notified().await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.hub.with(|inner, now| {
            inner.signals.remove(&self.id);
            inner.server.handle_disconnected(self.id, now);
        });
        self.hub.left.notify_one();
    }
}

/// The first 8 hex digits: enough to tell clusters apart, too few to look one up.
fn head(namespace: &[u8; 32]) -> String {
    data_encoding::HEXLOWER.encode(&namespace[..4])
}
