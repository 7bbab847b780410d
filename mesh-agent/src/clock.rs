//! The only clocks of the agent: time since boot that counts suspension, and the wall clock for sequence numbers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_common::time::Instant;
use nix::time::{ClockId, clock_gettime};

/// Time since boot, suspension included: a session that slept through its life must not look young.
pub fn now() -> Instant {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
    Instant::from_origin(Duration::from(time))
}

/// The deadline on tokio's clock, which stands still while the host sleeps: the event loop looks again when it wakes.
pub fn deadline(at: Instant) -> tokio::time::Instant {
    tokio::time::Instant::now() + at.since(now())
}

/// Milliseconds since 1970 by the wall clock; 0 before that.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
