//! One signal for "the host's network changed": links, addresses, rules, default routes, routes of our table, and our packet
//! filter table.
//!
//! Owns multicast sockets of its own, so a flood of events never delays a request. Events are coalesced: any number
//! before the next [`HostWatch::changed`] is one, and those after the first are not parsed. Lost events count as a change.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::stream::{self, Stream, StreamExt as _};
use mesh_common::limits::ROUTE_TABLE;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::nft;

/// Pause before the socket is opened again.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);

const ROUTE_GROUPS: [u32; 7] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
];

/// What the kernel sent, or that it had to drop some.
#[derive(Debug, Clone)]
enum Event {
    Datagram(Vec<u8>),
    Overrun,
}

/// Watches until dropped; the socket is opened again whenever it ends.
#[derive(Debug)]
pub struct HostWatch {
    signal: Arc<Signal>,
    tasks: Vec<AbortHandle>,
}

impl HostWatch {
    /// Must be called inside a tokio runtime; watches the network namespace of the thread that runs its tasks.
    pub fn start() -> io::Result<Self> {
        let mut watch = Self { signal: Arc::default(), tasks: Vec::new() };
        let of_network = || events(NETLINK_ROUTE, &ROUTE_GROUPS);
        watch.supervise(of_network()?, concerns_us, REOPEN_PAUSE, of_network);
        let of_filters = || events(NETLINK_NETFILTER, &[nft::GROUP]);
        match of_filters() {
            Ok(events) => watch.supervise(events, nft::names_our_table, REOPEN_PAUSE, of_filters),
            // Then there is no table of ours to lose either.
            Err(error) => tracing::debug!(%error, "this kernel has no nftables to watch"),
        }
        Ok(watch)
    }

    /// Completes once for all changes since it last did.
    pub async fn changed(&self) {
        self.signal.told().await;
    }

    /// Signals for each event that counts, until dropped.
    fn supervise<S, F>(&mut self, first: S, counts: fn(&[u8]) -> bool, pause: Duration, mut reopen: F)
    where
        S: Stream<Item = Event> + Unpin + Send + 'static,
        F: FnMut() -> io::Result<S> + Send + 'static,
    {
        let signal = Arc::clone(&self.signal);
        let task = tokio::spawn(async move {
            let mut events = Some(first);
            loop {
                if let Some(mut events) = events.take() {
                    while let Some(event) = events.next().await {
                        let counts = || match &event {
                            Event::Datagram(datagram) => counts(datagram),
                            Event::Overrun => true,
                        };
                        if !signal.is_told() && counts() {
                            signal.tell();
                        }
                    }
                    tracing::warn!("a netlink socket that watches the host ended; opening it again");
                }
                tokio::time::sleep(pause).await;
                match reopen() {
                    Ok(stream) => events = Some(stream),
                    Err(error) => {
                        tracing::warn!(%error, "cannot open a netlink socket to watch the host")
                    }
                }
                // What happened in between was not seen.
                signal.tell();
            }
        });
        self.tasks.push(task.abort_handle());
    }
}

impl Drop for HostWatch {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Told once however often it is told. What happens between the telling and the hearing is older than what the hearer sees
/// when it looks.
#[derive(Debug, Default)]
struct Signal {
    notify: Notify,
    is_told: AtomicBool,
}

impl Signal {
    fn tell(&self) {
        self.is_told.store(true, Ordering::Release);
        self.notify.notify_one();
    }

    fn is_told(&self) -> bool {
        self.is_told.load(Ordering::Acquire)
    }

    async fn told(&self) {
        self.notify.notified().await;
        self.is_told.store(false, Ordering::Release);
    }
}

fn events(protocol: isize, groups: &[u32]) -> io::Result<impl Stream<Item = Event> + Unpin + Send + 'static> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind_auto()?;
    for group in groups {
        socket.socket_ref().add_membership(*group)?;
    }
    Ok(Box::pin(stream::unfold(socket, async |socket| match socket.recv_from_full().await {
        Ok((datagram, _)) => Some((Event::Datagram(datagram), socket)),
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Some((Event::Overrun, socket)),
        Err(error) => {
            tracing::debug!(%error, "a netlink socket that watches the host failed");
            None
        }
    })))
}

fn concerns_us(datagram: &[u8]) -> bool {
    let event = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram);
    match event.map(|event| event.payload) {
        Ok(NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
        )) => is_ours(&route),
        // Everything else of these groups, and what cannot be read.
        _ => true,
    }
}

/// Hosts with many containers change their own routes all the time.
fn is_ours(route: &RouteMessage) -> bool {
    let is_default = route.header.destination_prefix_length == 0 && route.header.address_family == AddressFamily::Inet;
    is_default || route.attributes.contains(&RouteAttribute::Table(ROUTE_TABLE))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;
    use futures_util::stream::BoxStream;

    const NO_PAUSE: Duration = Duration::ZERO;

    fn watching<S>(first: S, reopen: impl FnMut() -> io::Result<S> + Send + 'static) -> HostWatch
    where
        S: Stream<Item = Event> + Unpin + Send + 'static,
    {
        let mut watch = HostWatch { signal: Arc::default(), tasks: Vec::new() };
        watch.supervise(first, concerns_us, NO_PAUSE, reopen);
        watch
    }

    #[tokio::test]
    async fn a_socket_that_ends_is_opened_again_and_counts_as_a_change() {
        let (opened, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let watch = watching(stream::empty().boxed(), move || {
            opened.send(()).unwrap();
            Ok(stream::empty().boxed() as BoxStream<'static, _>)
        });
        for _ in 0..3 {
            watch.changed().await;
            seen.recv().await.unwrap();
        }
    }

    #[tokio::test]
    async fn events_are_coalesced_and_routes_of_other_tables_are_not_ours() {
        let route = |table: u32| {
            let mut message = RouteMessage::default();
            message.attributes.push(RouteAttribute::Table(table));
            let mut message = NetlinkMessage::from(RouteNetlinkMessage::NewRoute(message));
            message.finalize();
            let mut datagram = vec![0; message.buffer_len()];
            message.serialize(&mut datagram);
            Event::Datagram(datagram)
        };
        for (events, expected) in [
            (vec![route(254), route(254)], false),
            (vec![route(254), route(ROUTE_TABLE), route(ROUTE_TABLE)], true),
            (vec![Event::Overrun], true),
            (vec![Event::Datagram(vec![1, 2, 3])], true),
        ] {
            let (all_read, read) = tokio::sync::oneshot::channel();
            let end = stream::once(async move {
                all_read.send(()).unwrap();
                std::future::pending().await
            });
            let watch = watching(stream::iter(events).chain(end).boxed(), || Err(io::ErrorKind::Other.into()));
            read.await.unwrap();
            assert_eq!(watch.changed().now_or_never().is_some(), expected);
            assert!(watch.changed().now_or_never().is_none(), "one signal for all of them");
        }
    }
}
