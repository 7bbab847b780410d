//! Relayed messages between two tasks: neither waits for the other, the oldest are dropped when the reader does not keep up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mesh_proto::relay::queue::DropOldest;
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub struct RelayQueue {
    waiting: Mutex<DropOldest>,
    filled: Arc<Notify>,
    dropped: Arc<AtomicU64>,
}

impl RelayQueue {
    /// One of several whose reader waits for any of them, and which count their drops together.
    pub fn sharing(filled: Arc<Notify>, dropped: Arc<AtomicU64>) -> Self {
        Self { waiting: Mutex::default(), filled, dropped }
    }

    pub fn push(&self, message: Bytes) {
        let dropped = self.lock().push(message);
        self.dropped.fetch_add(dropped, Ordering::Relaxed);
        self.filled.notify_one();
    }

    pub fn pop(&self) -> Option<Bytes> {
        self.lock().pop()
    }

    /// Returns when there may be something again. Cancel-safe.
    pub async fn filled(&self) {
        self.filled.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, DropOldest> {
        // A queue is whole between any two of its calls.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
