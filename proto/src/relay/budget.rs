//! How many bytes a second one client or one namespace may have relayed.

use std::time::Duration;

use mesh_common::limits::RELAY_BURST;
use mesh_common::time::Instant;

/// Below this burst nothing would ever pass at a small rate.
const MIN_BURST_BYTES: u64 = 64 * 1024;

/// A token bucket, kept as the moment at which it will be full again.
#[derive(Debug, Clone, Copy)]
pub(super) struct ByteBudget {
    full_at: Instant,
}

/// Bytes a second, and the burst that goes with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ByteRate {
    per_second: u64,
    /// The burst, as the time it takes at this rate.
    burst: Duration,
}

impl ByteRate {
    pub(super) fn new(per_second: u64) -> Self {
        let rate = Self { per_second: per_second.max(1), burst: Duration::ZERO };
        Self { burst: RELAY_BURST.max(rate.time_of(MIN_BURST_BYTES)), ..rate }
    }

    fn time_of(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

impl ByteBudget {
    /// A full one.
    pub(super) fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Whether there is room for so many bytes, or how long until there is.
    pub(super) fn check(&self, rate: ByteRate, bytes: usize, now: Instant) -> Result<(), Duration> {
        let wanted = self.full_at.since(now).saturating_add(rate.time_of(bytes as u64));
        match wanted.checked_sub(rate.burst) {
            Some(missing) if !missing.is_zero() => Err(missing),
            _ => Ok(()),
        }
    }

    pub(super) fn spend(&mut self, rate: ByteRate, bytes: usize, now: Instant) {
        self.full_at = self.full_at.max(now) + rate.time_of(bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(budget: &mut ByteBudget, rate: ByteRate, bytes: usize, now: Instant) -> bool {
        let has_room = budget.check(rate, bytes, now).is_ok();
        if has_room {
            budget.spend(rate, bytes, now);
        }
        has_room
    }

    #[test]
    fn a_burst_passes_then_the_rate_and_a_rest_gives_the_burst_again() {
        let rate = ByteRate::new(4 << 20);
        let start = Instant::from_origin(Duration::from_secs(5));
        let mut budget = ByteBudget::new(start);
        let passed = (0..10_000).filter(|_| take(&mut budget, rate, 1024, start)).count();
        assert_eq!(passed, 1024, "a quarter of a second's worth");
        let missing = budget.check(rate, 1024, start).expect_err("nothing is left");
        assert!(missing <= rate.time_of(1024) && !missing.is_zero(), "{missing:?}");
        // A second of trying each millisecond passes what a second earns.
        let passed: usize = (1..=1000)
            .map(|ms| start + Duration::from_millis(ms))
            .map(|now| (0..100).filter(|_| take(&mut budget, rate, 1024, now)).count())
            .sum();
        assert!((4094..=4096).contains(&passed), "{passed}");
        let rested = start + Duration::from_secs(3600);
        let passed = (0..10_000).filter(|_| take(&mut budget, rate, 1024, rested)).count();
        assert_eq!(passed, 1024);
    }

    #[test]
    fn the_smallest_rate_lets_the_largest_datagram_through() {
        let rate = ByteRate::new(1);
        let mut budget = ByteBudget::new(Instant::ORIGIN);
        assert!(take(&mut budget, rate, mesh_common::limits::MAX_RELAY_PAYLOAD, Instant::ORIGIN));
    }
}
