//! TCP at full speed: a thread a stream, blocks of 128 KiB, as iperf3 sends them.
#![allow(unsafe_code)]

use std::{
    io::{Read, Write},
    mem,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;

use super::{Done, Meet, serve::Parent};

const BLOCK: usize = 128 * 1024;
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A stream that stands still for this long failed.
const STALL: Duration = Duration::from_secs(10);

pub(super) fn send(meet: &Meet, seconds: f64, parent: &mut Parent) -> Result<Done> {
    let streams = streams(meet, parent)?;
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let sent = on_each(streams, |mut stream| {
        let block = vec![0x5a; BLOCK];
        let mut bytes = 0;
        while Instant::now() < end {
            bytes += stream.write(&block).context("the stream stood still")? as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        // Nothing comes back: the read ends when the receiver has everything and closes.
        stream.read_to_end(&mut Vec::new()).context("the receiver did not finish")?;
        Ok((bytes, retransmits(&stream)?))
    })?;
    let (bytes, retransmits) = sent.into_iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    Ok(Done::TcpSent { bytes, retransmits })
}

pub(super) fn receive(meet: &Meet, parent: &mut Parent) -> Result<Done> {
    let streams = streams(meet, parent)?;
    let start = Mutex::new(None);
    let received = on_each(streams, |mut stream| {
        let mut block = vec![0; BLOCK];
        let mut bytes = 0;
        loop {
            match stream.read(&mut block).context("the stream stood still")? {
                0 => return Ok((bytes, Instant::now())),
                length => {
                    if bytes == 0 {
                        start.lock().map_err(|_| anyhow!("a stream panicked"))?.get_or_insert_with(Instant::now);
                    }
                    bytes += length as u64;
                }
            }
        }
    })?;
    let start = start.into_inner().ok().flatten().context("nothing arrived")?;
    let end = received.iter().map(|(_, end)| *end).max().context("there was no stream")?;
    let nanos = u64::try_from((end - start).as_nanos())?.max(1);
    Ok(Done::TcpReceived { bytes: received.iter().map(|(bytes, _)| bytes).sum(), nanos })
}

fn streams(meet: &Meet, parent: &mut Parent) -> Result<Vec<TcpStream>> {
    let streams: Vec<TcpStream> = match meet {
        Meet::Listen { at, streams } => {
            let listener = TcpListener::bind(at).with_context(|| format!("cannot listen on {at}"))?;
            parent.ready(listener.local_addr()?)?;
            (0..*streams).map(|_| Ok(listener.accept()?.0)).collect::<Result<_>>()?
        }
        Meet::Connect { to } => to.iter().map(connect).collect::<Result<_>>()?,
    };
    for stream in &streams {
        stream.set_read_timeout(Some(STALL))?;
        stream.set_write_timeout(Some(STALL))?;
    }
    Ok(streams)
}

fn connect(to: &SocketAddr) -> Result<TcpStream> {
    TcpStream::connect_timeout(to, CONNECT_WITHIN).with_context(|| format!("cannot connect to {to}"))
}

/// Runs `work` on each stream in a thread of its own.
fn on_each<T: Send>(streams: Vec<TcpStream>, work: impl Fn(TcpStream) -> Result<T> + Sync) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let threads: Vec<_> = streams.into_iter().map(|stream| scope.spawn(|| work(stream))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a stream panicked"))?).collect()
    })
}

/// Segments that this end sent again.
fn retransmits(stream: &TcpStream) -> Result<u64> {
    // SAFETY: tcp_info is plain integers, so all zero is valid.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: `info` has room for `length` bytes; the kernel writes no more and says how many.
    let result = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length)
    };
    Errno::result(result)?;
    Ok(info.tcpi_total_retrans.into())
}
