//! What became of a pair, from packets alone: the exchange between the two hosts, the tunnel data that passed between
//! their outer addresses, and what passed through the server.
//!
//! - `first byte`: from the first question to the first answer, so both directions work.
//! - `direct`: tunnel data flows both ways between the outer addresses, and for two seconds nothing of the exchange
//!   passes the server. Its time is when that flow began, although copies may go over the relay for a while.
//! - `lost on switch`: questions and answers lost within two seconds around that time.

use std::{
    fmt::Write as _,
    net::IpAddr,
    time::{Duration, Instant},
};

use crate::{
    capture::flows::{Passed, Transport},
    nat::oracle::Expect,
    traffic::Beat,
};

pub const PER_SECOND: u32 = 200;
/// Of a question and an answer.
pub const PAYLOAD: usize = 800;
/// A question as a WireGuard datagram: inner headers, type, receiver, counter, tag.
const TUNNELLED: usize = PAYLOAD + 28 + 32;
/// The same with a relay's and QUIC's headers is shorter than this; what else a session sends in one datagram is mostly
/// shorter than one or longer than the other.
const RELAYED_MOST: usize = TUNNELLED + 240;
/// How long nothing may pass the server.
pub const QUIET: Duration = Duration::from_secs(2);
/// Datagrams of a session that may look like a relayed question by chance in that time. A relayed exchange has 1600.
const STRAY: usize = 4;
/// Half of what an exchange sends one way in that time.
const ENOUGH: usize = PER_SECOND as usize;
/// A direct flow that pauses for longer has ended.
const PAUSE: Duration = Duration::from_millis(500);
const SWITCH: Duration = Duration::from_secs(2);
/// The share of a relayed exchange that must be answered at last, of 1000.
const CARRIED: usize = 990;
/// DESIGN.md 8.
const FIRST_BYTE_SLACK: Duration = Duration::from_millis(200);
const DIRECT_WITHIN: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Got {
    Direct,
    Relay,
    None,
}

/// What was seen of one pair.
#[derive(Debug, Clone)]
pub struct Evidence {
    pub beats: Vec<Beat>,
    /// Tunnel data between the outer addresses, in order of time.
    pub tunnel: Vec<Passed>,
    /// What passed the server's link and may be a relayed question or answer, in order of time.
    pub relayed: Vec<Passed>,
    /// Who asks.
    pub left: IpAddr,
    /// When the captures were read.
    pub seen_until: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub got: Got,
    pub first_byte: Option<Duration>,
    pub direct: Option<Duration>,
    pub lost_on_switch: Option<usize>,
    /// What is wrong with it, in words.
    pub faults: Vec<String>,
}

/// A question or answer inside a tunnel between these two.
pub fn is_tunnelled(line: &Passed, [a, b]: [IpAddr; 2]) -> bool {
    let ends = (line.source.ip(), line.destination.ip());
    line.tunnel_data && line.length >= TUNNELLED && (ends == (a, b) || ends == (b, a))
}

/// May be a question or answer on its way to or from one of the server's addresses.
pub fn may_be_relayed(line: &Passed, server: &[IpAddr]) -> bool {
    let passes = server.contains(&line.source.ip()) || server.contains(&line.destination.ip());
    passes
        && line.length >= TUNNELLED
        // On a stream several may travel as one.
        && (line.transport == Transport::Tcp || line.length <= RELAYED_MOST)
}

impl Evidence {
    /// When the direct flow began that has freed the server.
    pub fn direct_since(&self) -> Option<Instant> {
        let flows = self.directions();
        let relayed: Vec<Instant> = self.relayed.iter().map(|line| line.at).collect();
        let both_run = flows[0].first()?.max(flows[1].first()?);
        // Quiet begins when both directions run, or with a datagram that is the last over the server.
        let starts = std::iter::once(both_run).chain(relayed.iter().filter(|at| *at > both_run));
        let is_quiet_from = |start: &Instant| {
            let end = *start + QUIET;
            let within =
                |times: &[Instant]| times.partition_point(|at| *at <= end) - times.partition_point(|at| at <= start);
            end <= self.seen_until && within(&relayed) <= STRAY && flows.iter().all(|flow| within(flow) >= ENOUGH)
        };
        let quiet = *starts.into_iter().find(|start| is_quiet_from(start))?;
        Some(run_start(&flows[0], quiet)?.max(run_start(&flows[1], quiet)?))
    }

    fn directions(&self) -> [Vec<Instant>; 2] {
        let towards = |right: bool| {
            let fits = |line: &&Passed| (line.source.ip() == self.left) == right;
            self.tunnel.iter().filter(fits).map(|line| line.at).collect()
        };
        [towards(true), towards(false)]
    }

    fn first_byte(&self) -> Option<Duration> {
        let first = self.beats.first()?.sent;
        self.beats.iter().filter_map(|beat| beat.answered).min().map(|answered| answered - first)
    }

    /// Before the first answer the path was being made: what is lost then is no matter of the switch.
    fn lost_around(&self, switch: Instant) -> usize {
        let first = self.beats.iter().find(|beat| !beat.lost()).map(|beat| beat.sent);
        let near = |beat: &&Beat| {
            first.is_some_and(|first| beat.sent >= first)
                && beat.sent + SWITCH >= switch
                && beat.sent <= switch + SWITCH
        };
        self.beats.iter().filter(near).filter(|beat| beat.lost()).count()
    }

    /// Of 1000 questions of the last two seconds, how many were answered?
    fn carried_at_last(&self) -> usize {
        let Some(last) = self.beats.last() else {
            return 0;
        };
        let recent: Vec<_> = self.beats.iter().filter(|beat| beat.sent + QUIET >= last.sent).collect();
        recent.iter().filter(|beat| !beat.lost()).count() * 1000 / recent.len()
    }

    /// How many datagrams went which way, for each quarter of a second from the first question on.
    pub fn timeline(&self) -> String {
        const SLICE: Duration = Duration::from_millis(250);
        let Some(start) = self.beats.first().map(|beat| beat.sent) else {
            return String::new();
        };
        let [to_right, to_left] = self.directions();
        let relayed: Vec<Instant> = self.relayed.iter().map(|line| line.at).collect();
        let lost: Vec<Instant> = self.beats.iter().filter(|beat| beat.lost()).map(|beat| beat.sent).collect();
        let mut text = "    ms  asked  lost  direct to right  to left  at the server\n".to_owned();
        let mut from = start;
        while from < self.seen_until {
            let within = |times: &[Instant]| times.iter().filter(|at| **at >= from && **at < from + SLICE).count();
            let asked = self.beats.iter().filter(|beat| beat.sent >= from && beat.sent < from + SLICE).count();
            let _ = writeln!(
                text,
                "{:>6}  {asked:>5}  {:>4}  {:>15}  {:>7}  {:>13}",
                (from - start).as_millis(),
                within(&lost),
                within(&to_right),
                within(&to_left),
                within(&relayed)
            );
            from += SLICE;
        }
        text
    }

    /// What the captures saw in the last seconds, in words.
    fn at_last(&self) -> String {
        let recent = |at: Instant| at + QUIET >= self.seen_until && at <= self.seen_until;
        let [to_right, to_left] = self.directions().map(|flow| flow.into_iter().filter(|at| recent(*at)).count());
        let relayed = self.relayed.iter().filter(|line| recent(line.at)).count();
        format!("at last {to_right} and {to_left} datagrams between the outer addresses, {relayed} at the server")
    }

    pub fn judge(&self, expect: Expect, relay_round_trip: Duration) -> Verdict {
        let mut faults = Vec::new();
        let (first_byte, switch) = (self.first_byte(), self.direct_since());
        let carried = self.carried_at_last();
        let got = match switch {
            Some(_) => Got::Direct,
            // Data on neither wire that is known: carried by nothing that may carry it.
            None if first_byte.is_some() && !self.relayed.is_empty() => Got::Relay,
            None => Got::None,
        };
        let bound = relay_round_trip * 2 + FIRST_BYTE_SLACK;
        match first_byte {
            None => faults.push("no question was ever answered".to_owned()),
            Some(took) if took > bound => faults.push(format!("the first byte took {took:?}, more than {bound:?}")),
            Some(_) => {}
        }
        if got == Got::None && first_byte.is_some() {
            faults.push("answered, but neither between the outer addresses in a tunnel nor over the server".to_owned());
        }
        if got == Got::Relay && expect == Expect::Direct {
            faults.push(format!("not direct: {}", self.at_last()));
        }
        if first_byte.is_some() && carried < CARRIED {
            faults.push(format!("of 1000 questions at last {carried} were answered"));
        }
        let start = self.beats.first().map(|beat| beat.sent);
        let direct = switch.zip(start).map(|(switch, start)| switch.saturating_duration_since(start));
        if let Some(took) = direct.filter(|took| expect == Expect::Direct && *took > DIRECT_WITHIN) {
            faults.push(format!("direct after {took:?}, more than {DIRECT_WITHIN:?}"));
        }
        let lost_on_switch = switch.map(|switch| self.lost_around(switch));
        if let Some(lost) = lost_on_switch.filter(|lost| *lost > 0) {
            faults.push(format!("{lost} lost within {SWITCH:?} of the switch"));
        }
        Verdict { got, first_byte, direct, lost_on_switch, faults }
    }
}

/// Where the flow that runs at `at` began.
fn run_start(flow: &[Instant], at: Instant) -> Option<Instant> {
    let next = flow.partition_point(|time| *time < at);
    let mut start = *flow.get(next)?;
    for time in flow[..next].iter().rev() {
        if start - *time > PAUSE {
            break;
        }
        start = *time;
    }
    Some(start)
}

#[cfg(test)]
mod tests;
