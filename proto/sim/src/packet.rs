//! Packets that applications on simulated hosts send each other: real IP headers, a body that says who sent it.
//!
//! The body is the truth that judges use: what the header claims can be forged, what the body says is what the simulator
//! wrote.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use mesh_common::time::Instant;

const V4_HEAD: usize = 20;
const V6_HEAD: usize = 40;
const BODY: usize = 13;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub body: Body,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Body {
    pub kind: Kind,
    /// The host that really sent it.
    pub from: u16,
    /// The host it is meant for.
    pub to: u16,
    /// When the ping was sent; an answer repeats it.
    pub sent: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ping,
    Pong,
    /// Its source address is another host's: nobody may ever receive it.
    Forged,
}

impl Packet {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut head = vec![0; V4_HEAD];
                head[0] = 0x45;
                head[12..16].copy_from_slice(&source.octets());
                head[16..20].copy_from_slice(&destination.octets());
                head
            }
            (source, destination) => {
                let v6 = |addr| match addr {
                    IpAddr::V4(v4) => Ipv4Addr::to_ipv6_mapped(&v4),
                    IpAddr::V6(v6) => v6,
                };
                let mut head = vec![0; V6_HEAD];
                head[0] = 0x60;
                head[8..24].copy_from_slice(&v6(source).octets());
                head[24..40].copy_from_slice(&v6(destination).octets());
                head
            }
        };
        bytes.push(match self.body.kind {
            Kind::Ping => 0,
            Kind::Pong => 1,
            Kind::Forged => 2,
        });
        bytes.extend(self.body.from.to_le_bytes());
        bytes.extend(self.body.to.to_le_bytes());
        let sent = u64::try_from(self.body.sent.since_origin().as_nanos()).unwrap_or(u64::MAX);
        bytes.extend(sent.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let source = source(bytes)?;
        let (destination, body) = match source {
            IpAddr::V4(_) => (IpAddr::from(<[u8; 4]>::try_from(&bytes[16..20]).ok()?), &bytes[V4_HEAD..]),
            IpAddr::V6(_) => (IpAddr::from(<[u8; 16]>::try_from(&bytes[24..40]).ok()?), &bytes[V6_HEAD..]),
        };
        if body.len() != BODY {
            return None;
        }
        let kind = match body[0] {
            0 => Kind::Ping,
            1 => Kind::Pong,
            2 => Kind::Forged,
            _ => return None,
        };
        let sent = u64::from_le_bytes(body[5..13].try_into().ok()?);
        Some(Self {
            source,
            destination,
            body: Body {
                kind,
                from: u16::from_le_bytes([body[1], body[2]]),
                to: u16::from_le_bytes([body[3], body[4]]),
                sent: Instant::from_origin(Duration::from_nanos(sent)),
            },
        })
    }
}

/// The source address in the header.
pub fn source(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.first()? >> 4 {
        4 if bytes.len() >= V4_HEAD => {
            let octets: [u8; 4] = bytes[12..16].try_into().ok()?;
            Some(IpAddr::V4(Ipv4Addr::from(octets)))
        }
        6 if bytes.len() >= V6_HEAD => {
            let octets: [u8; 16] = bytes[8..24].try_into().ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(octets)))
        }
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn packets_of_both_families_are_read_back() {
        for (source, destination) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let packet = Packet {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                body: Body { kind: Kind::Pong, from: 3, to: 4, sent: Instant::from_origin(Duration::from_millis(5)) },
            };
            assert_eq!(Packet::decode(&packet.encode()), Some(packet));
        }
        assert_eq!(Packet::decode(&[0x45; 7]), None);
    }
}
