//! Messages of the kernel's packet filter: attributes, transactions, answers.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// Numbers of `linux/netlink.h` and `linux/netfilter/nfnetlink.h`.
pub(crate) const REQUEST: u16 = 1;
pub(crate) const ACK: u16 = 4;
pub(crate) const DUMP: u16 = 0x300;
pub(crate) const CREATE: u16 = 0x400;
pub(crate) const NF_TABLES: u16 = 10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NESTED: u16 = 0x8000;
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

/// Attributes of one message or of one nest, each padded to four bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Text with its end.
    pub(crate) fn text(self, kind: u16, text: &str) -> Self {
        self.bytes(kind, &[text.as_bytes(), &[0]].concat())
    }

    pub(crate) fn number(self, kind: u16, number: u32) -> Self {
        self.bytes(kind, &number.to_be_bytes())
    }

    pub(crate) fn long(self, kind: u16, number: u64) -> Self {
        self.bytes(kind, &number.to_be_bytes())
    }

    pub(crate) fn nest(self, kind: u16, inner: &Self) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// One message of a transaction.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) family: u8,
    pub(crate) attributes: Attributes,
}

/// All or nothing, in the calling thread's namespace; in one datagram, as the kernel wants it.
pub(crate) fn transact(steps: &[Step]) -> io::Result<()> {
    let mut batch = message(BATCH_BEGIN, REQUEST, 0, NF_TABLES, &Attributes::new());
    for (index, step) in steps.iter().enumerate() {
        // One acknowledgement tells that all was taken; every failure is told anyway.
        let ack = if index + 1 == steps.len() { ACK } else { 0 };
        batch.extend(message(step.kind, REQUEST | ack | step.flags, step.family, 0, &step.attributes));
    }
    batch.extend(message(BATCH_END, REQUEST, 0, NF_TABLES, &Attributes::new()));
    let socket = open()?;
    socket.send(&batch, 0)?;
    receive(&socket, |_, _, _| {})
}

pub(crate) fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

pub(crate) fn message(kind: u16, flags: u16, family: u8, resource: u16, attributes: &Attributes) -> Vec<u8> {
    let mut message = ((HEADER + FAMILY_HEADER + attributes.0.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family, 0]);
    message.extend(resource.to_be_bytes());
    message.extend(&attributes.0);
    message
}

/// Reads up to the end of a dump or the first acknowledgement or failure; gives each message's kind, family and
/// attributes.
pub(crate) fn receive(socket: &Socket, mut each: impl FnMut(u16, u8, &[u8])) -> io::Result<()> {
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while let Some(header) = rest.first_chunk::<HEADER>() {
            let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let body = rest.get(HEADER..length).unwrap_or_default();
            match u16::from_ne_bytes([header[4], header[5]]) {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = body.first_chunk::<4>().map_or(0, |code| i32::from_ne_bytes(*code));
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                kind => {
                    each(kind, body.first().copied().unwrap_or_default(), body.get(FAMILY_HEADER..).unwrap_or_default())
                }
            }
            rest = rest.get(length.next_multiple_of(4).max(HEADER)..).unwrap_or_default();
        }
    }
}

pub(crate) fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some(head) = attributes.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if u16::from_ne_bytes([head[2], head[3]]) & 0x3fff == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.next_multiple_of(4).max(4)..)?;
    }
    None
}
