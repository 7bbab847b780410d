//! The whole way: tables in a real kernel, in a network namespace of its own, and what the doctor says.

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, Cmp, DataAttribute, Expressions, Hook as HookAttribute, Immediate, InetHookNumber,
    ListAttribute, Lookup, Meta, MetaKey, NfTablesMessage, Operator, Payload, Register, RuleAttribute, RuleMessage,
    SetAttribute, SetElementAttribute, SetElementFlags, SetElementList, SetElementMessage, SetFlags, SetMessage,
    TableAttribute, TableMessage, Verdict as Code, VerdictAttribute,
};
use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::device::nfnetlink::{self, Step};

const TABLE: &str = "guard";

/// Runs a test body in a fresh network namespace on a thread that ends with it.
fn in_namespace(name: &str, body: impl FnOnce() + Send + 'static) {
    if !nix::unistd::Uid::effective().is_root() {
        assert!(std::env::var_os("MESHSPAN_STRICT").is_none_or(|strict| strict != "1"), "{name}: run as root");
        eprintln!("SKIPPED {name}: run as root");
        return;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        body();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn config(networks: &[&str]) -> Config {
    let mut config = Config::default();
    config.mesh.extra_prefixes = nets(networks);
    config
}

/// What the host's firewall does to such a node, by its own means.
fn findings(networks: &[&str]) -> Vec<Finding> {
    let config = config(networks);
    firewall(&config, config.mesh.listen_port).unwrap()
}

/// The same with uplinks, which a fresh namespace has none of.
fn findings_with_uplinks() -> Vec<Finding> {
    check(&needs(&[]), &firewall_sources().unwrap())
}

fn change(steps: Vec<NfTablesMessage>) {
    let steps: Vec<Step> = steps.into_iter().map(|step| (step, NLM_F_CREATE)).collect();
    nfnetlink::transact(NetfilterProtoFamily::Inet, steps).unwrap();
}

fn table() -> NfTablesMessage {
    NfTablesMessage::NewTable(TableMessage { attributes: vec![TableAttribute::Name(TABLE.into())] })
}

fn base_chain(name: &str, hook: InetHookNumber, policy: u32) -> NfTablesMessage {
    NfTablesMessage::NewChain(ChainMessage {
        attributes: vec![
            ChainAttribute::Table(TABLE.into()),
            ChainAttribute::Name(name.into()),
            ChainAttribute::Hook(vec![HookAttribute::Number(hook.into()), HookAttribute::Priority(0)]),
            ChainAttribute::Policy(policy),
            ChainAttribute::Type("filter".into()),
        ],
    })
}

fn rule(chain: &str, expressions: Vec<Expressions>) -> NfTablesMessage {
    NfTablesMessage::NewRule(RuleMessage {
        attributes: vec![
            RuleAttribute::Table(TABLE.into()),
            RuleAttribute::Chain(chain.into()),
            RuleAttribute::Expressions(expressions.into_iter().map(Into::into).collect()),
        ],
    })
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

fn is_udp() -> [Expressions; 2] {
    [meta(MetaKey::L4Proto), equals(vec![17])]
}

fn destination_port() -> Expressions {
    Expressions::Payload(vec![
        Payload::DestinationRegister(Register::Reg1),
        Payload::Base(2),
        Payload::Offset(2),
        Payload::Len(2),
    ])
}

fn code(code: Code, chain: Option<&str>) -> DataAttribute {
    let chain = chain.map(|chain| VerdictAttribute::Chain(chain.to_owned()));
    DataAttribute::Verdict([VerdictAttribute::Code(code)].into_iter().chain(chain).collect())
}

fn accept() -> Expressions {
    Expressions::Immediate(vec![
        Immediate::DestinationRegister(Register::Verdict),
        Immediate::Data(code(Code::Other(1), None)),
    ])
}

/// Ranges of ports by their edges, the second of which lies outside; or a map from links to chains.
fn set(
    name: &str,
    id: u32,
    flags: SetFlags,
    key_length: u32,
    elements: Vec<Vec<SetElementAttribute>>,
) -> Vec<NfTablesMessage> {
    const NFT_DATA_VERDICT: u32 = 0xffff_ff00;
    let mut attributes = vec![
        SetAttribute::Table(TABLE.into()),
        SetAttribute::Name(name.into()),
        SetAttribute::Flags(flags),
        SetAttribute::KeyType(13),
        SetAttribute::KeyLen(key_length),
        SetAttribute::Id(id),
    ];
    if flags.contains(SetFlags::Map) {
        attributes.push(SetAttribute::DataType(NFT_DATA_VERDICT));
    }
    let elements = vec![
        SetElementList::Table(TABLE.into()),
        SetElementList::Set(name.into()),
        SetElementList::Elements(elements.into_iter().map(ListAttribute::Element).collect()),
    ];
    vec![
        NfTablesMessage::NewSet(SetMessage { attributes }),
        NfTablesMessage::NewSetElement(SetElementMessage { attributes: elements }),
    ]
}

fn key(bytes: Vec<u8>) -> SetElementAttribute {
    SetElementAttribute::Key(DataAttribute::Value(bytes))
}

fn edge(port: u16, is_end: bool) -> Vec<SetElementAttribute> {
    let end = is_end.then_some(SetElementAttribute::Flags(SetElementFlags::IntervalEnd));
    [key(port.to_be_bytes().to_vec())].into_iter().chain(end).collect()
}

#[test]
fn a_forward_policy_that_drops_is_named_and_nothing_is_said_without_it() {
    in_namespace("a_forward_policy_that_drops_is_named", || {
        assert!(findings(&["10.244.1.0/24"]).is_empty());
        change(vec![table(), base_chain("fwd", InetHookNumber::Forward, 1)]);
        assert!(findings(&["10.244.1.0/24"]).is_empty(), "it lets everything through");

        change(vec![base_chain("fwd", InetHookNumber::Forward, 0)]);
        let found = findings(&["10.244.1.0/24"]);
        assert_eq!(found.len(), 1, "{found:?}");
        let expected = "forwarded IPv4 packets from and to mesh0 may be dropped by this host's firewall (nftables): \
                        chain fwd of table inet guard drops them";
        assert!(found[0].what.starts_with(expected), "{found:?}");
        assert_eq!(
            found[0].fix,
            "nft insert rule inet guard fwd iifname mesh0 accept && nft insert rule inet guard fwd oifname mesh0 accept"
        );
        let note = findings(&[]);
        assert_eq!((note.len(), note[0].level), (1, Level::Note), "{note:?}");

        // What the command does.
        for side in [MetaKey::Iifname, MetaKey::Oifname] {
            change(vec![rule("fwd", vec![meta(side), equals(link("mesh0")), accept()])]);
        }
        assert!(findings(&["10.244.1.0/24"]).is_empty());
    });
}

#[test]
fn ports_in_sets_and_links_in_maps_are_looked_up() {
    in_namespace("ports_in_sets_and_links_in_maps_are_looked_up", || {
        change(vec![table(), base_chain("in", InetHookNumber::LocalIn, 0)]);
        let found = findings_with_uplinks();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].what.starts_with("IPv4 and IPv6 packets to UDP port 51872 may be dropped"), "{found:?}");
        assert_eq!(found[0].fix, "nft insert rule inet guard in udp dport 51872 accept");

        let look_up = |name: &str, to: Option<Register>| {
            let to = to.map(Lookup::DestinationRegister);
            let from = [Lookup::Set(name.into()), Lookup::SourceRegister(Register::Reg1)];
            Expressions::Lookup(from.into_iter().chain(to).collect())
        };
        // Zones by link, as firewalld has them; each a chain of its own.
        let zone = |name: &str| {
            let attributes = vec![ChainAttribute::Table(TABLE.into()), ChainAttribute::Name(name.into())];
            NfTablesMessage::NewChain(ChainMessage { attributes })
        };
        let to = |name: &str, chain| vec![key(link(name)), SetElementAttribute::Data(code(Code::Jump, Some(chain)))];
        let zones = set("zones", 1, SetFlags::Map, 16, vec![to("lo", "inside"), to("eth0", "outside")]);
        change([zone("inside"), zone("outside")].into_iter().chain(zones).collect());
        change(vec![rule("inside", vec![accept()])]);
        change(vec![rule("in", vec![meta(MetaKey::Iifname), look_up("zones", Some(Register::Verdict))])]);
        assert_eq!(findings_with_uplinks().len(), 1, "the zone of eth0 accepts nothing yet");

        let by_ports = |name: &str| {
            rule("outside", is_udp().into_iter().chain([destination_port(), look_up(name, None), accept()]).collect())
        };
        let ports = |name, id, edges: Vec<_>| set(name, id, SetFlags::Interval, 2, edges);
        change(ports("below", 2, vec![edge(50000, false), edge(51872, true)]));
        change(vec![by_ports("below")]);
        assert_eq!(findings_with_uplinks().len(), 1, "the range ends just below our port");
        change(ports("around", 3, vec![edge(51872, false), edge(51873, true), edge(60000, false), edge(60010, true)]));
        change(vec![by_ports("around")]);
        assert!(findings_with_uplinks().is_empty());
    });
}
