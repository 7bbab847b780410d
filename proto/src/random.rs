//! Repeatable pseudo-random draws for jitter and order, from a seed that the caller gives.
//!
//! Never for keys, nonces or challenges: a reader of a few draws knows all others.

use std::time::Duration;

/// Sebastiano Vigna's SplitMix64: one 64-bit word of state, every seed is good.
#[derive(Debug, Clone)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `bound`, or zero when `bound` is zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        // The high half of a 128-bit product: a bias below bound / 2^64, too small to matter for jitter.
        let product = u128::from(self.next_u64()) * u128::from(bound);
        (product >> 64) as u64
    }

    /// Between half of `full` and all of it.
    pub fn jitter(&mut self, full: Duration) -> Duration {
        self.between(full / 2, full)
    }

    /// A duration from `low` to `high`, both possible; `low` when it is not the smaller one.
    pub fn between(&mut self, low: Duration, high: Duration) -> Duration {
        let nanos = u64::try_from(high.saturating_sub(low).as_nanos()).unwrap_or(u64::MAX);
        low.saturating_add(Duration::from_nanos(self.below(nanos.saturating_add(1))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_published_sequence() {
        // The first outputs of the reference implementation for seed 1234567.
        let mut random = SplitMix64::new(1_234_567);
        assert_eq!(random.next_u64(), 6_457_827_717_110_365_317);
        assert_eq!(random.next_u64(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn draws_stay_in_their_range_and_reach_both_ends() {
        let mut random = SplitMix64::new(1);
        let (low, high) = (Duration::from_nanos(5), Duration::from_nanos(8));
        let drawn: std::collections::BTreeSet<_> = (0..200).map(|_| random.between(low, high)).collect();
        assert_eq!(drawn, (5..=8).map(Duration::from_nanos).collect());
        assert_eq!(random.between(high, low), high);
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn jitter_stays_between_half_and_all() {
        let mut random = SplitMix64::new(1);
        let full = Duration::from_secs(10);
        let drawn: Vec<_> = (0..1000).map(|_| random.jitter(full)).collect();
        assert!(drawn.iter().all(|pause| *pause >= full / 2 && *pause <= full));
        assert!(drawn.iter().any(|pause| *pause < full * 6 / 10) && drawn.iter().any(|pause| *pause > full * 9 / 10));
        assert_eq!(random.jitter(Duration::ZERO), Duration::ZERO);
    }
}
