//! Packet sockets: whole frames of one link, both ways.
//!
//! Frames on a virtual link are unfinished: several segments in one, checksums left to a card that is not there. A socket
//! opened with `offloads` gives and takes each frame behind a header that says so ([`Offload`]), which must travel with it.
#![allow(unsafe_code)]

use std::{io, os::fd::AsRawFd};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

/// Room for a whole super-packet with its headers.
pub(crate) const FRAME: usize = 80 * 1024;
/// Frames wait here while nobody reads; two cores are shared with the whole lab.
const SOCKET_BUFFER: usize = 64 << 20;

/// Opens a socket for one link of the calling thread's namespace; every later frame is seen.
pub(crate) fn open(link: &str, offloads: bool, own_frames: bool) -> Result<Socket> {
    let index = nix::net::if_::if_nametoindex(link).with_context(|| format!("there is no link {link}"))?;
    // Protocol 0 receives nothing until bind names the link: no frame of another link gets in.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &SOCKET_BUFFER)
        .or_else(|_| nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBuf, &SOCKET_BUFFER))?;
    if offloads {
        set(&socket, libc::PACKET_VNET_HDR, 1).context("cannot see offloads")?;
    }
    if !own_frames {
        set(&socket, libc::PACKET_IGNORE_OUTGOING, 1).context("cannot ignore own frames")?;
    }
    socket.bind(&link_address(index))?;
    Ok(socket)
}

/// What a frame leaves to be done, as `struct virtio_net_hdr` tells it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Offload {
    /// Bytes of payload in each segment but the last; 0 for a frame that is one.
    pub(crate) segment: u16,
}

impl Offload {
    /// Bytes before each frame of a socket with offloads.
    pub(crate) const HEADER: usize = 10;

    pub(crate) fn parse(header: &[u8; Self::HEADER]) -> Self {
        const NONE: u8 = 0;
        let segment = if header[1] == NONE { 0 } else { u16::from_ne_bytes([header[4], header[5]]) };
        Self { segment }
    }
}

/// Frames dropped from the socket since the last call: the kernel resets the counter as it is read.
pub(crate) fn missed(socket: &Socket) -> io::Result<u64> {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the pointers are to live values of the type and length that PACKET_STATISTICS writes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(stats.tp_drops.into()) } else { Err(io::Error::last_os_error()) }
}

fn set(socket: &Socket, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the pointer is to a live int, the type of both options used here.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn link_address(index: u32) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll is plain data, smaller than the storage, and all zeros is a valid value of it.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as libc::sa_family_t;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index.cast_signed();
    // SAFETY: the storage was filled as a sockaddr_ll above, and this is its length.
    unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) }
}
