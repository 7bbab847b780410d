//! What happened in a run, line by line, for people. Nothing is written down unless asked for.

use std::collections::BTreeMap;

use mesh_common::key::ProbeKey;
use mesh_common::time::Instant;
use mesh_proto::device::Endpoint;
use mesh_proto::wire::demux::{self, Datagram, WireGuardKind};
use mesh_proto::wire::probe;

use crate::host::Host;

/// `RELAY` and `RELAYED`: type and node, then the payload.
const RELAY_HEAD: usize = 33;

#[derive(Debug, Default)]
pub(super) struct Trace {
    is_on: bool,
    lines: Vec<String>,
    /// With the sender's.
    keys: BTreeMap<[u8; 8], ProbeKey>,
    /// Where data went, by sender and receiver.
    routes: BTreeMap<(usize, usize), Vec<Endpoint>>,
}

impl Trace {
    /// Knows the keys of all pairs, so that it can read what they say.
    pub(super) fn new<'a>(hosts: impl Iterator<Item = &'a Host> + Clone) -> Self {
        let pairs = hosts.clone().flat_map(|from| hosts.clone().map(move |to| (from, to)));
        let keys = pairs.filter(|(from, to)| from.node() != to.node()).filter_map(|(from, to)| {
            let keys = from.plan.keys.probe_keys((from.node(), &from.plan.wg), (to.node(), to.key()))?;
            Some((keys.send.tag, keys.send))
        });
        Self { is_on: true, keys: keys.collect(), ..Self::default() }
    }

    pub(super) fn into_lines(self) -> Vec<String> {
        self.lines
    }

    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    pub(super) fn note(&mut self, now: Instant, line: impl FnOnce(&Self) -> String) {
        if self.is_on {
            let line = format!("{:>10.6} {}", now.since_origin().as_secs_f64(), line(self));
            self.lines.push(line);
        }
    }

    /// Where a host's data to another one goes now.
    pub(super) fn note_route(&mut self, now: Instant, from: usize, to: usize, route: Vec<Endpoint>) {
        let before = self.routes.insert((from, to), route.clone());
        if before.as_ref() != Some(&route) {
            let route: Vec<String> = route.iter().map(ToString::to_string).collect();
            self.note(now, |_| format!("{from} ROUTES data for {to} to [{}]", route.join(", ")));
        }
    }

    pub(super) fn describe(&self, datagram: &[u8]) -> String {
        match demux::classify(datagram) {
            Datagram::WireGuard(WireGuardKind::Data) => "data".to_owned(),
            Datagram::WireGuard(kind) => format!("{kind:?}"),
            Datagram::Stun => "STUN".to_owned(),
            Datagram::Probe => {
                let key = probe::tag(datagram).and_then(|tag| self.keys.get(&tag));
                match key.map(|key| probe::open(key, datagram)) {
                    Some(Ok(opened)) => format!("{:?}", opened.probe),
                    _ => "a probe that does not open".to_owned(),
                }
            }
            Datagram::Unknown => "something else".to_owned(),
        }
    }

    /// What a message carries for a peer.
    pub(super) fn describe_relayed(&self, message: &[u8]) -> String {
        message.get(RELAY_HEAD..).map_or_else(|| "nothing".to_owned(), |payload| self.describe(payload))
    }
}
