//! The end that measures. Blocks; runs in the process of the command.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{CHUNK, Hello, MARK, PORT, Purpose, Reply, filling, take_turn};

/// A tunnel that sleeps is up in less.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Between two round trips.
const PACE: Duration = Duration::from_millis(50);
const IDLE_FOR: Duration = Duration::from_secs(1);

/// What one direction did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    pub bytes: u64,
    /// From the first byte to the last, at the end that received.
    pub micros: u64,
    pub bits_per_second: u64,
    /// Round trips meanwhile.
    pub loaded: RoundTrips,
}

/// Microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundTrips {
    pub count: usize,
    pub median_us: u64,
    pub max_us: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TestError {
    #[error("another speed test runs on this node: wait for its end")]
    BusyHere,
    #[error("another speed test runs on that node: try again in some seconds")]
    BusyThere,
    #[error("that node rests from its last speed test: try again in {seconds} s")]
    Rests { seconds: u8 },
    #[error(
        "no speed test is answered on {at} ({source}): its agent may have mesh.speedtest: false or be of an older version, or its \
         firewall lets no TCP in from the mesh interface"
    )]
    NoService { at: SocketAddr, source: io::Error },
    #[error("that node speaks another version of the speed test")]
    Refused,
    #[error("the connection to that node broke: {0}")]
    Broken(#[from] io::Error),
    #[error("cannot use {}: {source}", lock.display())]
    Lock { lock: std::path::PathBuf, source: io::Error },
}

/// A test under way.
#[derive(Debug)]
pub struct Test {
    at: SocketAddr,
    session: TcpStream,
    /// While it is held, no other test begins on this node.
    _turn: nix::fcntl::Flock<std::fs::File>,
}

impl Test {
    /// Takes the turn here and at the peer with this address.
    pub fn begin(peer: IpAddr, lock: &Path) -> Result<Self, TestError> {
        Self::begin_at(SocketAddr::new(peer, PORT), lock)
    }

    pub(super) fn begin_at(at: SocketAddr, lock: &Path) -> Result<Self, TestError> {
        let turn = take_turn(lock).map_err(|source| TestError::Lock { lock: lock.to_owned(), source })?;
        let turn = turn.ok_or(TestError::BusyHere)?;
        let session = connect(at, Hello { purpose: Purpose::Session, seconds: 1 })?;
        session.set_nodelay(true)?;
        Ok(Self { at, session, _turn: turn })
    }

    /// Round trips while nothing else is sent.
    pub fn idle(&mut self) -> Result<RoundTrips, TestError> {
        let until = Instant::now() + IDLE_FOR;
        Ok(round_trips(&mut self.session, &|| Instant::now() >= until)?)
    }

    /// Sends to the peer for so long.
    pub fn up(&mut self, seconds: u8) -> Result<Flow, TestError> {
        let stream = connect(self.at, Hello { purpose: Purpose::Up, seconds })?;
        self.under_load(move || send(stream, seconds))
    }

    /// Has the peer send for so long.
    pub fn down(&mut self, seconds: u8) -> Result<Flow, TestError> {
        let stream = connect(self.at, Hello { purpose: Purpose::Down, seconds })?;
        self.under_load(move || receive(stream, seconds))
    }

    fn under_load(&mut self, load: impl FnOnce() -> io::Result<(u64, u64)> + Send) -> Result<Flow, TestError> {
        let is_over = AtomicBool::new(false);
        let (moved, loaded) = thread::scope(|scope| {
            let load = scope.spawn(|| {
                let moved = load();
                is_over.store(true, Ordering::Relaxed);
                moved
            });
            let loaded = round_trips(&mut self.session, &|| is_over.load(Ordering::Relaxed));
            let moved = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (moved, loaded)
        });
        let ((bytes, micros), loaded) = (moved?, loaded?);
        let bits_per_second = u128::from(bytes) * 8_000_000 / u128::from(micros.max(1));
        Ok(Flow { bytes, micros, bits_per_second: u64::try_from(bits_per_second).unwrap_or(u64::MAX), loaded })
    }
}

fn connect(at: SocketAddr, hello: Hello) -> Result<TcpStream, TestError> {
    let no_service = |source| TestError::NoService { at, source };
    let mut stream = TcpStream::connect_timeout(&at, CONNECT_LIMIT).map_err(no_service)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.set_write_timeout(Some(ANSWER_LIMIT))?;
    stream.write_all(&hello.to_bytes())?;
    let mut reply = [0; Reply::LENGTH];
    stream.read_exact(&mut reply).map_err(no_service)?;
    match Reply::parse(reply) {
        Reply::Go => Ok(stream),
        Reply::Busy => Err(TestError::BusyThere),
        Reply::Rests { seconds } => Err(TestError::Rests { seconds }),
        Reply::Refused => Err(TestError::Refused),
    }
}

/// One after the other, until it is over; at least one.
fn round_trips(session: &mut TcpStream, is_over: &dyn Fn() -> bool) -> io::Result<RoundTrips> {
    let mut took = Vec::new();
    loop {
        let began = Instant::now();
        let mark = (took.len() as u64).to_le_bytes();
        session.write_all(&mark)?;
        let mut back = [0; MARK];
        session.read_exact(&mut back)?;
        if back != mark {
            return Err(io::Error::new(ErrorKind::InvalidData, "another mark came back"));
        }
        took.push(u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX));
        if is_over() {
            break;
        }
        thread::sleep(PACE.saturating_sub(began.elapsed()));
    }
    took.sort_unstable();
    Ok(RoundTrips {
        count: took.len(),
        median_us: took[took.len() / 2],
        max_us: took.last().copied().unwrap_or_default(),
    })
}

fn send(mut stream: TcpStream, seconds: u8) -> io::Result<(u64, u64)> {
    let chunk = filling();
    let until = Instant::now() + Duration::from_secs(seconds.into());
    while Instant::now() < until {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let (mut bytes, mut micros) = ([0; 8], [0; 8]);
    stream.read_exact(&mut bytes)?;
    stream.read_exact(&mut micros)?;
    Ok((u64::from_le_bytes(bytes), u64::from_le_bytes(micros)))
}

fn receive(mut stream: TcpStream, seconds: u8) -> io::Result<(u64, u64)> {
    let mut buffer = vec![0; CHUNK];
    let limit = Duration::from_secs(seconds.into()) + ANSWER_LIMIT;
    let began = Instant::now();
    let (mut bytes, mut last) = (0u64, began);
    while began.elapsed() < limit {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        bytes += length as u64;
        last = Instant::now();
    }
    Ok((bytes, u64::try_from((last - began).as_micros()).unwrap_or(u64::MAX)))
}
