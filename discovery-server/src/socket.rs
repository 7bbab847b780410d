//! Listening sockets: dual stack, and marked so that the routes of a mesh on the same node never catch them.
//!
//! Owns the choice of the default port and the mark. Accepted TCP connections inherit the mark of their listener.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Once;

use anyhow::{Context as _, bail};
use mesh_common::limits::FWMARK;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tracing::warn;

/// The ports that are tried in this order when `--listen` is not given: the one every firewall passes, then our own.
pub(crate) const DEFAULT_PORTS: [u16; 2] = [443, 7443];
/// Attempts to find a number that is free for TCP and UDP both when port 0 is asked for.
const PORT_ATTEMPTS: usize = 16;
/// Connections the kernel completes ahead of `accept`.
const BACKLOG: i32 = 1024;

/// A TCP and a UDP socket on the same address and port.
pub(crate) struct Pair {
    pub(crate) tcp: TcpListener,
    pub(crate) udp: UdpSocket,
    pub(crate) address: SocketAddr,
}

/// Binds both protocols on `listen`, or on the first default port that may be bound.
pub(crate) fn listen(listen: Option<SocketAddr>) -> anyhow::Result<Pair> {
    if let Some(address) = listen {
        return bind_pair(address).with_context(|| {
            format!("cannot listen on {address} (TCP and UDP): choose a free address with --listen, or stop the program that holds it")
        });
    }
    let mut failures = Vec::new();
    for port in DEFAULT_PORTS {
        match bind_pair(any(port)) {
            Ok(pair) => return Ok(pair),
            Err(error) => failures.push(format!("port {port}: {error}")),
        }
    }
    bail!("cannot listen ({}): choose a free port with --listen ADDR:PORT", failures.join("; "))
}

/// The unspecified address with this port; dual stack where the host has IPv6.
pub(crate) fn any(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)
}

/// Whether a socket of this process on one address may have the port of another one that is on all addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PortUse {
    Own,
    /// The kernel gives a datagram to the socket with the more exact address. Only sockets of the same user can share.
    Shared,
}

pub(crate) fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = bound(address, Type::STREAM, Protocol::TCP, PortUse::Own)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

pub(crate) fn bind_udp(address: SocketAddr, port: PortUse) -> io::Result<UdpSocket> {
    Ok(bound(address, Type::DGRAM, Protocol::UDP, port)?.into())
}

/// The address of this host that others most likely reach: the source towards the Internet, else any global one.
pub(crate) fn reachable_address() -> Option<IpAddr> {
    // Documentation addresses: connecting a UDP socket only asks the routing table, nothing is sent.
    let probes: [(SocketAddr, SocketAddr); 2] = [
        (SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0), SocketAddr::new(Ipv4Addr::new(192, 0, 2, 1).into(), 9)),
        (any(0), SocketAddr::new(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(), 9)),
    ];
    let routed = probes.into_iter().find_map(|(local, remote)| {
        let socket = bind_udp(local, PortUse::Own).ok()?;
        socket.connect(remote).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
    });
    routed.or_else(|| {
        let found: Vec<IpAddr> = nix::ifaddrs::getifaddrs()
            .ok()?
            .filter_map(|interface| interface.address)
            .filter_map(|address| {
                let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
            })
            .filter(|ip| match ip {
                IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
                IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
            })
            .collect();
        found.iter().find(|ip| ip.is_ipv4()).or(found.first()).copied()
    })
}

fn bind_pair(address: SocketAddr) -> io::Result<Pair> {
    let mut attempt = 1;
    loop {
        let tcp = bind_tcp(address)?;
        let bound = tcp.local_addr()?;
        match bind_udp(bound, PortUse::Own).inspect(widen) {
            Ok(udp) => return Ok(Pair { tcp, udp, address: bound }),
            Err(error) if address.port() == 0 && error.kind() == ErrorKind::AddrInUse && attempt < PORT_ATTEMPTS => {
                attempt += 1
            }
            Err(error) => return Err(error),
        }
    }
}

/// One socket has the datagrams of all clients: with the usual 200 KiB two of them overrun it in one burst.
fn widen(socket: &UdpSocket) {
    const BUFFER_BYTES: usize = 4 << 20;
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        // Without CAP_NET_ADMIN as much as net.core.rmem_max allows, and then it is no error.
        let _ = SockRef::from(socket).set_recv_buffer_size(BUFFER_BYTES);
    }
}

fn bound(address: SocketAddr, kind: Type, protocol: Protocol, port: PortUse) -> io::Result<Socket> {
    match bound_exactly(address, kind, protocol, port) {
        // A host without IPv6: the unspecified address still means "all of them".
        Err(error)
            if address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED)
                && matches!(error.raw_os_error(), Some(nix::libc::EAFNOSUPPORT | nix::libc::EADDRNOTAVAIL)) =>
        {
            bound_exactly(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()), kind, protocol, port)
        }
        other => other,
    }
}

fn bound_exactly(address: SocketAddr, kind: Type, protocol: Protocol, port: PortUse) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
    mark(&socket);
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    if port == PortUse::Shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

fn mark(socket: &Socket) {
    static REFUSED: Once = Once::new();
    if let Err(error) = socket.set_mark(FWMARK) {
        REFUSED.call_once(|| {
            warn!(
                %error,
                "cannot mark own sockets (mark {FWMARK:#x}): on a node of the mesh this server may lose its clients; grant CAP_NET_ADMIN there"
            );
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn port_zero_gives_one_number_for_both_protocols() {
        let pair = listen(Some("127.0.0.1:0".parse().unwrap())).unwrap();
        assert_ne!(pair.address.port(), 0);
        assert_eq!(pair.tcp.local_addr().unwrap(), pair.udp.local_addr().unwrap());
    }

    #[test]
    fn a_taken_port_is_named() {
        let held = bind_udp("127.0.0.1:0".parse().unwrap(), PortUse::Own).unwrap();
        let address = held.local_addr().unwrap();
        let message = format!("{:#}", listen(Some(address)).err().unwrap());
        assert!(message.contains(&address.to_string()) && message.contains("--listen"), "{message}");
    }
}
