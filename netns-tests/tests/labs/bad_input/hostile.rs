//! A discovery server that lies: it accepts every proof and says whatever a test tells it to say. As a relay it loses every
//! third datagram, turns the order around, repeats, alters, gives to the wrong node and denies that the right one is there.

use std::{
    collections::BTreeMap,
    mem,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use mesh_common::{id::NodeId, limits::MAX_MESSAGE};
use mesh_proto::wire::{
    frame::Frame,
    session::{ALPN, ClientMessage, Cursor, Deframer, ServerMessage, Welcome, enframe},
};
use netns_tests::{Host, mesh::config::ServerAddress};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

/// How often a session looks for something new to say.
const LOOK: Duration = Duration::from_millis(20);

/// Dropping it ends it.
pub(crate) struct Hostile {
    pub(crate) address: ServerAddress,
    said: Arc<Said>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Said {
    /// It offers to relay.
    relays: bool,
    /// Relayed datagrams so far, and what waits for each node.
    relayed: Mutex<(u64, BTreeMap<NodeId, Vec<ServerMessage>>)>,
    script: Mutex<Script>,
    /// Frames that agents put.
    put: Mutex<Vec<Frame>>,
    sessions: Mutex<u32>,
    end: Notify,
}

#[derive(Default)]
struct Script {
    /// Length-prefixed messages, in order.
    messages: Vec<Bytes>,
    /// Where a new session begins.
    from: usize,
}

/// Nobody that a node knows.
const STRANGER: NodeId = NodeId([0x5a; 32]);

impl Hostile {
    pub(crate) fn start(host: &Host, at: IpAddr, port: u16) -> Self {
        Self::start_as(host, at, port, false)
    }

    /// One that relays, in its way.
    pub(crate) fn start_relay(host: &Host, at: IpAddr, port: u16) -> Self {
        Self::start_as(host, at, port, true)
    }

    fn start_as(host: &Host, at: IpAddr, port: u16, relays: bool) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["hostile.example".to_owned()]).unwrap();
        let certificate = certificate.self_signed(&key).unwrap();
        let pin = Sha256::digest(rcgen::PublicKeyData::subject_public_key_info(&key));
        let mut tls = rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], rustls_key(&key))
            .unwrap();
        tls.alpn_protocols = vec![ALPN.as_bytes().to_vec()];
        let said = Arc::new(Said { relays, ..Said::default() });
        let socket = host.inside(|| Ok(UdpSocket::bind((at, port))?)).unwrap();
        let thread = host.start_inside({
            let said = Arc::clone(&said);
            move || {
                tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(socket, tls, said))
            }
        });
        Self {
            address: ServerAddress {
                endpoint: format!("https://{}", SocketAddr::new(at, port)),
                pin: format!("sha256:{}", data_encoding::HEXLOWER.encode(&pin)),
            },
            said,
            thread: Some(thread.unwrap()),
        }
    }

    /// Says a frame, or what looks like one, to everybody.
    pub(crate) fn say_frame(&self, frame: impl Into<Bytes>) {
        self.say(&ServerMessage::Frame(frame.into()));
    }

    pub(crate) fn say(&self, message: &ServerMessage) {
        self.say_raw(&message.encode());
    }

    pub(crate) fn say_raw(&self, message: &[u8]) {
        lock(&self.said.script).messages.push(enframe(message));
    }

    /// Later sessions are not told what was said so far.
    pub(crate) fn forget(&self) {
        let mut script = lock(&self.said.script);
        script.from = script.messages.len();
    }

    /// The frames that agents have put so far.
    pub(crate) fn put(&self) -> Vec<Frame> {
        lock(&self.said.put).clone()
    }

    /// Datagrams that agents had it relay so far.
    pub(crate) fn relayed(&self) -> u64 {
        lock(&self.said.relayed).0
    }

    /// Sessions so far.
    pub(crate) fn sessions(&self) -> u32 {
        *lock(&self.said.sessions)
    }
}

impl Drop for Hostile {
    fn drop(&mut self) {
        self.said.end.notify_one();
        if let Some(thread) = self.thread.take() {
            // A failed server has failed its test already.
            let _ = thread.join();
        }
    }
}

async fn serve(socket: UdpSocket, tls: rustls::ServerConfig, said: Arc<Said>) -> Result<()> {
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint = quinn::Endpoint::new(quinn::EndpointConfig::default(), Some(config), socket, runtime)?;
    loop {
        tokio::select! {
            () = said.end.notified() => return Ok(()),
            incoming = endpoint.accept() => {
                let incoming = incoming.context("the endpoint ended")?;
                let said = Arc::clone(&said);
                tokio::spawn(async move { session(incoming, &said).await });
            }
        }
    }
}

/// One agent: welcomed, told an empty snapshot, then the script.
async fn session(incoming: quinn::Incoming, said: &Said) -> Result<()> {
    let connection = incoming.await?;
    let (mut send, mut receive) = connection.accept_bi().await?;
    let mut deframer = Deframer::default();
    let mut told = None;
    let mut node = None;
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            chunk = receive.read_chunk(MAX_MESSAGE, true) => {
                let Some(chunk) = chunk? else { return Ok(()) };
                deframer.push(&chunk.bytes);
                while let Some(message) = deframer.next_message()? {
                    if message.is_empty() {
                        continue;
                    }
                    match ClientMessage::decode(&message)? {
                        ClientMessage::Hello(hello) => {
                            node = Some(hello.node);
                            for message in welcome(connection.remote_address(), said.relays) {
                                send.write_chunk(enframe(&message.encode())).await?;
                            }
                            told = Some(lock(&said.script).from);
                            *lock(&said.sessions) += 1;
                        }
                        ClientMessage::Put(frame) => {
                            let frame = Frame::parse(frame)?;
                            send.write_chunk(enframe(&ServerMessage::Stored { seq: frame.seq() }.encode())).await?;
                            lock(&said.put).push(frame);
                        }
                        ClientMessage::Watch(_) => {}
                        ClientMessage::Relay { to, payload } => mishandle(said, node, to, payload),
                        ClientMessage::Ping(number) => {
                            send.write_chunk(enframe(&ServerMessage::Pong(number).encode())).await?;
                        }
                    }
                }
            }
            datagram = connection.read_datagram() => {
                if let ClientMessage::Relay { to, payload } = ClientMessage::decode(&datagram?)? {
                    mishandle(said, node, to, payload);
                }
            }
            _ = look.tick() => {
                let waiting = node.and_then(|node| lock(&said.relayed).1.get_mut(&node).map(mem::take));
                for message in waiting.into_iter().flatten().rev() {
                    // What does not fit is lost, too.
                    let _ = connection.send_datagram(message.encode());
                }
                let Some(told) = &mut told else { continue };
                let more = lock(&said.script).messages.get(*told..).map(<[Bytes]>::to_vec).unwrap_or_default();
                *told += more.len();
                for message in more {
                    send.write_chunk(message).await?;
                }
            }
        }
    }
}

fn mishandle(said: &Said, from: Option<NodeId>, to: NodeId, payload: Bytes) {
    let Some(from) = from else { return };
    let mut relayed = lock(&said.relayed);
    let (count, waiting) = &mut *relayed;
    *count += 1;
    let mut altered = payload.to_vec();
    if let Some(byte) = altered.get_mut(20) {
        *byte ^= 1;
    }
    let to_sender = waiting.entry(from).or_default();
    to_sender.push(ServerMessage::NoPeer(to));
    to_sender.push(ServerMessage::Relayed { from: to, payload: payload.clone() });
    let to_receiver = waiting.entry(to).or_default();
    to_receiver.push(ServerMessage::Relayed { from: STRANGER, payload: payload.clone() });
    to_receiver.push(ServerMessage::Relayed { from, payload: altered.into() });
    if *count % 3 != 0 {
        to_receiver.extend([(); 2].map(|()| ServerMessage::Relayed { from, payload: payload.clone() }));
    }
}

fn welcome(observed: SocketAddr, relay: bool) -> [ServerMessage; 3] {
    [
        ServerMessage::Welcome(Welcome {
            server_instance: 1,
            observed,
            stun_ports: Vec::new(),
            slot_ttl: Duration::from_secs(120),
            max_slots: 1024,
            relay,
            stun_alt: Vec::new(),
        }),
        ServerMessage::Restart,
        ServerMessage::Synced(Cursor { server_instance: 1, version: 1 }),
    ]
}

fn rustls_key(key: &rcgen::KeyPair) -> rustls::pki_types::PrivateKeyDer<'static> {
    rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into()
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
