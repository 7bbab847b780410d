//! Two real agents and a real server on sites that become what a pair asks for, and what is seen of them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;

use super::judge::{Evidence, PAYLOAD, PER_SECOND, is_tunnelled, may_be_relayed};
use crate::{
    Lab,
    binaries::Binaries,
    capture::flows::{FlowLog, Passed},
    mesh::{config, node::Node, server::Server},
    nat::{
        Kind, Ports,
        oracle::Pair,
        world::{SERVER, SERVER_PORT, World, WorldOptions},
    },
    traffic::{Beat, Exchange},
    wait,
};

/// The last byte of the inner address of each node of a pair.
pub const LAST: [u8; 2] = [10, 20];
const NAMES: [&str; 3] = ["left", "right", "second"];
const READY_WITHIN: Duration = Duration::from_secs(30);
/// What a node says of its peer has not changed for so long: both have found out about their new places.
const SETTLED: Duration = Duration::from_millis(1500);
/// A start, a snapshot and one complete look at the own NAT take less.
const SETTLED_WITHIN: Duration = Duration::from_secs(20);
/// Of two nodes with one port behind one router one starts anew on another.
const MOVED_WITHIN: Duration = Duration::from_secs(10);

/// A look at all evidence costs some.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What to build.
#[derive(Debug, Clone, Copy)]
pub struct BenchOptions {
    /// One way, on the wire of each site.
    pub delay: Duration,
    pub ports: Ports,
    pub sites: usize,
    pub nodes: usize,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self { delay: Duration::ZERO, ports: Ports::Kept, sites: 2, nodes: 2 }
    }
}

/// The world with its programs. A pair is its first two nodes.
#[derive(Debug)]
pub struct Bench {
    pub nodes: Vec<Node>,
    pub server: Server,
    pub world: World,
    ports: Ports,
}

/// Where a node is: at which site, by its index, and at which last byte of its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub site: usize,
    pub last: u8,
}

impl Bench {
    /// Builds it and starts the server.
    pub fn build(lab: Lab, binaries: &Binaries, options: &BenchOptions) -> Result<Self> {
        let world = WorldOptions { delay: options.delay, sites: options.sites, ..WorldOptions::default() };
        let mut world = World::build(lab, world)?;
        let dir = world.lab.dir().to_owned();
        let address = IpAddr::from(SERVER[0]);
        let mut server = Server::new(binaries, world.server.clone(), &dir.join("server"), address, None)?;
        server.stun_alternate = Some(SERVER[1].into());
        let discovery = server.start()?;
        let secret = config::new_secret()?;
        let mut nodes = Vec::new();
        for name in NAMES.iter().take(options.nodes) {
            let host = world.lab.host(name)?;
            let mut node = Node::new(binaries, host, &dir.join(name), Ipv4Addr::UNSPECIFIED.into(), &secret)?;
            node.config.discovery = vec![discovery.clone()];
            node.write_config()?;
            nodes.push(node);
        }
        Ok(Self { nodes, server, world, ports: options.ports })
    }

    /// Both nodes of a pair at their places, in a new cluster of their own, known to each other and idle.
    pub fn arrange(&mut self, pair: Pair) -> Result<()> {
        let (kinds, places) = match pair {
            Pair::Apart(left, right) => {
                ([left, right], LAST.map(|last| Place { site: usize::from(last != LAST[0]), last }))
            }
            Pair::SameNat(kind) => ([kind, Kind::Open], LAST.map(|last| Place { site: 0, last })),
        };
        self.place(&kinds, &places)?;
        if let Pair::SameNat(_) = pair {
            self.start_in_turn(2)?;
            self.start_again_on_own_ports(2, [0, 1])?;
        } else {
            self.start(2)?;
        }
        self.wait_until_idle(2)
    }

    /// Of two nodes behind one router one has started anew on another port, and greeted the rest: starts the first `nodes` once
    /// more as strangers, on the ports that they have by then, and gives those of the two.
    pub fn start_again_on_own_ports(&mut self, nodes: usize, sharing: [usize; 2]) -> Result<[u16; 2]> {
        let ports = self.wait_for_own_ports(sharing)?;
        let secret = config::new_secret()?;
        for node in self.nodes.iter_mut().take(nodes) {
            node.stop()?;
            node.forget_members(&secret)?;
        }
        self.nodes.iter_mut().take(nodes).try_for_each(Node::start)?;
        Ok(ports)
    }

    /// Until two nodes behind one router have moved to different ports; gives them.
    pub fn wait_for_own_ports(&self, nodes: [usize; 2]) -> Result<[u16; 2]> {
        let (ports, _) = wait::until("the two nodes to be on ports of their own", MOVED_WITHIN, || {
            let mut ports = [0; 2];
            for (port, node) in ports.iter_mut().zip(nodes) {
                *port = self.nodes[node].status()?.node.listen_port;
            }
            Ok(Some(ports).filter(|ports| ports[0] != ports[1]))
        })?;
        Ok(ports)
    }

    /// Ends the agents, has the first sites become of these kinds, and puts the first nodes at these places.
    pub fn place(&mut self, kinds: &[Kind], places: &[Place]) -> Result<()> {
        for node in &mut self.nodes {
            node.stop()?;
        }
        // A server that goes on counts how many clusters came from one address in an hour: more than one home founds.
        self.server.stop()?;
        self.server.start()?;
        for (site, kind) in self.world.sites.iter_mut().zip(kinds) {
            site.become_kind(*kind, self.ports, false)?;
        }
        for (node, place) in self.nodes.iter_mut().zip(places) {
            let site = &self.world.sites[place.site];
            site.attach(&node.host, place.last, false)?;
            node.address = site.inner_address(place.last).into();
        }
        Ok(())
    }

    /// Makes all nodes new ones of a new cluster. No agent may run.
    ///
    /// New, since an agent that knows members from before greets them at its start: there would be a path already. Like
    /// this no packet has ever gone through the tunnel.
    pub fn found_cluster(&mut self) -> Result<()> {
        let secret = config::new_secret()?;
        self.nodes.iter_mut().try_for_each(|node| node.start_over(&secret))
    }

    /// Starts the first `nodes` as a new cluster.
    pub fn start(&mut self, nodes: usize) -> Result<()> {
        self.found_cluster()?;
        self.nodes.iter_mut().take(nodes).try_for_each(Node::start)
    }

    /// Starts the first `nodes` as a new cluster, each when the one before knows its mapping: for two hosts with one port behind
    /// one router.
    ///
    /// Their first datagrams at one instant would both be given that port outside. The kernel then refuses the later flow, and
    /// the rules, which see a datagram before it is refused, would go on to ask for the same port.
    pub fn start_in_turn(&mut self, nodes: usize) -> Result<()> {
        self.found_cluster()?;
        for node in self.nodes.iter_mut().take(nodes) {
            node.start()?;
            let what = format!("{} to know its mapping", node.name());
            let known = wait::until_or_dead(&what, READY_WITHIN, node, Node::check_running, |node| {
                Ok(node.status_json()?.pointer("/node/net/v4/seen_at/0").map(drop))
            });
            node.explain(known)?;
        }
        Ok(())
    }

    /// The first `nodes` know each other, have found out about their places, and no tunnel is up.
    pub fn wait_until_idle(&mut self, nodes: usize) -> Result<()> {
        self.nodes.iter_mut().take(nodes).try_for_each(|node| wait_ready(node, nodes - 1))?;
        self.nodes.iter().take(nodes).try_for_each(wait_settled)
    }

    /// Runs the exchange of a pair from left to right until it is direct and stays so, or for `patience`, and gathers what
    /// was seen.
    pub fn exchange(&mut self, pair: Pair, patience: Duration) -> Result<Evidence> {
        let sites = &self.world.sites;
        let watched = match pair {
            Pair::Apart(..) => {
                self.watch([0, 1], LAST.map(|last| Place { site: usize::from(last != LAST[0]), last }))?
            }
            Pair::SameNat(_) => {
                let between = FlowLog::start(&sites[0].home, &sites[0].inner_port(LAST[0]))?;
                self.watch_on(between, [0, 1], LAST.map(|last| sites[0].inner_address(last)))?
            }
        };
        // Not direct in time is a verdict of the evidence, not an error of the lab.
        let _ = watched.wait_direct(patience);
        watched.stop()
    }

    /// Starts an exchange between two nodes of different sites, with captures where it may pass.
    pub fn watch(&self, nodes: [usize; 2], places: [Place; 2]) -> Result<Watched> {
        let sites = &self.world.sites;
        let between = FlowLog::start(&self.world.internet, &sites[places[0].site].port())?;
        self.watch_on(between, nodes, places.map(|place| sites[place.site].outer_address(place.last)))
    }

    fn watch_on(&self, between: FlowLog, [from, to]: [usize; 2], ends: [Ipv4Addr; 2]) -> Result<Watched> {
        let at_server = FlowLog::start(&self.world.internet, SERVER_PORT)?;
        let to_address = self.nodes[to].overlay_v4()?;
        let exchange = Exchange::start(&self.nodes[from].host, &self.nodes[to].host, to_address, PER_SECOND, PAYLOAD)?;
        Ok(Watched { exchange, between, at_server, ends: ends.map(IpAddr::from) })
    }
}

/// What a person needs who asks why: status and log of each running agent, as files whose names begin with `name`.
pub fn keep_words(nodes: &[Node], dir: &Path, name: &str) -> Result<()> {
    fs::create_dir_all(dir)?;
    for node in nodes {
        let status = node.status_json().map_or_else(|error| format!("{error:#}"), |status| format!("{status:#}"));
        fs::write(dir.join(format!("{name}-{}.status.json", node.name())), status)?;
        fs::write(dir.join(format!("{name}-{}.log", node.name())), node.log().unwrap_or_default())?;
    }
    Ok(())
}

/// An exchange under way.
#[derive(Debug)]
pub struct Watched {
    exchange: Exchange,
    between: FlowLog,
    at_server: FlowLog,
    ends: [IpAddr; 2],
}

impl Watched {
    pub fn beats(&self) -> Vec<Beat> {
        self.exchange.beats()
    }

    /// Until the pair is direct and has stayed so.
    pub fn wait_direct(&self, patience: Duration) -> Result<()> {
        let mut looked = Instant::now();
        wait::until_true("the pair to become direct", patience, || {
            if looked.elapsed() < LOOK_EVERY {
                return Ok(false);
            }
            looked = Instant::now();
            Ok(self.evidence().direct_since().is_some())
        })
        .map(drop)
    }

    /// Ends the exchange and gives all that was seen.
    pub fn stop(self) -> Result<Evidence> {
        let seen_until = Instant::now();
        let Self { exchange, between, at_server, ends } = self;
        let mut evidence = Evidence {
            beats: exchange.stop()?,
            tunnel: between.stop()?,
            relayed: at_server.stop()?,
            left: ends[0],
            seen_until,
        };
        evidence.tunnel.retain(|line| is_tunnelled(line, ends));
        evidence.relayed.retain(passes_server);
        Ok(evidence)
    }

    /// So far.
    fn evidence(&self) -> Evidence {
        Evidence {
            beats: self.beats(),
            tunnel: self.between.lines(|line| is_tunnelled(line, self.ends)),
            relayed: self.at_server.lines(passes_server),
            left: self.ends[0],
            seen_until: Instant::now(),
        }
    }
}

fn passes_server(line: &Passed) -> bool {
    may_be_relayed(line, &SERVER.map(IpAddr::from))
}

/// The agent runs, has a session, its own addresses and so many peers with addresses.
pub fn wait_ready(node: &mut Node, peers: usize) -> Result<()> {
    let name = node.name().to_owned();
    let ready =
        wait::until_or_dead(&format!("{name} to know its peers"), READY_WITHIN, node, Node::check_running, |node| {
            let status = node.status()?;
            let connected = status.servers.iter().all(|server| server.state == "connected");
            let known = status.peers.len() == peers && status.peers.iter().all(|peer| peer.overlay_v4.is_some());
            let own = status.node.overlay_v4.zip(status.node.overlay_v6);
            Ok(own.filter(|_| connected && known))
        });
    let (own, _) = node.explain(ready)?;
    node.overlay = Some(own);
    Ok(())
}

/// What it knows of its peers stands still, and no tunnel is up.
fn wait_settled(node: &Node) -> Result<()> {
    let mut last = (Vec::new(), Instant::now());
    let settled =
        wait::until_true(&format!("{} to have settled with an idle tunnel", node.name()), SETTLED_WITHIN, || {
            let status = node.status()?;
            let candidates: Vec<_> = status.peers.iter().map(|peer| peer.candidates.clone()).collect();
            if candidates != last.0 {
                last = (candidates, Instant::now());
            }
            Ok(status.peers.iter().all(|peer| peer.state == "idle") && last.1.elapsed() >= SETTLED)
        });
    node.explain(settled).map(drop)
}
