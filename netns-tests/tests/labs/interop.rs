//! Debian's `wireguard-go` as a static peer: another implementation of the protocol, and the judge of ours.
//!
//! Two pairs run side by side, because a rekey comes after 120 s by protocol and a test may last 180: in one the agent
//! speaks first and data never stops, in the other `wireguard-go` speaks first and is idle between bursts. Both must see
//! a rekey, lose nothing, change nothing and never fall silent.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use data_encoding::BASE64;
use netns_tests::{
    Host, Mesh, MeshOptions, isolation,
    mesh::{enter_or_skip, node::Node},
    traffic::{UdpStream, UdpTotals, first_reply},
    wait,
    wireguard::{Device, Peer},
};

const NAME: &str = "wireguard_go_as_a_static_peer";
const SOON: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_millis(50);
const PER_SECOND: u32 = 50;
/// How long a burst of the second pair lasts, and the pauses between two: shorter and longer than WireGuard's own
/// keepalive (10 s) and its limit for an answer (15 s).
const BURST: Duration = Duration::from_secs(2);
const PAUSES: [Duration; 3] = [Duration::from_secs(3), Duration::from_secs(11), Duration::from_secs(17)];
/// A rekey is due 120 s after a handshake.
const REKEY_WITHIN: Duration = Duration::from_secs(140);
/// Data goes on for this long after both rekeys: a peer that goes deaf after one is found.
const AFTER_REKEY: Duration = Duration::from_secs(20);
/// WireGuard's port of the device.
const PORT: u16 = 51820;

#[test]
fn wireguard_go_as_a_static_peer() {
    let Some(binaries) = enter_or_skip(NAME).unwrap() else {
        return;
    };
    let Some(program) = installed("wireguard-go") else {
        let _ = isolation::skip(
            NAME,
            "wireguard-go is not installed",
            "apt-get install --no-install-recommends wireguard-go",
        );
        return;
    };
    if isolation::is_rootless() {
        let _ = isolation::skip(NAME, "wireguard-go keeps its socket in /var/run", "run as root");
        return;
    }
    let options = MeshOptions { nodes: 4, pods_per_node: 0, beside: true, ..MeshOptions::default() };
    let mut mesh = Mesh::build(&binaries, &options).unwrap();
    mesh.start_server().unwrap();
    let scratch = mesh.scratch("wireguard-go");
    fs::create_dir(&scratch).unwrap();
    // The last two hosts run no agent but a device each.
    let (members, devices) = mesh.nodes.split_at_mut(2);
    let [busy, bursty] = members else { panic!("two members") };
    let mut busy = Pair::new(busy, &devices[0].host, &program, &scratch, Starter::Agent);
    let mut bursty = Pair::new(bursty, &devices[1].host, &program, &scratch, Starter::Device);
    for pair in [&mut busy, &mut bursty] {
        pair.start();
    }

    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| busy.carry_without_pause(start));
        scope.spawn(|| bursty.carry_in_bursts(start));
    });
}

/// Who sends the first packet: it makes the handshakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Starter {
    Agent,
    Device,
}

/// A member and a device that know each other.
struct Pair<'a> {
    node: &'a mut Node,
    device: Device,
    psk: [u8; 32],
    /// The address behind the device.
    address: IpAddr,
    starter: Starter,
}

impl<'a> Pair<'a> {
    fn new(node: &'a mut Node, host: &Host, program: &Path, scratch: &Path, starter: Starter) -> Self {
        let number = match starter {
            Starter::Agent => 1,
            Starter::Device => 2,
        };
        let name = Device::name(number);
        let mut command = Command::new(program);
        command.args(["-f", &name]);
        let device = Device::start(host, command, &name, PORT, &scratch.join(format!("log-{number}"))).unwrap();
        let address: IpAddr = format!("10.50.0.{number}").parse().unwrap();
        host.add_address(&device.name, ipnet::IpNet::new(address, 32).unwrap()).unwrap();
        host.set_mtu(&device.name, 1420).unwrap();
        host.set_up(&device.name, true).unwrap();
        let psk = random();
        let psk_file = scratch.join(format!("psk-{number}"));
        netns_tests::mesh::config::write_private(&psk_file, &(BASE64.encode(&psk) + "\n")).unwrap();
        // The hosts are the third and the fourth: sites 3 and 4.
        let endpoint = format!("    endpoint: 10.0.{}.2:{PORT}", number + 2);
        let mut peer = vec![
            "staticPeers:".to_owned(),
            format!("  - publicKey: \"{}\"", BASE64.encode(&device.public)),
            format!("    allowedIPs: [\"{address}/32\"]"),
            format!("    presharedKeyFile: {}", psk_file.display()),
        ];
        if starter == Starter::Agent {
            peer.push(endpoint);
            peer.push("    keepalive: 5s".to_owned());
        }
        node.config.more_mesh = peer;
        Self { node, device, psk, address, starter }
    }

    /// Starts the agent, tells the device about it and has the first packet answered.
    fn start(&mut self) {
        self.node.write_config().unwrap();
        self.node.start().unwrap();
        let status = wait::until("an overlay address", SOON, || {
            let status = self.node.status()?;
            Ok((status.node.overlay_v4.is_some() && status.node.state == "running").then_some(status))
        });
        let (status, _) = self.node.explain(status).unwrap();
        let overlay = status.node.overlay_v4.unwrap();
        self.node.overlay = Some((overlay, status.node.overlay_v6.unwrap()));
        let json = self.node.status_json().unwrap();
        let key = BASE64.decode(json["node"]["public_key"].as_str().unwrap().as_bytes()).unwrap();
        let endpoint = SocketAddr::new(self.node.address, self.node.config.listen_port);
        let speaks_first = self.starter == Starter::Device;
        let peer = Peer {
            preshared_key: Some(self.psk),
            endpoint: speaks_first.then_some(endpoint),
            keepalive: speaks_first.then_some(5),
            ..Peer::new(key.try_into().unwrap(), IpAddr::from(overlay).into())
        };
        self.device.know(&peer).unwrap();
        self.device
            .host
            .add_route(
                netns_tests::link::MAIN_TABLE,
                ipnet::IpNet::new(overlay.into(), 32).unwrap(),
                &netns_tests::link::To::Link(self.device.name.clone()),
            )
            .unwrap();
        let (from, to) = match self.starter {
            Starter::Agent => (&self.node.host, self.address),
            Starter::Device => (&self.device.host, overlay.into()),
        };
        self.node.explain(first_reply(from, to, b"first", EVERY, SOON)).unwrap();
    }

    /// Data both ways all the time, until some time after the rekey.
    fn carry_without_pause(&self, start: Instant) {
        let first = self.device.last_handshake().unwrap();
        let streams = self.streams();
        let rekeyed = self.wait_rekeyed(first, start);
        wait::until_true("data after the rekey", AFTER_REKEY * 2, || Ok(rekeyed.elapsed() >= AFTER_REKEY)).unwrap();
        for (way, stream) in streams {
            judge("without a pause", way, &stream.stop().unwrap());
        }
    }

    /// Bursts both ways with pauses between, until some time after the rekey.
    fn carry_in_bursts(&self, start: Instant) {
        let first = self.device.last_handshake().unwrap();
        let mut rekeyed: Option<Instant> = None;
        for round in 0.. {
            let streams = self.streams();
            let burst = Instant::now();
            wait::until_true("the end of the burst", SOON, || Ok(burst.elapsed() >= BURST)).unwrap();
            for (way, stream) in streams {
                judge(&format!("burst {round}"), way, &stream.stop().unwrap());
            }
            if self.device.last_handshake().unwrap() > first {
                let at = *rekeyed.get_or_insert_with(Instant::now);
                if at.elapsed() >= AFTER_REKEY {
                    return;
                }
            }
            assert!(
                rekeyed.is_some() || start.elapsed() < REKEY_WITHIN,
                "no rekey of the pair with bursts in {REKEY_WITHIN:?}"
            );
            let pause = Instant::now();
            // A pause across the time of the rekey would let the session run out instead.
            let length = PAUSES[round % PAUSES.len()];
            wait::until_true("the end of the pause", length * 2, || Ok(pause.elapsed() >= length)).unwrap();
        }
    }

    fn streams(&self) -> [(&'static str, UdpStream); 2] {
        let (node, device) = (&self.node.host, &self.device.host);
        let overlay = self.node.overlay_v4().unwrap();
        let payload = vec![0x5a; 900];
        [
            ("to the device", UdpStream::start(node, device, self.address, PER_SECOND, &payload).unwrap()),
            ("to the node", UdpStream::start(device, node, overlay, PER_SECOND, &payload).unwrap()),
        ]
    }

    fn wait_rekeyed(&self, first: u64, start: Instant) -> Instant {
        let left = REKEY_WITHIN.saturating_sub(start.elapsed());
        let rekeyed = wait::until_true("the rekey", left, || Ok(self.device.last_handshake()? > first));
        self.node.explain(rekeyed).unwrap();
        Instant::now()
    }
}

fn judge(when: &str, way: &str, totals: &UdpTotals) {
    assert_eq!((totals.lost, totals.corrupt, totals.refused), (0, 0, 0), "{when}, {way}: {totals:?}");
    assert!(
        totals.longest_gap <= Duration::from_secs(1) + totals.longest_pause,
        "{when}, {way}: nothing arrived for {:?} while data was sent: {totals:?}",
        totals.longest_gap
    );
}

fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

fn installed(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}
