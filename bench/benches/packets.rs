//! What a packet costs in user space without its I/O: the lookup of its peer, the seal, the opening.
//!
//! `seal` and `open` together are what the throughput of a tunnel is measured against.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use ipnet::IpNet;
use mesh_bench::cipher::{BUFFER, NOW, SOURCE, connect, connected, packet, pair};
use mesh_bench::member::Member;
use mesh_common::allowed_ips::AllowedIps;
use mesh_proto::random::SplitMix64;
use mesh_proto::wg::{MIN_BUFFER, OVERHEAD, Opened, Sealed, Tunnel};

/// Inner packets: an acknowledgement, a middle one, the largest the link takes.
const LENGTHS: [u16; 3] = [64, 512, 1420];

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
