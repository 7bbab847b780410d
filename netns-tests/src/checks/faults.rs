//! What someone may break, and what must go on or come back.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteType};

use super::{
    EVERY, REPLY_WITHIN, RESTORED_WITHIN,
    carry::{overlay_replies, replies},
    traces::{mesh_state, wait_same_state},
};
use crate::{
    Mesh,
    mesh::{MESH_LINK, MESH_RULE, MESH_TABLE, node::Node},
    traffic::{EchoStream, UdpStream},
    wait,
};

const PACKETS_PER_SECOND: u32 = 200;
/// Assumed when the mesh was built without a TTL of its own: the server's default.
const DEFAULT_TTL: Duration = Duration::from_secs(120);
/// A restarted agent rejoins from its cache within this (DESIGN.md 8).
const REJOIN_WITHIN: Duration = Duration::from_secs(5);
/// The kernel removes the link of an agent that died at once; this is its slack on a busy machine.
const LINK_GONE_WITHIN: Duration = Duration::from_secs(2);

/// Kills the server and counts packets between pods for twice its TTL. Leaves the server dead.
pub fn server_killed(mesh: &mut Mesh) -> Result<String> {
    let marker = mesh.marker("server-killed-mesh-lives")?;
    let ttl = mesh.server.ttl().unwrap_or(DEFAULT_TTL);
    let mut streams = Vec::new();
    // A ring: every node sends to the next one.
    for (index, node) in mesh.nodes.iter().enumerate() {
        let next = &mesh.nodes[(index + 1) % mesh.nodes.len()];
        let (from, to) = (node.pods.first().context("no pod")?, next.pods.first().context("no pod")?);
        // The path is up before counting starts: this check is about the outage.
        replies(&[(&from.host, to.v6.into())], marker.bytes(), REPLY_WITHIN)?;
        streams.push(UdpStream::start(&from.host, &to.host, to.v6.into(), PACKETS_PER_SECOND, marker.bytes())?);
    }
    let killed = Instant::now();
    mesh.server.crash()?;
    let outage = 2 * ttl;
    wait::until_true("twice the TTL to pass", outage + Duration::from_secs(1), || Ok(killed.elapsed() >= outage))?;
    let (mut sent, mut lost, mut gap) = (0, 0, Duration::ZERO);
    for stream in streams {
        let totals = stream.stop()?;
        sent += totals.sent;
        lost += totals.lost;
        gap = gap.max(totals.longest_gap);
    }
    let wanted = outage.as_secs() * u64::from(PACKETS_PER_SECOND) * mesh.nodes.len() as u64 * 9 / 10;
    ensure!(sent >= wanted, "only {sent} packets were sent; this machine is too busy to judge");
    ensure!(lost == 0, "{lost} of {sent} packets lost while the server was dead for {} s", outage.as_secs());
    Ok(format!("{sent} packets in {} s without a server, 0 lost, longest gap {} ms", outage.as_secs(), gap.as_millis()))
}

/// Kills the agent of the second node while no server runs and starts it again: it rejoins from its cache.
pub fn agent_restart_without_server(mesh: &mut Mesh) -> Result<String> {
    let marker = mesh.marker("agent-restart-without-server")?;
    mesh.server.crash()?;
    let victim = 1;
    let (name, others): (String, Vec<_>) = {
        let node = mesh.nodes.get(victim).context("a restart needs two nodes")?;
        let others = mesh.nodes.iter().filter(|other| other.name() != node.name());
        (node.name().to_owned(), others.map(|other| other.overlay_v6()).collect::<Result<_>>()?)
    };
    // Pods keep sending both ways all the time: nothing of it may show on a wire.
    let end_of = |node: &Node| node.pods.first().map(|pod| (pod.host.clone(), pod.v4)).context("no pod");
    let ((pod, pod_v4), (far, far_v4)) = (end_of(&mesh.nodes[victim])?, end_of(&mesh.nodes[0])?);
    let out = EchoStream::start(&pod, far_v4.into(), marker.bytes().to_vec(), EVERY)?;
    let back = EchoStream::start(&far, pod_v4.into(), marker.bytes().to_vec(), EVERY)?;

    let node = &mut mesh.nodes[victim];
    node.crash()?;
    wait::until_true(&format!("{MESH_LINK} of {name} to go with its agent"), LINK_GONE_WITHIN, || {
        Ok(!node.host.has_link(MESH_LINK)?)
    })?;
    let start = Instant::now();
    node.start()?;
    let pings: Vec<_> = others.iter().map(|address| (&node.host, *address)).collect();
    node.explain(replies(&pings, marker.bytes(), REJOIN_WITHIN))?;
    let took = start.elapsed();
    ensure!(took <= REJOIN_WITHIN, "the last peer answered only {took:?} after the start");
    replies(&[(&pod, far_v4.into()), (&far, pod_v4.into())], marker.bytes(), REPLY_WITHIN)?;
    let pods = start.elapsed();
    // On a fast machine all of it may be over before the next of them is sent.
    wait::until_true("the pods' pings to be answered", REPLY_WITHIN, || Ok(out.answered() > 0 && back.answered() > 0))?;
    out.stop()?;
    back.stop()?;
    Ok(format!(
        "{name} answered by {} peers {} ms after its start, its pods after {} ms",
        others.len(),
        took.as_millis(),
        pods.as_millis()
    ))
}

/// Deletes the link, a route and the rules of the first node: each is back in time, and packets flow again.
pub fn link_deleted_restored(mesh: &Mesh) -> Result<String> {
    let marker = mesh.marker("link-deleted-restored")?;
    let [node, peer, ..] = &mesh.nodes[..] else { bail!("this check needs two nodes") };
    overlay_replies(node, peer, marker.bytes(), REPLY_WITHIN)?;
    let whole = mesh_state(node)?;
    ensure!(!whole.is_empty(), "{} has nothing of a mesh", node.name());
    let mut said = Vec::new();
    for part in ["link", "route", "rule"] {
        let start = Instant::now();
        match part {
            "link" => node.host.delete_link(MESH_LINK)?,
            "route" => node.host.delete_route(route_to(node.host.routes(MESH_TABLE)?, peer.overlay_v6()?)?)?,
            _ => {
                let rules = node.host.rules_at(MESH_RULE)?;
                ensure!(!rules.is_empty(), "{} has no rule at {MESH_RULE}", node.name());
                rules.into_iter().try_for_each(|rule| node.host.delete_rule(rule))?;
            }
        }
        // While a rule is missing the kernel would send in clear, so packets are sent only when it is back.
        wait_same_state(node, &whole, RESTORED_WITHIN).with_context(|| format!("after the {part} was deleted"))?;
        let restored = start.elapsed();
        overlay_replies(node, peer, marker.bytes(), REPLY_WITHIN)
            .with_context(|| format!("after the {part} was deleted and restored"))?;
        said.push(format!(
            "{part} back after {} ms, reply after {} ms",
            restored.as_millis(),
            start.elapsed().as_millis()
        ));
        ensure!(restored <= RESTORED_WITHIN, "the {part} was back only after {restored:?}");
    }
    Ok(said.join("; "))
}

/// The `dev mesh0` route of a table that covers an address.
fn route_to(routes: Vec<RouteMessage>, address: std::net::IpAddr) -> Result<RouteMessage> {
    routes
        .into_iter()
        .find(|route| {
            route.header.kind == RouteType::Unicast
                && route.attributes.iter().any(|attribute| *attribute == RouteAttribute::Destination(address.into()))
        })
        .with_context(|| format!("there is no route to {address} in table {MESH_TABLE}"))
}
