//! How long a pair did not hear each other, from the exchange alone.

use std::time::{Duration, Instant};

use crate::traffic::Beat;

/// Questions sent in so long a time at the end must all be answered, or the pair has not recovered.
pub const RECOVERED: Duration = Duration::from_secs(1);

/// The longest time without an answer, from `event` on. A pair that was never heard again is silent to the end.
pub fn longest_gap(answers: impl IntoIterator<Item = Instant>, event: Instant, end: Instant) -> Duration {
    let mut times: Vec<Instant> = answers.into_iter().filter(|at| *at > event && *at < end).collect();
    times.extend([event, end]);
    times.sort_unstable();
    times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

/// When answers came.
pub fn answers(beats: &[Beat]) -> impl Iterator<Item = Instant> {
    beats.iter().filter_map(|beat| beat.answered)
}

/// Questions from `event` on that were not answered.
pub fn lost_since(beats: &[Beat], event: Instant) -> usize {
    beats.iter().filter(|beat| beat.sent >= event && beat.lost()).count()
}

/// Every question of a second that ended `late` ago was answered.
pub fn has_recovered(beats: &[Beat], late: Duration) -> bool {
    let Some(end) = beats.last().and_then(|beat| beat.sent.checked_sub(late)) else {
        return false;
    };
    let mut recent = beats.iter().filter(|beat| beat.sent <= end && beat.sent + RECOVERED >= end).peekable();
    recent.peek().is_some() && recent.all(|beat| !beat.lost())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const STEP: Duration = Duration::from_millis(5);

    /// Four seconds of questions; those of the given milliseconds are lost.
    fn beats(lost: std::ops::Range<u32>) -> Vec<Beat> {
        let start = Instant::now();
        (0..800)
            .map(|number| {
                let sent = start + STEP * number;
                let answered = (!lost.contains(&(number * 5))).then(|| sent + Duration::from_millis(40));
                Beat { sent, arrived: answered, answered }
            })
            .collect()
    }

    #[test]
    fn a_gap_is_as_long_as_nobody_answered() {
        let beats = beats(1000..2500);
        let (start, end) = (beats[0].sent, beats.last().unwrap().sent);
        let gap = longest_gap(answers(&beats), start + Duration::from_millis(1000), end);
        assert_eq!(gap, Duration::from_millis(1505));
        assert_eq!(lost_since(&beats, start + Duration::from_millis(1000)), 300);
        assert!(has_recovered(&beats, Duration::ZERO));
        // Counted from the event, not from the last answer before it.
        let late = start + Duration::from_millis(2000);
        assert!(longest_gap(answers(&beats), late, end) < Duration::from_millis(550));
        assert_eq!(longest_gap(answers(&beats), start + Duration::from_millis(3000), end), STEP);
    }

    #[test]
    fn a_pair_that_stays_silent_has_a_gap_to_the_end_and_did_not_recover() {
        let beats = beats(1000..4000);
        let (start, end) = (beats[0].sent, beats.last().unwrap().sent);
        assert_eq!(longest_gap(answers(&beats), start + Duration::from_millis(1000), end), Duration::from_millis(2960));
        assert!(!has_recovered(&beats, Duration::ZERO));
        assert!(!has_recovered(&beats[..1], Duration::from_secs(1)));
        assert!(!has_recovered(&[], Duration::ZERO));
    }
}
