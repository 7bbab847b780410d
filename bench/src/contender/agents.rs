//! Our real agents, one on each host, with a discovery server that introduces them.

use std::{net::IpAddr, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use netns_tests::{
    Host,
    binaries::Binaries,
    mesh::{
        config::{self, ServerAddress},
        node::Node,
        server::Server as DiscoveryServer,
    },
    traffic::first_reply,
    wait,
};
use nix::unistd::Pid;

use crate::{
    bed::{Bed, MTU},
    machine::Cpu,
};

const FORM_WITHIN: Duration = Duration::from_secs(30);
const DIRECT_WITHIN: Duration = Duration::from_secs(30);
const REPLY_WITHIN: Duration = Duration::from_secs(15);
const ASK_EVERY: Duration = Duration::from_millis(50);
/// What the server may use of what the agents use: it only introduces them. A relay for their packets would use more.
const SERVER_SHARE: f64 = 0.05;

/// Two members of one mesh and its server. Dropping them ends all three.
#[derive(Debug)]
pub struct Agents {
    pub nodes: [Node; 2],
    server: DiscoveryServer,
    formed: Option<[Cpu; 2]>,
}

pub fn version(agent: &Path) -> Result<String> {
    let output = Command::new(agent).arg("--version").output().context("cannot ask mesh-agent for its version")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Agents {
    /// Starts the server, on the left host, and the agents; waits until a packet crossed on a direct path.
    pub fn start(binaries: &Binaries, bed: &Bed) -> Result<Self> {
        let mut server =
            DiscoveryServer::new(binaries, bed.left.host.clone(), &bed.scratch("server"), bed.left.address, None)?;
        let at = server.start()?;
        let secret = config::new_secret()?;
        let [left, right] = bed.ends().map(|end| node(binaries, &end.host, end.address, bed, &secret, &at));
        let mut agents = Self { nodes: [left?, right?], server, formed: None };
        agents.nodes.iter_mut().try_for_each(Node::start)?;
        for node in &mut agents.nodes {
            await_peers(node, 1)?;
        }
        let [left, right] = &agents.nodes;
        await_direct(left, right)?;
        await_direct(right, left)?;
        agents.formed = Some(agents.cpu()?);
        Ok(agents)
    }

    pub fn addresses(&self) -> Result<(IpAddr, IpAddr)> {
        Ok((self.nodes[0].overlay_v4()?, self.nodes[1].overlay_v4()?))
    }

    /// Of the agents alone: the server carries nothing.
    pub fn pids(&self) -> Vec<Pid> {
        self.nodes.iter().filter_map(Node::pid).collect()
    }

    /// They run, and what they carried did not go through the server.
    pub fn check(&mut self) -> Result<()> {
        self.nodes.iter_mut().try_for_each(Node::check_running)?;
        let Some([server, agents]) = &self.formed else { return Ok(()) };
        let (server, agents) = (server.used()?.processes, agents.used()?.processes);
        // Below a second of work a handful of messages weighs too much.
        let share = server.as_secs_f64() / agents.as_secs_f64().max(1.0);
        ensure!(
            share <= SERVER_SHARE,
            "the discovery server used {server:?} of CPU beside {agents:?} of the agents: packets went through it"
        );
        Ok(())
    }

    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        self.nodes[1].explain(self.nodes[0].explain(result))
    }

    fn cpu(&self) -> Result<[Cpu; 2]> {
        let server: Vec<Pid> = self.server.pid().into_iter().collect();
        Ok([Cpu::now(&server)?, Cpu::now(&self.pids())?])
    }
}

/// A member that knows the server, not started.
fn node(
    binaries: &Binaries,
    host: &Host,
    address: IpAddr,
    bed: &Bed,
    secret: &str,
    server: &ServerAddress,
) -> Result<Node> {
    let mut node = Node::new(binaries, host.clone(), &bed.scratch(&format!("node-{}", host.name())), address, secret)?;
    node.config.discovery = vec![server.clone()];
    node.config.more_mesh.push(format!("mtu: {MTU}"));
    node.write_config()?;
    Ok(node)
}

/// Waits until a node has an address and lists so many peers with theirs.
pub fn await_peers(node: &mut Node, count: usize) -> Result<()> {
    let formed = wait::until_or_dead(
        &format!("{} to list {count} peers", node.name()),
        FORM_WITHIN,
        node,
        Node::check_running,
        |node| {
            let status = node.status()?;
            let complete = status.peers.iter().filter(|peer| peer.overlay_v4.is_some()).count();
            ensure!(complete >= count, "it lists {complete}");
            node.overlay = status.node.overlay_v4.zip(status.node.overlay_v6);
            Ok(node.overlay.map(drop))
        },
    );
    node.explain(formed).map(drop)
}

/// Has `from` talk to `to` until it says that packets go there directly.
pub fn await_direct(from: &Node, to: &Node) -> Result<()> {
    let address = to.overlay_v4()?;
    let name = to.name().to_owned();
    from.explain(first_reply(&from.host, address, b"bench", ASK_EVERY, REPLY_WITHIN))?;
    let direct = wait::until_true(&format!("a direct path from {} to {name}", from.name()), DIRECT_WITHIN, || {
        let status = from.status_json()?;
        let peers = status["peers"].as_array().context("status lists no peers")?;
        let peer = peers.iter().find(|peer| peer["host_name"] == name.as_str()).context("the peer is not listed")?;
        let path = &peer["path"];
        let settled = path["second"].is_null() && matches!(path["tier"].as_str(), Some("lan" | "direct"));
        ensure!(settled, "its path is {path}");
        Ok(true)
    });
    from.explain(direct).map(drop)
}
