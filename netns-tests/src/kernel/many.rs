//! One node with a thousand peers: how long the kernel takes to have them all, and what the agent costs.

use std::{
    fmt::Write as _,
    fs,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{KERNEL, Run, kinds, report::Finding, wg};
use crate::{
    Mesh, MeshOptions,
    binaries::Binaries,
    mesh::{MESH_LINK, node::Node},
    wait,
};

pub const CHECKS: [&str; 1] = ["1000-peers"];

const PEERS: u32 = 1000;
/// Allowed IPs of each, so that all together are far more than a message of 64 KiB holds.
const ALLOWED: u32 = 4;
/// Reported, not judged: the machine has no acceleration.
const WITHIN: Duration = Duration::from_secs(60);
const AT_REST: Duration = Duration::from_secs(10);
/// DESIGN.md 8.
const MOST_RSS_MIB: u64 = 100;

pub(super) fn run(run: &mut Run, binaries: &Binaries) -> Result<()> {
    let options = MeshOptions {
        nodes: 1,
        pods_per_node: 0,
        tweak: |_, config| config.more_mesh = lines(PEERS),
        ..MeshOptions::default()
    };
    let mut mesh = Mesh::build(binaries, &options)?;
    run.check("1000-peers", || thousand(&mut mesh));
    Ok(())
}

/// Static peers: all that the kernel is told comes from them alone, at once.
fn lines(peers: u32) -> Vec<String> {
    let mut lines = vec![KERNEL.to_owned(), "staticPeers:".to_owned()];
    for number in 0..peers {
        let mut key = [0x21; 32];
        key[..4].copy_from_slice(&number.to_be_bytes());
        let mut allowed = String::new();
        for part in 0..ALLOWED {
            let address = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 20, 0, 0)) + number * ALLOWED + part);
            let _ = write!(allowed, "{}{address}/32", if part == 0 { "" } else { ", " });
        }
        lines.push(format!("  - publicKey: \"{}\"", data_encoding::BASE64.encode(&key)));
        lines.push(format!("    allowedIPs: [{allowed}]"));
    }
    lines
}

fn thousand(mesh: &mut Mesh) -> Result<Finding> {
    let node = &mut mesh.nodes[0];
    let start = Instant::now();
    node.start()?;
    let full = wait_peers(node, PEERS)?;
    let took = start.elapsed();
    let device = wg::device(&node.host, MESH_LINK)?;
    ensure!(
        device.peers.values().all(|peer| peer.allowed_ips.len() == ALLOWED as usize),
        "peers without all of their allowed IPs"
    );
    let link_kinds = kinds(&[node])?;
    let rss_mib = rss_kib(node)? / 1024;
    let busy = cpu(node)?;
    let since = Instant::now();
    wait::until_true("a rest", AT_REST * 2, || Ok(since.elapsed() >= AT_REST))?;
    let idle = (cpu(node)? - busy).as_secs_f64() / since.elapsed().as_secs_f64() * 100.0;
    ensure!(rss_mib <= MOST_RSS_MIB, "the agent has {rss_mib} MiB");
    node.config.more_mesh = lines(PEERS / 2);
    node.write_config()?;
    let start = Instant::now();
    node.reload()?;
    wait_peers(node, PEERS / 2)?;
    let removed = start.elapsed();
    node.stop()?;
    ensure!(!node.host.has_link(MESH_LINK)?, "the link outlived the agent");
    Ok(Finding {
        detail: format!(
            "{full} static peers with {ALLOWED} allowed IPs each in the kernel {} ms after the agent's start, half of them \
             removed within {} ms, {rss_mib} MiB, at rest {idle:.1} % of an emulated core",
            took.as_millis(),
            removed.as_millis()
        ),
        link_kinds,
    })
}

fn wait_peers(node: &Node, peers: u32) -> Result<usize> {
    let mut last = 0;
    let all = wait::until_true(&format!("{peers} peers in the kernel"), WITHIN, || {
        last = wg::device(&node.host, MESH_LINK).map_or(0, |device| device.peers.len());
        Ok(last == peers as usize)
    });
    node.explain(all).with_context(|| format!("at last {last}"))?;
    Ok(last)
}

fn pid(node: &Node) -> Result<i32> {
    Ok(node.pid().context("the agent does not run")?.as_raw())
}

fn rss_kib(node: &Node) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid(node)?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

/// What the process has spent, by the clock tick.
fn cpu(node: &Node) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid(node)?))?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("no fields")?.split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|at| fields.get(*at)?.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 10))
}
