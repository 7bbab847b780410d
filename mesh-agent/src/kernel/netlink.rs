//! The kernel's WireGuard by generic netlink: a device's settings, its peers in messages of bounded size, and what it says.
//!
//! Keys are in these messages. The netlink crates print whole messages in their logs, which [`crate::logging`] keeps shut;
//! errors of theirs are turned into errno here and never shown as they are.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt as _;
use genetlink::GenetlinkHandle;
use ipnet::IpNet;
use mesh_common::key::{PresharedKey, WgPublicKey, WgSecret};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Nla as _};
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardDeviceFlags, WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use tokio::task::AbortHandle;

/// A nested attribute has 16 bits for its length, and the list of peers is one: half of that leaves room for the rest.
const MESSAGE_BYTES: usize = 32 * 1024;
/// Allowed IPs in one entry of a peer, for the same reason: those of a list are shorter than 32 bytes each.
const ENTRY_ALLOWED_IPS: usize = 500;
/// The kernel answers at once; one that does not for so long will not.
const ANSWER: Duration = Duration::from_secs(5);
const PRESHARED_KEY_NONE: [u8; 32] = [0; 32];

/// A socket of generic netlink and the task that drives it.
#[derive(Debug)]
pub(super) struct WgNetlink {
    handle: GenetlinkHandle,
    task: AbortHandle,
}

/// A change of one peer. What is `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PeerChange {
    /// It is removed, before anything else is done.
    pub(super) remove: bool,
    /// Only then is it made when it is not there.
    pub(super) set: bool,
    pub(super) preshared_key: Option<Option<PresharedKey>>,
    pub(super) allowed_ips: Option<Vec<IpNet>>,
    pub(super) endpoint: Option<SocketAddr>,
    /// Seconds, 0 = off.
    pub(super) keepalive: Option<u16>,
    /// The kernel sends something at once: an initiation if it has no session.
    pub(super) poke: bool,
}

/// What the kernel says of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DeviceState {
    pub(super) public_key: Option<WgPublicKey>,
    pub(super) listen_port: u16,
    pub(super) fwmark: u32,
    pub(super) peers: BTreeMap<WgPublicKey, PeerState>,
}

/// What it says of a peer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PeerState {
    pub(super) preshared_key: Option<PresharedKey>,
    pub(super) allowed_ips: std::collections::BTreeSet<IpNet>,
    pub(super) endpoint: Option<SocketAddr>,
    /// Seconds.
    pub(super) keepalive: u16,
    /// By the wall clock: looked at for changes only. All zero = never.
    pub(super) last_handshake: (i64, i64),
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
}

impl WgNetlink {
    /// Must be called inside a tokio runtime.
    pub(super) fn open() -> io::Result<Self> {
        let (connection, handle, _unsolicited) = genetlink::new_connection()?;
        Ok(Self { handle, task: tokio::spawn(connection).abort_handle() })
    }

    /// Opens the socket anew when its task ended; without it every later request would fail.
    fn ensure(&mut self) -> io::Result<()> {
        if self.task.is_finished() {
            self.reopen()?;
        }
        Ok(())
    }

    /// Asks the kernel anew who answers for WireGuard: a module that went and came back has another number.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        *self = Self::open()?;
        Ok(())
    }

    /// Gives a device its key, port and firewall mark, and takes all peers from it.
    pub(super) async fn set_device(&mut self, index: u32, key: &WgSecret, port: u16, fwmark: u32) -> io::Result<()> {
        let attributes = vec![
            WireguardAttribute::IfIndex(index),
            WireguardAttribute::PrivateKey(key.x25519().to_bytes()),
            WireguardAttribute::ListenPort(port),
            WireguardAttribute::Fwmark(fwmark),
            WireguardAttribute::Flags(WireguardDeviceFlags::ReplacePeers),
        ];
        self.set(attributes).await
    }

    /// The settings that somebody changed, without a word about peers.
    pub(super) async fn restore_device(&mut self, index: u32, key: &WgSecret, port: u16, mark: u32) -> io::Result<()> {
        let attributes = vec![
            WireguardAttribute::IfIndex(index),
            WireguardAttribute::PrivateKey(key.x25519().to_bytes()),
            WireguardAttribute::ListenPort(port),
            WireguardAttribute::Fwmark(mark),
        ];
        self.set(attributes).await
    }

    /// Carries out changes in their order, in as many messages as they take. Stops at the first that fails and says how many
    /// changes went before.
    pub(super) async fn set_peers(
        &mut self,
        index: u32,
        changes: &[(WgPublicKey, PeerChange)],
    ) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        for message in messages(changes) {
            let attributes = vec![WireguardAttribute::IfIndex(index), WireguardAttribute::Peers(message.entries)];
            self.set(attributes).await.map_err(|error| (done, error))?;
            done = message.ends_with;
        }
        Ok(())
    }

    async fn set(&mut self, attributes: Vec<WireguardAttribute>) -> io::Result<()> {
        let answers = self.request(WireguardCmd::SetDevice, attributes, NLM_F_REQUEST | NLM_F_ACK).await?;
        drop(answers);
        Ok(())
    }

    /// All of a device. Peers are spread over several messages, and one with many allowed IPs too.
    pub(super) async fn get(&mut self, index: u32) -> io::Result<DeviceState> {
        let asked = vec![WireguardAttribute::IfIndex(index)];
        let answers = self.request(WireguardCmd::GetDevice, asked, NLM_F_REQUEST | NLM_F_DUMP).await?;
        Ok(DeviceState::read(answers))
    }

    async fn request(
        &mut self,
        cmd: WireguardCmd,
        attributes: Vec<WireguardAttribute>,
        flags: u16,
    ) -> io::Result<Vec<WireguardMessage>> {
        self.ensure()?;
        let mut message = NetlinkMessage::from(GenlMessage::from_payload(WireguardMessage { cmd, attributes }));
        message.header.flags = flags;
        let exchange = async {
            let mut answers = self.handle.request(message).await.map_err(errno)?;
            let mut messages = Vec::new();
            while let Some(answer) = answers.next().await {
                match answer.map_err(|_| io::Error::other("the kernel's answer cannot be read"))?.payload {
                    NetlinkPayload::InnerMessage(inner) => messages.push(inner.payload),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Overrun(_) => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
                    _ => {}
                }
            }
            Ok(messages)
        };
        match tokio::time::timeout(ANSWER, exchange).await {
            Ok(answered) => answered,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Drop for WgNetlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The errors of the crate hold messages: only the code is kept.
fn errno(error: genetlink::GenetlinkError) -> io::Error {
    match error {
        genetlink::GenetlinkError::NetlinkError(error) => error,
        // The family has no id because the kernel has no such module, and would not load it.
        genetlink::GenetlinkError::AttributeNotFound(_) => io::Error::from_raw_os_error(libc::EOPNOTSUPP),
        _ => io::Error::other("generic netlink is not to be used"),
    }
}

/// Entries that fit into one message.
struct Message {
    entries: Vec<WireguardPeer>,
    /// How many changes are complete once it is carried out.
    ends_with: usize,
}

fn messages(changes: &[(WgPublicKey, PeerChange)]) -> Vec<Message> {
    let mut messages: Vec<Message> = Vec::new();
    let mut bytes = 0;
    for (at, (key, change)) in changes.iter().enumerate() {
        for entry in entries(key, change) {
            // Behind the header of an attribute.
            let length = entry.value_len() + 4;
            match messages.last_mut() {
                Some(last) if bytes + length <= MESSAGE_BYTES => {
                    bytes += length;
                    last.entries.push(entry);
                }
                _ => {
                    bytes = length;
                    messages.push(Message { entries: vec![entry], ends_with: at });
                }
            }
        }
        if let Some(last) = messages.last_mut() {
            last.ends_with = at + 1;
        }
    }
    messages
}

/// A change as the kernel takes it: one entry, or several in this order.
fn entries(key: &WgPublicKey, change: &PeerChange) -> Vec<WireguardPeer> {
    let named = |attributes: Vec<WireguardPeerAttribute>| {
        let mut all = vec![WireguardPeerAttribute::PublicKey(key.0)];
        all.extend(attributes);
        WireguardPeer(all)
    };
    let mut entries = Vec::new();
    if change.remove {
        entries.push(named(vec![WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe)]));
    }
    let mut flags = WireguardPeerFlags::empty();
    if !change.set {
        if change.remove {
            return entries;
        }
        flags |= WireguardPeerFlags::UpdateOnly;
    }
    let mut attributes = Vec::new();
    let mut rest: Vec<WireguardAllowedIp> = Vec::new();
    if let Some(key) = &change.preshared_key {
        let bytes = key.as_ref().map_or(PRESHARED_KEY_NONE, |key| key.0);
        attributes.push(WireguardPeerAttribute::PresharedKey(bytes));
    }
    attributes.extend(change.endpoint.map(WireguardPeerAttribute::Endpoint));
    attributes.extend(change.keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
    if let Some(allowed) = &change.allowed_ips {
        flags |= WireguardPeerFlags::ReplaceAllowedIps;
        rest = allowed.iter().map(allowed_ip).collect();
        let first = rest.drain(..rest.len().min(ENTRY_ALLOWED_IPS)).collect();
        attributes.push(WireguardPeerAttribute::AllowedIps(first));
    }
    if !flags.is_empty() {
        attributes.insert(0, WireguardPeerAttribute::Flags(flags));
    }
    entries.push(named(attributes));
    for more in rest.chunks(ENTRY_ALLOWED_IPS) {
        entries.push(named(vec![WireguardPeerAttribute::AllowedIps(more.to_vec())]));
    }
    if change.poke {
        // Switching the keepalive on sends one; the next entry gives it back what it should be.
        let update = WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly);
        let keepalive = |seconds| named(vec![update.clone(), WireguardPeerAttribute::PersistentKeepalive(seconds)]);
        let wanted = change.keepalive.unwrap_or_default();
        let on = if wanted == 0 { POKE_SECONDS } else { wanted };
        entries.extend([keepalive(0), keepalive(on)]);
        if wanted == 0 {
            entries.push(keepalive(0));
        }
    }
    entries
}

/// Any number does that is not 0: it is taken back at once.
const POKE_SECONDS: u16 = 60;

fn allowed_ip(prefix: &IpNet) -> WireguardAllowedIp {
    let family = if prefix.addr().is_ipv4() { WireguardAddressFamily::Ipv4 } else { WireguardAddressFamily::Ipv6 };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(prefix.addr()),
        WireguardAllowedIpAttr::Cidr(prefix.prefix_len()),
    ])
}

impl DeviceState {
    fn read(messages: Vec<WireguardMessage>) -> Self {
        let mut device = Self::default();
        for attribute in messages.into_iter().flat_map(|message| message.attributes) {
            match attribute {
                WireguardAttribute::PublicKey(key) => device.public_key = Some(WgPublicKey(key)),
                WireguardAttribute::ListenPort(port) => device.listen_port = port,
                WireguardAttribute::Fwmark(mark) => device.fwmark = mark,
                WireguardAttribute::Peers(peers) => peers.into_iter().for_each(|peer| device.read_peer(peer)),
                WireguardAttribute::PrivateKey(mut key) => zeroize::Zeroize::zeroize(&mut key),
                _ => {}
            }
        }
        device
    }

    fn read_peer(&mut self, peer: WireguardPeer) {
        let key = peer.0.iter().find_map(|attribute| match attribute {
            WireguardPeerAttribute::PublicKey(key) => Some(WgPublicKey(*key)),
            _ => None,
        });
        let Some(key) = key else { return };
        let state = self.peers.entry(key).or_default();
        for attribute in peer.0 {
            match attribute {
                WireguardPeerAttribute::PresharedKey(key) => {
                    state.preshared_key = (key != PRESHARED_KEY_NONE).then_some(PresharedKey(key));
                }
                WireguardPeerAttribute::Endpoint(endpoint) => state.endpoint = Some(endpoint),
                WireguardPeerAttribute::PersistentKeepalive(seconds) => state.keepalive = seconds,
                WireguardPeerAttribute::LastHandshake(at) => state.last_handshake = (at.seconds, at.nano_seconds),
                WireguardPeerAttribute::RxBytes(bytes) => state.rx_bytes = bytes,
                WireguardPeerAttribute::TxBytes(bytes) => state.tx_bytes = bytes,
                WireguardPeerAttribute::AllowedIps(allowed) => {
                    state.allowed_ips.extend(allowed.iter().filter_map(read_allowed_ip));
                }
                _ => {}
            }
        }
    }
}

fn read_allowed_ip(allowed: &WireguardAllowedIp) -> Option<IpNet> {
    let (mut address, mut length) = (None, None);
    for attribute in &allowed.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(addr) => address = Some(*addr),
            WireguardAllowedIpAttr::Cidr(bits) => length = Some(*bits),
            _ => {}
        }
    }
    IpNet::new(address?, length?).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn peer(number: u32) -> (WgPublicKey, PeerChange) {
        let mut key = [7; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        let prefix = IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + number).into(), 32).unwrap();
        let change = PeerChange {
            set: true,
            preshared_key: Some(Some(PresharedKey([9; 32]))),
            allowed_ips: Some(vec![prefix]),
            endpoint: Some(([192, 0, 2, 1], 51872).into()),
            keepalive: Some(0),
            ..PeerChange::default()
        };
        (WgPublicKey(key), change)
    }

    fn length(entries: &[WireguardPeer]) -> usize {
        entries.iter().map(|entry| entry.value_len() + 4).sum()
    }

    #[test]
    fn ten_thousand_peers_go_in_messages_far_below_what_a_nested_attribute_holds() {
        let changes: Vec<_> = (0..10_000).map(peer).collect();
        let messages = messages(&changes);
        assert!(messages.len() > 1);
        assert!(messages.iter().all(|message| length(&message.entries) <= MESSAGE_BYTES));
        let entries: Vec<_> = messages.iter().flat_map(|message| &message.entries).collect();
        assert_eq!(entries.len(), 10_000);
        let ends: Vec<usize> = messages.iter().map(|message| message.ends_with).collect();
        assert!(ends.is_sorted() && ends.last() == Some(&10_000));
    }

    #[test]
    fn a_peer_with_very_many_allowed_ips_is_several_entries_that_come_together_again() {
        let (key, mut change) = peer(1);
        let all: Vec<IpNet> =
            (0..5000u32).map(|n| IpNet::new(std::net::Ipv4Addr::from(0x0a00_0000 + n).into(), 32).unwrap()).collect();
        change.allowed_ips = Some(all.clone());
        let messages = messages(&[(key, change)]);
        assert!(messages.len() > 1 && messages.iter().all(|message| length(&message.entries) <= MESSAGE_BYTES));
        assert_eq!(messages.last().unwrap().ends_with, 1);
        // Only the first entry replaces what was there.
        let replacing = |entry: &&WireguardPeer| {
            let replace = WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps);
            entry.0.contains(&replace)
        };
        assert_eq!(messages.iter().flat_map(|message| &message.entries).filter(replacing).count(), 1);
        let answers = messages.into_iter().map(|message| WireguardMessage {
            cmd: WireguardCmd::GetDevice,
            attributes: vec![WireguardAttribute::Peers(message.entries)],
        });
        let read = DeviceState::read(answers.collect());
        assert_eq!(read.peers.len(), 1);
        assert!(read.peers[&key].allowed_ips.iter().eq(&all));
        assert_eq!(read.peers[&key].endpoint, Some(([192, 0, 2, 1], 51872).into()));
    }

    #[test]
    fn a_change_says_nothing_of_what_stays() {
        let (key, _) = peer(1);
        let endpoint = PeerChange { endpoint: Some(([192, 0, 2, 9], 1).into()), ..PeerChange::default() };
        let entries = entries(&key, &endpoint);
        assert_eq!(entries.len(), 1);
        let kinds: Vec<_> = entries[0].0.iter().skip(1).collect();
        assert!(matches!(
            kinds[..],
            [WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly), WireguardPeerAttribute::Endpoint(_)]
        ));
    }
}
