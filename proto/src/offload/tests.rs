//! Cut and coalesce against a reference that builds every packet anew, field by field.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::coalesce::Accepts;
use super::vnet::Gso;
use super::*;

const ALL: Accepts = Accepts { tcp: true, udp: true };

/// A flow, as the reference makes packets of it.
#[derive(Debug, Clone)]
struct Flow {
    is_v4: bool,
    is_tcp: bool,
    hosts: [u8; 2],
    ports: [u16; 2],
    class: u8,
    ttl: u8,
    dont_fragment: bool,
    /// Of TCP, a multiple of four bytes.
    options: Vec<u8>,
    acknowledged: u32,
    window: u16,
    flags: u8,
    /// Options of IPv4 or extension headers of IPv6, a multiple of eight bytes.
    extra: Vec<u8>,
}

impl Flow {
    fn packet(&self, id: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut transport: Vec<u8> = self.ports.iter().flat_map(|port| port.to_be_bytes()).collect();
        if self.is_tcp {
            transport.extend(sequence.to_be_bytes());
            transport.extend(self.acknowledged.to_be_bytes());
            transport.extend([(5 + self.options.len() as u8 / 4) << 4, flags]);
            transport.extend(self.window.to_be_bytes());
            transport.extend([0; 4]);
            transport.extend(&self.options);
        } else {
            transport.extend((8 + payload.len() as u16).to_be_bytes());
            transport.extend([0; 2]);
        }
        transport.extend(payload);
        let protocol = if self.is_tcp { 6 } else { 17 };
        let addresses = self.addresses();
        let mut pseudo = addresses.clone();
        pseudo.extend((transport.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        pseudo.extend(&transport);
        let at = if self.is_tcp { 16 } else { 6 };
        let checksum = match naive_checksum(&pseudo) {
            0 if !self.is_tcp => 0xffff,
            checksum => checksum,
        };
        transport[at..at + 2].copy_from_slice(&checksum.to_be_bytes());

        let mut packet = Vec::new();
        if self.is_v4 {
            let header_len = 20 + self.extra.len();
            packet.extend([0x40 | (header_len / 4) as u8, self.class]);
            packet.extend(((header_len + transport.len()) as u16).to_be_bytes());
            packet.extend(id.to_be_bytes());
            packet.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, protocol, 0, 0]);
            packet.extend(&addresses);
            packet.extend(&self.extra);
            let checksum = naive_checksum(&packet);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        } else {
            packet.extend([0x60 | self.class >> 4, self.class << 4, 0, 7]);
            packet.extend(((self.extra.len() + transport.len()) as u16).to_be_bytes());
            packet.extend([if self.extra.is_empty() { protocol } else { 60 }, self.ttl]);
            packet.extend(&addresses);
            packet.extend(&self.extra);
        }
        packet.extend(transport);
        packet
    }

    fn addresses(&self) -> Vec<u8> {
        let host = |n: u8| if self.is_v4 { vec![10, 0, 0, n] } else { [vec![0xfd], vec![n; 15]].concat() };
        [host(self.hosts[0]), host(self.hosts[1])].concat()
    }

    /// What the host hands over for many packets: lengths of the whole, and the checksum of the pseudo-header.
    fn super_packet(&self, id: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.packet(id, sequence, flags, payload);
        let start = self.transport();
        let at = start + if self.is_tcp { 16 } else { 6 };
        let mut pseudo = self.addresses();
        pseudo.extend(((packet.len() - start) as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, if self.is_tcp { 6 } else { 17 }]);
        let partial = !naive_checksum(&pseudo);
        packet[at..at + 2].copy_from_slice(&partial.to_be_bytes());
        packet
    }

    fn transport(&self) -> usize {
        (if self.is_v4 { 20 } else { 40 }) + self.extra.len()
    }

    fn describe(&self, segment: usize) -> VnetHeader {
        let gso = match (self.is_tcp, self.is_v4) {
            (true, true) => Gso::TcpV4,
            (true, false) => Gso::TcpV6,
            (false, _) => Gso::Udp,
        };
        VnetHeader {
            needs_checksum: true,
            gso,
            // Nobody may believe it.
            header_len: 0xfffe,
            segment: segment as u16,
            checksum_start: self.transport() as u16,
            checksum_offset: if self.is_tcp { 16 } else { 6 },
        }
    }
}

fn naive_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Flows that often differ in one thing only.
fn flow() -> impl Strategy<Value = Flow> {
    let ip = (any::<bool>(), any::<bool>(), 0u8..2, 0u8..2, prop_oneof![Just(0u8), Just(2), Just(3), any::<u8>()]);
    let tcp = (0usize..=10, 0u32..2, 0u16..2, prop_oneof![4 => Just(0x10u8), 1 => any::<u8>()]);
    let odd =
        (any::<bool>(), prop_oneof![8 => Just(64u8), 1 => any::<u8>()], prop_oneof![8 => Just(0usize), 1 => 1usize..4]);
    (ip, tcp, odd, 0u16..2).prop_map(|((is_v4, is_tcp, a, b, class), (options, ack, window, flags), odd, port)| {
        let (dont_fragment, ttl, extra) = odd;
        let extra = match (extra, is_v4) {
            (0, _) => Vec::new(),
            // No-operation options; a destination options header of padding.
            (words, true) => vec![1; words * 8],
            (words, false) => {
                let mut header = vec![0; words * 8];
                header[0] = if is_tcp { 6 } else { 17 };
                header[1] = words as u8 - 1;
                header[2] = 1;
                header[3] = (words * 8 - 4) as u8;
                header
            }
        };
        Flow {
            is_v4,
            is_tcp,
            hosts: [a, b],
            ports: [port, 443],
            class,
            ttl,
            dont_fragment,
            options: vec![7; options * 4],
            acknowledged: ack,
            window,
            flags,
            extra,
        }
    })
}

/// The packets that a super-packet stands for, by the rules of RFC 9293 and of Linux' segmentation.
fn reference_cut(flow: &Flow, id: u16, sequence: u32, flags: u8, payload: &[u8], segment: usize) -> Vec<Vec<u8>> {
    let pieces: Vec<&[u8]> = if payload.is_empty() { vec![payload] } else { payload.chunks(segment).collect() };
    let last = pieces.len() - 1;
    let piece = |(n, piece): (usize, &&[u8])| {
        let mut flags = flags;
        if n != last {
            flags &= !(1 | 8);
        }
        if n != 0 {
            flags &= !0x80;
        }
        flow.packet(id.wrapping_add(n as u16), sequence.wrapping_add((n * segment) as u32), flags, piece)
    };
    pieces.iter().enumerate().map(piece).collect()
}

fn cut_all(header: VnetHeader, packet: &[u8]) -> Result<Vec<Vec<u8>>, Malformed> {
    let mut packet = packet.to_vec();
    match cut::cut(header, &mut packet)? {
        Cut::Whole => Ok(vec![packet]),
        Cut::Segments(mut segments) => {
            let max_len = segments.max_len();
            let mut all = Vec::new();
            while let Some(range) = segments.next(&mut packet) {
                assert!(range.len() <= max_len);
                all.push(packet[range].to_vec());
            }
            Ok(all)
        }
    }
}

/// What the host gets of a batch: each super-packet with its description and how many packets are in it.
fn coalesce_all(packets: &[Vec<u8>], accepts: Accepts) -> Vec<(VnetHeader, usize, Vec<u8>)> {
    let mut block: Vec<u8> = packets.concat();
    let mut coalescer = Coalescer::default();
    let mut start = 0;
    for packet in packets {
        coalescer.add(&block, start..start + packet.len(), accepts);
        start += packet.len();
    }
    coalescer.finish(&mut block);
    let all: Vec<_> = coalescer
        .iter(&block)
        .map(|(header, count, parts)| (header, count, parts.collect::<Vec<_>>().concat()))
        .collect();
    assert_eq!(all.len(), coalescer.len());
    all
}

/// What makes a packet one of a flow, as an observer sees it.
fn flow_of(packet: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let ip = headers::Ip::parse(packet).unwrap();
    let addresses = if ip.is_v4 { &packet[12..20] } else { &packet[8..40] };
    let ports = packet.get(ip.transport..ip.transport + 4).unwrap_or_default();
    (addresses.to_vec(), [&[ip.protocol], ports].concat())
}

/// Nobody may fragment it, so its identification says nothing and is not kept.
fn without_idle_id(mut packet: Vec<u8>) -> Vec<u8> {
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// Addresses, protocol and ports, and the packets that have them.
type Flows = BTreeMap<(Vec<u8>, Vec<u8>), Vec<Vec<u8>>>;

fn by_flow(packets: impl IntoIterator<Item = Vec<u8>>) -> Flows {
    let mut flows = Flows::new();
    for packet in packets {
        flows.entry(flow_of(&packet)).or_default().push(without_idle_id(packet));
    }
    flows
}

proptest! {
    #[test]
    fn cut_gives_the_packets_of_the_reference(
        flow in flow(), id: u16, sequence: u32, flags: u8, len in 0usize..9000, segment in 1usize..2000,
    ) {
        let payload: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
        let expected = reference_cut(&flow, id, sequence, flags, &payload, segment);
        let packet = flow.super_packet(id, sequence, flags, &payload);
        prop_assert_eq!(cut_all(flow.describe(segment), &packet), Ok(expected));
        let whole = VnetHeader { gso: Gso::None, ..flow.describe(0) };
        let one = cut_all(whole, &packet).unwrap();
        // 0 and all ones are the same sum; the kernel writes the latter.
        let intact = flow.packet(id, sequence, flags, &payload);
        let at = flow.transport() + if flow.is_tcp { 16 } else { 6 };
        prop_assert!(one[0] == intact || intact[at..at + 2] == [0, 0] && one[0][at..at + 2] == [0xff, 0xff]);
    }

    /// Runs of several flows, mixed; some packets are damaged, some out of order.
    #[test]
    fn what_is_joined_cuts_into_what_came_in_the_order_of_each_flow(
        runs in proptest::collection::vec((flow(), any::<u16>(), any::<u32>(), 1usize..12, 1usize..400, 0usize..400), 1..6),
        order in proptest::collection::vec(any::<proptest::sample::Index>(), 0..60),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<proptest::sample::Index>(), any::<u8>()), 0..3),
        (tcp, udp) in any::<(bool, bool)>(),
    ) {
        let mut queues: Vec<Vec<Vec<u8>>> = runs
            .iter()
            .map(|(flow, id, sequence, count, segment, tail)| {
                let payload: Vec<u8> = (0..count * segment + tail % segment.max(&1)).map(|n| (n * 13) as u8).collect();
                reference_cut(flow, *id, *sequence, flow.flags, &payload, *segment)
            })
            .collect();
        let mut packets = Vec::new();
        for index in order {
            queues.retain(|queue| !queue.is_empty());
            if queues.is_empty() {
                break;
            }
            let at = index.index(queues.len());
            packets.push(queues[at].remove(0));
        }
        packets.extend(queues.into_iter().flatten());
        for (packet, byte, change) in damage {
            let at = packet.index(packets.len());
            let header = headers::Ip::parse(&packets[at]).unwrap().transport;
            let len = packets[at].len();
            packets[at][header + byte.index(len - header)] ^= change;
        }
        let joined = coalesce_all(&packets, Accepts { tcp, udp });
        let mut again = Vec::new();
        for (header, count, packet) in &joined {
            if *count == 1 {
                prop_assert_eq!(header, &VnetHeader::default());
            }
            let pieces = cut_all(*header, packet).unwrap();
            prop_assert_eq!(pieces.len(), *count);
            again.extend(pieces);
        }
        prop_assert_eq!(by_flow(again), by_flow(packets));
    }

    #[test]
    fn any_bytes_with_any_description_are_cut_without_panic_and_within_bounds(
        mut packet in proptest::collection::vec(any::<u8>(), 0..300),
        first in prop_oneof![Just(0x45u8), Just(0x60), Just(0x4f), any::<u8>()],
        protocol in prop_oneof![Just(6u8), Just(17), Just(60), any::<u8>()],
        header: [u8; 10],
        is_len_right: bool,
    ) {
        if let Some(byte) = packet.first_mut() {
            *byte = first;
        }
        let len = packet.len();
        if len >= 40 {
            packet[if first >> 4 == 4 { 9 } else { 6 }] = protocol;
            if is_len_right && first >> 4 == 4 {
                packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
                packet[6..8].fill(0);
            } else if is_len_right {
                packet[4..6].copy_from_slice(&(len as u16 - 40).to_be_bytes());
            }
        }
        let mut header = header;
        header[1] %= 7;
        if let Ok(pieces) = cut_all(VnetHeader::parse(&header), &packet) {
            prop_assert!(pieces.iter().all(|piece| piece.len() <= len));
        }
        let joined = coalesce_all(&[packet.clone(), packet.clone()], ALL);
        prop_assert_eq!(joined.iter().map(|(_, count, _)| count).sum::<usize>(), 2);
    }
}

fn plain() -> Flow {
    Flow {
        is_v4: true,
        is_tcp: true,
        hosts: [1, 2],
        ports: [1000, 443],
        class: 0,
        ttl: 64,
        dont_fragment: true,
        options: vec![1; 12],
        acknowledged: 7,
        window: 512,
        flags: 0x10,
        extra: Vec::new(),
    }
}

/// Packets of one flow with `lens` of payload, PSH where the sign says so.
fn train(flow: &Flow, lens: &[(usize, bool)]) -> Vec<Vec<u8>> {
    let mut sequence = 0;
    let mut packets = Vec::new();
    for (n, (len, push)) in lens.iter().enumerate() {
        let flags = flow.flags | if *push { 8 } else { 0 };
        packets.push(flow.packet(n as u16, sequence, flags, &vec![n as u8; *len]));
        sequence += *len as u32;
    }
    packets
}

fn counts(packets: &[Vec<u8>]) -> Vec<usize> {
    coalesce_all(packets, ALL).into_iter().map(|(_, count, _)| count).collect()
}

#[test]
fn a_train_joins_until_a_push_a_short_one_or_the_limit() {
    for (is_v4, is_tcp) in [(true, true), (false, true), (true, false), (false, false)] {
        let flow = Flow { is_v4, is_tcp, ..plain() };
        let full = [(1000, false); 10];
        assert_eq!(counts(&train(&flow, &full)), [10]);
        let mut short = full;
        short[4].0 = 999;
        assert_eq!(counts(&train(&flow, &short)), [5, 5]);
        assert_eq!(counts(&train(&flow, &[(1000, false); 70]))[0], 64);
        assert_eq!(counts(&train(&flow, &[(1400, false); 50]))[0], 46, "65,535 bytes are the most");
        if is_tcp {
            let mut pushed = full;
            pushed[4].1 = true;
            assert_eq!(counts(&train(&flow, &pushed)), [5, 5]);
            let mut acknowledged = full;
            acknowledged[4].0 = 0;
            assert_eq!(counts(&train(&flow, &acknowledged)), [4, 1, 5]);
        }
    }
}

#[test]
fn what_differs_does_not_join() {
    let base = plain();
    let differ: [fn(&mut Flow); 11] = [
        |flow| flow.is_v4 = false,
        |flow| flow.hosts[0] = 9,
        |flow| flow.hosts[1] = 9,
        |flow| flow.ports[0] = 9,
        |flow| flow.class = 1,
        |flow| flow.ttl = 63,
        |flow| flow.dont_fragment = false,
        |flow| flow.options[3] = 9,
        |flow| flow.options = vec![1; 8],
        |flow| flow.acknowledged = 8,
        |flow| flow.window = 513,
    ];
    for (n, differ) in differ.iter().enumerate() {
        let mut other = base.clone();
        differ(&mut other);
        let packets = [base.packet(0, 0, 0x10, &[1; 100]), other.packet(1, 100, 0x10, &[1; 100])];
        assert_eq!(counts(&packets), [1, 1], "difference {n}");
    }
    for flags in [0x11, 0x12, 0x14, 0x30, 0x50, 0x90, 0] {
        let packets = [base.packet(0, 0, 0x10, &[1; 100]), base.packet(1, 100, flags, &[1; 100])];
        assert_eq!(counts(&packets), [1, 1], "flags {flags:#x}");
    }
    let gap = [base.packet(0, 0, 0x10, &[1; 100]), base.packet(1, 101, 0x10, &[1; 100])];
    assert_eq!(counts(&gap), [1, 1]);
    for damaged in 0..2 {
        let mut packets = train(&base, &[(100, false); 2]);
        packets[damaged][60] ^= 1;
        assert_eq!(counts(&packets), [1, 1], "packet {damaged} is damaged");
    }
}

#[test]
fn a_fragment_lets_nothing_of_any_flow_pass_it() {
    let base = plain();
    let mut packets = train(&base, &[(100, false); 3]);
    let mut fragment = Flow { dont_fragment: false, ..base }.packet(9, 0, 0x10, &[1; 64]);
    fragment[6] = 0x20;
    packets.insert(1, fragment);
    assert_eq!(counts(&packets), [1, 1, 2]);
}

#[test]
fn a_super_packet_that_its_description_does_not_fit_is_refused() {
    let flow = plain();
    let packet = flow.super_packet(0, 0, 0x10, &[1; 500]);
    let good = flow.describe(100);
    assert_eq!(cut_all(good, &packet).map(|pieces| pieces.len()), Ok(5));
    for bad in [
        VnetHeader { segment: 0, ..good },
        VnetHeader { gso: Gso::TcpV6, ..good },
        VnetHeader { gso: Gso::Udp, ..good },
        VnetHeader { gso: Gso::Unknown(3), ..good },
        VnetHeader { gso: Gso::None, checksum_start: 600, ..good },
        VnetHeader { gso: Gso::None, checksum_offset: 0xffff, ..good },
    ] {
        assert_eq!(cut_all(bad, &packet), Err(Malformed), "{bad:?}");
    }
    let mut long_header = packet.clone();
    long_header[32] = 0xf0;
    assert!(cut_all(good, &long_header).is_ok(), "60 bytes of header fit");
    for cut in 0..packet.len() {
        let _refused_or_not = cut_all(good, &packet[..cut]);
    }
    let mut fragment = packet;
    fragment[6] = 0x20;
    assert_eq!(cut_all(good, &fragment), Err(Malformed));
}
