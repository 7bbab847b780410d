//! The routes of our table, both families.
//!
//! Owns the whole of table 818: what is not in one of our shapes is [`RouteKind::Foreign`] and kept with the message
//! that deletes exactly it. Other tables are never touched.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_common::limits::ROUTE_TABLE;
use mesh_proto::device::{Route, RouteKind};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::Handle;

use super::collect;

pub(super) mod batch;

/// Every network namespace makes its loopback first; reject routes of IPv6 stand on it.
const LOOPBACK: u32 = 1;

/// Our table as last read, and as changed since by our own steps.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// A prefix and a metric hold one route: adding another replaces it.
    slots: BTreeMap<(IpNet, u32), Route>,
    foreign: BTreeMap<Route, Vec<RouteMessage>>,
}

impl Table {
    pub(super) fn routes(&self) -> BTreeSet<Route> {
        self.slots.values().chain(self.foreign.keys()).cloned().collect()
    }

    pub(super) fn added(&mut self, route: &Route) {
        self.slots.insert((route.prefix, metric(&route.kind)), route.clone());
    }

    pub(super) fn removed(&mut self, route: &Route) {
        self.foreign.remove(route);
        let slot = (route.prefix, metric(&route.kind));
        if self.slots.get(&slot) == Some(route) {
            self.slots.remove(&slot);
        }
    }

    /// Empty when another route of ours took the place: the kernel tells them apart by prefix, metric and link only.
    pub(super) fn messages_to_remove(&self, route: &Route, link: Option<u32>) -> Vec<RouteMessage> {
        if let RouteKind::Foreign { .. } = route.kind {
            return self.foreign.get(route).cloned().unwrap_or_default();
        }
        match self.slots.get(&(route.prefix, metric(&route.kind))) {
            Some(other) if other != route => Vec::new(),
            // Without the link its routes are gone too.
            _ if needs_link(route) && link.is_none() => Vec::new(),
            _ => message(route, link).into_iter().collect(),
        }
    }
}

pub(super) fn needs_link(route: &Route) -> bool {
    matches!(route.kind, RouteKind::Dev { .. })
}

/// Reads our table; `link` is the index of ours.
pub(super) async fn observe(handle: &Handle, link: Option<u32>) -> io::Result<Table> {
    let mut table = Table::default();
    for message in dump(handle).await? {
        let Some(route) = read(&message, link) else {
            continue;
        };
        match route.kind {
            RouteKind::Foreign { .. } => table.foreign.entry(route).or_default().push(for_removal(message)),
            _ => table.added(&route),
        }
    }
    Ok(table)
}

/// Everything in our table, whoever put it there.
pub(super) async fn dump(handle: &Handle) -> io::Result<Vec<RouteMessage>> {
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        request.attributes.push(RouteAttribute::Table(ROUTE_TABLE));
        match collect(handle.route().get(request).execute()).await {
            Ok(messages) => all.extend(messages.into_iter().filter(|message| table_of(message) == ROUTE_TABLE)),
            // The kernel makes a table with its first route.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            // A kernel without IPv6 has no such dump.
            Err(error) if family == AddressFamily::Inet6 && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// The request that adds or deletes `route`; `None` for a foreign one.
pub(super) fn message(route: &Route, link: Option<u32>) -> Option<RouteMessage> {
    let v4 = route.prefix.addr().is_ipv4();
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    header.destination_prefix_length = route.prefix.prefix_len();
    // systemd-networkd leaves routes of this protocol alone; the table says whose they are.
    header.protocol = RouteProtocol::Kernel;
    header.scope = if v4 && needs_link(route) { RouteScope::Link } else { RouteScope::Universe };
    header.kind = match route.kind {
        RouteKind::Dev { .. } => RouteType::Unicast,
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Throw => RouteType::Throw,
        RouteKind::Foreign { .. } => return None,
    };
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(ROUTE_TABLE));
    attributes.push(RouteAttribute::Destination(route.prefix.network().into()));
    attributes.push(RouteAttribute::Priority(metric(&route.kind)));
    match &route.kind {
        RouteKind::Dev { mtu, source } => {
            attributes.extend(link.map(RouteAttribute::Oif));
            attributes.extend(source.map(|source| RouteAttribute::PrefSource(source.into())));
            attributes.extend(mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu.into())])));
        }
        // IPv4 refuses a link here. IPv6 deletes by metric and link, whatever the kind.
        _ if v4 => {}
        _ => attributes.push(RouteAttribute::Oif(LOOPBACK)),
    }
    Some(message)
}

/// What a dumped route must be reduced to, so that sending it back deletes it and nothing else.
pub(super) fn for_removal(mut message: RouteMessage) -> RouteMessage {
    message.header.flags = Default::default();
    let by_object = message.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::NhId(_)));
    message.attributes.retain(|attribute| match attribute {
        RouteAttribute::CacheInfo(_) | RouteAttribute::Expires(_) | RouteAttribute::Preference(_) => false,
        // A next hop object and its spelled-out form exclude each other in a request.
        RouteAttribute::Oif(_) | RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_) => {
            !by_object
        }
        _ => true,
    });
    message
}

fn metric(kind: &RouteKind) -> u32 {
    match kind {
        // The same metric, so that one replaces the other without a gap.
        RouteKind::Dev { .. } | RouteKind::Throw => RouteKind::DEV_METRIC,
        RouteKind::Unreachable => RouteKind::FLOOR_METRIC,
        RouteKind::Foreign { metric, .. } => *metric,
    }
}

fn table_of(message: &RouteMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or(message.header.table.into())
}

fn read(message: &RouteMessage, link: Option<u32>) -> Option<Route> {
    let header = &message.header;
    let v4 = header.address_family == AddressFamily::Inet;
    let (mut destination, mut priority, mut oif, mut source, mut mtu) = (None, 0, None, None, None);
    let mut strange = header.tos != 0 || header.source_prefix_length != 0 || header.protocol != RouteProtocol::Kernel;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(_) | RouteAttribute::Preference(_) => {}
            RouteAttribute::Destination(address) => destination = to_ip(address),
            RouteAttribute::Priority(value) => priority = *value,
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::PrefSource(address) => source = to_ip(address),
            RouteAttribute::CacheInfo(info) => strange |= info.expires != 0,
            RouteAttribute::Metrics(metrics) => match metrics.as_slice() {
                [RouteMetric::Mtu(value)] => mtu = Some(*value),
                _ => strange = true,
            },
            _ => strange = true,
        }
    }
    let unspecified = if v4 { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    let prefix = IpNet::new(destination.unwrap_or(unspecified), header.destination_prefix_length).ok()?;
    let plain = source.is_none() && mtu.is_none() && (oif.is_none() || oif == Some(LOOPBACK));
    let kind = match header.kind {
        RouteType::Unicast if !strange && priority == RouteKind::DEV_METRIC && oif.is_some() && oif == link => {
            u16::try_from(mtu.unwrap_or(0))
                .ok()
                .map(|value| RouteKind::Dev { mtu: (value != 0).then_some(value), source })
        }
        RouteType::Unreachable if !strange && plain && priority == RouteKind::FLOOR_METRIC => {
            Some(RouteKind::Unreachable)
        }
        RouteType::Throw if !strange && plain && priority == RouteKind::DEV_METRIC => Some(RouteKind::Throw),
        _ => None,
    };
    let kind = kind.unwrap_or_else(|| RouteKind::Foreign { metric: priority, description: describe(message) });
    Some(Route { prefix, kind })
}

/// A stable text of everything that tells this route from another of the same prefix and metric.
fn describe(message: &RouteMessage) -> String {
    let header = &message.header;
    let mut text = format!("{:?} proto {} scope {}", header.kind, header.protocol, header.scope).to_lowercase();
    if header.tos != 0 {
        let _ = write!(text, " tos {}", header.tos);
    }
    for attribute in &message.attributes {
        let _ = match attribute {
            RouteAttribute::Gateway(address) => match to_ip(address) {
                Some(address) => write!(text, " via {address}"),
                None => write!(text, " via {address:?}"),
            },
            RouteAttribute::Oif(index) => write!(text, " dev #{index}"),
            RouteAttribute::PrefSource(address) => match to_ip(address) {
                Some(address) => write!(text, " src {address}"),
                None => write!(text, " src {address:?}"),
            },
            RouteAttribute::Table(_)
            | RouteAttribute::Destination(_)
            | RouteAttribute::Priority(_)
            | RouteAttribute::CacheInfo(_)
            | RouteAttribute::Preference(_) => Ok(()),
            other => write!(text, " {other:?}"),
        };
    }
    text
}

fn to_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(addr) => Some((*addr).into()),
        RouteAddress::Inet6(addr) => Some((*addr).into()),
        _ => None,
    }
}
