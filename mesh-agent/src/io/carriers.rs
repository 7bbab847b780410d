//! The carriers of all sessions: one a server, each a task behind bounded queues.
//!
//! Control messages wait for each other, and for nothing else: relayed ones have queues of their own both ways, which drop their
//! oldest. Owns dialling and the tasks, and which carrier is current: what an older carrier of a server still says is dropped. Owns
//! no policy: whether and when to dial is the machine's.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use mesh_common::config::ProxyUrl;
use mesh_common::id::ServerId;
use mesh_proto::wire::session::is_relayed;
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;

use super::relay_queue::RelayQueue;
use super::session::{Carrier, CarrierKind, CarrierReceiver, CarrierSender, Dialer, RelayReceiver, ServerAddress};

/// Messages to one server that wait for its carrier: a session says little, so a full queue is a dead carrier.
const OUTBOUND_QUEUE: usize = 64;
/// Messages of all servers that wait for the event loop; full = the servers wait.
const INBOUND_QUEUE: usize = 256;

#[derive(Debug)]
pub enum CarrierEvent {
    Connected {
        exporter: [u8; 32],
        kind: CarrierKind,
        /// All addresses of the server's name; none when only a proxy could resolve it.
        addresses: Vec<IpAddr>,
        /// The proxy it goes through.
        proxy: Option<ProxyUrl>,
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
    /// Some carrier has relayed messages for us.
    relayed: Arc<Notify>,
    /// Whose relayed message was the last: the others come first.
    last_relayed: ServerId,
    relay_dropped: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Current {
    generation: u64,
    outbound: mpsc::Sender<Bytes>,
    relay: Arc<RelayLanes>,
    kind: Option<CarrierKind>,
    proxy: Option<ProxyUrl>,
    task: AbortHandle,
}

/// Relayed messages on their way through this process.
#[derive(Debug)]
struct RelayLanes {
    outbound: RelayQueue,
    inbound: RelayQueue,
}

impl Carriers {
    pub fn new(dialer: Dialer) -> Self {
        let (sink, events) = mpsc::channel(INBOUND_QUEUE);
        Self {
            dialer: Arc::new(dialer),
            current: BTreeMap::new(),
            generation: 0,
            events,
            sink,
            relayed: Arc::default(),
            last_relayed: ServerId(0),
            relay_dropped: Arc::default(),
        }
    }

    /// Opens a carrier to this server in place of the one it has.
    pub fn dial(&mut self, server: ServerId, address: ServerAddress) {
        self.drop_carrier(server);
        self.generation += 1;
        let generation = self.generation;
        let (outbound, queue) = mpsc::channel(OUTBOUND_QUEUE);
        let dropped = || Arc::clone(&self.relay_dropped);
        let relay = Arc::new(RelayLanes {
            outbound: RelayQueue::sharing(Arc::default(), dropped()),
            inbound: RelayQueue::sharing(Arc::clone(&self.relayed), dropped()),
        });
        let sink = Sink { server, generation, sink: self.sink.clone(), relay: Arc::clone(&relay) };
        let dialer = Arc::clone(&self.dialer);
        let task = tokio::spawn(carry(dialer, address, queue, sink)).abort_handle();
        self.current.insert(server, Current { generation, outbound, relay, kind: None, proxy: None, task });
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

    /// Hands a relayed message to the carrier: it may be lost, and is when the carrier does not keep up or is not there.
    pub fn send_relay(&self, server: ServerId, message: Bytes) {
        if let Some(current) = self.current.get(&server) {
            current.relay.outbound.push(message);
        }
    }

    /// Relayed messages of both directions that were dropped because newer ones came faster than they left.
    pub fn relay_dropped(&self) -> u64 {
        self.relay_dropped.load(Ordering::Relaxed)
    }

    /// Sends what is queued, then closes.
    pub fn hang_up(&mut self, server: ServerId) {
        self.current.remove(&server);
    }

    pub fn kind(&self, server: ServerId) -> Option<CarrierKind> {
        self.current.get(&server)?.kind
    }

    /// The proxy that the carrier goes through.
    pub fn proxy(&self, server: ServerId) -> Option<&ProxyUrl> {
        self.current.get(&server)?.proxy.as_ref()
    }

    /// The next event of a current carrier; relayed messages come when there is no other. Cancel-safe.
    pub async fn next(&mut self) -> (ServerId, CarrierEvent) {
        loop {
            let (server, generation, event) = tokio::select! {
                biased;
                event = self.events.recv() => event.expect("the sender lives in self"),
                (server, message) = next_relayed(&self.current, self.last_relayed, &self.relayed) => {
                    self.last_relayed = server;
                    return (server, CarrierEvent::Message(message));
                }
            };
            let Some(current) = self.current.get_mut(&server).filter(|current| current.generation == generation) else {
                continue;
            };
            match &event {
                CarrierEvent::Connected { kind, proxy, .. } => {
                    current.kind = Some(*kind);
                    current.proxy.clone_from(proxy);
                }
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

/// The next relayed message, the servers taking turns. Cancel-safe.
async fn next_relayed(current: &BTreeMap<ServerId, Current>, last: ServerId, relayed: &Notify) -> (ServerId, Bytes) {
    loop {
        let turns = current.range((Bound::Excluded(last), Bound::Unbounded)).chain(current.range(..=last));
        for (server, current) in turns {
            if let Some(message) = current.relay.inbound.pop() {
                return (*server, message);
            }
        }
        relayed.notified().await;
    }
}

/// Where one carrier's events go.
struct Sink {
    server: ServerId,
    generation: u64,
    sink: mpsc::Sender<(ServerId, u64, CarrierEvent)>,
    relay: Arc<RelayLanes>,
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
    let Carrier { kind, addresses, proxy, exporter, sender, receiver, relay, .. } = carrier;
    sink.say(CarrierEvent::Connected { exporter, kind, addresses, proxy }).await;
    let reason = match relay {
        None => tokio::select! {
            () = write(queue, Some(&sink.relay.outbound), sender) => return,
            reason = read(receiver, &sink) => reason,
        },
        Some(lane) => tokio::select! {
            () = write(queue, None, sender) => return,
            reason = read(receiver, &sink) => reason,
            () = lane.sender.run(&sink.relay.outbound) => return,
            () = read_relayed(lane.receiver, &sink) => return,
        },
    };
    sink.say(CarrierEvent::Closed(reason)).await;
}

/// Returns once everything is sent and the carrier is closed; never when sending fails, because reading tells why. Relayed
/// messages that have no lane of their own go when no other waits.
async fn write(mut queue: mpsc::Receiver<Bytes>, relay: Option<&RelayQueue>, mut sender: CarrierSender) {
    loop {
        let next = tokio::select! {
            biased;
            next = queue.recv() => next,
            relayed = next_of(relay) => Some(relayed),
        };
        let Some(message) = next else { break };
        if sender.send(message).await.is_err() {
            return std::future::pending().await;
        }
    }
    sender.close().await;
}

async fn next_of(relay: Option<&RelayQueue>) -> Bytes {
    let Some(relay) = relay else { return std::future::pending().await };
    loop {
        if let Some(message) = relay.pop() {
            return message;
        }
        relay.filled().await;
    }
}

async fn read(mut receiver: CarrierReceiver, sink: &Sink) -> String {
    loop {
        match receiver.next().await {
            Some(Ok(message)) if is_relayed(&message) => sink.relay.inbound.push(message),
            Some(Ok(message)) => sink.say(CarrierEvent::Message(message)).await,
            Some(Err(error)) => return error.to_string(),
            None => return "the server closed the session".to_owned(),
        }
    }
}

async fn read_relayed(mut receiver: RelayReceiver, sink: &Sink) {
    loop {
        sink.relay.inbound.push(receiver.next().await);
    }
}
