//! Talking to the kernel's packet filter: listings and transactions over netlink.
//!
//! Owns sockets for the time of one exchange and nothing else; which tables are meant is the caller's.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::NfTablesMessage;
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// Length and kind of a netlink message.
const NETLINK_HEADER: usize = 16;
/// Kinds below are netlink's own: acknowledgements, failures, ends.
const NLMSG_MIN_TYPE: u16 = 0x10;

/// One message of the kernel's packet filter, and the flags to send it with.
pub(crate) type Step = (NfTablesMessage, u16);

/// An answer and the family of tables it is of.
pub(crate) type Answer = (NetfilterProtoFamily, NfTablesMessage);

/// All or nothing, in one datagram as the kernel wants it.
pub(crate) fn transact(family: NetfilterProtoFamily, steps: Vec<Step>) -> io::Result<()> {
    let last = steps.len();
    let mut datagram = Vec::new();
    append(&mut datagram, control(ControlMessage::BatchBegin), NLM_F_REQUEST, 0);
    for (index, (step, flags)) in (1..).zip(steps) {
        // One acknowledgement tells that all was taken; every failure is told anyway.
        let ack = if index == last { NLM_F_ACK } else { 0 };
        append(&mut datagram, tables(family, step), NLM_F_REQUEST | flags | ack, index);
    }
    append(&mut datagram, control(ControlMessage::BatchEnd), NLM_F_REQUEST, last + 1);
    let socket = open()?;
    socket.send(&datagram, 0)?;
    receive(&socket, |_| {})
}

/// Asks for one object.
pub(crate) fn get(family: NetfilterProtoFamily, message: NfTablesMessage) -> io::Result<Vec<Answer>> {
    request(family, message, NLM_F_REQUEST)
}

/// Asks for all objects that match; `Unspec` = of every family. What cannot be decoded is left out.
pub(crate) fn list(family: NetfilterProtoFamily, message: NfTablesMessage) -> io::Result<Vec<Answer>> {
    request(family, message, NLM_F_REQUEST | NLM_F_DUMP)
}

fn request(family: NetfilterProtoFamily, message: NfTablesMessage, flags: u16) -> io::Result<Vec<Answer>> {
    let mut datagram = Vec::new();
    append(&mut datagram, tables(family, message), flags | NLM_F_ACK, 1);
    let socket = open()?;
    socket.send(&datagram, 0)?;
    let mut answers = Vec::new();
    receive(&socket, |message| answers.push(message))?;
    Ok(answers)
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Reads up to the first acknowledgement, failure or end of a dump.
fn receive(socket: &Socket, mut each: impl FnMut(Answer)) -> io::Result<()> {
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Some(&[a, b, c, d, e, f]) = rest.first_chunk() {
            let length = aligned(u32::from_ne_bytes([a, b, c, d]) as usize).max(NETLINK_HEADER);
            let is_control = u16::from_ne_bytes([e, f]) < NLMSG_MIN_TYPE;
            match NetlinkMessage::<NetfilterMessage>::deserialize(rest).map(|message| message.payload) {
                Ok(NetlinkPayload::Error(error)) if error.code.is_some() => return Err(error.to_io()),
                Ok(NetlinkPayload::Error(_) | NetlinkPayload::Done(_)) => return Ok(()),
                Ok(NetlinkPayload::InnerMessage(NetfilterMessage {
                    header,
                    inner: NetfilterMessageInner::NfTables(answer),
                    ..
                })) => each((header.family, answer)),
                Ok(_) => {}
                // Without it nobody would know the end.
                Err(error) if is_control => return Err(io::Error::other(error)),
                Err(error) => tracing::debug!(%error, "a message of nftables that cannot be decoded"),
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn append(datagram: &mut Vec<u8>, message: NetfilterMessage, flags: u16, sequence: usize) {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.header.sequence_number = u32::try_from(sequence).unwrap_or(u32::MAX);
    message.finalize();
    let start = datagram.len();
    datagram.resize(start + aligned(message.buffer_len()), 0);
    message.serialize(&mut datagram[start..start + message.buffer_len()]);
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn tables(family: NetfilterProtoFamily, message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message)
}

fn control(message: ControlMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES), message)
}
