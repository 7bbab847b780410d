//! What really crosses a link: a packet socket that counts frames and looks for markers and mesh addresses in clear.
//!
//! Invariant: a marker is registered before it can be sent ([`Watch::marker`] makes and registers it in one step), and
//! [`Capture::stop`] drains the socket, so that "never seen" means never on the wire; frames that the kernel had to drop
//! from the socket are counted, and a verdict with drops is no verdict. [`flows`] tells who sent what to whom.

pub mod flows;

use std::{
    collections::BTreeMap,
    fmt,
    io::{ErrorKind, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use ipnet::IpNet;
use memchr::memmem;
use socket2::Socket;

use crate::{host::Host, packet};

/// Slice of waiting; the stop sign is looked at in between.
const LOOK: Duration = Duration::from_millis(20);

/// A byte string that is sent through the mesh and must not be seen on a wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    label: String,
    bytes: Vec<u8>,
}

impl Marker {
    pub fn label(&self) -> &str {
        &self.label
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// What several captures look for together. Clones share the list.
#[derive(Debug, Clone, Default)]
pub struct Watch(Arc<RwLock<WatchList>>);

#[derive(Debug, Default)]
struct WatchList {
    markers: Vec<(Marker, memmem::Finder<'static>)>,
    prefixes: Vec<IpNet>,
}

impl Watch {
    /// Makes an unguessable marker and looks for it from now on.
    pub fn marker(&self, label: &str) -> Result<Marker> {
        let mut random = [0; 12];
        getrandom::fill(&mut random).map_err(|error| anyhow!("no randomness: {error}"))?;
        let bytes = format!("<marker {label} {}>", data_encoding::HEXLOWER.encode(&random)).into_bytes();
        let marker = Marker { label: label.to_owned(), bytes };
        let finder = memmem::Finder::new(&marker.bytes).into_owned();
        self.0.write().unwrap_or_else(PoisonError::into_inner).markers.push((marker.clone(), finder));
        Ok(marker)
    }

    /// Counts frames whose IP source or destination lies in `prefix` as leaks from now on.
    pub fn leaks_of(&self, prefix: IpNet) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).prefixes.push(prefix);
    }
}

/// What one capture has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    pub packets: u64,
    /// UDP datagrams with the shape of a WireGuard message: type 1 to 4, three zero bytes.
    pub wireguard: u64,
    /// Frames per marker label.
    pub markers: BTreeMap<String, Frames>,
    /// Frames from or to a watched prefix, outside any tunnel.
    pub leaks: Option<Frames>,
    /// Frames that this capture missed.
    pub missed: u64,
}

/// Frames of one sort.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frames {
    pub count: u64,
    /// The first of them, in words.
    pub first: String,
}

impl Counts {
    pub fn of(&self, marker: &Marker) -> u64 {
        self.markers.get(&marker.label).map_or(0, |frames| frames.count)
    }
}

/// A running capture of one link.
#[derive(Debug)]
pub struct Capture {
    name: String,
    stop: Arc<AtomicBool>,
    counts: Arc<Mutex<Counts>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Capture {
    /// Captures both directions of `link`; when this returns, every later frame is seen.
    pub fn start(host: &Host, link: &str, watch: &Watch) -> Result<Self> {
        let name = format!("{}:{link}", host.name());
        let socket = host
            .inside(|| {
                let socket = packet::open(link, false, true)?;
                socket.set_read_timeout(Some(LOOK))?;
                Ok(socket)
            })
            .with_context(|| format!("cannot capture {name}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new(Mutex::new(Counts::default()));
        let thread = host.start_inside({
            let (stop, counts, watch) = (Arc::clone(&stop), Arc::clone(&counts), watch.clone());
            move || listen(&socket, &stop, &counts, &watch)
        })?;
        Ok(Self { name, stop, counts, thread: Some(thread) })
    }

    /// `host:link`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was seen so far.
    pub fn counts(&self) -> Counts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads what already arrived, ends, and gives the verdict.
    pub fn stop(mut self) -> Result<Counts> {
        self.join()?;
        Ok(self.counts())
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the capture of {} panicked", self.name))?,
            None => Ok(()),
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

fn listen(socket: &Socket, stop: &AtomicBool, counts: &Mutex<Counts>, watch: &Watch) -> Result<()> {
    let mut frame = vec![0; packet::FRAME];
    let mut reader = socket;
    let mut draining = false;
    loop {
        let stopping = draining || stop.load(Ordering::Relaxed);
        if stopping && !draining {
            socket.set_nonblocking(true)?;
            draining = true;
        }
        match reader.read(&mut frame) {
            Ok(length) => {
                let seen = inspect(&frame[..length], &watch.0.read().unwrap_or_else(PoisonError::into_inner));
                counts.lock().unwrap_or_else(PoisonError::into_inner).add(seen);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                counts.lock().unwrap_or_else(PoisonError::into_inner).missed += packet::missed(socket)?;
                if stopping {
                    return Ok(());
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::NetworkDown) => {}
            Err(error) => return Err(error).context("cannot read frames"),
        }
    }
}

#[derive(Default)]
struct Seen {
    wireguard: bool,
    markers: Vec<String>,
    /// Its addresses are of the mesh.
    leak: bool,
    words: String,
}

impl Counts {
    fn add(&mut self, seen: Seen) {
        self.packets += 1;
        self.wireguard += u64::from(seen.wireguard);
        for label in seen.markers {
            self.markers.entry(label).or_insert_with(|| Frames::none_before(&seen.words)).count += 1;
        }
        if seen.leak {
            self.leaks.get_or_insert_with(|| Frames::none_before(&seen.words)).count += 1;
        }
    }
}

impl Frames {
    fn none_before(first: &str) -> Self {
        Self { count: 0, first: first.to_owned() }
    }
}

fn inspect(frame: &[u8], list: &WatchList) -> Seen {
    let mut seen = Seen {
        markers: list
            .markers
            .iter()
            .filter(|(_, finder)| finder.find(frame).is_some())
            .map(|(marker, _)| marker.label.clone())
            .collect(),
        ..Seen::default()
    };
    let ip = IpHeader::of_ethernet(frame);
    if let Some(ip) = &ip {
        seen.wireguard = ip.protocol == 17
            && ip.payload.get(8..12).is_some_and(|head| (1..=4).contains(&head[0]) && head[1..] == [0, 0, 0]);
        seen.leak = list.prefixes.iter().any(|prefix| prefix.contains(&ip.source) || prefix.contains(&ip.destination));
    }
    if seen.leak || !seen.markers.is_empty() {
        seen.words = ip.map_or_else(|| "is no IP packet".to_owned(), |ip| ip.to_string());
    }
    seen
}

struct IpHeader<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    payload: &'a [u8],
}

impl<'a> IpHeader<'a> {
    /// Extension headers of IPv6 are not followed: neither WireGuard nor the lab's traffic has any.
    fn of_ethernet(frame: &'a [u8]) -> Option<Self> {
        let packet = frame.get(14..)?;
        match u16::from_be_bytes([frame[12], frame[13]]) {
            0x0800 => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                Some(Self {
                    source: Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?).into(),
                    destination: Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?).into(),
                    protocol: packet[9],
                    payload: packet.get(header..)?,
                })
            }
            0x86dd => Some(Self {
                source: Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?).into(),
                destination: Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?).into(),
                protocol: packet[6],
                payload: packet.get(40..)?,
            }),
            _ => None,
        }
    }
}

impl fmt::Display for IpHeader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, destination, protocol, payload } = self;
        write!(f, "{source} -> {destination} protocol {protocol}")?;
        const ICMP: [u8; 2] = [1, 58];
        match payload {
            [kind, code, ..] if ICMP.contains(protocol) => write!(f, " type {kind} code {code}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn udp_frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45]);
        frame.extend([0; 8]);
        frame.push(17);
        frame.extend([0, 0, 10, 0, 1, 2, 10, 244, 2, 11]);
        frame.extend([0; 8]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn wireguard_is_told_from_other_udp() {
        let list = WatchList::default();
        assert!(inspect(&udp_frame(&[4, 0, 0, 0, 9]), &list).wireguard);
        assert!(!inspect(&udp_frame(&[5, 0, 0, 0, 9]), &list).wireguard);
        assert!(!inspect(&udp_frame(&[4, 0, 1, 0, 9]), &list).wireguard);
    }

    #[test]
    fn a_marker_and_a_watched_prefix_are_found() {
        let watch = Watch::default();
        let marker = watch.marker("hello").unwrap();
        watch.leaks_of("10.244.2.0/24".parse().unwrap());
        let list = watch.0.read().unwrap();
        let seen = inspect(&udp_frame(marker.bytes()), &list);
        assert_eq!(seen.markers, ["hello"]);
        assert!(seen.leak);
        assert_eq!(seen.words, "10.0.1.2 -> 10.244.2.11 protocol 17");
        let mut icmp = udp_frame(marker.bytes());
        (icmp[23], icmp[34]) = (1, 8);
        assert_eq!(inspect(&icmp, &list).words, "10.0.1.2 -> 10.244.2.11 protocol 1 type 8 code 0");
        icmp[13] = 6;
        assert_eq!(inspect(&icmp, &list).words, "is no IP packet");
    }

    #[test]
    fn cut_frames_are_only_counted() {
        let list = WatchList::default();
        let whole = udp_frame(&[4, 0, 0, 0]);
        for length in 0..whole.len() {
            assert!(!inspect(&whole[..length], &list).wireguard, "cut at {length}");
        }
    }
}
