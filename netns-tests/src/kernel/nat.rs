//! Pairs behind NATs: which way their packets go, and that nothing is lost when that changes.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{KERNEL, Run, USERSPACE, kinds, lab, report::Finding, wg};
use crate::{
    binaries::Binaries,
    capture::flows::{FlowLog, Passed},
    matrix::pair::{Bench, BenchOptions, LAST},
    mesh::{MESH_LINK, node::Node},
    nat::{
        Kind,
        oracle::Pair,
        world::{SERVER, SERVER_PORT},
    },
    roaming::gap,
    traffic::{Beat, Exchange},
    wait,
};

pub const CHECKS: [&str; 7] = [
    "kernel-kernel",
    "kernel-userspace",
    "kernel-behind-nat-direct",
    "both-begin-at-once",
    "kernel-relay",
    "relay-to-direct-no-loss",
    "kernel-roaming-kept",
];

/// A machine without acceleration is slow: fewer questions than elsewhere.
const PER_SECOND: u32 = 50;
const PAYLOAD: usize = 600;
/// A question inside a tunnel is at least so long.
const TUNNELLED: usize = PAYLOAD + 28 + 32;
/// And as much longer at most with what a relay puts around it.
const RELAYED_MOST: usize = TUNNELLED + 240;
const QUIET: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(200);
/// From the first question on.
const DIRECT_WITHIN: Duration = Duration::from_secs(40);
const CARRIED_FOR: Duration = Duration::from_secs(6);
const CROSSINGS: usize = 4;
const CROSSED_WITHIN: Duration = Duration::from_secs(2);
/// As long as the kernel must stay where it roamed to.
const KEPT_FOR: Duration = Duration::from_secs(5);
/// DESIGN.md 8: an uplink address changes.
const ROAMED_WITHIN: Duration = Duration::from_secs(5);

const HOME: Pair = Pair::Apart(Kind::EimApdf, Kind::EimApdf);

pub(super) fn run(run: &mut Run, binaries: &Binaries) -> Result<()> {
    let options = BenchOptions { delay: Duration::from_millis(10), ..BenchOptions::default() };
    let mut bench = Bench::build(lab()?, binaries, &options)?;
    let backends = |bench: &mut Bench, names: [&'static str; 2]| -> Result<()> {
        for (node, name) in bench.nodes.iter_mut().zip(names) {
            node.config.backend = name;
            node.write_config()?;
        }
        Ok(())
    };
    backends(&mut bench, [KERNEL, KERNEL])?;
    run.check("kernel-kernel", || direct(&mut bench, Pair::Apart(Kind::Open, Kind::Open)));
    backends(&mut bench, [KERNEL, USERSPACE])?;
    run.check("kernel-userspace", || {
        let mut finding = direct(&mut bench, Pair::Apart(Kind::Open, Kind::Open))?;
        let other = finding.link_kinds.pop().unwrap_or_default();
        ensure!(other == "tun", "the other node's link is of kind {other}");
        finding.detail.push_str(", the other one a process");
        Ok(finding)
    });
    backends(&mut bench, [KERNEL, KERNEL])?;
    run.check("kernel-behind-nat-direct", || direct(&mut bench, HOME));
    run.check("both-begin-at-once", || both_begin(&mut bench));
    run.check("kernel-relay", || relayed(&mut bench));
    run.check("relay-to-direct-no-loss", || relay_to_direct(&mut bench));
    run.check("kernel-roaming-kept", || roaming_kept(&mut bench));
    Ok(())
}

/// An exchange from left to right with captures where it may pass.
struct Watched {
    exchange: Exchange,
    between: FlowLog,
    at_server: FlowLog,
    ends: [IpAddr; 2],
    started: Instant,
}

impl Watched {
    fn start(bench: &Bench) -> Result<Self> {
        let sites = &bench.world.sites;
        let [left, right] = [0, 1].map(|site: usize| sites[site].outer_address(LAST[site]).into());
        let between = FlowLog::start(&bench.world.internet, &sites[0].port())?;
        let at_server = FlowLog::start(&bench.world.internet, SERVER_PORT)?;
        let to = bench.nodes[1].overlay_v4()?;
        let exchange = Exchange::start(&bench.nodes[0].host, &bench.nodes[1].host, to, PER_SECOND, PAYLOAD)?;
        Ok(Self { exchange, between, at_server, ends: [left, right], started: Instant::now() })
    }

    /// Tunnel data of the last moments: straight to the right, straight to the left, over the server.
    fn recent(&self) -> [usize; 3] {
        let since = Instant::now().checked_sub(QUIET).unwrap_or(self.started);
        let [left, right] = self.ends;
        let straight = |from: IpAddr, to: IpAddr| {
            let fits = |line: &Passed| {
                line.at >= since
                    && line.tunnel_data
                    && line.length >= TUNNELLED
                    && (line.source.ip(), line.destination.ip()) == (from, to)
            };
            self.between.lines(fits).len()
        };
        let relayed = self.at_server.lines(|line| line.at >= since && is_relayed(line)).len();
        [straight(left, right), straight(right, left), relayed]
    }

    fn is_direct(&self) -> bool {
        let enough = PER_SECOND as usize * QUIET.as_secs() as usize * 8 / 10;
        let [there, back, relayed] = self.recent();
        there >= enough && back >= enough && relayed <= 4
    }

    fn wait_direct(&self) -> Result<Duration> {
        let mut looked = Instant::now();
        let direct = wait::until_true("the pair to be direct", DIRECT_WITHIN, || {
            if looked.elapsed() < LOOK {
                return Ok(false);
            }
            looked = Instant::now();
            Ok(self.is_direct())
        });
        direct.with_context(|| {
            let [there, back, relayed] = self.recent();
            format!("at last {there} and {back} straight, {relayed} at the server")
        })
    }

    /// The same, with what both nodes and their kernels say where it fails.
    fn see_direct(&self, bench: &Bench) -> Result<Duration> {
        self.wait_direct().with_context(|| bench.nodes.iter().map(words).collect::<Vec<_>>().join("; "))
    }

    fn wait_for(&self, time: Duration) -> Result<()> {
        let start = Instant::now();
        wait::until_true("time to pass", time * 2, || Ok(start.elapsed() >= time)).map(drop)
    }

    fn stop(self) -> Result<Carried> {
        let beats = self.exchange.stop()?;
        let first = beats.iter().position(|beat| !beat.lost()).context("no question was ever answered")?;
        let first_answer = beats[first].answered.map(|at| at.duration_since(beats[0].sent)).unwrap_or_default();
        let after = &beats[first..];
        let (lost, all) = (after.iter().filter(|beat| beat.lost()).count(), after.len());
        Ok(Carried { beats, first_answer, lost, all })
    }
}

/// What became of an exchange.
struct Carried {
    beats: Vec<Beat>,
    /// From the first question to the first answer.
    first_answer: Duration,
    /// Questions from the first answered one on that nobody answered, and all of them.
    lost: usize,
    all: usize,
}

fn is_relayed(line: &Passed) -> bool {
    let server = SERVER.map(IpAddr::from);
    let passes = server.contains(&line.source.ip()) || server.contains(&line.destination.ip());
    passes && line.length >= TUNNELLED && line.length <= RELAYED_MOST
}

fn both(bench: &Bench) -> Result<Vec<String>> {
    kinds(&bench.nodes.iter().collect::<Vec<&Node>>())
}

/// From nothing to a direct path; nothing is lost from the first answer on.
fn direct(bench: &mut Bench, pair: Pair) -> Result<Finding> {
    bench.arrange(pair)?;
    let watched = Watched::start(bench)?;
    let took = bench.nodes[0].explain(watched.see_direct(bench))?;
    let link_kinds = both(bench)?;
    let Carried { first_answer, lost, all, .. } = watched.stop()?;
    ensure!(lost == 0, "{lost} of {all} questions lost");
    Ok(Finding {
        detail: format!(
            "first answer after {} ms, seen direct for {} s after {} ms, {all} questions, 0 lost",
            first_answer.as_millis(),
            QUIET.as_secs(),
            took.as_millis()
        ),
        link_kinds,
    })
}

/// Two kernels whose initiations cross refuse each other's answers, and try again after 5 s.
fn both_begin(bench: &mut Bench) -> Result<Finding> {
    let mut said = Vec::new();
    let mut link_kinds = Vec::new();
    for _ in 0..CROSSINGS {
        bench.arrange(Pair::Apart(Kind::Open, Kind::Open))?;
        let to = bench.nodes[0].overlay_v4()?;
        let back = Exchange::start(&bench.nodes[1].host, &bench.nodes[0].host, to, PER_SECOND, PAYLOAD)?;
        let watched = Watched::start(bench)?;
        bench.nodes[0].explain(watched.see_direct(bench))?;
        link_kinds = both(bench)?;
        back.stop()?;
        let first = watched.stop()?.first_answer;
        ensure!(first <= CROSSED_WITHIN, "the first answer came after {} ms", first.as_millis());
        said.push(format!("{} ms", first.as_millis()));
    }
    Ok(Finding { detail: format!("first answers after {}", said.join(", ")), link_kinds })
}

/// NATs that nothing gets through: the server carries, both ways, to the last.
fn relayed(bench: &mut Bench) -> Result<Finding> {
    bench.arrange(Pair::Apart(Kind::EdmApdf, Kind::EdmApdf))?;
    let watched = Watched::start(bench)?;
    wait::until_true("an answer", DIRECT_WITHIN, || Ok(watched.exchange.beats().iter().any(|beat| !beat.lost())))?;
    watched.wait_for(CARRIED_FOR)?;
    let [there, back, relayed] = watched.recent();
    let link_kinds = both(bench)?;
    let Carried { lost, all, .. } = watched.stop()?;
    ensure!(there + back == 0, "{there} and {back} datagrams went straight");
    ensure!(relayed > PER_SECOND as usize, "only {relayed} datagrams at the server within {QUIET:?}");
    ensure!(lost * 100 <= all, "{lost} of {all} questions lost");
    Ok(Finding { detail: format!("{all} questions over the server, {lost} lost"), link_kinds })
}

/// Held on the relay by a cut between the two, then let go: no question is lost while the pair becomes direct.
fn relay_to_direct(bench: &mut Bench) -> Result<Finding> {
    bench.arrange(HOME)?;
    let ends = [0, 1].map(|site: usize| bench.world.sites[site].outer_address(LAST[site]));
    bench.world.cut_between(Some(ends))?;
    let watched = Watched::start(bench)?;
    let let_go = (|| {
        wait::until_true("an answer", DIRECT_WITHIN, || Ok(watched.exchange.beats().iter().any(|beat| !beat.lost())))?;
        watched.wait_for(QUIET)?;
        let [_, _, relayed] = watched.recent();
        ensure!(relayed > PER_SECOND as usize, "only {relayed} datagrams at the server before the switch");
        Ok(())
    })();
    bench.world.cut_between(None)?;
    let_go?;
    let took = bench.nodes[0].explain(watched.see_direct(bench))?;
    let link_kinds = both(bench)?;
    let Carried { lost, all, .. } = watched.stop()?;
    ensure!(lost == 0, "{lost} of {all} questions lost");
    Ok(Finding {
        detail: format!(
            "relayed, then seen direct {} ms after the cut ended, {all} questions, 0 lost",
            took.as_millis()
        ),
        link_kinds,
    })
}

/// The NAT before the other node gets another address. The kernel follows it by itself, and is not led back.
fn roaming_kept(bench: &mut Bench) -> Result<Finding> {
    bench.arrange(Pair::Apart(Kind::Open, Kind::EimApdf))?;
    let watched = Watched::start(bench)?;
    // The other node must speak by itself: nobody reaches it at its old address.
    let to = bench.nodes[0].overlay_v4()?;
    let back = Exchange::start(&bench.nodes[1].host, &bench.nodes[0].host, to, PER_SECOND, PAYLOAD)?;
    bench.nodes[0].explain(watched.see_direct(bench))?;
    let before = endpoint(&bench.nodes[0])?;
    let event = Instant::now();
    bench.world.sites[1].change_home_address(3)?;
    let now = IpAddr::from(bench.world.sites[1].home_address());
    let moved = wait::until_true("the kernel to follow", ROAMED_WITHIN, || Ok(endpoint(&bench.nodes[0])? == now));
    let took = bench.nodes[0].explain(moved)?;
    let mut elsewhere = Vec::new();
    let since = Instant::now();
    wait::until_true("the kernel to stay there", KEPT_FOR * 2, || {
        let at = endpoint(&bench.nodes[0])?;
        if at != now && elsewhere.last() != Some(&at) {
            elsewhere.push(at);
        }
        Ok(since.elapsed() >= KEPT_FOR)
    })?;
    let link_kinds = both(bench)?;
    let end = Instant::now();
    back.stop()?;
    let beats = watched.stop()?.beats;
    bench.world.sites[1].change_home_address(2)?;
    ensure!(!elsewhere.contains(&before), "the kernel was led back to {before}, where nobody is any more");
    let gap = gap::longest_gap(gap::answers(&beats), event, end);
    ensure!(gap <= ROAMED_WITHIN, "{gap:?} without an answer");
    let aside = if elsewhere.is_empty() { String::new() } else { format!(", by way of {elsewhere:?}") };
    Ok(Finding {
        detail: format!(
            "from {before} to {now} within {} ms and kept for {} s{aside}; longest gap {} ms",
            took.as_millis(),
            KEPT_FOR.as_secs(),
            gap.as_millis()
        ),
        link_kinds,
    })
}

fn words(node: &Node) -> String {
    let kernel = wg::device(&node.host, MESH_LINK).map(|device| device.peers.into_values().collect::<Vec<_>>());
    let path = node.status_json().map(|status| format!("{} {}", status["peers"][0]["path"], status["counters"]));
    format!("{}: kernel {kernel:?}, path {path:?}", node.name())
}

/// Where the kernel sends to its one peer.
fn endpoint(node: &Node) -> Result<IpAddr> {
    let device = wg::device(&node.host, MESH_LINK)?;
    let peer = device.peers.values().next().context("the kernel has no peer")?;
    Ok(peer.endpoint.context("the peer has no endpoint")?.ip())
}
