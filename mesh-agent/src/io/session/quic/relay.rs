//! The lane of relayed messages over QUIC: datagrams, and one stream for those that fit none.
//!
//! Waiting messages stay in their queue, where the oldest can be dropped: QUIC gets the next one when it has sent the last.

use std::fmt;

use bytes::Bytes;
use mesh_common::limits::MAX_MESSAGE;
use mesh_proto::wire::session::{Deframer, enframe};
use quinn::{Connection, ConnectionError, RecvStream, SendDatagramError, SendStream, VarInt};

use crate::io::relay_queue::RelayQueue;
use crate::io::session::{self, RelayLane};

#[derive(Debug)]
pub(in crate::io::session) struct RelaySender {
    connection: Connection,
    large: Option<SendStream>,
}

pub(in crate::io::session) struct RelayReceiver {
    connection: Connection,
    large: Option<(RecvStream, Deframer)>,
}

pub(super) fn lane(connection: &Connection) -> RelayLane {
    RelayLane {
        sender: session::RelaySender(RelaySender { connection: connection.clone(), large: None }),
        receiver: session::RelayReceiver(RelayReceiver { connection: connection.clone(), large: None }),
    }
}

impl RelaySender {
    /// Never returns: the other messages tell that the carrier broke, and why.
    pub(in crate::io::session) async fn run(mut self, queue: &RelayQueue) {
        loop {
            let Some(message) = queue.pop() else {
                queue.filled().await;
                continue;
            };
            if self.send(message).await.is_none() {
                return std::future::pending().await;
            }
        }
    }

    /// `None` = the connection broke.
    async fn send(&mut self, message: Bytes) -> Option<()> {
        if self.connection.max_datagram_size().is_some_and(|max| message.len() <= max) {
            match self.connection.send_datagram_wait(message.clone()).await {
                // The path shrank in between.
                Err(SendDatagramError::TooLarge) => {}
                sent => return sent.ok(),
            }
        }
        let stream = match &mut self.large {
            Some(stream) => stream,
            opened => opened.insert(self.connection.open_uni().await.ok()?),
        };
        stream.write_chunk(enframe(&message)).await.ok()
    }
}

impl RelayReceiver {
    /// The next message. Never returns when the connection broke: the other messages tell why. Cancel-safe.
    pub(in crate::io::session) async fn next(&mut self) -> Bytes {
        loop {
            if let Some((_, deframer)) = &mut self.large {
                match deframer.next_message() {
                    Ok(Some(message)) => return message,
                    Ok(None) => {}
                    Err(_) => self.connection.close(VarInt::from_u32(0), b"not the protocol"),
                }
            }
            tokio::select! {
                Ok(datagram) = self.connection.read_datagram() => return datagram,
                Ok(()) = read_large(&self.connection, &mut self.large) => {}
                else => return std::future::pending().await,
            }
        }
    }
}

/// Reads on where the server's stream stands. Cancel-safe.
async fn read_large(
    connection: &Connection,
    large: &mut Option<(RecvStream, Deframer)>,
) -> Result<(), ConnectionError> {
    match large {
        None => *large = Some((connection.accept_uni().await?, Deframer::default())),
        Some((stream, deframer)) => match stream.read_chunk(MAX_MESSAGE, true).await {
            Ok(Some(chunk)) => deframer.push(&chunk.bytes),
            Ok(None) | Err(_) => *large = None,
        },
    }
    Ok(())
}

impl fmt::Debug for RelayReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelayReceiver").finish_non_exhaustive()
    }
}
