//! Changes of routes, many in one datagram: a node that meets a large cluster has thousands to make.
//!
//! The kernel carries out what it is sent before the call that sends it returns, so every answer is there by then and nothing
//! here waits for one.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use tokio::task::yield_now;

/// Changes in one datagram: were all refused, the refusals would still fit the receive buffer of a socket.
const MOST: usize = 64;

/// One change.
#[derive(Debug)]
pub(in super::super) enum Change {
    /// Adds the route, or replaces the one in its place.
    Add(RouteMessage),
    /// Deletes the route, if it is there.
    Delete(RouteMessage),
}

impl Change {
    /// Refusals that say that there was nothing to do.
    fn is_done(&self, refusal: &io::Error) -> bool {
        let codes: &[i32] = match self {
            Self::Add(_) => &[libc::EEXIST],
            Self::Delete(_) => &[libc::ESRCH, libc::ENOENT, libc::ENODEV],
        };
        refusal.raw_os_error().is_some_and(|code| codes.contains(&code))
    }

    fn request(&self) -> NetlinkMessage<RouteNetlinkMessage> {
        let (message, flags) = match self {
            Self::Add(route) => (RouteNetlinkMessage::NewRoute(route.clone()), NLM_F_CREATE | NLM_F_REPLACE),
            Self::Delete(route) => (RouteNetlinkMessage::DelRoute(route.clone()), 0),
        };
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request
    }
}

/// Carries out the changes in order, in the network namespace of the calling thread, and gives what came of each. An error
/// of the whole says nothing of any: some may be done.
pub(in super::super) async fn carry_out(changes: &[Change]) -> io::Result<Vec<io::Result<()>>> {
    let mut results = Vec::with_capacity(changes.len());
    for changes in changes.chunks(MOST) {
        send(changes, &mut results)?;
        // Whoever watches the host hears of each change, and must keep up.
        yield_now().await;
    }
    Ok(results)
}

fn send(changes: &[Change], results: &mut Vec<io::Result<()>>) -> io::Result<()> {
    let first = results.len();
    let mut datagram = Vec::new();
    for (index, change) in changes.iter().enumerate() {
        let mut request = change.request();
        request.header.sequence_number = u32::try_from(index).expect("a batch is small");
        if index + 1 == changes.len() {
            // One acknowledgement tells that all was looked at; every refusal is told anyway.
            request.header.flags |= NLM_F_ACK;
        }
        request.finalize();
        let start = datagram.len();
        datagram.resize(start + request.buffer_len().next_multiple_of(4), 0);
        request.serialize(&mut datagram[start..start + request.buffer_len()]);
        results.push(Ok(()));
    }
    let socket = open()?;
    socket.send(&datagram, 0)?;
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
        let NetlinkPayload::Error(told) = answer.payload else { continue };
        let index = answer.header.sequence_number as usize;
        let Some(change) = changes.get(index) else { continue };
        let refusal = told.code.map(|_| told.to_io()).filter(|refusal| !change.is_done(refusal));
        if let Some(refusal) = refusal {
            results[first + index] = Err(refusal);
        }
        if index + 1 == changes.len() {
            return Ok(());
        }
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    // A refusal that repeats the request would take more room.
    socket.set_cap_ack(true)?;
    // Every answer is there when the kernel has taken the datagram; one that is not will not come.
    socket.set_non_blocking(true)?;
    Ok(socket)
}
