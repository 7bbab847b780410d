//! The peers as control keeps them, and the snapshot it makes of them for the threads.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_common::key::WgPublicKey;
use mesh_proto::device::PeerSpec;
use mesh_proto::wg::Tunnel;

use super::index::IndexPool;
use super::peer::{Path, Peer};
use super::shared::Snapshot;

#[derive(Debug)]
pub(super) struct PeerTable<T> {
    entries: BTreeMap<WgPublicKey, Entry<T>>,
    by_index: BTreeMap<u32, WgPublicKey>,
    indices: IndexPool,
}

#[derive(Debug)]
struct Entry<T> {
    spec: PeerSpec,
    peer: Arc<Peer<T>>,
}

impl<T: Tunnel> PeerTable<T> {
    pub(super) fn new(seed: u64) -> Self {
        Self { entries: BTreeMap::new(), by_index: BTreeMap::new(), indices: IndexPool::new(seed) }
    }

    /// Adds or changes a peer; `make` gives a tunnel for a 24-bit index. A session survives a change of allowed IPs only:
    /// a tunnel cannot change its preshared key or keepalive, and a new generation asks for a new one. True when anything
    /// changed.
    pub(super) fn set(&mut self, key: WgPublicKey, spec: PeerSpec, make: impl FnOnce(u32) -> T) -> bool {
        let mut path = Path::default();
        if let Some(entry) = self.entries.get_mut(&key) {
            if entry.spec == spec {
                return false;
            }
            let same_tunnel = entry.spec.preshared_key == spec.preshared_key
                && entry.spec.keepalive == spec.keepalive
                && entry.spec.generation == spec.generation;
            if same_tunnel {
                entry.spec = spec;
                return true;
            }
            path = Path::clone(&entry.peer.path());
            self.remove(&key);
        }
        let index = self.indices.take();
        let peer = Arc::new(Peer::new(key, index, make(index), spec.keepalive.is_some(), path));
        self.by_index.insert(index, key);
        self.entries.insert(key, Entry { spec, peer });
        true
    }

    /// True when the peer was there.
    pub(super) fn remove(&mut self, key: &WgPublicKey) -> bool {
        let Some(entry) = self.entries.remove(key) else { return false };
        self.by_index.remove(&entry.peer.index);
        self.indices.release(entry.peer.index);
        true
    }

    pub(super) fn specs(&self) -> BTreeMap<WgPublicKey, PeerSpec> {
        self.entries.iter().map(|(key, entry)| (*key, entry.spec.clone())).collect()
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = &Arc<Peer<T>>> {
        self.entries.values().map(|entry| &entry.peer)
    }

    pub(super) fn by_key(&self, key: &WgPublicKey) -> Option<&Arc<Peer<T>>> {
        self.entries.get(key).map(|entry| &entry.peer)
    }

    /// By a receiver index from the wire.
    pub(super) fn by_index(&self, receiver_index: u32) -> Option<&Arc<Peer<T>>> {
        self.by_key(self.by_index.get(&(receiver_index >> 8))?)
    }

    pub(super) fn snapshot(&self) -> Snapshot<T> {
        let slots = || (0u32..).zip(self.entries.values());
        Snapshot {
            peers: self.peers().cloned().collect(),
            by_index: slots().map(|(slot, entry)| (entry.peer.index, slot)).collect(),
            allowed_ips: slots()
                .flat_map(|(slot, entry)| entry.spec.allowed_ips.iter().map(move |prefix| (*prefix, slot)))
                .collect(),
        }
    }
}
