//! The carriers of all sessions: one a server, each a pair of tasks behind bounded queues.
//!
//! Owns dialling and the tasks, and which carrier is current: what an older carrier of a server still says is dropped. Owns
//! no policy: whether and when to dial is the machine's.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use mesh_common::id::ServerId;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::session::{CarrierKind, CarrierReceiver, CarrierSender, Dialer, ServerAddress};

/// Messages to one server that wait for its carrier: a session says little, so a full queue is a dead carrier.
const OUTBOUND_QUEUE: usize = 64;
/// Messages of all servers that wait for the event loop; full = the servers wait.
const INBOUND_QUEUE: usize = 256;

#[derive(Debug)]
pub enum CarrierEvent {
    Connected {
        exporter: [u8; 32],
        kind: CarrierKind,
    },
    Message(Bytes),
    /// Dialling failed or the carrier broke, for this reason.
    Closed(String),
}

#[derive(Debug)]
pub struct Carriers {
    dialer: Arc<Dialer>,
    current: BTreeMap<ServerId, Current>,
    generation: u64,
    events: mpsc::Receiver<(ServerId, u64, CarrierEvent)>,
    sink: mpsc::Sender<(ServerId, u64, CarrierEvent)>,
}

#[derive(Debug)]
struct Current {
    generation: u64,
    outbound: mpsc::Sender<Bytes>,
    kind: Option<CarrierKind>,
    task: AbortHandle,
}

impl Carriers {
    pub fn new(dialer: Dialer) -> Self {
        let (sink, events) = mpsc::channel(INBOUND_QUEUE);
        Self { dialer: Arc::new(dialer), current: BTreeMap::new(), generation: 0, events, sink }
    }

    /// Opens a carrier to this server in place of the one it has.
    pub fn dial(&mut self, server: ServerId, address: ServerAddress) {
        self.drop_carrier(server);
        self.generation += 1;
        let generation = self.generation;
        let (outbound, queue) = mpsc::channel(OUTBOUND_QUEUE);
        let sink = Sink { server, generation, sink: self.sink.clone() };
        let dialer = Arc::clone(&self.dialer);
        let task = tokio::spawn(carry(dialer, address, queue, sink)).abort_handle();
        self.current.insert(server, Current { generation, outbound, kind: None, task });
    }

    /// Queues a message; without a carrier, or with one that does not drain, it is lost and the carrier with it.
    pub fn send(&mut self, server: ServerId, message: Bytes) {
        let Some(current) = self.current.get(&server) else { return };
        if current.outbound.try_send(message).is_err() {
            let lost = (server, current.generation, CarrierEvent::Closed("the server does not read".to_owned()));
            current.task.abort();
            // A full inbound queue wakes the loop anyway; the machine then notices the silence by itself.
            let _full = self.sink.try_send(lost);
        }
    }

    /// Sends what is queued, then closes.
    pub fn hang_up(&mut self, server: ServerId) {
        self.current.remove(&server);
    }

    pub fn kind(&self, server: ServerId) -> Option<CarrierKind> {
        self.current.get(&server)?.kind
    }

    /// The next event of a current carrier. Cancel-safe.
    pub async fn next(&mut self) -> (ServerId, CarrierEvent) {
        loop {
            let (server, generation, event) = self.events.recv().await.expect("the sender lives in self");
            let Some(current) = self.current.get_mut(&server).filter(|current| current.generation == generation) else {
                continue;
            };
            match &event {
                CarrierEvent::Connected { kind, .. } => current.kind = Some(*kind),
                CarrierEvent::Closed(_) => self.drop_carrier(server),
                CarrierEvent::Message(_) => {}
            }
            return (server, event);
        }
    }

    fn drop_carrier(&mut self, server: ServerId) {
        if let Some(current) = self.current.remove(&server) {
            current.task.abort();
        }
    }
}

/// Where one carrier's events go.
struct Sink {
    server: ServerId,
    generation: u64,
    sink: mpsc::Sender<(ServerId, u64, CarrierEvent)>,
}

impl Sink {
    async fn say(&self, event: CarrierEvent) {
        // The receiver goes when the agent is switched off: nobody is left to tell.
        let _gone = self.sink.send((self.server, self.generation, event)).await;
    }
}

/// The life of one carrier. Ends when it breaks, or when the outbound queue is closed and drained.
async fn carry(dialer: Arc<Dialer>, address: ServerAddress, queue: mpsc::Receiver<Bytes>, sink: Sink) {
    let carrier = match dialer.dial(&address).await {
        Ok(carrier) => carrier,
        Err(error) => return sink.say(CarrierEvent::Closed(error.to_string())).await,
    };
    sink.say(CarrierEvent::Connected { exporter: carrier.exporter, kind: carrier.kind }).await;
    tokio::select! {
        () = write(queue, carrier.sender) => {}
        reason = read(carrier.receiver, &sink) => sink.say(CarrierEvent::Closed(reason)).await,
    }
}

/// Returns once everything is sent and the carrier is closed; never when sending fails, because reading tells why.
async fn write(mut queue: mpsc::Receiver<Bytes>, mut sender: CarrierSender) {
    while let Some(message) = queue.recv().await {
        if sender.send(message).await.is_err() {
            return std::future::pending().await;
        }
    }
    sender.close().await;
}

async fn read(mut receiver: CarrierReceiver, sink: &Sink) -> String {
    loop {
        match receiver.next().await {
            Some(Ok(message)) => sink.say(CarrierEvent::Message(message)).await,
            Some(Err(error)) => return error.to_string(),
            None => return "the server closed the session".to_owned(),
        }
    }
}
