//! Finding a peer by what a person calls it.

use super::{PeerStatus, Status, clean};

/// Peers that an error lists.
const LISTED: usize = 20;
/// An id or a key is told by its start from here on.
const MIN_START: usize = 4;
/// Wrong letters in a name that is still meant.
const TYPOS: usize = 2;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("no peer is called {name}{}", known(.close, .peers))]
    Unknown { name: String, close: Vec<String>, peers: Vec<String> },
    #[error("{} peers are called {name}: give the start of an id instead ({})", ids.len(), listed(ids))]
    Ambiguous { name: String, ids: Vec<String> },
}

impl Status {
    /// Peers whose host name is this, or whose node id or public key begins with it.
    pub fn peers_named(&self, name: &str) -> Vec<&PeerStatus> {
        let id = |peer: &PeerStatus| peer.node_id.as_ref().is_some_and(|id| id.starts_with(name));
        let starts = |peer: &PeerStatus| name.len() >= MIN_START && (id(peer) || peer.public_key.starts_with(name));
        self.peers.iter().filter(|peer| peer.host_name == name || starts(peer)).collect()
    }

    /// The one peer that is called this.
    pub fn peer_named(&self, name: &str) -> Result<&PeerStatus, NameError> {
        match self.peers_named(name).as_slice() {
            [] => Err(self.unknown_name(name)),
            [peer] => Ok(peer),
            several => {
                let id = |peer: &&PeerStatus| {
                    let id = peer.node_id.as_ref().unwrap_or(&peer.public_key);
                    id.chars().take(10).collect()
                };
                Err(NameError::Ambiguous { name: clean(name), ids: several.iter().map(id).collect() })
            }
        }
    }

    /// What to say when nobody is called so.
    pub fn unknown_name(&self, name: &str) -> NameError {
        let lower = name.to_lowercase();
        let is_close = |known: &&String| strsim::osa_distance(&lower, &known.to_lowercase()) <= TYPOS;
        let peers: Vec<String> = self.peers.iter().map(|peer| clean(&peer.host_name)).collect();
        NameError::Unknown { name: clean(name), close: peers.iter().filter(is_close).cloned().collect(), peers }
    }
}

fn known(close: &[String], peers: &[String]) -> String {
    match (close, peers) {
        (_, []) => "; there are no peers".to_owned(),
        ([], peers) => format!("; the peers are: {}", listed(peers)),
        (close, _) => format!(": did you mean {}?", listed(close)),
    }
}

fn listed(names: &[String]) -> String {
    let mut text = names[..names.len().min(LISTED)].join(", ");
    if names.len() > LISTED {
        text.push_str(&format!(" and {} more", names.len() - LISTED));
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tests::example;
    use super::*;

    fn named(names: &[&str]) -> Status {
        let mut status = example();
        let peer = status.peers.remove(0);
        let peers = names.iter().enumerate().map(|(place, name)| PeerStatus {
            host_name: (*name).to_owned(),
            node_id: Some(format!("{place:064x}")),
            ..peer.clone()
        });
        Status { peers: peers.collect(), ..status }
    }

    #[test]
    fn peers_are_found_by_name_or_the_start_of_an_id() {
        let status = example();
        for name in ["node-2", "efef", "ZbCdef"] {
            assert_eq!(status.peers_named(name).len(), 1, "{name}");
            assert_eq!(status.peer_named(name).unwrap().host_name, "node-2");
        }
        for name in ["node", "ef", ""] {
            assert!(status.peers_named(name).is_empty(), "{name}");
        }
    }

    #[test]
    fn a_name_that_nobody_has_is_answered_with_those_that_are_close() {
        let said = |names: &[&str], name: &str| named(names).peer_named(name).unwrap_err().to_string();
        assert_eq!(said(&["berlin", "paris"], "Berlni"), "no peer is called Berlni: did you mean berlin?");
        assert_eq!(said(&["berlin", "paris"], "x"), "no peer is called x; the peers are: berlin, paris");
        assert_eq!(said(&[], "a\u{1b}[2J"), "no peer is called a\u{fffd}[2J; there are no peers");
        let many: Vec<String> = (0..1024).map(|number| format!("server-number-{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(said(&many, "x").ends_with("server-number-19 and 1004 more"));
        let twice = said(&["berlin", "berlin"], "berlin");
        assert_eq!(twice, "2 peers are called berlin: give the start of an id instead (0000000000, 0000000000)");
    }
}
