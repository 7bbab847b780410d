//! What an agent owns on its host, and that all of it goes when it must.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{REPLY_WITHIN, carry::overlay_replies};
use crate::{
    Mesh, Snapshot,
    mesh::{MESH_LINK, MESH_RULE, MESH_TABLE, node::Node},
    snapshot::{Difference, Kind, in_words},
    wait,
};

/// From SIGHUP to an agent that owns nothing, and from the end of a process to no trace of it.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Switches the last node off by its boolean: nothing of the mesh is left there while its agent lives on.
pub fn boolean_off(mesh: &mut Mesh) -> Result<String> {
    let start = Instant::now();
    let node = mesh.nodes.last_mut().context("no node")?;
    let owned = mesh_state(node)?.len();
    ensure!(owned > 0, "{} owned nothing before", node.name());
    node.set_enabled(false)?;
    let name = node.name().to_owned();
    let baseline = mesh.baseline(&name)?.clone();
    let node = mesh.nodes.last_mut().context("no node")?;
    let gone = wait_no_difference(
        &format!("{name} to own nothing"),
        &baseline,
        || node.snapshot(),
        |difference| !Kind::OF_A_LIVING_PROCESS.contains(&difference.kind),
    );
    node.explain(gone)?;
    let took = start.elapsed();
    node.check_running()?;
    Ok(format!("{name} went from {owned} things to none in {} ms, its agent still runs", took.as_millis()))
}

/// Switches the last node on again: it is answered by every peer and answers them.
pub fn boolean_on(mesh: &mut Mesh) -> Result<String> {
    let marker = mesh.marker("boolean-on-rejoins")?;
    let start = Instant::now();
    mesh.nodes.last_mut().context("no node")?.set_enabled(true)?;
    // Before both sides know each other, packets to an overlay address would leave in clear by right.
    mesh.wait_until_formed()?;
    let (node, others) = mesh.nodes.split_last().context("no node")?;
    for other in others {
        overlay_replies(other, node, marker.bytes(), REPLY_WITHIN)?;
        overlay_replies(node, other, marker.bytes(), REPLY_WITHIN)?;
    }
    Ok(format!(
        "{} and {} peers answer each other {} ms after SIGHUP",
        node.name(),
        others.len(),
        start.elapsed().as_millis()
    ))
}

/// Stops everything as a user would and compares every host with its dump from before the first start.
pub fn nothing_left_behind(mesh: &mut Mesh) -> Result<String> {
    for node in &mut mesh.nodes {
        node.down()?;
        node.stop()?;
        node.cleanup()?;
    }
    mesh.server.stop()?;
    let mut hosts = 0;
    for node in &mesh.nodes {
        wait_no_difference(
            &format!("{} to be as before", node.name()),
            mesh.baseline(node.name())?,
            || node.snapshot(),
            |_| true,
        )?;
        hosts += 1;
        for pod in &node.pods {
            wait_no_difference(
                &format!("{} to be as before", pod.host.name()),
                mesh.baseline(pod.host.name())?,
                || Snapshot::take(&pod.host, &[]),
                |_| true,
            )?;
            hosts += 1;
        }
    }
    let server = &mesh.server;
    wait_no_difference(
        "the server's host to be as before",
        mesh.baseline(server.host.name())?,
        || Snapshot::take(&server.host, &server.roots()),
        |_| true,
    )?;
    Ok(format!(
        "{} hosts are as before the first start: links, addresses, routes, rules, switches, sockets, processes, files",
        hosts + 1
    ))
}

/// What an agent has made on its host, as text: its link and addresses, its table, its rules.
///
/// The link-local address is left out: the kernel makes a new one for every new link.
pub fn mesh_state(node: &Node) -> Result<BTreeSet<String>> {
    let snapshot = node.snapshot()?;
    let of_link = |line: &&str| line.split(' ').next() == Some(MESH_LINK) && !line.contains(" fe80:");
    let mut state: BTreeSet<String> = snapshot.of(Kind::Link).filter(of_link).map(str::to_owned).collect();
    state.extend(snapshot.of(Kind::Address).filter(of_link).map(str::to_owned));
    let table = format!(" table {MESH_TABLE} ");
    state.extend(
        snapshot.of(Kind::Route).filter(|line| line.contains(&table) && !line.contains(" fe80:")).map(str::to_owned),
    );
    let rule = format!("pref {MESH_RULE}");
    state.extend(
        snapshot
            .of(Kind::Rule)
            .filter(|line| line.split_once(&rule).is_some_and(|(_, rest)| rest.is_empty() || rest.starts_with(' ')))
            .map(str::to_owned),
    );
    Ok(state)
}

/// Waits until a node's [`mesh_state`] is what it was.
pub fn wait_same_state(node: &Node, whole: &BTreeSet<String>, within: Duration) -> Result<Duration> {
    let mut last = BTreeSet::new();
    wait::until_true("all to be back", within, || {
        last = mesh_state(node)?;
        Ok(last == *whole)
    })
    .with_context(|| {
        let missing: Vec<_> = whole.difference(&last).map(|line| format!("- {line}")).collect();
        let extra: Vec<_> = last.difference(whole).map(|line| format!("+ {line}")).collect();
        format!("not as before:\n{}\n{}", missing.join("\n"), extra.join("\n"))
    })
}

fn wait_no_difference(
    what: &str,
    before: &Snapshot,
    mut take: impl FnMut() -> Result<Snapshot>,
    counts: impl Fn(&Difference) -> bool,
) -> Result<Duration> {
    let mut left = Vec::new();
    wait::until_true(what, GONE_WITHIN, || {
        left = before.diff(&take()?).into_iter().filter(&counts).collect();
        Ok(left.is_empty())
    })
    .with_context(|| format!("still different:\n{}", in_words(&left)))
}
