//! Waiting for a condition with a deadline. Nothing in the lab sleeps for a guessed time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Time between two looks at a condition.
pub const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Calls `probe` until it gives a value; returns the value and how long that took.
///
/// An error of the probe counts as "not yet" and is named if the deadline passes.
pub fn until<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<(T, Duration)> {
    let start = Instant::now();
    loop {
        let last = match probe() {
            Ok(Some(value)) => return Ok((value, start.elapsed())),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= within {
            match last {
                Some(error) => bail!("waited {within:?} for {what}; the last look said: {error:#}"),
                None => bail!("waited {within:?} for {what}"),
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The same for something that `subject` must stay alive for: when `alive` fails, its error ends the wait at once.
pub fn until_or_dead<S, T>(
    what: &str,
    within: Duration,
    subject: &mut S,
    mut alive: impl FnMut(&mut S) -> Result<()>,
    mut probe: impl FnMut(&mut S) -> Result<Option<T>>,
) -> Result<(T, Duration)> {
    let (verdict, took) = until(what, within, || match alive(subject) {
        Ok(()) => Ok(probe(subject)?.map(Ok)),
        Err(dead) => Ok(Some(Err(dead))),
    })?;
    Ok((verdict?, took))
}

/// The same for a plain condition; returns how long it took to come true.
pub fn until_true(what: &str, within: Duration, mut probe: impl FnMut() -> Result<bool>) -> Result<Duration> {
    until(what, within, || Ok(probe()?.then_some(()))).map(|((), took)| took)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_condition_that_comes_true_ends_the_wait() {
        let mut looks = 0;
        let (value, _) = until("the third look", Duration::from_secs(5), || {
            looks += 1;
            Ok((looks == 3).then_some("seen"))
        })
        .unwrap();
        assert_eq!((value, looks), ("seen", 3));
    }

    #[test]
    fn a_dead_subject_ends_the_wait() {
        let start = Instant::now();
        let hour = Duration::from_secs(3600);
        let error =
            until_or_dead("a sign of life", hour, &mut (), |()| bail!("it is dead"), |()| Ok(None::<()>)).unwrap_err();
        assert_eq!(error.to_string(), "it is dead");
        assert!(start.elapsed() < hour);
    }

    #[test]
    fn a_deadline_names_the_condition_and_the_last_error() {
        let error = until_true("the moon", Duration::ZERO, || bail!("too cloudy")).unwrap_err().to_string();
        assert!(error.contains("the moon") && error.contains("too cloudy"), "{error}");
    }
}
