//! What commonly keeps a node from its peers, found by looking, each with the command that helps.
//!
//! Reads the host, the configuration and, when one runs, the agent's status; changes nothing. A check that cannot look says
//! so instead of guessing. Each check is a function from facts to findings; gathering facts is apart from judging them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::{fs, io};

use ipnet::IpNet;
use mesh_common::config::Config;
use serde::Serialize;

use crate::status::{NodeState, Status};

mod clock;
mod firewall;
mod host;
mod iptables;
mod mesh;
mod nftables;
mod port;
mod ruleset;
mod servers;

/// One thing that is wrong, or may be, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub level: Level,
    /// The check that found it.
    pub check: &'static str,
    pub what: String,
    pub fix: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Something does not work, or will not.
    Problem,
    /// It matters only to some.
    Note,
}

/// A check that could not look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unchecked {
    pub check: &'static str,
    pub why: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Problems first.
    pub findings: Vec<Finding>,
    pub unchecked: Vec<Unchecked>,
    /// Checks that looked and found nothing.
    pub passed: Vec<&'static str>,
}

/// What the agent says, if there is one.
#[derive(Debug)]
pub enum AgentAnswer {
    Status(Box<Status>),
    NotRunning,
    /// There may be one, and it does not talk to us.
    Silent(String),
}

/// What is known before looking at the host.
#[derive(Debug)]
pub struct Subject {
    pub config_file: PathBuf,
    /// As far as it can be read.
    pub config: Config,
    pub agent: AgentAnswer,
}

impl Finding {
    pub(crate) fn problem(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { level: Level::Problem, check, what: what.into(), fix: fix.into() }
    }

    pub(crate) fn note(check: &'static str, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { level: Level::Note, ..Self::problem(check, what, fix) }
    }
}

impl Report {
    /// There is something to be mended.
    pub fn has_problems(&self) -> bool {
        self.findings.iter().any(|finding| finding.level == Level::Problem)
    }

    /// Notes what a check came to.
    pub fn add(&mut self, check: &'static str, outcome: Result<Vec<Finding>, String>) {
        match outcome {
            Ok(found) if found.is_empty() => self.passed.push(check),
            Ok(found) => self.findings.extend(found),
            Err(why) => self.unchecked.push(Unchecked { check, why }),
        }
        self.findings.sort_by_key(|finding| finding.level);
    }
}

/// Looks at everything.
pub async fn examine(subject: &Subject) -> Report {
    let mut report = Report::default();
    let mesh = &subject.config.mesh;
    let status = match &subject.agent {
        AgentAnswer::Status(status) => Some(status.as_ref()),
        _ => None,
    };
    let is_on = status.is_some_and(|status| status.node.state != NodeState::Disabled);
    report.add("agent", Ok(mesh::agent(subject)));
    if let Some(status) = status {
        report.add("mesh", Ok(mesh::problems(status)));
    }
    report.add("servers", servers::check(subject, status).await);
    report.add("tun", Ok(host::tun()));
    if !is_on {
        let taken = port::users(mesh.listen_port).map_err(|error| format!("cannot list the UDP sockets: {error}"));
        report.add("port", taken.map(|users| port::check(mesh.listen_port, &users)));
    }
    let port = status.filter(|_| is_on).map_or(mesh.listen_port, |status| status.node.listen_port);
    report.add("firewall", firewall(&subject.config, port));
    let interface = mesh.interface_name.as_str();
    report.add("forwarding", host::forwarding().map(|on| host::check_forwarding(&networks(&subject.config), on)));
    report.add("rp_filter", Ok(host::check_rp_filter(interface, host::rp_filter(interface))));
    report.add("clock", clock::read().map(|clock| clock::check(&clock)).map_err(|error| error.to_string()));
    report
}

/// What this node announces of the networks behind it.
fn networks(config: &Config) -> Vec<IpNet> {
    let pods = config.mesh.pod_cidrs.iter().filter(|_| config.mesh.advertise_kubernetes_networks);
    pods.chain(&config.mesh.extra_prefixes).copied().collect()
}

fn firewall(config: &Config, port: u16) -> Result<Vec<Finding>, String> {
    let sources = firewall_sources()?;
    let networks = networks(config);
    let needs = firewall::Needs {
        interface: config.mesh.interface_name.as_str(),
        port,
        networks: &networks,
        uplink_v4: host::uplink_v4(),
        uplink_v6: host::uplink_v6(),
        indices: host::link_indices(),
    };
    Ok(firewall::check(&needs, &sources))
}

/// Both packet filters may be in use at once, and a packet has to pass both.
fn firewall_sources() -> Result<Vec<firewall::Source>, String> {
    let tables = match nftables::tables() {
        Ok(tables) => tables,
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
            return Err("only root may read the firewall: run as root".to_owned());
        }
        Err(error) if crate::device::has_no_nftables(&error) => BTreeMap::new(),
        Err(error) => return Err(format!("cannot read the firewall: {error}")),
    };
    let mut sources: Vec<_> =
        tables.into_iter().map(|((family, name), table)| firewall::Source { family, name, table }).collect();
    for (family, names, program) in [
        (nftables::Family::Ipv4, "/proc/net/ip_tables_names", "iptables"),
        (nftables::Family::Ipv6, "/proc/net/ip6_tables_names", "ip6tables"),
    ] {
        if lists_a_filter(names)? {
            let table = iptables::parse(&iptables::rules(program)?);
            sources.push(firewall::Source { family, name: "filter".to_owned(), table });
        }
    }
    Ok(sources)
}

fn lists_a_filter(file: &str) -> Result<bool, String> {
    match fs::read_to_string(file) {
        Ok(names) => Ok(names.lines().any(|name| name == "filter")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(format!("{file} cannot be read: {error}")),
    }
}

#[cfg(test)]
mod tests;
