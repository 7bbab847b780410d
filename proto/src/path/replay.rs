//! Which counters of a sender were seen: each is taken once, late ones only within the window.

/// How far a counter may lag behind the highest: probes of one peer travel over several paths of different delay.
pub const WINDOW: u64 = 128;

/// The counters of one sender that were taken already. For another instance of the sender start anew.
#[derive(Debug, Clone, Default)]
pub struct ReplayWindow {
    /// One more than the highest counter taken; 0 before the first.
    next: u64,
    /// Bit n: the counter n below the highest was taken.
    taken: u128,
}

impl ReplayWindow {
    /// Takes a counter; false for one that was taken before or is too old to know. Only for authentic probes.
    #[must_use]
    pub fn accept(&mut self, counter: u64) -> bool {
        // The last counter has no successor to remember it by.
        let Some(next) = counter.checked_add(1) else { return false };
        if next > self.next {
            let ahead = next - self.next;
            self.taken = if ahead < WINDOW { self.taken << ahead } else { 0 } | 1;
            self.next = next;
            return true;
        }
        let behind = self.next - next;
        let bit = if behind < WINDOW { 1 << behind } else { return false };
        let is_new = self.taken & bit == 0;
        self.taken |= bit;
        is_new
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::random::SplitMix64;

    #[test]
    fn each_counter_is_taken_once_and_late_ones_within_the_window() {
        let mut window = ReplayWindow::default();
        assert!(window.accept(0) && !window.accept(0));
        assert!(window.accept(127) && window.accept(1) && !window.accept(1));
        assert!(window.accept(128), "the window moves on");
        assert!(!window.accept(0), "too old to know");
        assert!(window.accept(2));
        assert!(window.accept(1 << 40) && !window.accept(127));
        assert!(!window.accept(u64::MAX) && window.accept(u64::MAX - 1) && !window.accept(u64::MAX - 1));
    }

    #[test]
    fn it_agrees_with_a_set_that_never_forgets() {
        for seed in 0..50 {
            let mut random = SplitMix64::new(seed);
            let (mut window, mut seen, mut highest) = (ReplayWindow::default(), BTreeSet::new(), 0);
            for _ in 0..2000 {
                let counter = (highest + random.below(12)).saturating_sub(random.below(160));
                let expected = counter + WINDOW > highest && seen.insert(counter);
                assert_eq!(window.accept(counter), expected, "counter {counter}, highest {highest}, seed {seed}");
                highest = highest.max(counter);
            }
        }
    }
}
