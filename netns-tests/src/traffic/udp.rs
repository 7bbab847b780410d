//! Numbered UDP datagrams at a steady pace, and a receiver that knows which numbers it has seen.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Socket, Type};

use crate::host::Host;

/// After the last datagram was sent, one that takes longer than this counts as lost.
const LATE: Duration = Duration::from_secs(1);
/// Slice of the receiver's waiting; it looks at the sender's state in between.
const LOOK: Duration = Duration::from_millis(20);

/// A stream that runs in the background until it is stopped.
#[derive(Debug)]
pub struct UdpStream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: Option<JoinHandle<Result<Sent>>>,
    receiver: Option<JoinHandle<Result<Received>>>,
    sender_done: Arc<AtomicBool>,
}

/// The verdict over a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpTotals {
    /// Every number that was given out, also when the local kernel refused to send it.
    pub sent: u64,
    pub lost: u64,
    pub duplicate: u64,
    /// Sends that the local kernel refused; they are lost too.
    pub refused: u64,
    /// Numbered datagrams that came with another payload than was sent.
    pub corrupt: u64,
    /// Longest time between two arrivals.
    pub longest_gap: Duration,
    /// Longest time between two sends: what a busy machine adds to the gap of arrivals.
    pub longest_pause: Duration,
}

impl UdpStream {
    /// Sends `per_second` datagrams from `from` to `to_address` on `to`, each with its number and `payload`.
    pub fn start(from: &Host, to: &Host, to_address: IpAddr, per_second: u32, payload: &[u8]) -> Result<Self> {
        let inbox = to.inside(|| {
            UdpSocket::bind(SocketAddr::new(to_address, 0)).with_context(|| format!("cannot receive on {to_address}"))
        })?;
        let target = inbox.local_addr()?;
        let (stop, sender_done, sent) =
            (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let receiver = to.start_inside({
            let (done, sent) = (Arc::clone(&sender_done), Arc::clone(&sent));
            let payload = payload.to_vec();
            move || receive(&inbox, &payload, &done, &sent)
        })?;
        let sender = from.start_inside({
            let (stop, sent, payload) = (Arc::clone(&stop), Arc::clone(&sent), payload.to_vec());
            move || send(target, per_second, &payload, &stop, &sent)
        })?;
        Ok(Self { stop, sent, sender: Some(sender), receiver: Some(receiver), sender_done })
    }

    /// Numbers given out so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Stops sending, waits for late datagrams, and counts.
    pub fn stop(mut self) -> Result<UdpTotals> {
        let (sender, received) = self.join()?;
        let sent = self.sent();
        Ok(UdpTotals {
            sent,
            lost: sent - received.distinct,
            duplicate: received.duplicate,
            refused: sender.refused,
            corrupt: received.corrupt,
            longest_gap: received.longest_gap,
            longest_pause: sender.longest_pause,
        })
    }

    fn join(&mut self) -> Result<(Sent, Received)> {
        self.stop.store(true, Ordering::Relaxed);
        let sender = self
            .sender
            .take()
            .context("the stream was stopped before")?
            .join()
            .map_err(|_| anyhow!("the UDP sender panicked"));
        self.sender_done.store(true, Ordering::Relaxed);
        let received = self
            .receiver
            .take()
            .context("the stream was stopped before")?
            .join()
            .map_err(|_| anyhow!("the UDP receiver panicked"))??;
        Ok((sender??, received))
    }
}

impl Drop for UdpStream {
    fn drop(&mut self) {
        if self.sender.is_some() {
            let _ = self.join();
        }
    }
}

/// Sends one datagram outside any tunnel: with the mark that the mesh's rule lets pass.
///
/// Used as the control of a capture: this one must be found.
pub fn send_clear(from: &Host, to: SocketAddr, payload: &[u8], mark: u32) -> Result<()> {
    from.inside(|| {
        let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
        socket.set_mark(mark).context("cannot mark the socket")?;
        socket.send_to(payload, &to.into()).with_context(|| format!("cannot send to {to}"))?;
        Ok(())
    })
}

#[derive(Debug, Default)]
struct Sent {
    refused: u64,
    longest_pause: Duration,
}

#[derive(Debug, Default)]
struct Received {
    distinct: u64,
    duplicate: u64,
    corrupt: u64,
    longest_gap: Duration,
}

fn send(target: SocketAddr, per_second: u32, payload: &[u8], stop: &AtomicBool, sent: &AtomicU64) -> Result<Sent> {
    let any: IpAddr = if target.is_ipv6() { [0u8; 16].into() } else { [0u8; 4].into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    let step = Duration::from_secs(1) / per_second;
    let mut result = Sent::default();
    let mut next = Instant::now();
    let mut last = next;
    while !stop.load(Ordering::Relaxed) {
        let number = sent.load(Ordering::Relaxed);
        let mut datagram = number.to_be_bytes().to_vec();
        datagram.extend(payload);
        result.refused += u64::from(socket.send_to(&datagram, target).is_err());
        let now = Instant::now();
        result.longest_pause = result.longest_pause.max(now - last);
        last = now;
        sent.store(number + 1, Ordering::Relaxed);
        next += step;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(result)
}

fn receive(inbox: &UdpSocket, payload: &[u8], sender_done: &AtomicBool, sent: &AtomicU64) -> Result<Received> {
    inbox.set_read_timeout(Some(LOOK))?;
    let mut seen: Vec<bool> = Vec::new();
    let mut result = Received::default();
    let mut last_arrival: Option<Instant> = None;
    let mut give_up: Option<Instant> = None;
    let mut buffer = [0; 2048];
    loop {
        match inbox.recv(&mut buffer) {
            Ok(length) => {
                let now = Instant::now();
                if let Some(last) = last_arrival {
                    result.longest_gap = result.longest_gap.max(now - last);
                }
                last_arrival = Some(now);
                let Some(number) = buffer[..length].first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes) as usize)
                else {
                    continue;
                };
                // A number that was not given out is somebody else's datagram.
                if number > sent.load(Ordering::Relaxed) as usize {
                    continue;
                }
                result.corrupt += u64::from(buffer[8..length] != *payload);
                if seen.len() <= number {
                    seen.resize(number + 1, false);
                }
                if std::mem::replace(&mut seen[number], true) { result.duplicate += 1 } else { result.distinct += 1 }
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
        if sender_done.load(Ordering::Relaxed) {
            let deadline = *give_up.get_or_insert_with(|| Instant::now() + LATE);
            if result.distinct == sent.load(Ordering::Relaxed) || Instant::now() > deadline {
                return Ok(result);
            }
        }
    }
}
