//! One session over one carrier, whichever it is: messages in, messages out, an orderly end.
//!
//! The machine is asked for the next message only when the carrier has taken the last one, so a slow reader costs no
//! memory; a carrier that cannot even take the goodbye is dropped after [`GOODBYE`]. Relayed datagrams wait in the machine too,
//! and where they share the carrier's one stream no control message waits for more than the one that is being written.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;

use crate::hub::Session;

/// How long a closing carrier may take to deliver what is queued.
pub(crate) const GOODBYE: Duration = Duration::from_secs(2);

/// The carrier broke; the reason is of no use to anybody but the peer.
#[derive(Debug)]
pub(crate) struct Broken;

/// The sending half of a carrier.
pub(crate) trait Outbound: Send {
    /// Takes one message; may keep it until [`Outbound::flush`].
    fn send(&mut self, message: Bytes) -> impl Future<Output = Result<(), Broken>> + Send;
    fn flush(&mut self) -> impl Future<Output = Result<(), Broken>> + Send;
    /// Delivers what was sent and ends the carrier.
    fn close(&mut self) -> impl Future<Output = ()> + Send;
}

/// The receiving half of a carrier.
pub(crate) trait Inbound: Send {
    /// The next whole message; `None` when the carrier ended or what came is not the protocol.
    fn next(&mut self) -> impl Future<Output = Option<Bytes>> + Send;
}

/// Which way relayed datagrams leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RelayLane {
    /// Behind the control messages of the same carrier.
    Shared,
    /// Another one, which the caller drives.
    Own,
}

/// Serves one session until either side ends it.
pub(crate) async fn serve(session: &Session, relay: RelayLane, mut outbound: impl Outbound, mut inbound: impl Inbound) {
    let reading = async {
        while let Some(message) = inbound.next().await {
            // An empty message only opens the stream (QUIC shows a stream to its acceptor with its first byte).
            if !message.is_empty() {
                session.message(&message);
            }
        }
    };
    let writing = async {
        loop {
            let mut sent = false;
            while let Some(message) = session.next() {
                outbound.send(message).await?;
                sent = true;
            }
            if sent {
                outbound.flush().await?;
            }
            if session.closing() {
                return Ok::<(), Broken>(());
            }
            if relay == RelayLane::Own {
                session.woken().await;
            } else if let Some(datagram) = session.next_relayed() {
                // Flushed one by one: what waits, waits where the oldest can be dropped.
                outbound.send(datagram).await?;
                outbound.flush().await?;
            } else {
                tokio::select! {
                    () = session.woken() => {}
                    () = session.relay_woken() => {}
                }
            }
        }
    };
    let overdue = async {
        session.close_wanted().await;
        tokio::time::sleep(GOODBYE).await;
    };
    let finished = tokio::select! {
        () = reading => false,
        written = writing => written.is_ok(),
        () = overdue => false,
    };
    if finished {
        // A goodbye that does not arrive in time was not wanted.
        let _ = tokio::time::timeout(GOODBYE, outbound.close()).await;
    }
}
