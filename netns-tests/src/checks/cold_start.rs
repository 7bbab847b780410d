//! How long a node with an identity but an empty cache takes from exec to the first reply of every peer.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{EVERY, carry::replies};
use crate::{
    Mesh,
    link::{MAIN_TABLE, To},
    mesh::node::Node,
    traffic::echo::first_reply_here,
    wait,
};

const IDENTITY_WITHIN: Duration = Duration::from_secs(10);
/// A start that takes longer failed.
const START_WITHIN: Duration = Duration::from_secs(20);
/// Everything of the overlay; unreachable during the runs, so that pings sent before the agent is up leave by no wire.
const OVERLAY: &str = "fd00::/8";

/// Milliseconds over all runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ColdStarts {
    pub runs: usize,
    pub p50: u64,
    pub p95: u64,
    pub max: u64,
}

/// A state directory that holds an identity and nothing learned.
#[derive(Debug)]
pub struct FreshState(PathBuf);

/// Has a node's agent make its identity while there is no server, and keeps a copy of its state from then.
///
/// The server runs for a moment before, so that the config names the real one; it is off when this returns.
pub fn make_identity(mesh: &mut Mesh, node: usize) -> Result<FreshState> {
    let copy = mesh.scratch("fresh-state");
    mesh.start_server()?;
    mesh.server.stop()?;
    let node = mesh.nodes.get_mut(node).context("no such node")?;
    node.start()?;
    let made = wait::until_or_dead(
        "an agent without a server to have its identity",
        IDENTITY_WITHIN,
        node,
        Node::check_running,
        |node| Ok((!node.status()?.node.id.is_empty()).then_some(())),
    );
    node.explain(made)?;
    node.stop()?;
    node.cleanup()?;
    copy_dir(&node.state_dir(), &copy)?;
    Ok(FreshState(copy))
}

/// Starts the last node `runs` times from `fresh`. Leaves it running.
pub fn cold_starts(mesh: &mut Mesh, fresh: &FreshState, runs: usize) -> Result<ColdStarts> {
    let marker = mesh.marker("cold-start")?;
    let (node, others) = mesh.nodes.split_last_mut().context("no node")?;
    let peers: Vec<IpAddr> = others.iter().map(|other| other.overlay_v6()).collect::<Result<_>>()?;
    node.host.add_route(MAIN_TABLE, OVERLAY.parse()?, &To::Unreachable)?;
    let times: Result<Vec<_>> = (1..=runs)
        .map(|run| {
            let took = one_start(node, &peers, fresh, marker.bytes());
            node.explain(took).with_context(|| format!("cold start {run} of {runs}"))
        })
        .collect();
    let planted = node.host.routes(MAIN_TABLE)?.into_iter().find(|route| {
        route.header.kind == netlink_packet_route::route::RouteType::Unreachable
            && route.header.destination_prefix_length == 8
    });
    node.host.delete_route(planted.context("the planted route is gone")?)?;
    let times = times?;
    // The rest of the run wants a node that its peers reach too.
    let node = &*node;
    let address = node.overlay_v6()?;
    replies(&others.iter().map(|other| (&other.host, address)).collect::<Vec<_>>(), marker.bytes(), START_WITHIN)?;
    Ok(summary(times))
}

fn one_start(node: &mut Node, peers: &[IpAddr], fresh: &FreshState, payload: &[u8]) -> Result<Duration> {
    node.stop()?;
    node.cleanup()?;
    fs::remove_dir_all(node.state_dir())?;
    copy_dir(&fresh.0, &node.state_dir())?;
    let start = Instant::now();
    node.start()?;
    node.host.inside(|| {
        std::thread::scope(|scope| {
            let pings: Vec<_> = peers
                .iter()
                .map(|peer| {
                    scope.spawn(|| first_reply_here(*peer, payload, EVERY, START_WITHIN).map(|_| start.elapsed()))
                })
                .collect();
            let mut slowest = Duration::ZERO;
            for ping in pings {
                slowest = slowest.max(ping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            Ok(slowest)
        })
    })
}

fn summary(mut times: Vec<Duration>) -> ColdStarts {
    times.sort();
    // Nearest rank: with few runs p95 is the maximum.
    let at = |percent: usize| {
        times.get((times.len() * percent).div_ceil(100).max(1) - 1).map_or(0, |time| time.as_millis() as u64)
    };
    ColdStarts { runs: times.len(), p50: at(50), p95: at(95), max: at(100) }
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?
        } else {
            fs::copy(entry.path(), target).map(drop)?
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let times = |count: u64| (1..=count).rev().map(Duration::from_millis).collect::<Vec<_>>();
        assert_eq!(summary(times(20)), ColdStarts { runs: 20, p50: 10, p95: 19, max: 20 });
        assert_eq!(summary(times(3)), ColdStarts { runs: 3, p50: 2, p95: 3, max: 3 });
        assert_eq!(summary(Vec::new()), ColdStarts { runs: 0, p50: 0, p95: 0, max: 0 });
    }
}
