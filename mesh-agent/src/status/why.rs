//! Paths in words: which one carries, why it is not a better one, what was tried.

use std::fmt::Write as _;

use super::net::{FamilyStatus, NetStatus, Netcheck, Udp};
use super::path::{NatStatus, PathStatus, Tier};
use super::table::{age, clean, plain, servers_table, word};
use super::{NodeStatus, PeerState, PeerStatus, Show, Status};

/// Idle peers that are named; there may be a thousand.
const NAMED: usize = 10;

impl Status {
    /// Every peer that somebody sends to, with its path.
    pub fn to_why(&self, show: Show) -> String {
        let mut text = self.head(show);
        let is_idle = |peer: &&PeerStatus| peer.state == PeerState::Idle;
        for peer in self.peers.iter().filter(|peer| !is_idle(peer)) {
            let _ = write!(
                text,
                "\nPeer        {} ({})\n{}",
                clean(&peer.host_name),
                word(&peer.state),
                why(peer, &self.node, show)
            );
        }
        let idle: Vec<&PeerStatus> = self.peers.iter().filter(is_idle).collect();
        if !idle.is_empty() {
            let mut names: Vec<String> = idle.iter().take(NAMED).map(|peer| clean(&peer.host_name)).collect();
            if idle.len() > NAMED {
                names.push(format!("{} more", idle.len() - NAMED));
            }
            let _ =
                writeln!(text, "\nIdle        {}: nobody sends to them, so no path is looked for", names.join(", "));
        }
        text
    }
}

/// The path to a peer, line by line.
pub(super) fn why(peer: &PeerStatus, node: &NodeStatus, show: Show) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<12}{}", clean(value));
    };
    let Some(path) = &peer.path else {
        line("Path", "none of its own: a static peer is where its last packet came from, or where its endpoint says");
        return text;
    };
    line("Path", &carrying(path, peer));
    if !peer.detail.is_empty() {
        line("Detail", &peer.detail);
    }
    if let Some(why) = &path.why_not_direct {
        line("Not direct", why);
    }
    if let Some(second) = &path.second {
        line("Also over", &format!("{second}, until it is sure that the path carries"));
    }
    for (name, nats) in [("NAT here", own(&node.net)), ("NAT there", known(&peer.nat))] {
        for (place, nat) in nats.iter().enumerate() {
            line(if place == 0 { name } else { "" }, nat);
        }
    }
    if let Some(ms) = path.next_retry_in_ms {
        line("Next try", &format!("in {}", age(ms)));
    }
    if let Some(switch) = &path.last_switch {
        let end = |end: &Option<String>| end.clone().unwrap_or_else(|| "none".to_owned());
        let (ago, from, to) = (age(switch.ms_ago), end(&switch.from), end(&switch.to));
        line("Last switch", &format!("{ago} ago, from {from} to {to}: {}", switch.reason));
    }
    if !path.tried.is_empty() {
        let mut table = plain(&["TRIED", "KIND", "ROUND TRIP", "FAILURES", "LAST RESULT"], show);
        for tried in &path.tried {
            table.add_row([
                tried.address.to_string(),
                word(&tried.kind),
                tried.rtt_us.map_or_else(|| "-".to_owned(), trip),
                tried.failures.to_string(),
                clean(&tried.last),
            ]);
        }
        let _ = writeln!(text, "{}", table.trim_fmt());
    }
    text
}

fn carrying(path: &PathStatus, peer: &PeerStatus) -> String {
    let endpoint = peer.endpoint.map_or_else(|| "its address".to_owned(), |endpoint| endpoint.to_string());
    let mut text = match (path.tier, &path.relay) {
        (Some(Tier::Lan), _) => format!("on the LAN, to {endpoint}"),
        (Some(Tier::Direct), _) => format!("direct, to {endpoint}"),
        (Some(Tier::Relay), Some(relay)) => format!("relay, over {relay}"),
        (Some(Tier::Relay), None) => "relay".to_owned(),
        (None, _) => return "none".to_owned(),
    };
    if let Some(rtt_us) = path.rtt_us {
        let _ = write!(text, ", {}", trip(rtt_us));
    }
    if let Some(mtu) = path.mtu {
        let _ = write!(text, ", packets up to {mtu} bytes");
    }
    text
}

/// What is known of the NATs before this node; of each IP version, or that nothing is.
fn own(net: &NetStatus) -> Vec<String> {
    let families = [("IPv4", &net.v4), ("IPv6", &net.v6)];
    let known = families.into_iter().filter(|(_, family)| family.udp != Udp::Unknown || family.nat.is_known());
    let text = |(name, family): (&str, &FamilyStatus)| match family.udp {
        Udp::Blocked => format!("{name}: UDP is blocked"),
        _ => format!("{name}: {}", family.nat),
    };
    or_unknown(known.map(text).collect())
}

fn known(nat: &NatStatus) -> Vec<String> {
    let families = [("IPv4", nat.v4), ("IPv6", nat.v6)].into_iter().filter(|(_, nat)| nat.is_known());
    or_unknown(families.map(|(name, nat)| format!("{name}: {nat}")).collect())
}

fn or_unknown(nats: Vec<String>) -> Vec<String> {
    if nats.is_empty() { vec!["unknown: no server has told yet".to_owned()] } else { nats }
}

impl Netcheck {
    pub fn to_table(&self, show: Show) -> String {
        let mut text = String::new();
        if !self.is_complete {
            text.push_str("Not all servers have answered yet.\n\n");
        }
        for (name, family) in [("IPv4", &self.net.v4), ("IPv6", &self.net.v6)] {
            let mut line = |name: &str, value: &str| {
                let _ = writeln!(text, "{name:<12}{}", clean(value));
            };
            line(name, udp(family));
            if !family.seen_at.is_empty() {
                let at: Vec<String> = family.seen_at.iter().map(ToString::to_string).collect();
                let port = match (family.is_translated, family.keeps_port) {
                    (Some(false), _) => " (this host's own address)".to_owned(),
                    (_, Some(true)) => " (the port is this host's own)".to_owned(),
                    (_, Some(false)) => format!(" (the port is another than this host's {})", self.listen_port),
                    _ => String::new(),
                };
                line("Seen at", &format!("{}{port}", at.join(", ")));
            }
            if family.nat.is_known() {
                line(if family.is_translated == Some(false) { "Firewall" } else { "NAT" }, &family.nat.to_string());
            }
            if let Some(hairpin) = family.hairpin.filter(|_| family.is_translated == Some(true)) {
                let says = if hairpin { "yes: nodes behind it reach each other by its public address" } else { "no" };
                line("Hairpin", says);
            }
            text.push('\n');
        }
        // An older agent says nothing of it.
        let mapped = self.net.port_mapping.line();
        if !mapped.is_empty() {
            let _ = writeln!(text, "{:<12}{}\n", "Mapped port", clean(&mapped));
        }
        if self.servers.is_empty() {
            text.push_str("No discovery server is configured.\n");
        } else {
            let _ = writeln!(text, "{}", servers_table(&self.servers, true, show));
        }
        text
    }
}

fn udp(family: &FamilyStatus) -> &'static str {
    match family.udp {
        Udp::Ok => "UDP passes",
        Udp::Blocked => "UDP is blocked: no server answers over it, so peers elsewhere are reached over relays",
        Udp::Unknown => "not known: no server has an address of this kind, or none has told where it answers STUN",
    }
}

/// A round trip in the unit that people read.
pub(crate) fn trip(us: u64) -> String {
    match us {
        0..10_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        _ => format!("{} ms", us / 1000),
    }
}
