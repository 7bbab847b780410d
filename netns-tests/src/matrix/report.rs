//! The rows of a run, its sums, and one JSON line for gates.

use std::{fmt, time::Duration};

use serde::Serialize;

use super::judge::{Got, Verdict};
use crate::nat::oracle::{Expect, Pair};

/// How a pair in one place is called.
pub const SAME_NAT: &str = "same-nat";
/// DESIGN.md 8.
const DIRECT_P50_MS: u64 = 1000;
const DIRECT_P95_MS: u64 = 3000;
/// Of the hard pair's runs, this many tenths must be direct.
const HARD_TENTHS: u32 = 8;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    pub left: &'static str,
    pub right: &'static str,
    pub expect: Expect,
    pub got: Got,
    pub first_byte_ms: Option<u64>,
    pub direct_ms: Option<u64>,
    pub lost_on_switch: Option<usize>,
    pub ok: bool,
}

impl Row {
    /// Without a verdict nothing was got.
    pub fn of(pair: Pair, verdict: Option<&Verdict>) -> Self {
        let (left, right) = match pair {
            Pair::Apart(left, right) => (left.name(), right.name()),
            Pair::SameNat(_) => (SAME_NAT, SAME_NAT),
        };
        let ms = |value: fn(&Verdict) -> Option<Duration>| verdict.and_then(value).map(|took| took.as_millis() as u64);
        Self {
            left,
            right,
            expect: pair.expect(),
            got: verdict.map_or(Got::None, |verdict| verdict.got),
            first_byte_ms: ms(|verdict| verdict.first_byte),
            direct_ms: ms(|verdict| verdict.direct),
            lost_on_switch: verdict.and_then(|verdict| verdict.lost_on_switch),
            ok: verdict.is_some_and(|verdict| verdict.faults.is_empty()),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
        write!(
            f,
            "{} {:>14} {:<14} {:<6} first byte {:>5} ms  direct {:>5} ms  lost {}",
            if self.ok { "ok  " } else { "FAIL" },
            self.left,
            self.right,
            match self.got {
                Got::Direct => "direct",
                Got::Relay => "relay",
                Got::None => "none",
            },
            number(self.first_byte_ms),
            number(self.direct_ms),
            number(self.lost_on_switch.map(|lost| lost as u64)),
        )
    }
}

/// The pair that needs luck.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Hard {
    pub runs: u32,
    pub direct: u32,
}

impl Hard {
    fn ok(self) -> bool {
        self.direct * 10 >= self.runs * HARD_TENTHS
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub rows: Vec<Row>,
    /// `None` when it was not asked for.
    pub hard: Option<Hard>,
}

/// Of rows that had to be direct and were, and of all first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Summary {
    pub direct_p50_ms: Option<u64>,
    pub direct_p95_ms: Option<u64>,
    pub first_byte_max_ms: Option<u64>,
}

impl Report {
    pub fn ok(&self) -> bool {
        let summary = self.summary();
        (!self.rows.is_empty() || self.hard.is_some())
            && self.rows.iter().all(|row| row.ok)
            && summary.direct_p50_ms.is_none_or(|ms| ms < DIRECT_P50_MS)
            && summary.direct_p95_ms.is_none_or(|ms| ms < DIRECT_P95_MS)
            && self.hard.is_none_or(Hard::ok)
    }

    pub fn summary(&self) -> Summary {
        let mut direct: Vec<u64> =
            self.rows.iter().filter(|row| row.expect == Expect::Direct).filter_map(|row| row.direct_ms).collect();
        direct.sort_unstable();
        // The smallest that so many of 100 do not exceed.
        let percentile = |percent: usize| direct.get((direct.len() * percent).div_ceil(100).max(1) - 1).copied();
        Summary {
            direct_p50_ms: percentile(50),
            direct_p95_ms: percentile(95),
            first_byte_max_ms: self.rows.iter().filter_map(|row| row.first_byte_ms).max(),
        }
    }

    /// One line of JSON.
    pub fn json(&self) -> String {
        let line =
            Line { ok: self.ok(), rows: &self.rows, summary: self.summary(), hard: self.hard.unwrap_or_default() };
        serde_json::to_string(&line).expect("names and numbers are always JSON")
    }
}

/// The agreed order of keys.
#[derive(Serialize)]
struct Line<'a> {
    ok: bool,
    rows: &'a [Row],
    summary: Summary,
    hard: Hard,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::nat::Kind;

    fn direct(ms: u64) -> Row {
        let verdict = Verdict {
            got: Got::Direct,
            first_byte: Some(Duration::from_millis(170)),
            direct: Some(Duration::from_millis(ms)),
            lost_on_switch: Some(0),
            faults: Vec::new(),
        };
        Row::of(Pair::Apart(Kind::Open, Kind::EimApdf), Some(&verdict))
    }

    fn rows(times: &[u64]) -> Report {
        Report { rows: times.iter().copied().map(direct).collect(), hard: None }
    }

    #[test]
    fn percentiles_are_bounded() {
        let report = rows(&[100, 400, 200, 300]);
        assert_eq!((report.summary().direct_p50_ms, report.summary().direct_p95_ms), (Some(200), Some(400)));
        assert!(report.ok());
        assert!(!rows(&[100, 1000, 1000]).ok());
        assert!(!rows(&[100, 100, 3000]).ok());
        assert!(!rows(&[]).ok());
    }

    #[test]
    fn a_bad_row_and_an_unlucky_hard_pair_fail_the_run() {
        let mut report = rows(&[100]);
        report.rows.push(Row::of(Pair::SameNat(Kind::EimApdf), None));
        assert!(!report.ok());
        assert_eq!(report.rows[1].got, Got::None);
        let hard = |direct| Report { hard: Some(Hard { runs: 10, direct }), ..rows(&[100]) }.ok();
        assert!(hard(8) && !hard(7));
        let alone = |direct| Report { hard: Some(Hard { runs: 10, direct }), ..Report::default() }.ok();
        assert!(alone(8) && !alone(7));
    }

    #[test]
    fn the_json_line_has_the_agreed_shape() {
        let line = rows(&[250]).json();
        assert_eq!(
            line,
            r#"{"ok":true,"rows":[{"left":"open","right":"eim-apdf","expect":"direct","got":"direct","first_byte_ms":170,"direct_ms":250,"lost_on_switch":0,"ok":true}],"summary":{"direct_p50_ms":250,"direct_p95_ms":250,"first_byte_max_ms":170},"hard":{"runs":0,"direct":0}}"#
        );
    }
}
