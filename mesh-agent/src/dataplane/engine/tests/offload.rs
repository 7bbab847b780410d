//! Super-packets through two engines: what one host hands over whole, the other gets whole.

use mesh_proto::offload::VnetHeader;
use mesh_proto::offload::checksum::Sum;
use mesh_proto::offload::vnet::Gso;

use super::*;
use crate::dataplane::memory::link_with;
use crate::dataplane::offloads::DeviceOffloads;

const ALL: DeviceOffloads = DeviceOffloads { tcp: true, udp: true };
const HEADERS: usize = 40;

fn nodes(net: &MemoryNet, at_receiver: DeviceOffloads) -> [Node; 2] {
    let sender = Node::start_with(net, 1, link_with(ALL, 1));
    introduce([sender, Node::start_with(net, 2, link_with(at_receiver, 1))])
}

/// What the first node's host hands over: TCP with `payload`, to be cut at `segment`.
fn super_packet(payload: &[u8], segment: u16) -> (VnetHeader, Vec<u8>) {
    let len = HEADERS + payload.len();
    let mut packet = packet("10.0.0.1", "10.0.0.2", 0, len);
    packet[8] = 64;
    packet[9] = 6;
    let header_sum = Sum::default().plus(&packet[..20]).finish();
    packet[10..12].copy_from_slice(&header_sum);
    packet[20..24].copy_from_slice(&[0x10, 0, 0x20, 0]);
    packet[32] = 0x50;
    packet[33] = 0x10;
    let partial = Sum::default().plus(&packet[12..20]).plus_u16(6).plus_u16(len as u16 - 20).partial();
    packet[36..38].copy_from_slice(&partial);
    packet[HEADERS..].copy_from_slice(payload);
    let header = VnetHeader {
        needs_checksum: true,
        gso: Gso::TcpV4,
        header_len: HEADERS as u16,
        segment,
        checksum_start: 20,
        checksum_offset: 16,
    };
    (header, packet)
}

fn payload() -> Vec<u8> {
    (0..40_000u32).map(|n| (n / 7) as u8).collect()
}

/// What the second node's host gets until all payload is there.
fn receive_all(nodes: &mut [Node; 2], len: usize) -> Vec<(VnetHeader, Vec<u8>)> {
    let mut all: Vec<(VnetHeader, Vec<u8>)> = Vec::new();
    until(nodes, "all payload", |nodes| {
        all.extend(nodes[1].host.receive_described());
        all.iter().map(|(_, packet)| packet.len() - HEADERS).sum::<usize>() >= len
    });
    all
}

#[test]
fn a_super_packet_arrives_as_one_where_the_host_takes_it() {
    let net = MemoryNet::default();
    let mut nodes = nodes(&net, ALL);
    connect(&mut nodes);
    let (header, packet) = super_packet(&payload(), 1380);
    nodes[0].host.send_described(header, &packet);
    let got = receive_all(&mut nodes, payload().len());
    let bytes: Vec<u8> = got.iter().flat_map(|(_, packet)| packet[HEADERS..].to_vec()).collect();
    assert_eq!(bytes, payload());
    assert!(got.len() < 29 && got.iter().any(|(header, _)| header.gso == Gso::TcpV4), "{} packets", got.len());
    let counters = nodes[1].engine.counters(&nodes[0].key);
    assert_eq!(counters.rx_packets, 1 + 29, "as many as were on the wire");
}

#[test]
fn a_super_packet_arrives_in_pieces_where_the_host_takes_none() {
    let net = MemoryNet::default();
    let mut nodes = nodes(&net, DeviceOffloads::default());
    connect(&mut nodes);
    let (header, packet) = super_packet(&payload(), 1380);
    nodes[0].host.send_described(header, &packet);
    let got = receive_all(&mut nodes, payload().len());
    assert_eq!(got.len(), 29);
    for (header, packet) in &got {
        assert_eq!(*header, VnetHeader::default());
        let sum =
            Sum::default().plus(&packet[12..20]).plus_u16(6).plus_u16(packet.len() as u16 - 20).plus(&packet[20..]);
        assert_eq!(sum.finish(), [0, 0], "a right checksum");
    }
}

#[test]
fn a_super_packet_that_its_description_does_not_fit_costs_a_counter() {
    let net = MemoryNet::default();
    let mut nodes = nodes(&net, ALL);
    connect(&mut nodes);
    let (header, bytes) = super_packet(&payload(), 1380);
    for bad in [
        VnetHeader { segment: 0, ..header },
        VnetHeader { gso: Gso::Unknown(3), ..header },
        VnetHeader { gso: Gso::TcpV6, ..header },
        VnetHeader { gso: Gso::None, checksum_start: 0xffff, ..header },
    ] {
        nodes[0].host.send_described(bad, &bytes);
    }
    until(&mut nodes, "all are counted", |nodes| nodes[0].dropped("out_malformed") == 4);
    let honest = packet("10.0.0.1", "10.0.0.2", 3, 90);
    nodes[0].host.send(&honest);
    expect_packet(&mut nodes, 1, &honest, "others pass");
}

#[test]
fn congestion_that_the_underlay_met_is_told_to_the_inner_packet() {
    use crate::dataplane::{Arrival, Ecn};

    let net = MemoryNet::default();
    let mut nodes = pair(&net);
    connect(&mut nodes);
    let tap = net.socket(nodes[1].endpoint);
    let mut capable = packet("10.0.0.1", "10.0.0.2", 1, 60);
    capable[1] = 2;
    nodes[0].host.send(&capable);
    let mut tapped = None;
    until(&mut nodes, "a datagram", |_| {
        tapped = tap.next();
        tapped.is_some()
    });
    let (source, datagram) = tapped.unwrap();
    let arrival = Arrival { ecn: Ecn::Met, ..source.into() };
    nodes[1].engine.shared.sender().deliver_marked(arrival, &datagram);
    let mut marked = capable;
    marked[1] = 3;
    expect_packet(&mut nodes, 1, &marked, "marked");
}
