//! The rules of one router. Each set was classified from behind it before it was trusted (`tests/labs/nat.rs`).
//!
//! Invariants that make the kinds true:
//! - What comes from outside and belongs to nothing is dropped without a word and without a trace. If the router took it
//!   for itself, the kernel would remember it, and the inner host's next packet to that sender would get another port.
//! - A mapping is remembered by inner socket (`out`) and by outer port (`back`), refreshed by every packet of every flow,
//!   so it stays when two inner hosts use one port and when the flow that made it is forgotten.
//! - The table `inet fw` alone is the IPv6 firewall: address and port filtering, no translation.

use super::{Ports, Router};
use crate::gateway;
use crate::nft::rules::{
    Chain, ChainType, DNAT, Direction, ESTABLISHED, Family, Field, Hook, ICMP, ICMPV6, RELATED, Rule, Set, TCP, Table,
    UDP, Verdict,
};

/// Inner links begin with this.
pub const LAN: &str = "lan";
/// TCP ports that a router which blocks UDP lets out.
pub const OPEN_TCP_PORTS: [u16; 2] = [443, 7443];

const SHIFTED_PORTS: (u16, u16) = (20000, 29999);
const INNER: &[Field] = &[Field::OriginalSourceAddress, Field::OriginalSourcePort];
const INNER_OF_REPLY: &[Field] = &[Field::ReplySourceAddress, Field::ReplySourcePort];
const SOURCE: &[Field] = &[Field::SourceAddress, Field::SourcePort];

/// What a router does besides being of a kind.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The link to the outside.
    pub wan: &'static str,
    /// Other links to the outside, not translated: IPv6 leaves there.
    pub also_wan: Option<&'static str>,
    pub ports: Ports,
    /// Inner hosts reach each other by their outer addresses.
    pub hairpin: bool,
    /// How long a mapping without packets is remembered.
    pub mapping_seconds: u32,
    /// Inner hosts reach its port mapping service, if one runs.
    pub maps_ports: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { wan: "wan", also_wan: None, ports: Ports::Kept, hairpin: false, mapping_seconds: 120, maps_ports: false }
    }
}

/// No rules at all: a router that forwards everything.
pub fn none() -> Vec<Table> {
    vec![
        Table { family: Family::Inet, name: "fw", sets: Vec::new(), chains: Vec::new() },
        Table { family: Family::Ip, name: "nat", sets: Vec::new(), chains: Vec::new() },
    ]
}

/// A router that is being restarted: nothing passes, so nothing is remembered of what tries.
pub fn closed() -> Vec<Table> {
    let mut tables = none();
    tables[0].chains = vec![filter("inp", Hook::Input, Vec::new()), filter("forw", Hook::Forward, Vec::new())];
    tables
}

/// A network that has only a proxy on its router, at this TCP port: nothing is forwarded.
pub fn proxy_only(port: u16) -> Vec<Table> {
    let mut tables = tables(Router::UdpBlocked, &Options::default());
    for chain in &mut tables[0].chains {
        match chain.hook {
            Hook::Forward => chain.rules.clear(),
            _ => chain.rules.push(Rule::new().from_links_of(LAN).protocol(TCP).destination_port(port).accept()),
        }
    }
    tables
}

pub fn tables(router: Router, options: &Options) -> Vec<Table> {
    vec![firewall(router, options), translation(router, options)]
}

fn firewall(router: Router, options: &Options) -> Table {
    let known = || Rule::new().state(ESTABLISHED | RELATED).accept();
    let mut input = vec![
        Rule::new().from_link("lo").accept(),
        Rule::new().protocol(ICMPV6).accept(),
        Rule::new().from_links_of(LAN).protocol(ICMP).accept(),
        known(),
    ];
    if options.maps_ports {
        let services = [(UDP, 5351), (UDP, 1900), (TCP, gateway::HTTP_PORT)];
        input.extend(
            services.map(|(protocol, port)| {
                Rule::new().from_links_of(LAN).protocol(protocol).destination_port(port).accept()
            }),
        );
    }
    let mut forward = vec![known()];
    for wan in std::iter::once(options.wan).chain(options.also_wan) {
        let outward = || Rule::new().from_links_of(LAN).to_link(wan);
        if router == Router::UdpBlocked {
            let open = |port| outward().protocol(TCP).destination_port(port).accept();
            forward.extend(OPEN_TCP_PORTS.map(open));
        } else {
            forward.push(outward().accept());
        }
    }
    // By an open kind of NAT, or by a port that was asked for.
    forward.push(Rule::new().from_link(options.wan).status(DNAT).accept());
    if options.hairpin {
        forward.push(Rule::new().from_links_of(LAN).to_links_of(LAN).status(DNAT).accept());
    }
    Table {
        family: Family::Inet,
        name: "fw",
        sets: Vec::new(),
        chains: vec![filter("inp", Hook::Input, input), filter("forw", Hook::Forward, forward)],
    }
}

/// What no rule accepts is dropped.
fn filter(name: &'static str, hook: Hook, rules: Vec<Rule>) -> Chain {
    Chain { name, kind: ChainType::Filter, hook, priority: 0, policy: Verdict::Drop, rules }
}

fn translation(router: Router, options: &Options) -> Table {
    let (mut sets, mut chains) = (Vec::new(), Vec::new());
    let outward = || Rule::new().to_link(options.wan);
    let nat = |name, hook, priority, rules| Chain {
        name,
        kind: ChainType::Nat,
        hook,
        priority,
        policy: Verdict::Accept,
        rules,
    };
    if router == Router::EdmApdf {
        chains.push(nat("post", Hook::Postrouting, 100, vec![outward().masquerade_random()]));
    } else {
        sets = memory(options.mapping_seconds);
        chains.push(learn(options.wan));
        chains.push(nat("post", Hook::Postrouting, 100, source_rules(options)));
        let inward = || Rule::new().from_link(options.wan).protocol(UDP);
        let mut before = Vec::new();
        match router {
            Router::EimEif => before.push(inward().dnat_by(&[Field::DestinationPort], "back")),
            Router::EimAdf => before.push(
                inward()
                    .within(&[Field::SourceAddress, Field::DestinationPort], "ok")
                    .dnat_by(&[Field::DestinationPort], "back"),
            ),
            Router::EimApdf | Router::UdpBlocked | Router::EdmApdf => {}
        }
        if options.hairpin {
            let around = Rule::new().from_links_of(LAN).to_this_host().protocol(UDP);
            before.push(around.dnat_by(&[Field::DestinationPort], "back"));
        }
        chains.push(nat("pre", Hook::Prerouting, -100, before));
    }
    Table { family: Family::Ip, name: "nat", sets, chains }
}

fn source_rules(options: &Options) -> Vec<Rule> {
    let outward = || Rule::new().to_link(options.wan);
    let (first, last) = SHIFTED_PORTS;
    // A known inner socket keeps its outer port; where the port is another host's, a free one.
    let mut rules = vec![
        outward().protocol(UDP).snat_by(SOURCE, "out"),
        outward().protocol(UDP).within(&[Field::SourcePort], "used").masquerade_to(first, last),
    ];
    if options.ports == Ports::Shifted {
        rules.extend([TCP, UDP].map(|protocol| outward().protocol(protocol).masquerade_to(first, last)));
    }
    rules.push(outward().masquerade());
    if options.hairpin {
        let around = || Rule::new().from_links_of(LAN).to_links_of(LAN).status(DNAT);
        // The other side must see the outer address, which it can answer.
        rules.push(around().protocol(UDP).snat_by(SOURCE, "out"));
        rules.push(around().masquerade());
    }
    rules
}

fn memory(timeout_seconds: u32) -> Vec<Set> {
    let set = |name, key, value| Set { name, key, value, timeout_seconds };
    vec![
        set("out", INNER, SOURCE),
        set("back", &[Field::SourcePort], INNER),
        set("used", &[Field::SourcePort], &[]),
        set("ok", &[Field::DestinationAddress, Field::SourcePort], &[]),
    ]
}

/// After the translation of sources, so it sees the ports that were really taken; and unlike the chains that translate
/// it sees every packet of a flow.
fn learn(wan: &'static str) -> Chain {
    let udp = || Rule::new().protocol(UDP);
    Chain {
        name: "learn",
        kind: ChainType::Filter,
        hook: Hook::Postrouting,
        priority: 200,
        policy: Verdict::Accept,
        rules: vec![
            Rule::new().not_to_link(wan).accept(),
            udp().update("used", &[Field::SourcePort], &[]),
            udp().update("ok", &[Field::DestinationAddress, Field::SourcePort], &[]),
            udp().direction(Direction::Original).update("out", INNER, SOURCE),
            udp().direction(Direction::Original).update("back", &[Field::SourcePort], INNER),
            udp().direction(Direction::Reply).update("out", INNER_OF_REPLY, SOURCE),
            udp().direction(Direction::Reply).update("back", &[Field::SourcePort], INNER_OF_REPLY),
        ],
    }
}
