//! The verdicts of a run, as a table for people and one JSON line for gates.

use std::time::Duration;

use anyhow::{Result, anyhow};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use crate::checks::cold_start::ColdStarts;

/// Every check of the demo, in the order of the run.
pub const CHECKS: [&str; 12] = [
    "node-to-node-v6",
    "node-to-node-v4",
    "pod-to-pod",
    "pod-to-node",
    "tcp-transfer",
    "link-deleted-restored",
    "server-killed-mesh-lives",
    "agent-restart-without-server",
    "boolean-off-removes-all",
    "boolean-on-rejoins",
    "no-cleartext-on-wire",
    "nothing-left-behind",
];

/// One verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub ok: bool,
    pub ms: u64,
    pub detail: String,
}

/// All verdicts. `ok` only when every check passed and every cold start was answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub checks: Vec<Check>,
    pub cold_start_ms: Option<ColdStarts>,
}

impl Report {
    pub fn ok(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.ok) && self.cold_start_ms.is_some()
    }

    /// Adds a verdict and gives it back.
    pub fn add(&mut self, name: &'static str, took: Duration, verdict: Result<String>) -> Check {
        let (ok, detail) = match verdict {
            Ok(detail) => (true, detail),
            Err(error) => (false, format!("{error:#}")),
        };
        let check = Check { name, ok, ms: took.as_millis() as u64, detail };
        self.checks.push(check.clone());
        check
    }

    /// When nothing could be checked, nothing passed; the first check says why.
    pub fn all_failed(&mut self, why: &str) {
        self.checks.clear();
        for name in CHECKS {
            let detail = if self.checks.is_empty() { why } else { "not checked" };
            self.add(name, Duration::ZERO, Err(anyhow!("{detail}")));
        }
    }

    /// One line of JSON.
    pub fn json(&self) -> String {
        let line = Line { ok: self.ok(), checks: &self.checks, cold_start_ms: self.cold_start_ms.as_ref() };
        serde_json::to_string(&line).expect("names, numbers and texts are always JSON")
    }

    pub fn table(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_header(["CHECK", "OK", "MS", "DETAIL"]);
        for check in &self.checks {
            table.add_row([check.name, if check.ok { "yes" } else { "NO" }, &check.ms.to_string(), &check.detail]);
        }
        table.to_string()
    }
}

/// The agreed order of keys.
#[derive(Serialize)]
struct Line<'a> {
    ok: bool,
    checks: &'a [Check],
    cold_start_ms: Option<&'a ColdStarts>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn passed() -> Report {
        let mut report = Report::default();
        report.add("pod-to-pod", Duration::from_millis(7), Ok("fine".into()));
        report.cold_start_ms = Some(ColdStarts { runs: 1, p50: 2, p95: 3, max: 4 });
        report
    }

    #[test]
    fn one_failed_check_fails_the_run() {
        let mut report = passed();
        assert!(report.ok());
        report.add("pod-to-node", Duration::ZERO, Err(anyhow::anyhow!("inner").context("outer")));
        assert!(!report.ok());
        assert!(report.table().contains("outer: inner"), "{}", report.table());
    }

    #[test]
    fn missing_cold_starts_or_checks_fail_the_run() {
        assert!(!Report { cold_start_ms: None, ..passed() }.ok());
        assert!(!Report { checks: Vec::new(), ..passed() }.ok());
        let mut report = Report::default();
        report.all_failed("no");
        assert_eq!((report.ok(), report.checks.len()), (false, 12));
    }

    #[test]
    fn the_json_line_has_the_agreed_shape() {
        let line = passed().json();
        assert!(line.starts_with(r#"{"ok":true,"checks":[{"name":"pod-to-pod","#) && !line.contains('\n'), "{line}");
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["ok"], true);
        assert_eq!(
            value["checks"][0],
            serde_json::json!({"name": "pod-to-pod", "ok": true, "ms": 7, "detail": "fine"})
        );
        assert_eq!(value["cold_start_ms"], serde_json::json!({"runs": 1, "p50": 2, "p95": 3, "max": 4}));
    }
}
