//! Discovery servers: those that the agent has no session with are tried from here.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::{Finding, Subject};
use crate::io::session::{Carrier, CarrierKind, DialError, Dialer, ServerAddress};
use crate::node_settings;
use crate::status::{self, ServerState, Status};

pub(super) async fn check(subject: &Subject, status: Option<&Status>) -> Result<Vec<Finding>, String> {
    let dialer = Dialer::new().map_err(|error| format!("cannot open sockets for discovery servers: {error}"))?;
    let servers = node_settings::servers(&subject.config);
    let tried = join_all(servers.into_iter().map(async |address| {
        let told = status.and_then(|status| told(status, &address));
        if let Some(status::ServerStatus { state: ServerState::Connected, carrier, .. }) = told {
            return (address, Outcome::Session(*carrier == Some(status::Carrier::Quic)));
        }
        let outcome = match dialer.dial(&address).await {
            Err(error) => Outcome::NoCarrier(error),
            Ok(Carrier { kind, sender, .. }) => {
                // The server hears that this was all.
                let _late = timeout(Duration::from_secs(1), sender.close()).await;
                Outcome::Answers { by_udp: kind == CarrierKind::Quic, told: told.map(|server| server.detail.clone()) }
            }
        };
        (address, outcome)
    }));
    let tried = tried.await;
    let config = subject.config_file.display().to_string();
    Ok(judge(&tried, &config))
}

/// What came of one server.
#[derive(Debug)]
enum Outcome {
    /// The agent has a session, over UDP or not.
    Session(bool),
    /// It answers us. What it told the agent, which has no session with it, or that there is no agent.
    Answers {
        by_udp: bool,
        told: Option<String>,
    },
    NoCarrier(DialError),
}

fn told<'a>(status: &'a Status, server: &ServerAddress) -> Option<&'a status::ServerStatus> {
    let endpoint = server.to_string();
    status.servers.iter().find(|server| server.endpoint == endpoint)
}

fn judge(tried: &[(ServerAddress, Outcome)], config: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (server, outcome) in tried {
        match outcome {
            Outcome::NoCarrier(error) => {
                findings.push(Finding::problem("servers", error.to_string(), fix(error, config)))
            }
            Outcome::Answers { told: Some(told), .. } if !told.is_empty() => findings.push(Finding::problem(
                "servers",
                format!("the agent has no session with {server}: {told}"),
                "do what the reason says; the agent tries again by itself",
            )),
            Outcome::Answers { .. } | Outcome::Session(_) => {}
        }
    }
    let answering = tried.iter().filter_map(|(_, outcome)| match outcome {
        Outcome::Session(by_udp) | Outcome::Answers { by_udp, .. } => Some(*by_udp),
        Outcome::NoCarrier(_) => None,
    });
    let mut answering = answering.peekable();
    if answering.peek().is_some() && !answering.any(|by_udp| by_udp) {
        findings.push(Finding::problem(
            "udp",
            "discovery servers answer over TCP and none over UDP: a firewall on the way seems to block UDP, so there is no \
             direct path to peers elsewhere and their traffic goes over a relay",
            "let UDP out there; if nobody may, an own relay near the nodes is the fastest way round",
        ));
    }
    findings
}

fn fix(error: &DialError, config: &str) -> String {
    match error {
        DialError::NameNotResolved { host, .. } => {
            format!("see whether `getent hosts {host}` answers; correct the name in {config}, or this node's DNS")
        }
        DialError::NothingAnswers { endpoint, .. } => {
            let place = endpoint.trim_start_matches("https://");
            format!(
                "see on the server whether discovery-server runs, and open its port there and on the way, for UDP or TCP \
                 ({place})"
            )
        }
        DialError::WrongPin { .. } => format!(
            "ask for the pin on the server itself (`discovery-server token`), not over the network; if it is the new one, \
             put it into {config}, then `systemctl reload mesh-agent`"
        ),
        DialError::Proxy { proxy, .. } => format!(
            "correct `mesh.proxy` in {config} (or HTTPS_PROXY), or have {proxy} let this node through to the server"
        ),
        DialError::NotTls { .. } | DialError::NotADiscoveryServer { .. } | DialError::HungUp { .. } => {
            format!("correct host and port in {config}, or have the server listen there")
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn server(name: &str) -> ServerAddress {
        ServerAddress { host: name.to_owned(), port: 443, pin: [7; 32], proxy: None }
    }

    fn answers(by_udp: bool, told: Option<&str>) -> Outcome {
        Outcome::Answers { by_udp, told: told.map(str::to_owned) }
    }

    #[test]
    fn udp_is_blocked_when_servers_answer_and_none_by_udp() {
        let blocked = |outcomes: Vec<Outcome>| {
            let tried: Vec<_> = outcomes.into_iter().map(|outcome| (server("disc.example"), outcome)).collect();
            judge(&tried, "c.yaml").iter().any(|finding| finding.check == "udp")
        };
        let dead = || {
            let endpoint = "https://disc.example:443".to_owned();
            Outcome::NoCarrier(DialError::NothingAnswers { endpoint, reason: "connection refused".to_owned() })
        };
        assert!(!blocked(vec![]));
        assert!(!blocked(vec![dead()]), "a server that is down tells nothing of UDP");
        assert!(blocked(vec![dead(), answers(false, None)]));
        assert!(blocked(vec![Outcome::Session(false)]));
        assert!(!blocked(vec![Outcome::Session(false), answers(true, None)]));
    }

    #[test]
    fn a_wrong_pin_and_a_refusal_are_told_with_what_to_do() {
        let endpoint = "https://disc.example:443".to_owned();
        let wrong = DialError::WrongPin { endpoint, found: "sha256:a".to_owned(), expected: "sha256:b".to_owned() };
        let tried = [
            (server("disc.example"), Outcome::NoCarrier(wrong)),
            (server("other.example"), answers(true, Some("other.example:443 refused: the server is full"))),
            (server("good.example"), answers(true, None)),
        ];
        let found = judge(&tried, "/etc/meshspan/config.yaml");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].what.contains("has key sha256:a, the configuration expects sha256:b"), "{found:?}");
        assert!(found[0].fix.contains("put it into /etc/meshspan/config.yaml"), "{found:?}");
        assert!(found[1].what.ends_with("refused: the server is full"), "{found:?}");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_is_found_without_an_agent() {
        let text = format!(
            "discovery: [{{ endpoint: \"https://127.0.0.1:9\", pin: \"{}\" }}]",
            mesh_common::config::Pin([7; 32])
        );
        let config = mesh_common::config::Config::parse(&text).unwrap();
        let subject = Subject { config_file: "c.yaml".into(), config, agent: super::super::AgentAnswer::NotRunning };
        let found = check(&subject, None).await.unwrap();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].what.starts_with("nothing answers at https://127.0.0.1:9"), "{found:?}");
    }
}
