//! Where the headers of an IP packet are, read with care.

use super::checksum::Sum;

pub(super) const V4_HEADER: usize = 20;
pub(super) const V6_HEADER: usize = 40;
pub(super) const TCP_HEADER: usize = 20;
pub(super) const UDP_HEADER: usize = 8;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Extension headers of IPv6 that may stand before TCP or UDP.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// What the IP header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ip {
    pub(super) is_v4: bool,
    /// Where the transport header begins.
    pub(super) transport: usize,
    pub(super) protocol: u8,
    /// A part of a packet, the first part too.
    pub(super) is_fragment: bool,
    /// The destination is not the final one yet, which is what the checksum is of.
    pub(super) is_source_routed: bool,
    /// Of the whole packet.
    pub(super) len: usize,
}

impl Ip {
    /// `None` unless it is a whole packet by its own headers.
    #[inline]
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => {
                let header: &[u8; V4_HEADER] = packet.first_chunk()?;
                let transport = usize::from(header[0] & 0xf) * 4;
                let len = usize::from(u16::from_be_bytes([header[2], header[3]]));
                let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
                let fits = V4_HEADER <= transport && transport <= len && len <= packet.len();
                fits.then_some(Self {
                    is_v4: true,
                    transport,
                    protocol: header[9],
                    is_fragment,
                    is_source_routed: false,
                    len,
                })
            }
            6 => {
                let header: &[u8; V6_HEADER] = packet.first_chunk()?;
                let len = V6_HEADER + usize::from(u16::from_be_bytes([header[4], header[5]]));
                let (mut transport, mut protocol, mut is_fragment) = (V6_HEADER, header[6], false);
                let mut is_source_routed = false;
                let whole = packet.get(..len)?;
                // Each step is at least 8 bytes further, so this ends. What follows a fragment header need not be a header.
                while let Some(extension) = extension_len(protocol, whole.get(transport..)?)
                    && !is_fragment
                {
                    is_fragment = protocol == FRAGMENT;
                    is_source_routed |= protocol == ROUTING && whole[transport + 3] != 0;
                    protocol = whole[transport];
                    transport += extension;
                }
                let fits = transport <= len;
                fits.then_some(Self { is_v4: false, transport, protocol, is_fragment, is_source_routed, len })
            }
            _ => None,
        }
    }

    /// The checksum's pseudo-header but for the length. Only for a packet that [`Self::parse`] read.
    #[inline]
    pub(super) fn pseudo(&self, packet: &[u8]) -> Sum {
        let addresses = if self.is_v4 { &packet[12..20] } else { &packet[8..40] };
        Sum::default().plus(addresses).plus_u16(u16::from(self.protocol))
    }
}

/// `None` when `protocol` is no extension header, or its first eight bytes are not there.
fn extension_len(protocol: u8, header: &[u8]) -> Option<usize> {
    let length = usize::from(header.first_chunk::<8>()?[1]);
    match protocol {
        HOP_BY_HOP | ROUTING | DESTINATION => Some((length + 1) * 8),
        AUTHENTICATION => Some((length + 2) * 4),
        FRAGMENT => Some(8),
        _ => None,
    }
}

/// Writes a length that was changed, and the header's own checksum.
#[inline]
pub(super) fn set_len(packet: &mut [u8], ip: &Ip, len: usize) {
    if ip.is_v4 {
        packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        packet[10..12].fill(0);
        let checksum = Sum::default().plus(&packet[..ip.transport]).finish();
        packet[10..12].copy_from_slice(&checksum);
    } else {
        packet[4..6].copy_from_slice(&((len - V6_HEADER) as u16).to_be_bytes());
    }
}

#[inline]
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
