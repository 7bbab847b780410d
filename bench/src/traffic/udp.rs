//! Numbered UDP datagrams at a fixed rate, and a receiver that knows which numbers it has seen.
//!
//! A datagram begins with the run and its number. The sender wakes at a steady pace and sends what is due. When it was kept
//! from running it catches up by a burst that every queue holds, and gives up the rest: what it could not offer must not
//! look like loss.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    sys::{prctl, socket::setsockopt, socket::sockopt},
};

use super::{Done, Rate, batch, serve::Parent};

/// The smallest datagram that can carry a run and a number.
const MIN_SIZE: usize = 8;
/// Datagrams sent at once at most: less than half of a TUN device's queue.
const BURST: u64 = 192;
const BUFFER: usize = 16 << 20;
/// The receiver looks at the sign to end this often, and ends when nothing came for so long.
const QUIET: Duration = Duration::from_millis(60);

pub(super) fn send(to: SocketAddr, run: u32, size: usize, rate: Rate, seconds: f64) -> Result<Done> {
    let Rate { per_second, wake_every } = rate;
    let socket = bind_any(to)?;
    socket.connect(to)?;
    // The default rounds every sleep up by 50 µs.
    prctl::set_timerslack(1)?;
    let mut datagrams: Vec<Vec<u8>> = (0..batch::MAX).map(|_| vec![0x5a; size.max(MIN_SIZE)]).collect();
    datagrams.iter_mut().for_each(|datagram| datagram[..4].copy_from_slice(&run.to_be_bytes()));
    let (mut sent, mut refused, mut given_up) = (0_u64, 0, 0);
    let start = Instant::now();
    let length = Duration::from_secs_f64(seconds);
    loop {
        let elapsed = start.elapsed();
        if elapsed >= length {
            break;
        }
        let owed = ((elapsed.as_secs_f64() * per_second) as u64).saturating_sub(sent + given_up);
        given_up += owed.saturating_sub(BURST);
        let mut left = owed.min(BURST);
        while left > 0 {
            let count = left.min(batch::MAX as u64) as usize;
            for (number, datagram) in (sent..).zip(&mut datagrams[..count]) {
                datagram[4..8].copy_from_slice(&(number as u32).to_be_bytes());
            }
            let taken = match batch::send(&socket, &datagrams[..count]) {
                Ok(taken) => taken as u64,
                Err(Errno::EINTR) => 0,
                // A full queue, or a host that is told that nobody listens: this datagram is lost.
                Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::ECONNREFUSED) => {
                    refused += 1;
                    1
                }
                Err(errno) => return Err(errno).with_context(|| format!("cannot send to {to}")),
            };
            sent += taken;
            left -= taken;
        }
        let next = Duration::from_secs_f64((sent + given_up + 1) as f64 / per_second).max(elapsed + wake_every);
        std::thread::sleep(next.saturating_sub(start.elapsed()));
    }
    Ok(Done::UdpSent { sent, refused, nanos: u64::try_from(start.elapsed().as_nanos())? })
}

pub(super) fn receive(at: SocketAddr, run: u32, parent: &mut Parent) -> Result<Done> {
    let socket = UdpSocket::bind(at).with_context(|| format!("cannot receive on {at}"))?;
    enlarge(&socket)?;
    socket.set_read_timeout(Some(QUIET))?;
    let finished = parent.finished()?;
    parent.ready(socket.local_addr()?)?;
    let mut slots: Vec<Box<[u8]>> = (0..batch::MAX).map(|_| vec![0; 2048].into_boxed_slice()).collect();
    let mut seen = Seen::default();
    loop {
        // Asked before the datagrams, so that those that came before the end are taken.
        let ends = finished.load(Ordering::Acquire);
        match batch::receive(&socket, &mut slots, |datagram| seen.note(run, datagram)) {
            Ok(()) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if ends => break,
            Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(Done::UdpReceived { received: seen.received, duplicates: seen.duplicates })
}

/// A socket of the family of `to`, with large buffers.
pub(super) fn bind_any(to: SocketAddr) -> Result<UdpSocket> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    enlarge(&socket)?;
    Ok(socket)
}

fn enlarge(socket: &UdpSocket) -> Result<()> {
    setsockopt(socket, sockopt::RcvBufForce, &BUFFER).context("cannot enlarge a receive buffer")?;
    setsockopt(socket, sockopt::SndBufForce, &BUFFER).context("cannot enlarge a send buffer")?;
    Ok(())
}

/// Which numbers of a run came.
#[derive(Debug, Default)]
struct Seen {
    bits: Vec<u64>,
    received: u64,
    duplicates: u64,
}

impl Seen {
    fn note(&mut self, run: u32, datagram: &[u8]) {
        let Some((head, number)) = datagram
            .split_first_chunk::<4>()
            .and_then(|(head, rest)| Some((head, u32::from_be_bytes(*rest.first_chunk::<4>()?))))
        else {
            return;
        };
        if u32::from_be_bytes(*head) != run {
            return;
        }
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.bits.len() {
            self.bits.resize(word + 1024, 0);
        }
        if self.bits[word] & bit == 0 {
            self.bits[word] |= bit;
            self.received += 1;
        } else {
            self.duplicates += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_counts_once_and_only_of_its_run() {
        let mut seen = Seen::default();
        let datagram = |run: u32, number: u32| [run.to_be_bytes(), number.to_be_bytes()].concat();
        for number in [0, 1, 200, 1, 100_000] {
            seen.note(7, &datagram(7, number));
        }
        seen.note(7, &datagram(8, 3));
        seen.note(7, b"short");
        assert_eq!((seen.received, seen.duplicates), (4, 1));
    }
}
