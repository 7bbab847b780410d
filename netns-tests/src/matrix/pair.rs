//! Two real agents and a real server on sites that become what a pair asks for, and what is seen of them.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::judge::{Evidence, PAYLOAD, PER_SECOND, Verdict, is_tunnelled, may_be_relayed};
use crate::{
    Lab,
    binaries::Binaries,
    capture::flows::FlowLog,
    mesh::{config, node::Node, server::Server},
    nat::{
        Kind, Ports,
        oracle::Pair,
        world::{SERVER, SERVER_PORT, World, WorldOptions},
    },
    traffic::Exchange,
    wait,
};

/// The last byte of each node's inner address.
const LAST: [u8; 2] = [10, 20];
const NAMES: [&str; 2] = ["left", "right"];
const READY_WITHIN: Duration = Duration::from_secs(30);
/// What a node says of its peer has not changed for so long: both have found out about their new places.
const SETTLED: Duration = Duration::from_millis(1500);
/// A start, a snapshot and one complete look at the own NAT take less.
const SETTLED_WITHIN: Duration = Duration::from_secs(20);

/// A look at all evidence costs some.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The world with its programs.
#[derive(Debug)]
pub struct Bench {
    pub nodes: [Node; 2],
    pub server: Server,
    pub world: World,
    ports: Ports,
}

impl Bench {
    /// Builds it and starts the server.
    pub fn build(lab: Lab, binaries: &Binaries, delay: Duration, ports: Ports) -> Result<Self> {
        let mut world = World::build(lab, WorldOptions { delay, ..WorldOptions::default() })?;
        let dir = world.lab.dir().to_owned();
        let address = IpAddr::from(SERVER[0]);
        let mut server = Server::new(binaries, world.server.clone(), &dir.join("server"), address, None)?;
        server.add_alternate_stun(SERVER[1].into())?;
        let discovery = server.start()?;
        let secret = config::new_secret()?;
        let mut node = |index: usize| -> Result<Node> {
            let host = world.lab.host(NAMES[index])?;
            let address = IpAddr::from(world.sites[index].inner_address(LAST[index]));
            let mut node = Node::new(binaries, host, &dir.join(NAMES[index]), address, &secret)?;
            node.config.discovery = vec![discovery.clone()];
            node.write_config()?;
            Ok(node)
        };
        let nodes = [node(0)?, node(1)?];
        Ok(Self { nodes, server, world, ports })
    }

    /// Makes the pair, runs an exchange from an idle tunnel until it is direct and stays so, or for `patience`.
    pub fn measure(&mut self, pair: Pair, patience: Duration) -> Result<Verdict> {
        self.arrange(pair)?;
        let evidence = self.exchange(pair, patience)?;
        Ok(evidence.judge(pair.expect(), self.world.relay_round_trip()))
    }

    /// Both agents end, the sites become of their kinds, both start as nodes of a new cluster and find each other.
    ///
    /// New, since an agent that knows members from before greets them at its start: there would be a path already. Like
    /// this no packet has ever gone through the tunnel when this returns.
    pub fn arrange(&mut self, pair: Pair) -> Result<()> {
        for node in &mut self.nodes {
            node.stop()?;
        }
        let (kinds, places) = match pair {
            Pair::Apart(left, right) => ([left, right], [0, 1]),
            Pair::SameNat(kind) => ([kind, Kind::Open], [0, 0]),
        };
        for (site, kind) in self.world.sites.iter_mut().zip(kinds) {
            site.become_kind(kind, self.ports, false)?;
        }
        let secret = config::new_secret()?;
        for ((node, place), last) in self.nodes.iter_mut().zip(places).zip(LAST) {
            let site = &self.world.sites[place];
            site.attach(&node.host, last, false)?;
            node.address = site.inner_address(last).into();
            node.start_over(&secret)?;
            node.start()?;
        }
        for node in &mut self.nodes {
            wait_ready(node)?;
        }
        for node in &self.nodes {
            wait_settled(node)?;
        }
        Ok(())
    }

    /// Runs the exchange from left to right and gathers what was seen.
    pub fn exchange(&mut self, pair: Pair, patience: Duration) -> Result<Evidence> {
        let sites = &self.world.sites;
        let (between, ends) = match pair {
            Pair::Apart(..) => (
                FlowLog::start(&self.world.internet, &sites[0].port())?,
                [sites[0].outer_address(LAST[0]), sites[1].outer_address(LAST[1])],
            ),
            Pair::SameNat(_) => (
                FlowLog::start(&sites[0].home, &sites[0].inner_port(LAST[0]))?,
                LAST.map(|last| sites[0].inner_address(last)),
            ),
        };
        let ends = ends.map(IpAddr::from);
        let server = SERVER.map(IpAddr::from);
        let at_server = FlowLog::start(&self.world.internet, SERVER_PORT)?;
        let to = self.nodes[1].overlay_v4()?;
        let exchange = Exchange::start(&self.nodes[0].host, &self.nodes[1].host, to, PER_SECOND, PAYLOAD)?;
        let evidence = |beats, seen_until| Evidence {
            beats,
            tunnel: between.lines(|line| is_tunnelled(line, ends)),
            relayed: at_server.lines(|line| may_be_relayed(line, &server)),
            left: ends[0],
            seen_until,
        };
        let mut looked = Instant::now();
        // Not direct in time is a verdict of the evidence, not an error of the lab.
        let _ = wait::until("the pair to become direct", patience, || {
            if looked.elapsed() < LOOK_EVERY {
                return Ok(None);
            }
            looked = Instant::now();
            Ok(evidence(exchange.beats(), looked).direct_since())
        });
        let seen_until = Instant::now();
        let beats = exchange.stop()?;
        let evidence = evidence(beats, seen_until);
        between.stop()?;
        at_server.stop()?;
        Ok(evidence)
    }
}

/// The agent runs, has a session, its own addresses and a peer with addresses.
fn wait_ready(node: &mut Node) -> Result<()> {
    let name = node.name().to_owned();
    let ready =
        wait::until_or_dead(&format!("{name} to know its peer"), READY_WITHIN, node, Node::check_running, |node| {
            let status = node.status()?;
            let connected = status.servers.iter().all(|server| server.state == "connected");
            let known = status.peers.len() == 1 && status.peers.iter().all(|peer| peer.overlay_v4.is_some());
            let own = status.node.overlay_v4.zip(status.node.overlay_v6);
            Ok(own.filter(|_| connected && known))
        });
    let (own, _) = node.explain(ready)?;
    node.overlay = Some(own);
    Ok(())
}

/// What it knows of its peer stands still, and the tunnel is idle.
fn wait_settled(node: &Node) -> Result<()> {
    let mut last = (serde_json::Value::Null, Instant::now());
    let settled =
        wait::until_true(&format!("{} to have settled with an idle tunnel", node.name()), SETTLED_WITHIN, || {
            let status = node.status()?;
            let peer = status.peers.first().context("no peer")?;
            if peer.candidates != last.0 {
                last = (peer.candidates.clone(), Instant::now());
            }
            Ok(peer.state == "idle" && last.1.elapsed() >= SETTLED)
        });
    node.explain(settled).map(drop)
}
