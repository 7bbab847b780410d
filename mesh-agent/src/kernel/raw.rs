//! Raw sockets beside the kernel's WireGuard: probes and STUN from and to its port, and datagrams put before it as if they
//! had come from elsewhere.
//!
//! The kernel gives a copy of what comes to the port and drops by itself what is not its own. A filter lets through probes,
//! STUN, and handshake messages, which only tell that something is about to change. Whether what came is genuine is for
//! others; a datagram cut short is dropped here.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

use bytes::Bytes;
use mesh_proto::wire::demux::{Datagram, PROBE, classify};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const IPV6_HEADER: usize = 40;
const HOPS: u8 = 64;
/// The second word of a STUN message (RFC 8489, 5).
const STUN_COOKIE: u32 = 0x2112_a442;
/// What is looked at in one go.
const BUFFER: usize = 2048;

/// Something that came to WireGuard's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    /// A probe or a STUN message.
    Control { source: SocketAddr, bytes: Bytes },
    /// An initiation or a response: the kernel is about to know more.
    Handshake { source: SocketAddr },
}

#[derive(Debug)]
pub(super) struct RawSockets {
    port: u16,
    v4: Family,
    /// `None` where the host has no IPv6.
    v6: Option<Family>,
}

#[derive(Debug)]
struct Family {
    /// Takes and gives UDP headers.
    port: AsyncFd<Socket>,
    /// Takes whole packets; gives nothing.
    whole: Socket,
    /// Never sends: it is connected to learn which source address the host would take.
    guide: UdpSocket,
}

impl RawSockets {
    /// Must be called inside a tokio runtime. Fails without CAP_NET_RAW.
    pub(super) fn open(port: u16, mark: u32) -> io::Result<Self> {
        let v4 = Family::open(true, port, mark)?;
        let v6 = match Family::open(false, port, mark) {
            Ok(v6) => Some(v6),
            // Not compiled in, or switched off.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { port, v4, v6 })
    }

    /// Waits until something came; safe to drop at any time.
    pub(super) async fn readable(&self) {
        match &self.v6 {
            Some(v6) => {
                tokio::select! {
                    _ = self.v4.port.readable() => {}
                    _ = v6.port.readable() => {}
                }
            }
            None => drop(self.v4.port.readable().await),
        }
    }

    /// The next of what came; `None` when there is no more.
    pub(super) fn receive(&self) -> Option<Heard> {
        let mut buffer = [0; BUFFER];
        for family in [Some(&self.v4), self.v6.as_ref()].into_iter().flatten() {
            loop {
                let received = family.port.try_io(Interest::READABLE, |socket| {
                    let mut blocks = [IoSliceMut::new(&mut buffer)];
                    let got =
                        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut blocks, None, MsgFlags::MSG_DONTWAIT)?;
                    let source = got.address.and_then(|address| address.as_sockaddr_in6().map(|v6| v6.ip()));
                    Ok((got.bytes, source))
                });
                // An error of the socket is one of a packet, and there may be more.
                let Ok((length, source)) = received else { break };
                let heard = match source {
                    Some(ip) => read(ip.into(), &buffer[..length]),
                    None => read_v4(&buffer[..length]),
                };
                if heard.is_some() {
                    return heard;
                }
            }
        }
        None
    }

    /// Sends from WireGuard's port; false when the host does not take it, most often because it has no route.
    pub(super) fn send(&self, to: SocketAddr, payload: &[u8], ttl: Option<u8>) -> bool {
        let family = if to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        family.is_some_and(|family| family.send(self.port, to, payload, ttl).is_ok())
    }

    /// Puts a datagram before the kernel's WireGuard as if it had come from this address. It goes over loopback with the
    /// route it left by, so no filter of spoofed sources sees it.
    pub(super) fn inject(&self, source: SocketAddr, payload: &[u8]) -> bool {
        let to: IpAddr = if source.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        let Some(packet) = whole_packet(source, SocketAddr::new(to, self.port), payload) else { return false };
        let family = if source.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        // Port 0: a raw socket has none.
        family.is_some_and(|family| send_now(&family.whole, SocketAddr::new(to, 0), &[&packet], None).is_ok())
    }
}

impl Family {
    fn open(is_v4: bool, port: u16, mark: u32) -> io::Result<Self> {
        let domain = if is_v4 { Domain::IPV4 } else { Domain::IPV6 };
        let udp = Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::UDP))?;
        udp.attach_filter(&filter(is_v4, port))?;
        let whole = Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::from(libc::IPPROTO_RAW)))?;
        if is_v4 {
            whole.set_header_included_v4(true)?;
        } else {
            whole.set_header_included_v6(true)?;
        }
        let any: IpAddr = if is_v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let guide = UdpSocket::bind(SocketAddr::new(any, 0))?;
        setsockopt(&udp, sockopt::Mark, &mark)?;
        setsockopt(&whole, sockopt::Mark, &mark)?;
        setsockopt(&guide, sockopt::Mark, &mark)?;
        Ok(Self { port: watch(udp)?, whole, guide })
    }

    fn send(&self, port: u16, to: SocketAddr, payload: &[u8], ttl: Option<u8>) -> io::Result<()> {
        self.guide.connect(to)?;
        let source = SocketAddr::new(self.guide.local_addr()?.ip(), port);
        let header = udp_header(source, to, payload).ok_or(io::ErrorKind::InvalidInput)?;
        // Port 0: a raw socket has none, and IPv6 refuses any other.
        let mut bare = to;
        bare.set_port(0);
        send_now(self.port.get_ref(), bare, &[&header, payload], ttl)
    }
}

/// Has tokio tell when there is something to read.
pub(super) fn watch<T: AsRawFd + AsFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: what is borrowed out of `owner` by `AsFd` is its own open descriptor, and nothing in this module replaces or
    // closes it while AsyncFd has it.
    unsafe { AsyncFd::register_with_interest(owner, Interest::READABLE) }.map_err(Into::into)
}

pub(super) fn send_now(socket: &Socket, to: SocketAddr, parts: &[&[u8]], ttl: Option<u8>) -> io::Result<()> {
    let hops = ttl.map(libc::c_int::from);
    let limit = hops.as_ref().map(|hops| match to {
        SocketAddr::V4(_) => ControlMessage::Ipv4Ttl(hops),
        SocketAddr::V6(_) => ControlMessage::Ipv6HopLimit(hops),
    });
    let blocks: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let to = SockaddrStorage::from(to);
    sendmsg(socket.as_raw_fd(), &blocks, limit.as_slice(), MsgFlags::MSG_DONTWAIT, Some(&to))?;
    Ok(())
}

/// What a UDP socket has, without waiting.
pub(super) fn receive_now(socket: &Socket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    let mut blocks = [IoSliceMut::new(buffer)];
    let got = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut blocks, None, MsgFlags::MSG_DONTWAIT)?;
    let source = got.address.and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from((v4.ip(), v4.port())));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::from((v6.ip(), v6.port()))))
    });
    Ok((got.bytes, source.ok_or(io::ErrorKind::AddrNotAvailable)?))
}

/// `None` when it is too long for a datagram.
fn udp_header(source: SocketAddr, to: SocketAddr, payload: &[u8]) -> Option<[u8; UDP_HEADER]> {
    let length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let mut header = [0; UDP_HEADER];
    header[..2].copy_from_slice(&source.port().to_be_bytes());
    header[2..4].copy_from_slice(&to.port().to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    let sum = checksum(source.ip(), to.ip(), &header, payload);
    header[6..].copy_from_slice(&sum.to_be_bytes());
    Some(header)
}

/// Of RFC 768 and RFC 8200, 8.1; never 0, which means that there is none.
fn checksum(source: IpAddr, to: IpAddr, header: &[u8; UDP_HEADER], payload: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u32 {
        let pairs = bytes.chunks(2);
        pairs.map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum()
    };
    let address = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => words(&ip.octets()),
        IpAddr::V6(ip) => words(&ip.octets()),
    };
    let length = (UDP_HEADER + payload.len()) as u32;
    let mut sum = address(source) + address(to) + u32::from(UDP) + length + words(header) + words(payload);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !(sum as u16) {
        0 => 0xffff,
        sum => sum,
    }
}

fn whole_packet(source: SocketAddr, to: SocketAddr, payload: &[u8]) -> Option<Vec<u8>> {
    let udp = udp_header(source, to, payload)?;
    let length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let mut packet = Vec::with_capacity(IPV6_HEADER + UDP_HEADER + payload.len());
    match (source.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(to)) => {
            // The kernel fills in the length, the identification and the checksum.
            packet.extend([0x45, 0, 0, 0, 0, 0, 0, 0, HOPS, UDP, 0, 0]);
            packet.extend(source.octets());
            packet.extend(to.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([UDP, HOPS]);
            packet.extend(source.octets());
            packet.extend(to.octets());
        }
        _ => return None,
    }
    packet.extend(udp);
    packet.extend(payload);
    Some(packet)
}

/// An IPv4 raw socket gives packets with their IP header.
fn read_v4(packet: &[u8]) -> Option<Heard> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    read(Ipv4Addr::from(source).into(), packet.get(header..)?)
}

fn read(ip: IpAddr, datagram: &[u8]) -> Option<Heard> {
    let port = u16::from_be_bytes(datagram.get(..2)?.try_into().ok()?);
    let source = SocketAddr::new(ip, port);
    let payload = datagram.get(UDP_HEADER..)?;
    match classify(payload) {
        Datagram::Probe | Datagram::Stun => Some(Heard::Control { source, bytes: Bytes::copy_from_slice(payload) }),
        Datagram::WireGuard(_) => Some(Heard::Handshake { source }),
        Datagram::Unknown => None,
    }
}

/// Classic BPF: UDP to this port, and a probe, a STUN message, an initiation or a response.
fn filter(is_v4: bool, port: u16) -> Vec<SockFilter> {
    use libc::{BPF_B, BPF_H, BPF_IMM, BPF_IND, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_LDX, BPF_MSH, BPF_RET, BPF_W};
    let op = |code: u32, jt, jf, k| SockFilter::new(code as u16, jt, jf, k);
    // Where the UDP header begins is in X: behind the IPv4 header, or at the start.
    let start = if is_v4 { op(BPF_LDX | BPF_B | BPF_MSH, 0, 0, 0) } else { op(BPF_LDX | BPF_IMM, 0, 0, 0) };
    let load = |size: u32, at| op(BPF_LD | size | BPF_IND, 0, 0, at);
    let equal = |value, jt, jf| op(BPF_JMP | BPF_JEQ | BPF_K, jt, jf, value);
    vec![
        start,
        load(BPF_H, 2),
        equal(u32::from(port), 0, 7),
        load(BPF_B, 8),
        equal(u32::from(PROBE), 6, 0),
        load(BPF_W, 8),
        equal(0x0100_0000, 4, 0),
        equal(0x0200_0000, 3, 0),
        load(BPF_W, 12),
        equal(STUN_COOKIE, 1, 0),
        op(BPF_RET | BPF_K, 0, 0, 0),
        op(BPF_RET | BPF_K, 0, 0, u32::MAX),
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What the filter says of a packet, by the rules of the kernel.
    fn passes(filter: &[libc::sock_filter], packet: &[u8]) -> bool {
        let (mut a, mut x, mut at) = (0u32, 0u32, 0usize);
        let load = |size: usize, from: usize| -> Option<u32> {
            let bytes = packet.get(from..from + size)?;
            Some(bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
        };
        loop {
            let step = filter[at];
            at += 1;
            let loaded = match step.code {
                0xb1 => {
                    x = 4 * (u32::from(packet[step.k as usize]) & 0xf);
                    continue;
                }
                0x01 => {
                    x = step.k;
                    continue;
                }
                0x40 => load(4, (x + step.k) as usize),
                0x48 => load(2, (x + step.k) as usize),
                0x50 => load(1, (x + step.k) as usize),
                0x15 => {
                    at += usize::from(if a == step.k { step.jt } else { step.jf });
                    continue;
                }
                0x06 => return step.k != 0,
                code => panic!("unknown step {code:#x}"),
            };
            match loaded {
                Some(value) => a = value,
                None => return false,
            }
        }
    }

    fn steps(is_v4: bool) -> Vec<libc::sock_filter> {
        // A filter is the kernel's own structure in a wrapper.
        filter(is_v4, 51872)
            .into_iter()
            // SAFETY: SockFilter is a transparent wrapper of sock_filter.
            .map(|step| unsafe { std::mem::transmute::<SockFilter, libc::sock_filter>(step) })
            .collect()
    }

    fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34];
        bytes.extend(port.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn the_filter_lets_probes_stun_and_handshakes_of_the_port_through_and_nothing_else() {
        let message = |kind: u8, length: usize| {
            let mut bytes = vec![0; length];
            bytes[0] = kind;
            bytes
        };
        let stun = mesh_proto::wire::stun::binding_request(&[7; 12], mesh_proto::wire::stun::Change::NONE);
        let good = [message(PROBE, 60), message(1, 148), message(2, 92), stun];
        let bad = [message(4, 1452), message(3, 64), vec![4, 0, 0], vec![], message(0, 148), vec![1, 0, 0]];
        for is_v4 in [true, false] {
            let filter = steps(is_v4);
            // With and without options.
            for words in if is_v4 { vec![5u8, 8] } else { vec![0] } {
                let packet = |port, payload: &[u8]| {
                    let mut packet = vec![0x40 | words; usize::from(words) * 4];
                    packet.extend(datagram(port, payload));
                    packet
                };
                for payload in &good {
                    assert!(passes(&filter, &packet(51872, payload)), "{payload:02x?}");
                    assert!(!passes(&filter, &packet(51873, payload)));
                }
                for payload in &bad {
                    assert!(!passes(&filter, &packet(51872, payload)), "{payload:02x?}");
                }
            }
        }
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        let mut packet = vec![0x45; 20];
        packet.extend(datagram(51872, &[PROBE, 1, 2]));
        assert!(matches!(read_v4(&packet), Some(Heard::Control { source, .. }) if source.port() == 0x1234));
        for length in 0..28 {
            assert_eq!(read_v4(&packet[..length]), None);
        }
    }

    #[test]
    fn checksums_are_those_that_a_receiver_finds() {
        // A receiver sums all words with the checksum among them: all bits set.
        for (source, to) in [("192.0.2.1:51872", "198.51.100.7:7"), ("[2001:db8::1]:51872", "[2001:db8::2]:9")] {
            for payload in [&b"odd"[..], b"even", b""] {
                let (source, to): (SocketAddr, SocketAddr) = (source.parse().unwrap(), to.parse().unwrap());
                let header = udp_header(source, to, payload).unwrap();
                let again = checksum(source.ip(), to.ip(), &header, payload);
                assert_eq!(again, 0xffff, "{source} {payload:?}");
            }
        }
    }

    #[test]
    fn a_whole_packet_has_the_given_source() {
        let packet = whole_packet("192.0.2.9:7777".parse().unwrap(), "127.0.0.1:51872".parse().unwrap(), b"x").unwrap();
        assert_eq!(&packet[12..20], [192, 0, 2, 9, 127, 0, 0, 1]);
        assert_eq!(&packet[20..24], [0x1e, 0x61, 0xca, 0xa0]);
        let packet = whole_packet("[2001:db8::9]:1".parse().unwrap(), "[::1]:51872".parse().unwrap(), b"xy").unwrap();
        assert_eq!((packet[0], packet[5], packet[6], packet.len()), (0x60, 10, UDP, 50));
        assert!(whole_packet("192.0.2.9:1".parse().unwrap(), "[::1]:1".parse().unwrap(), b"").is_none());
    }
}
