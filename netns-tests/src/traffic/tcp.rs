//! One TCP transfer of seeded bytes, hashed where they leave and where they arrive.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use sha2::{Digest, Sha256};

use crate::host::Host;

const BLOCK: usize = 64 * 1024;
/// The marker stands once in each so many bytes: several times a segment's worth, so that cutting cannot hide them all.
const MARKER_EVERY: usize = 1024;
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A connection that stands still for this long failed.
const STALL: Duration = Duration::from_secs(20);

/// What a transfer did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    pub bytes: u64,
    pub took: Duration,
    pub sha256_sent: [u8; 32],
    pub sha256_received: [u8; 32],
}

/// Sends `bytes` bytes made from `seed`, with `marker` strewn in, from `from` to `to_address` on `to`.
pub fn transfer(from: &Host, to: &Host, to_address: IpAddr, bytes: u64, seed: u64, marker: &[u8]) -> Result<Transfer> {
    ensure!(marker.len() <= MARKER_EVERY, "the marker is longer than {MARKER_EVERY} bytes");
    let listener = to.inside(|| {
        TcpListener::bind(SocketAddr::new(to_address, 0)).with_context(|| format!("cannot listen on {to_address}"))
    })?;
    let target = listener.local_addr()?;
    // The sender learns that all arrived by the receiver's close; it is started second and connects to a bound socket.
    let receiver = to.start_inside(move || receive(&listener))?;
    let start = Instant::now();
    let sent = from.inside(|| send(target, bytes, seed, marker));
    if sent.is_err() {
        // Frees a receiver that still waits for a connection.
        let _ = to.inside(|| Ok(TcpStream::connect(target)?));
    }
    let received = receiver.join().map_err(|_| anyhow!("the TCP receiver panicked"))?;
    let sha256_sent = sent?;
    let (sha256_received, arrived) = received?;
    Ok(Transfer { bytes: arrived, took: start.elapsed(), sha256_sent, sha256_received })
}

fn send(target: SocketAddr, bytes: u64, seed: u64, marker: &[u8]) -> Result<[u8; 32]> {
    let mut stream =
        TcpStream::connect_timeout(&target, CONNECT_WITHIN).with_context(|| format!("cannot connect to {target}"))?;
    stream.set_write_timeout(Some(STALL))?;
    stream.set_read_timeout(Some(STALL))?;
    let mut source = SeededBytes(seed);
    let mut hash = Sha256::new();
    let mut left = bytes;
    let mut block = vec![0; BLOCK];
    while left > 0 {
        let length = left.min(BLOCK as u64) as usize;
        source.fill(&mut block);
        for chunk in block.chunks_mut(MARKER_EVERY) {
            if let Some(place) = chunk.get_mut(..marker.len()) {
                place.copy_from_slice(marker);
            }
        }
        hash.update(&block[..length]);
        stream.write_all(&block[..length]).context("the transfer stalled")?;
        left -= length as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    // Nothing comes back; the read ends when the receiver has everything and closes.
    stream.read_to_end(&mut Vec::new()).context("the receiver did not finish")?;
    Ok(hash.finalize().into())
}

fn receive(listener: &TcpListener) -> Result<([u8; 32], u64)> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(STALL))?;
    let mut hash = Sha256::new();
    let mut total = 0;
    let mut block = vec![0; BLOCK];
    loop {
        let length = stream.read(&mut block).context("the transfer stalled")?;
        if length == 0 {
            return Ok((hash.finalize().into(), total));
        }
        hash.update(&block[..length]);
        total += length as u64;
    }
}

/// SplitMix64: enough to be incompressible and repeatable.
struct SeededBytes(u64);

impl SeededBytes {
    fn fill(&mut self, block: &mut [u8]) {
        for chunk in block.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^= word >> 31;
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }
}
