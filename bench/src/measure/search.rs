//! The search for the highest rate at which nothing is lost, in a bounded number of tries.
//!
//! Doubles or halves from where it begins until a rate that passes and one that fails are known, then halves the distance
//! (as a ratio) until they are near each other. A rate that fails is tried a second time: another program may have had
//! the processor. The second verdict holds.

/// Rates nearer than this are one.
const NEAR: f64 = 1.05;
const STRIDE: f64 = 1.7;

/// What a try came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// All arrived, at the rate that was really offered.
    AllArrived(f64),
    /// Some were lost, or the sender could not keep the rate.
    Lost,
}

#[derive(Debug)]
pub struct Search {
    rate: f64,
    passed: Option<f64>,
    failed: Option<f64>,
    tries_left: u32,
    second_chance: bool,
}

impl Search {
    /// `tries` bounds the whole search.
    pub fn new(start: f64, tries: u32) -> Self {
        Self { rate: start.max(1.0), passed: None, failed: None, tries_left: tries, second_chance: true }
    }

    /// The rate to try next; `None` at the end.
    pub fn next_rate(&self) -> Option<f64> {
        let near = self.passed.zip(self.failed).is_some_and(|(passed, failed)| failed <= passed * NEAR);
        (self.tries_left > 0 && !near).then_some(self.rate)
    }

    pub fn note(&mut self, verdict: Verdict) {
        self.tries_left = self.tries_left.saturating_sub(1);
        match verdict {
            Verdict::AllArrived(offered) => self.passed = Some(offered.max(self.passed.unwrap_or_default())),
            Verdict::Lost if self.second_chance => {
                self.second_chance = false;
                return;
            }
            Verdict::Lost => self.failed = Some(self.rate),
        }
        self.second_chance = true;
        self.rate = match (self.passed, self.failed) {
            (Some(passed), Some(failed)) => (passed * failed).sqrt(),
            (Some(passed), None) => passed * STRIDE,
            (None, _) => self.rate / STRIDE,
        };
    }

    /// The highest rate that passed, 0 when none did.
    pub fn highest(&self) -> f64 {
        self.passed.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches in a world that carries `capacity`, and whose sender reaches `ceiling`.
    fn search(start: f64, tries: u32, capacity: f64, ceiling: f64) -> (f64, u32) {
        let mut search = Search::new(start, tries);
        let mut tried = 0;
        while let Some(rate) = search.next_rate() {
            tried += 1;
            let passes = rate <= capacity && rate <= ceiling;
            search.note(if passes { Verdict::AllArrived(rate) } else { Verdict::Lost });
        }
        (search.highest(), tried)
    }

    #[test]
    fn the_capacity_is_found_from_below_and_from_above() {
        for start in [100.0, 90_000.0, 1e6] {
            let (found, _) = search(start, 60, 50_000.0, 1e9);
            assert!((47_500.0..=50_000.0).contains(&found), "from {start}: {found}");
        }
    }

    #[test]
    fn tries_are_bounded_and_what_passed_stands() {
        let (found, tried) = search(100.0, 4, 50_000.0, 1e9);
        assert_eq!(tried, 4);
        assert!((found - 100.0 * STRIDE.powi(3)).abs() < 1e-6, "{found}");
        assert_eq!(search(100.0, 5, 0.0, 1e9), (0.0, 5), "a link that always loses has no loss-free rate");
    }

    #[test]
    fn a_sender_that_cannot_do_more_ends_the_search_there() {
        let (found, _) = search(1000.0, 60, 1e9, 8000.0);
        assert!((7600.0..=8000.0).contains(&found), "{found}");
    }

    #[test]
    fn a_search_from_what_is_known_takes_few_tries() {
        let (found, tried) = search(49_000.0, 60, 50_000.0, 1e9);
        assert!(found >= 47_500.0 && tried <= 12, "{found} after {tried}");
    }

    #[test]
    fn one_unlucky_try_is_forgiven() {
        let mut search = Search::new(100.0, 20);
        search.note(Verdict::Lost);
        assert_eq!(search.next_rate(), Some(100.0));
        search.note(Verdict::AllArrived(100.0));
        assert_eq!(search.next_rate(), Some(100.0 * STRIDE));
    }
}
