//! The packet filter of a host, over netlink by hand: which tables there are, making and deleting one, and whole rule
//! sets ([`rules`]).
//!
//! Knows nothing of the rules of others: what is in a table is its owner's business, that it is there is the lab's.

pub mod rules;
pub(crate) mod wire;

use std::{collections::BTreeSet, io};

use anyhow::{Context, Result};

use crate::{
    host::Host,
    nft::wire::{ACK, Attributes, CREATE, DUMP, NF_TABLES, REQUEST},
};

/// Numbers of `linux/netfilter/nf_tables.h`.
const NEW_TABLE: u16 = NF_TABLES << 8;
const GET_TABLE: u16 = NF_TABLES << 8 | 1;
const DELETE_TABLE: u16 = NF_TABLES << 8 | 2;
const TABLE_NAME: u16 = 1;
const INET: u8 = 1;
/// Families of `linux/netfilter.h`, by number.
const FAMILIES: [(u8, &str); 6] = [(INET, "inet"), (2, "ip"), (3, "arp"), (5, "netdev"), (7, "bridge"), (10, "ip6")];

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
    Ok(wire::transact(&[wire::Step {
        kind,
        flags,
        family: INET,
        attributes: Attributes::new().text(TABLE_NAME, name),
    }])?)
}

/// The tables of the calling thread's namespace.
pub(crate) fn tables_here() -> Result<BTreeSet<String>> {
    let mut tables = BTreeSet::new();
    let Ok(socket) = wire::open() else {
        return Ok(tables);
    };
    socket.send(&wire::message(GET_TABLE, REQUEST | DUMP | ACK, 0, 0, &Attributes::new()), 0)?;
    wire::receive(&socket, |kind, family, attributes| {
        if kind != NEW_TABLE {
            return;
        }
        let family = FAMILIES.iter().find(|(number, _)| *number == family).map_or("other", |(_, name)| name);
        if let Some(name) = wire::attribute(attributes, TABLE_NAME) {
            tables.insert(format!("{family} {}", String::from_utf8_lossy(name).trim_end_matches('\0')));
        }
    })
    .context("cannot list the nftables tables")?;
    Ok(tables)
}

/// Forgets every connection that the calling thread's namespace tracks.
pub(crate) fn flush_connections_here() -> io::Result<()> {
    /// Numbers of `linux/netfilter/nfnetlink_conntrack.h`.
    const DELETE_CONNECTIONS: u16 = 1 << 8 | 2;
    let socket = wire::open()?;
    socket.send(&wire::message(DELETE_CONNECTIONS, REQUEST | ACK, 0, 0, &Attributes::new()), 0)?;
    wire::receive(&socket, |_, _, _| {})
}
