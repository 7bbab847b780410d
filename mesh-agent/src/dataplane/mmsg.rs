//! One UDP socket, many datagrams a system call: recvmmsg into slots, each of which the kernel may fill with many datagrams
//! of one source (UDP_GRO), and sendmmsg of runs, each of which the kernel or the network card cuts (UDP_SEGMENT).
//!
//! Falls back in steps. A kernel without UDP_SEGMENT, and a device that answers EIO because it cannot complete checksums,
//! gets single datagrams from then on. EINVAL says that this run is too large for its path, and concerns this run alone:
//! single datagrams are sent in fragments.

#![allow(unsafe_code)]

use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mesh_proto::device::SocketId;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use socket2::{SockAddr, SockAddrStorage, Socket};

use super::ecn::Ecn;
use super::io::{Arrival, MAX_BATCH, Ready, Received, RunOf};

/// A socket that sends and receives whole batches.
#[derive(Debug)]
pub(crate) struct BatchSocket {
    socket: Socket,
    is_v4: bool,
    segmentation: AtomicBool,
    has_gro: bool,
}

/// One message of a send: a whole run or one datagram.
#[derive(Clone, Copy)]
struct Message<'a> {
    run: RunOf<'a>,
    to: SocketAddr,
    is_whole_run: bool,
}

/// Room for the control messages of one header: a segment size and a traffic class.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 64]);

impl BatchSocket {
    /// Asks the kernel for what it has; what it has not is done without.
    pub(super) fn new(socket: Socket, is_v4: bool) -> Self {
        let has_gro = setsockopt(&socket, sockopt::UdpGroSegment, &true).is_ok();
        let segmentation = getsockopt(&socket, sockopt::UdpGsoSegment).is_ok();
        // Without it the underlay's marks of congestion are not seen, as in any tunnel that cannot ask.
        let _without = if is_v4 { socket.set_recv_tos_v4(true) } else { socket.set_recv_tclass_v6(true) };
        Self { socket, is_v4, segmentation: AtomicBool::new(segmentation), has_gro }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(super) fn cuts(&self) -> bool {
        self.segmentation.load(Ordering::Relaxed)
    }

    /// As if the device had refused.
    #[cfg(test)]
    pub(super) fn stop_cutting(&self) {
        self.segmentation.store(false, Ordering::Relaxed);
    }

    pub(super) fn joins(&self) -> bool {
        self.has_gro
    }

    /// Receives what is there into the free slots, `most` of them at most, by one system call.
    pub(super) fn receive(&self, id: Option<SocketId>, most: usize, batch: &mut Received) -> Result<Ready, Errno> {
        let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; MAX_BATCH];
        let mut blocks = [const { MaybeUninit::<libc::iovec>::uninit() }; MAX_BATCH];
        let mut names = [const { MaybeUninit::<SockAddrStorage>::uninit() }; MAX_BATCH];
        let mut controls = [const { MaybeUninit::<Control>::uninit() }; MAX_BATCH];
        let mut count = 0;
        let places = headers.iter_mut().zip(&mut blocks).zip(&mut names).zip(&mut controls);
        for (slot, (((header, block), name), control)) in batch.free_slots().take(most).zip(places) {
            let block = block.write(libc::iovec { iov_base: slot.as_mut_ptr().cast(), iov_len: slot.len() });
            let name = name.write(SockAddrStorage::zeroed());
            // SAFETY: an mmsghdr is integers and pointers; all zero means "no name, no data, no control".
            let header = header.write(unsafe { mem::zeroed() });
            header.msg_hdr.msg_iov = block;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = name.size_of();
            header.msg_hdr.msg_control = control.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = size_of::<Control>() as _;
            count += 1;
        }
        if count == 0 {
            return Ok(Ready::More);
        }
        let first = headers.as_mut_ptr().cast::<libc::mmsghdr>();
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: the first `count` headers were written above; they point to distinct slots, blocks, names and control rooms
        // that outlive the call, with their lengths.
        let got = unsafe { libc::recvmmsg(self.socket.as_raw_fd(), first, count as _, flags as _, ptr::null_mut()) };
        let got = match Errno::result(got) {
            Ok(got) => usize::try_from(got).unwrap_or(0).min(count),
            Err(Errno::EAGAIN) => return Ok(Ready::Drained),
            Err(Errno::EINTR) => return Ok(Ready::More),
            Err(errno) => return Err(errno),
        };
        for (header, name) in headers.iter().zip(names).take(got) {
            // SAFETY: the first `got` of the `count` headers and names were written above.
            let (header, name) = unsafe { (header.assume_init_ref(), name.assume_init()) };
            // SAFETY: the kernel wrote an address of `msg_namelen` bytes into this storage.
            let source = unsafe { SockAddr::new(name, header.msg_hdr.msg_namelen) };
            // A socket of an internet family has internet peers; anything else would be the kernel's bug and is an empty slot.
            let source = source.as_socket().unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)));
            let (segment, ecn) = read_control(&header.msg_hdr);
            batch.push(header.msg_len as usize, segment, Arrival { socket: id, source, ecn });
        }
        Ok(if got < count { Ready::Drained } else { Ready::More })
    }

    /// Sends all runs and says how many datagrams did not leave. Waits up to `patience` for a full send buffer.
    pub(super) fn send<'a>(&self, runs: impl Iterator<Item = (RunOf<'a>, SocketAddr)>, patience: Duration) -> usize {
        let mut lost = 0;
        let cuts = self.cuts();
        let mut messages = runs.flat_map(|(run, to)| Message::all(run, to, cuts)).peekable();
        while messages.peek().is_some() {
            lost += self.send_some(&mut messages, patience);
        }
        lost
    }

    /// Sends the next messages, at most a batch, and says how many datagrams did not leave.
    fn send_some<'a>(&self, messages: &mut impl Iterator<Item = Message<'a>>, patience: Duration) -> usize {
        let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; MAX_BATCH];
        let mut blocks = [const { MaybeUninit::<libc::iovec>::uninit() }; MAX_BATCH];
        let mut names = [const { MaybeUninit::<SockAddr>::uninit() }; MAX_BATCH];
        let mut controls = [const { MaybeUninit::<Control>::uninit() }; MAX_BATCH];
        let mut taken = [const { None }; MAX_BATCH];
        let mut count = 0;
        let places = headers.iter_mut().zip(&mut blocks).zip(&mut names).zip(&mut controls).zip(&mut taken);
        for (((((header, block), name), control), taken), message) in places.zip(messages) {
            // `SockAddr` is plain bytes: it needs no drop.
            let name = name.write(message.to.into());
            let bytes = message.run.bytes;
            let block = block.write(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
            // SAFETY: an mmsghdr is integers and pointers; all zero means "no name, no data, no control".
            let header = header.write(unsafe { mem::zeroed() });
            header.msg_hdr.msg_iov = block;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = name.as_ptr().cast_mut().cast();
            header.msg_hdr.msg_namelen = name.len();
            write_control(&mut header.msg_hdr, control.write(Control([0; 64])), &message, self.is_v4);
            *taken = Some(message);
            count += 1;
        }
        let first = headers.as_mut_ptr().cast::<libc::mmsghdr>();
        let (mut next, mut lost) = (0, 0);
        while next < count {
            let flags = libc::MSG_DONTWAIT;
            // SAFETY: the first `count` headers were written above; each points to bytes, a block, a name and a control room
            // that outlive the call; sendmmsg only reads what they point to and writes `msg_len`.
            let sent =
                unsafe { libc::sendmmsg(self.socket.as_raw_fd(), first.add(next), (count - next) as _, flags as _) };
            let Some(message) = &taken[next] else { break };
            match Errno::result(sent) {
                Ok(sent) => next += usize::try_from(sent).unwrap_or(0).max(1),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if !self.has_room(patience) {
                        return lost + taken[next..count].iter().flatten().map(Message::datagrams).sum::<usize>();
                    }
                }
                Err(errno @ (Errno::EIO | Errno::EINVAL)) if message.is_whole_run => {
                    if errno == Errno::EIO && self.segmentation.swap(false, Ordering::Relaxed) {
                        tracing::info!("the underlay cannot cut datagrams: they are sent one by one");
                    }
                    lost += self.send_some(&mut Message::all(message.run, message.to, false), patience);
                    next += 1;
                }
                // It concerns the first only: no route, too long, refused by a filter.
                Err(_) => {
                    lost += message.datagrams();
                    next += 1;
                }
            }
        }
        lost
    }

    fn has_room(&self, patience: Duration) -> bool {
        let limit = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        !patience.is_zero() && matches!(poll(&mut polled, limit), Ok(1..))
    }
}

impl AsFd for BatchSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<'a> Message<'a> {
    /// The run as one message, or each of its datagrams.
    fn all(run: RunOf<'a>, to: SocketAddr, whole: bool) -> impl Iterator<Item = Self> {
        let is_whole_run = whole && run.count > 1;
        let piece = if is_whole_run { run.bytes.len() } else { run.segment };
        let pieces = run.bytes.chunks(piece.max(1));
        pieces.map(move |bytes| Self { run: RunOf { bytes, ..run }, to, is_whole_run })
    }

    fn datagrams(&self) -> usize {
        if self.is_whole_run { self.run.count } else { 1 }
    }
}

/// Says how to cut the message and what it says of congestion, if there is anything to say.
fn write_control(header: &mut libc::msghdr, control: &mut Control, message: &Message<'_>, is_v4: bool) {
    let class = (message.run.ecn != Ecn::NotCapable).then(|| libc::c_int::from(message.run.ecn.bits()));
    let segment = message.is_whole_run.then_some(message.run.segment as u16);
    if class.is_none() && segment.is_none() {
        return;
    }
    header.msg_control = ptr::from_mut(control).cast();
    header.msg_controllen = size_of::<Control>() as _;
    let mut used = 0;
    // SAFETY: `header` has the whole of `control`, which is aligned for a cmsghdr, zeroed and has room for two messages of
    // at most four bytes; CMSG_FIRSTHDR and CMSG_NXTHDR stay within it, and the lengths written are those of the data.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(header);
        if let Some(segment) = segment {
            (*at).cmsg_level = libc::SOL_UDP;
            (*at).cmsg_type = libc::UDP_SEGMENT;
            (*at).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as _) as _;
            libc::CMSG_DATA(at).cast::<u16>().write_unaligned(segment);
            used += libc::CMSG_SPACE(size_of::<u16>() as _);
            at = libc::CMSG_NXTHDR(header, at);
        }
        if let Some(class) = class {
            (*at).cmsg_level = if is_v4 { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 };
            (*at).cmsg_type = if is_v4 { libc::IP_TOS } else { libc::IPV6_TCLASS };
            (*at).cmsg_len = libc::CMSG_LEN(size_of::<libc::c_int>() as _) as _;
            libc::CMSG_DATA(at).cast::<libc::c_int>().write_unaligned(class);
            used += libc::CMSG_SPACE(size_of::<libc::c_int>() as _);
        }
    }
    header.msg_controllen = used as _;
}

/// The length of the datagrams in a slot (0 = there is one only), and what the underlay says of congestion.
fn read_control(header: &libc::msghdr) -> (usize, Ecn) {
    let (mut segment, mut ecn) = (0, Ecn::NotCapable);
    // SAFETY: the kernel wrote `msg_controllen` bytes of control messages into this header's own room; each is read only as
    // far as its length says.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(header);
        while !at.is_null() {
            let data = libc::CMSG_DATA(at);
            let len = ((*at).cmsg_len as usize).saturating_sub(libc::CMSG_LEN(0) as usize);
            match ((*at).cmsg_level, (*at).cmsg_type) {
                (libc::SOL_UDP, libc::UDP_GRO) if len >= size_of::<libc::c_int>() => {
                    segment = usize::try_from(data.cast::<libc::c_int>().read_unaligned()).unwrap_or(0);
                }
                (libc::IPPROTO_IP, libc::IP_TOS) if len >= 1 => ecn = Ecn::of_class(data.read()),
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) if len >= size_of::<libc::c_int>() => {
                    ecn = Ecn::of_class((data.cast::<libc::c_int>().read_unaligned() & 0xff) as u8);
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(header, at);
        }
    }
    (segment, ecn)
}
