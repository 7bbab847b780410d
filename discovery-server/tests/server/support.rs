//! A running server, and members that speak to it without an agent around them.

use std::future::Future;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_agent::io::session::{Carrier, CarrierKind, Dialer, ServerAddress};
use mesh_common::config::Pin;
use mesh_common::host_name::HostName;
use mesh_common::key::{ClusterKeys, ClusterSecret, SignKey, WgSecret};
use mesh_proto::sealed::seal;
use mesh_proto::wire::frame::Frame;
use mesh_proto::wire::record::Record;
use mesh_proto::wire::session::{Binding, ClientMessage, Hello, ServerMessage, Welcome};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::TcpListener;

/// Longer than any wait of a healthy test, shorter than the patience of a gate.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Running {
    child: Child,
    log: Arc<Log>,
    pub(crate) pin: [u8; 32],
    pub(crate) port: u16,
    pub(crate) http: Option<SocketAddr>,
    pub(crate) stun: Vec<u16>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<serde_json::Value>, bool)>,
    grown: Condvar,
}

pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_discovery-server"));
    command
        .env_remove("STATE_DIRECTORY")
        .env_remove("NOTIFY_SOCKET")
        .env_remove("MESHSPAN_LOG")
        .env_remove("JOURNAL_STREAM");
    command
}

impl Running {
    /// Starts a server on free ports of 127.0.0.1; later flags of `more` come on top.
    pub(crate) fn start(state_dir: &Path, more: &[&str]) -> Self {
        let mut child = Self::spawn(state_dir, more);
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut value_of = |key: &str| {
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            line.trim_end().strip_prefix(key).unwrap_or_else(|| panic!("{key} expected, got {line:?}")).to_owned()
        };
        let endpoint = value_of("endpoint=https://");
        let pin = value_of("pin=").parse::<Pin>().unwrap().0;
        let mut running = Self::watch(child);
        running.port = endpoint.rsplit_once(':').unwrap().1.parse().unwrap();
        running.pin = pin;
        running
    }

    /// The same, with nobody who reads its standard output.
    pub(crate) fn start_unheard(state_dir: &Path) -> Self {
        let mut child = Self::spawn(state_dir, &[]);
        drop(child.stdout.take());
        Self::watch(child)
    }

    fn spawn(state_dir: &Path, more: &[&str]) -> Child {
        let mut command = binary();
        for (flag, value) in [("--listen", "127.0.0.1:0"), ("--stun", "127.0.0.1:0"), ("--http", "127.0.0.1:0")] {
            if !more.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command
            .args(["--log-format", "json", "--state-dir"])
            .arg(state_dir)
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn watch(mut child: Child) -> Self {
        let log = Arc::new(Log::default());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn({
            let log = log.clone();
            move || {
                for line in stderr.lines().map_while(Result::ok) {
                    let entry = serde_json::from_str(&line).unwrap_or(serde_json::Value::String(line));
                    log.lines.lock().unwrap().0.push(entry);
                    log.grown.notify_all();
                }
                log.lines.lock().unwrap().1 = true;
                log.grown.notify_all();
            }
        });
        let mut running = Self { child, log, pin: [0; 32], port: 0, http: None, stun: Vec::new() };
        let started = running.logged("started");
        running.http = started["http"].as_str().unwrap().parse().ok();
        running.stun = serde_json::from_str(started["stun"].as_str().unwrap()).unwrap();
        running
    }

    /// The first log entry whose message begins like this, once it is there.
    pub(crate) fn logged(&self, message: &str) -> serde_json::Value {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.log.lines.lock().unwrap();
        loop {
            let found =
                lines.0.iter().find(|entry| entry["message"].as_str().is_some_and(|text| text.starts_with(message)));
            if let Some(entry) = found {
                return entry.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && !lines.1, "{message:?} was not logged: {:#?}", lines.0);
            lines = self.log.grown.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Everything logged so far, as one text.
    pub(crate) fn log_text(&self) -> String {
        self.log.lines.lock().unwrap().0.iter().map(|entry| format!("{entry}\n")).collect()
    }

    pub(crate) fn address(&self) -> ServerAddress {
        ServerAddress { host: "127.0.0.1".to_owned(), port: self.port, pin: self.pin, proxy: None }
    }

    pub(crate) fn socket(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Until the process has ended.
    pub(crate) async fn wait(&mut self) -> ExitStatus {
        in_time("the end of the process", async {
            let mut look = tokio::time::interval(Duration::from_millis(5));
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status;
                }
                look.tick().await;
            }
        })
        .await
    }

    /// Status and body of a plain HTTP request.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.http.unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn key_file(state_dir: &Path) -> PathBuf {
    state_dir.join("tls.key")
}

/// A member of a cluster with a session.
pub(crate) struct Member {
    pub(crate) keys: ClusterKeys,
    pub(crate) identity: SignKey,
    pub(crate) carrier: Carrier,
}

pub(crate) fn cluster(seed: u8) -> ClusterKeys {
    let mut secret = [seed; 32];
    secret[0] ^= 0xff;
    ClusterSecret::from_bytes(secret).derive()
}

impl Member {
    /// A carrier that is up, nothing said on it.
    pub(crate) async fn connect(dialer: &Dialer, server: &ServerAddress, cluster_seed: u8, node_seed: u8) -> Self {
        let carrier = dialer.dial(server).await.unwrap();
        Self { keys: cluster(cluster_seed), identity: SignKey::from_seed(&[node_seed; 32]), carrier }
    }

    /// A session up to its Welcome.
    pub(crate) async fn join(
        dialer: &Dialer,
        server: &ServerAddress,
        cluster_seed: u8,
        node_seed: u8,
    ) -> (Self, Welcome) {
        let mut member = Self::connect(dialer, server, cluster_seed, node_seed).await;
        member.hello(Binding::Exporter(member.carrier.exporter), "127.0.0.1:1").await;
        let welcome = member
            .until(|message| match message {
                ServerMessage::Welcome(welcome) => Some(welcome),
                _ => None,
            })
            .await;
        (member, welcome)
    }

    pub(crate) async fn hello(&mut self, binding: Binding, server_name: &str) {
        let hello = Hello::sign(&self.keys, &self.identity, [9; 16], server_name, binding);
        self.say(&ClientMessage::Hello(Box::new(hello))).await;
    }

    pub(crate) async fn say(&mut self, message: &ClientMessage) {
        self.carrier.sender.send(message.encode()).await.unwrap();
    }

    /// Publishes a record of the node.
    pub(crate) async fn put(&mut self, seq: u64) -> Bytes {
        let frame = self.frame(seq);
        self.say(&ClientMessage::Put(frame.as_bytes().clone())).await;
        frame.as_bytes().clone()
    }

    /// The first message that `pick` picks; the others are passed over.
    pub(crate) async fn until<T>(&mut self, mut pick: impl FnMut(ServerMessage) -> Option<T>) -> T {
        in_time("the message", async {
            loop {
                let bytes = self.carrier.receiver.next().await.expect("the session ended").unwrap();
                if let Some(picked) = pick(ServerMessage::decode(&bytes).unwrap()) {
                    return picked;
                }
            }
        })
        .await
    }

    /// Returns when the server has ended the carrier, with the error it gave for that.
    pub(crate) async fn ended(&mut self) -> Option<mesh_proto::wire::session::SessionError> {
        in_time("the end of the session", async {
            let mut reason = None;
            while let Some(Ok(bytes)) = self.carrier.receiver.next().await {
                if let ServerMessage::Error(error) = ServerMessage::decode(&bytes).unwrap() {
                    reason = Some(error);
                }
            }
            reason
        })
        .await
    }

    fn frame(&self, seq: u64) -> Frame {
        let wg = WgSecret::from_seed(&[seq.to_le_bytes()[0]; 32]);
        let record = Record {
            wg_key: wg.public(),
            wg_proof: wg.prove(&self.identity.node_id()),
            host_name: HostName::from_system("node").unwrap(),
            overlay_v6: "fd00::1".parse().unwrap(),
            overlay_v4: None,
            prefixes: Vec::new(),
            excluded_prefixes: Vec::new(),
            candidates: Vec::new(),
            nat_v4: Default::default(),
            nat_v6: Default::default(),
            instance: [9; 16],
            started_at_ms: 1,
            valid_for: Duration::from_secs(60),
            wire_min: 1,
            wire_max: 1,
            features: 0,
            admission: Vec::new(),
            ext: Vec::new(),
        };
        seal(&self.keys, &self.identity, seq, Some(&record), [3; 24]).unwrap()
    }
}

pub(crate) async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not come within {PATIENCE:?}"),
    }
}

/// A way to the server that passes TCP only, as many firewalls do; the address to dial.
pub(crate) async fn tcp_only(server: &Running) -> ServerAddress {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = ServerAddress { port: listener.local_addr().unwrap().port(), ..server.address() };
    let target = server.socket();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut far = tokio::net::TcpStream::connect(target).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            });
        }
    });
    address
}

/// The address by which to reach the server over this carrier.
pub(crate) async fn address_for(kind: CarrierKind, server: &Running) -> ServerAddress {
    match kind {
        CarrierKind::Quic => server.address(),
        CarrierKind::WebSocket => tcp_only(server).await,
    }
}
