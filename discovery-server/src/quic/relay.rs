//! The lane of relayed messages over QUIC: datagrams, and one stream for those that fit none.
//!
//! Waiting messages stay in the machine, where the oldest can be dropped: QUIC gets the next one when it has sent the last.

use bytes::Bytes;
use mesh_common::limits::MAX_MESSAGE;
use mesh_proto::wire::session::{Deframer, enframe};
use quinn::{Connection, RecvStream, SendDatagramError, SendStream, VarInt};

use crate::hub::Session;

/// Never returns: the control stream ends with the connection, once all of it is read.
pub(super) async fn send(session: &Session, connection: &Connection) {
    let mut large = None;
    loop {
        let Some(message) = session.next_relayed() else {
            session.relay_woken().await;
            continue;
        };
        if send_one(connection, &mut large, message).await.is_none() {
            return std::future::pending().await;
        }
    }
}

/// Never returns; a client that does not keep to the protocol loses its connection.
pub(super) async fn receive(session: &Session, connection: &Connection) {
    let datagrams = async {
        while let Ok(message) = connection.read_datagram().await {
            session.message(&message);
        }
    };
    let large = async {
        while let Ok(stream) = connection.accept_uni().await {
            receive_large(session, connection, stream).await;
        }
    };
    tokio::join!(datagrams, large);
    std::future::pending().await
}

async fn receive_large(session: &Session, connection: &Connection, mut stream: RecvStream) {
    let mut deframer = Deframer::default();
    while let Ok(Some(chunk)) = stream.read_chunk(MAX_MESSAGE, true).await {
        deframer.push(&chunk.bytes);
        loop {
            match deframer.next_message() {
                Ok(Some(message)) => session.message(&message),
                Ok(None) => break,
                Err(_) => return connection.close(VarInt::from_u32(0), b"not the protocol"),
            }
        }
    }
}

/// `None` = the connection broke.
async fn send_one(connection: &Connection, large: &mut Option<SendStream>, message: Bytes) -> Option<()> {
    if connection.max_datagram_size().is_some_and(|max| message.len() <= max) {
        match connection.send_datagram_wait(message.clone()).await {
            // The path shrank in between.
            Err(SendDatagramError::TooLarge) => {}
            sent => return sent.ok(),
        }
    }
    let stream = match large {
        Some(stream) => stream,
        None => large.insert(connection.open_uni().await.ok()?),
    };
    stream.write_chunk(enframe(&message)).await.ok()
}
