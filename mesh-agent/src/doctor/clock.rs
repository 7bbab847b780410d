//! The system's clock: whether it is plainly wrong, and whether anything sets it.
//!
//! A record's number begins with the clock, and who had an address or a prefix first is told by it: a clock that is years
//! off makes a node lose, or win, what it should not.

#![allow(unsafe_code)]

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Finding;

/// Before this the program was not written: 1 November 2025.
const WRITTEN: Duration = Duration::from_secs(1_761_955_200);
/// Of `linux/timex.h`.
const TIME_ERROR: i32 = 5;

#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    since_1970: Duration,
    /// Something keeps it right.
    is_synchronised: bool,
}

pub(super) fn read() -> io::Result<Clock> {
    // SAFETY: `timex` is a plain C struct, all zeros is a valid value of it: no mode is a mere question.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the struct is valid for the time of the call, and ours alone.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Clock { since_1970, is_synchronised: state != TIME_ERROR })
}

pub(super) fn check(clock: &Clock) -> Vec<Finding> {
    let fix = "timedatectl set-ntp true, or another way to set the clock";
    if clock.since_1970 < WRITTEN {
        let years = clock.since_1970.as_secs() / 31_557_600 + 1970;
        return vec![Finding::problem("clock", format!("the system's clock is wrong, it shows the year {years}"), fix)];
    }
    if clock.is_synchronised {
        return Vec::new();
    }
    vec![Finding::note("clock", "the kernel knows of nothing that keeps the system's clock right", fix)]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_of_the_past_is_a_problem_and_an_unkept_one_a_note() {
        let now = read().unwrap().since_1970;
        let found = |since_1970, is_synchronised| check(&Clock { since_1970, is_synchronised });
        assert!(found(now, true).is_empty());
        assert_eq!(found(now, false)[0].level, super::super::Level::Note);
        for kept in [true, false] {
            let wrong = found(Duration::from_secs(3600), kept);
            assert_eq!(wrong[0].level, super::super::Level::Problem);
            assert!(wrong[0].what.ends_with("it shows the year 1970"), "{wrong:?}");
        }
    }
}
