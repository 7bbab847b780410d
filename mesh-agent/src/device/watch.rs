//! One signal for "the host's network changed": links, addresses, rules, default routes, routes of our table, and our packet
//! filter table.
//!
//! Owns multicast sockets of its own, so a flood of events never delays a request. Events are coalesced: any number
//! before the next [`HostWatch::changed`] is one. Lost events count as a change.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use mesh_common::limits::ROUTE_TABLE;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::nft;

/// Pause before the socket is opened again.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);

const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// Watches until dropped; the socket is opened again whenever it ends.
#[derive(Debug)]
pub struct HostWatch {
    changed: Arc<Notify>,
    tasks: Vec<AbortHandle>,
}

impl HostWatch {
    /// Must be called inside a tokio runtime; watches the network namespace of the thread that runs its tasks.
    pub fn start() -> io::Result<Self> {
        let mut watch = Self { changed: Arc::new(Notify::new()), tasks: Vec::new() };
        watch.supervise(open()?, concerns_us, REOPEN_PAUSE, open);
        match nft::events() {
            Ok(events) => watch.supervise(events, |is_ours| *is_ours, REOPEN_PAUSE, nft::events),
            // Then there is no table of ours to lose either.
            Err(error) => tracing::debug!(%error, "this kernel has no nftables to watch"),
        }
        Ok(watch)
    }

    /// Completes once for all changes since it last did.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Signals for each event that counts, until dropped.
    fn supervise<T, S, F>(&mut self, first: S, counts: fn(&T) -> bool, pause: Duration, mut reopen: F)
    where
        T: Send + 'static,
        S: Stream<Item = T> + Unpin + Send + 'static,
        F: FnMut() -> io::Result<S> + Send + 'static,
    {
        let signal = Arc::clone(&self.changed);
        let task = tokio::spawn(async move {
            let mut events = Some(first);
            loop {
                if let Some(mut events) = events.take() {
                    while let Some(event) = events.next().await {
                        if counts(&event) {
                            signal.notify_one();
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
                signal.notify_one();
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

fn open() -> io::Result<impl Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Unpin + Send + 'static> {
    let (connection, handle, events) = rtnetlink::new_multicast_connection(&GROUPS)?;
    let task = EndWithStream(tokio::spawn(connection).abort_handle());
    Ok(events.map(move |(message, _)| {
        // The connection lives as long as somebody holds its handle and its task.
        let _ = (&handle, &task);
        message
    }))
}

struct EndWithStream(AbortHandle);

impl Drop for EndWithStream {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn concerns_us(event: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    match &event.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
            is_ours(route)
        }
        // Everything else of these groups, and an overrun.
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
    use futures_util::stream::{self, BoxStream};

    const NO_PAUSE: Duration = Duration::ZERO;

    fn watching<S>(first: S, reopen: impl FnMut() -> io::Result<S> + Send + 'static) -> HostWatch
    where
        S: Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Unpin + Send + 'static,
    {
        let mut watch = HostWatch { changed: Arc::new(Notify::new()), tasks: Vec::new() };
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
            NetlinkMessage::from(RouteNetlinkMessage::NewRoute(message))
        };
        let overrun = NetlinkMessage::new(Default::default(), NetlinkPayload::Overrun(Vec::new()));
        for (events, expected) in [
            (vec![route(254), route(254)], false),
            (vec![route(254), route(ROUTE_TABLE), route(ROUTE_TABLE)], true),
            (vec![overrun], true),
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
