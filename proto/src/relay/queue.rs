//! What waits for a carrier that is busy: bounded, and the oldest is dropped first, because a late datagram is worth the least.

use std::collections::VecDeque;

use bytes::Bytes;
use mesh_common::limits::{MAX_RELAY_QUEUE_BYTES, MAX_RELAY_QUEUE_MESSAGES};

/// At most [`MAX_RELAY_QUEUE_MESSAGES`] messages and [`MAX_RELAY_QUEUE_BYTES`], first in, first out.
#[derive(Debug, Default)]
pub struct DropOldest {
    messages: VecDeque<Bytes>,
    bytes: usize,
}

impl DropOldest {
    /// Bytes of all that waits.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a message; gives how many older ones had to go for it.
    pub fn push(&mut self, message: Bytes) -> u64 {
        let mut dropped = 0;
        while self.messages.len() >= MAX_RELAY_QUEUE_MESSAGES || self.bytes + message.len() > MAX_RELAY_QUEUE_BYTES {
            if self.pop().is_none() {
                break;
            }
            dropped += 1;
        }
        self.bytes += message.len();
        self.messages.push_back(message);
        dropped
    }

    pub fn pop(&mut self) -> Option<Bytes> {
        let message = self.messages.pop_front()?;
        self.bytes -= message.len();
        Some(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(number: usize, len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes.into()
    }

    fn rest(queue: &mut DropOldest) -> Vec<usize> {
        std::iter::from_fn(|| queue.pop())
            .map(|bytes| usize::from_le_bytes(*bytes.first_chunk().expect("messages of this test are longer")))
            .collect()
    }

    #[test]
    fn what_does_not_fit_pushes_the_oldest_out() {
        let mut queue = DropOldest::default();
        let dropped: u64 = (0..MAX_RELAY_QUEUE_MESSAGES + 10).map(|number| queue.push(message(number, 100))).sum();
        assert_eq!(dropped, 10);
        assert_eq!(rest(&mut queue), (10..MAX_RELAY_QUEUE_MESSAGES + 10).collect::<Vec<_>>());
        assert_eq!(queue.bytes(), 0);

        // Large ones meet the bytes first.
        let fit = MAX_RELAY_QUEUE_BYTES / 4096;
        let dropped: u64 = (0..fit + 3).map(|number| queue.push(message(number, 4096))).sum();
        assert_eq!((dropped, queue.bytes()), (3, fit * 4096));
        assert_eq!(rest(&mut queue), (3..fit + 3).collect::<Vec<_>>());
    }
}
