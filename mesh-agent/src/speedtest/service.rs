//! The end that is measured. Lives in the agent's runtime; what sends and counts at full speed has threads of its own.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::{CHUNK, Hello, MARK, PORT, Purpose, REST, Reply, SESSION_LIMIT, lock_file, take_turn};

const MAX_CONNECTIONS: usize = 4;
const HELLO_LIMIT: Duration = Duration::from_secs(3);
/// What a transfer may take beyond its time, until its last bytes have arrived.
const TAIL: Duration = Duration::from_secs(2);

/// A service that runs until it is dropped.
#[derive(Debug)]
pub struct Service {
    task: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    /// Where peers' own addresses are.
    overlay: [IpNet; 2],
    lock: PathBuf,
    test: Mutex<Test>,
}

#[derive(Debug, Default)]
struct Test {
    /// Whose test runs.
    peer: Option<IpAddr>,
    is_transferring: bool,
    rests_until: Option<Instant>,
}

impl Service {
    /// On this interface alone; peers are those with an address in `overlay`. Must be called inside a tokio runtime.
    pub fn start(interface: &str, overlay: [IpNet; 2], socket: &std::path::Path) -> io::Result<Self> {
        let open = |any: IpAddr| listen(any, PORT, Some(interface));
        // A kernel without IPv6 has IPv4 all the same.
        let listener = open(Ipv6Addr::UNSPECIFIED.into()).or_else(|_| open(Ipv4Addr::UNSPECIFIED.into()))?;
        Self::on(listener, overlay, lock_file(socket))
    }

    pub(super) fn on(listener: std::net::TcpListener, overlay: [IpNet; 2], lock: PathBuf) -> io::Result<Self> {
        let listener = TcpListener::from_std(listener)?;
        let shared = Arc::new(Shared { overlay, lock, test: Mutex::default() });
        Ok(Self { task: tokio::spawn(serve(listener, shared)).abort_handle() })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn listen(any: IpAddr, port: u16, interface: Option<&str>) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address((any, port).into()), Type::STREAM, Some(Protocol::TCP))?;
    if any.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind_device(interface.map(str::as_bytes))?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.listen(8)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, from)) => {
                let peer = from.ip().to_canonical();
                if !shared.overlay.iter().any(|net| net.contains(&peer)) {
                    tracing::debug!(%peer, "somebody who is no peer wants a speed test");
                    continue;
                }
                let shared = Arc::clone(&shared);
                tokio::spawn(async move {
                    if let Err(error) = connection(stream, peer, &shared).await {
                        tracing::debug!(%peer, %error, "a speed test broke off");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely.
                tracing::debug!(%error, "a speed test could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(mut stream: tokio::net::TcpStream, peer: IpAddr, shared: &Arc<Shared>) -> io::Result<()> {
    let mut hello = [0; Hello::LENGTH];
    timeout(HELLO_LIMIT, stream.read_exact(&mut hello)).await.map_err(|_| ErrorKind::TimedOut)??;
    let Some(hello) = Hello::parse(&hello) else {
        return stream.write_all(&Reply::Refused.to_bytes()).await;
    };
    match hello.purpose {
        Purpose::Session => session(stream, peer, shared).await,
        Purpose::Up | Purpose::Down => {
            let Some(transfer) = Transfer::begin(shared, peer) else {
                return stream.write_all(&Reply::Refused.to_bytes()).await;
            };
            stream.write_all(&Reply::Go.to_bytes()).await?;
            let stream = stream.into_std()?;
            let time = Duration::from_secs(hello.seconds.into());
            let (done, over) = tokio::sync::oneshot::channel();
            thread::Builder::new().name("speedtest".into()).spawn(move || {
                let moved = if hello.purpose == Purpose::Up { count(stream, time) } else { send(stream, time) };
                drop(transfer);
                // The connection may be gone.
                let _gone = done.send(moved);
            })?;
            over.await.unwrap_or(Ok(()))
        }
    }
}

/// Sends back what it gets until the peer closes it.
async fn session(mut stream: tokio::net::TcpStream, peer: IpAddr, shared: &Arc<Shared>) -> io::Result<()> {
    let Some(turn) = take_turn(&shared.lock)? else {
        return stream.write_all(&Reply::Busy.to_bytes()).await;
    };
    if let Some(refusal) = shared.begin(peer) {
        return stream.write_all(&refusal.to_bytes()).await;
    }
    let running = Running(Arc::clone(shared));
    tracing::info!(%peer, "a peer tests how fast the tunnel is");
    stream.set_nodelay(true)?;
    let echo = async {
        stream.write_all(&Reply::Go.to_bytes()).await?;
        let mut mark = [0; MARK];
        loop {
            match stream.read_exact(&mut mark).await {
                Ok(_) => stream.write_all(&mark).await?,
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    };
    let ended = timeout(SESSION_LIMIT, echo).await;
    drop((running, turn));
    ended.map_err(|_| ErrorKind::TimedOut)?
}

impl Shared {
    fn test(&self) -> MutexGuard<'_, Test> {
        self.test.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` = it has begun.
    fn begin(&self, peer: IpAddr) -> Option<Reply> {
        let mut test = self.test();
        if test.peer.is_some() {
            return Some(Reply::Busy);
        }
        let rests = test.rests_until.map(|until| until.saturating_duration_since(Instant::now()));
        if let Some(rests) = rests.filter(|rests| !rests.is_zero()) {
            return Some(Reply::Rests { seconds: u8::try_from(rests.as_secs() + 1).unwrap_or(u8::MAX) });
        }
        test.peer = Some(peer);
        None
    }
}

/// The test of a peer; ends when it is dropped.
struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        let mut test = self.0.test();
        test.peer = None;
        test.rests_until = Some(Instant::now() + REST);
    }
}

/// One transfer of the test that runs.
struct Transfer(Arc<Shared>);

impl Transfer {
    fn begin(shared: &Arc<Shared>, peer: IpAddr) -> Option<Self> {
        let mut test = shared.test();
        let may = test.peer == Some(peer) && !test.is_transferring;
        test.is_transferring |= may;
        may.then(|| Self(Arc::clone(shared)))
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.0.test().is_transferring = false;
    }
}

/// Reads until the peer ends or its time is over, then tells how much that was and how long it took.
fn count(mut stream: TcpStream, time: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(TAIL))?;
    stream.set_write_timeout(Some(TAIL))?;
    let mut buffer = vec![0; CHUNK];
    let began = Instant::now();
    let (mut bytes, mut last) = (0u64, began);
    while began.elapsed() < time + TAIL {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => {
                bytes += length as u64;
                last = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let micros = u64::try_from((last - began).as_micros()).unwrap_or(u64::MAX);
    stream.write_all(&bytes.to_le_bytes())?;
    stream.write_all(&micros.to_le_bytes())
}

/// Sends for this long.
fn send(mut stream: TcpStream, time: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(TAIL))?;
    let chunk = super::filling();
    let began = Instant::now();
    while began.elapsed() < time {
        match stream.write(&chunk) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
