//! Receiver indices: how a datagram finds its peer without trying keys.
//!
//! A tunnel owns 24 bits, drawn at random so that an observer cannot count peers; the low byte of the 32 on the wire is the
//! tunnel's own, for its sessions.

use std::collections::BTreeSet;

use mesh_proto::random::SplitMix64;
use mesh_proto::wire::demux::WireGuardKind;

/// Indices in use.
#[derive(Debug)]
pub(super) struct IndexPool {
    random: SplitMix64,
    used: BTreeSet<u32>,
}

impl IndexPool {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: SplitMix64::new(seed), used: BTreeSet::new() }
    }

    /// A free index. Members are limited to thousands, so of 16 million one is soon found.
    pub(super) fn take(&mut self) -> u32 {
        loop {
            let index = (self.random.next_u64() & 0x00ff_ffff) as u32;
            if self.used.insert(index) {
                return index;
            }
        }
    }

    pub(super) fn release(&mut self, index: u32) {
        self.used.remove(&index);
    }
}

/// An immutable map from index to a slot of the snapshot.
#[derive(Debug, Default)]
pub(super) struct IndexTable(Box<[(u32, u32)]>);

impl IndexTable {
    /// The slot that a receiver index from the wire belongs to.
    pub(super) fn slot(&self, receiver_index: u32) -> Option<u32> {
        let at = self.0.binary_search_by_key(&(receiver_index >> 8), |(index, _)| *index).ok()?;
        Some(self.0[at].1)
    }
}

impl FromIterator<(u32, u32)> for IndexTable {
    /// From (24-bit index, slot) pairs.
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(entries: I) -> Self {
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_unstable();
        Self(entries.into_boxed_slice())
    }
}

/// The receiver index of a message; an initiation has none.
#[inline]
pub(super) fn receiver(kind: WireGuardKind, message: &[u8]) -> Option<u32> {
    let at = match kind {
        WireGuardKind::Initiation => return None,
        WireGuardKind::Response => 8,
        WireGuardKind::CookieReply | WireGuardKind::Data => 4,
    };
    let bytes = message.get(at..at + 4)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_session_of_an_index_finds_its_slot_and_no_other() {
        let mut pool = IndexPool::new(1);
        let indices: Vec<u32> = (0..1000).map(|_| pool.take()).collect();
        let table: IndexTable = indices.iter().copied().zip(0..).collect();
        for (slot, index) in (0..).zip(&indices) {
            for session in [0, 1, 255] {
                assert_eq!(table.slot(index << 8 | session), Some(slot));
            }
        }
        let free = pool.take();
        assert_eq!(table.slot(free << 8), None);
        assert!(indices.iter().all(|index| *index < 1 << 24));
    }

    #[test]
    fn an_index_is_not_given_twice() {
        let mut pool = IndexPool::new(2);
        let mut seen = BTreeSet::new();
        assert!((0..10_000).all(|_| seen.insert(pool.take())));
    }
}
