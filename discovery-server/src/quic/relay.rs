//! The lane of relayed messages over QUIC: datagrams, and one stream for those that fit none.
//!
//! Waiting messages stay in the machine, where the oldest can be dropped: QUIC gets only as many as it sends soon. It sends
//! datagrams before streams, so after [`TURN`] of them without a rest the lane pauses where the control stream has something.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mesh_common::limits::MAX_MESSAGE;
use mesh_proto::wire::session::{Deframer, enframe};
use quinn::{Connection, SendDatagramError, SendStream};

use crate::connection::Broken;
use crate::hub::Session;

/// Datagrams in a row that the control stream waits for at most.
const TURN: u32 = 16;
const MAX_PAUSE: Duration = Duration::from_millis(100);

/// Who may send: set when the control stream was written to, cleared by a pause of the datagrams.
#[derive(Debug, Default)]
pub(super) struct Turns(AtomicBool);

impl Turns {
    pub(super) fn control_wrote(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_controls(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

/// Returns when the connection broke.
pub(super) async fn send(session: &Session, connection: &Connection, turns: &Turns) {
    let mut large = None;
    let mut in_a_row = 0;
    loop {
        if in_a_row >= TURN && turns.is_controls() {
            tokio::time::sleep((connection.rtt() / 4).min(MAX_PAUSE)).await;
            in_a_row = 0;
        }
        let Some(message) = session.next_relayed() else {
            in_a_row = 0;
            session.relay_woken().await;
            continue;
        };
        if send_one(connection, &mut large, message).await.is_err() {
            return;
        }
        in_a_row += 1;
    }
}

/// Returns when the connection broke, or what came is not the protocol.
pub(super) async fn receive(session: &Session, connection: &Connection) {
    let datagrams = async {
        while let Ok(message) = connection.read_datagram().await {
            session.message(&message);
        }
    };
    let large = async {
        while let Ok(mut stream) = connection.accept_uni().await {
            let mut deframer = Deframer::default();
            while let Ok(Some(chunk)) = stream.read_chunk(MAX_MESSAGE, true).await {
                deframer.push(&chunk.bytes);
                loop {
                    match deframer.next_message() {
                        Ok(Some(message)) => session.message(&message),
                        Ok(None) => break,
                        Err(_) => return,
                    }
                }
            }
        }
    };
    tokio::select! {
        () = datagrams => {}
        () = large => {}
    }
}

async fn send_one(connection: &Connection, large: &mut Option<SendStream>, message: Bytes) -> Result<(), Broken> {
    if connection.max_datagram_size().is_some_and(|max| message.len() <= max) {
        match connection.send_datagram_wait(message.clone()).await {
            Ok(()) => return Ok(()),
            // The path shrank in between.
            Err(SendDatagramError::TooLarge) => {}
            Err(_) => return Err(Broken),
        }
    }
    let stream = match large {
        Some(stream) => stream,
        None => large.insert(connection.open_uni().await.map_err(|_| Broken)?),
    };
    stream.write_chunk(enframe(&message)).await.map_err(|_| Broken)
}
