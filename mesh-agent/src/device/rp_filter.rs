//! Reverse path filters of underlay links: loosened while a peer's endpoint lies inside a mesh prefix, then restored.
//!
//! Owns `loosened.json` in the state directory: link name -> its own value before us, written before the change, so that
//! the successor of a crashed agent can undo it. A value that someone else set since is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use netlink_packet_core::{DefaultNla, NLA_F_NESTED};
use netlink_packet_route::link::{AfSpecInet, AfSpecUnspec, LinkAttribute, LinkMessage};
use rtnetlink::Handle;

use super::link::{self, HostLink};
use super::{ApplyError, LoosenedError, accept, doing};
use crate::durable;

/// A packet's source must be routable at all, not through the link it came by.
pub(super) const LOOSE: u8 = 2;
pub(super) const ALL_PATH: &str = "/proc/sys/net/ipv4/conf/all/rp_filter";
const FILE: &str = "loosened.json";

/// Attribute numbers of `linux/if_link.h` and `linux/ip.h`.
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_RP_FILTER: u16 = 8;

/// The value that holds for every link unless its own is larger.
pub(super) fn all() -> io::Result<u8> {
    let text = fs::read_to_string(ALL_PATH)?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{:?} is no reverse path filter", text.trim())))
}

/// Sets a link's own value, by netlink, which works where /proc/sys is mounted read-only, else by /proc/sys.
pub(super) async fn set(handle: &Handle, index: u32, name: &str, value: u8) -> Result<(), ApplyError> {
    let Err(error) = accept(handle.link().change(request(index, value)).execute().await, &[]) else {
        return Ok(());
    };
    if error.raw_os_error() == Some(libc::ENODEV) {
        return Err(ApplyError::NoLink { name: name.to_owned() });
    }
    let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
    fs::write(&path, value.to_string()).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            ApplyError::NotPermitted { sysctl: sysctl(name), value }
        }
        io::ErrorKind::NotFound => ApplyError::NoLink { name: name.to_owned() },
        _ => ApplyError::Kernel { what: format!("write {path}"), source: error },
    })
}

/// Which links we loosened, and what they had before.
#[derive(Debug)]
pub(super) struct Loosened {
    path: PathBuf,
    before: BTreeMap<String, u8>,
}

impl Loosened {
    /// A missing file is an empty list.
    pub(super) fn load(state_dir: &Path) -> Result<Self, LoosenedError> {
        let path = state_dir.join(FILE);
        let before = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| LoosenedError::Damaged { path: path.clone(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(source) => return Err(LoosenedError::Read { path, source }),
        };
        Ok(Self { path, before })
    }

    /// Links that still have the value we gave them.
    pub(super) fn in_force(&self, links: &[HostLink]) -> BTreeSet<String> {
        links
            .iter()
            .filter(|link| link.rp_filter == LOOSE && self.before.contains_key(&link.name))
            .map(|link| link.name.clone())
            .collect()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.before.keys().cloned().collect()
    }

    pub(super) async fn loosen(&mut self, handle: &Handle, name: &str) -> Result<(), ApplyError> {
        let Some(link) = find(handle, name).await? else {
            return Err(ApplyError::NoLink { name: name.to_owned() });
        };
        if link.rp_filter == LOOSE && self.before.contains_key(name) {
            return Ok(());
        }
        let memory = self.before.insert(name.to_owned(), link.rp_filter);
        self.save()?;
        let result = set(handle, link.index, name, LOOSE).await;
        if result.is_err() {
            // Nothing was changed, so there is nothing to undo later.
            match memory {
                Some(value) => self.before.insert(name.to_owned(), value),
                None => self.before.remove(name),
            };
            self.save()?;
        }
        result
    }

    pub(super) async fn restore(&mut self, handle: &Handle, name: &str) -> Result<(), ApplyError> {
        let Some(value) = self.before.get(name).copied() else {
            return Ok(());
        };
        if let Some(link) = find(handle, name).await?
            && link.rp_filter == LOOSE
        {
            match set(handle, link.index, name, value).await {
                Ok(()) | Err(ApplyError::NoLink { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.before.remove(name);
        self.save()?;
        Ok(())
    }

    fn save(&self) -> Result<(), LoosenedError> {
        let saved = if self.before.is_empty() {
            fs::remove_file(&self.path).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })
        } else {
            serde_json::to_vec(&self.before)
                .map_err(io::Error::from)
                .and_then(|bytes| durable::replace(&self.path, &bytes, 0o600))
        };
        saved.map_err(|source| LoosenedError::Write { path: self.path.clone(), source })
    }
}

async fn find(handle: &Handle, name: &str) -> Result<Option<HostLink>, ApplyError> {
    let links = link::dump(handle).await.map_err(doing(|| "list the links".into()))?;
    Ok(links.into_iter().find(|link| link.name == name))
}

/// The typed request of the netlink crate leaves out zeros, which is a value to restore: so by bytes.
fn request(index: u32, value: u8) -> LinkMessage {
    let mut conf = Vec::with_capacity(8);
    conf.extend(8_u16.to_ne_bytes());
    conf.extend(IPV4_DEVCONF_RP_FILTER.to_ne_bytes());
    conf.extend(u32::from(value).to_ne_bytes());
    let conf = AfSpecInet::Other(DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, conf));
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![conf])]));
    message
}

/// As sysctl(8) takes it: with slashes when the link's name has dots of its own, as VLAN links do.
pub(crate) fn sysctl(name: &str) -> String {
    if name.contains('.') {
        format!("net/ipv4/conf/{name}/rp_filter")
    } else {
        format!("net.ipv4.conf.{name}.rp_filter")
    }
}
