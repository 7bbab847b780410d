//! Cuts super-packets of the host into the packets that they stand for.
//!
//! Segment n of a super-packet is made where it lies: its header is written right before its payload, over the end of
//! segment n - 1, which the caller has taken by then. So each segment is one slice, and no payload is copied.

use std::ops::Range;

use super::checksum::Sum;
use super::headers::{Ip, TCP, TCP_HEADER, UDP, UDP_HEADER, set_len, u16_at, u32_at};
use super::vnet::{Gso, VnetHeader};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// What a packet from the host is.
#[derive(Debug)]
pub enum Cut {
    /// One packet, which is complete now.
    Whole,
    Segments(Segments),
}

/// The host's description of a packet does not fit the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the description does not fit the packet")]
pub struct Malformed;

/// Looks at one packet of the host and completes its checksum if that is all there is to do.
pub fn cut(header: VnetHeader, packet: &mut [u8]) -> Result<Cut, Malformed> {
    let protocol = match header.gso {
        Gso::None => {
            if header.needs_checksum {
                complete(header, packet)?;
            }
            return Ok(Cut::Whole);
        }
        Gso::TcpV4 | Gso::TcpV6 => TCP,
        Gso::Udp => UDP,
        Gso::Unknown(_) => return Err(Malformed),
    };
    let ip = Ip::parse(packet).ok_or(Malformed)?;
    let is_family = match header.gso {
        Gso::TcpV4 => ip.is_v4,
        Gso::TcpV6 => !ip.is_v4,
        _ => true,
    };
    if !is_family || ip.protocol != protocol || ip.is_fragment || header.segment == 0 || ip.len != packet.len() {
        return Err(Malformed);
    }
    Segments::new(ip, usize::from(header.segment), packet).map(Cut::Segments)
}

/// Completes the checksum of a packet that is not to be cut, whatever its protocol.
fn complete(header: VnetHeader, packet: &mut [u8]) -> Result<(), Malformed> {
    let len = Ip::parse(packet).ok_or(Malformed)?.len;
    let start = usize::from(header.checksum_start);
    let at = start + usize::from(header.checksum_offset);
    if at + 2 > len {
        return Err(Malformed);
    }
    let checksum = Sum::default().plus(&packet[start..len]).finish();
    // All ones is zero too, and in UDP a zero would mean that there is none.
    packet[at..at + 2].copy_from_slice(&if checksum == [0, 0] { [0xff, 0xff] } else { checksum });
    Ok(())
}

/// The segments of one super-packet, first to last. Every call of [`Self::next`] must be given the packet it was made for.
#[derive(Debug)]
pub struct Segments {
    ip: Ip,
    header_len: usize,
    /// Payload of each but the last.
    size: usize,
    /// Where the header of the next segment is to be.
    start: usize,
    number: usize,
    /// The pseudo-header but for the length.
    pseudo: Sum,
    /// Of the super-packet's header: IPv4's identification, TCP's sequence number and flags.
    id: u16,
    sequence: u32,
    flags: u8,
}

impl Segments {
    fn new(ip: Ip, size: usize, packet: &mut [u8]) -> Result<Self, Malformed> {
        let transport = &packet[ip.transport..];
        let minimum = if ip.protocol == TCP { TCP_HEADER } else { UDP_HEADER };
        if transport.len() < minimum {
            return Err(Malformed);
        }
        let (mut transport_len, mut sequence, mut flags) = (UDP_HEADER, 0, 0);
        if ip.protocol == TCP {
            transport_len = usize::from(transport[12] >> 4) * 4;
            sequence = u32_at(transport, 4);
            flags = transport[13];
        }
        if transport_len < minimum || transport_len > transport.len() {
            return Err(Malformed);
        }
        let pseudo = if ip.is_source_routed {
            // The final destination is somewhere in a header; the host has summed it, and the length, already.
            let at = ip.transport + if ip.protocol == TCP { 16 } else { 6 };
            Sum::default().plus(&packet[at..at + 2]).plus_u16(!(transport.len() as u16))
        } else {
            ip.pseudo(packet)
        };
        let id = if ip.is_v4 { u16_at(packet, 4) } else { 0 };
        let header_len = ip.transport + transport_len;
        Ok(Self { ip, header_len, size, start: 0, number: 0, pseudo, id, sequence, flags })
    }

    /// The length of the largest segment.
    pub fn max_len(&self) -> usize {
        self.header_len + self.size
    }

    /// Makes the next segment and says where in the packet it is.
    #[inline]
    pub fn next(&mut self, packet: &mut [u8]) -> Option<Range<usize>> {
        let (start, payload) = (self.start, self.start + self.header_len);
        if self.number > 0 && payload >= packet.len() {
            return None;
        }
        if self.number > 0 {
            let before = start - self.size;
            packet.copy_within(before..before + self.header_len, start);
        }
        let is_last = packet.len() - payload <= self.size;
        let end = if is_last { packet.len() } else { payload + self.size };
        self.write_header(&mut packet[start..end], is_last);
        self.start += self.size;
        self.number += 1;
        Some(start..end)
    }

    #[inline]
    fn write_header(&self, segment: &mut [u8], is_last: bool) {
        if self.ip.is_v4 {
            segment[4..6].copy_from_slice(&self.id.wrapping_add(self.number as u16).to_be_bytes());
        }
        let segment_len = segment.len();
        set_len(segment, &self.ip, segment_len);
        let transport = &mut segment[self.ip.transport..];
        let len = transport.len() as u16;
        let checksum_at = if self.ip.protocol == TCP {
            let sequence = self.sequence.wrapping_add((self.number * self.size) as u32);
            transport[4..8].copy_from_slice(&sequence.to_be_bytes());
            let not_last = if is_last { 0 } else { FIN | PSH };
            let not_first = if self.number == 0 { 0 } else { CWR };
            transport[13] = self.flags & !not_last & !not_first;
            16
        } else {
            transport[4..6].copy_from_slice(&len.to_be_bytes());
            6
        };
        transport[checksum_at..checksum_at + 2].fill(0);
        let mut checksum = self.pseudo.plus_u16(len).plus(transport).finish();
        if checksum == [0, 0] && self.ip.protocol == UDP {
            checksum = [0xff, 0xff];
        }
        transport[checksum_at..checksum_at + 2].copy_from_slice(&checksum);
    }
}
