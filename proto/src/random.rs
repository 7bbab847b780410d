//! Deterministic draws from a seed: jitter and simulated faults, never keys.

use std::time::Duration;

/// SplitMix64 (Steele, Lea and Flood 2014): one word of state, good enough to spread retries.
#[derive(Debug, Clone)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, 0 for a bound of 0. The bias of the modulo is below 2^-32 for every bound used here.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64().checked_rem(bound).unwrap_or(0)
    }

    /// Between half of `full` and all of it.
    pub fn jitter(&mut self, full: Duration) -> Duration {
        let half = full / 2;
        half + Duration::from_nanos(
            self.below(
                u64::try_from(half.as_nanos())
                    .unwrap_or(u64::MAX)
                    .saturating_add(1),
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_between_half_and_all() {
        let mut random = SplitMix64::new(1);
        let full = Duration::from_secs(10);
        let drawn: Vec<_> = (0..1000).map(|_| random.jitter(full)).collect();
        assert!(
            drawn
                .iter()
                .all(|pause| *pause >= full / 2 && *pause <= full)
        );
        assert!(
            drawn.iter().any(|pause| *pause < full * 6 / 10)
                && drawn.iter().any(|pause| *pause > full * 9 / 10)
        );
        assert_eq!(random.jitter(Duration::ZERO), Duration::ZERO);
    }
}
