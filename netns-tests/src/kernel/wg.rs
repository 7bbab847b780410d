//! A host's WireGuard links as their kernel says them, and what a person's `wg` would do to them.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, bail};
use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;
use netlink_packet_route::link::{LinkAttribute, LinkInfo};
use netlink_packet_wireguard::{
    WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd, WireguardMessage, WireguardPeer,
    WireguardPeerAttribute, WireguardPeerFlags,
};
use rtnetlink::LinkWireguard;

use crate::Host;

pub type Key = [u8; 32];

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Device {
    pub private_key: Key,
    pub public_key: Key,
    pub listen_port: u16,
    pub fwmark: u32,
    pub peers: BTreeMap<Key, Peer>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peer {
    pub endpoint: Option<SocketAddr>,
    pub allowed_ips: Vec<IpNet>,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    /// Since 1970.
    pub last_handshake: Option<Duration>,
}

/// The kind of a link, `none` for hardware.
pub fn link_kind(host: &Host, name: &str) -> Result<String> {
    let asked = name.to_owned();
    host.netlink(|handle| async move {
        let link = handle.link().get().match_name(asked.clone()).execute().try_next().await;
        let link = link?.with_context(|| format!("there is no link {asked}"))?;
        let kind = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
                LinkInfo::Kind(kind) => Some(kind.to_string()),
                _ => None,
            }),
            _ => None,
        });
        Ok(kind.unwrap_or_else(|| "none".to_owned()))
    })
}

/// `ip link add NAME type wireguard`.
pub fn add_link(host: &Host, name: &str) -> Result<()> {
    let link = LinkWireguard::new(name).build();
    host.netlink(|handle| async move { Ok(handle.link().add(link).execute().await?) })
}

pub fn device(host: &Host, link: &str) -> Result<Device> {
    let asked = vec![WireguardAttribute::IfName(link.to_owned())];
    let messages = request(host, WireguardCmd::GetDevice, asked, NLM_F_REQUEST | NLM_F_DUMP)?;
    let mut device = Device::default();
    for attribute in messages.into_iter().flat_map(|message| message.attributes) {
        match attribute {
            WireguardAttribute::PrivateKey(key) => device.private_key = key,
            WireguardAttribute::PublicKey(key) => device.public_key = key,
            WireguardAttribute::ListenPort(port) => device.listen_port = port,
            WireguardAttribute::Fwmark(mark) => device.fwmark = mark,
            WireguardAttribute::Peers(peers) => peers.iter().for_each(|peer| read_peer(peer, &mut device.peers)),
            _ => {}
        }
    }
    Ok(device)
}

/// `wg set LINK …` with these settings.
pub fn set(host: &Host, link: &str, settings: Vec<WireguardAttribute>) -> Result<()> {
    let mut attributes = vec![WireguardAttribute::IfName(link.to_owned())];
    attributes.extend(settings);
    request(host, WireguardCmd::SetDevice, attributes, NLM_F_REQUEST | NLM_F_ACK).map(drop)
}

/// `wg set LINK peer KEY remove`.
pub fn remove_peer(host: &Host, link: &str, key: Key) -> Result<()> {
    let gone = WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe);
    let peer = WireguardPeer(vec![WireguardPeerAttribute::PublicKey(key), gone]);
    set(host, link, vec![WireguardAttribute::Peers(vec![peer])])
}

/// `wg set LINK peer KEY`.
pub fn add_peer(host: &Host, link: &str, key: Key) -> Result<()> {
    let peer = WireguardPeer(vec![WireguardPeerAttribute::PublicKey(key)]);
    set(host, link, vec![WireguardAttribute::Peers(vec![peer])])
}

fn read_peer(peer: &WireguardPeer, peers: &mut BTreeMap<Key, Peer>) {
    let key = peer.0.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(*key),
        _ => None,
    });
    let Some(key) = key else { return };
    let entry = peers.entry(key).or_default();
    for attribute in &peer.0 {
        match attribute {
            WireguardPeerAttribute::Endpoint(endpoint) => entry.endpoint = Some(*endpoint),
            WireguardPeerAttribute::RxBytes(bytes) => entry.rx_bytes = *bytes,
            WireguardPeerAttribute::TxBytes(bytes) => entry.tx_bytes = *bytes,
            WireguardPeerAttribute::LastHandshake(at) if at.seconds > 0 => {
                let nanos = u32::try_from(at.nano_seconds).unwrap_or_default();
                entry.last_handshake = Some(Duration::new(at.seconds.cast_unsigned(), nanos));
            }
            WireguardPeerAttribute::AllowedIps(allowed) => {
                entry.allowed_ips.extend(allowed.iter().filter_map(read_allowed_ip));
            }
            _ => {}
        }
    }
}

fn read_allowed_ip(allowed: &WireguardAllowedIp) -> Option<IpNet> {
    let address = allowed.0.iter().find_map(|attribute| match attribute {
        WireguardAllowedIpAttr::IpAddr(address) => Some(*address),
        _ => None,
    });
    let length = allowed.0.iter().find_map(|attribute| match attribute {
        WireguardAllowedIpAttr::Cidr(length) => Some(*length),
        _ => None,
    });
    IpNet::new(address?, length?).ok()
}

fn request(
    host: &Host,
    cmd: WireguardCmd,
    attributes: Vec<WireguardAttribute>,
    flags: u16,
) -> Result<Vec<WireguardMessage>> {
    let mut message = NetlinkMessage::from(GenlMessage::from_payload(WireguardMessage { cmd, attributes }));
    message.header.flags = flags;
    host.inside(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, mut handle, _) = genetlink::new_connection().context("cannot open generic netlink")?;
            let carrier = tokio::spawn(connection);
            let mut answers = handle.request(message).await.context("the kernel has no WireGuard")?;
            let mut messages = Vec::new();
            while let Some(answer) = answers.next().await {
                match answer?.payload {
                    NetlinkPayload::InnerMessage(inner) => messages.push(inner.payload),
                    NetlinkPayload::Error(error) if error.code.is_some() => bail!("{}", error.to_io()),
                    _ => {}
                }
            }
            carrier.abort();
            Ok(messages)
        })
    })
}
