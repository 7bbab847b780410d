//! The verdicts of a run and one JSON line for gates.

use std::{fmt, time::Duration};

use serde::Serialize;

/// Every check, in the order of the run.
pub const CHECKS: [&str; 9] = [
    "direct-cut-relay-up",
    "uplink-swap",
    "udp-blocked-start",
    "udp-blocked-midflight-tcp-survives",
    "nat-rebind",
    "suspend-resume",
    "relay-restart",
    "same-port-behind-one-nat",
    "connect-proxy",
];

/// What an event did to a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    pub gap: Duration,
    pub bound: Duration,
    /// Questions without an answer, from the event on.
    pub lost: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    /// `None` when it could not be measured.
    pub gap_ms: Option<u64>,
    pub bound_ms: Option<u64>,
    pub lost: Option<usize>,
    pub ok: bool,
}

impl Check {
    pub fn of(name: &'static str, outcome: Option<Outcome>) -> Self {
        Self {
            name,
            gap_ms: outcome.map(|outcome| outcome.gap.as_millis() as u64),
            bound_ms: outcome.map(|outcome| outcome.bound.as_millis() as u64),
            lost: outcome.map(|outcome| outcome.lost),
            ok: outcome.is_some_and(|outcome| outcome.gap <= outcome.bound),
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.ok { "ok  " } else { "FAIL" }, self.name)?;
        if let (Some(gap), Some(bound), Some(lost)) = (self.gap_ms, self.bound_ms, self.lost) {
            write!(f, ": {gap} ms of {bound} ms, {lost} lost")?;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub checks: Vec<Check>,
}

impl Report {
    pub fn ok(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.ok)
    }

    /// One line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(&Line { ok: self.ok(), checks: &self.checks }).expect("names and numbers are always JSON")
    }
}

/// The agreed order of keys.
#[derive(Serialize)]
struct Line<'a> {
    ok: bool,
    checks: &'a [Check],
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(gap_ms: u64) -> Outcome {
        Outcome { gap: Duration::from_millis(gap_ms), bound: Duration::from_secs(3), lost: 7 }
    }

    #[test]
    fn a_gap_over_its_bound_or_an_unmeasured_check_fails_the_run() {
        let good = Check::of("nat-rebind", Some(outcome(3000)));
        assert!(Report { checks: vec![good.clone()] }.ok());
        assert!(!Report { checks: vec![good.clone(), Check::of("uplink-swap", Some(outcome(3001)))] }.ok());
        assert!(!Report { checks: vec![good, Check::of("uplink-swap", None)] }.ok());
        assert!(!Report::default().ok());
    }

    #[test]
    fn the_json_line_has_the_agreed_shape() {
        let report = Report { checks: vec![Check::of("nat-rebind", Some(outcome(900)))] };
        assert_eq!(
            report.json(),
            r#"{"ok":true,"checks":[{"name":"nat-rebind","gap_ms":900,"bound_ms":3000,"lost":7,"ok":true}]}"#
        );
    }
}
