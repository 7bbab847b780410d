//! What a packet costs in user space without its I/O: the lookup of its peer, the seal, the opening.
//!
//! `seal` and `open` together are what the throughput of a tunnel is measured against.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use ipnet::IpNet;
use mesh_agent::dataplane::{BoringTunnel, BoringTunnels, TunnelFactory};
use mesh_bench::member::Member;
use mesh_common::allowed_ips::AllowedIps;
use mesh_common::key::{PresharedKey, WgSecret};
use mesh_common::time::Instant;
use mesh_proto::device::PeerSpec;
use mesh_proto::random::SplitMix64;
use mesh_proto::wg::{MIN_BUFFER, OVERHEAD, Opened, Sealed, Tunnel};

const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const NOW: Instant = Instant::ORIGIN;
/// Inner packets: an acknowledgement, a middle one, the largest the link takes.
const LENGTHS: [u16; 3] = [64, 512, 1420];
const BUFFER: usize = 2048;

fn main() {
    divan::main();
}

/// 1000 peers with four prefixes each; the addresses come in no order.
#[divan::bench(args = ["v4", "v6", "miss"])]
fn allowed_ips(bencher: Bencher<'_, '_>, kind: &str) {
    let members: Vec<_> = (1..=1000).map(Member::numbered).collect();
    let entries = members.iter().enumerate().flat_map(|(peer, member)| member.routed().map(|prefix| (prefix, peer)));
    let table: AllowedIps<usize> = entries.collect();
    let mut random = SplitMix64::new(1);
    let mut address = || {
        let host = 1 + random.below(200);
        let member = &members[random.below(1000) as usize];
        match (kind, member.routed()) {
            ("v4", [_, _, IpNet::V4(pods), _]) => Ipv4Addr::from(u32::from(pods.network()) + host as u32).into(),
            ("v6", [_, _, _, IpNet::V6(pods)]) => Ipv6Addr::from(u128::from(pods.network()) + u128::from(host)).into(),
            _ => IpAddr::from(Ipv4Addr::new(172, 16, 0, host as u8)),
        }
    };
    let addresses: Vec<IpAddr> = (0..4096).map(|_| address()).collect();
    assert!(addresses.iter().all(|addr| table.lookup(*addr).is_some() == (kind != "miss")));
    let mut next = addresses.iter().cycle();
    bencher.bench_local(|| next.next().and_then(|addr| table.lookup(black_box(*addr))));
}

#[divan::bench(args = LENGTHS)]
fn seal(bencher: Bencher<'_, '_>, len: u16) {
    let (mut sender, _) = connected();
    let (packet, mut buffer) = (packet(len), [0; BUFFER]);
    bencher.counter(BytesCount::new(len)).bench_local(|| {
        let sealed = sender.seal(black_box(&packet), &mut buffer, NOW);
        assert!(matches!(sealed, Sealed::Data(_)));
    });
}

#[divan::bench(args = LENGTHS)]
fn open(bencher: Bencher<'_, '_>, len: u16) {
    let (mut sender, mut receiver) = connected();
    let (packet, mut buffer) = (packet(len), [0; BUFFER]);
    let datagram = || {
        let mut datagram = vec![0; (packet.len() + OVERHEAD).max(MIN_BUFFER)];
        let Sealed::Data(sealed) = sender.seal(&packet, &mut datagram, NOW) else { panic!("the session is up") };
        let len = sealed.len();
        datagram.truncate(len);
        datagram
    };
    bencher.counter(BytesCount::new(len)).with_inputs(datagram).bench_local_refs(|datagram| {
        let opened = receiver.open(datagram, SOURCE, &mut buffer, NOW);
        assert!(matches!(opened, Opened::Packet(_)));
    });
}

/// Both sides of one handshake; control pays this once in two minutes and peer.
#[divan::bench]
fn handshake(bencher: Bencher<'_, '_>) {
    bencher.with_inputs(pair).bench_local_values(|(a, b)| connect(a, b));
}

fn connected() -> (BoringTunnel, BoringTunnel) {
    let (a, b) = pair();
    connect(a, b)
}

/// Two ends of a tunnel that have not spoken.
fn pair() -> (BoringTunnel, BoringTunnel) {
    let [a, b] = [1, 2].map(|n| WgSecret::from_seed(&[n; 32]));
    let spec = PeerSpec {
        preshared_key: Some(PresharedKey([3; 32])),
        allowed_ips: Default::default(),
        keepalive: None,
        generation: 0,
    };
    let one = BoringTunnels::new(&a).make(&b.public(), &spec, 1, NOW);
    let other = BoringTunnels::new(&b).make(&a.public(), &spec, 2, NOW);
    (one, other)
}

fn connect(mut a: BoringTunnel, mut b: BoringTunnel) -> (BoringTunnel, BoringTunnel) {
    let (mut at_a, mut at_b) = ([0; BUFFER], [0; BUFFER]);
    let initiation = a.start_handshake(&mut at_a, NOW).expect("a new tunnel can start a handshake");
    let Opened::Reply(response) = b.open(initiation, SOURCE, &mut at_b, NOW) else { panic!("no response") };
    let Opened::Established(Some(confirm)) = a.open(response, SOURCE, &mut at_a, NOW) else { panic!("no session") };
    assert_eq!(b.open(confirm, SOURCE, &mut at_b, NOW), Opened::Keepalive);
    (a, b)
}

/// An IPv4 packet of this length.
fn packet(len: u16) -> Vec<u8> {
    let mut packet = vec![0; usize::from(len)];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet
}
