//! Steps that tests of life and death share: what a node without an agent has, and traffic that never stops.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use netlink_packet_route::{
    RouteNetlinkMessage,
    route::RouteType,
    rule::{RuleAttribute, RuleMessage},
};

use super::EVERY;
use crate::{
    Host, Marker, Mesh, Snapshot,
    link::table_of,
    mesh::{MESH_LINK, MESH_RULE, MESH_TABLE, node::Node},
    monitor::{Monitor, What},
    snapshot::{Kind, in_words},
    traffic::EchoStream,
    wait,
};

/// The kernel removes the link of an agent that ended; this is its slack on a busy machine.
const LINK_GONE_WITHIN: Duration = Duration::from_secs(2);
/// From the end of an agent's session to no trace of the agent.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Lets time pass that belongs to the scenario, for example until a random moment.
pub fn pass(duration: Duration) -> Result<()> {
    let start = Instant::now();
    wait::until_true("time to pass", duration + Duration::from_secs(1), || Ok(start.elapsed() >= duration)).map(drop)
}

/// Of the mesh a node without an agent has its rules and `unreachable` routes, and nothing else that could carry a packet.
pub fn floor_only(node: &Node) -> Result<String> {
    wait::until_true(&format!("{MESH_LINK} of {} to go with its agent", node.name()), LINK_GONE_WITHIN, || {
        Ok(!node.host.has_link(MESH_LINK)?)
    })?;
    let snapshot = node.snapshot()?;
    let table = format!(" table {MESH_TABLE} ");
    let routes: Vec<&str> = snapshot.of(Kind::Route).filter(|line| line.contains(&table)).collect();
    let other: Vec<&&str> = routes.iter().filter(|line| !line.contains(&format!("{table}Unreachable "))).collect();
    ensure!(!routes.is_empty(), "{} has no floor", node.name());
    ensure!(other.is_empty(), "{} has more than a floor: {other:?}", node.name());
    let rules = node.host.rules_at(MESH_RULE)?.len();
    ensure!(rules == 2, "{} has {rules} rules at {MESH_RULE}, not one a family", node.name());
    Ok(format!("{} unreachable routes and {rules} rules", routes.len()))
}

/// Waits until a host differs from its dump from before the first start by nothing but a running agent.
pub fn wait_nothing_owned(mesh: &Mesh, node: &Node) -> Result<()> {
    let before = mesh.baseline(node.name())?;
    let mut left = Vec::new();
    wait::until_true(&format!("{} to own nothing", node.name()), GONE_WITHIN, || {
        left = before.diff(&Snapshot::take(&node.host, &[])?);
        left.retain(|difference| !Kind::OF_A_LIVING_PROCESS.contains(&difference.kind));
        Ok(left.is_empty())
    })
    .with_context(|| format!("still different:\n{}", in_words(&left)))
    .map(drop)
}

/// Waits until an agent has a session with each of its servers.
pub fn wait_connected(node: &Node, within: Duration) -> Result<Duration> {
    let connected = wait::until_true(&format!("{} to be connected to its servers", node.name()), within, || {
        let servers = node.status()?.servers;
        ensure!(servers.iter().all(|server| server.state == "connected"), "{servers:?}");
        Ok(!servers.is_empty())
    });
    node.explain(connected)
}

/// Hears from the kernel of each removal from a node's floor, however soon it is put back.
#[derive(Debug)]
pub struct FloorWatch {
    host: Host,
    monitor: Monitor,
}

impl FloorWatch {
    pub fn start(node: &Node) -> Result<Self> {
        let watch = Self { host: node.host.clone(), monitor: Monitor::start(&node.host)? };
        ensure!(floor(&watch.host)? > 0, "{} has no floor to watch", node.name());
        Ok(watch)
    }

    /// How many changes of routes and rules there were; none of them took a route of the floor or a rule away.
    pub fn stop(self) -> Result<usize> {
        let mut changes = 0;
        for change in self.monitor.stop()? {
            let What::Network(message) = change.what else { continue };
            match *message {
                RouteNetlinkMessage::DelRoute(route)
                    if route.header.kind == RouteType::Unreachable && table_of(&route) == MESH_TABLE =>
                {
                    bail!("{} lost a route of its floor: {:?}", self.host.name(), route.attributes)
                }
                RouteNetlinkMessage::DelRule(rule) if is_of_mesh(&rule) => {
                    bail!("{} lost its rule: {:?}", self.host.name(), rule.attributes)
                }
                RouteNetlinkMessage::NewRoute(_)
                | RouteNetlinkMessage::DelRoute(_)
                | RouteNetlinkMessage::NewRule(_)
                | RouteNetlinkMessage::DelRule(_) => changes += 1,
                _ => {}
            }
        }
        ensure!(floor(&self.host)? > 0, "{} has no floor any more", self.host.name());
        Ok(changes)
    }
}

fn floor(host: &Host) -> Result<usize> {
    let routes = host.routes(MESH_TABLE)?;
    Ok(routes.iter().filter(|route| route.header.kind == RouteType::Unreachable).count())
}

fn is_of_mesh(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Priority(MESH_RULE))
}

/// Echo requests that run on whatever happens.
#[derive(Debug)]
pub struct Pings(Vec<(String, EchoStream)>);

impl Pings {
    pub fn start(pings: &[(&Host, IpAddr)], marker: &Marker) -> Result<Self> {
        let start = |(host, to): &(&Host, IpAddr)| {
            let stream = EchoStream::start(host, *to, marker.bytes().to_vec(), EVERY)?;
            Ok((format!("{} to {to}", host.name()), stream))
        };
        Ok(Self(pings.iter().map(start).collect::<Result<_>>()?))
    }

    /// Between two nodes and their first pods, both ways, both families.
    pub fn between(a: &Node, b: &Node, marker: &Marker) -> Result<Self> {
        let mut pings = Vec::new();
        for (from, to) in [(a, b), (b, a)] {
            pings.extend([(&from.host, to.overlay_v4()?), (&from.host, to.overlay_v6()?)]);
            let (pod, far) = (from.pods.first().context("no pod")?, to.pods.first().context("no pod")?);
            pings.extend(far.addresses().map(|address| (&pod.host, address)));
        }
        Self::start(&pings, marker)
    }

    /// Ends them; each must have been answered at some time, or it proved nothing.
    pub fn stop(self) -> Result<u64> {
        let mut sent = 0;
        for (what, stream) in self.0 {
            let totals = stream.stop()?;
            ensure!(totals.answered > 0, "{what} was never answered: {totals:?}");
            sent += totals.sent;
        }
        Ok(sent)
    }
}
