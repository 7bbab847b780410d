//! `mesh-bench converge`: a node that knows nobody meets a cluster of many. How long until the kernel has every route, and
//! what does the node cost when nothing happens any more?
//!
//! The members are real to the server: each introduced itself in a session of its own ([`publish`]). The server and the
//! agent are the real programs. Judged from outside: by what the agent's kernel tells a netlink monitor, by a dump of its
//! routes, and by /proc.

pub mod publish;

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use data_encoding::BASE64;
use ipnet::IpNet;
use netns_tests::{
    Lab, Monitor,
    binaries::Binaries,
    checks::life::pass,
    link::{connect, destination, output_link, table_of},
    mesh::{MESH_LINK, MESH_TABLE, node::Node, server::Server as DiscoveryServer},
    monitor::Change,
    program, wait,
};
use nix::unistd::Pid;
use serde::Serialize;

use crate::{
    machine::{Cpu, peak_rss_mib},
    member::{CLUSTER_ID, CLUSTER_SECRET, Member},
};

const LONGEST_SYNC_MS: f64 = 300.0;
const STEADY_WRITES: usize = 0;
const MOST_RSS_MIB: f64 = 100.0;
const MOST_IDLE_CPU_PERCENT: f64 = 0.5;

/// Each member's prefixes, each once for the tunnel and once for the floor below it.
const ROUTES_OF_A_MEMBER: usize = 8;
const CONVERGE_WITHIN: Duration = Duration::from_secs(60);
/// The agent has settled when its kernel told of no change for this long.
const SETTLED_AFTER: Duration = Duration::from_secs(3);
/// The members leave no session behind, and must stay listed for longer than any run.
const LISTED_FOR: Duration = Duration::from_secs(3600);
const LINK: &str = "eth0";
/// Changes that an explanation shows.
const SHOWN: usize = 5;

/// Has one node meet many others at once, and then watches it rest.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Members of the cluster beside the node, four prefixes each.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=1000))]
    peers: u16,
    /// How long the node is watched at rest. An agent compares its host with what should be every 30 seconds.
    #[arg(long, default_value_t = 40.0, value_parser = seconds)]
    seconds: f64,
    /// Print the verdict as one JSON line at the end.
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text} is no number"))?;
    if (1.0..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("from 1 to 3600 seconds".into()) }
}

/// The verdict.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConvergeReport {
    pub ok: bool,
    pub peers: u16,
    /// From the start of the agent's process to the last change of its routes.
    pub route_sync_ms: f64,
    /// Changes to the host's network while the node rested.
    pub steady_netlink_writes: usize,
    /// The most memory that the agent ever had resident.
    pub rss_mib: f64,
    /// CPU time of the agent over wall time while it rested; 100 is one core.
    pub idle_cpu_percent: f64,
}

/// A node at rest.
#[derive(Debug, Clone)]
pub struct Rest {
    pub writes: Vec<Change>,
    pub rss_mib: f64,
    pub idle_cpu_percent: f64,
}

impl ConvergeReport {
    pub fn of(peers: u16, sync: Duration, rest: &Rest) -> Self {
        let route_sync_ms = sync.as_secs_f64() * 1000.0;
        let steady_netlink_writes = rest.writes.len();
        Self {
            ok: route_sync_ms <= LONGEST_SYNC_MS
                && steady_netlink_writes == STEADY_WRITES
                && rest.rss_mib <= MOST_RSS_MIB
                && rest.idle_cpu_percent <= MOST_IDLE_CPU_PERCENT,
            peers,
            route_sync_ms: rounded(route_sync_ms, 1),
            steady_netlink_writes,
            rss_mib: rounded(rest.rss_mib, 1),
            idle_cpu_percent: rounded(rest.idle_cpu_percent, 3),
        }
    }

    fn sentence(&self) -> String {
        format!(
            "{}: the kernel has the routes of {} peers {} ms after the agent's start (bound {LONGEST_SYNC_MS}); at rest {} \
             changes to the host (bound {STEADY_WRITES}), {} MiB at most (bound {MOST_RSS_MIB}), {} % of a core (bound \
             {MOST_IDLE_CPU_PERCENT})",
            if self.ok { "ok" } else { "NOT OK" },
            self.peers,
            self.route_sync_ms,
            self.steady_netlink_writes,
            self.rss_mib,
            self.idle_cpu_percent,
        )
    }
}

/// Runs, prints, and says whether it was good.
pub fn run(args: &Args) -> Result<ExitCode> {
    let binaries = program::enter("convergence")?;
    let mut converged = Converged::form(&binaries, args.peers)?;
    eprintln!("{}", converged.story());
    let resting = converged.begin_rest()?;
    pass(Duration::from_secs_f64(args.seconds))?;
    let rest = converged.end_rest(resting)?;
    for write in rest.writes.iter().take(SHOWN) {
        eprintln!("changed while the node rested: {}", write.what);
    }
    let report = ConvergeReport::of(args.peers, converged.sync, &rest);
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("{}", report.sentence());
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A node that has met its cluster. Dropping it ends everything.
#[derive(Debug)]
pub struct Converged {
    pub node: Node,
    /// From the start of its process to the last change of its routes.
    pub sync: Duration,
    /// From the start of its process to the first of them.
    first_route: Duration,
    monitor: Monitor,
    heard: usize,
    _server: DiscoveryServer,
    // Last, so that programs end before their lab.
    _lab: Lab,
}

/// A rest that is under way.
#[derive(Debug)]
pub struct Resting {
    heard: usize,
    cpu: Cpu,
    since: Instant,
}

impl Converged {
    /// Has the members introduce themselves, starts the agent, and waits until its host has all routes and settled.
    pub fn form(binaries: &Binaries, peers: u16) -> Result<Self> {
        let mut lab = Lab::new()?;
        let (server_host, node_host) = (lab.host("server")?, lab.host("node")?);
        connect(&server_host, LINK, &node_host, LINK)?;
        let [server_address, node_address] = [1, 2].map(|last| IpAddr::from(Ipv4Addr::new(192, 0, 2, last)));
        server_host.add_address(LINK, IpNet::new(server_address, 24)?)?;
        node_host.add_address(LINK, IpNet::new(node_address, 24)?)?;

        let dir = lab.dir().join("server");
        let mut server = DiscoveryServer::new(binaries, server_host, &dir, server_address, Some(LISTED_FOR))?;
        let at = server.start()?;
        publish::publish(&server.host, &at, peers)?;

        let secret = BASE64.encode(&CLUSTER_SECRET) + "\n";
        let mut node = Node::new(binaries, node_host, &lab.dir().join("node"), node_address, &secret)?;
        node.config.cluster_id = CLUSTER_ID.to_owned();
        node.config.discovery = vec![at];
        node.write_config()?;
        let monitor = Monitor::start(&node.host)?;
        let start = Instant::now();
        node.start()?;
        let changes = settle(&mut node, &monitor, peers)?;
        check_routes(&node, peers)?;
        let routes: Vec<Instant> = changes.iter().filter(|change| is_of_mesh(change)).map(|change| change.at).collect();
        let [first, last] = [routes.first(), routes.last()].map(|at| at.map(|at| *at - start));
        let (first_route, sync) = first.zip(last).context("no route was heard of")?;
        Ok(Self { node, sync, first_route, monitor, heard: changes.len(), _server: server, _lab: lab })
    }

    pub fn begin_rest(&self) -> Result<Resting> {
        Ok(Resting { heard: self.heard()?, cpu: Cpu::now(&[self.pid()?])?, since: Instant::now() })
    }

    pub fn end_rest(&mut self, resting: Resting) -> Result<Rest> {
        let (used, length) = (resting.cpu.used()?.processes, resting.since.elapsed());
        self.node.check_running()?;
        Ok(Rest {
            writes: self.monitor.after(resting.heard)?,
            rss_mib: peak_rss_mib(self.pid()?)?,
            idle_cpu_percent: used.as_secs_f64() / length.as_secs_f64() * 100.0,
        })
    }

    fn heard(&self) -> Result<usize> {
        Ok(self.heard + self.monitor.after(self.heard)?.len())
    }

    fn pid(&self) -> Result<Pid> {
        self.node.pid().context("the agent does not run")
    }

    fn story(&self) -> String {
        format!(
            "{} changes to the host; the first route {} ms after the agent's start, the last after {} ms",
            self.heard,
            self.first_route.as_millis(),
            self.sync.as_millis()
        )
    }
}

/// Waits until the host of the node has changed as often as it must and changes no more; gives what was heard.
fn settle(node: &mut Node, monitor: &Monitor, peers: u16) -> Result<Vec<Change>> {
    let routes = usize::from(peers) * ROUTES_OF_A_MEMBER;
    let mut changes: Vec<Change> = Vec::new();
    let settled = wait::until_or_dead(
        &format!("{} to have {routes} routes and to settle", node.name()),
        CONVERGE_WITHIN,
        node,
        Node::check_running,
        |_| {
            changes.extend(monitor.after(changes.len())?);
            let is_quiet = changes.last().is_some_and(|change| change.at.elapsed() >= SETTLED_AFTER);
            ensure!(changes.len() >= routes, "{} changes were heard of", changes.len());
            Ok(is_quiet.then_some(()))
        },
    );
    node.explain(settled)?;
    Ok(changes)
}

fn is_of_mesh(change: &Change) -> bool {
    change.what.route().is_some_and(|(_, route)| table_of(route) == MESH_TABLE)
}

/// The table of the mesh holds the members' prefixes, each into the tunnel and each refused below that, the node's own
/// addresses refused, and nothing else.
fn check_routes(node: &Node, peers: u16) -> Result<()> {
    let (host, own) = (&node.host, node.status()?.node);
    let link = host.link_index(MESH_LINK)?.with_context(|| format!("there is no {MESH_LINK}"))?;
    let own = [own.overlay_v4.map(IpAddr::V4), own.overlay_v6.map(IpAddr::V6)].into_iter().flatten().map(IpNet::from);
    let members: BTreeSet<IpNet> = (1..=peers).flat_map(|number| Member::numbered(number).routed()).collect();
    let refused = own.chain(members.iter().copied()).collect();
    let (mut tunnel, mut floor) = (BTreeSet::new(), BTreeSet::new());
    for route in host.routes(MESH_TABLE)? {
        let to = destination(&route).with_context(|| format!("a route that leads nowhere: {route:?}"))?;
        let is_new = if output_link(&route) == Some(link) { tunnel.insert(to) } else { floor.insert(to) };
        ensure!(is_new, "two routes to {to}");
    }
    for (what, found, expected) in [("into the tunnel", &tunnel, &members), ("refused below that", &floor, &refused)] {
        let missing: Vec<_> = expected.difference(found).take(SHOWN).collect();
        let foreign: Vec<_> = found.difference(expected).take(SHOWN).collect();
        ensure!(missing.is_empty() && foreign.is_empty(), "{what}: missing {missing:?}, nobody's {foreign:?}");
    }
    Ok(())
}

fn rounded(value: f64, digits: i32) -> f64 {
    let factor = 10_f64.powi(digits);
    (value * factor).round() / factor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_rest() -> Rest {
        Rest { writes: Vec::new(), rss_mib: MOST_RSS_MIB, idle_cpu_percent: MOST_IDLE_CPU_PERCENT }
    }

    fn judged(sync_ms: u64, rest: &Rest) -> bool {
        ConvergeReport::of(1000, Duration::from_millis(sync_ms), rest).ok
    }

    #[test]
    fn each_bound_that_is_passed_is_told() {
        assert!(judged(300, &at_rest()), "all at their bounds");
        assert!(!judged(301, &at_rest()));
        let write = Change { at: Instant::now(), what: netns_tests::monitor::What::Other(80) };
        assert!(!judged(300, &Rest { writes: vec![write], ..at_rest() }));
        assert!(!judged(300, &Rest { rss_mib: 100.1, ..at_rest() }));
        assert!(!judged(300, &Rest { idle_cpu_percent: 0.51, ..at_rest() }));
    }

    #[test]
    fn the_line_for_programs_has_the_six_figures() {
        let report = ConvergeReport::of(7, Duration::from_micros(1234), &at_rest());
        let expected = r#"{"ok":true,"peers":7,"route_sync_ms":1.2,"steady_netlink_writes":0,"rss_mib":100.0,"idle_cpu_percent":0.5}"#;
        assert_eq!(serde_json::to_string(&report).ok().as_deref(), Some(expected));
    }
}
