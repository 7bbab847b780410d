//! Links, addresses, routes and rules of the calling thread's namespace, as text.

use std::{collections::BTreeMap, fmt::Write, net::IpAddr};

use anyhow::Result;
use futures_util::TryStreamExt;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage},
    rule::{RuleAttribute, RuleFlags, RuleMessage},
};

use super::{Kind, Snapshot};
use crate::link::{all_routes, all_rules, converse, table_of};

type Names = BTreeMap<u32, String>;

pub(super) fn dump(snapshot: &mut Snapshot) -> Result<()> {
    converse(|handle| async move {
        let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
        let names: Names = links.iter().map(|link| (link.header.index, name_of(link))).collect();
        for link in &links {
            snapshot.add(Kind::Link, link_text(link, &names));
        }
        let addresses: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
        for address in &addresses {
            snapshot.add(Kind::Address, address_text(address, &names));
        }
        for route in all_routes(&handle).await? {
            snapshot.add(Kind::Route, route_text(&route, &names));
        }
        for rule in all_rules(&handle).await? {
            snapshot.add(Kind::Rule, rule_text(&rule));
        }
        Ok(())
    })
}

fn name_of(link: &LinkMessage) -> String {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
        .unwrap_or_else(|| format!("#{}", link.header.index))
}

fn named(names: &Names, index: u32) -> String {
    names.get(&index).cloned().unwrap_or_else(|| format!("#{index}"))
}

fn link_text(link: &LinkMessage, names: &Names) -> String {
    let mut text = name_of(link);
    text += if link.header.flags.contains(LinkFlags::Up) { " up" } else { " down" };
    for attribute in &link.attributes {
        let _ = match attribute {
            LinkAttribute::Mtu(mtu) => write!(text, " mtu {mtu}"),
            LinkAttribute::Controller(index) => write!(text, " master {}", named(names, *index)),
            LinkAttribute::LinkInfo(infos) => infos.iter().try_for_each(|info| match info {
                LinkInfo::Kind(kind) => write!(text, " kind {kind}"),
                _ => Ok(()),
            }),
            _ => Ok(()),
        };
    }
    text
}

fn address_text(address: &AddressMessage, names: &Names) -> String {
    let mut text = named(names, address.header.index);
    for attribute in &address.attributes {
        let _ = match attribute {
            AddressAttribute::Address(ip) => write!(text, " {ip}/{}", address.header.prefix_len),
            AddressAttribute::Local(ip) => write!(text, " local {ip}"),
            _ => Ok(()),
        };
    }
    text
}

fn route_text(route: &RouteMessage, names: &Names) -> String {
    let header = &route.header;
    let family = if header.address_family == AddressFamily::Inet6 { "v6" } else { "v4" };
    let mut rest = String::new();
    let mut destination = "default".to_owned();
    for attribute in &route.attributes {
        let _ = match attribute {
            RouteAttribute::Destination(address) => {
                destination = format!("{}/{}", address_of(address), header.destination_prefix_length);
                Ok(())
            }
            RouteAttribute::Source(address) => {
                write!(rest, " from {}/{}", address_of(address), header.source_prefix_length)
            }
            RouteAttribute::Gateway(address) => write!(rest, " via {}", address_of(address)),
            RouteAttribute::Via(via) => write!(rest, " via {via:?}"),
            RouteAttribute::Oif(index) => write!(rest, " dev {}", named(names, *index)),
            RouteAttribute::PrefSource(address) => write!(rest, " src {}", address_of(address)),
            RouteAttribute::Priority(metric) => write!(rest, " metric {metric}"),
            RouteAttribute::Metrics(metrics) => write!(rest, " {metrics:?}"),
            RouteAttribute::MultiPath(hops) => write!(rest, " {hops:?}"),
            _ => Ok(()),
        };
    }
    format!(
        "{family} table {} {:?} {destination}{rest} proto {} scope {}",
        table_of(route),
        header.kind,
        header.protocol,
        header.scope
    )
}

fn address_of(address: &RouteAddress) -> String {
    match address {
        RouteAddress::Inet(ip) => IpAddr::from(*ip).to_string(),
        RouteAddress::Inet6(ip) => IpAddr::from(*ip).to_string(),
        other => format!("{other:?}"),
    }
}

fn rule_text(rule: &RuleMessage) -> String {
    let header = &rule.header;
    let family = if header.family == AddressFamily::Inet6 { "v6" } else { "v4" };
    let mut parts: Vec<String> = rule
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => Some(format!("pref {priority}")),
            RuleAttribute::FwMark(mark) => Some(format!("fwmark {mark:#x}")),
            RuleAttribute::FwMask(mask) => Some(format!("mask {mask:#x}")),
            RuleAttribute::Table(table) => Some(format!("lookup {table}")),
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::SuppressIfGroup(u32::MAX) => None,
            RuleAttribute::Protocol(protocol) => Some(format!("proto {protocol}")),
            other => Some(format!("{other:?}")),
        })
        .collect();
    parts.sort();
    // The kernel gives the default rule of priority 0 no priority attribute.
    let not = if header.flags.contains(RuleFlags::Invert) { "not " } else { "" };
    format!("{family} {not}{} {:?}", parts.join(" "), header.action)
}
