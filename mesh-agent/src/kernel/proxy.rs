//! One UDP socket on loopback that stands for every peer which the kernel cannot reach by itself.
//!
//! Each peer has an address of its own in 127.64.0.0/10, all on this socket's port: to the kernel it is the peer's endpoint.
//! One socket for all, since a thousand peers would otherwise take a thousand descriptors. Only the kernel is listened to: it
//! alone can send from WireGuard's port of this host.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::raw;

/// Peers are numbered from here; behind it there is room for four million.
const FIRST: u32 = u32::from_be_bytes([127, 64, 0, 1]);
/// Bursts of a peer's data wait here, some milliseconds of it.
const BUFFER_BYTES: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct Proxy {
    socket: AsyncFd<Socket>,
    port: u16,
    /// WireGuard's.
    kernel: SocketAddrV4,
}

/// The address that stands for the peer of this number.
pub(super) fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(FIRST + number)
}

impl Proxy {
    /// Must be called inside a tokio runtime.
    pub(super) fn open(wireguard_port: u16) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        socket.bind_device(Some(b"lo"))?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)).into())?;
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
            socket.set_recv_buffer_size(BUFFER_BYTES)?;
        }
        let bound = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        let proxy = Self {
            socket: raw::watch(socket)?,
            port: bound.port(),
            kernel: SocketAddrV4::new(Ipv4Addr::LOCALHOST, wireguard_port),
        };
        // Without loopback nothing would go this way, and nobody would say why.
        proxy.send_to(address(0), SocketAddrV4::new(address(0), proxy.port), &[0])?;
        Ok(proxy)
    }

    /// What the kernel is given as the endpoint of the peer of this address.
    pub(super) fn endpoint(&self, address: Ipv4Addr) -> SocketAddr {
        SocketAddrV4::new(address, self.port).into()
    }

    /// Waits until something came; safe to drop at any time.
    pub(super) async fn readable(&self) {
        drop(self.socket.readable().await);
    }

    /// The next datagram of the kernel: for which address, and its length. `None` when there is no more. What somebody else
    /// sent has the length 0.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Option<(Ipv4Addr, usize)> {
        let received = self.socket.try_io(Interest::READABLE, |socket| {
            let mut space = nix::cmsg_space!(libc::in_pktinfo);
            let mut blocks = [IoSliceMut::new(buffer)];
            let flags = MsgFlags::MSG_DONTWAIT;
            let got = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut blocks, Some(&mut space), flags)?;
            let to = got.cmsgs()?.find_map(|message| match message {
                ControlMessageOwned::Ipv4PacketInfo(info) => Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))),
                _ => None,
            });
            let is_kernel =
                got.address.is_some_and(|from| from.ip().is_loopback() && from.port() == self.kernel.port());
            Ok((to, if is_kernel { got.bytes } else { 0 }))
        });
        let (to, length) = received.ok()?;
        Some((to.unwrap_or(Ipv4Addr::UNSPECIFIED), length))
    }

    /// Gives the kernel a datagram from the peer of this address; false when it was not taken.
    pub(super) fn send(&self, from: Ipv4Addr, datagram: &[u8]) -> bool {
        self.send_to(from, self.kernel, datagram).is_ok()
    }

    fn send_to(&self, from: Ipv4Addr, to: SocketAddrV4, datagram: &[u8]) -> io::Result<()> {
        let source = libc::in_addr { s_addr: u32::from(from).to_be() };
        let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: libc::in_addr { s_addr: 0 } };
        let control = [ControlMessage::Ipv4PacketInfo(&info)];
        let blocks = [IoSlice::new(datagram)];
        let to = SockaddrIn::from(to);
        sendmsg(self.socket.as_raw_fd(), &blocks, &control, MsgFlags::MSG_DONTWAIT, Some(&to))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::net::UdpSocket;

    #[tokio::test]
    async fn each_peer_has_an_address_of_its_own_on_one_socket_and_strangers_are_not_heard() {
        // In the place of the kernel's WireGuard.
        let kernel = UdpSocket::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::open(kernel.local_addr().unwrap().port()).unwrap();
        let mut buffer = [0; 100];
        // The greeting to itself is no datagram of the kernel.
        proxy.readable().await;
        assert_eq!(proxy.receive(&mut buffer), Some((address(0), 0)));
        for number in [0, 1, 70_000] {
            let peer = address(number);
            assert!(proxy.send(peer, b"in"));
            let (length, from) = kernel.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from), (&b"in"[..], proxy.endpoint(peer)));
            kernel.send_to(b"out!", proxy.endpoint(peer)).unwrap();
            proxy.readable().await;
            assert_eq!(proxy.receive(&mut buffer), Some((peer, 4)));
        }
        let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
        stranger.send_to(b"let me in", proxy.endpoint(address(1))).unwrap();
        proxy.readable().await;
        assert_eq!(proxy.receive(&mut buffer), Some((address(1), 0)));
        assert_eq!(proxy.receive(&mut buffer), None);
    }
}
