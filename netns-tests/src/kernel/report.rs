//! The verdicts of a run and one JSON line for gates.

use std::{path::Path, time::Duration};

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Every check, in the order of the run.
pub const CHECKS: [&str; 16] = [
    "kernel-kernel",
    "kernel-userspace",
    "kernel-behind-nat-direct",
    "both-begin-at-once",
    "kernel-relay",
    "relay-to-direct-no-loss",
    "kernel-roaming-kept",
    "backend-switch",
    "link-deleted-restored",
    "changed-by-hand-restored",
    "module-gone-restored",
    "foreign-link-untouched",
    "no-key-in-log",
    "fail-closed-no-cleartext",
    "cleanup-leaves-nothing",
    "1000-peers",
];
/// The kind of a link of the kernel's WireGuard.
pub const WIREGUARD: &str = "wireguard";

/// What a check found: good so far, and which links it was about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub detail: String,
    /// Of the nodes that must be carried by the kernel, while packets went.
    pub link_kinds: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    pub ms: u64,
    pub detail: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub ok: bool,
    /// The release of the kernel that ran the checks.
    pub kernel: String,
    pub wireguard_module: bool,
    pub checks: Vec<Check>,
}

impl Report {
    /// Nothing checked yet, on the kernel that runs this.
    pub fn of_this_kernel() -> Result<Self> {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Ok(Self {
            kernel: release.trim().to_owned(),
            wireguard_module: Path::new("/sys/module/wireguard").exists(),
            ..Self::default()
        })
    }

    pub fn add(&mut self, name: &str, took: Duration, finding: Result<Finding>) -> Check {
        let (ok, detail) = match finding {
            Ok(Finding { detail, link_kinds }) if is_kernel(&link_kinds) => (true, detail),
            Ok(Finding { link_kinds, .. }) => (false, format!("the links are of kind {link_kinds:?}, not {WIREGUARD}")),
            Err(error) => (false, format!("{error:#}")),
        };
        let check = Check { name: name.to_owned(), ok, ms: took.as_millis() as u64, detail };
        self.checks.push(check.clone());
        self.ok = self.wireguard_module && self.checks.iter().all(|check| check.ok);
        check
    }

    pub fn has(&self, name: &str) -> bool {
        self.checks.iter().any(|check| check.name == name)
    }

    /// Whether it holds exactly these checks and all passed.
    pub fn passed(&self, names: &[String]) -> bool {
        let is_complete = if names.is_empty() {
            CHECKS.iter().all(|name| self.has(name))
        } else {
            names.iter().all(|name| self.has(name))
        };
        self.ok && is_complete
    }

    /// One line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("names, numbers and texts are always JSON")
    }
}

fn is_kernel(kinds: &[String]) -> bool {
    !kinds.is_empty() && kinds.iter().all(|kind| kind == WIREGUARD)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn finding(kinds: &[&str]) -> Result<Finding> {
        let link_kinds = kinds.iter().map(|kind| (*kind).to_owned()).collect();
        Ok(Finding { detail: "fine".into(), link_kinds })
    }

    fn with_module() -> Report {
        Report { wireguard_module: true, kernel: "6.1".into(), ..Report::default() }
    }

    #[test]
    fn a_check_counts_only_on_links_of_kind_wireguard() {
        for kinds in [&["tun"][..], &["wireguard", "tun"], &[]] {
            let mut report = with_module();
            assert!(!report.add("kernel-kernel", Duration::ZERO, finding(kinds)).ok, "{kinds:?}");
            assert!(!report.ok);
        }
        let mut report = with_module();
        assert!(report.add("kernel-kernel", Duration::ZERO, finding(&["wireguard", "wireguard"])).ok);
        assert!(report.ok && report.passed(&["kernel-kernel".to_owned()]));
        assert!(!report.passed(&[]), "a run of one check is no run of all");
        report.add("kernel-relay", Duration::ZERO, Err(anyhow::anyhow!("inner").context("outer")));
        assert!(!report.ok && report.json().contains("outer: inner"));
    }

    #[test]
    fn without_the_module_nothing_passes() {
        let mut report = Report::default();
        report.add("kernel-kernel", Duration::ZERO, finding(&["wireguard"]));
        assert!(!report.ok && !report.passed(&["kernel-kernel".to_owned()]));
    }

    #[test]
    fn the_json_line_has_the_agreed_shape() {
        let mut report = with_module();
        report.add("kernel-kernel", Duration::from_millis(7), finding(&["wireguard"]));
        assert_eq!(
            report.json(),
            r#"{"ok":true,"kernel":"6.1","wireguard_module":true,"checks":[{"name":"kernel-kernel","ok":true,"ms":7,"detail":"fine"}]}"#
        );
        assert_eq!(serde_json::from_str::<Report>(&report.json()).unwrap(), report);
    }
}
