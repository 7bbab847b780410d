//! Datagrams that no WireGuard peer sends, at the highest rate the machine can.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use mesh_proto::random::SplitMix64;
use nix::errno::Errno;

use super::{Done, batch, udp};

/// Transport data, then the other kinds of message, then bytes of no kind.
const KINDS: [u8; 5] = [4, 1, 2, 3, 0xff];
/// As long as the message of that kind is, so that its length alone does not give it away.
const LENGTHS: [usize; 5] = [128, 148, 92, 64, 256];

pub(super) fn send(to: SocketAddr, seconds: f64) -> Result<Done> {
    let socket = udp::bind_any(to)?;
    socket.connect(to)?;
    let mut random = SplitMix64::new(0x6a75_6e6b);
    let mut datagrams: Vec<Vec<u8>> = (0..batch::MAX)
        .map(|n| {
            let mut datagram: Vec<u8> =
                std::iter::repeat_with(|| random.next_u64() as u8).take(LENGTHS[n % LENGTHS.len()]).collect();
            datagram[..4].copy_from_slice(&[KINDS[n % KINDS.len()], 0, 0, 0]);
            datagram
        })
        .collect();
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut sent = 0;
    while Instant::now() < end {
        // Another receiver index each time.
        for datagram in &mut datagrams {
            datagram[4..8].copy_from_slice(&(random.next_u64() as u32).to_le_bytes());
        }
        match batch::send(&socket, &datagrams) {
            Ok(taken) => sent += taken as u64,
            Err(Errno::EINTR | Errno::ENOBUFS | Errno::EAGAIN | Errno::ECONNREFUSED) => {}
            Err(errno) => return Err(errno).with_context(|| format!("cannot send to {to}")),
        }
    }
    Ok(Done::JunkSent { sent })
}
