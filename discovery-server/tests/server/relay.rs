//! Two sessions of the real machines and carriers, and what passes between them through the server.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_agent::clock;
use mesh_agent::io::carriers::{CarrierEvent, Carriers};
use mesh_agent::io::session::{CarrierKind, Dialer, ServerAddress};
use mesh_common::id::{NodeId, ServerId};
use mesh_common::key::SignKey;
use mesh_proto::discovery::client::{Client, ClientConfig, ClientEvent, ClientState};
use mesh_proto::sealed::seal;
use mesh_proto::wire::session::{ErrorCode, SessionError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::support::{Running, address_for, cluster, in_time};

const SERVER: ServerId = ServerId(0);
/// A WireGuard datagram of a 1280-byte packet.
const DATAGRAM: usize = 1280 + 32;
const BURST: u32 = 20;

#[tokio::test]
async fn a_thousand_datagrams_pass_both_ways_over_either_carrier() {
    let dir = tempfile::tempdir().unwrap();
    let plenty = "1000000000";
    let server = Running::start(dir.path(), &["--relay-client-bytes", plenty, "--relay-namespace-bytes", plenty]);
    for (cluster_seed, kind) in [(1, CarrierKind::Quic), (2, CarrierKind::WebSocket)] {
        let address = address_for(kind, &server).await;
        let mut one = Node::join(&address, cluster_seed, 1).await;
        let mut two = Node::join(&address, cluster_seed, 2).await;
        assert_eq!((one.carriers.kind(SERVER), two.carriers.kind(SERVER)), (Some(kind), Some(kind)));
        // In small bursts: nothing promises that a busy machine's sockets hold more.
        for round in 0..50 {
            let numbers = round * BURST..(round + 1) * BURST;
            for number in numbers.clone() {
                one.relay(two.id, &datagram(1, number));
                two.relay(one.id, &datagram(2, number));
            }
            in_time("a burst both ways", async {
                while one.relayed.len() < BURST as usize || two.relayed.len() < BURST as usize {
                    tokio::select! {
                        () = one.step() => {}
                        () = two.step() => {}
                    }
                }
            })
            .await;
            // Some may go by stream and others by datagram while QUIC learns what the path takes: order is not promised.
            let ids = (one.id, two.id);
            for (node, sender, from) in [(&mut one, ids.1, 2), (&mut two, ids.0, 1)] {
                let mut got: Vec<_> = node.relayed.drain(..).collect();
                got.sort();
                let expected = numbers.clone().map(|number| (sender, datagram(from, number)));
                assert_eq!(got, expected.collect::<Vec<_>>(), "{kind:?}, round {round}");
            }
        }
        assert_eq!((one.carriers.relay_dropped(), two.carriers.relay_dropped()), (0, 0));
    }
    let (_, metrics) = server.get("/metrics");
    assert!(metrics.contains("meshspan_discovery_relayed_datagrams_total 4000"), "{metrics}");
}

#[tokio::test]
async fn nobody_of_another_cluster_is_reached_and_nobody_who_left() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let mut one = Node::join(&server.address(), 1, 1).await;
    let mut stranger = Node::join(&server.address(), 2, 2).await;
    let mut other = Node::join(&server.address(), 1, 3).await;
    one.relay(stranger.id, b"hello?");
    one.until("the answer", |node| node.no_peer.pop()).await;
    // What came first is here before what came second.
    one.relay(other.id, b"hello");
    other.until("the datagram", |node| node.relayed.pop_front()).await;
    stranger.relay(other.id, b"hello?");
    stranger.until("the answer", |node| node.no_peer.pop()).await;
    assert_eq!((stranger.relayed.len(), other.relayed.len()), (0, 0));
    drop(other);
    in_time("the end of the other session", async {
        while one.no_peer.is_empty() {
            one.relay(node_id(3), b"still there?");
            tokio::select! {
                () = one.step() => {}
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
        }
    })
    .await;
    assert_eq!(one.no_peer, [node_id(3)]);
}

#[tokio::test]
async fn a_flood_meets_the_limit_by_its_name_and_its_neighbours_do_not_notice() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &["--relay-client-bytes", "200000"]);
    let mut flooder = Node::join(&server.address(), 1, 1).await;
    let mut victim = Node::join(&server.address(), 1, 2).await;
    let mut neighbours = (Node::join(&server.address(), 1, 3).await, Node::join(&server.address(), 1, 4).await);
    for number in 0..40 {
        for more in 0..50 {
            flooder.relay(victim.id, &datagram(1, more));
        }
        neighbours.0.relay(neighbours.1.id, &datagram(3, number));
        in_time("the neighbour's datagram", async {
            while neighbours.1.relayed.pop_front().is_none() {
                tokio::select! {
                    () = flooder.step() => {}
                    () = victim.step() => {}
                    () = neighbours.0.step() => {}
                    () = neighbours.1.step() => {}
                }
            }
        })
        .await;
    }
    let error = flooder.until("the limit", |node| node.refused.pop()).await;
    assert_eq!((error.code, error.limit.as_str()), (ErrorCode::RateLimited, "relay-client-bytes"));
    assert_eq!(neighbours.0.refused, []);
    let (_, metrics) = server.get("/metrics");
    assert!(metrics.contains("meshspan_discovery_relay_dropped_total{reason=\"relay-client-bytes\"}"), "{metrics}");
}

#[tokio::test]
async fn a_server_may_be_without_relay() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &["--relay", "off"]);
    let mut node = Node::join(&server.address(), 1, 1).await;
    assert_eq!((node.client.offers_relay(), node.client.relay(&node_id(2), b"hello", clock::now())), (false, None));
}

/// Fills a packet of QUIC, so that nothing else travels with it.
const FULL: usize = 1376;

/// A line of 100 kB/s that is flooded with relayed datagrams: a record is stored all the same, and soon.
#[tokio::test]
async fn a_control_message_does_not_wait_behind_relayed_ones() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    for (cluster_seed, kind) in [(1, CarrierKind::Quic), (2, CarrierKind::WebSocket)] {
        let slow = ServerAddress {
            port: match kind {
                CarrierKind::Quic => slow_udp(server.socket()).await,
                CarrierKind::WebSocket => slow_tcp(server.socket()).await,
            },
            ..server.address()
        };
        let mut node = Node::join(&slow, cluster_seed, 1).await;
        let mut peer = Node::join(&server.address(), cluster_seed, 2).await;
        assert_eq!(node.carriers.kind(SERVER), Some(kind));
        let mut feed = tokio::time::interval(Duration::from_millis(5));
        for seq in 1..=5 {
            // Full queues everywhere before and while the record is put.
            let mut ticks = 0;
            let asked = in_time("a record that is stored", async {
                let mut asked = None;
                loop {
                    tokio::select! {
                        biased;
                        _ = feed.tick() => {
                            ticks += 1;
                            for _ in 0..8 {
                                node.relay(peer.id, &[4; FULL]);
                            }
                            if ticks == 200 {
                                node.publish(seq);
                                asked = Some(std::time::Instant::now());
                            }
                        }
                        () = node.step() => if node.stored.take().is_some() { return asked.unwrap() },
                        () = peer.step() => {}
                    }
                }
            })
            .await;
            let took = asked.elapsed();
            assert!(took < Duration::from_secs(3), "{kind:?}: {took:?}");
        }
        assert!(node.carriers.relay_dropped() > 1000, "{kind:?}: the line was full");
        assert!(peer.relayed.len() > 100, "{kind:?}: and carried what it could");
    }
}

fn node_id(seed: u8) -> NodeId {
    SignKey::from_seed(&[seed; 32]).node_id()
}

fn datagram(from: u8, number: u32) -> Bytes {
    let mut bytes = vec![from; DATAGRAM];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    bytes.into()
}

/// An agent without a mesh: its session and its carrier.
struct Node {
    id: NodeId,
    cluster_seed: u8,
    identity: SignKey,
    client: Client,
    carriers: Carriers,
    address: ServerAddress,
    relayed: VecDeque<(NodeId, Bytes)>,
    no_peer: Vec<NodeId>,
    refused: Vec<SessionError>,
    stored: Option<u64>,
}

impl Node {
    /// A session that is welcome.
    async fn join(address: &ServerAddress, cluster_seed: u8, node_seed: u8) -> Self {
        let identity = SignKey::from_seed(&[node_seed; 32]);
        let config = ClientConfig {
            server_name: "disc.example:443".to_owned(),
            keys: cluster(cluster_seed),
            identity: identity.clone(),
            instance: [node_seed; 16],
            proxied: false,
        };
        let mut node = Self {
            id: identity.node_id(),
            cluster_seed,
            identity,
            client: Client::new(config, 1, clock::now()),
            carriers: Carriers::new(Dialer::new().unwrap()),
            address: address.clone(),
            relayed: VecDeque::new(),
            no_peer: Vec::new(),
            refused: Vec::new(),
            stored: None,
        };
        node.until("the welcome", |node| {
            matches!(node.client.state(), ClientState::Syncing | ClientState::Live).then_some(())
        })
        .await;
        node
    }

    fn relay(&mut self, to: NodeId, payload: &[u8]) {
        let message = self.client.relay(&to, payload, clock::now()).expect("the session offers it");
        self.carriers.send_relay(SERVER, message);
    }

    fn publish(&mut self, seq: u64) {
        let farewell = seal(&cluster(self.cluster_seed), &self.identity, seq, None, [0; 24]).unwrap();
        self.client.publish(farewell, clock::now());
        self.drain();
    }

    async fn until<T>(&mut self, what: &str, mut pick: impl FnMut(&mut Self) -> Option<T>) -> T {
        in_time(what, async {
            loop {
                if let Some(picked) = pick(self) {
                    return picked;
                }
                self.step().await;
            }
        })
        .await
    }

    /// One event. Cancel-safe.
    async fn step(&mut self) {
        self.drain();
        let wake = self.client.poll_timeout().map_or(Duration::from_secs(60), |(at, _)| at.since(clock::now()));
        tokio::select! {
            (server, event) = self.carriers.next() => {
                assert_eq!(server, SERVER);
                match event {
                    CarrierEvent::Connected { exporter, addresses, .. } => {
                        assert_eq!(addresses, [self.address.host.parse::<std::net::IpAddr>().unwrap()]);
                        self.client.handle_connected(exporter, clock::now());
                    }
                    CarrierEvent::Message(message) => self.client.handle_message(&message, clock::now()),
                    CarrierEvent::Closed(reason) => panic!("the carrier broke: {reason}"),
                }
            }
            () = tokio::time::sleep(wake) => self.client.handle_timeout(clock::now()),
        }
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(message) = self.client.poll_transmit() {
            self.carriers.send(SERVER, message);
        }
        while let Some(event) = self.client.poll_event() {
            match event {
                ClientEvent::Dial => self.carriers.dial(SERVER, self.address.clone()),
                ClientEvent::HangUp => self.carriers.hang_up(SERVER),
                ClientEvent::Relayed { from, payload } => self.relayed.push_back((from, payload)),
                ClientEvent::NoPeer(node) => self.no_peer.push(node),
                ClientEvent::Refused(error) => self.refused.push(error),
                ClientEvent::Stored { seq } => self.stored = Some(seq),
                ClientEvent::Lost { reason, .. } => panic!("the session was lost: {reason}"),
                _ => {}
            }
        }
    }
}

const LINE_BYTES_PER_SECOND: u32 = 100_000;
/// What waits at the head of the line: then it drops, as routers do.
const LINE_BUFFER: usize = 16;

fn time_on_the_line(bytes: usize) -> Duration {
    Duration::from_secs(1) * u32::try_from(bytes).unwrap() / LINE_BYTES_PER_SECOND
}

/// A way to the server for one client whose uplink is a slow line, by UDP; the port to dial.
async fn slow_udp(server: SocketAddr) -> u16 {
    let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let far = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    far.connect(server).await.unwrap();
    let port = near.local_addr().unwrap().port();
    let (line, mut head) = tokio::sync::mpsc::channel::<Vec<u8>>(LINE_BUFFER);
    tokio::spawn({
        let far = far.clone();
        async move {
            while let Some(datagram) = head.recv().await {
                tokio::time::sleep(time_on_the_line(datagram.len())).await;
                // The server may be gone.
                let _ = far.send(&datagram).await;
            }
        }
    });
    tokio::spawn(async move {
        let (mut up, mut down) = (vec![0; 2048], vec![0; 2048]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((len, from)) = near.recv_from(&mut up) => {
                    client = Some(from);
                    // Full is full.
                    let _ = line.try_send(up[..len].to_vec());
                }
                Ok(len) = far.recv(&mut down) => {
                    if let Some(client) = client {
                        let _ = near.send_to(&down[..len], client).await;
                    }
                }
            }
        }
    });
    port
}

/// The same by TCP, which cannot drop.
async fn slow_tcp(server: SocketAddr) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    socket2::SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(server).await.unwrap();
            let (mut near_in, mut near_out) = near.into_split();
            let (mut far_in, mut far_out) = far.into_split();
            tokio::spawn(async move {
                let mut chunk = vec![0; 2048];
                while let Ok(len @ 1..) = near_in.read(&mut chunk).await {
                    tokio::time::sleep(time_on_the_line(len)).await;
                    if far_out.write_all(&chunk[..len]).await.is_err() {
                        return;
                    }
                }
            });
            // Either end may close first.
            tokio::spawn(async move { tokio::io::copy(&mut far_in, &mut near_out).await });
        }
    });
    port
}
