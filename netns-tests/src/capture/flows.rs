//! Who sent what to whom over a link, and when: one line for each UDP or TCP packet, of its headers alone.

use std::{
    io::{ErrorKind, Read},
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use anyhow::{Context, Result, anyhow, ensure};
use socket2::Socket;

use super::{IpHeader, LOOK};
use crate::{
    host::Host,
    packet::{self, Offload},
};

/// More lines than a run of minutes makes.
const MOST: usize = 1 << 20;
/// `message type` of WireGuard's transport data.
const TRANSPORT_DATA: u8 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// One packet on the link; the segments of a super-packet are one each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    pub at: Instant,
    pub transport: Transport,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Of what UDP or TCP carries.
    pub length: usize,
    /// The datagram has the shape of WireGuard's transport data.
    pub tunnel_data: bool,
}

/// A running log of one link.
#[derive(Debug)]
pub struct FlowLog {
    stop: Arc<AtomicBool>,
    lines: Arc<Mutex<Vec<Passed>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl FlowLog {
    /// Both directions of `link`; when this returns, every later packet is seen.
    pub fn start(host: &Host, link: &str) -> Result<Self> {
        let socket = host
            .inside(|| {
                let socket = packet::open(link, true, true)?;
                socket.set_read_timeout(Some(LOOK))?;
                Ok(socket)
            })
            .with_context(|| format!("cannot log {}:{link}", host.name()))?;
        let (stop, lines) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let thread = host.start_inside({
            let (stop, lines) = (Arc::clone(&stop), Arc::clone(&lines));
            move || listen(&socket, &stop, &lines)
        })?;
        Ok(Self { stop, lines, thread: Some(thread) })
    }

    /// What passed so far and fits.
    pub fn lines(&self, fits: impl Fn(&Passed) -> bool) -> Vec<Passed> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| fits(line)).copied().collect()
    }

    /// Reads what already arrived and ends.
    pub fn stop(mut self) -> Result<Vec<Passed>> {
        self.join()?;
        Ok(std::mem::take(&mut self.lines.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("a flow log panicked"))?,
            None => Ok(()),
        }
    }
}

impl Drop for FlowLog {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

fn listen(socket: &Socket, stop: &AtomicBool, lines: &Mutex<Vec<Passed>>) -> Result<()> {
    let mut buffer = vec![0; packet::FRAME];
    let mut reader = socket;
    let mut draining = false;
    loop {
        if !draining && stop.load(Ordering::Relaxed) {
            socket.set_nonblocking(true)?;
            draining = true;
        }
        match reader.read(&mut buffer) {
            Ok(length) => {
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                inspect(&buffer[..length], Instant::now(), &mut lines);
                ensure!(lines.len() < MOST, "more than {MOST} packets");
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                ensure!(packet::missed(socket)? == 0, "the machine was too busy to see every packet");
                if draining {
                    return Ok(());
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::NetworkDown) => {}
            Err(error) => return Err(error).context("cannot read frames"),
        }
    }
}

fn inspect(bytes: &[u8], at: Instant, lines: &mut Vec<Passed>) {
    let Some((header, frame)) = bytes.split_first_chunk::<{ Offload::HEADER }>() else {
        return;
    };
    let segment = usize::from(Offload::parse(header).segment);
    let Some(ip) = IpHeader::of_ethernet(frame) else {
        return;
    };
    let Some(ports) = ip.payload.first_chunk::<4>() else {
        return;
    };
    let (transport, payload) = match ip.protocol {
        17 => (Transport::Udp, ip.payload.get(8..)),
        6 => (Transport::Tcp, ip.payload.get(12).and_then(|offset| ip.payload.get(usize::from(offset >> 4) * 4..))),
        _ => return,
    };
    let Some(payload) = payload else {
        return;
    };
    let line = |payload: &[u8]| Passed {
        at,
        transport,
        source: (ip.source, u16::from_be_bytes([ports[0], ports[1]])).into(),
        destination: (ip.destination, u16::from_be_bytes([ports[2], ports[3]])).into(),
        length: payload.len(),
        tunnel_data: transport == Transport::Udp && payload.starts_with(&[TRANSPORT_DATA, 0, 0, 0]),
    };
    if segment == 0 || payload.is_empty() {
        lines.push(line(payload));
    } else {
        lines.extend(payload.chunks(segment).map(line));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(segment: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; Offload::HEADER];
        if segment > 0 {
            bytes[1] = 5;
            bytes[4..6].copy_from_slice(&segment.to_ne_bytes());
        }
        bytes.extend([0; 12]);
        bytes.extend([0x08, 0x00, 0x45, 0]);
        bytes.extend((28 + payload.len() as u16).to_be_bytes());
        bytes.extend([0; 5]);
        bytes.push(17);
        bytes.extend([0, 0, 5, 1, 1, 2, 5, 2, 1, 2]);
        bytes.extend([0x10, 0, 0x20, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn a_super_packet_is_as_many_lines_as_it_has_segments() {
        let mut lines = Vec::new();
        let payload: Vec<u8> = [[4, 0, 0, 0, 9].as_slice(), &[4, 0, 0, 0, 9], &[1, 2]].concat();
        inspect(&bytes(5, &payload), Instant::now(), &mut lines);
        let seen: Vec<_> = lines.iter().map(|line| (line.length, line.tunnel_data)).collect();
        assert_eq!(seen, [(5, true), (5, true), (2, false)]);
        assert_eq!(lines[0].source.to_string(), "5.1.1.2:4096");
        assert_eq!(lines[0].destination.to_string(), "5.2.1.2:8192");
    }

    #[test]
    fn cut_frames_are_no_lines() {
        let whole = bytes(0, &[4, 0, 0, 0]);
        for length in 0..whole.len() - 4 {
            let mut lines = Vec::new();
            inspect(&whole[..length], Instant::now(), &mut lines);
            assert!(lines.is_empty(), "cut at {length}");
        }
    }
}
