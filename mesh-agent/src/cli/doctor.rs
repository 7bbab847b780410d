//! `doctor`: what commonly goes wrong, looked for on this machine.

use std::fmt::Write as _;

use mesh_common::config::Config;

use super::config_file::{self, InvalidConfig};
use super::{Global, Output, block_on, exit, print, to_json};
use crate::api::{ApiError, client};
use crate::doctor::{self, AgentAnswer, Finding, Level, Report, Subject};
use crate::secrets;
use crate::status::{Show, clean};

const RED: &str = "\u{1b}[31m";
const YELLOW: &str = "\u{1b}[33m";
const PLAIN: &str = "\u{1b}[0m";

pub(super) fn doctor(global: &Global) -> anyhow::Result<u8> {
    let (config, found) = configuration(global);
    let agent = match block_on(client::status(&global.settings().socket))? {
        Ok(status) => AgentAnswer::Status(Box::new(status)),
        Err(ApiError::NotRunning { .. }) => AgentAnswer::NotRunning,
        Err(error) => AgentAnswer::Silent(error.to_string()),
    };
    let has_config = config.is_some();
    let subject = Subject { config_file: global.config.clone(), config: config.unwrap_or_default(), agent };
    let mut report = if has_config { block_on(doctor::examine(&subject))? } else { Report::default() };
    report.add("configuration", Ok(found));
    print(&match global.output {
        Some(Output::Json) => to_json(&report)?,
        Some(Output::Yaml) => serde_saphyr::to_string(&report)?,
        None | Some(Output::Table | Output::Wide) => to_text(&report, global.show()),
    })?;
    Ok(if report.has_problems() { exit::DEGRADED } else { exit::OK })
}

/// The configuration as far as it is valid, and what is wrong with it and the files it names.
fn configuration(global: &Global) -> (Option<Config>, Vec<Finding>) {
    let config = match config_file::read(&global.config) {
        Ok(Some(read)) => read.config,
        Ok(None) => {
            let fix = "run `mesh-agent init` for a new cluster, or `mesh-agent join` with a token of one";
            let what = format!("this machine has no config ({})", global.config.display());
            return (None, vec![Finding::problem("configuration", what, fix)]);
        }
        Err(error) => {
            let fix = match error.downcast_ref::<InvalidConfig>() {
                Some(_) => "correct what is named; `mesh-agent config validate` checks it again",
                None => "run as root",
            };
            return (None, vec![Finding::problem("configuration", exit::describe(&error), fix)]);
        }
    };
    let is_member = config.mesh.enabled && !config.discovery.is_empty();
    let secret = is_member.then(|| secrets::cluster_secret(&config.cluster.secret)).and_then(Result::err);
    let found = secret.map(|error| {
        let fix = "copy the file from a node of the cluster, or run `mesh-agent join`; read it as root";
        Finding::problem("configuration", error.to_string(), fix)
    });
    (Some(config), found.into_iter().collect())
}

fn to_text(report: &Report, show: Show) -> String {
    let mut text = String::new();
    for Finding { level, check, what, fix } in &report.findings {
        let (word, colour) = match level {
            Level::Problem => ("Problem", RED),
            Level::Note => ("Note", YELLOW),
        };
        let word = if show.colour { format!("{colour}{word}{PLAIN}") } else { word.to_owned() };
        let _ = writeln!(text, "{word}: {} [{check}]\n    Fix: {}\n", clean(what), clean(fix));
    }
    for unchecked in &report.unchecked {
        let _ = writeln!(text, "Not checked: {} ({})\n", unchecked.check, clean(&unchecked.why));
    }
    let problems = report.findings.iter().filter(|finding| finding.level == Level::Problem).count();
    let passed = report.passed.join(", ");
    let _ = match problems {
        0 => writeln!(text, "No problem found. All right: {passed}"),
        1 => writeln!(text, "1 problem found. All right: {passed}"),
        _ => writeln!(text, "{problems} problems found. All right: {passed}"),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_come_with_their_fixes_and_nothing_a_terminal_obeys() {
        let mut report = Report::default();
        report.add("clock", Ok(vec![Finding::note("clock", "it is slow", "wind it up")]));
        report.add("servers", Ok(vec![Finding::problem("servers", "gone\u{1b}[2J", "wait")]));
        report.add("firewall", Err("only root may read it".to_owned()));
        report.add("tun", Ok(Vec::new()));
        let expected = "\
Problem: gone\u{fffd}[2J [servers]
    Fix: wait

Note: it is slow [clock]
    Fix: wind it up

Not checked: firewall (only root may read it)

1 problem found. All right: tun
";
        let show = Show { wide: false, colour: false, now_ms: 0 };
        assert_eq!(to_text(&report, show), expected);
        assert!(report.has_problems());
        assert!(to_text(&report, Show { colour: true, ..show }).starts_with("\u{1b}["));
    }
}
