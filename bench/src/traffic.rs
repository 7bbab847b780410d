//! The traffic generator: a child process in each namespace that sends, receives and echoes as it is told.
//!
//! The parent gives [`Order`]s over a unix socket, one connection each; the child answers [`Reply`]s, a JSON line each. A
//! sender waits for nothing but its own end; a receiver says `Ready` with its port first. Child processes, not threads of
//! the parent, so that the CPU of the generator can be told from that of the programs under test.
//!
//! Sockets have the kernel's default buffers for TCP (it tunes them itself, as for every program) and large ones for UDP.

mod batch;
mod echo;
mod junk;
mod serve;
mod tcp;
mod udp;

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use netns_tests::{Host, process::Process, wait};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

pub use serve::serve;

const START_WITHIN: Duration = Duration::from_secs(10);
/// How much longer than it should an order may take before it counts as hung.
const GRACE: Duration = Duration::from_secs(15);

/// What a child can be told to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Order {
    /// Sends on every stream as fast as they take it.
    TcpSource { meet: Meet, seconds: f64 },
    /// Reads every stream to its end.
    TcpSink { meet: Meet },
    /// Sends datagrams of one size at a fixed rate, never more than a short burst behind.
    UdpSource { to: SocketAddr, run: u32, size: usize, rate: Rate, seconds: f64 },
    /// Counts the datagrams of one run until it is told to finish.
    UdpSink { at: SocketAddr, run: u32 },
    /// Sends back what comes until it is told to finish.
    Echo { at: SocketAddr },
    /// Asks an [`Order::Echo`] at a steady pace.
    Ping { to: SocketAddr, every_micros: u64, seconds: f64 },
    /// Sends what no WireGuard peer would, as fast as the kernel takes it.
    Junk { to: SocketAddr, seconds: f64 },
}

/// How datagrams are spread over time.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Rate {
    pub per_second: f64,
    /// The sender sleeps so long, and then sends what is due.
    pub wake_every: Duration,
}

/// Who connects to whom; data may flow either way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Meet {
    /// Waits for so many streams.
    Listen { at: SocketAddr, streams: usize },
    /// One stream to each.
    Connect { to: Vec<SocketAddr> },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// It listens there.
    Ready(u16),
    Done(Done),
    Failed(String),
}

/// What an order came to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Done {
    TcpSent {
        bytes: u64,
        retransmits: u64,
    },
    /// `nanos` from the first byte to the last of all streams.
    TcpReceived {
        bytes: u64,
        nanos: u64,
    },
    /// `refused` = datagrams that the local kernel did not take.
    UdpSent {
        sent: u64,
        refused: u64,
        nanos: u64,
    },
    /// Each number counts once.
    UdpReceived {
        received: u64,
        duplicates: u64,
    },
    Echoed(u64),
    /// Round trips in nanoseconds, in order; `lost` were never answered.
    Pinged {
        nanos: Vec<u64>,
        lost: u64,
    },
    JunkSent {
        sent: u64,
    },
}

/// The child of one host.
#[derive(Debug)]
pub struct Generator {
    process: Process,
    socket: PathBuf,
}

/// An order under way.
#[derive(Debug)]
pub struct Job {
    stream: BufReader<UnixStream>,
    what: String,
}

impl Generator {
    /// Starts `program traffic` on a host; `scratch` holds its socket and log.
    pub fn start(host: &Host, program: &Path, scratch: &Path) -> Result<Self> {
        let stem = scratch.join(format!("traffic-{}", host.name()));
        let socket = stem.with_extension("sock");
        let mut command = Command::new(program);
        command.arg("traffic").arg(&socket);
        let mut process = Process::start(host, command, &stem)?;
        let found =
            wait::until_or_dead("the traffic generator", START_WITHIN, &mut process, Process::check_running, |_| {
                Ok(UnixStream::connect(&socket).ok().map(drop))
            });
        process.explain(found)?;
        Ok(Self { process, socket })
    }

    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Has the child begin; a receiver is asked for its port next.
    pub fn order(&self, order: &Order) -> Result<Job> {
        let mut stream = UnixStream::connect(&self.socket).context("the traffic generator is gone")?;
        stream.set_read_timeout(Some(order.within()))?;
        stream.write_all((serde_json::to_string(order)? + "\n").as_bytes())?;
        Ok(Job { stream: BufReader::new(stream), what: format!("{order:?}") })
    }

    /// Begins a receiver and waits until it listens.
    pub fn receive(&self, order: &Order) -> Result<(Job, u16)> {
        let mut job = self.order(order)?;
        match job.reply()? {
            Reply::Ready(port) => Ok((job, port)),
            other => bail!("{}: expected to be ready, got {other:?}", job.what),
        }
    }

    /// Does an order that ends by itself.
    pub fn run(&self, order: &Order) -> Result<Done> {
        self.order(order)?.done()
    }
}

impl Job {
    /// Waits for the end.
    pub fn done(mut self) -> Result<Done> {
        match self.reply()? {
            Reply::Done(done) => Ok(done),
            other => bail!("{}: expected the end, got {other:?}", self.what),
        }
    }

    /// Tells a receiver that goes on forever to end, and waits for what it counted.
    pub fn finish(mut self) -> Result<Done> {
        self.stream.get_mut().write_all(b"finish\n")?;
        self.done()
    }

    fn reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        let length = self.stream.read_line(&mut line).with_context(|| format!("{}: no answer", self.what))?;
        if length == 0 {
            bail!("{}: the traffic generator hung up", self.what);
        }
        match serde_json::from_str(&line)? {
            Reply::Failed(why) => bail!("{}: {why}", self.what),
            reply => Ok(reply),
        }
    }
}

impl Order {
    fn within(&self) -> Duration {
        GRACE
            + match self {
                Self::TcpSource { seconds, .. }
                | Self::UdpSource { seconds, .. }
                | Self::Ping { seconds, .. }
                | Self::Junk { seconds, .. } => Duration::from_secs_f64(*seconds),
                // Waits for another's end: its owner has a limit of its own.
                Self::TcpSink { .. } | Self::UdpSink { .. } | Self::Echo { .. } => Duration::from_secs(600),
            }
    }
}
