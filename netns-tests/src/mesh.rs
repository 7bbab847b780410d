//! A whole mesh in a lab: one discovery server and some nodes, each on a site of its own, pods behind each node.
//!
//! ```text
//!  server 10.0.0.2 ── site0 ┐
//!  n1     10.0.1.2 ── site1 ┼─ internet (routes between the sites)      pods of n1: 10.244.1.11, .12 on br-pods
//!  n2     10.0.2.2 ── site2 ┤                                           pods of n2: 10.244.2.11, .12
//!  n3     10.0.3.2 ── site3 ┘                                           …
//! ```
//! IPv6 likewise: 2001:db8:N::2 on the sites, fd00:244:N::11 for pods. Every underlay link is captured from before the
//! first agent starts.

pub mod config;
pub mod node;
pub mod server;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;

use crate::{
    Capture, Counts, Entry, Host, Lab, Marker, Snapshot, Watch,
    binaries::{BIN_DIR, Binaries},
    isolation,
    link::connect,
    mesh::{config::NodeConfig, node::Node, server::Server},
    traffic::send_clear,
    wait,
};

/// What an agent makes on its host (DESIGN.md 6).
pub const MESH_LINK: &str = "mesh0";
pub const MESH_TABLE: u32 = 818;
pub const MESH_RULE: u32 = 1110;
/// The mark of the agents' own sockets; marked packets do not enter the tunnel.
pub const OWN_MARK: u32 = 0x10;
/// The underlay link of every site host.
pub const UPLINK: &str = "eth0";
/// The bridge that a node's pods are on.
pub const POD_BRIDGE: &str = "br-pods";
/// Addresses that only exist inside the mesh: seen on an underlay link they are a leak.
const INSIDE_ONLY: [&str; 3] = ["198.19.0.0/16", "10.244.0.0/16", "fd00::/8"];
/// From the last start to every node knowing every other.
const FORM_WITHIN: Duration = Duration::from_secs(30);

/// What to build.
#[derive(Debug, Clone)]
pub struct MeshOptions {
    pub nodes: usize,
    pub pods_per_node: usize,
    /// How long the server keeps a silent node; its default when `None`.
    pub ttl: Option<Duration>,
    /// Reverse path filter of every underlay link.
    pub rp_filter: u8,
    /// May live beside other labs, see [`Lab::beside_others`].
    pub beside: bool,
    /// Changes to a node's config before it is written; `usize` is the node's index from 0.
    pub tweak: fn(usize, &mut NodeConfig),
}

impl Default for MeshOptions {
    fn default() -> Self {
        Self { nodes: 3, pods_per_node: 2, ttl: None, rp_filter: 0, beside: false, tweak: |_, _| {} }
    }
}

/// A mesh under test. Dropping it ends everything.
#[derive(Debug)]
pub struct Mesh {
    pub server: Server,
    pub nodes: Vec<Node>,
    pub internet: Host,
    pub watch: Watch,
    captures: Vec<Capture>,
    controls: Vec<Marker>,
    baseline: BTreeMap<String, Snapshot>,
    // Last, so that programs and captures end before their lab.
    lab: Lab,
}

/// For tests that need the programs and `/dev/net/tun`: builds, then enters as [`crate::enter_or_skip`] does.
///
/// `None`: the test was handled, return.
pub fn enter_or_skip(name: &str) -> Result<Option<Binaries>> {
    if let Err(why) = isolation::tun_available() {
        let _ = isolation::skip(name, &why.to_string(), why.help());
        return Ok(None);
    }
    let binaries = Binaries::find()?;
    let entry = isolation::enter_or_skip_with(name, &[(BIN_DIR, binaries.dir())]);
    Ok((entry == Entry::Inside).then_some(binaries))
}

impl Mesh {
    /// Builds sites, nodes and pods and starts the captures; starts no program of ours.
    pub fn build(binaries: &Binaries, options: &MeshOptions) -> Result<Self> {
        let mut lab = if options.beside { Lab::beside_others()? } else { Lab::new()? };
        let internet = lab.router("internet")?;
        let watch = Watch::default();
        let server_host = site(&mut lab, &internet, "server", 0, options.rp_filter)?;
        let server = Server::new(binaries, server_host, &lab.dir().join("server"), site_v4(0), options.ttl)?;
        let secret = config::new_secret()?;
        let mut nodes = Vec::new();
        for index in 0..options.nodes {
            let number = index + 1;
            let host = site(&mut lab, &internet, &format!("n{number}"), number, options.rp_filter)?;
            host.forward()?;
            let mut node = Node::new(binaries, host, &lab.dir().join(format!("n{number}")), site_v4(number), &secret)?;
            (node.pods, node.config.pod_cidrs) = pods(&mut lab, &node, number, options.pods_per_node)?;
            (options.tweak)(index, &mut node.config);
            node.write_config()?;
            nodes.push(node);
        }
        for prefix in INSIDE_ONLY {
            watch.leaks_of(prefix.parse().context("a constant prefix")?);
        }
        let captures = (0..=options.nodes)
            .map(|number| Capture::start(&internet, &format!("site{number}"), &watch))
            .collect::<Result<_>>()?;
        Ok(Self { server, nodes, internet, watch, captures, controls: Vec::new(), baseline: BTreeMap::new(), lab })
    }

    /// [`Self::build`], then everything started and waited for.
    pub fn start(binaries: &Binaries, options: &MeshOptions) -> Result<Self> {
        let mut mesh = Self::build(binaries, options)?;
        mesh.start_server()?;
        mesh.start_nodes()?;
        mesh.wait_until_formed()?;
        Ok(mesh)
    }

    /// Starts the server and writes its endpoint and pin into every node's config.
    pub fn start_server(&mut self) -> Result<()> {
        let address = self.server.start()?;
        for node in &mut self.nodes {
            node.config.discovery = vec![address.clone()];
            node.write_config()?;
        }
        Ok(())
    }

    pub fn start_nodes(&mut self) -> Result<()> {
        self.nodes.iter_mut().try_for_each(Node::start)
    }

    /// Waits until every node lists every other with both overlay addresses. From then on packets to a peer can only
    /// enter the tunnel or be refused.
    pub fn wait_until_formed(&mut self) -> Result<Duration> {
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        self.wait_until_formed_of(&all, FORM_WITHIN)
    }

    /// The same for the nodes that run, by their index, in a time of the caller's choice.
    pub fn wait_until_formed_of(&mut self, members: &[usize], within: Duration) -> Result<Duration> {
        let others = members.len() - 1;
        let start = std::time::Instant::now();
        for member in members {
            let node = self.nodes.get_mut(*member).context("no such node")?;
            let name = node.name().to_owned();
            let formed = wait::until_or_dead(
                &format!("{name} to list {others} peers"),
                within.saturating_sub(start.elapsed()),
                node,
                Node::check_running,
                |node| {
                    let status = node.status()?;
                    let complete = status
                        .peers
                        .iter()
                        .filter(|peer| peer.overlay_v4.is_some() && peer.overlay_v6.is_some())
                        .count();
                    ensure!(complete == others, "it is {} and lists {complete} complete peers", status.node.state);
                    node.overlay = Some((
                        status.node.overlay_v4.context("it has no overlay IPv4 address yet")?,
                        status.node.overlay_v6.context("it has no overlay IPv6 address yet")?,
                    ));
                    Ok(Some(()))
                },
            );
            node.explain(formed)?;
        }
        Ok(start.elapsed())
    }

    /// Makes one more discovery server on a site of its own, not started. No capture: agents send nothing else there.
    pub fn another_server(&mut self, binaries: &Binaries) -> Result<Server> {
        let number = self.nodes.len() + 1;
        let host = site(&mut self.lab, &self.internet, "server2", number, 0)?;
        Server::new(binaries, host, &self.lab.dir().join("server2"), site_v4(number), self.server.ttl())
    }

    /// One more agent on a node's host, with places, a port and a link of its own: switched off, not started.
    pub fn another_agent(&self, binaries: &Binaries, node: usize) -> Result<Node> {
        let node = self.nodes.get(node).context("no such node")?;
        let name = format!("{}-second", node.name());
        let secret = std::fs::read_to_string(&node.config.secret_file)?;
        let mut second = Node::new(binaries, node.host.clone(), &self.lab.dir().join(&name), node.address, &secret)?;
        second.config = NodeConfig {
            enabled: false,
            host_name: name,
            listen_port: node.config.listen_port + 1,
            secret_file: second.config.secret_file,
            more_mesh: vec!["interfaceName: mesh1".to_owned()],
            ..node.config.clone()
        };
        second.write_config()?;
        Ok(second)
    }

    /// A marker for traffic that must stay inside the mesh.
    pub fn marker(&self, label: &str) -> Result<Marker> {
        self.watch.marker(label)
    }

    /// Sends one marked datagram from every node to the server's site outside the tunnel: the captures must find it.
    pub fn send_controls(&mut self, round: &str) -> Result<()> {
        for node in &self.nodes {
            let control = self.watch.marker(&format!("control {round} {}", node.name()))?;
            send_clear(&node.host, (self.server.address, 9).into(), control.bytes(), OWN_MARK)?;
            self.controls.push(control);
        }
        Ok(())
    }

    pub fn controls(&self) -> &[Marker] {
        &self.controls
    }

    /// What the captures saw so far, by link; the first is the server's.
    pub fn counts(&self) -> Vec<(String, Counts)> {
        self.captures.iter().map(|capture| (capture.name().to_owned(), capture.counts())).collect()
    }

    /// Ends the captures and gives what they saw.
    pub fn stop_captures(&mut self) -> Result<Vec<(String, Counts)>> {
        self.captures.drain(..).map(|capture| Ok((capture.name().to_owned(), capture.stop()?))).collect()
    }

    /// Dumps every host of the mesh, to be compared with later.
    pub fn take_baseline(&mut self) -> Result<()> {
        let mut dumps = BTreeMap::from([(
            self.server.host.name().to_owned(),
            Snapshot::take(&self.server.host, &self.server.roots())?,
        )]);
        for node in &self.nodes {
            dumps.insert(node.name().to_owned(), node.snapshot()?);
            for pod in &node.pods {
                dumps.insert(pod.host.name().to_owned(), Snapshot::take(&pod.host, &[])?);
            }
        }
        self.baseline = dumps;
        Ok(())
    }

    /// The dump of one host from [`Self::take_baseline`].
    pub fn baseline(&self, host: &str) -> Result<&Snapshot> {
        self.baseline.get(host).with_context(|| format!("no dump of {host} was taken"))
    }

    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Scratch space that dies with the lab.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.lab.dir().join(name)
    }

    /// Every ordered pair of nodes.
    pub fn pairs(&self) -> impl Iterator<Item = (&Node, &Node)> {
        self.nodes.iter().flat_map(|a| self.nodes.iter().filter(|b| b.name() != a.name()).map(move |b| (a, b)))
    }
}

/// A pod: a namespace on its node's bridge.
#[derive(Debug)]
pub struct Pod {
    pub host: Host,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Pod {
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// One host on a subnet of its own behind the internet router.
fn site(lab: &mut Lab, internet: &Host, name: &str, number: usize, rp_filter: u8) -> Result<Host> {
    let host = lab.host(name)?;
    let port = format!("site{number}");
    connect(internet, &port, &host, UPLINK)?;
    let router = (Ipv4Addr::new(10, 0, small(number)?, 1), v6([0x2001, 0xdb8, small(number)?.into(), 0, 1]));
    internet.add_address(&port, IpNet::new(router.0.into(), 24)?)?;
    internet.add_address(&port, IpNet::new(router.1.into(), 64)?)?;
    host.add_address(UPLINK, IpNet::new(site_v4(number), 24)?)?;
    host.add_address(UPLINK, IpNet::new(v6([0x2001, 0xdb8, small(number)?.into(), 0, 2]).into(), 64)?)?;
    host.add_default_routes(router.0, router.1)?;
    host.set_sysctl(&format!("ipv4/conf/{UPLINK}/rp_filter"), &rp_filter.to_string())?;
    Ok(host)
}

fn site_v4(number: usize) -> IpAddr {
    Ipv4Addr::new(10, 0, number as u8, 2).into()
}

/// The bridge of a node and the pods on it; the prefixes that the node announces for them.
fn pods(lab: &mut Lab, node: &Node, number: usize, count: usize) -> Result<(Vec<Pod>, Vec<IpNet>)> {
    let third = small(number)?;
    let gateway = (Ipv4Addr::new(10, 244, third, 1), v6([0xfd00, 0x244, third.into(), 0, 1]));
    node.host.add_bridge(POD_BRIDGE)?;
    node.host.add_address(POD_BRIDGE, IpNet::new(gateway.0.into(), 24)?)?;
    node.host.add_address(POD_BRIDGE, IpNet::new(gateway.1.into(), 64)?)?;
    let mut pods = Vec::new();
    for index in 1..=count {
        let host = lab.host(&format!("{}-p{index}", node.name()))?;
        let port = format!("pod{index}");
        connect(&node.host, &port, &host, UPLINK)?;
        node.host.enslave(&port, POD_BRIDGE)?;
        let last = 10 + small(index)?;
        let pod = Pod {
            host,
            v4: Ipv4Addr::new(10, 244, third, last),
            v6: v6([0xfd00, 0x244, third.into(), 0, 0x10 + u16::from(last) - 10]),
        };
        pod.host.add_address(UPLINK, IpNet::new(pod.v4.into(), 24)?)?;
        pod.host.add_address(UPLINK, IpNet::new(pod.v6.into(), 64)?)?;
        pod.host.add_default_routes(gateway.0, gateway.1)?;
        pods.push(pod);
    }
    let announced = vec![
        IpNet::new(Ipv4Addr::new(10, 244, third, 0).into(), 24)?,
        IpNet::new(v6([0xfd00, 0x244, third.into(), 0, 0]).into(), 64)?,
    ];
    Ok((pods, announced))
}

/// The first four groups and the last.
fn v6([a, b, c, d, last]: [u16; 5]) -> Ipv6Addr {
    Ipv6Addr::new(a, b, c, d, 0, 0, 0, last)
}

fn small(number: usize) -> Result<u8> {
    u8::try_from(number).ok().filter(|number| *number < 200).context("a lab has fewer than 200 nodes and pods")
}
