//! One agent and one rival that know each other as static peers, and the pattern of their talk.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use ipnet::IpNet;
use mesh_proto::random::SplitMix64;
use netns_tests::{
    Host, Lab,
    binaries::Binaries,
    link::{MAIN_TABLE, To, connect},
    mesh::{
        config::{new_secret, write_private},
        node::Node,
        server::Server as DiscoveryServer,
    },
    traffic::{first_reply, transfer},
    wait,
    wireguard::{Device, Peer},
};

use super::stream::{Stream, Tally};
use crate::{
    bed::{LINK, MTU},
    rival::Rival,
};

const PORT: u16 = 51820;
const SOON: Duration = Duration::from_secs(15);
const ASK_EVERY: Duration = Duration::from_millis(100);
const BURST: Duration = Duration::from_secs(2);
/// Around WireGuard's own times: keepalive 10 s, an answer 15 s, and what a report calls deaf, 15 to 30 s.
const PAUSES: [u64; 5] = [3, 11, 17, 24, 31];
/// The same and around a rekey at 120 s and the end of a session at 180 s.
const LONG_PAUSES: [u64; 7] = [5, 12, 18, 28, 70, 125, 190];
/// What one TCP transfer beside the steady streams carries.
const TRANSFER: u64 = 32 << 20;
const TRANSFER_EVERY: Duration = Duration::from_secs(10);

/// How a pair talks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Both ways without a pause, with TCP transfers beside it.
    Steady,
    /// Bursts with pauses of seconds.
    Bursty,
    /// Bursts with pauses of minutes.
    Idle,
}

/// Who speaks first, and so makes the handshakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starter {
    Agent,
    Rival,
}

/// Two ends. Dropping it ends them.
#[derive(Debug)]
pub struct Pair {
    pub node: Node,
    pub device: Device,
    pub pattern: Pattern,
    /// Where the two are on the wire: the agent, the device.
    pub wire: [Ipv4Addr; 2],
    /// Behind the device.
    inner: IpAddr,
    _server: DiscoveryServer,
}

/// What became of a pair: one tally a direction.
#[derive(Debug, Clone, Default)]
pub struct PairTally {
    /// From the agent to the rival, and back.
    pub ways: [Tally; 2],
    pub rekeys: u64,
}

impl PairTally {
    pub fn one_way_windows(&self) -> u64 {
        let [there, back] = &self.ways;
        there.one_way_windows(back) + back.one_way_windows(there)
    }
}

impl Pair {
    /// Builds two hosts with a veth between them in the lab, and starts all that lives there.
    pub fn start(
        lab: &mut Lab,
        binaries: &Binaries,
        rival: &Rival,
        number: u8,
        pattern: Pattern,
        starter: Starter,
    ) -> Result<Self> {
        let (ours, theirs) = (lab.host(&format!("agent{number}"))?, lab.host(&format!("rival{number}"))?);
        connect(&ours, LINK, &theirs, LINK)?;
        let wire = [1, 2].map(|last| Ipv4Addr::new(10, 0, number, last));
        let [our_address, their_address] = wire.map(IpAddr::from);
        ours.add_address(LINK, IpNet::new(our_address, 24)?)?;
        theirs.add_address(LINK, IpNet::new(their_address, 24)?)?;

        let name = Device::name(number);
        let log = lab.dir().join(format!("rival-{number}"));
        let device = Device::start(&theirs, rival.command(&name), &name, PORT, &log)?;
        let inner = IpAddr::from(Ipv4Addr::new(10, 99, number, 2));
        theirs.add_address(&name, inner.into())?;
        theirs.set_mtu(&name, MTU)?;
        theirs.set_up(&name, true)?;

        let dir = lab.dir().join(format!("agent-{number}"));
        let mut server = DiscoveryServer::new(
            binaries,
            ours.clone(),
            &lab.dir().join(format!("server-{number}")),
            our_address,
            None,
        )?;
        let at = server.start()?;
        let mut node = Node::new(binaries, ours, &dir, our_address, &new_secret()?)?;
        let psk = random_key()?;
        let psk_file = dir.join("psk");
        write_private(&psk_file, &(data_encoding::BASE64.encode(&psk) + "\n"))?;
        node.config.discovery = vec![at];
        node.config.more_mesh = vec![
            "staticPeers:".to_owned(),
            format!("  - publicKey: \"{}\"", data_encoding::BASE64.encode(&device.public)),
            format!("    allowedIPs: [\"{inner}/32\"]"),
            format!("    presharedKeyFile: {}", psk_file.display()),
        ];
        if starter == Starter::Agent {
            node.config.more_mesh.push(format!("    endpoint: {}", SocketAddr::new(their_address, PORT)));
        }
        node.write_config()?;
        node.start()?;
        let overlay = overlay(&mut node)?;
        let key = public_key(&node)?;
        let endpoint = SocketAddr::new(our_address, node.config.listen_port);
        device.know(&Peer {
            preshared_key: Some(psk),
            endpoint: (starter == Starter::Rival).then_some(endpoint),
            ..Peer::new(key, overlay.into())
        })?;
        theirs.add_route(MAIN_TABLE, overlay.into(), &To::Link(name))?;
        let pair = Self { node, device, pattern, wire, inner, _server: server };
        let (from, to) = match starter {
            Starter::Agent => (&pair.node.host, inner),
            Starter::Rival => (&pair.device.host, overlay),
        };
        pair.explain(first_reply(from, to, b"soak", ASK_EVERY, SOON))?;
        Ok(pair)
    }

    /// Lets the pair talk by its pattern for so long.
    pub fn talk(&self, length: Duration, seed: u64) -> Result<PairTally> {
        let start = Instant::now();
        let mut tally = PairTally::default();
        let mut handshakes = Handshakes::new(&self.device)?;
        let mut random = SplitMix64::new(seed);
        for burst in 0_usize.. {
            let left = length.saturating_sub(start.elapsed());
            if left.is_zero() {
                break;
            }
            let seed = random.next_u64();
            let ways = match self.pattern {
                Pattern::Steady => self.steady(left, seed, start, &mut handshakes)?,
                Pattern::Bursty | Pattern::Idle => {
                    self.burst(BURST.min(left), WAYS[burst % WAYS.len()], seed, start, &mut handshakes)?
                }
            };
            tally.ways.iter_mut().zip(&ways).for_each(|(sum, more)| sum.add(more));
            let pauses: &[u64] = if self.pattern == Pattern::Idle { &LONG_PAUSES } else { &PAUSES };
            let pause = Duration::from_secs(pauses[burst % pauses.len()]);
            let left = length.saturating_sub(start.elapsed());
            if self.pattern != Pattern::Steady && !left.is_zero() {
                pass(pause.min(left), &mut handshakes, &self.device)?;
            }
        }
        tally.rekeys = handshakes.rekeys;
        Ok(tally)
    }

    /// Adds the ends of both programs' logs to an error.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        self.node.explain(self.device.explain(result))
    }

    fn steady(&self, length: Duration, seed: u64, origin: Instant, handshakes: &mut Handshakes) -> Result<[Tally; 2]> {
        let end = Instant::now() + length;
        let streams = self.streams([true, true], seed, origin)?;
        let mut wrong = [0, 0];
        let mut round = 0_u64;
        while Instant::now() < end {
            let next = (Instant::now() + TRANSFER_EVERY).min(end);
            for (way, (from, to, address)) in self.ways()?.into_iter().enumerate() {
                let done = transfer(from, to, address, TRANSFER, seed ^ round, b"soak")?;
                if done.sha256_sent != done.sha256_received || done.bytes != TRANSFER {
                    wrong[way] += TRANSFER;
                }
            }
            round += 1;
            pass(next.saturating_duration_since(Instant::now()), handshakes, &self.device)?;
        }
        let mut tallies = stop(streams)?;
        tallies.iter_mut().zip(wrong).for_each(|(tally, wrong)| tally.corrupt_bytes += wrong);
        Ok(tallies)
    }

    fn burst(
        &self,
        length: Duration,
        ways: [bool; 2],
        seed: u64,
        origin: Instant,
        handshakes: &mut Handshakes,
    ) -> Result<[Tally; 2]> {
        let streams = self.streams(ways, seed, origin)?;
        pass(length, handshakes, &self.device)?;
        stop(streams)
    }

    fn streams(&self, ways: [bool; 2], seed: u64, origin: Instant) -> Result<[Option<Stream>; 2]> {
        let [there, back] = self.ways()?;
        let start = |(from, to, address): (&Host, &Host, IpAddr), used: bool, seed| {
            used.then(|| Stream::start(from, to, address, seed, origin)).transpose()
        };
        Ok([start(there, ways[0], seed)?, start(back, ways[1], !seed)?])
    }

    fn ways(&self) -> Result<[(&Host, &Host, IpAddr); 2]> {
        let (node, device) = (&self.node.host, &self.device.host);
        Ok([(node, device, self.inner), (device, node, self.node.overlay_v4()?)])
    }
}

/// Which directions a burst uses, in turn: a side that only listens must not go deaf. Their number and that of the pauses
/// have no divisor in common, so in time each follows each.
const WAYS: [[bool; 2]; 4] = [[true, true], [true, false], [true, true], [false, true]];

/// Handshakes as the rival counts them.
#[derive(Debug)]
struct Handshakes {
    last: u64,
    rekeys: u64,
}

impl Handshakes {
    fn new(device: &Device) -> Result<Self> {
        Ok(Self { last: device.last_handshake()?, rekeys: 0 })
    }

    fn look(&mut self, device: &Device) -> Result<()> {
        let last = device.last_handshake()?;
        self.rekeys += u64::from(last != self.last && self.last != 0);
        self.last = last;
        Ok(())
    }
}

/// Lets time pass, and looks for handshakes each second.
fn pass(length: Duration, handshakes: &mut Handshakes, device: &Device) -> Result<()> {
    let end = Instant::now() + length;
    loop {
        handshakes.look(device)?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_secs(1)));
    }
}

fn stop(streams: [Option<Stream>; 2]) -> Result<[Tally; 2]> {
    let [there, back] = streams.map(|stream| stream.map_or_else(|| Ok(Tally::default()), Stream::stop));
    Ok([there?, back?])
}

fn overlay(node: &mut Node) -> Result<IpAddr> {
    let found = wait::until_or_dead("an overlay address", SOON, node, Node::check_running, |node| {
        let status = node.status()?;
        ensure!(status.node.state == "running", "it is {}", status.node.state);
        node.overlay = status.node.overlay_v4.zip(status.node.overlay_v6);
        Ok(node.overlay)
    });
    Ok(node.explain(found)?.0.0.into())
}

fn public_key(node: &Node) -> Result<[u8; 32]> {
    let status = node.status_json()?;
    let text = status["node"]["public_key"].as_str().context("status shows no public key")?;
    let bytes = data_encoding::BASE64.decode(text.as_bytes())?;
    bytes.try_into().map_err(|_| anyhow!("{text} is no key"))
}

fn random_key() -> Result<[u8; 32]> {
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| anyhow!("no randomness: {error}"))?;
    Ok(key)
}
