//! Virtual time and the queue of what happens next.
//!
//! Events of one instant come out in the order in which they were put in, so a run is a function of its seed.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::Duration;

use mesh_common::time::Instant;

#[derive(Debug)]
pub struct Clock<E> {
    now: Instant,
    queue: BinaryHeap<Reverse<Entry<E>>>,
    entered: u64,
}

#[derive(Debug)]
struct Entry<E> {
    at: Instant,
    order: u64,
    event: E,
}

impl<E> Default for Clock<E> {
    fn default() -> Self {
        Self { now: Instant::ORIGIN, queue: BinaryHeap::new(), entered: 0 }
    }
}

impl<E> Clock<E> {
    pub fn now(&self) -> Instant {
        self.now
    }

    /// An event at this time, or now when that has passed.
    pub fn at(&mut self, at: Instant, event: E) {
        self.entered += 1;
        self.queue.push(Reverse(Entry { at: at.max(self.now), order: self.entered, event }));
    }

    pub fn after(&mut self, delay: Duration, event: E) {
        self.at(self.now + delay, event);
    }

    /// Moves time to the next event and gives it.
    pub fn advance(&mut self) -> Option<E> {
        let Reverse(entry) = self.queue.pop()?;
        self.now = entry.at;
        Some(entry.event)
    }
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl<E> Eq for Entry<E> {}
impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl<E> Ord for Entry<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_then_by_entry_and_time_never_goes_back() {
        let mut clock = Clock::default();
        clock.after(Duration::from_secs(2), "late");
        clock.after(Duration::from_secs(1), "first");
        clock.after(Duration::from_secs(1), "second");
        assert_eq!(clock.advance(), Some("first"));
        clock.at(Instant::ORIGIN, "overdue");
        assert_eq!(clock.advance(), Some("second"));
        assert_eq!(clock.advance(), Some("overdue"));
        assert_eq!(clock.now().since_origin(), Duration::from_secs(1));
        assert_eq!(clock.advance(), Some("late"));
        assert_eq!(clock.advance(), None);
    }
}
