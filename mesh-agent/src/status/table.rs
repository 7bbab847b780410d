//! Tables for people. Colour is an argument: the caller knows whether a terminal is there.

use std::fmt::Write;

use comfy_table::{Cell, Color, Table, presets};

use super::why::{trip, why};
use super::{NodeStatus, PeerState, PeerStatus, PrefixState, ServerState, ServerStatus, Status};

/// How tables are shown.
#[derive(Debug, Clone, Copy)]
pub struct Show {
    /// All columns, also long ones.
    pub wide: bool,
    pub colour: bool,
    /// Unix milliseconds, for ages.
    pub now_ms: u64,
}

impl Status {
    /// Everything: the node, its problems, its servers, its peers.
    pub fn to_table(&self, show: Show) -> String {
        let mut text = self.head(show);
        if !self.peers.is_empty() {
            let _ = writeln!(text, "\n{}", peers_table(self.peers.iter(), show));
        }
        let odd = prefixes_table(self.peers.iter(), false, show);
        if !odd.is_empty() {
            let _ = writeln!(text, "\n{odd}");
        }
        if show.wide && !self.counters.is_empty() {
            let mut table = plain(&["COUNTER", "VALUE"], show);
            for (name, value) in &self.counters {
                table.add_row([clean(name), value.to_string()]);
            }
            let _ = writeln!(text, "\n{}", table.trim_fmt());
        }
        text
    }

    /// The node, its problems, its servers.
    pub(super) fn head(&self, show: Show) -> String {
        let node = &self.node;
        let mut text = String::new();
        let cluster = node.cluster_id.as_deref().map_or_else(String::new, |id| format!(" in mesh {}", clean(id)));
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(text, "{name:<12}{}", clean(value));
        };
        line("Node", &format!("{}{cluster}", node.host_name));
        let since = age(show.now_ms.saturating_sub(node.started_at_ms));
        line("State", &format!("{} ({since}, version {})", word(&node.state), node.version));
        let v4 = node.overlay_v4.map(|addr| addr.to_string());
        let v6 = node.overlay_v6.map(|addr| addr.to_string());
        let addresses: Vec<String> = v4.into_iter().chain(v6).collect();
        line("Addresses", &if addresses.is_empty() { "none yet".to_owned() } else { addresses.join(", ") });
        line("Interface", &format!("{}, UDP port {}", node.interface, node.listen_port));
        if let Some(backend) = &node.backend {
            let why = backend.why_not_kernel.as_ref().map_or_else(String::new, |why| format!("; {why}"));
            line("Backend", &format!("{}{why}", backend.kind.name()));
        }
        if let Some(offloads) = node.offloads {
            line("Offloads", &offloads.words());
        }
        line("Node id", &node.id);
        if show.wide {
            line("Public key", &node.public_key);
            line("Namespace", node.namespace.as_deref().unwrap_or("none"));
            line("Mapped port", &node.net.port_mapping.line());
        }
        for problem in &node.problems {
            let _ = writeln!(text, "\nProblem: {}\n    Fix: {}", clean(&problem.what), clean(&problem.fix));
        }
        if !self.servers.is_empty() {
            let _ = writeln!(text, "\n{}", servers_table(&self.servers, show.wide, show));
        }
        text
    }
}

pub(super) fn servers_table(servers: &[ServerStatus], ways: bool, show: Show) -> String {
    let mut header = vec!["SERVER", "STATE", "CARRIER"];
    if ways {
        header.extend(["ROUND TRIP", "RELAY", "PROXY"]);
    }
    header.push("DETAIL");
    let mut table = plain(&header, show);
    for server in servers {
        let colour = match server.state {
            ServerState::Connected => Color::Green,
            ServerState::Connecting => Color::Yellow,
            ServerState::Waiting => Color::Red,
        };
        let mut row = vec![
            Cell::new(clean(&server.endpoint)),
            coloured(&word(&server.state), colour, show),
            Cell::new(server.carrier.map_or_else(|| "-".to_owned(), |carrier| word(&carrier))),
        ];
        if ways {
            row.push(Cell::new(server.rtt_us.map_or_else(|| "-".to_owned(), trip)));
            row.push(Cell::new(if server.relays { "yes" } else { "-" }));
            row.push(Cell::new(clean(server.proxy.as_deref().unwrap_or("-"))));
        }
        let retry = server.retry_in_ms.map(|ms| format!("next attempt in {}", age(ms)));
        let detail: Vec<String> =
            [clean(&server.detail)].into_iter().chain(retry).filter(|text| !text.is_empty()).collect();
        row.push(Cell::new(detail.join("; ")));
        table.add_row(row);
    }
    table.trim_fmt()
}

/// A row for each peer.
pub fn peers_table<'a>(peers: impl Iterator<Item = &'a PeerStatus>, show: Show) -> String {
    let mut header = vec!["PEER", "STATE", "PATH", "ADDRESS", "ENDPOINT", "HANDSHAKE", "RECEIVED", "SENT"];
    if show.wide {
        header.extend(["KIND", "ADDRESS V6", "NODE ID", "PUBLIC KEY", "PREFIXES", "DETAIL"]);
    }
    let mut table = plain(&header, show);
    for peer in peers {
        let colour = match peer.state {
            PeerState::Up => Color::Green,
            PeerState::Connecting => Color::Yellow,
            PeerState::Down => Color::Red,
            PeerState::Idle => Color::Grey,
        };
        let path = peer.path.as_ref();
        let mut row = vec![
            Cell::new(clean(&peer.host_name)),
            coloured(&word(&peer.state), colour, show),
            Cell::new(path.and_then(|path| path.tier).map_or_else(|| "-".to_owned(), |tier| word(&tier))),
            Cell::new(or_dash(&peer.overlay_v4)),
            Cell::new(match path.and_then(|path| path.relay.as_ref()) {
                Some(relay) => format!("relay {}", clean(relay)),
                None => or_dash(&peer.endpoint),
            }),
            Cell::new(peer.last_handshake_ms_ago.map_or_else(|| "never".to_owned(), |ms| format!("{} ago", age(ms)))),
            Cell::new(bytes(peer.rx_bytes)),
            Cell::new(bytes(peer.tx_bytes)),
        ];
        if show.wide {
            let prefixes: Vec<String> = peer.prefixes.iter().map(|prefix| prefix.prefix.to_string()).collect();
            row.extend([
                Cell::new(word(&peer.kind)),
                Cell::new(or_dash(&peer.overlay_v6)),
                Cell::new(clean(peer.node_id.as_deref().unwrap_or("-"))),
                Cell::new(clean(&peer.public_key)),
                Cell::new(prefixes.join(", ")),
                Cell::new(clean(&peer.detail)),
            ]);
        }
        table.add_row(row);
    }
    table.trim_fmt()
}

/// All about one peer.
pub fn peer_details(peer: &PeerStatus, node: &NodeStatus, show: Show) -> String {
    let mut text = peers_table([peer].into_iter(), show);
    let candidates: Vec<String> = peer.candidates.iter().map(ToString::to_string).collect();
    for (name, value) in [
        ("Kind", word(&peer.kind)),
        ("Node id", peer.node_id.clone().unwrap_or_default()),
        ("Public key", peer.public_key.clone()),
        ("Address v6", peer.overlay_v6.map(|addr| addr.to_string()).unwrap_or_default()),
        ("Candidates", candidates.join(", ")),
        ("Last seen", peer.seen_ms_ago.map(|ms| format!("{} ago", age(ms))).unwrap_or_default()),
    ] {
        if !value.is_empty() {
            let _ = write!(text, "\n{name:<12}{}", clean(&value));
        }
    }
    let _ = write!(text, "\n{}", why(peer, node, show));
    let prefixes = prefixes_table([peer].into_iter(), true, show);
    if !prefixes.is_empty() {
        let _ = writeln!(text, "\n{prefixes}");
    }
    text
}

/// What became of prefixes: all of them, or only those that are not routed.
fn prefixes_table<'a>(peers: impl Iterator<Item = &'a PeerStatus>, all: bool, show: Show) -> String {
    let mut table = plain(&["PREFIX", "PEER", "STATE", "DETAIL"], show);
    for peer in peers {
        for prefix in peer.prefixes.iter().filter(|prefix| all || prefix.state != PrefixState::Routed) {
            let row = [prefix.prefix.to_string(), clean(&peer.host_name), word(&prefix.state), clean(&prefix.detail)];
            table.add_row(row);
        }
    }
    if table.is_empty() { String::new() } else { table.trim_fmt() }
}

pub(super) fn plain(header: &[&str], show: Show) -> Table {
    let mut table = Table::new();
    if show.colour {
        table.enforce_styling();
    } else {
        table.force_no_tty();
    }
    table.load_style(presets::NOTHING);
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

fn coloured(text: &str, colour: Color, show: Show) -> Cell {
    if show.colour { Cell::new(text).fg(colour) } else { Cell::new(text) }
}

/// The word that JSON has for a state.
pub(super) fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

fn or_dash(value: &Option<impl ToString>) -> String {
    value.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string)
}

/// Text without anything a terminal would obey.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

pub(super) fn age(ms: u64) -> String {
    match ms / 1000 {
        0 => format!("{ms} ms"),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let power = usize::try_from(count.ilog2() / 10).unwrap_or(1).min(UNITS.len());
    let tenths = (u128::from(count) * 10) >> (10 * power);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[power - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_and_sizes_read_well() {
        let ages = [0, 999, 1000, 119_999, 120_000, 7_199_999, 7_200_000, 200_000_000].map(age);
        assert_eq!(ages, ["0 ms", "999 ms", "1 s", "119 s", "2 min", "119 min", "2 h", "2 d"]);
        let sizes = [0, 1023, 1024, 1536, 64 << 20, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "64.0 MiB", "16383.9 PiB"]);
    }
}
