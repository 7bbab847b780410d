//! The UDP socket pair: IPv4 and IPv6 on one port, marked so that they take the underlay and never the mesh. Where several
//! threads receive, several pairs on one port: what comes from one address always comes to one of them.
//!
//! A host without one of the families runs with the other.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mesh_proto::device::{Endpoint, Family, SocketId};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use super::connected::Connected;
use super::extra::ExtraSockets;
use super::io::{DatagramSocket, Descriptors, MAX_BATCH, Outgoing, Readable, Ready, Received};
use super::mmsg::BatchSocket;
use super::offloads::SocketOffloads;

/// Asked of the kernel for each direction: some milliseconds at 10 Gbit/s.
const BUFFER_BYTES: usize = 7 << 20;
/// Ports tried when any will do and the other family has it taken.
const ANY_PORT_ATTEMPTS: usize = 16;

/// A socket pair that could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("another agent or WireGuard is on UDP port {port}: stop it or set mesh.listenPort")]
    PortInUse { port: u16 },
    #[error(
        "no permission to use UDP port {port}: set mesh.listenPort to 1024 or above, or give the agent CAP_NET_BIND_SERVICE"
    )]
    NotPermitted { port: u16 },
    #[error("no UDP socket on port {port}: this host has neither IPv4 nor IPv6")]
    NoFamily { port: u16 },
    #[error("no UDP socket on port {port}")]
    Failed {
        port: u16,
        #[source]
        source: io::Error,
    },
}

/// One IPv4 and one IPv6 socket on the same port.
#[derive(Debug)]
pub struct UdpSockets {
    v4: Option<BatchSocket>,
    v6: Option<BatchSocket>,
    port: u16,
    extra: ExtraSockets,
    connected: Connected,
    /// Which family is received from first; changes each time, so that a flood on one does not silence the other.
    v6_first: AtomicBool,
}

impl UdpSockets {
    /// Opens both sockets on `port`, 0 = any, with firewall mark `mark`. A mark that is refused is a warning: without it
    /// a mesh prefix that covers a peer's endpoint would loop.
    pub fn bind(port: u16, mark: u32) -> Result<Self, BindError> {
        let attempts = if port == 0 { ANY_PORT_ATTEMPTS } else { 1 };
        let mut last = None;
        for _ in 0..attempts {
            match Self::try_bind(port, mark, Sharing::None) {
                Ok(pair) => {
                    pair.mark(mark);
                    return Ok(pair);
                }
                Err(error @ BindError::PortInUse { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or(BindError::PortInUse { port }))
    }

    /// Opens so many pairs on one port, one at least. The first is refused where anybody has the port, and only then lets
    /// the others in: no other agent becomes one of them.
    pub fn bind_lanes(port: u16, mark: u32, lanes: usize) -> Result<Vec<Self>, BindError> {
        let first = Self::bind(port, mark)?;
        let port = first.port;
        let mut all = vec![first];
        for lane in 1..lanes {
            if lane == 1 {
                all[0].share().map_err(|source| BindError::Failed { port, source })?;
            }
            let pair = Self::try_bind(port, mark, Sharing::WithOwn)?;
            pair.mark(mark);
            all.push(pair);
        }
        Ok(all)
    }

    /// The port of both sockets.
    pub fn port(&self) -> u16 {
        self.port
    }

    fn share(&self) -> io::Result<()> {
        [&self.v4, &self.v6].into_iter().flatten().try_for_each(|socket| socket.socket().set_reuse_port(true))
    }

    fn try_bind(port: u16, mark: u32, sharing: Sharing) -> Result<Self, BindError> {
        let v4 = open((Ipv4Addr::UNSPECIFIED, port).into(), sharing)?;
        let taken = match &v4 {
            Some(socket) => local_port(socket, port)?,
            None => port,
        };
        let v6 = open((Ipv6Addr::UNSPECIFIED, taken).into(), sharing)?;
        let port = match &v6 {
            Some(socket) => local_port(socket, taken)?,
            None => taken,
        };
        if v4.is_none() && v6.is_none() {
            return Err(BindError::NoFamily { port });
        }
        let failed = |source| BindError::Failed { port, source };
        let (extra, connected) =
            (ExtraSockets::new(mark).map_err(failed)?, Connected::new(port, mark).map_err(failed)?);
        let (v4, v6) = (v4.map(|v4| BatchSocket::new(v4, true)), v6.map(|v6| BatchSocket::new(v6, false)));
        Ok(Self { v4, v6, port, extra, connected, v6_first: AtomicBool::new(false) })
    }

    fn mark(&self, mark: u32) {
        for socket in [&self.v4, &self.v6].into_iter().flatten() {
            if let Err(error) = setsockopt(socket.socket(), sockopt::Mark, &mark) {
                tracing::warn!(
                    %error,
                    "UDP sockets carry no firewall mark: give the agent CAP_NET_ADMIN, or a mesh prefix that covers a peer's endpoint cuts that peer off"
                );
                return;
            }
        }
    }
}

impl DatagramSocket for UdpSockets {
    fn descriptors(&self) -> Descriptors<'_> {
        let [v4, v6] = [&self.v4, &self.v6].map(|socket| socket.as_ref().map(AsFd::as_fd));
        [v4, v6, Some(self.extra.descriptor()), Some(self.connected.descriptor())]
    }

    fn receive(&self, [v4, v6, extra, connected]: Readable, batch: &mut Received) -> io::Result<Ready> {
        batch.clear();
        let mut order = [self.v4.as_ref().filter(|_| v4), self.v6.as_ref().filter(|_| v6)];
        if self.v6_first.fetch_xor(true, Ordering::Relaxed) {
            order.reverse();
        }
        let mut ready = Ready::Drained;
        for (id, socket) in extra.then(|| self.extra.ready()).into_iter().flatten() {
            // One of many: what is wrong with it shows as silence.
            let _failed = socket.receive(Some(id), MAX_BATCH / 2, batch);
            ready = Ready::More;
        }
        if connected && self.connected.receive(batch) == Ready::More {
            ready = Ready::More;
        }
        for socket in order.into_iter().flatten() {
            let first = batch.len();
            match socket.receive(None, MAX_BATCH, batch) {
                Ok(Ready::Drained) => {}
                Ok(Ready::More) => ready = Ready::More,
                // Told by the next receive again.
                Err(_) if !batch.is_empty() => ready = Ready::More,
                Err(errno) => return Err(errno.into()),
            }
            self.connected.note(socket, batch, first);
        }
        Ok(ready)
    }

    fn send(&self, batch: &Outgoing, patience: Duration) -> usize {
        let mut lost = 0;
        let families = [(&self.v4, true), (&self.v6, false)];
        for (socket, is_v4) in families {
            let own = batch.runs().filter_map(|run| match run.to {
                Endpoint::Direct(to) if to.is_ipv4() == is_v4 => Some((run, to)),
                _ => None,
            });
            lost += match socket {
                Some(socket) => socket.send(own, patience),
                None => own.map(|(run, _)| run.count).sum(),
            };
        }
        let used: BTreeSet<SocketId> = batch.runs().filter_map(|run| run.to.socket()).collect();
        for id in used {
            let own = batch.runs().filter(|run| run.to.socket() == Some(id));
            let own = own.filter_map(|run| Some((run, run.to.direct()?)));
            lost += match self.extra.load().get(&id) {
                Some(socket) => socket.send(own, patience),
                None => own.map(|(run, _)| run.count).sum(),
            };
        }
        lost
    }

    fn send_one(&self, to: Endpoint, datagram: &[u8], ttl: Option<u8>) -> bool {
        let leaves = |socket: &BatchSocket, to| send_now(socket.socket(), to, datagram, ttl).is_ok();
        match to {
            Endpoint::Direct(to) => {
                let socket = if to.is_ipv4() { &self.v4 } else { &self.v6 };
                socket.as_ref().is_some_and(|socket| leaves(socket, to))
            }
            Endpoint::Extra(id, to) => self.extra.load().get(&id).is_some_and(|socket| leaves(socket, to)),
            Endpoint::Relay(_) => false,
        }
    }

    fn open_extra(&self, family: Family, count: u16) -> Vec<SocketId> {
        self.extra.open(family, count)
    }

    fn close_extra(&self, closed: &[SocketId]) {
        self.extra.close(closed);
    }

    fn offloads(&self) -> SocketOffloads {
        let pair = || [&self.v4, &self.v6].into_iter().flatten();
        SocketOffloads { segmentation: pair().any(BatchSocket::cuts), receive: pair().any(BatchSocket::joins) }
    }
}

/// Sends one datagram at once or not at all.
fn send_now(socket: &Socket, to: SocketAddr, datagram: &[u8], ttl: Option<u8>) -> nix::Result<usize> {
    let hops = ttl.map(libc::c_int::from);
    let limit = hops.as_ref().map(|hops| match to {
        SocketAddr::V4(_) => ControlMessage::Ipv4Ttl(hops),
        SocketAddr::V6(_) => ControlMessage::Ipv6HopLimit(hops),
    });
    let blocks = [IoSlice::new(datagram)];
    sendmsg(socket.as_raw_fd(), &blocks, limit.as_slice(), MsgFlags::MSG_DONTWAIT, Some(&SockaddrStorage::from(to)))
}

/// Whether a port may be another socket's as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    None,
    /// Sockets of this user that are willing.
    WithOwn,
}

/// `None` when the host does not have the family.
pub(super) fn open(address: SocketAddr, sharing: Sharing) -> Result<Option<Socket>, BindError> {
    let port = address.port();
    let failed = |source| BindError::Failed { port, source };
    let socket = match Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP)) {
        Ok(socket) => socket,
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if address.is_ipv6() {
        socket.set_only_v6(true).map_err(failed)?;
    }
    if sharing == Sharing::WithOwn {
        socket.set_reuse_port(true).map_err(failed)?;
    }
    match socket.bind(&address.into()) {
        Ok(()) => {}
        // IPv6 is compiled in and switched off.
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => return Ok(None),
        Err(error) if error.kind() == ErrorKind::AddrInUse => return Err(BindError::PortInUse { port }),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Err(BindError::NotPermitted { port }),
        Err(error) => return Err(failed(error)),
    }
    // Without CAP_NET_ADMIN the kernel's limit applies, which is fine for slower links.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        socket.set_recv_buffer_size(BUFFER_BYTES).map_err(failed)?;
    }
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER_BYTES).is_err() {
        socket.set_send_buffer_size(BUFFER_BYTES).map_err(failed)?;
    }
    Ok(Some(socket))
}

fn local_port(socket: &Socket, asked: u16) -> Result<u16, BindError> {
    let address = socket.local_addr().map_err(|source| BindError::Failed { port: asked, source })?;
    Ok(address.as_socket().map_or(asked, |address| address.port()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::IoSliceMut;
    use std::time::Instant;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::socket::{ControlMessageOwned, recvmsg};

    use super::*;
    use crate::dataplane::ecn::Ecn;
    use crate::dataplane::io::ANY_READABLE;

    fn receive(sockets: &UdpSockets, expected: usize) -> Vec<(Vec<u8>, SocketAddr)> {
        let deadline = Instant::now() + Duration::from_secs(5);
        let (mut batch, mut all) = (Received::default(), Vec::new());
        while all.len() < expected {
            assert!(Instant::now() < deadline, "{} of {expected} datagrams came", all.len());
            sockets.receive(ANY_READABLE, &mut batch).unwrap();
            all.extend(batch.iter().map(|(bytes, arrival, _)| (bytes.to_vec(), arrival.source)));
            let fds: Vec<_> = sockets.descriptors().into_iter().flatten().collect();
            let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
            poll(&mut polled, PollTimeout::from(if all.len() < expected { 100u8 } else { 0 })).unwrap();
        }
        all
    }

    #[test]
    fn batches_of_both_families_arrive_whole_and_in_order() {
        let (a, b) = (UdpSockets::bind(0, 0).unwrap(), UdpSockets::bind(0, 0).unwrap());
        let v6 = if b.v6.is_some() { "[::1]" } else { "127.0.0.1" };
        let targets: [SocketAddr; 2] = ["127.0.0.1", v6].map(|host| format!("{host}:{}", b.port()).parse().unwrap());
        let mut batch = Outgoing::new(1 << 20);
        let count = MAX_BATCH + 20;
        for n in 0..count {
            let len = 1 + n * 17;
            batch.spare(len).unwrap().fill(n as u8);
            batch.push(len, Endpoint::from(targets[n % 2]));
        }
        assert_eq!(a.send(&batch, Duration::from_secs(1)), 0);
        let got = receive(&b, count);
        for family in [true, false] {
            let lens = |all: &mut dyn Iterator<Item = (&[u8], SocketAddr)>| -> Vec<usize> {
                all.filter(|(_, address)| address.is_ipv4() == family).map(|(bytes, _)| bytes.len()).collect()
            };
            let received = lens(&mut got.iter().map(|(bytes, source)| (&**bytes, *source)));
            assert_eq!(
                received,
                lens(&mut batch.iter().filter_map(|(bytes, to)| Some((bytes, to.direct()?)))),
                "IPv4: {family}"
            );
        }
        assert!(got.iter().all(|(bytes, source)| bytes.iter().all(|b| *b == bytes[0]) && source.port() == a.port()));
    }

    /// Runs of equal datagrams, a shorter one at the end of each, with a mark of congestion or without.
    #[test]
    fn runs_leave_and_arrive_whole_with_and_without_segmentation() {
        let (a, b) = (UdpSockets::bind(0, 0).unwrap(), UdpSockets::bind(0, 0).unwrap());
        let hosts: Vec<SocketAddr> = [("127.0.0.1", true), ("[::1]", b.v6.is_some())]
            .into_iter()
            .filter(|(_, is_there)| *is_there)
            .map(|(host, _)| format!("{host}:{}", b.port()).parse().unwrap())
            .collect();
        for cuts in [true, false] {
            if !cuts {
                a.v4.iter().chain(&a.v6).for_each(BatchSocket::stop_cutting);
                assert!(!a.offloads().segmentation);
            }
            for (to, ecn) in hosts.iter().flat_map(|to| [(*to, Ecn::NotCapable), (*to, Ecn::Capable0)]) {
                let mut batch = Outgoing::new(1 << 20);
                let lens = [vec![1200; 70], vec![33], vec![500; 9], vec![1], vec![1400; 3]].concat();
                for (n, len) in lens.iter().enumerate() {
                    batch.spare(*len).unwrap().fill(n as u8);
                    batch.push_each(*len, [&Endpoint::from(to)], ecn);
                }
                assert!(batch.runs().count() < 10, "{} runs", batch.runs().count());
                assert_eq!(a.send(&batch, Duration::from_secs(1)), 0);
                let (mut received, mut got) = (Received::default(), Vec::new());
                let deadline = Instant::now() + Duration::from_secs(5);
                while got.len() < lens.len() {
                    assert!(Instant::now() < deadline, "{} of {} came to {to}", got.len(), lens.len());
                    b.receive(ANY_READABLE, &mut received).unwrap();
                    assert!(received.iter().all(|(_, arrival, _)| arrival.ecn == ecn), "{to} {ecn:?}");
                    got.extend(received.iter().map(|(bytes, ..)| (bytes.len(), bytes[0])));
                }
                let sent: Vec<_> = lens.iter().enumerate().map(|(n, len)| (*len, n as u8)).collect();
                assert_eq!(got, sent, "{to} {ecn:?} {cuts}");
            }
        }
    }

    /// The loopback's MTU is larger than any datagram; a run of datagrams that are larger than the route's is refused whole.
    #[test]
    fn datagrams_that_do_not_fit_the_path_leave_in_fragments() {
        let (a, b) = (UdpSockets::bind(0, 0).unwrap(), UdpSockets::bind(0, 0).unwrap());
        let mut batch = Outgoing::new(1 << 20);
        for n in 0..3 {
            let datagram = batch.spare(20_000).unwrap();
            datagram.fill(n);
            batch.push(20_000, Endpoint::from(SocketAddr::from(([127, 0, 0, 1], b.port()))));
        }
        assert_eq!(batch.runs().count(), 1);
        assert_eq!(a.send(&batch, Duration::from_secs(1)), 0);
        assert_eq!(receive(&b, 3).iter().map(|(bytes, _)| bytes.len()).collect::<Vec<_>>(), [20_000; 3]);
        assert!(a.offloads().segmentation, "one path says nothing of the others");
    }

    #[test]
    fn a_datagram_the_kernel_refuses_does_not_stop_the_others() {
        let (a, b) = (UdpSockets::bind(0, 0).unwrap(), UdpSockets::bind(0, 0).unwrap());
        let target: SocketAddr = ([127, 0, 0, 1], b.port()).into();
        let mut batch = Outgoing::new(1 << 18);
        for len in [10, 65_535, 20] {
            batch.spare(len).unwrap().fill(1);
            batch.push(len, Endpoint::from(target));
        }
        assert_eq!(a.send(&batch, Duration::from_secs(1)), 1, "65535 bytes are no datagram");
        let lens: Vec<_> = receive(&b, 2).iter().map(|(bytes, _)| bytes.len()).collect();
        assert_eq!(lens, [10, 20]);
    }

    /// What `a` sends to `host` arrives with so many hops left to go.
    fn hops_left(a: &UdpSockets, b: &UdpSockets, host: &str, ttl: Option<u8>) -> Option<i32> {
        assert!(a.send_one(Endpoint::Direct(format!("{host}:{}", b.port()).parse().unwrap()), b"probe", ttl));
        let socket = if host.starts_with('[') { &b.v6 } else { &b.v4 };
        let socket = socket.as_ref().unwrap().socket();
        poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5000u16)).unwrap();
        let (mut bytes, mut control) = ([0; 64], nix::cmsg_space!([libc::c_int; 8]));
        let mut blocks = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut blocks, Some(&mut control), flags).unwrap();
        assert_eq!(message.iovs().next(), Some(&b"probe"[..]));
        message.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::Ipv4Ttl(hops) | ControlMessageOwned::Ipv6HopLimit(hops) => Some(hops),
            _ => None,
        })
    }

    #[test]
    fn a_datagram_may_be_limited_to_a_few_hops_and_the_next_is_not() {
        let (a, b) = (UdpSockets::bind(0, 0).unwrap(), UdpSockets::bind(0, 0).unwrap());
        let mut hosts = vec!["127.0.0.1"];
        setsockopt(b.v4.as_ref().unwrap().socket(), sockopt::Ipv4RecvTtl, &true).unwrap();
        if let Some(v6) = &b.v6 {
            setsockopt(v6.socket(), sockopt::Ipv6RecvHopLimit, &true).unwrap();
            hosts.push("[::1]");
        }
        for host in hosts {
            let usual = hops_left(&a, &b, host, None).unwrap();
            assert!(usual > 2, "{host}: {usual}");
            assert_eq!(hops_left(&a, &b, host, Some(2)), Some(2), "{host}");
            assert_eq!(hops_left(&a, &b, host, None), Some(usual), "{host}");
            assert!(
                !a.send_one(Endpoint::Direct(format!("{host}:9").parse().unwrap()), &[0; 66_000], None),
                "no datagram is that long"
            );
        }
    }

    #[test]
    fn sockets_beside_the_pair_send_receive_and_close() {
        let (a, b) = (UdpSockets::bind(0, 0).unwrap(), UdpSockets::bind(0, 0).unwrap());
        let opened = a.open_extra(Family::V4, 40);
        assert_eq!(opened.len(), 40);
        let target: SocketAddr = ([127, 0, 0, 1], b.port()).into();
        let mut batch = Outgoing::new(1 << 16);
        for id in &opened {
            batch.spare(3).unwrap().fill(7);
            batch.push(3, Endpoint::Extra(*id, target));
        }
        assert_eq!(a.send(&batch, Duration::from_secs(1)), 0);
        let ports: BTreeSet<u16> = receive(&b, 40).iter().map(|(_, source)| source.port()).collect();
        assert!(ports.len() == 40 && !ports.contains(&a.port()), "each has a port of its own: {ports:?}");

        // Answers come by the descriptor of all of them, each with the socket it came to.
        for port in &ports {
            assert!(b.send_one(Endpoint::Direct(([127, 0, 0, 1], *port).into()), b"answer", None));
        }
        let (mut received, mut sockets) = (Received::default(), BTreeSet::new());
        let deadline = Instant::now() + Duration::from_secs(5);
        while sockets.len() < 40 {
            assert!(Instant::now() < deadline, "{} answers", sockets.len());
            let all = a.descriptors()[2].unwrap();
            poll(&mut [PollFd::new(all, PollFlags::POLLIN)], PollTimeout::from(1000u16)).unwrap();
            a.receive(ANY_READABLE, &mut received).unwrap();
            sockets.extend(received.iter().filter_map(|(_, arrival, _)| arrival.socket));
        }
        assert_eq!(sockets, opened.iter().copied().collect());

        a.close_extra(&opened[1..]);
        assert!(a.send_one(Endpoint::Extra(opened[0], target), b"kept", None));
        assert!(!a.send_one(Endpoint::Extra(opened[1], target), b"closed", None));
        assert_eq!(a.send(&batch, Duration::from_secs(1)), 39, "what a closed socket should send is lost and counted");
        let again = a.open_extra(Family::V4, 1);
        assert!(!opened.contains(&again[0]), "a number is not given again soon");
    }

    #[test]
    fn lanes_share_a_port_with_nobody_and_each_sender_has_its_own() {
        let lanes = UdpSockets::bind_lanes(0, 0, 3).unwrap();
        let port = lanes[0].port();
        assert!(lanes.iter().all(|lane| lane.port() == port));
        for others in [1, 3] {
            let error = UdpSockets::bind_lanes(port, 0, others).unwrap_err();
            assert!(matches!(error, BindError::PortInUse { .. }), "{error}");
        }
        let target: SocketAddr = ([127, 0, 0, 1], port).into();
        let senders: Vec<UdpSockets> = (0..40).map(|_| UdpSockets::bind(0, 0).unwrap()).collect();
        for round in 0..3u8 {
            for sender in &senders {
                assert!(sender.send_one(Endpoint::Direct(target), &[round], None));
            }
        }
        // What was sent on loopback has arrived.
        let mut seen: BTreeMap<SocketAddr, Vec<(usize, u8)>> = BTreeMap::new();
        for (number, lane) in lanes.iter().enumerate() {
            let mut received = Received::default();
            while lane.receive(ANY_READABLE, &mut received).unwrap() == Ready::More || !received.is_empty() {
                for (bytes, arrival, _) in received.iter() {
                    seen.entry(arrival.source).or_default().push((number, bytes[0]));
                }
            }
        }
        assert_eq!(seen.len(), senders.len());
        for (source, arrived) in &seen {
            let lane = arrived[0].0;
            assert_eq!(*arrived, [(lane, 0), (lane, 1), (lane, 2)], "all of {source} by one lane, in order");
        }
        let used: BTreeSet<usize> = seen.values().map(|arrived| arrived[0].0).collect();
        assert!(used.len() > 1, "40 senders by one lane of three: once in 3^39");
    }

    /// Sends unjoined datagrams, of which `b` receives each once, in order, from the port of `a`.
    fn send_alone(a: &UdpSockets, b: &UdpSockets, to: SocketAddr, count: usize) {
        a.v4.iter().chain(&a.v6).for_each(BatchSocket::stop_cutting);
        let mut batch = Outgoing::new(1 << 16);
        for n in 0..count {
            batch.spare(100).unwrap().fill(n as u8);
            batch.push(100, Endpoint::from(to));
        }
        assert_eq!(a.send(&batch, Duration::from_secs(1)), 0);
        let got: Vec<_> = receive(b, count).iter().map(|(bytes, source)| (bytes[0], source.port())).collect();
        let sent: Vec<_> = (0..count).map(|n| (n as u8, a.port())).collect();
        assert_eq!(got, sent, "to {to}");
    }

    #[test]
    fn a_busy_sender_gets_a_socket_of_its_own_and_the_pair_keeps_the_others() {
        for (host, is_v4) in [("127.0.0.1", true), ("[::1]", false)] {
            let (a, b) = (UdpSockets::bind(0, 0).unwrap(), UdpSockets::bind(0, 0).unwrap());
            if !is_v4 && b.v6.is_none() {
                continue;
            }
            let to: SocketAddr = format!("{host}:{}", b.port()).parse().unwrap();
            send_alone(&a, &b, to, 8);
            assert_eq!(b.connected.peer(), None, "a few datagrams do not make it busy");
            let deadline = Instant::now() + Duration::from_secs(10);
            while b.connected.peer().is_none() {
                assert!(Instant::now() < deadline, "no socket for {host}");
                send_alone(&a, &b, to, 60);
            }
            assert_eq!(b.connected.peer().map(|peer| peer.port()), Some(a.port()));
            send_alone(&a, &b, to, 60);

            let other = UdpSockets::bind(0, 0).unwrap();
            send_alone(&other, &b, to, 60);
            assert!(b.send_one(Endpoint::Direct(format!("{host}:{}", a.port()).parse().unwrap()), b"back", None));
            assert_eq!(receive(&a, 1)[0].1.port(), b.port());
            let error = UdpSockets::bind(b.port(), 0).unwrap_err();
            assert!(matches!(error, BindError::PortInUse { .. }), "no other agent shares the port: {error}");
        }
    }

    #[test]
    fn a_port_in_use_is_named_with_the_fix() {
        let first = UdpSockets::bind(0, 0).unwrap();
        let error = UdpSockets::bind(first.port(), 0).unwrap_err().to_string();
        assert!(error.contains(&format!("UDP port {}", first.port())), "{error}");
        assert!(error.contains("mesh.listenPort"), "{error}");
    }
}
