//! The packet filter tables of a host: their families and names, and making and deleting one, over netlink by hand.
//!
//! Knows nothing of chains and rules: what is in a table is its owner's business, that it is there is the lab's.

use std::{collections::BTreeSet, io};

use anyhow::{Context, Result};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use crate::host::Host;

/// Numbers of `linux/netlink.h`, `linux/netfilter/nfnetlink.h` and `linux/netfilter/nf_tables.h`.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const NF_TABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = NF_TABLES << 8;
const GET_TABLE: u16 = NF_TABLES << 8 | 1;
const DELETE_TABLE: u16 = NF_TABLES << 8 | 2;
const TABLE_NAME: u16 = 1;
const INET: u8 = 1;
/// Families of `linux/netfilter.h`, by number.
const FAMILIES: [(u8, &str); 6] = [(INET, "inet"), (2, "ip"), (3, "arp"), (5, "netdev"), (7, "bridge"), (10, "ip6")];
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

impl Host {
    /// Every table as `family name`; none where the kernel has no nftables.
    pub fn nft_tables(&self) -> Result<BTreeSet<String>> {
        self.inside(tables_here)
    }

    /// Makes an empty table of the family `inet`.
    pub fn add_nft_table(&self, name: &str) -> Result<()> {
        self.inside(|| change(NEW_TABLE, CREATE, name))
            .with_context(|| format!("cannot make the nftables table inet {name}"))
    }

    /// Deletes a table of the family `inet` with all that is in it.
    pub fn delete_nft_table(&self, name: &str) -> Result<()> {
        self.inside(|| change(DELETE_TABLE, 0, name))
            .with_context(|| format!("cannot delete the nftables table inet {name}"))
    }
}

/// One message on one table, in a transaction of its own.
fn change(kind: u16, flags: u16, name: &str) -> Result<()> {
    let mut attribute = (4 + name.len() as u16 + 1).to_ne_bytes().to_vec();
    attribute.extend(TABLE_NAME.to_ne_bytes());
    attribute.extend(name.as_bytes());
    attribute.push(0);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    let mut batch = message(BATCH_BEGIN, REQUEST, 0, NF_TABLES, &[]);
    batch.extend(message(kind, REQUEST | ACK | flags, INET, 0, &attribute));
    batch.extend(message(BATCH_END, REQUEST, 0, NF_TABLES, &[]));
    let socket = open()?;
    socket.send(&batch, 0)?;
    Ok(receive(&socket, |_, _| {})?)
}

/// The tables of the calling thread's namespace.
pub(crate) fn tables_here() -> Result<BTreeSet<String>> {
    let mut tables = BTreeSet::new();
    let Ok(socket) = open() else {
        return Ok(tables);
    };
    socket.send(&message(GET_TABLE, REQUEST | DUMP, 0, 0, &[]), 0)?;
    receive(&socket, |family, attributes| {
        let family = FAMILIES.iter().find(|(number, _)| *number == family).map_or("other", |(_, name)| name);
        if let Some(name) = attribute(attributes, TABLE_NAME) {
            tables.insert(format!("{family} {}", String::from_utf8_lossy(name).trim_end_matches('\0')));
        }
    })
    .context("cannot list the nftables tables")?;
    Ok(tables)
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn message(kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let mut message = ((HEADER + FAMILY_HEADER + attributes.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family, 0]);
    message.extend(resource.to_be_bytes());
    message.extend(attributes);
    message
}

/// Reads up to the end of a dump or the first answer; gives each table's family and attributes.
fn receive(socket: &Socket, mut each: impl FnMut(u8, &[u8])) -> io::Result<()> {
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
                NEW_TABLE => {
                    each(body.first().copied().unwrap_or_default(), body.get(FAMILY_HEADER..).unwrap_or_default())
                }
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4).max(HEADER)..).unwrap_or_default();
        }
    }
}

fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some(head) = attributes.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        if u16::from_ne_bytes([head[2], head[3]]) & 0x3fff == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.next_multiple_of(4).max(4)..)?;
    }
    None
}
