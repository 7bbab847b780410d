//! Which protocol a datagram of the shared UDP socket belongs to, by its first bytes alone.
//!
//! WireGuard is tested first, because it is nearly all of the traffic. A class says what a datagram looks like: whether it is
//! genuine is for the owner of that protocol.

use crate::wire::stun;

/// First byte of our own path probes. WireGuard's are 1 to 4, STUN's 0 to 3, QUIC's 64 to 127 and 192 up.
pub const PROBE: u8 = 0x8d;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Datagram {
    WireGuard(WireGuardKind),
    Probe,
    Stun,
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireGuardKind {
    Initiation,
    Response,
    CookieReply,
    Data,
}

/// Looks at a datagram; takes constant time.
pub fn classify(datagram: &[u8]) -> Datagram {
    match (datagram, datagram.len()) {
        ([1, 0, 0, 0, ..], 148) => Datagram::WireGuard(WireGuardKind::Initiation),
        ([2, 0, 0, 0, ..], 92) => Datagram::WireGuard(WireGuardKind::Response),
        ([3, 0, 0, 0, ..], 64) => Datagram::WireGuard(WireGuardKind::CookieReply),
        ([4, 0, 0, 0, ..], 32..) => Datagram::WireGuard(WireGuardKind::Data),
        ([PROBE, ..], _) => Datagram::Probe,
        _ if stun::is_stun(datagram) => Datagram::Stun,
        _ => Datagram::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wireguard(kind: u8, len: usize) -> Vec<u8> {
        let mut datagram = vec![0; len];
        datagram[0] = kind;
        datagram
    }

    #[test]
    fn wireguard_is_known_by_type_and_length() {
        for (kind, len, class) in [
            (1, 148, WireGuardKind::Initiation),
            (2, 92, WireGuardKind::Response),
            (3, 64, WireGuardKind::CookieReply),
            (4, 32, WireGuardKind::Data),
            (4, 1452, WireGuardKind::Data),
        ] {
            assert_eq!(classify(&wireguard(kind, len)), Datagram::WireGuard(class));
            for bit in 0..24 {
                let mut reserved = wireguard(kind, len);
                reserved[1 + bit / 8] |= 1 << (bit % 8);
                assert_eq!(classify(&reserved), Datagram::Unknown, "type {kind}, reserved bit {bit}");
            }
        }
        for (kind, len) in [(0, 148), (5, 148), (1, 147), (1, 149), (2, 148), (3, 65), (4, 31)] {
            assert_eq!(classify(&wireguard(kind, len)), Datagram::Unknown, "type {kind}, {len} bytes");
        }
    }

    #[test]
    fn the_others_are_known_and_the_rest_is_unknown() {
        assert_eq!(classify(&[PROBE]), Datagram::Probe);
        assert_eq!(classify(&stun::binding_request(&[7; 12], stun::Change::NONE)), Datagram::Stun);
        for datagram in [&[][..], &[0], &[4, 0, 0], b"GET / HTTP/1.1\r\n\r\n", &[0xc0; 1200], &[0; 1200]] {
            assert_eq!(classify(datagram), Datagram::Unknown);
        }
    }
}
