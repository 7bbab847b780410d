//! The MSS clamp: TCP connections that pass the mesh link, local or forwarded, learn the MTU of their route.
//!
//! Owns the nftables table `inet meshspan` and nothing else in nftables; never the tables other software made for
//! iptables. The table is replaced whole, in one transaction, and is ours by name. Its two rules carry a comment that
//! names version and link, by which a change by others, or by an older agent, is seen.
//!
//! ```text
//! chain forward     { filter hook forward priority mangle;     iifname LINK, SYN: maxseg = rt mtu }
//! chain postrouting { filter hook postrouting priority mangle; oifname LINK, SYN: maxseg = rt mtu }
//! ```
//! `rt mtu` is the smaller MTU of the packet's route and of the route back, and the kernel only ever lowers a MSS.

use std::io;

use mesh_proto::device::MssClamp;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE};
use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook, InetHookNumber, Meta, MetaKey,
    NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage, TableAttribute, TableMessage,
};

use super::nfnetlink::{self, Step};

const TABLE: &str = "meshspan";
/// What iptables calls mangle: before the filters of others, after connection tracking.
const PRIORITY: i32 = -150;
/// Goes up when the rules change, so that a newer agent replaces an older one's.
const VERSION: u8 = 1;

const IPPROTO_TCP: u8 = 6;
const TCP_FLAGS_OFFSET: u32 = 13;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_OPTION_MAXSEG: u8 = 2;

/// Numbers of `linux/netfilter/nf_tables.h` that the types lack.
const PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const RT_TCPMSS: u32 = 3;
const BYTEORDER_HTON: u32 = 1;
const EXTHDR_OP_TCPOPT: u32 = 1;
/// The multicast group of `linux/netfilter/nfnetlink.h` that tells of changes.
pub(super) const GROUP: u32 = 7;

/// What cannot be read counts as absent: setting it then says why.
pub(super) async fn observe(link: &str) -> MssClamp {
    let expected: Vec<_> = rules(link).into_iter().map(|rule| (rule.chain.to_owned(), comment(link))).collect();
    match in_background(list_rules).await {
        Ok(found) if found == expected => MssClamp::Present,
        Ok(_) => MssClamp::Absent,
        Err(error) => {
            tracing::debug!(%error, "cannot list the rules of table inet meshspan");
            MssClamp::Absent
        }
    }
}

/// Whether a message of [`GROUP`] concerns a table of our name: every message on a table, its chains and its rules carries
/// the table's name as text that ends with a zero.
pub(super) fn names_our_table(datagram: &[u8]) -> bool {
    let name = [TABLE.as_bytes(), &[0]].concat();
    datagram.windows(name.len()).any(|window| window == name)
}

/// Our table is there, whatever is in it.
pub(super) async fn exists() -> bool {
    in_background(|| {
        let get = NfTablesMessage::GetTable(TableMessage { attributes: vec![TableAttribute::Name(TABLE.into())] });
        nfnetlink::get(NetfilterProtoFamily::Inet, get)
    })
    .await
    .is_ok_and(|answers| !answers.is_empty())
}

/// Replaces our table by one with exactly these rules.
pub(super) async fn set(link: &str) -> io::Result<()> {
    let steps = replacement(link);
    in_background(move || nfnetlink::transact(NetfilterProtoFamily::Inet, steps)).await
}

pub(super) async fn remove() -> io::Result<()> {
    // Made first, so that the deletion finds it.
    in_background(|| nfnetlink::transact(NetfilterProtoFamily::Inet, vec![new_table(), delete_table()])).await
}

/// The kernel was built without what we need.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOENT | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT))
}

/// A transaction waits for every processor to let go of the old rules, and may load kernel modules.
async fn in_background<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

fn new_table() -> Step {
    let attributes = vec![TableAttribute::Name(TABLE.into())];
    (NfTablesMessage::NewTable(TableMessage { attributes }), NLM_F_CREATE)
}

fn delete_table() -> Step {
    let attributes = vec![TableAttribute::Name(TABLE.into())];
    (NfTablesMessage::DeleteTable(TableMessage { attributes }), 0)
}

fn replacement(link: &str) -> Vec<Step> {
    let mut steps = vec![new_table(), delete_table(), new_table()];
    for rule in rules(link) {
        let attributes = vec![
            ChainAttribute::Table(TABLE.into()),
            ChainAttribute::Name(rule.chain.into()),
            ChainAttribute::Hook(vec![Hook::Number(rule.hook.into()), Hook::Priority(PRIORITY.cast_unsigned())]),
            ChainAttribute::Type("filter".into()),
        ];
        steps.push((NfTablesMessage::NewChain(ChainMessage { attributes }), NLM_F_CREATE));
        let attributes = vec![
            RuleAttribute::Table(TABLE.into()),
            RuleAttribute::Chain(rule.chain.into()),
            RuleAttribute::Expressions(rule.expressions.into_iter().map(Into::into).collect()),
            RuleAttribute::UserData(comment(link)),
        ];
        steps.push((NfTablesMessage::NewRule(RuleMessage { attributes }), NLM_F_CREATE));
    }
    steps
}

struct Rule {
    chain: &'static str,
    hook: InetHookNumber,
    expressions: Vec<Expressions>,
}

/// In the order the kernel lists them.
fn rules(link: &str) -> [Rule; 2] {
    let clamp = |side| [vec![meta(side), equals(interface_name(link))], set_syn_mss_to_route_mtu()].concat();
    [
        Rule { chain: "forward", hook: InetHookNumber::Forward, expressions: clamp(MetaKey::Iifname) },
        Rule { chain: "postrouting", hook: InetHookNumber::PostRouting, expressions: clamp(MetaKey::Oifname) },
    ]
}

fn set_syn_mss_to_route_mtu() -> Vec<Expressions> {
    let register = u32::from(Register::Reg1);
    vec![
        meta(MetaKey::L4Proto),
        equals(vec![IPPROTO_TCP]),
        Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Reg1),
            Payload::Base(PAYLOAD_TRANSPORT_HEADER),
            Payload::Offset(TCP_FLAGS_OFFSET),
            Payload::Len(1),
        ]),
        Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(1),
            Bitwise::Mask(DataAttribute::Value(vec![TCP_SYN | TCP_RST])),
            Bitwise::Xor(DataAttribute::Value(vec![0])),
        ]),
        equals(vec![TCP_SYN]),
        other("rt", &[(1, register), (2, RT_TCPMSS)]),
        other("byteorder", &[(1, register), (2, register), (3, BYTEORDER_HTON), (4, 2), (5, 2)]),
        write_maxseg(register),
    ]
}

fn meta(key: MetaKey) -> Expressions {
    Expressions::Meta(vec![Meta::DestinationRegister(Register::Reg1), Meta::Key(key)])
}

fn equals(value: Vec<u8>) -> Expressions {
    Expressions::Cmp(vec![
        Cmp::SourceRegister(Register::Reg1),
        Cmp::Op(Operator::Equal),
        Cmp::Data(DataAttribute::Value(value)),
    ])
}

/// Writes the register into the two bytes of the option's value, two bytes after its start.
fn write_maxseg(register: u32) -> Expressions {
    let mut expression = vec![DefaultNla::new(2, vec![TCP_OPTION_MAXSEG])];
    expression.extend(numbers(&[(3, 2), (4, 2), (6, EXTHDR_OP_TCPOPT), (7, register)]));
    Expressions::Other { expression_type: "exthdr".into(), attributes: expression }
}

fn other(name: &str, attributes: &[(u16, u32)]) -> Expressions {
    Expressions::Other { expression_type: name.into(), attributes: numbers(attributes).collect() }
}

fn numbers(attributes: &[(u16, u32)]) -> impl Iterator<Item = DefaultNla> {
    attributes.iter().map(|(kind, value)| DefaultNla::new(*kind, value.to_be_bytes().to_vec()))
}

/// As the kernel compares it: padded with zeros to the longest name.
fn interface_name(link: &str) -> Vec<u8> {
    let mut name = link.as_bytes().to_vec();
    name.resize(libc::IFNAMSIZ, 0);
    name
}

/// Rule user data in the form that `nft` shows as a comment: type 0, length, text with its end.
fn comment(link: &str) -> Vec<u8> {
    let text = format!("meshspan {VERSION} {link}\0");
    let mut data = vec![0, u8::try_from(text.len()).unwrap_or(u8::MAX)];
    data.extend(text.into_bytes());
    data
}

/// Chain and user data of every rule in our table.
fn list_rules() -> io::Result<Vec<(String, Vec<u8>)>> {
    let attributes = vec![RuleAttribute::Table(TABLE.into())];
    let get = NfTablesMessage::GetRule(RuleMessage { attributes });
    let answers = nfnetlink::list(NetfilterProtoFamily::Inet, get)?;
    let rules = answers.into_iter().filter_map(|answer| match answer {
        (_, NfTablesMessage::NewRule(rule)) => Some(rule),
        _ => None,
    });
    Ok(rules
        .map(|rule| {
            let (mut chain, mut data) = (String::new(), Vec::new());
            for attribute in rule.attributes {
                match attribute {
                    RuleAttribute::Chain(name) => chain = name,
                    RuleAttribute::UserData(bytes) => data = bytes,
                    _ => {}
                }
            }
            (chain, data)
        })
        .collect())
}

/// What tests do to nftables behind the agent's back.
#[cfg(test)]
pub(super) mod lab {
    use super::*;

    /// Every table of every family.
    pub(crate) fn tables() -> Vec<String> {
        let get = NfTablesMessage::GetTable(TableMessage { attributes: Vec::new() });
        let answers = nfnetlink::list(NetfilterProtoFamily::Unspec, get).expect("the tables are listed");
        let mut tables = Vec::new();
        for (_, answer) in answers {
            if let NfTablesMessage::NewTable(mut table) = answer {
                // Counted up by the kernel with every table made.
                table.attributes.retain(|attribute| !matches!(attribute, TableAttribute::Handle(_)));
                tables.push(format!("{table:?}"));
            }
        }
        tables
    }

    pub(crate) fn make_table(name: &str) {
        let attributes = vec![TableAttribute::Name(name.into())];
        let make = vec![(NfTablesMessage::NewTable(TableMessage { attributes }), NLM_F_CREATE)];
        nfnetlink::transact(NetfilterProtoFamily::Inet, make).expect("a table is made");
    }

    /// Removes the rules of our table and leaves its chains.
    pub(crate) fn flush() {
        let attributes = vec![RuleAttribute::Table(TABLE.into())];
        let flush = vec![(NfTablesMessage::DeleteRule(RuleMessage { attributes }), 0)];
        nfnetlink::transact(NetfilterProtoFamily::Inet, flush).expect("the rules are removed");
    }
}
