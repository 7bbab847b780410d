//! Rule sets: tables with their chains, sets and rules, loaded in one transaction that replaces what had their names.
//!
//! Speaks of rules as the manual of nftables does, and only of the parts that the lab's routers need.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result};

use super::{
    DELETE_TABLE, NEW_TABLE, TABLE_NAME, flush_connections_here,
    wire::{self, Attributes, CREATE, NF_TABLES, Step},
};
use crate::host::Host;

const NEW_CHAIN: u16 = NF_TABLES << 8 | 3;
const NEW_RULE: u16 = NF_TABLES << 8 | 6;
const NEW_SET: u16 = NF_TABLES << 8 | 9;
const APPEND: u16 = 0x800;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

/// Where a connection is in its life, as bits of `ct state`.
pub const ESTABLISHED: u32 = 2;
pub const RELATED: u32 = 4;
/// `ct status dnat`.
pub const DNAT: u32 = 1 << 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Inet = 1,
    Ip = 2,
}

/// Where a chain sees packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Postrouting = 4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainType {
    Filter,
    Nat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Drop = 0,
    Accept = 1,
}

/// What a key or a value of a set is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    SourceAddress,
    DestinationAddress,
    SourcePort,
    DestinationPort,
    /// Of the connection's first packet, as it was before any translation.
    OriginalSourceAddress,
    OriginalSourcePort,
    /// Of the answers to it.
    ReplySourceAddress,
    ReplySourcePort,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Original = 0,
    Reply = 1,
}

/// A set or a map whose elements rules add and time removes.
#[derive(Debug, Clone)]
pub struct Set {
    pub name: &'static str,
    pub key: &'static [Field],
    /// Makes it a map.
    pub value: &'static [Field],
    pub timeout_seconds: u32,
}

#[derive(Debug, Clone)]
pub struct Chain {
    pub name: &'static str,
    pub kind: ChainType,
    pub hook: Hook,
    pub priority: i32,
    pub policy: Verdict,
    pub rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
pub struct Table {
    pub family: Family,
    pub name: &'static str,
    pub sets: Vec<Set>,
    pub chains: Vec<Chain>,
}

/// One rule: conditions from left to right, then what is done.
#[derive(Debug, Clone, Default)]
pub struct Rule(Vec<(&'static str, Attributes)>);

impl Host {
    /// Makes `tables` what there is under their names; a table without chains is only removed.
    pub fn load_rules(&self, tables: &[Table]) -> Result<()> {
        let steps: Vec<Step> = tables.iter().flat_map(Table::replacement).collect();
        self.inside(|| Ok(wire::transact(&steps)?)).context("cannot load packet filter rules")
    }

    /// Forgets every tracked connection. Dynamic sets keep their elements: load the rules again to empty them.
    pub fn flush_connections(&self) -> Result<()> {
        self.inside(|| Ok(flush_connections_here()?)).context("cannot flush the tracked connections")
    }

    /// How long an unanswered UDP flow, and one that lasts, is remembered without a packet.
    pub fn set_udp_timeouts(&self, new_seconds: u32, lasting_seconds: u32) -> Result<()> {
        self.set_sysctl("netfilter/nf_conntrack_udp_timeout", &new_seconds.to_string())?;
        self.set_sysctl("netfilter/nf_conntrack_udp_timeout_stream", &lasting_seconds.to_string())
    }
}

impl Rule {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn from_link(self, link: &str) -> Self {
        self.meta(META_IIFNAME).equals(&interface(link))
    }

    pub fn from_links_of(self, prefix: &str) -> Self {
        self.meta(META_IIFNAME).equals(prefix.as_bytes())
    }

    pub fn to_link(self, link: &str) -> Self {
        self.meta(META_OIFNAME).equals(&interface(link))
    }

    pub fn to_links_of(self, prefix: &str) -> Self {
        self.meta(META_OIFNAME).equals(prefix.as_bytes())
    }

    pub fn not_to_link(self, link: &str) -> Self {
        self.meta(META_OIFNAME).compare(NOT_EQUAL, &interface(link))
    }

    pub fn protocol(self, protocol: u8) -> Self {
        self.meta(META_L4PROTO).equals(&[protocol])
    }

    /// Of a packet of IPv4; in a chain of the family `ip`.
    pub fn between(self, source: Ipv4Addr, destination: Ipv4Addr) -> Self {
        self.load(&[Field::SourceAddress], 0)
            .equals(&source.octets())
            .load(&[Field::DestinationAddress], 0)
            .equals(&destination.octets())
    }

    pub fn destination_port(self, port: u16) -> Self {
        self.load(&[Field::DestinationPort], 0).equals(&port.to_be_bytes())
    }

    /// The destination is an address of this host.
    pub fn to_this_host(self) -> Self {
        const RTN_LOCAL: u32 = 2;
        self.add("fib", Attributes::new().number(1, SLOT).number(2, 3).number(3, 2)).equals(&RTN_LOCAL.to_ne_bytes())
    }

    pub fn state(self, any_of: u32) -> Self {
        self.connection_bits(0, any_of)
    }

    pub fn status(self, any_of: u32) -> Self {
        self.connection_bits(2, any_of)
    }

    pub fn direction(self, direction: Direction) -> Self {
        self.add("ct", Attributes::new().number(1, SLOT).number(2, 1)).equals(&[direction as u8])
    }

    /// The fields are in the set.
    pub fn within(self, fields: &[Field], set: &str) -> Self {
        self.load(fields, 0).add("lookup", Attributes::new().text(1, set).number(2, SLOT))
    }

    pub fn accept(self) -> Self {
        self.verdict(Verdict::Accept)
    }

    pub fn drop(self) -> Self {
        self.verdict(Verdict::Drop)
    }

    /// Drops a packet of TCP and tells its sender that the connection is no more.
    pub fn reset(self) -> Self {
        const TCP_RESET: u32 = 1;
        self.add("reject", Attributes::new().number(1, TCP_RESET))
    }

    /// Adds an element or makes it young again; the value of one that is there stays.
    pub fn update(self, set: &str, key: &[Field], value: &[Field]) -> Self {
        const UPDATE: u32 = 1;
        let after = key.len() as u32;
        let rule = self.load(key, 0).load(value, after);
        let mut attributes = Attributes::new().text(1, set).number(3, UPDATE).number(4, SLOT);
        if !value.is_empty() {
            attributes = attributes.number(5, SLOT + after);
        }
        rule.add("dynset", attributes)
    }

    /// Source becomes the address and port that `map` has for `key`; no match, no effect.
    pub fn snat_by(self, key: &[Field], map: &str) -> Self {
        self.translate_by(0, key, map)
    }

    pub fn dnat_by(self, key: &[Field], map: &str) -> Self {
        self.translate_by(1, key, map)
    }

    /// Destination becomes this socket.
    pub fn dnat_to(self, to: SocketAddrV4) -> Self {
        const DESTINATION: u32 = 1;
        const IPV4: u32 = 2;
        self.immediate(SLOT, &to.ip().octets())
            .immediate(SLOT + 1, &to.port().to_be_bytes())
            .add("nat", Attributes::new().number(1, DESTINATION).number(2, IPV4).number(3, SLOT).number(5, SLOT + 1))
    }

    /// Source becomes this router's address; the port stays if it can.
    pub fn masquerade(self) -> Self {
        self.add("masq", Attributes::new())
    }

    /// The same with another random port for each destination.
    pub fn masquerade_random(self) -> Self {
        const FULLY_RANDOM: u32 = 0x10;
        self.add("masq", Attributes::new().number(1, FULLY_RANDOM))
    }

    /// The same with a port of the range.
    pub fn masquerade_to(self, first: u16, last: u16) -> Self {
        const PORTS_GIVEN: u32 = 2;
        self.immediate(SLOT, &first.to_be_bytes())
            .immediate(SLOT + 1, &last.to_be_bytes())
            .add("masq", Attributes::new().number(1, PORTS_GIVEN).number(2, SLOT).number(3, SLOT + 1))
    }

    fn translate_by(self, kind: u32, key: &[Field], map: &str) -> Self {
        const IPV4: u32 = 2;
        self.load(key, 0)
            .add("lookup", Attributes::new().text(1, map).number(2, SLOT).number(3, SLOT))
            .add("nat", Attributes::new().number(1, kind).number(2, IPV4).number(3, SLOT).number(5, SLOT + 1))
    }

    fn connection_bits(self, key: u32, any_of: u32) -> Self {
        let mask = Attributes::new().bytes(VALUE, &any_of.to_ne_bytes());
        let zero = Attributes::new().bytes(VALUE, &[0; 4]);
        self.add("ct", Attributes::new().number(1, SLOT).number(2, key))
            .add(
                "bitwise",
                Attributes::new().number(1, SLOT).number(2, SLOT).number(3, 4).nest(4, &mask).nest(5, &zero),
            )
            .compare(NOT_EQUAL, &[0; 4])
    }

    fn verdict(self, verdict: Verdict) -> Self {
        const VERDICT_REGISTER: u32 = 0;
        let code = Attributes::new().number(1, verdict as u32);
        self.add("immediate", Attributes::new().number(1, VERDICT_REGISTER).nest(2, &Attributes::new().nest(2, &code)))
    }

    fn immediate(self, register: u32, value: &[u8]) -> Self {
        self.add("immediate", Attributes::new().number(1, register).nest(2, &Attributes::new().bytes(VALUE, value)))
    }

    fn meta(self, key: u32) -> Self {
        self.add("meta", Attributes::new().number(1, SLOT).number(2, key))
    }

    fn equals(self, value: &[u8]) -> Self {
        self.compare(EQUAL, value)
    }

    fn compare(self, operator: u32, value: &[u8]) -> Self {
        let data = Attributes::new().bytes(VALUE, value);
        self.add("cmp", Attributes::new().number(1, SLOT).number(2, operator).nest(3, &data))
    }

    /// Loads the fields into neighbouring slots.
    fn load(mut self, fields: &[Field], first: u32) -> Self {
        const NETWORK_HEADER: u32 = 1;
        const TRANSPORT_HEADER: u32 = 2;
        const CT_SRC_IP: u32 = 19;
        const CT_PROTO_SRC: u32 = 11;
        for (slot, field) in (SLOT + first..).zip(fields) {
            let payload = |base, offset, length| {
                ("payload", Attributes::new().number(1, slot).number(2, base).number(3, offset).number(4, length))
            };
            let tracked = |key, direction: Direction| {
                ("ct", Attributes::new().number(1, slot).number(2, key).bytes(3, &[direction as u8]))
            };
            self.0.push(match field {
                Field::SourceAddress => payload(NETWORK_HEADER, 12, 4),
                Field::DestinationAddress => payload(NETWORK_HEADER, 16, 4),
                Field::SourcePort => payload(TRANSPORT_HEADER, 0, 2),
                Field::DestinationPort => payload(TRANSPORT_HEADER, 2, 2),
                Field::OriginalSourceAddress => tracked(CT_SRC_IP, Direction::Original),
                Field::OriginalSourcePort => tracked(CT_PROTO_SRC, Direction::Original),
                Field::ReplySourceAddress => tracked(CT_SRC_IP, Direction::Reply),
                Field::ReplySourcePort => tracked(CT_PROTO_SRC, Direction::Reply),
            });
        }
        self
    }

    fn add(mut self, name: &'static str, attributes: Attributes) -> Self {
        self.0.push((name, attributes));
        self
    }

    fn expressions(&self) -> Attributes {
        self.0.iter().fold(Attributes::new(), |list, (name, attributes)| {
            list.nest(1, &Attributes::new().text(1, name).nest(2, attributes))
        })
    }
}

/// The first of the 32-bit registers; a slot is one of them.
const SLOT: u32 = 8;
const VALUE: u16 = 1;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_L4PROTO: u32 = 16;

impl Table {
    /// Made first, so that the deletion finds it.
    fn replacement(&self) -> Vec<Step> {
        let name = || Attributes::new().text(TABLE_NAME, self.name);
        let step = |kind, flags, attributes| Step { kind, flags, family: self.family as u8, attributes };
        let mut steps = vec![step(NEW_TABLE, CREATE, name()), step(DELETE_TABLE, 0, name())];
        if self.chains.is_empty() {
            return steps;
        }
        steps.push(step(NEW_TABLE, CREATE, name()));
        for (id, set) in (1..).zip(&self.sets) {
            steps.push(step(NEW_SET, CREATE, set.attributes(self.name, id)));
        }
        for chain in &self.chains {
            steps.push(step(NEW_CHAIN, CREATE, chain.attributes(self.name)));
            for rule in &chain.rules {
                let attributes = Attributes::new().text(1, self.name).text(2, chain.name).nest(4, &rule.expressions());
                steps.push(step(NEW_RULE, CREATE | APPEND, attributes));
            }
        }
        steps
    }
}

impl Chain {
    fn attributes(&self, table: &str) -> Attributes {
        let hook = Attributes::new().number(1, self.hook as u32).number(2, self.priority.cast_unsigned());
        let kind = match self.kind {
            ChainType::Filter => "filter",
            ChainType::Nat => "nat",
        };
        Attributes::new().text(1, table).text(3, self.name).nest(4, &hook).number(5, self.policy as u32).text(7, kind)
    }
}

impl Set {
    fn attributes(&self, table: &str, id: u32) -> Attributes {
        const MAP: u32 = 8;
        const TIMEOUT: u32 = 0x10;
        const DYNAMIC: u32 = 0x20;
        const SIZE: u32 = 16384;
        let flags = TIMEOUT | DYNAMIC | if self.value.is_empty() { 0 } else { MAP };
        let mut attributes = Attributes::new()
            .text(1, table)
            .text(2, self.name)
            .number(3, flags)
            .number(4, type_of(self.key))
            .number(5, length_of(self.key))
            .number(10, id)
            .nest(9, &Attributes::new().number(1, SIZE))
            .long(11, u64::from(self.timeout_seconds) * 1000);
        if !self.value.is_empty() {
            attributes = attributes.number(6, type_of(self.value)).number(7, length_of(self.value));
        }
        attributes
    }
}

/// Each field takes a whole slot.
fn length_of(fields: &[Field]) -> u32 {
    if let [Field::SourcePort | Field::DestinationPort | Field::OriginalSourcePort | Field::ReplySourcePort] = fields {
        2
    } else {
        4 * fields.len() as u32
    }
}

/// The kernel only keeps this number, for programs that list.
fn type_of(fields: &[Field]) -> u32 {
    const ADDRESS: u32 = 7;
    const PORT: u32 = 13;
    fields.iter().fold(0, |number, field| {
        number << 6
            | match field {
                Field::SourceAddress
                | Field::DestinationAddress
                | Field::OriginalSourceAddress
                | Field::ReplySourceAddress => ADDRESS,
                _ => PORT,
            }
    })
}

/// As the kernel compares it: padded with zeros to the longest name.
fn interface(link: &str) -> Vec<u8> {
    let mut name = link.as_bytes().to_vec();
    name.resize(libc::IFNAMSIZ, 0);
    name
}
