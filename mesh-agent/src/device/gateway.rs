//! The router that this host's packets to the Internet pass first, as the kernel would send them. Only read.

use std::io;
use std::net::Ipv4Addr;

use mesh_common::limits::FWMARK;
use mesh_proto::device::Gateway;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::Handle;

use super::collect;

/// An address of the Internet that means "whoever maps ports here" (RFC 7723). Nothing is sent to it.
const INTERNET: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 9);

/// `None` without a way to the Internet, and where it begins with no router.
pub(super) async fn observe(handle: &Handle) -> Option<Gateway> {
    match look_up(handle).await {
        Ok(gateway) => gateway,
        Err(error) => {
            tracing::trace!(%error, "there is no route to the Internet");
            None
        }
    }
}

/// Asks as for a packet of our own sockets: what peers announce is no way to the Internet.
async fn look_up(handle: &Handle) -> io::Result<Option<Gateway>> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    request.header.destination_prefix_length = 32;
    request.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(INTERNET)));
    request.attributes.push(RouteAttribute::Mark(FWMARK));
    let routes = collect(handle.route().get(request).execute()).await?;
    let (mut router, mut client) = (None, None);
    for attribute in routes.iter().flat_map(|route| &route.attributes) {
        match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(addr)) => router = Some(*addr),
            RouteAttribute::PrefSource(RouteAddress::Inet(addr)) => client = Some(*addr),
            _ => {}
        }
    }
    Ok(router.zip(client).map(|(router, client)| Gateway { router, client }))
}
