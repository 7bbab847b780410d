//! The two addresses of an inner IP packet, read with care.

use std::net::IpAddr;

const V4_HEADER: usize = 20;
const V6_HEADER: usize = 40;

/// What the data plane looks at in an inner packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Inner {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
}

impl Inner {
    /// `None` unless it is a whole IPv4 or IPv6 packet by its own header.
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => {
                let header: &[u8; V4_HEADER] = packet.first_chunk()?;
                let header_len = usize::from(header[0] & 0xf) * 4;
                let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
                if header_len < V4_HEADER || total < header_len || total > packet.len() {
                    return None;
                }
                let address = |at: usize| <[u8; 4]>::try_from(&header[at..at + 4]).ok().map(IpAddr::from);
                Some(Self { source: address(12)?, destination: address(16)? })
            }
            6 => {
                let header: &[u8; V6_HEADER] = packet.first_chunk()?;
                let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
                if V6_HEADER + payload > packet.len() {
                    return None;
                }
                let address = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).ok().map(IpAddr::from);
                Some(Self { source: address(8)?, destination: address(24)? })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A packet with nothing but addresses, a mark and a length.
    pub(in crate::dataplane) fn packet(source: &str, destination: &str, mark: u8, len: usize) -> Vec<u8> {
        let mut packet = vec![mark; len];
        let len = |less: usize| u16::try_from(len - less).expect("short").to_be_bytes();
        match (source.parse().expect("an address"), destination.parse().expect("an address")) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                packet[0] = 0x45;
                packet[2..4].copy_from_slice(&len(0));
                packet[12..16].copy_from_slice(&source.octets());
                packet[16..20].copy_from_slice(&destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                packet[0] = 0x60;
                packet[4..6].copy_from_slice(&len(V6_HEADER));
                packet[8..24].copy_from_slice(&source.octets());
                packet[24..40].copy_from_slice(&destination.octets());
            }
            _ => panic!("one family"),
        }
        packet
    }

    #[test]
    fn addresses_are_read_from_whole_packets_only() {
        for (source, destination, header) in [("10.0.0.1", "10.0.0.2", 20), ("fd00::1", "fd00::2", 40)] {
            let whole = packet(source, destination, 0, 100);
            let parsed = Inner::parse(&whole).map(|inner| (inner.source.to_string(), inner.destination.to_string()));
            assert_eq!(parsed, Some((source.to_owned(), destination.to_owned())));
            for cut in 0..100 {
                assert_eq!(Inner::parse(&whole[..cut]), None, "{source} cut to {cut}");
            }
            assert!(Inner::parse(&packet(source, destination, 0, header)).is_some(), "a header alone");
            let mut padded = whole;
            padded.extend([0; 16]);
            assert!(Inner::parse(&padded).is_some(), "padding after the packet is fine");
        }
    }

    #[test]
    fn garbage_is_refused() {
        for byte in (0..=255).filter(|byte| !matches!(byte >> 4, 4 | 6)) {
            assert_eq!(Inner::parse(&[byte; 64]), None);
        }
        assert_eq!(Inner::parse(&[0x44; 64]), None, "an IPv4 header of 16 bytes");
        assert_eq!(Inner::parse(&[0x45, 0, 0, 19, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }
}
