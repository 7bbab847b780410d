//! The packet filter's tables as the kernel lists them, read into [`super::ruleset`].
//!
//! iptables-nft writes the same tables, so Docker, ufw and firewalld are all seen here. What an expression means and we do
//! not know makes its rule one that may hold.

use std::collections::BTreeMap;
use std::io;

use netlink_packet_core::{DefaultNla, Nla as _, NlasIterator};
use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::nftables::{
    Bitwise, ChainAttribute, ChainMessage, Cmp, DataAttribute, ExpressionAttribute, Expressions, Hook as HookAttribute,
    HookNumber, Immediate, InetHookNumber, ListAttribute, Lookup, Meta, MetaKey, NfTablesMessage, Operator, Payload,
    Register, RuleAttribute, RuleMessage, SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage,
    Verdict as Code, VerdictAttribute,
};

use super::ruleset::{Base, Chain, Comparison, Field, Hook, Operand, Range, Rule, Table, Test, Verdict};
use crate::device::nfnetlink;

/// Numbers of `linux/netfilter.h` and `linux/netfilter/nf_tables.h` that the types lack.
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NF_QUEUE: u32 = 3;
const PAYLOAD_NETWORK_HEADER: u32 = 1;
const PAYLOAD_TRANSPORT_HEADER: u32 = 2;
const CT_DREG: u16 = 1;
const CT_KEY: u16 = 2;
const CT_STATE: u32 = 0;
const RANGE_SREG: u16 = 1;
const RANGE_OP: u16 = 2;
const RANGE_FROM: u16 = 3;
const RANGE_TO: u16 = 4;
const LOOKUP_INVERTED: u32 = 1;
/// Of the extensions that iptables brings along: name, and what it was given.
const EXTENSION_NAME: u16 = 1;
const EXTENSION_INFO: u16 = 3;

/// A table's name in its family.
pub(super) type TableId = (Family, String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    Ipv4,
    Ipv6,
    Inet,
}

/// Every table that sees IP packets. Needs the right to administer the network.
pub(super) fn tables() -> io::Result<BTreeMap<TableId, Table>> {
    let every = NetfilterProtoFamily::Unspec;
    let chains = nfnetlink::list(every, NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() }))?;
    let rules = nfnetlink::list(every, NfTablesMessage::GetRule(RuleMessage { attributes: Vec::new() }))?;
    let mut sets = Sets { read: BTreeMap::new() };
    let mut tables: BTreeMap<TableId, Table> = BTreeMap::new();
    for (family, message) in chains {
        let (Some(family), NfTablesMessage::NewChain(chain)) = (ip_family(family), message) else { continue };
        let Some((table, name, chain)) = read_chain(chain) else { continue };
        tables.entry((family, table)).or_default().chains.insert(name, chain);
    }
    for (family, message) in rules {
        let (Some(family), NfTablesMessage::NewRule(rule)) = (ip_family(family), message) else { continue };
        let Some((table, chain, expressions)) = read_rule(rule) else { continue };
        let id = (family, table);
        let rule = translate(expressions, &mut |set| sets.of(&id, set));
        if let Some(chain) = tables.get_mut(&id).and_then(|table| table.chains.get_mut(&chain)) {
            chain.rules.push(rule);
        }
    }
    Ok(tables)
}

fn ip_family(family: NetfilterProtoFamily) -> Option<Family> {
    match family {
        NetfilterProtoFamily::IPv4 => Some(Family::Ipv4),
        NetfilterProtoFamily::IPv6 => Some(Family::Ipv6),
        NetfilterProtoFamily::Inet => Some(Family::Inet),
        _ => None,
    }
}

fn read_chain(message: ChainMessage) -> Option<(String, String, Chain)> {
    let (mut table, mut name, mut kind, mut hook, mut drops) = (None, None, String::new(), None, false);
    for attribute in message.attributes {
        match attribute {
            ChainAttribute::Table(text) => table = Some(text),
            ChainAttribute::Name(text) => name = Some(text),
            ChainAttribute::Type(text) => kind = text,
            ChainAttribute::Policy(code) => drops = code == NF_DROP,
            ChainAttribute::Hook(attributes) => hook = attributes.iter().find_map(hook_number),
            _ => {}
        }
    }
    let base = hook.filter(|_| kind == "filter").map(|hook| Base { hook, drops });
    Some((table?, name?, Chain { base, rules: Vec::new() }))
}

fn hook_number(attribute: &HookAttribute) -> Option<Hook> {
    match attribute {
        HookAttribute::Number(HookNumber::Inet(InetHookNumber::LocalIn)) => Some(Hook::Input),
        HookAttribute::Number(HookNumber::Inet(InetHookNumber::Forward)) => Some(Hook::Forward),
        _ => None,
    }
}

fn read_rule(message: RuleMessage) -> Option<(String, String, Vec<Expressions>)> {
    let (mut table, mut chain, mut expressions) = (None, None, Vec::new());
    for attribute in message.attributes {
        match attribute {
            RuleAttribute::Table(text) => table = Some(text),
            RuleAttribute::Chain(text) => chain = Some(text),
            RuleAttribute::Expressions(list) => expressions = list.into_iter().filter_map(expression).collect(),
            _ => {}
        }
    }
    Some((table?, chain?, expressions))
}

fn expression(element: ListAttribute<ExpressionAttribute>) -> Option<Expressions> {
    let ListAttribute::Element(attributes) = element else { return None };
    let mut name = None;
    for attribute in attributes {
        match attribute {
            ExpressionAttribute::Data(data) => return Some(data),
            ExpressionAttribute::Name(text) => name = Some(text),
            _ => {}
        }
    }
    // Some expressions are nothing but their name.
    name.map(|expression_type| Expressions::Other { expression_type, attributes: Vec::new() })
}

/// Elements of sets that rules look into, read when first asked for.
struct Sets {
    read: BTreeMap<(TableId, String), Vec<(Range, Verdict)>>,
}

impl Sets {
    fn of(&mut self, table: &TableId, set: &str) -> Vec<(Range, Verdict)> {
        let key = (table.clone(), set.to_owned());
        self.read.entry(key).or_insert_with(|| elements(table, set).unwrap_or_default()).clone()
    }
}

fn elements((family, table): &TableId, set: &str) -> io::Result<Vec<(Range, Verdict)>> {
    let family = match family {
        Family::Ipv4 => NetfilterProtoFamily::IPv4,
        Family::Ipv6 => NetfilterProtoFamily::IPv6,
        Family::Inet => NetfilterProtoFamily::Inet,
    };
    let attributes = vec![SetElementList::Table(table.clone()), SetElementList::Set(set.to_owned())];
    let answers = nfnetlink::list(family, NfTablesMessage::GetSetElement(SetElementMessage { attributes }))?;
    let lists = answers.into_iter().filter_map(|(_, answer)| match answer {
        NfTablesMessage::NewSetElement(message) => Some(message.attributes),
        _ => None,
    });
    let attributes = lists.flatten().filter_map(|attribute| match attribute {
        SetElementList::Elements(elements) => Some(elements),
        _ => None,
    });
    let elements = attributes.flatten().filter_map(|element| match element {
        ListAttribute::Element(attributes) => Some(attributes),
        _ => None,
    });
    Ok(ranges(elements.filter_map(element).collect()))
}

/// One element: its key, whether it only ends a range, and the verdict it gives.
type Element = (Vec<u8>, bool, Verdict);

fn element(attributes: Vec<SetElementAttribute>) -> Option<Element> {
    let (mut key, mut is_end, mut verdict) = (None, false, Verdict::Continue);
    for attribute in attributes {
        match attribute {
            SetElementAttribute::Key(DataAttribute::Value(value)) => key = Some(value),
            SetElementAttribute::Flags(flags) => is_end = flags.contains(SetElementFlags::IntervalEnd),
            SetElementAttribute::Data(DataAttribute::Verdict(code)) => verdict = verdict_of(&code),
            _ => {}
        }
    }
    Some((key?, is_end, verdict))
}

/// A set of ranges is listed by its edges, in no certain order: a key begins what it stands for, the next edge, which does
/// not belong to it, ends it.
fn ranges(mut elements: Vec<Element>) -> Vec<(Range, Verdict)> {
    if !elements.iter().any(|(_, is_end, _)| *is_end) {
        return elements.into_iter().map(|(key, _, verdict)| ((key.clone(), key), verdict)).collect();
    }
    // At one key, the end of one range comes before the start of another.
    elements.sort_by(|a, b| (&a.0, !a.1).cmp(&(&b.0, !b.1)));
    let ends: Vec<Vec<u8>> = elements.iter().skip(1).map(|(key, _, _)| before(key)).collect();
    let starts = elements.into_iter().enumerate().filter(|(_, (_, is_end, _))| !is_end);
    starts
        .map(|(place, (key, _, verdict))| {
            let last = ends.get(place).cloned().unwrap_or_else(|| vec![u8::MAX; key.len()]);
            ((key, last), verdict)
        })
        .collect()
}

/// The number before this one.
fn before(key: &[u8]) -> Vec<u8> {
    let mut key = key.to_vec();
    for byte in key.iter_mut().rev() {
        let (less, borrows) = byte.overflowing_sub(1);
        *byte = less;
        if !borrows {
            break;
        }
    }
    key
}

/// What a register holds after the expressions so far.
type Registers = BTreeMap<u32, Operand>;

/// Goes through a rule as the kernel does, with `set` to look into sets.
fn translate(expressions: Vec<Expressions>, set: &mut dyn FnMut(&str) -> Vec<(Range, Verdict)>) -> Rule {
    let mut registers = Registers::new();
    let mut rule = Rule::default();
    for expression in expressions {
        match expression {
            Expressions::Meta(attributes) => load_meta(&attributes, &mut registers),
            Expressions::Payload(attributes) => load_payload(&attributes, &mut registers),
            Expressions::Bitwise(attributes) => mask(&attributes, &mut registers),
            Expressions::Cmp(attributes) => rule.tests.push(compare(&attributes, &registers)),
            Expressions::Lookup(attributes) => look_up(&attributes, &registers, set, &mut rule),
            Expressions::Immediate(attributes) => immediate(&attributes, &mut registers, &mut rule),
            Expressions::Other { expression_type, attributes } => {
                other(&expression_type, &attributes, &mut registers, &mut rule);
            }
            _ => rule.tests.push(Test::Unknown),
        }
    }
    rule
}

fn load(registers: &mut Registers, to: Option<Register>, field: Option<Field>) {
    let Some(to) = to.map(number) else { return };
    match field {
        Some(field) => registers.insert(to, Operand { field, mask: None }),
        None => registers.remove(&to),
    };
}

fn load_meta(attributes: &[Meta], registers: &mut Registers) {
    let (mut to, mut field) = (None, None);
    for attribute in attributes {
        match attribute {
            Meta::DestinationRegister(register) => to = Some(*register),
            Meta::Key(key) => {
                field = match key {
                    MetaKey::Iifname => Some(Field::InputName),
                    MetaKey::Oifname => Some(Field::OutputName),
                    MetaKey::Iif => Some(Field::InputIndex),
                    MetaKey::Oif => Some(Field::OutputIndex),
                    MetaKey::Nfproto => Some(Field::Family),
                    MetaKey::EtherTypeProtocol => Some(Field::EtherType),
                    MetaKey::L4Proto => Some(Field::Protocol),
                    _ => None,
                }
            }
            _ => {}
        }
    }
    load(registers, to, field);
}

fn load_payload(attributes: &[Payload], registers: &mut Registers) {
    let (mut to, mut base, mut offset, mut length) = (None, 0, 0, 0);
    for attribute in attributes {
        match attribute {
            Payload::DestinationRegister(register) => to = Some(*register),
            Payload::Base(value) => base = *value,
            Payload::Offset(value) => offset = *value,
            Payload::Len(value) => length = *value,
            _ => {}
        }
    }
    let field = match (base, offset, length) {
        (PAYLOAD_TRANSPORT_HEADER, 2, 2) => Some(Field::DestinationPort),
        // Protocol of IPv4, next header of IPv6.
        (PAYLOAD_NETWORK_HEADER, 9 | 6, 1) => Some(Field::Protocol),
        _ => None,
    };
    load(registers, to, field);
}

fn mask(attributes: &[Bitwise], registers: &mut Registers) {
    let (mut from, mut to, mut mask, mut keeps) = (None, None, None, true);
    for attribute in attributes {
        match attribute {
            Bitwise::SourceRegister(register) => from = Some(number(*register)),
            Bitwise::DestinationRegister(register) => to = Some(number(*register)),
            Bitwise::Mask(DataAttribute::Value(value)) => mask = Some(value.clone()),
            Bitwise::Xor(DataAttribute::Value(value)) => keeps = value.iter().all(|byte| *byte == 0),
            _ => {}
        }
    }
    let Some(to) = to else { return };
    let operand = from.and_then(|from| registers.get(&from)).filter(|operand| keeps && operand.mask.is_none());
    match operand.map(|operand| operand.field).zip(mask) {
        Some((field, mask)) => registers.insert(to, Operand { field, mask: Some(mask) }),
        None => registers.remove(&to),
    };
}

fn compare(attributes: &[Cmp], registers: &Registers) -> Test {
    let (mut operand, mut how, mut data) = (None, None, None);
    for attribute in attributes {
        match attribute {
            Cmp::SourceRegister(register) => operand = registers.get(&number(*register)).cloned(),
            Cmp::Op(operator) => how = Some(*operator),
            Cmp::Data(DataAttribute::Value(value)) => data = Some(value.clone()),
            _ => {}
        }
    }
    let (Some(operand), Some(how), Some(data)) = (operand, how, data) else { return Test::Unknown };
    let comparison = match how {
        Operator::Equal => Comparison::Equal(data),
        Operator::NotEqual => Comparison::NotEqual(data),
        Operator::LessThan => Comparison::Less(data),
        Operator::LessThanEqual => Comparison::LessOrEqual(data),
        Operator::GreaterThan => Comparison::Greater(data),
        Operator::GreatherThanEqual => Comparison::GreaterOrEqual(data),
        _ => return Test::Unknown,
    };
    Test::Of(operand, comparison)
}

fn look_up(
    attributes: &[Lookup],
    registers: &Registers,
    set: &mut dyn FnMut(&str) -> Vec<(Range, Verdict)>,
    rule: &mut Rule,
) {
    let (mut operand, mut name, mut gives_verdict, mut inverted) = (None, None, false, false);
    for attribute in attributes {
        match attribute {
            Lookup::SourceRegister(register) => operand = registers.get(&number(*register)).cloned(),
            Lookup::Set(text) => name = Some(text),
            Lookup::DestinationRegister(register) => gives_verdict = *register == Register::Verdict,
            Lookup::Flags(flags) => inverted = flags & LOOKUP_INVERTED != 0,
            _ => {}
        }
    }
    let entries = name.map(|name| set(name)).unwrap_or_default();
    // Keys of another length are of several fields at once.
    let known = operand.filter(|operand| entries.iter().all(|((from, _), _)| from.len() == operand.field.length()));
    match known {
        Some(operand) if gives_verdict => rule.verdict = Verdict::Map(operand, entries),
        Some(operand) => {
            let ranges = entries.into_iter().map(|(range, _)| range).collect();
            let comparison = if inverted { Comparison::NotIn(ranges) } else { Comparison::In(ranges) };
            rule.tests.push(Test::Of(operand, comparison));
        }
        None => rule.tests.push(Test::Unknown),
    }
}

fn immediate(attributes: &[Immediate], registers: &mut Registers, rule: &mut Rule) {
    for attribute in attributes {
        match attribute {
            Immediate::DestinationRegister(register) => drop(registers.remove(&number(*register))),
            Immediate::Data(DataAttribute::Verdict(code)) => rule.verdict = verdict_of(code),
            _ => {}
        }
    }
}

fn verdict_of(attributes: &[VerdictAttribute]) -> Verdict {
    let (mut code, mut chain) = (Code::Continue, String::new());
    for attribute in attributes {
        match attribute {
            VerdictAttribute::Code(value) => code = *value,
            VerdictAttribute::Chain(name) => chain.clone_from(name),
            _ => {}
        }
    }
    match code {
        Code::Jump => Verdict::Jump(chain),
        Code::Goto => Verdict::Goto(chain),
        Code::Return => Verdict::Return,
        // A program decides: it was put there to let things through.
        Code::Other(NF_ACCEPT | NF_QUEUE) => Verdict::Accept,
        Code::Other(NF_DROP) => Verdict::Drop,
        _ => Verdict::Continue,
    }
}

fn other(name: &str, attributes: &[DefaultNla], registers: &mut Registers, rule: &mut Rule) {
    let text =
        |kind| value(attributes, kind).map(|bytes| String::from_utf8_lossy(&bytes).trim_matches('\0').to_owned());
    match name {
        "counter" | "log" | "last" | "notrack" | "dynset" => {}
        "reject" => rule.verdict = Verdict::Drop,
        "queue" => rule.verdict = Verdict::Accept,
        "ct" if value_u32(attributes, CT_DREG).is_some() => {
            let field = (value_u32(attributes, CT_KEY) == Some(CT_STATE)).then_some(Field::Connection);
            load(registers, value_u32(attributes, CT_DREG).map(Register::from), field);
        }
        "range" => rule.tests.push(range(attributes, registers)),
        "match" if text(EXTENSION_NAME).as_deref() == Some("comment") => {}
        "match" => rule.tests.push(match (text(EXTENSION_NAME).as_deref(), value(attributes, EXTENSION_INFO)) {
            (Some("udp" | "tcp"), Some(info)) => ports(&info).unwrap_or(Test::Unknown),
            _ => Test::Unknown,
        }),
        "target" if matches!(text(EXTENSION_NAME).as_deref(), Some("REJECT" | "DROP")) => rule.verdict = Verdict::Drop,
        "target" => {}
        _ => {
            registers.clear();
            rule.tests.push(Test::Unknown);
        }
    }
}

fn range(attributes: &[DefaultNla], registers: &Registers) -> Test {
    let data = |kind| {
        let nested = value(attributes, kind)?;
        let first = NlasIterator::new(nested.as_slice()).next()?.ok()?;
        Some(first.value().to_vec())
    };
    let operand = value_u32(attributes, RANGE_SREG).and_then(|register| registers.get(&number(register.into())));
    let (Some(operand), Some(from), Some(to)) = (operand, data(RANGE_FROM), data(RANGE_TO)) else {
        return Test::Unknown;
    };
    let ranges = vec![(from, to)];
    let is_inverted = value_u32(attributes, RANGE_OP).unwrap_or_default() != 0;
    Test::Of(operand.clone(), if is_inverted { Comparison::NotIn(ranges) } else { Comparison::In(ranges) })
}

/// `struct xt_udp`, and the start of `struct xt_tcp`: source ports, destination ports, in the host's order; the rest may turn
/// their meaning round.
fn ports(info: &[u8]) -> Option<Test> {
    let [s1, s2, s3, s4, f1, f2, t1, t2, rest @ ..] = info else { return None };
    let any_source = [*s1, *s2, *s3, *s4] == [0, 0, 0xff, 0xff];
    if !any_source || rest.iter().any(|byte| *byte != 0) {
        return None;
    }
    let port = |a: &u8, b: &u8| u16::from_ne_bytes([*a, *b]).to_be_bytes().to_vec();
    let operand = Operand { field: Field::DestinationPort, mask: None };
    Some(Test::Of(operand, Comparison::In(vec![(port(f1, f2), port(t1, t2))])))
}

fn value(attributes: &[DefaultNla], kind: u16) -> Option<Vec<u8>> {
    attributes.iter().find(|attribute| attribute.kind() & 0x3fff == kind).map(to_vec)
}

fn value_u32(attributes: &[DefaultNla], kind: u16) -> Option<u32> {
    let bytes = value(attributes, kind)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

fn to_vec(attribute: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes
}

/// The four wide registers lie over the sixteen narrow ones.
fn number(register: Register) -> u32 {
    match u32::from(register) {
        wide @ 1..=4 => 8 + (wide - 1) * 4,
        narrow => narrow,
    }
}
