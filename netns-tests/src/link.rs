//! Links, addresses, routes, rules and forwarding of a host, over rtnetlink.
//!
//! Each call opens its own netlink socket inside the host and closes it again, so that no socket of the lab shows in a
//! dump or keeps a namespace alive.

use std::{
    future::Future,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd,
};

use anyhow::{Context, Result, anyhow};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, IpProtocol,
    address::{AddressHeaderFlags, AddressMessage},
    link::{InfoData, InfoVeth, LinkAttribute},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use rtnetlink::{Handle, IpVersion, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::{ethtool, host::Host};

pub const MAIN_TABLE: u32 = 254;

/// Where a planted route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    Gateway(IpAddr),
    Link(String),
    Unreachable,
}

/// What the kernel answers when it is asked for a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    pub link: Option<String>,
    pub table: Option<u32>,
    /// What a packet's sender would be told instead.
    pub error: Option<String>,
}

/// Joins two hosts by a veth pair and sets both ends up.
pub fn connect(a: &Host, a_link: &str, b: &Host, b_link: &str) -> Result<()> {
    let peer = LinkMessageBuilder::<LinkUnspec>::new().name(b_link).setns_by_fd(b.netns().as_raw_fd()).build();
    let pair =
        LinkMessageBuilder::<LinkVeth>::new(a_link, b_link).set_info_data(InfoData::Veth(InfoVeth::Peer(peer))).build();
    a.netlink(|handle| async move { Ok(handle.link().add(pair).execute().await?) })
        .with_context(|| format!("cannot join {}:{a_link} and {}:{b_link}", a.name(), b.name()))?;
    if !ethtool::shows_udp_super_packets() {
        // Or they would be lost on wires and in captures.
        let cut = [("tx-udp-segmentation", false)];
        ethtool::set_features(a, a_link, &cut)?;
        ethtool::set_features(b, b_link, &cut)?;
    }
    a.set_up(a_link, true)?;
    b.set_up(b_link, true)
}

impl Host {
    /// Runs one netlink conversation inside this host.
    pub fn netlink<T, F, Fut>(&self, talk: F) -> Result<T>
    where
        T: Send,
        F: FnOnce(Handle) -> Fut + Send,
        Fut: Future<Output = Result<T>>,
    {
        self.inside(|| converse(talk))
    }

    pub fn set_up(&self, link: &str, up: bool) -> Result<()> {
        self.netlink(|handle| async move {
            let index = index_of(&handle, link).await?;
            let change = LinkUnspec::new_with_index(index);
            Ok(handle.link().set(if up { change.up() } else { change.down() }.build()).execute().await?)
        })
        .with_context(|| format!("cannot set {link} {}", if up { "up" } else { "down" }))
    }

    pub fn set_mtu(&self, link: &str, mtu: u32) -> Result<()> {
        self.netlink(|handle| async move {
            let index = index_of(&handle, link).await?;
            Ok(handle.link().set(LinkUnspec::new_with_index(index).mtu(mtu).build()).execute().await?)
        })
    }

    pub fn add_bridge(&self, name: &str) -> Result<()> {
        self.netlink(|handle| async move { Ok(handle.link().add(LinkBridge::new(name).build()).execute().await?) })
            .with_context(|| format!("cannot make the bridge {name}"))?;
        self.set_up(name, true)
    }

    /// Makes `link` a port of `bridge`.
    pub fn enslave(&self, link: &str, bridge: &str) -> Result<()> {
        self.netlink(|handle| async move {
            let (port, bridge) = (index_of(&handle, link).await?, index_of(&handle, bridge).await?);
            Ok(handle.link().set(LinkUnspec::new_with_index(port).controller(bridge).build()).execute().await?)
        })
    }

    pub fn delete_link(&self, link: &str) -> Result<()> {
        self.netlink(|handle| async move {
            let index = index_of(&handle, link).await?;
            Ok(handle.link().del(index).execute().await?)
        })
        .with_context(|| format!("cannot delete the link {link}"))
    }

    pub fn has_link(&self, link: &str) -> Result<bool> {
        Ok(self.link_index(link)?.is_some())
    }

    /// The index of a link; a link that was deleted and made again has another.
    pub fn link_index(&self, link: &str) -> Result<Option<u32>> {
        self.inside(|| match nix::net::if_::if_nametoindex(link) {
            Ok(index) => Ok(Some(index)),
            Err(nix::errno::Errno::ENODEV) => Ok(None),
            Err(errno) => Err(errno).with_context(|| format!("cannot look up the link {link}")),
        })
    }

    /// Adds an address, usable at once (no duplicate address detection).
    pub fn add_address(&self, link: &str, address: IpNet) -> Result<()> {
        self.netlink(|handle| async move {
            let index = index_of(&handle, link).await?;
            let mut add = handle.address().add(index, address.addr(), address.prefix_len());
            add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
            Ok(add.execute().await?)
        })
        .with_context(|| format!("cannot add {address} to {link}"))
    }

    pub fn delete_address(&self, link: &str, address: IpAddr) -> Result<()> {
        self.netlink(|handle| async move {
            let index = index_of(&handle, link).await?;
            let listed: Vec<AddressMessage> = handle
                .address()
                .get()
                .set_link_index_filter(index)
                .set_address_filter(address)
                .execute()
                .try_collect()
                .await?;
            let found = listed.into_iter().next().context("it is not there")?;
            Ok(handle.address().del(found).execute().await?)
        })
        .with_context(|| format!("cannot delete {address} from {link}"))
    }

    /// Removes every address of one family from a link.
    pub fn flush_addresses(&self, link: &str, family: IpVersion) -> Result<()> {
        self.netlink(|handle| async move {
            let index = index_of(&handle, link).await?;
            let family = match family {
                IpVersion::V4 => AddressFamily::Inet,
                IpVersion::V6 => AddressFamily::Inet6,
            };
            let listed: Vec<_> = handle.address().get().set_link_index_filter(index).execute().try_collect().await?;
            for address in listed {
                if address.header.family == family {
                    handle.address().del(address).execute().await?;
                }
            }
            Ok(())
        })
        .with_context(|| format!("cannot remove the addresses of {link}"))
    }

    /// Where this host's kernel would send a packet with this mark: the answer of `RTM_GETROUTE`.
    pub fn lookup(&self, to: IpAddr, mark: u32) -> Result<Hop> {
        self.netlink(|handle| async move {
            let mut ask = RouteMessage::default();
            ask.header.address_family = match to {
                IpAddr::V4(_) => AddressFamily::Inet,
                IpAddr::V6(_) => AddressFamily::Inet6,
            };
            ask.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
            ask.header.flags = RouteFlags::LookupTable;
            ask.attributes = vec![RouteAttribute::Destination(to.into()), RouteAttribute::Mark(mark)];
            let answer = handle.route().get(ask).execute().try_next().await;
            let route = match answer {
                Ok(Some(route)) => route,
                Ok(None) => return Err(anyhow!("no answer")),
                // An unreachable route answers by the error that a packet would get.
                Err(rtnetlink::Error::NetlinkError(refusal)) => {
                    return Ok(Hop { link: None, table: None, error: Some(refusal.to_string()) });
                }
                Err(error) => return Err(error.into()),
            };
            let link = match output_link(&route) {
                Some(index) => Some(name_of(&handle, index).await?),
                None => None,
            };
            Ok(Hop { link, table: Some(table_of(&route)), error: None })
        })
        .with_context(|| format!("cannot ask for the route to {to} with mark {mark:#x}"))
    }

    pub fn add_route(&self, table: u32, destination: IpNet, to: &To) -> Result<()> {
        self.netlink(|handle| async move {
            let mut route = RouteMessageBuilder::<IpAddr>::new()
                .destination_prefix(destination.addr(), destination.prefix_len())?
                .table_id(table);
            match to {
                To::Gateway(gateway) => route = route.gateway(*gateway)?,
                To::Link(link) => {
                    route = route.output_interface(index_of(&handle, link).await?);
                    if destination.addr().is_ipv4() {
                        route = route.scope(netlink_packet_route::route::RouteScope::Link);
                    }
                }
                To::Unreachable => route = route.kind(RouteType::Unreachable),
            }
            Ok(handle.route().add(route.build()).execute().await?)
        })
        .with_context(|| format!("cannot add a route to {destination} in table {table}"))
    }

    /// The default routes of both families.
    pub fn add_default_routes(&self, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<()> {
        self.add_route(MAIN_TABLE, "0.0.0.0/0".parse()?, &To::Gateway(v4.into()))?;
        self.add_route(MAIN_TABLE, "::/0".parse()?, &To::Gateway(v6.into()))
    }

    /// All routes of one table, both families, without the kernel's per-destination cache entries.
    pub fn routes(&self, table: u32) -> Result<Vec<RouteMessage>> {
        Ok(self
            .netlink(|handle| async move { all_routes(&handle).await })?
            .into_iter()
            .filter(|route| table_of(route) == table)
            .collect())
    }

    /// Deletes one route as it was listed.
    pub fn delete_route(&self, route: RouteMessage) -> Result<()> {
        self.netlink(|handle| async move { Ok(handle.route().del(route).execute().await?) })
            .context("cannot delete the route")
    }

    /// All policy rules, both families.
    pub fn rules(&self) -> Result<Vec<RuleMessage>> {
        self.netlink(|handle| async move { all_rules(&handle).await })
    }

    /// The rules of one priority, both families.
    pub fn rules_at(&self, priority: u32) -> Result<Vec<RuleMessage>> {
        Ok(self
            .rules()?
            .into_iter()
            .filter(|rule| rule.attributes.contains(&RuleAttribute::Priority(priority)))
            .collect())
    }

    /// Deletes one rule as it was listed.
    pub fn delete_rule(&self, rule: RuleMessage) -> Result<()> {
        self.netlink(|handle| async move { Ok(handle.rule().del(rule).execute().await?) })
            .context("cannot delete the rule")
    }

    /// Adds `lookup table` at `priority` for one family.
    pub fn add_rule(&self, family: IpVersion, priority: u32, table: u32) -> Result<()> {
        self.netlink(|handle| async move {
            let rule = handle.rule().add().priority(priority).table_id(table).action(RuleAction::ToTable);
            match family {
                IpVersion::V4 => rule.v4().execute().await?,
                IpVersion::V6 => rule.v6().execute().await?,
            }
            Ok(())
        })
        .with_context(|| format!("cannot add a rule at {priority}"))
    }

    /// Swallows forwarded IPv4 UDP datagrams to one port, as a firewall does; undone by deleting the rule of `priority`.
    pub fn swallow_udp(&self, priority: u32, port: u16) -> Result<()> {
        self.netlink(|handle| async move {
            let mut rule = handle.rule().add().priority(priority).action(RuleAction::Blackhole).v4();
            let attributes = &mut rule.message_mut().attributes;
            attributes.push(RuleAttribute::IpProtocol(IpProtocol::Udp));
            attributes.push(RuleAttribute::DestinationPortRange(RulePortRange { start: port, end: port }));
            Ok(rule.execute().await?)
        })
        .with_context(|| format!("cannot block UDP port {port}"))
    }

    /// Forwards packets of both families from now on.
    pub fn forward(&self) -> Result<()> {
        self.set_sysctl("ipv4/ip_forward", "1")?;
        self.set_sysctl("ipv6/conf/all/forwarding", "1")
    }
}

/// The table of a route: past 255 only the attribute holds it.
pub fn table_of(route: &RouteMessage) -> u32 {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or_else(|| route.header.table.into())
}

/// The index of the link that a route leads over.
pub fn output_link(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// Where a route leads; the default route spells no destination out.
pub fn destination(route: &RouteMessage) -> Option<IpNet> {
    let length = route.header.destination_prefix_length;
    let given = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::from(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::from(*ip)),
        _ => None,
    });
    let default = match route.header.address_family {
        AddressFamily::Inet => Some(IpAddr::from([0; 4])),
        AddressFamily::Inet6 => Some(IpAddr::from([0; 16])),
        _ => None,
    };
    IpNet::new(given.or(default)?, length).ok()
}

pub(crate) async fn all_routes(handle: &Handle) -> Result<Vec<RouteMessage>> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut ask = RouteMessage::default();
        ask.header.address_family = family;
        let listed: Vec<RouteMessage> = handle.route().get(ask).execute().try_collect().await?;
        routes.extend(listed.into_iter().filter(|route| !route.header.flags.contains(RouteFlags::Cloned)));
    }
    Ok(routes)
}

pub(crate) async fn all_rules(handle: &Handle) -> Result<Vec<RuleMessage>> {
    let mut rules: Vec<RuleMessage> = handle.rule().get(IpVersion::V4).execute().try_collect().await?;
    rules.extend(handle.rule().get(IpVersion::V6).execute().try_collect::<Vec<_>>().await?);
    Ok(rules)
}

/// Runs a conversation on a netlink socket of the calling thread's namespace.
pub(crate) fn converse<T, F, Fut>(talk: F) -> Result<T>
where
    F: FnOnce(Handle) -> Fut,
    Fut: Future<Output = Result<T>>,
{
    tokio::runtime::Builder::new_current_thread().enable_io().build().context("cannot build a runtime")?.block_on(
        async {
            let (connection, handle, _) = rtnetlink::new_connection().context("cannot open a netlink socket")?;
            let carrier = tokio::spawn(connection);
            let result = talk(handle).await;
            carrier.abort();
            result
        },
    )
}

/// Makes a bridge and a veth pair in the calling thread's namespace; names the kind that failed.
pub(crate) fn can_make_links() -> Result<(), (&'static str, String)> {
    let make = |message: netlink_packet_route::link::LinkMessage| {
        converse(|handle| async move { Ok(handle.link().add(message).execute().await?) })
            .map_err(|error| format!("{error:#}"))
    };
    make(LinkBridge::new("probe0").build()).map_err(|error| ("bridge", error))?;
    make(LinkMessageBuilder::<LinkVeth>::new("probe1", "probe2").build()).map_err(|error| ("veth", error))
}

async fn name_of(handle: &Handle, index: u32) -> Result<String> {
    let message = handle.link().get().match_index(index).execute().try_next().await?;
    message
        .into_iter()
        .flat_map(|message| message.attributes)
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        })
        .with_context(|| format!("link {index} has no name"))
}

async fn index_of(handle: &Handle, link: &str) -> Result<u32> {
    let found = handle.link().get().match_name(link.to_owned()).execute().try_next().await;
    match found {
        Ok(Some(message)) if message.attributes.contains(&LinkAttribute::IfName(link.to_owned())) => {
            Ok(message.header.index)
        }
        Ok(_) => Err(anyhow!("there is no link {link}")),
        Err(error) => Err(error).with_context(|| format!("there is no link {link}")),
    }
}
