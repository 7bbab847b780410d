//! Joins packets of a batch into super-packets: runs of TCP segments or UDP datagrams of one flow, equal in everything but
//! what must differ.
//!
//! Invariants:
//! - Cutting what was joined gives the packets that came, in their order within each flow.
//! - A packet joins only if its checksum is right, and so is that of the one it joins: after that nobody checks again.
//! - What is not plain (options of IP, fragments, flags other than ACK and PSH, no payload) is left as it came, and nothing
//!   of its flow that comes later overtakes it.

use std::ops::Range;

use super::MAX_PACKET;
use super::checksum::Sum;
use super::headers::{Ip, TCP, TCP_HEADER, UDP, UDP_HEADER, V4_HEADER, V6_HEADER, set_len, u16_at, u32_at};
use super::vnet::{Gso, VnetHeader};

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const ECE: u8 = 0x40;

/// Packets in one super-packet. Linux takes no more datagrams in one.
pub const MAX_SEGMENTS: usize = 64;
/// Flows that can grow at once; a power of two. More only join less.
const FLOWS: usize = 64;

/// What the receiver of super-packets understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepts {
    pub tcp: bool,
    pub udp: bool,
}

/// Joins the packets of one batch; reused from batch to batch. Packets are named by where they lie in the caller's block,
/// which must be the same in all calls of one batch.
#[derive(Debug)]
pub struct Coalescer {
    groups: Vec<Group>,
    parts: Vec<Part>,
    /// By a hash of the flow: the group that holds its newest packet, if that may grow.
    open: [Option<u32>; FLOWS],
}

/// A packet to hand over, perhaps of many.
#[derive(Debug, Clone)]
struct Group {
    first: Range<usize>,
    /// Headers and transport; `None` = as it came.
    flow: Option<Flow>,
    segments: usize,
    /// Of the whole.
    len: usize,
    is_verified: bool,
    is_closed: bool,
    /// Positions in `parts`.
    last_part: Option<u32>,
    first_part: Option<u32>,
}

/// The payload of a packet that joined, and the next one's position.
#[derive(Debug, Clone)]
struct Part {
    payload: Range<usize>,
    next: Option<u32>,
}

/// A packet that can join or be joined.
#[derive(Debug, Clone, Copy)]
struct Flow {
    ip: Ip,
    header_len: usize,
    payload: usize,
    /// Of TCP; of the packet itself.
    sequence: u32,
    has_push: bool,
}

impl Default for Coalescer {
    fn default() -> Self {
        Self { groups: Vec::with_capacity(MAX_SEGMENTS), parts: Vec::with_capacity(MAX_SEGMENTS), open: [None; FLOWS] }
    }
}

impl Coalescer {
    /// Begins a new batch.
    pub fn clear(&mut self) {
        self.groups.clear();
        self.parts.clear();
        self.open = [None; FLOWS];
    }

    /// Adds the next packet of the batch: `packet` of `block`.
    #[inline]
    pub fn add(&mut self, block: &[u8], packet: Range<usize>, accepts: Accepts) {
        let bytes = &block[packet.clone()];
        let Some(ip) = Ip::parse(bytes) else { return self.pass(packet) };
        if ip.is_fragment || !matches!(ip.protocol, TCP | UDP) {
            if ip.is_fragment {
                // Of which flow it is only its first fragment says.
                self.open = [None; FLOWS];
            }
            return self.pass(packet);
        }
        let Some(slot) = slot(&ip, bytes) else { return self.pass(packet) };
        let Some(flow) = Flow::parse(ip, bytes, accepts) else {
            self.open[slot] = None;
            return self.pass(packet);
        };
        if let Some(at) = self.open[slot]
            && self.join(at as usize, block, packet.clone(), &flow)
        {
            return;
        }
        self.open[slot] = (!flow.has_push).then_some(self.groups.len() as u32);
        let len = packet.len();
        self.groups.push(Group {
            first: packet,
            flow: Some(flow),
            segments: 1,
            len,
            is_verified: false,
            is_closed: false,
            first_part: None,
            last_part: None,
        });
    }

    /// Writes the headers of super-packets. The batch is complete.
    pub fn finish(&mut self, block: &mut [u8]) {
        for group in &mut self.groups {
            if group.segments > 1
                && let Some(flow) = &group.flow
            {
                flow.write_header(&mut block[group.first.clone()], group.len);
            }
        }
    }

    /// How many packets there are to hand over.
    pub fn len(&self) -> usize {
        self.groups.len()
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The packets to hand over, in order: the description, how many came in it, and its bytes in parts.
    pub fn iter<'a>(
        &'a self,
        block: &'a [u8],
    ) -> impl Iterator<Item = (VnetHeader, usize, impl Iterator<Item = &'a [u8]> + 'a)> + 'a {
        self.groups.iter().map(move |group| {
            let mut next = group.first_part;
            let parts = std::iter::from_fn(move || {
                let part = &self.parts[next? as usize];
                next = part.next;
                Some(&block[part.payload.clone()])
            });
            let header = match &group.flow {
                Some(flow) if group.segments > 1 => flow.describe(),
                _ => VnetHeader::default(),
            };
            (header, group.segments, std::iter::once(&block[group.first.clone()]).chain(parts))
        })
    }

    fn pass(&mut self, packet: Range<usize>) {
        let len = packet.len();
        self.groups.push(Group {
            first: packet,
            flow: None,
            segments: 1,
            len,
            is_verified: false,
            is_closed: true,
            first_part: None,
            last_part: None,
        });
    }

    /// Adds a packet to an open group if it continues it.
    #[inline]
    fn join(&mut self, at: usize, block: &[u8], packet: Range<usize>, flow: &Flow) -> bool {
        let group = &mut self.groups[at];
        let Some(head) = &mut group.flow else { return false };
        let (head_bytes, bytes) = (&block[group.first.clone()], &block[packet.clone()]);
        let fits = !group.is_closed
            && group.segments < MAX_SEGMENTS
            && flow.payload <= head.payload
            && group.len + flow.payload <= MAX_PACKET
            && head.continues(head_bytes, group.segments, flow, bytes);
        if !fits || !flow.is_intact(bytes) || !(group.is_verified || head.is_intact(head_bytes)) {
            return false;
        }
        group.is_verified = true;
        head.has_push |= flow.has_push;
        group.is_closed = flow.has_push || flow.payload < head.payload;
        group.segments += 1;
        group.len += flow.payload;
        let part = self.parts.len() as u32;
        self.parts.push(Part { payload: packet.start + flow.header_len..packet.end, next: None });
        match group.last_part.replace(part) {
            Some(last) => self.parts[last as usize].next = Some(part),
            None => group.first_part = Some(part),
        }
        true
    }
}

/// Where the flow of a TCP or UDP packet stands in the table; `None` when it has no ports.
#[inline]
fn slot(ip: &Ip, packet: &[u8]) -> Option<usize> {
    let ports = packet.get(ip.transport..ip.transport + 4)?;
    // The last words of both addresses; what they collide with only joins less.
    let (source, destination) = if ip.is_v4 { (12, 16) } else { (20, 36) };
    let word = u32_at(ports, 0) ^ u32_at(packet, source).rotate_left(7) ^ u32_at(packet, destination).rotate_left(17);
    Some((word.wrapping_mul(0x9e37_79b1) >> 26) as usize & (FLOWS - 1))
}

impl Flow {
    /// `None` unless it is as plain as what a super-packet is made of.
    #[inline]
    fn parse(ip: Ip, packet: &[u8], accepts: Accepts) -> Option<Self> {
        let plain = if ip.is_v4 { V4_HEADER } else { V6_HEADER };
        if ip.transport != plain || ip.len != packet.len() {
            return None;
        }
        let transport = &packet[ip.transport..];
        let flow = if ip.protocol == TCP {
            let header: &[u8; TCP_HEADER] = transport.first_chunk()?;
            let (header_len, flags) = (usize::from(header[12] >> 4) * 4, header[13]);
            if !accepts.tcp || header_len < TCP_HEADER || flags & !(PSH | ECE) != ACK || header[12] & 0xf != 0 {
                return None;
            }
            Self {
                ip,
                header_len: ip.transport + header_len,
                payload: transport.len().checked_sub(header_len)?,
                sequence: u32_at(header, 4),
                has_push: flags & PSH != 0,
            }
        } else {
            let header: &[u8; UDP_HEADER] = transport.first_chunk()?;
            let is_whole = usize::from(u16_at(header, 4)) == transport.len();
            // Without a checksum there is nothing to verify.
            if !accepts.udp || !is_whole || header[6..8] == [0, 0] {
                return None;
            }
            let payload = transport.len() - UDP_HEADER;
            Self { ip, header_len: ip.transport + UDP_HEADER, payload, sequence: 0, has_push: false }
        };
        (flow.payload > 0).then_some(flow)
    }

    /// Whether `next` is what a cut after `segments` segments of this packet would give, but for its length and PSH.
    #[inline]
    fn continues(&self, head: &[u8], segments: usize, next: &Self, packet: &[u8]) -> bool {
        if self.header_len != next.header_len || self.ip.is_v4 != next.ip.is_v4 {
            return false;
        }
        let same = |range: Range<usize>| head[range.clone()] == packet[range];
        let is_same_ip = if self.ip.is_v4 {
            // An identification says nothing where nobody may fragment (RFC 6864).
            let may_fragment = head[6] & 0x40 == 0;
            let id = u16_at(head, 4).wrapping_add(segments as u16);
            same(0..2) && same(6..10) && same(12..20) && (!may_fragment || u16_at(packet, 4) == id)
        } else {
            same(0..4) && same(6..40)
        };
        let at = self.ip.transport;
        let is_same_transport = if self.ip.protocol == TCP {
            let sequence = self.sequence.wrapping_add((segments * self.payload) as u32);
            // Ports, acknowledgement, flags but PSH, window, options.
            next.sequence == sequence
                && same(at..at + 4)
                && same(at + 8..at + 13)
                && (head[at + 13] ^ packet[at + 13]) & !PSH == 0
                && same(at + 14..at + 16)
                && same(at + 18..self.header_len)
        } else {
            same(at..at + 4)
        };
        is_same_ip && is_same_transport
    }

    /// Whether the checksums are right.
    #[inline]
    fn is_intact(&self, packet: &[u8]) -> bool {
        let transport = &packet[self.ip.transport..];
        let sum = self.ip.pseudo(packet).plus_u16(transport.len() as u16).plus(transport);
        let header = !self.ip.is_v4 || Sum::default().plus(&packet[..V4_HEADER]).finish() == [0, 0];
        sum.finish() == [0, 0] && header
    }

    /// Makes the packet's header that of a super-packet of `len` bytes.
    fn write_header(&self, first: &mut [u8], len: usize) {
        set_len(first, &self.ip, len);
        let transport_len = (len - self.ip.transport) as u16;
        let partial = self.ip.pseudo(first).plus_u16(transport_len).partial();
        let transport = &mut first[self.ip.transport..];
        if self.ip.protocol == TCP {
            transport[13] |= if self.has_push { PSH } else { 0 };
            transport[16..18].copy_from_slice(&partial);
        } else {
            transport[4..6].copy_from_slice(&transport_len.to_be_bytes());
            transport[6..8].copy_from_slice(&partial);
        }
    }

    fn describe(&self) -> VnetHeader {
        let gso = match (self.ip.protocol, self.ip.is_v4) {
            (TCP, true) => Gso::TcpV4,
            (TCP, false) => Gso::TcpV6,
            _ => Gso::Udp,
        };
        VnetHeader {
            needs_checksum: true,
            gso,
            header_len: self.header_len as u16,
            segment: self.payload as u16,
            checksum_start: self.ip.transport as u16,
            checksum_offset: if self.ip.protocol == TCP { 16 } else { 6 },
        }
    }
}
