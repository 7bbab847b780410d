//! The link of the kernel's WireGuard: made here, deleted with the value that stands for it.
//!
//! Unlike a TUN it does not die with the process. One that an agent left when it was killed is known by the node's own
//! WireGuard key, which no other agent has; nothing else is ever deleted.

use std::io;

use mesh_common::key::WgPublicKey;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::net::if_::if_nametoindex;
use rtnetlink::LinkWireguard;

use super::{Netlink, accept, link, to_io};
use crate::kernel;

const KIND: &str = "wireguard";

/// A link that this process made. It goes when this is dropped.
#[derive(Debug)]
pub(crate) struct WireguardLink {
    name: String,
    index: u32,
}

impl WireguardLink {
    /// Makes a link that is down and has no address. Must be called inside a tokio runtime.
    pub(crate) async fn create(name: &str) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let made = netlink.handle.link().add(LinkWireguard::new(name).build()).execute().await;
        made.map_err(to_io)?;
        let link = Self { name: name.to_owned(), index: if_nametoindex(name)? };
        // Before it comes up, so that nothing of ours speaks router discovery there.
        let quiet = netlink.handle.link().change(link::without_link_local(link.index)).execute().await;
        accept(quiet, &[libc::EOPNOTSUPP, libc::EAFNOSUPPORT, libc::EINVAL])?;
        Ok(link)
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// From then on the kernel listens on the device's port.
    pub(crate) async fn bring_up(&self) -> io::Result<()> {
        let netlink = Netlink::open()?;
        accept(netlink.handle.link().change(link::up_alone(self.index)).execute().await, &[])
    }
}

impl Drop for WireguardLink {
    fn drop(&mut self) {
        // Deleted by somebody, it may have left its index to another one.
        if if_nametoindex(self.name.as_str()) == Ok(self.index) {
            // Without a runtime: it must also work while one ends.
            let _gone = delete_now(self.index);
        }
    }
}

fn delete_now(index: u32) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::DelLink(link));
    message.header.flags = NLM_F_REQUEST;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    Ok(())
}

/// Deletes the link of this name if it is one that an earlier run of this very node left; whether it was.
pub(crate) async fn remove_leftover(name: &str, own: &WgPublicKey) -> io::Result<bool> {
    let netlink = Netlink::open()?;
    let links = link::dump(&netlink.handle).await?;
    let Some(left) = links.iter().find(|link| link.name == name && link.kind.as_deref() == Some(KIND)) else {
        return Ok(false);
    };
    if kernel::public_key_of(left.index).await? != Some(*own) {
        return Ok(false);
    }
    link::delete(&netlink.handle, left.index).await?;
    Ok(true)
}

/// Whether this link is one of the kernel's WireGuard with this key.
pub(super) async fn is_own(link: &link::HostLink, own: Option<&WgPublicKey>) -> bool {
    let Some(own) = own.filter(|_| link.kind.as_deref() == Some(KIND)) else { return false };
    kernel::public_key_of(link.index).await.is_ok_and(|key| key.as_ref() == Some(own))
}
