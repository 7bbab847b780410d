//! Many peers against one: does a mesh of fifty carry as much as a mesh of two?
//!
//! ```text
//!  hub of the small mesh ─┐                       ┌─ its only peer
//!  hub of the large mesh ─┴─ switch (a bridge) ───┴─ its N peers
//! ```
//! Both meshes are alive all the time, have the same server, and are measured in the same rounds: one stream to one peer
//! in each, then ten streams, to the only peer and to ten of the many, and those once more outside the tunnels: how much ten
//! receivers on one machine cost without us. A bridge in between makes absolute figures smaller than on a bare wire; the
//! ratios do not care.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
};

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use ipnet::IpNet;
use netns_tests::{
    Host, Lab,
    binaries::Binaries,
    link::connect,
    mesh::{
        config::{self, ServerAddress},
        node::Node,
        server::Server as DiscoveryServer,
    },
};
use nix::unistd::Pid;
use serde::Serialize;

use crate::{
    bed::{LINK, MTU},
    conditions::Conditions,
    contender::agents::{await_direct, await_peers},
    machine::Cpu,
    report::table,
    stats::Series,
    traffic::{Done, Generator, Job, Meet, Order},
    underlay,
};

/// Peers that the traffic is spread over.
const SPREAD: usize = 10;
/// What a large mesh must carry of what a small one does.
const AT_LEAST: f64 = 0.9;

/// What was found. Ratios are large mesh / small mesh within each round.
#[derive(Debug, Clone, Serialize)]
pub struct PeersReport {
    pub count: usize,
    /// One stream to one peer, Gbit/s.
    pub small_tcp1_gbps: Series,
    pub large_tcp1_gbps: Series,
    /// Ten streams, Gbit/s: all to the only peer, and one each to ten of the many.
    pub small_tcp10_gbps: Series,
    pub large_spread10_gbps: Series,
    /// The same ten streams outside the tunnels, over the bare switch.
    pub bare_small_tcp10_gbps: Series,
    pub bare_large_spread10_gbps: Series,
    /// CPU of the hub's agent during ten streams through its tunnels, with the kernel's work on its back.
    pub small_hub_cpu_ns_per_byte: Series,
    pub large_hub_cpu_ns_per_byte: Series,
    pub to_one_ratio: Series,
    pub spread_ratio: Series,
    /// What ten receivers on one machine cost without us. Reported, not judged.
    pub bare_spread_ratio: Series,
    /// What it costs the hub that its traffic is spread. Reported, not judged.
    pub hub_cpu_ratio: Series,
    pub peak_rss_mib: f64,
}

impl PeersReport {
    pub fn ok(&self) -> bool {
        [&self.to_one_ratio, &self.spread_ratio]
            .iter()
            .all(|ratio| ratio.median().is_some_and(|median| median >= AT_LEAST))
    }
}

impl fmt::Display for PeersReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let series = table::series;
        writeln!(f, "TCP, 1 stream, one peer: {} Gbit/s", series(&self.small_tcp1_gbps))?;
        writeln!(f, "TCP, 1 stream, to one of {}: {} Gbit/s", self.count, series(&self.large_tcp1_gbps))?;
        writeln!(f, "TCP, 10 streams, one peer: {} Gbit/s", series(&self.small_tcp10_gbps))?;
        writeln!(f, "TCP, 10 streams, to ten of {}: {} Gbit/s", self.count, series(&self.large_spread10_gbps))?;
        writeln!(
            f,
            "large / small, >= {AT_LEAST}: to one {}, spread {}",
            series(&self.to_one_ratio),
            series(&self.spread_ratio)
        )?;
        writeln!(
            f,
            "ten streams without a tunnel: {} and {} Gbit/s, spread {}",
            series(&self.bare_small_tcp10_gbps),
            series(&self.bare_large_spread10_gbps),
            series(&self.bare_spread_ratio)
        )?;
        writeln!(
            f,
            "CPU of the hub, ten streams: {} and {} ns/byte, spread {}",
            series(&self.small_hub_cpu_ns_per_byte),
            series(&self.large_hub_cpu_ns_per_byte),
            series(&self.hub_cpu_ratio)
        )?;
        write!(f, "peak memory of the agent with {} peers: {} MiB", self.count, table::number(self.peak_rss_mib))
    }
}

/// Builds both meshes and measures them in turn.
pub fn measure(
    binaries: &Binaries,
    program: &Path,
    conditions: &Conditions,
    count: usize,
    (rounds, seconds): (u32, f64),
    progress: &ProgressBar,
) -> Result<PeersReport> {
    progress.set_message(format!("starting a mesh of {count} peers and one of one"));
    let mut field = Field::build(program, conditions)?;
    let small = field.mesh(binaries, 1, 1)?;
    let large = field.mesh(binaries, 2, count)?;
    let (to_only, to_ten) = ([0; SPREAD], std::array::from_fn::<_, SPREAD, _>(|n| n));
    let [
        mut small1,
        mut large1,
        mut small10,
        mut large10,
        mut bare_small10,
        mut bare_large10,
        mut small_cpu,
        mut large_cpu,
    ] = std::array::from_fn(|_| Series::default());
    for round in 0..rounds {
        progress.set_message(format!("round {}/{rounds}", round + 1));
        small1.push(Some(small.carry(&[0], Way::Tunnel, seconds)?.gbps));
        large1.push(Some(large.carry(&[0], Way::Tunnel, seconds)?.gbps));
        for (mesh, to, gbps, cpu) in
            [(&small, to_only, &mut small10, &mut small_cpu), (&large, to_ten, &mut large10, &mut large_cpu)]
        {
            let carried = mesh.carry(&to, Way::Tunnel, seconds)?;
            gbps.push(Some(carried.gbps));
            cpu.push(Some(carried.hub_cpu_ns_per_byte));
        }
        bare_small10.push(Some(small.carry(&to_only, Way::Bare, seconds)?.gbps));
        bare_large10.push(Some(large.carry(&to_ten, Way::Bare, seconds)?.gbps));
        progress.inc(1);
    }
    Ok(PeersReport {
        count,
        to_one_ratio: large1.ratio_to(&small1),
        spread_ratio: large10.ratio_to(&small10),
        bare_spread_ratio: bare_large10.ratio_to(&bare_small10),
        hub_cpu_ratio: large_cpu.ratio_to(&small_cpu),
        small_tcp1_gbps: small1,
        large_tcp1_gbps: large1,
        small_tcp10_gbps: small10,
        large_spread10_gbps: large10,
        bare_small_tcp10_gbps: bare_small10,
        bare_large_spread10_gbps: bare_large10,
        small_hub_cpu_ns_per_byte: small_cpu,
        large_hub_cpu_ns_per_byte: large_cpu,
        peak_rss_mib: crate::machine::peak_rss_mib(large.hub_pid()?)?,
    })
}

/// The switch and everybody on it.
struct Field<'a> {
    program: &'a Path,
    conditions: &'a Conditions,
    switch: Host,
    hosts: u16,
    server: Option<(DiscoveryServer, ServerAddress)>,
    // Last, so that programs end before their lab.
    lab: Lab,
}

/// A hub that knows its peers.
struct Mesh {
    hub: Member,
    peers: Vec<Member>,
}

struct Member {
    node: Node,
    /// On the switch.
    address: IpAddr,
    generator: Generator,
}

impl<'a> Field<'a> {
    fn build(program: &'a Path, conditions: &'a Conditions) -> Result<Self> {
        let mut lab = Lab::new()?;
        let switch = lab.host("switch")?;
        switch.add_bridge("br0")?;
        Ok(Self { program, conditions, switch, hosts: 0, server: None, lab })
    }

    fn host(&mut self, name: &str) -> Result<(Host, IpAddr)> {
        self.hosts += 1;
        let [high, low] = self.hosts.to_be_bytes();
        let host = self.lab.host(name)?;
        let port = format!("port{}", self.hosts);
        connect(&self.switch, &port, &host, LINK)?;
        underlay::set(&self.switch, &port, self.conditions.underlay)?;
        self.conditions.apply(&host, LINK)?;
        self.switch.enslave(&port, "br0")?;
        let address = Ipv4Addr::new(10, 0, high, low).into();
        host.add_address(LINK, IpNet::new(address, 16)?)?;
        Ok((host, address))
    }

    /// Starts a mesh of one hub and `count` peers, and waits until the hub has a direct path to those it will talk to.
    fn mesh(&mut self, binaries: &Binaries, number: u8, count: usize) -> Result<Mesh> {
        let secret = config::new_secret()?;
        let mut members = Vec::new();
        for index in 0..=count {
            let name = format!("m{number}-{index}");
            let (host, address) = self.host(&name)?;
            let at = match &self.server {
                Some((_, at)) => at.clone(),
                None => {
                    let dir = self.lab.dir().join("server");
                    let mut server = DiscoveryServer::new(binaries, host.clone(), &dir, address, None)?;
                    let at = server.start()?;
                    self.server = Some((server, at.clone()));
                    at
                }
            };
            let mut node = Node::new(binaries, host.clone(), &self.lab.dir().join(&name), address, &secret)?;
            node.config.discovery = vec![at];
            node.config.more_mesh.push(format!("mtu: {MTU}"));
            node.write_config()?;
            node.start()?;
            let generator = Generator::start(&host, self.program, self.lab.dir())?;
            members.push(Member { node, address, generator });
        }
        let mut members = members.into_iter();
        let mut hub = members.next().context("a mesh has a hub")?;
        let mut peers: Vec<Member> = members.collect();
        await_peers(&mut hub.node, count)?;
        for peer in peers.iter_mut().take(SPREAD) {
            await_peers(&mut peer.node, count)?;
            await_direct(&hub.node, &peer.node)?;
            await_direct(&peer.node, &hub.node)?;
        }
        Ok(Mesh { hub, peers })
    }
}

/// By which of their addresses streams reach peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Tunnel,
    Bare,
}

struct Carried {
    gbps: f64,
    hub_cpu_ns_per_byte: f64,
}

impl Mesh {
    fn hub_pid(&self) -> Result<Pid> {
        self.hub.node.pid().context("the agent has ended")
    }

    /// One stream from the hub to each of these peers at once.
    fn carry(&self, to: &[usize], way: Way, seconds: f64) -> Result<Carried> {
        let mut sinks: Vec<Job> = Vec::new();
        let mut targets = Vec::new();
        for peer in to {
            let peer = self.peers.get(*peer).context("no such peer")?;
            let address = match way {
                Way::Tunnel => peer.node.overlay_v4()?,
                Way::Bare => peer.address,
            };
            let at = SocketAddr::new(address, 0);
            let meet = Meet::Listen { at, streams: 1 };
            let (sink, port) = peer.generator.receive(&Order::TcpSink { meet })?;
            sinks.push(sink);
            targets.push(SocketAddr::new(at.ip(), port));
        }
        let cpu = Cpu::now(&[self.hub_pid()?])?;
        self.hub.generator.run(&Order::TcpSource { meet: Meet::Connect { to: targets }, seconds })?;
        let (mut gbps, mut all) = (0.0, 0);
        for sink in sinks {
            let Done::TcpReceived { bytes, nanos } = sink.done()? else { bail!("a receiver did not tell what came") };
            gbps += bytes as f64 * 8.0 / nanos as f64;
            all += bytes;
        }
        let cpu = cpu.used()?.processes;
        Ok(Carried { gbps, hub_cpu_ns_per_byte: cpu.as_nanos() as f64 / all.max(1) as f64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(to_one: f64, spread: f64) -> PeersReport {
        let none = Series::default;
        PeersReport {
            count: 50,
            small_tcp1_gbps: none(),
            large_tcp1_gbps: none(),
            small_tcp10_gbps: none(),
            large_spread10_gbps: none(),
            bare_small_tcp10_gbps: none(),
            bare_large_spread10_gbps: none(),
            small_hub_cpu_ns_per_byte: none(),
            large_hub_cpu_ns_per_byte: none(),
            to_one_ratio: Series::from([to_one; 3]),
            spread_ratio: Series::from([spread; 3]),
            bare_spread_ratio: none(),
            hub_cpu_ratio: none(),
            peak_rss_mib: 30.0,
        }
    }

    #[test]
    fn both_ratios_must_hold() {
        assert!(report(0.95, 0.9).ok());
        assert!(!report(0.89, 1.0).ok());
        assert!(!report(1.0, 0.5).ok());
        assert!(
            !PeersReport { spread_ratio: Series::default(), ..report(1.0, 1.0) }.ok(),
            "nothing measured is not ok"
        );
    }
}
