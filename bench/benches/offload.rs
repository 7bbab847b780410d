//! What cutting and joining of packets costs in user space: once the work of a network card, now ours for every byte.

use std::ops::Range;

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use mesh_proto::offload::coalesce::{Accepts, MAX_SEGMENTS};
use mesh_proto::offload::vnet::Gso;
use mesh_proto::offload::{Coalescer, Cut, VnetHeader, cut};

const ALL: Accepts = Accepts { tcp: true, udp: true };
const IP_HEADER: usize = 20;
/// Bytes of payload in one segment: little, and what the link takes.
const SEGMENTS: [u16; 2] = [512, 1380];

#[derive(Debug, Clone, Copy)]
enum Kind {
    Tcp,
    Udp,
}

const KINDS: [(Kind, u16); 4] =
    [(Kind::Tcp, SEGMENTS[0]), (Kind::Tcp, SEGMENTS[1]), (Kind::Udp, SEGMENTS[0]), (Kind::Udp, SEGMENTS[1])];

fn main() {
    divan::main();
}

#[divan::bench(args = KINDS)]
fn cut_super_packet(bencher: Bencher<'_, '_>, (kind, segment): (Kind, u16)) {
    let (header, packet) = super_packet(kind, segment);
    bencher
        .counter(BytesCount::new(packet.len()))
        .with_inputs(|| packet.clone())
        .bench_local_refs(|packet| segments(header, black_box(packet), |_, _| ()));
}

/// A batch of one flow, which joins to one packet.
#[divan::bench(args = KINDS)]
fn coalesce_one_flow(bencher: Bencher<'_, '_>, (kind, segment): (Kind, u16)) {
    let (block, packets) = batch(kind, segment);
    let mut coalescer = Coalescer::default();
    join(&mut coalescer, &mut block.clone(), &packets);
    assert_eq!(coalescer.len(), 1, "all of it joins");
    bencher
        .counter(BytesCount::new(block.len()))
        .with_inputs(|| block.clone())
        .bench_local_refs(|block| join(&mut coalescer, black_box(block), &packets));
}

/// The dear case: every packet is looked at and none joins, since each is one of another flow than the one before.
#[divan::bench(args = SEGMENTS)]
fn coalesce_strangers(bencher: Bencher<'_, '_>, segment: u16) {
    let (mut block, packets) = batch(Kind::Tcp, segment);
    for (port, packet) in (1_u16..).zip(&packets) {
        let source = packet.start + IP_HEADER;
        block[source..source + 2].copy_from_slice(&port.to_be_bytes());
    }
    let mut coalescer = Coalescer::default();
    join(&mut coalescer, &mut block.clone(), &packets);
    assert_eq!(coalescer.len(), packets.len(), "nothing joins");
    bencher
        .counter(BytesCount::new(block.len()))
        .with_inputs(|| block.clone())
        .bench_local_refs(|block| join(&mut coalescer, black_box(block), &packets));
}

fn join(coalescer: &mut Coalescer, block: &mut [u8], packets: &[Range<usize>]) {
    coalescer.clear();
    packets.iter().for_each(|packet| coalescer.add(block, packet.clone(), ALL));
    coalescer.finish(block);
}

/// The packets of a super-packet one behind the other, as they come out of a batch of datagrams.
fn batch(kind: Kind, segment: u16) -> (Vec<u8>, Vec<Range<usize>>) {
    let (header, mut packet) = super_packet(kind, segment);
    let (mut block, mut packets) = (Vec::new(), Vec::new());
    segments(header, &mut packet, |packet, at| {
        packets.push(block.len()..block.len() + at.len());
        block.extend_from_slice(&packet[at]);
    });
    (block, packets)
}

fn segments(header: VnetHeader, packet: &mut [u8], mut each: impl FnMut(&[u8], Range<usize>)) {
    let Ok(Cut::Segments(mut segments)) = cut::cut(header, packet) else { panic!("the super-packet is a good one") };
    while let Some(at) = segments.next(packet) {
        each(packet, at);
    }
}

/// As many segments as fit, up to what the kernel joins.
fn super_packet(kind: Kind, segment: u16) -> (VnetHeader, Vec<u8>) {
    let (gso, protocol, transport, checksum_offset) = match kind {
        Kind::Tcp => (Gso::TcpV4, 6, 20, 16),
        Kind::Udp => (Gso::Udp, 17, 8, 6),
    };
    let header_len = IP_HEADER + transport;
    let most = (usize::from(u16::MAX) - header_len) / usize::from(segment);
    let len = header_len + most.min(MAX_SEGMENTS) * usize::from(segment);
    let total = u16::try_from(len).expect("it was made to fit");
    let mut packet = vec![0x5a; len];
    packet[..IP_HEADER].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    let header = &mut packet[IP_HEADER..header_len];
    header.fill(0);
    header[..4].copy_from_slice(&[0x1f, 0x90, 0x1f, 0x91]);
    match kind {
        // A header of five words, and nothing but ACK set.
        Kind::Tcp => header[12..14].copy_from_slice(&[0x50, 0x10]),
        Kind::Udp => header[4..6].copy_from_slice(&(total - IP_HEADER as u16).to_be_bytes()),
    }
    let header = VnetHeader {
        needs_checksum: true,
        gso,
        header_len: header_len as u16,
        segment,
        checksum_start: IP_HEADER as u16,
        checksum_offset,
    };
    (header, packet)
}
