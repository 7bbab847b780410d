//! Doubles of TUN and UDP in memory: a host's end of a link, and a network that knows who has which address.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_proto::device::{Endpoint, Family, SocketId};
use mesh_proto::offload::VnetHeader;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::io::{Arrival, DatagramSocket, Descriptors, Outgoing, Packed, PacketDevice, Readable, Ready, Received};
use super::offloads::{DeviceOffloads, SocketOffloads};
use super::tun::{read_packets, write_packet};

/// A queue of the agent's end of a link.
#[derive(Debug)]
pub(crate) struct MemoryTun {
    file: File,
    offloads: DeviceOffloads,
    /// Polled in place of the file: nobody hears that there is something to read.
    silence: Option<EventFd>,
}

impl MemoryTun {
    pub(crate) fn silenced(self) -> Self {
        Self { silence: Some(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("an eventfd")), ..self }
    }
}

/// The host's end, a file a queue. Dropping it deletes the link.
#[derive(Debug)]
pub(crate) struct HostLink(Vec<File>);

/// A link of one queue whose host leaves nothing to the agent and takes nothing joined.
pub(crate) fn link() -> (Vec<MemoryTun>, HostLink) {
    link_with(DeviceOffloads::default(), 1)
}

pub(crate) fn link_with(offloads: DeviceOffloads, queues: usize) -> (Vec<MemoryTun>, HostLink) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let pair = || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a socket pair");
    let (agent, host) = (0..queues).map(|_| pair()).unzip::<_, _, Vec<_>, Vec<_>>();
    let agent = agent.into_iter().map(|file| MemoryTun { file: file.into(), offloads, silence: None });
    (agent.collect(), HostLink(host.into_iter().map(File::from).collect()))
}

impl HostLink {
    /// The host sends a packet into the link.
    pub(crate) fn send(&self, packet: &[u8]) {
        self.send_described(VnetHeader::default(), packet);
    }

    /// By the queue of its destination's last byte: a flow keeps its own.
    pub(crate) fn send_described(&self, header: VnetHeader, packet: &[u8]) {
        let queue = packet.get(19).map_or(0, |last| usize::from(*last) % self.0.len());
        (&self.0[queue]).write_all(&[&header.to_bytes(), packet].concat()).expect("the link has room");
    }

    /// The next packet that came out of the link, if any, by whichever queue.
    pub(crate) fn receive(&self) -> Option<Vec<u8>> {
        self.receive_described().map(|(_, packet)| packet)
    }

    pub(crate) fn receive_described(&self) -> Option<(VnetHeader, Vec<u8>)> {
        let mut bytes = vec![0; VnetHeader::LEN + 65_535];
        let len = self.0.iter().find_map(|mut queue| queue.read(&mut bytes).ok())?;
        bytes.truncate(len);
        let header = VnetHeader::parse(bytes.first_chunk()?);
        Some((header, bytes.split_off(VnetHeader::LEN)))
    }
}

impl AsFd for MemoryTun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.silence.as_ref().map_or_else(|| self.file.as_fd(), AsFd::as_fd)
    }
}

impl PacketDevice for MemoryTun {
    fn read(&self, batch: &mut Packed<VnetHeader>) -> io::Result<Ready> {
        read_packets(&self.file, batch)
    }

    fn write(&self, header: VnetHeader, parts: &[IoSlice<'_>]) -> bool {
        write_packet(&self.file, header, parts)
    }

    fn offloads(&self) -> DeviceOffloads {
        self.offloads
    }
}

/// A network. Datagrams to an address that nobody has are lost, as on the real one.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryNet(Arc<Mutex<BTreeMap<SocketAddr, Vec<Arc<Inbox>>>>>);

#[derive(Debug)]
struct Inbox {
    datagrams: Mutex<VecDeque<(Arrival, Vec<u8>)>>,
    arrived: EventFd,
}

/// A socket with one address.
#[derive(Debug)]
pub(crate) struct MemorySocket {
    net: MemoryNet,
    address: SocketAddr,
    inbox: Arc<Inbox>,
}

impl MemoryNet {
    pub(crate) fn socket(&self, address: SocketAddr) -> MemorySocket {
        self.sockets(address, 1).swap_remove(0)
    }

    /// Sockets that share an address: what comes from one host always comes to one of them.
    pub(crate) fn sockets(&self, address: SocketAddr, count: usize) -> Vec<MemorySocket> {
        let inbox = |_| {
            let arrived = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).expect("an eventfd");
            Arc::new(Inbox { datagrams: Mutex::default(), arrived })
        };
        let inboxes: Vec<Arc<Inbox>> = (0..count).map(inbox).collect();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(address, inboxes.clone());
        inboxes.into_iter().map(|inbox| MemorySocket { net: self.clone(), address, inbox }).collect()
    }

    /// Delivers a datagram as if it came from `source`.
    pub(crate) fn inject(&self, source: SocketAddr, to: SocketAddr, datagram: &[u8]) {
        self.inject_run(source, to, &[datagram]);
    }

    /// The same with a run: whoever finds the first finds all.
    fn inject_run(&self, source: SocketAddr, to: SocketAddr, run: &[&[u8]]) {
        let inboxes = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&to).cloned();
        if let Some(inboxes) = inboxes {
            inboxes[lane_of(source, inboxes.len())].push(source.into(), run);
        }
    }
}

fn lane_of(source: SocketAddr, lanes: usize) -> usize {
    let last = match source.ip() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    };
    usize::from(last) % lanes
}

impl Inbox {
    fn push(&self, source: Arrival, run: &[&[u8]]) {
        let run = run.iter().map(|datagram| (source, datagram.to_vec()));
        self.datagrams.lock().unwrap_or_else(PoisonError::into_inner).extend(run);
        self.arrived.write(1).expect("the count is small");
    }
}

impl MemorySocket {
    /// Puts a datagram into this socket's inbox, also when another socket has taken its address since.
    pub(crate) fn deliver(&self, source: SocketAddr, datagram: &[u8]) {
        self.deliver_marked(source.into(), datagram);
    }

    /// The same, with what the underlay says of congestion.
    pub(crate) fn deliver_marked(&self, arrival: Arrival, datagram: &[u8]) {
        self.inbox.push(arrival, &[datagram]);
    }

    /// The next datagram that arrived, if any.
    pub(crate) fn next(&self) -> Option<(SocketAddr, Vec<u8>)> {
        let taken = self.inbox.datagrams.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        taken.map(|(arrival, datagram)| (arrival.source, datagram))
    }
}

impl DatagramSocket for MemorySocket {
    fn descriptors(&self) -> Descriptors<'_> {
        [Some(self.inbox.arrived.as_fd()), None, None, None]
    }

    fn receive(&self, _readable: Readable, batch: &mut Received) -> io::Result<Ready> {
        batch.clear();
        // Before the datagrams are taken, so that what comes meanwhile wakes again.
        let _none_arrived = self.inbox.arrived.read();
        let mut datagrams = self.inbox.datagrams.lock().unwrap_or_else(PoisonError::into_inner);
        while batch.free_slots().next().is_some() {
            let Some((arrival, datagram)) = datagrams.pop_front() else { return Ok(Ready::Drained) };
            let slot = batch.free_slots().next().expect("the batch is not full");
            slot[..datagram.len()].copy_from_slice(&datagram);
            batch.push(datagram.len(), datagram.len(), arrival);
        }
        Ok(Ready::More)
    }

    fn send(&self, batch: &Outgoing, _patience: Duration) -> usize {
        let direct: Vec<_> = batch.iter().filter_map(|(datagram, to)| Some((datagram, to.direct()?))).collect();
        for run in direct.chunk_by(|(_, one), (_, next)| one == next) {
            let datagrams: Vec<&[u8]> = run.iter().map(|(datagram, _)| *datagram).collect();
            self.net.inject_run(self.address, run[0].1, &datagrams);
        }
        0
    }

    fn send_one(&self, to: Endpoint, datagram: &[u8], _ttl: Option<u8>) -> bool {
        to.direct().is_some_and(|to| {
            self.net.inject(self.address, to, datagram);
            true
        })
    }

    /// A host that has no room for them.
    fn open_extra(&self, _family: Family, _count: u16) -> Vec<SocketId> {
        Vec::new()
    }

    fn close_extra(&self, _closed: &[SocketId]) {}

    fn offloads(&self) -> SocketOffloads {
        SocketOffloads::default()
    }
}
