//! The header that stands before each packet of a TUN device with IFF_VNET_HDR: what is left to do for it.
//!
//! It is the header of virtio-net in its oldest shape (10 bytes, the host's byte order), see `virtio_net_hdr` in Linux.

/// Checksums: the packet's is not complete.
const NEEDS_CSUM: u8 = 1;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// A flag beside the type: the super-packet begins with CWR set. It changes nothing for us.
const GSO_ECN: u8 = 0x80;

/// What is left to do for a packet. The default is nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// The checksum field holds the sum of the pseudo-header only.
    pub needs_checksum: bool,
    pub gso: Gso,
    /// Length of all headers. Written for the kernel, never believed.
    pub header_len: u16,
    /// Payload of each segment but the last.
    pub segment: u16,
    /// Where the checksum begins and where in that it stands; of meaning with `needs_checksum`.
    pub checksum_start: u16,
    pub checksum_offset: u16,
}

/// How a super-packet is to be cut.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gso {
    #[default]
    None,
    TcpV4,
    TcpV6,
    /// Into datagrams, either family.
    Udp,
    /// A kind that nobody asked the kernel for.
    Unknown(u8),
}

impl VnetHeader {
    pub const LEN: usize = 10;

    pub fn parse(bytes: &[u8; Self::LEN]) -> Self {
        let [flags, kind, a, b, c, d, e, f, g, h] = *bytes;
        let field = |a, b| u16::from_ne_bytes([a, b]);
        Self {
            needs_checksum: flags & NEEDS_CSUM != 0,
            gso: match kind & !GSO_ECN {
                GSO_NONE => Gso::None,
                GSO_TCPV4 => Gso::TcpV4,
                GSO_TCPV6 => Gso::TcpV6,
                GSO_UDP_L4 => Gso::Udp,
                _ => Gso::Unknown(kind),
            },
            header_len: field(a, b),
            segment: field(c, d),
            checksum_start: field(e, f),
            checksum_offset: field(g, h),
        }
    }

    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let kind = match self.gso {
            Gso::None => GSO_NONE,
            Gso::TcpV4 => GSO_TCPV4,
            Gso::TcpV6 => GSO_TCPV6,
            Gso::Udp => GSO_UDP_L4,
            Gso::Unknown(kind) => kind,
        };
        let [a, b] = self.header_len.to_ne_bytes();
        let [c, d] = self.segment.to_ne_bytes();
        let [e, f] = self.checksum_start.to_ne_bytes();
        let [g, h] = self.checksum_offset.to_ne_bytes();
        [u8::from(self.needs_checksum) * NEEDS_CSUM, kind, a, b, c, d, e, f, g, h]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back_and_unknown_kinds_stay() {
        for kind in 0..=255u8 {
            let bytes = [1, kind, 1, 2, 3, 4, 5, 6, 7, 8];
            let header = VnetHeader::parse(&bytes);
            assert_eq!(VnetHeader::parse(&header.to_bytes()), header, "{kind}");
            let is_known = [0, 1, 4, 5].contains(&(kind & !GSO_ECN));
            assert_eq!(matches!(header.gso, Gso::Unknown(_)), !is_known, "{kind}");
        }
        assert_eq!(VnetHeader::default().to_bytes(), [0; 10]);
    }
}
