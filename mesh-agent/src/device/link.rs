//! Links and addresses: ours is configured, all others are the underlay and only read.
//!
//! Refuses nothing by itself; which index is ours is the caller's knowledge. Addresses of global scope only.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_proto::device::{Link, UnderlayLink};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::Handle;

use super::{ApplyError, accept, collect, doing, rp_filter};

/// Links that carry another overlay or a container network, by name: nodes must not be told to reach us through them.
const VIRTUAL_NAMES: [(&str, &str); 19] = [
    ("cni", "container bridge"),
    ("docker", "container bridge"),
    ("podman", "container bridge"),
    ("lxcbr", "container bridge"),
    ("lxdbr", "container bridge"),
    ("virbr", "container bridge"),
    ("kube-ipvs", "service addresses"),
    ("kube-dummy-if", "service addresses"),
    ("nodelocaldns", "service addresses"),
    ("cilium_", "cilium"),
    ("lxc", "cilium"),
    ("cali", "calico"),
    ("vxlan.calico", "calico"),
    ("wireguard.cali", "calico"),
    ("flannel", "flannel"),
    ("tunl", "ipip"),
    ("kilo", "kilo"),
    ("wt", "netbird"),
    ("tailscale", "tailscale"),
];

/// Link kinds that are tunnels or hold addresses of no wire.
const VIRTUAL_KINDS: [&str; 21] = [
    "tun",
    "wireguard",
    "vxlan",
    "geneve",
    "gre",
    "gretap",
    "ip6gre",
    "ip6gretap",
    "erspan",
    "ip6erspan",
    "ipip",
    "sit",
    "ip6tnl",
    "vti",
    "vti6",
    "xfrm",
    "dummy",
    "ifb",
    "nlmon",
    "gtp",
    "bareudp",
];

/// The alias of a link that an agent made. A TUN dies with the process, so one that stands shows an agent that is on.
const ALIAS: &str = "meshspan";

/// One link as the kernel shows it.
#[derive(Debug, Clone, Default)]
pub(super) struct HostLink {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) up: bool,
    pub(super) loopback: bool,
    pub(super) mtu: u32,
    /// `None` for hardware.
    pub(super) kind: Option<String>,
    /// The bridge, bond or VRF it is a port of.
    pub(super) controller: Option<u32>,
    /// The link's own reverse path filter, `all` left out.
    pub(super) rp_filter: u8,
    pub(super) is_of_an_agent: bool,
}

/// One address on some link.
#[derive(Debug, Clone)]
pub(super) struct HostAddress {
    index: u32,
    net: IpNet,
    /// As the kernel wants it back for a removal.
    message: AddressMessage,
}

pub(super) async fn dump(handle: &Handle) -> io::Result<Vec<HostLink>> {
    Ok(collect(handle.link().get().execute()).await?.into_iter().map(HostLink::read).collect())
}

/// Usable addresses of global scope, in the kernel's order.
pub(super) async fn dump_addresses(handle: &Handle) -> io::Result<Vec<HostAddress>> {
    Ok(collect(handle.address().get().execute()).await?.into_iter().filter_map(HostAddress::read).collect())
}

pub(super) fn global_addresses(addresses: &[HostAddress], index: u32) -> impl Iterator<Item = IpNet> {
    addresses.iter().filter(move |address| address.index == index).map(|address| address.net)
}

/// Every link that is up, not loopback and not ours.
pub(super) fn underlay(
    links: &[HostLink],
    addresses: &[HostAddress],
    ours: Option<u32>,
    rp_filter_all: u8,
) -> Vec<UnderlayLink> {
    let mut ports: BTreeMap<u32, Vec<&HostLink>> = BTreeMap::new();
    for link in links {
        if let Some(controller) = link.controller {
            ports.entry(controller).or_default().push(link);
        }
    }
    links
        .iter()
        .filter(|link| link.up && !link.loopback && Some(link.index) != ours)
        .map(|link| UnderlayLink {
            name: link.name.clone(),
            addresses: global_addresses(addresses, link.index).collect(),
            rp_filter: link.rp_filter.max(rp_filter_all),
            virtual_kind: virtual_kind(link, ports.get(&link.index).map_or(&[], Vec::as_slice)),
        })
        .collect()
}

/// See [`super::HostDevice::configure_link`].
pub(super) async fn configure(handle: &Handle, index: u32, wanted: &Link) -> Result<(), ApplyError> {
    let name = &wanted.name;
    // Before it comes up: no link-local address, so nothing of ours speaks neighbour or router discovery there.
    accept(
        handle.link().change(without_link_local(index)).execute().await,
        &[libc::EOPNOTSUPP, libc::EAFNOSUPPORT, libc::EINVAL],
    )
    .map_err(doing(|| format!("configure link {name}")))?;
    allow_ipv6(name);
    accept(handle.link().change(up(index, wanted.mtu)).execute().await, &[])
        .map_err(doing(|| format!("set MTU {} of link {name} and bring it up", wanted.mtu)))?;
    rp_filter::set(handle, index, name, rp_filter::LOOSE).await?;

    let present: Vec<HostAddress> = dump_addresses(handle)
        .await
        .map_err(doing(|| "list the addresses".into()))?
        .into_iter()
        .filter(|address| address.index == index)
        .collect();
    for address in present.iter().filter(|address| !wanted.addresses.contains(&address.net)) {
        let gone = [libc::EADDRNOTAVAIL, libc::ENODEV, libc::ENOENT];
        accept(handle.address().del(address.message.clone()).execute().await, &gone)
            .map_err(doing(|| format!("remove address {} from link {name}", address.net)))?;
    }
    let present: BTreeSet<IpNet> = present.iter().map(|address| address.net).collect();
    for net in wanted.addresses.difference(&present) {
        let mut request = handle.address().add(index, net.addr(), net.prefix_len());
        let mut flags = AddressFlags::Noprefixroute;
        if net.addr().is_ipv6() {
            flags |= AddressFlags::Nodad;
        }
        // The builder sets a broadcast address, which a /32 must not have.
        let message = request.message_mut();
        message
            .attributes
            .retain(|attribute| !matches!(attribute, AddressAttribute::Broadcast(_) | AddressAttribute::Flags(_)));
        message.attributes.push(AddressAttribute::Flags(flags));
        accept(request.execute().await, &[libc::EEXIST])
            .map_err(doing(|| format!("add address {net} to link {name}")))?;
    }
    Ok(())
}

pub(super) async fn delete(handle: &Handle, index: u32) -> io::Result<()> {
    accept(handle.link().del(index).execute().await, &[libc::ENODEV, libc::ENOENT])
}

fn up(index: u32, mtu: u16) -> LinkMessage {
    let mut message = up_alone(index);
    message.attributes.push(LinkAttribute::Mtu(mtu.into()));
    message.attributes.push(LinkAttribute::IfAlias(ALIAS.into()));
    message
}

/// Nothing but up.
pub(super) fn up_alone(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message
}

pub(super) fn without_link_local(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])]));
    message
}

/// Hardened hosts disable IPv6 on every new link and some accept router advertisements everywhere; netlink has no
/// request for either. Best effort: where /proc/sys cannot be written, adding the address tells what is wrong, and
/// advertisements cannot arrive because no peer owns a link-local source.
fn allow_ipv6(name: &str) {
    for key in ["disable_ipv6", "accept_ra"] {
        let path = format!("/proc/sys/net/ipv6/conf/{name}/{key}");
        if let Err(error) = std::fs::write(&path, "0") {
            tracing::debug!(%path, %error, "left as it is");
        }
    }
}

fn virtual_kind(link: &HostLink, ports: &[&HostLink]) -> Option<String> {
    if let Some((_, what)) = VIRTUAL_NAMES.iter().find(|(prefix, _)| link.name.starts_with(prefix)) {
        return Some((*what).to_owned());
    }
    let kind = link.kind.as_deref()?;
    // A bridge is the uplink itself on many hypervisors: it is one if anything but guests is plugged into it.
    let is_virtual = VIRTUAL_KINDS.contains(&kind)
        || (kind == "bridge" && ports.iter().all(|port| matches!(port.kind.as_deref(), Some("veth" | "tun"))));
    is_virtual.then(|| kind.to_owned())
}

impl HostLink {
    fn read(message: LinkMessage) -> Self {
        let flags = message.header.flags;
        let mut link = Self {
            index: message.header.index,
            up: flags.contains(LinkFlags::Up),
            loopback: flags.contains(LinkFlags::Loopback),
            ..Self::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::IfAlias(alias) => link.is_of_an_agent = alias == ALIAS,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                }
                LinkAttribute::AfSpecUnspec(specs) => {
                    for spec in specs.iter().flat_map(|spec| match spec {
                        AfSpecUnspec::Inet(specs) => specs.as_slice(),
                        _ => &[],
                    }) {
                        if let AfSpecInet::DevConf(conf) = spec {
                            link.rp_filter = u8::try_from(conf.rp_filter).unwrap_or(0);
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

impl HostAddress {
    fn read(message: AddressMessage) -> Option<Self> {
        if message.header.scope != AddressScope::Universe {
            return None;
        }
        let (mut local, mut address) = (None, None);
        let mut unusable =
            message.header.flags.intersects(AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(addr) => local = Some(*addr),
                AddressAttribute::Address(addr) => address = Some(*addr),
                AddressAttribute::Flags(flags) => {
                    unusable |= flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed)
                }
                _ => {}
            }
        }
        // On a point-to-point link the other attribute is the far end, so the prefix is not ours.
        let net = match (local, address) {
            (Some(local), Some(far)) if local != far => IpNet::from(local),
            (Some(addr), _) | (None, Some(addr)) => net(addr, message.header.prefix_len)?,
            (None, None) => return None,
        };
        (!unusable).then_some(Self { index: message.header.index, net, message })
    }
}

fn net(addr: IpAddr, len: u8) -> Option<IpNet> {
    IpNet::new(addr, len).ok()
}
