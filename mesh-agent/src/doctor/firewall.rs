//! The host's own firewall: does it let in our UDP port, does it forward to and from the mesh link?

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ipnet::IpNet;

use super::nftables::Family;
use super::ruleset::{Field, Hook, Packet, Table};
use super::{Finding, Level};

/// `NFPROTO_*`, `ETH_P_*` and `IPPROTO_*`.
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Of connection tracking: the first packet of a connection.
const NEW: u32 = 8;

/// What of the host a firewall has to let through.
#[derive(Debug, Clone)]
pub(super) struct Needs<'a> {
    pub(super) interface: &'a str,
    pub(super) port: u16,
    /// Networks behind this node that it announces.
    pub(super) networks: &'a [IpNet],
    /// The links of the default routes, which peers' packets come by; `None` = no such route.
    pub(super) uplink_v4: Option<String>,
    pub(super) uplink_v6: Option<String>,
    /// Numbers of links by name.
    pub(super) indices: BTreeMap<String, u32>,
}

/// A table that may drop packets, and where it was read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) family: Family,
    pub(super) name: String,
    pub(super) table: Table,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum IpVersion {
    V4,
    V6,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// To our UDP port.
    In,
    FromMesh,
    ToMesh,
}

/// Who writes a table, and so how one talks to it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Tool {
    Docker,
    Ufw,
    Firewalld,
    Iptables,
    Nft { family: Family, table: String, chain: String },
}

/// A place where packets end, for which ways and IP versions.
type Ends = BTreeMap<(Hook, Tool), Vec<(Way, IpVersion, String)>>;

pub(super) fn check(needs: &Needs<'_>, sources: &[Source]) -> Vec<Finding> {
    let mut ends = Ends::new();
    for (way, version) in ways(needs) {
        let packet = packet(needs, way, version);
        for source in sources.iter().filter(|source| source.sees(version)) {
            for chain in source.table.dropping(way.hook(), &packet) {
                let place = format!("chain {chain} of table {} {}", source.family.word(), source.name);
                ends.entry((way.hook(), source.tool(way.hook(), chain))).or_default().push((way, version, place));
            }
        }
    }
    ends.into_iter().map(|((hook, tool), ends)| finding(needs, hook, &tool, &ends)).collect()
}

/// A node that announces nothing forwards nothing for the mesh but what its own containers begin.
fn ways(needs: &Needs<'_>) -> Vec<(Way, IpVersion)> {
    let mut ways = Vec::new();
    for (version, uplink) in [(IpVersion::V4, &needs.uplink_v4), (IpVersion::V6, &needs.uplink_v6)] {
        if uplink.is_some() {
            ways.push((Way::In, version));
        }
        let announces = needs.networks.iter().any(|net| IpVersion::of(net) == version);
        if announces {
            ways.push((Way::FromMesh, version));
        }
        if announces || needs.networks.is_empty() && version == IpVersion::V4 {
            ways.push((Way::ToMesh, version));
        }
    }
    ways
}

fn packet(needs: &Needs<'_>, way: Way, version: IpVersion) -> Packet {
    let (nfproto, ethertype, uplink) = match version {
        IpVersion::V4 => (NFPROTO_IPV4, ETH_P_IP, &needs.uplink_v4),
        IpVersion::V6 => (NFPROTO_IPV6, ETH_P_IPV6, &needs.uplink_v6),
    };
    let mut packet = Packet { is_begun_here: needs.networks.is_empty() && way == Way::ToMesh, ..Packet::default() };
    packet.fields.insert(Field::Family, vec![nfproto]);
    packet.fields.insert(Field::EtherType, ethertype.to_be_bytes().to_vec());
    packet.fields.insert(Field::Connection, NEW.to_ne_bytes().to_vec());
    packet.fields.insert(Field::Protocol, vec![if way == Way::In { UDP } else { TCP }]);
    let mut come_by = |name: Field, index: Field, link: &str| {
        let mut bytes = link.as_bytes().to_vec();
        bytes.resize(libc::IFNAMSIZ, 0);
        packet.fields.insert(name, bytes);
        if let Some(number) = needs.indices.get(link) {
            packet.fields.insert(index, number.to_ne_bytes().to_vec());
        }
    };
    match (way, uplink) {
        (Way::In, Some(uplink)) => come_by(Field::InputName, Field::InputIndex, uplink),
        (Way::In, None) => {}
        (Way::FromMesh, _) => come_by(Field::InputName, Field::InputIndex, needs.interface),
        (Way::ToMesh, _) => come_by(Field::OutputName, Field::OutputIndex, needs.interface),
    }
    packet.ours = match way {
        Way::In => vec![Field::DestinationPort],
        Way::FromMesh => vec![Field::InputName, Field::InputIndex],
        Way::ToMesh => vec![Field::OutputName, Field::OutputIndex],
    };
    if way == Way::In {
        packet.fields.insert(Field::DestinationPort, needs.port.to_be_bytes().to_vec());
    }
    packet
}

fn finding(needs: &Needs<'_>, hook: Hook, tool: &Tool, ends: &[(Way, IpVersion, String)]) -> Finding {
    let has = |wanted: IpVersion| ends.iter().any(|(_, version, _)| *version == wanted);
    let versions = match (has(IpVersion::V4), has(IpVersion::V6)) {
        (true, true) => "IPv4 and IPv6",
        (true, false) => "IPv4",
        _ => "IPv6",
    };
    let goes = |wanted: Way| ends.iter().any(|(way, ..)| *way == wanted);
    let link = needs.interface;
    let packets = match hook {
        Hook::Input => format!("{versions} packets to UDP port {}", needs.port),
        Hook::Forward => {
            let direction = match (goes(Way::FromMesh), goes(Way::ToMesh)) {
                (true, true) => "from and to",
                (true, false) => "from",
                _ => "to",
            };
            format!("forwarded {versions} packets {direction} {link}")
        }
    };
    let mut places: Vec<&str> = ends.iter().map(|(.., place)| place.as_str()).collect();
    places.sort_unstable();
    places.dedup();
    let mut what = format!("{packets} may be dropped by this host's firewall ({}): ", tool.name());
    let _ = write!(what, "{} drops them, and no rule accepts them", places.join(" and "));
    let affected: Vec<String> = needs.networks.iter().map(ToString::to_string).collect();
    match (hook, affected.is_empty()) {
        (Hook::Input, _) => what.push_str("; peers reach this node only after it spoke to them first"),
        (Hook::Forward, false) => {
            let _ = write!(what, "; {} behind this node and the mesh do not reach each other", affected.join(", "));
        }
        (Hook::Forward, true) => what.push_str("; containers of this node do not reach the mesh"),
    }
    let level = if hook == Hook::Forward && affected.is_empty() { Level::Note } else { Level::Problem };
    Finding { level, ..Finding::problem("firewall", what, tool.fix(needs, hook, has)) }
}

impl Tool {
    fn name(&self) -> &'static str {
        match self {
            Self::Docker => "Docker",
            Self::Ufw => "ufw",
            Self::Firewalld => "firewalld",
            Self::Iptables => "iptables",
            Self::Nft { .. } => "nftables",
        }
    }

    fn fix(&self, needs: &Needs<'_>, hook: Hook, has: impl Fn(IpVersion) -> bool) -> String {
        let (link, port) = (needs.interface, needs.port);
        match (self, hook) {
            (Self::Ufw, Hook::Input) => format!("ufw allow {port}/udp"),
            (Self::Ufw, Hook::Forward) => format!("ufw route allow in on {link} && ufw route allow out on {link}"),
            (Self::Firewalld, Hook::Input) => {
                format!("firewall-cmd --permanent --add-port={port}/udp && firewall-cmd --reload")
            }
            (Self::Firewalld, Hook::Forward) => {
                let sources: String = needs.networks.iter().map(|net| format!(" --add-source={net}")).collect();
                format!(
                    "firewall-cmd --permanent --zone=trusted --add-interface={link}{sources} && firewall-cmd --reload"
                )
            }
            (Self::Docker, _) => {
                let rules = for_each_version(has, |program| {
                    format!(
                        "{program} -I DOCKER-USER -i {link} -j ACCEPT && {program} -I DOCKER-USER -o {link} -j ACCEPT"
                    )
                });
                format!("{rules} (once after each boot)")
            }
            (Self::Iptables, Hook::Input) => {
                for_each_version(has, |program| format!("{program} -I INPUT -p udp --dport {port} -j ACCEPT"))
            }
            (Self::Iptables, Hook::Forward) => for_each_version(has, |program| {
                format!("{program} -I FORWARD -i {link} -j ACCEPT && {program} -I FORWARD -o {link} -j ACCEPT")
            }),
            (Self::Nft { family, table, chain }, hook) => {
                let rule = format!("nft insert rule {} {table} {chain}", family.word());
                match hook {
                    Hook::Input => format!("{rule} udp dport {port} accept"),
                    Hook::Forward => format!("{rule} iifname {link} accept && {rule} oifname {link} accept"),
                }
            }
        }
    }
}

fn for_each_version(has: impl Fn(IpVersion) -> bool, command: impl Fn(&str) -> String) -> String {
    let programs = [(IpVersion::V4, "iptables"), (IpVersion::V6, "ip6tables")];
    let commands = programs.into_iter().filter(|(version, _)| has(*version)).map(|(_, program)| command(program));
    commands.collect::<Vec<_>>().join(" && ")
}

impl Source {
    fn sees(&self, version: IpVersion) -> bool {
        match self.family {
            Family::Ipv4 => version == IpVersion::V4,
            Family::Ipv6 => version == IpVersion::V6,
            Family::Inet => true,
        }
    }

    fn tool(&self, hook: Hook, chain: &str) -> Tool {
        let has = |start: &str| self.table.chains.keys().any(|chain| chain.starts_with(start));
        if self.name == "firewalld" {
            Tool::Firewalld
        } else if hook == Hook::Forward && has("DOCKER-USER") {
            Tool::Docker
        } else if has("ufw-") || has("ufw6-") {
            Tool::Ufw
        } else if self.name == "filter" && matches!(chain, "INPUT" | "FORWARD") && self.family != Family::Inet {
            Tool::Iptables
        } else {
            Tool::Nft { family: self.family, table: self.name.clone(), chain: chain.to_owned() }
        }
    }
}

impl Family {
    /// As `nft` has it.
    fn word(self) -> &'static str {
        match self {
            Self::Ipv4 => "ip",
            Self::Ipv6 => "ip6",
            Self::Inet => "inet",
        }
    }
}

impl Way {
    fn hook(self) -> Hook {
        match self {
            Self::In => Hook::Input,
            Self::FromMesh | Self::ToMesh => Hook::Forward,
        }
    }
}

impl IpVersion {
    fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }
}
