//! ICMP and ICMPv6 echo through raw sockets, with a payload of the caller's choice.

use std::{
    io::{ErrorKind, Read},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use socket2::{Domain, Protocol, Socket, Type};

use crate::host::Host;

/// Pings of one process must not take each other's replies.
static NEXT_ID: AtomicU16 = AtomicU16::new(1);

/// Sends an echo request from `host` to `to` every `every` until a reply with the same payload comes; the time it took.
///
/// A refused send (no route yet) is tried again. The error names what the last one said.
pub fn first_reply(host: &Host, to: IpAddr, payload: &[u8], every: Duration, within: Duration) -> Result<Duration> {
    host.inside(|| first_reply_here(to, payload, every, within))
}

/// The same in the calling thread's namespace.
pub fn first_reply_here(to: IpAddr, payload: &[u8], every: Duration, within: Duration) -> Result<Duration> {
    let start = Instant::now();
    let mut echo = Echo::open(to, payload)?;
    let mut refused = None;
    while start.elapsed() < within {
        if let Err(error) = echo.request() {
            refused = Some(error);
        }
        if echo.wait_reply(Instant::now() + every)? {
            return Ok(start.elapsed());
        }
    }
    match refused {
        Some(error) => bail!("no reply from {to} in {within:?}; sending said: {error}"),
        None => bail!("no reply from {to} in {within:?}"),
    }
}

/// Sends echo requests from `host` to `to` until one is answered by "unreachable", of the local kernel or of a router by ICMP;
/// the time it took. A reply in the meantime is not an error: what still flows may end first.
pub fn first_unreachable(
    host: &Host,
    to: IpAddr,
    payload: &[u8],
    every: Duration,
    within: Duration,
) -> Result<Duration> {
    host.inside(|| {
        let start = Instant::now();
        let mut echo = Echo::open(to, payload)?;
        while start.elapsed() < within {
            match echo.request() {
                Err(error) if matches!(error.kind(), ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable) => {
                    return Ok(start.elapsed());
                }
                _ => {}
            }
            let next = Instant::now() + every;
            while let Some(answer) = echo.wait_answer(next)? {
                if answer == Answer::Unreachable {
                    return Ok(start.elapsed());
                }
            }
        }
        bail!("nobody said in {within:?} that {to} is unreachable")
    })
}

/// Echo requests at a steady pace in the background.
#[derive(Debug)]
pub struct EchoStream {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<EchoTotals>>>,
}

/// What an [`EchoStream`] did. Each request is answered, unanswered, or refused by the local kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EchoTotals {
    pub sent: u64,
    pub refused: u64,
    pub answered: u64,
}

impl EchoStream {
    pub fn start(host: &Host, to: IpAddr, payload: Vec<u8>, every: Duration) -> Result<Self> {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = host.start_inside({
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            move || {
                let mut echo = Echo::open(to, &payload)?;
                let mut totals = EchoTotals::default();
                while !stop.load(Ordering::Relaxed) {
                    let next = Instant::now() + every;
                    match echo.request() {
                        Ok(()) => totals.sent += 1,
                        Err(_) => totals.refused += 1,
                    }
                    while echo.wait_reply(next)? {
                        totals.answered += 1;
                        answered.store(totals.answered, Ordering::Relaxed);
                    }
                }
                Ok(totals)
            }
        })?;
        Ok(Self { stop, answered, thread: Some(thread) })
    }

    /// Replies so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    pub fn stop(mut self) -> Result<EchoTotals> {
        self.join().context("the stream was stopped before")?
    }

    fn join(&mut self) -> Option<Result<EchoTotals>> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take()?;
        Some(thread.join().unwrap_or_else(|_| Err(anyhow!("the echo thread panicked"))))
    }
}

/// A check that fails early must not leave its traffic running.
impl Drop for EchoStream {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

/// Not connected: connect would fail while there is no route, and would keep the source address chosen then.
struct Echo<'a> {
    socket: Socket,
    to: IpAddr,
    id: u16,
    sequence: u16,
    payload: &'a [u8],
    buffer: Vec<u8>,
}

impl<'a> Echo<'a> {
    fn open(to: IpAddr, payload: &'a [u8]) -> Result<Self> {
        let (domain, protocol) =
            if to.is_ipv6() { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
        let socket = Socket::new(domain, Type::RAW, Some(protocol)).context("cannot open a raw socket")?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Self { socket, to, id, sequence: 0, payload, buffer: vec![0; 64 * 1024] })
    }

    fn request(&mut self) -> std::io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let kind = if self.to.is_ipv6() { 128 } else { 8 };
        let mut message = vec![kind, 0, 0, 0];
        message.extend(self.id.to_be_bytes());
        message.extend(self.sequence.to_be_bytes());
        message.extend(self.payload);
        if self.to.is_ipv4() {
            // The kernel fills in the checksum of ICMPv6 only.
            let sum = internet_checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        self.socket.send_to(&message, &SocketAddr::new(self.to, 0).into()).map(drop)
    }

    /// True for a reply to any of our requests that carries our payload; false at the deadline.
    fn wait_reply(&mut self, deadline: Instant) -> Result<bool> {
        while let Some(answer) = self.wait_answer(deadline)? {
            if answer == Answer::Reply {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The next answer to any of our requests; `None` at the deadline.
    fn wait_answer(&mut self, deadline: Instant) -> Result<Option<Answer>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match (&self.socket).read(&mut self.buffer) {
                Ok(length) if self.is_our_reply(&self.buffer[..length]) => return Ok(Some(Answer::Reply)),
                Ok(length) if self.is_unreachable(&self.buffer[..length]) => return Ok(Some(Answer::Unreachable)),
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                }
                // Pending errors of earlier requests, such as "host unreachable", arrive here.
                Err(error) if error.raw_os_error().is_some() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// "Destination unreachable" that quotes a packet to our destination.
    fn is_unreachable(&self, packet: &[u8]) -> bool {
        match self.to {
            IpAddr::V6(to) => packet.first() == Some(&1) && packet.get(8 + 24..8 + 40) == Some(&to.octets()),
            IpAddr::V4(to) => packet
                .first()
                .and_then(|first| packet.get(usize::from(first & 15) * 4..))
                .is_some_and(|m| m.first() == Some(&3) && m.get(8 + 16..8 + 20) == Some(&to.octets())),
        }
    }

    fn is_our_reply(&self, packet: &[u8]) -> bool {
        let (message, kind) = match self.to {
            IpAddr::V6(_) => (Some(packet), 129),
            // A raw IPv4 socket gives the IP header too.
            IpAddr::V4(to) => (
                packet
                    .get(12..16)
                    .filter(|source| *source == to.octets())
                    .and_then(|_| packet.get(usize::from(packet[0] & 15) * 4..)),
                0,
            ),
        };
        message.is_some_and(|m| {
            m.len() >= 8 && m[0] == kind && m[4..6] == self.id.to_be_bytes() && &m[8..] == self.payload
        })
    }
}

/// What came back to an echo request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Reply,
    Unreachable,
}

fn internet_checksum(message: &[u8]) -> u16 {
    let mut sum: u32 = message
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default()))
        .sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checksum_of_a_message_with_its_checksum_is_zero() {
        let mut message = vec![8, 0, 0, 0, 1, 2, 3, 4, 5];
        let sum = super::internet_checksum(&message);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(super::internet_checksum(&message), 0);
    }
}
