//! What the cipher alone costs: two ends of a tunnel in one thread, without a socket.

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use mesh_agent::dataplane::{BoringTunnel, BoringTunnels, TunnelFactory};
use mesh_common::{
    key::{PresharedKey, WgSecret},
    time::Instant,
};
use mesh_proto::{
    device::PeerSpec,
    wg::{Opened, Sealed, Tunnel},
};

pub const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub const NOW: Instant = Instant::ORIGIN;
/// Room for a sealed packet of the usual size.
pub const BUFFER: usize = 2048;

/// A full packet of the tunnel, and what TCP over IPv4 with time stamps carries in it.
const PACKET: u16 = 1420;
const PAYLOAD: f64 = 1368.0;
/// Packets between two looks at the clock.
const BATCH: u32 = 200;

/// Seal and open of full packets by this thread, in ns per byte of payload: the median of batches over `length`.
pub fn ns_per_byte(length: Duration) -> f64 {
    let (mut sender, mut receiver) = connected();
    let packet = packet(PACKET);
    let (mut sealed_into, mut opened_into) = ([0; BUFFER], [0; BUFFER]);
    let start = std::time::Instant::now();
    let mut batches = Vec::new();
    while batches.is_empty() || start.elapsed() < length {
        let before = std::time::Instant::now();
        for _ in 0..BATCH {
            let Sealed::Data(datagram) = sender.seal(black_box(&packet), &mut sealed_into, NOW) else {
                unreachable!("the session is up")
            };
            let opened = receiver.open(datagram, SOURCE, &mut opened_into, NOW);
            assert!(matches!(opened, Opened::Packet(_)), "what was sealed opens");
        }
        batches.push(before.elapsed());
    }
    batches.sort_unstable();
    batches[batches.len() / 2].as_nanos() as f64 / f64::from(BATCH) / PAYLOAD
}

/// Two ends of a tunnel with a session.
pub fn connected() -> (BoringTunnel, BoringTunnel) {
    let (a, b) = pair();
    connect(a, b)
}

/// Two ends of a tunnel that have not spoken.
pub fn pair() -> (BoringTunnel, BoringTunnel) {
    let [a, b] = [1, 2].map(|n| WgSecret::from_seed(&[n; 32]));
    let spec = PeerSpec {
        preshared_key: Some(PresharedKey([3; 32])),
        allowed_ips: Default::default(),
        keepalive: None,
        generation: 0,
    };
    let one = BoringTunnels::new(&a).make(&b.public(), &spec, 1, NOW);
    let other = BoringTunnels::new(&b).make(&a.public(), &spec, 2, NOW);
    (one, other)
}

/// Makes them speak.
pub fn connect(mut a: BoringTunnel, mut b: BoringTunnel) -> (BoringTunnel, BoringTunnel) {
    let (mut at_a, mut at_b) = ([0; BUFFER], [0; BUFFER]);
    let initiation = a.start_handshake(&mut at_a, NOW).expect("a new tunnel can start a handshake");
    let Opened::Reply(response) = b.open(initiation, SOURCE, &mut at_b, NOW) else {
        unreachable!("an initiation of the peer is answered")
    };
    let Opened::Established(Some(confirm)) = a.open(response, SOURCE, &mut at_a, NOW) else {
        unreachable!("the answer makes a session")
    };
    assert_eq!(b.open(confirm, SOURCE, &mut at_b, NOW), Opened::Keepalive, "the session is confirmed");
    (a, b)
}

/// An IPv4 packet of this length.
pub fn packet(len: u16) -> Vec<u8> {
    let mut packet = vec![0; usize::from(len).max(20)];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cipher_costs_something() {
        assert!(ns_per_byte(Duration::ZERO) > 0.01);
    }
}
