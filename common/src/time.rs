//! Monotonic time as an argument: a point on the clock that the caller reads.
//!
//! The origin is the caller's (boot of the host, start of a simulation). Nothing here reads a clock, and nothing here
//! can be compared with wall time.

use std::ops::{Add, AddAssign};
use std::time::Duration;

/// A point in monotonic time: nanoseconds since an origin that one caller keeps for its whole life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Instant(u64);

impl Instant {
    pub const ORIGIN: Self = Self(0);

    /// The point this long after the origin; saturates after 584 years.
    pub fn from_origin(elapsed: Duration) -> Self {
        Self(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX))
    }

    pub fn since_origin(self) -> Duration {
        Duration::from_nanos(self.0)
    }

    /// How long after `earlier` this is; zero when it is not later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, rhs: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, rhs: Duration) {
        *self = *self + rhs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates_instead_of_wrapping() {
        let late = Instant::from_origin(Duration::MAX);
        assert_eq!(late + Duration::from_secs(1), late);
        assert_eq!(Instant::ORIGIN.since(late), Duration::ZERO);
        assert_eq!((Instant::ORIGIN + Duration::from_millis(5)).since(Instant::ORIGIN), Duration::from_millis(5));
    }
}
