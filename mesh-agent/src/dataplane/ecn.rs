//! Explicit congestion notification over the tunnel (RFC 6040): the outer header begins with the inner one's mark, and what
//! the underlay marks is brought to the inner packet. As WireGuard does, a packet that is not capable of it is never dropped.

use mesh_proto::offload::checksum::Sum;

/// The two bits of the traffic class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ecn {
    #[default]
    NotCapable,
    Capable1,
    Capable0,
    /// Congestion was met.
    Met,
}

impl Ecn {
    /// Of a type of service or traffic class byte.
    pub fn of_class(class: u8) -> Self {
        match class & 3 {
            0 => Self::NotCapable,
            1 => Self::Capable1,
            2 => Self::Capable0,
            _ => Self::Met,
        }
    }

    pub fn bits(self) -> u8 {
        self as u8
    }

    /// Of a whole IP packet.
    pub(super) fn of_packet(packet: &[u8]) -> Self {
        match packet {
            [first, second, ..] if first >> 4 == 4 => Self::of_class(*second),
            [first, second, ..] if first >> 4 == 6 => Self::of_class((first << 4) | (second >> 4)),
            _ => Self::NotCapable,
        }
    }
}

/// Tells a whole inner packet that its outer one met congestion.
pub(super) fn mark_congestion(packet: &mut [u8]) {
    if matches!(Ecn::of_packet(packet), Ecn::NotCapable | Ecn::Met) {
        return;
    }
    if packet[0] >> 4 == 6 {
        packet[1] |= 0x30;
    } else {
        let header_len = usize::from(packet[0] & 0xf) * 4;
        let Some(header) = packet.get_mut(..header_len) else { return };
        // A checksum that was wrong stays wrong.
        let was_right = Sum::default().plus(header).finish() == [0, 0];
        header[1] |= 3;
        if was_right && header.len() >= 12 {
            header[10..12].fill(0);
            let checksum = Sum::default().plus(header).finish();
            header[10..12].copy_from_slice(&checksum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::inner::tests::packet;
    use super::*;

    fn with_class(mut packet: Vec<u8>, class: u8) -> Vec<u8> {
        if packet[0] >> 4 == 6 {
            packet[0] = 0x60 | class >> 4;
            packet[1] = class << 4 | packet[1] & 0xf;
        } else {
            packet[1] = class;
            packet[10..12].fill(0);
            let checksum = Sum::default().plus(&packet[..20]).finish();
            packet[10..12].copy_from_slice(&checksum);
        }
        packet
    }

    #[test]
    fn congestion_is_told_to_those_who_can_hear_it() {
        for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            for (class, after) in [(0xb8, 0xb8), (0xb9, 0xbb), (0xba, 0xbb), (0xbb, 0xbb)] {
                let mut marked = with_class(packet(source, destination, 0x5a, 100), class);
                mark_congestion(&mut marked);
                assert_eq!(marked, with_class(packet(source, destination, 0x5a, 100), after), "{class:#x}");
            }
        }
    }

    #[test]
    fn a_wrong_checksum_stays_wrong_and_short_bytes_are_left_alone() {
        let mut wrong = with_class(packet("10.0.0.1", "10.0.0.2", 0, 60), 2);
        wrong[10] ^= 1;
        mark_congestion(&mut wrong);
        assert_ne!(Sum::default().plus(&wrong[..20]).finish(), [0, 0]);
        for len in 0..12 {
            mark_congestion(&mut [0x4f; 20][..len]);
        }
    }
}
