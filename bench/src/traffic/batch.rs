//! Many datagrams by one system call, on a connected or bound socket.
#![allow(unsafe_code)]

use std::{mem, net::UdpSocket, os::fd::AsRawFd, ptr};

use nix::errno::Errno;

/// Datagrams in one call.
pub(super) const MAX: usize = 64;

/// Sends datagrams on a connected socket; gives how many the kernel took. The first that it did not take is the error of
/// the next call.
pub(super) fn send(socket: &UdpSocket, datagrams: &[impl AsRef<[u8]>]) -> nix::Result<usize> {
    // SAFETY: mmsghdr and iovec are integers and pointers; all zero means "no name, no data, no control".
    let mut headers: [libc::mmsghdr; MAX] = unsafe { mem::zeroed() };
    // SAFETY: as above.
    let mut blocks: [libc::iovec; MAX] = unsafe { mem::zeroed() };
    let count = datagrams.len().min(MAX);
    for ((header, block), datagram) in headers.iter_mut().zip(&mut blocks).zip(datagrams) {
        let bytes = datagram.as_ref();
        *block = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        header.msg_hdr.msg_iov = block;
        header.msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: the first `count` headers point to blocks and bytes that outlive the call, which only reads them.
    let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count as _, 0) };
    Ok(Errno::result(sent)?.unsigned_abs() as usize)
}

/// Receives into `slots` of equal size and calls `each` with every datagram; waits for the first as long as the socket's
/// timeout says.
pub(super) fn receive(socket: &UdpSocket, slots: &mut [Box<[u8]>], mut each: impl FnMut(&[u8])) -> nix::Result<()> {
    // SAFETY: as in `send`.
    let mut headers: [libc::mmsghdr; MAX] = unsafe { mem::zeroed() };
    // SAFETY: as above.
    let mut blocks: [libc::iovec; MAX] = unsafe { mem::zeroed() };
    let count = slots.len().min(MAX);
    for ((header, block), slot) in headers.iter_mut().zip(&mut blocks).zip(slots.iter_mut()) {
        *block = libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() };
        header.msg_hdr.msg_iov = block;
        header.msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: the first `count` headers point to distinct slots and blocks that outlive the call, with their lengths.
    let got = unsafe {
        libc::recvmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count as _, libc::MSG_WAITFORONE, ptr::null_mut())
    };
    let got = Errno::result(got)?.unsigned_abs() as usize;
    for (header, slot) in headers.iter().zip(slots.iter()).take(got) {
        each(&slot[..slot.len().min(header.msg_len as usize)]);
    }
    Ok(())
}
