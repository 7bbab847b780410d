//! What every [`Tunnel`] does, as one script: it runs against boringtun in mesh-agent and against the model here.
//!
//! boringtun reads real clocks, so no part lets time pass: what timers do is tested where time is an argument. A part that
//! does not hold panics and names itself.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use mesh_common::time::Instant;
use mesh_proto::wg::{DropReason, Opened, Sealed, Tunnel};

/// How the two ends that `make` gives know each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Keys and preshared key fit.
    Matching,
    DifferentPsk,
    /// The second end expects another public key than the first one has.
    WrongKey,
}

/// Runs the script; `make` gives two fresh ends of one tunnel each time.
pub fn run<T: Tunnel>(mut make: impl FnMut(Pairing) -> (T, T)) {
    let mut fresh = |pairing| {
        let (a, b) = make(pairing);
        [End::new(a), End::new(b)]
    };
    a_queued_packet_arrives_after_the_handshake(fresh(Pairing::Matching));
    packets_cross_in_both_directions(fresh(Pairing::Matching));
    reordered_data_arrives_and_replays_do_not(fresh(Pairing::Matching));
    replayed_handshakes_change_nothing(fresh(Pairing::Matching));
    changed_bytes_never_open(fresh(Pairing::Matching));
    junk_is_dropped(fresh(Pairing::Matching));
    a_short_buffer_loses_nothing_but_its_input(fresh(Pairing::Matching));
    a_restarted_handshake_takes_over_without_loss(fresh(Pairing::Matching));
    a_late_response_to_the_initiation_before_is_good(fresh(Pairing::Matching));
    a_late_response_never_displaces_a_newer_session(fresh(Pairing::Matching));
    both_ends_may_initiate_at_once(fresh(Pairing::Matching));
    nothing_opens(fresh(Pairing::DifferentPsk));
    nothing_opens(fresh(Pairing::WrongKey));
}

const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const BUFFER: usize = 65_535;

fn now() -> Instant {
    Instant::from_origin(Duration::from_secs(3600))
}

/// One end with a buffer; results are owned copies, easy to hold and compare.
struct End<T> {
    tunnel: T,
    buffer: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq)]
enum Sent {
    Data(Vec<u8>),
    Handshake(Vec<u8>),
    Queued,
    Dropped(DropReason),
}

#[derive(Debug, PartialEq, Eq)]
enum Got {
    Packet(Vec<u8>),
    Keepalive,
    Reply(Vec<u8>),
    Established(Option<Vec<u8>>),
    Dropped(DropReason),
}

impl<T: Tunnel> End<T> {
    fn new(tunnel: T) -> Self {
        Self { tunnel, buffer: vec![0; BUFFER] }
    }

    fn seal(&mut self, packet: &[u8]) -> Sent {
        match self.tunnel.seal(packet, &mut self.buffer, now()) {
            Sealed::Data(datagram) => Sent::Data(datagram.to_vec()),
            Sealed::Handshake(datagram) => Sent::Handshake(datagram.to_vec()),
            Sealed::Queued => Sent::Queued,
            Sealed::Dropped(reason) => Sent::Dropped(reason),
        }
    }

    fn seal_data(&mut self, packet: &[u8]) -> Vec<u8> {
        match self.seal(packet) {
            Sent::Data(datagram) => datagram,
            other => panic!("a packet with a session was not sealed: {other:?}"),
        }
    }

    fn open(&mut self, datagram: &[u8]) -> Got {
        match self.tunnel.open(datagram, SOURCE, &mut self.buffer, now()) {
            Opened::Packet(packet) => Got::Packet(packet.to_vec()),
            Opened::Keepalive => Got::Keepalive,
            Opened::Reply(datagram) => Got::Reply(datagram.to_vec()),
            Opened::Established(datagram) => Got::Established(datagram.map(<[u8]>::to_vec)),
            Opened::Dropped(reason) => Got::Dropped(reason),
        }
    }

    fn flush(&mut self) -> Option<Vec<u8>> {
        self.tunnel.flush(&mut self.buffer, now()).map(<[u8]>::to_vec)
    }

    /// Runs `part` with a buffer of `room` bytes.
    fn within<R>(&mut self, room: usize, part: impl FnOnce(&mut Self) -> R) -> R {
        let usual = std::mem::replace(&mut self.buffer, vec![0; room]);
        let result = part(self);
        self.buffer = usual;
        result
    }

    fn start(&mut self) -> Vec<u8> {
        self.tunnel.start_handshake(&mut self.buffer, now()).expect("a handshake can always be started").to_vec()
    }

    fn reply(&mut self, initiation: &[u8]) -> Vec<u8> {
        match self.open(initiation) {
            Got::Reply(response) => response,
            other => panic!("an initiation was not answered: {other:?}"),
        }
    }
}

/// A valid IPv4 packet of `len` bytes (20 or more) that carries `mark`.
fn packet(mark: u8, len: usize) -> Vec<u8> {
    let mut packet = vec![mark; len];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&u16::try_from(len).expect("test packets are short").to_be_bytes());
    packet[12..16].copy_from_slice(&[10, 0, 0, 1]);
    packet[16..20].copy_from_slice(&[10, 0, 0, 2]);
    packet
}

fn finish_handshake<T: Tunnel>(a: &mut End<T>, b: &mut End<T>, initiation: &[u8]) {
    let response = b.reply(initiation);
    let Got::Established(Some(confirm)) = a.open(&response) else { panic!("a response did not establish a session") };
    assert_eq!(b.open(&confirm), Got::Keepalive, "the confirmation is an empty packet");
    for (name, end) in [("initiator", &*a), ("responder", &*b)] {
        assert_eq!(end.tunnel.since_handshake(now()), Some(Duration::ZERO), "the {name} knows of its handshake");
    }
}

fn connect<T: Tunnel>([a, b]: &mut [End<T>; 2]) {
    let initiation = a.start();
    finish_handshake(a, b, &initiation);
}

fn pass_one_each_way<T: Tunnel>(a: &mut End<T>, b: &mut End<T>) {
    let packet = packet(9, 40);
    let datagram = a.seal_data(&packet);
    assert_eq!(b.open(&datagram), Got::Packet(packet.clone()), "first to second");
    let datagram = b.seal_data(&packet);
    assert_eq!(a.open(&datagram), Got::Packet(packet), "second to first");
}

fn a_queued_packet_arrives_after_the_handshake<T: Tunnel>([mut a, mut b]: [End<T>; 2]) {
    let queued = [packet(1, 60), packet(2, 1400), packet(3, 21)];
    let Sent::Handshake(initiation) = a.seal(&queued[0]) else { panic!("the first packet did not start a handshake") };
    assert_eq!(initiation.len(), 148, "an initiation has the size of WireGuard's");
    assert_eq!(a.seal(&queued[1]), Sent::Queued);
    assert_eq!(a.seal(&queued[2]), Sent::Queued);
    assert_eq!(a.flush(), None, "nothing leaves before the handshake");
    assert_eq!(a.tunnel.since_handshake(now()), None);
    finish_handshake(&mut a, &mut b, &initiation);
    for packet in queued {
        let datagram = a.flush().expect("a queued packet is given out");
        assert_eq!(b.open(&datagram), Got::Packet(packet), "queued packets arrive whole and in order");
    }
    assert_eq!(a.flush(), None, "the queue is empty");
}

fn packets_cross_in_both_directions<T: Tunnel>(mut ends: [End<T>; 2]) {
    connect(&mut ends);
    let [mut a, mut b] = ends;
    for mark in 0..50 {
        let packet = packet(mark, 20 + usize::from(mark) * 28);
        let datagram = a.seal_data(&packet);
        assert_eq!(datagram[..4], [4, 0, 0, 0], "data looks like WireGuard's");
        assert_eq!(b.open(&datagram), Got::Packet(packet.clone()), "first to second");
        let datagram = b.seal_data(&packet);
        assert_eq!(a.open(&datagram), Got::Packet(packet), "second to first");
    }
}

fn reordered_data_arrives_and_replays_do_not<T: Tunnel>(mut ends: [End<T>; 2]) {
    connect(&mut ends);
    let [mut a, mut b] = ends;
    let sent: Vec<_> = (0..20).map(|mark| (packet(mark, 40), a.seal_data(&packet(mark, 40)))).collect();
    for (packet, datagram) in sent.iter().rev() {
        assert_eq!(b.open(datagram), Got::Packet(packet.clone()), "out of order is fine");
    }
    for (_, datagram) in &sent {
        assert_eq!(b.open(datagram), Got::Dropped(DropReason::Replayed), "a second time is not");
    }
}

fn replayed_handshakes_change_nothing<T: Tunnel>([mut a, mut b]: [End<T>; 2]) {
    let initiation = a.start();
    let response = b.reply(&initiation);
    assert!(matches!(a.open(&response), Got::Established(Some(_))));
    assert!(matches!(b.open(&initiation), Got::Dropped(_)), "a replayed initiation");
    assert!(matches!(a.open(&response), Got::Dropped(_)), "a replayed response");
    let datagram = a.seal_data(&packet(1, 40));
    assert_eq!(b.open(&datagram), Got::Packet(packet(1, 40)), "the session of the first stands");
}

fn changed_bytes_never_open<T: Tunnel>([mut a, mut b]: [End<T>; 2]) {
    let initiation = a.start();
    // The last 16 bytes (mac2) mean nothing while the receiver is not under load.
    for at in 0..initiation.len() - 16 {
        let mut changed = initiation.clone();
        changed[at] ^= 0x10;
        let got = b.open(&changed);
        assert!(matches!(got, Got::Dropped(_)), "initiation, byte {at}: {got:?}");
    }
    finish_handshake(&mut a, &mut b, &initiation);
    let datagram = a.seal_data(&packet(1, 60));
    for at in 0..datagram.len() {
        let mut changed = datagram.clone();
        changed[at] ^= 0x10;
        let got = b.open(&changed);
        assert!(matches!(got, Got::Dropped(_)), "data, byte {at}: {got:?}");
    }
    assert_eq!(b.open(&datagram), Got::Packet(packet(1, 60)), "the true one still opens");
}

fn junk_is_dropped<T: Tunnel>(mut ends: [End<T>; 2]) {
    connect(&mut ends);
    let [mut a, mut b] = ends;
    let datagram = a.seal_data(&packet(1, 60));
    for len in 0..datagram.len() {
        let got = b.open(&datagram[..len]);
        assert!(matches!(got, Got::Dropped(_)), "cut to {len} bytes: {got:?}");
    }
    for kind in 0..=255 {
        for len in [1, 4, 16, 31, 32, 64, 92, 148, 1500] {
            let mut junk = vec![0x5a; len];
            junk[0] = kind;
            junk.iter_mut().take(4).skip(1).for_each(|byte| *byte = 0);
            let got = b.open(&junk);
            assert!(matches!(got, Got::Dropped(_)), "type {kind}, {len} bytes: {got:?}");
        }
    }
    assert_eq!(b.open(&datagram), Got::Packet(packet(1, 60)), "the true one still opens");
}

fn a_short_buffer_loses_nothing_but_its_input<T: Tunnel>([mut a, mut b]: [End<T>; 2]) {
    let large = packet(9, 1400);
    for room in [0, 1, 31, 147, 1431] {
        let sealed = a.within(room, |a| a.seal(&large));
        assert_eq!(sealed, Sent::Dropped(DropReason::ShortBuffer), "seal into {room} bytes");
    }
    for room in [0, 31, 147] {
        assert_eq!(a.tunnel.start_handshake(&mut vec![0; room], now()), None, "start in {room} bytes");
        assert_eq!(a.tunnel.handle_timeout(&mut vec![0; room], now()), None, "timers in {room} bytes");
    }
    let Sent::Handshake(initiation) = a.seal(&large) else { panic!("a handshake starts after short buffers") };
    for room in [0, 91, 147] {
        let opened = b.within(room, |b| b.open(&initiation));
        assert_eq!(opened, Got::Dropped(DropReason::ShortBuffer), "initiation into {room} bytes");
    }
    let response = b.reply(&initiation);
    let opened = a.within(91, |a| a.open(&response));
    assert_eq!(opened, Got::Dropped(DropReason::ShortBuffer), "response into 91 bytes");
    let Got::Established(Some(confirm)) = a.open(&response) else { panic!("the same response then establishes") };
    assert_eq!(b.open(&confirm), Got::Keepalive);
    for room in [0, 147, 1431] {
        assert_eq!(a.within(room, End::flush), None, "flush into {room} bytes");
    }
    let datagram = a.flush().expect("the queued packet waited for a buffer that holds it");
    let opened = b.within(datagram.len() - 1, |b| b.open(&datagram));
    assert_eq!(opened, Got::Dropped(DropReason::ShortBuffer), "data into one byte too few");
    assert_eq!(b.open(&datagram), Got::Packet(large));
}

fn a_restarted_handshake_takes_over_without_loss<T: Tunnel>(mut ends: [End<T>; 2]) {
    connect(&mut ends);
    let [mut a, mut b] = ends;
    let old = a.seal_data(&packet(1, 40));
    let first = a.start();
    let second = a.start();
    assert_ne!(first, second, "each start is a new initiation");
    let response = b.reply(&second);
    assert!(matches!(b.open(&first), Got::Dropped(_)), "the older initiation came too late");
    let back = b.seal_data(&packet(2, 40));
    let Got::Established(Some(confirm)) = a.open(&response) else { panic!("the second handshake completes") };
    assert_eq!(a.open(&back), Got::Packet(packet(2, 40)), "the responder uses the old session until it is confirmed");
    assert_eq!(b.open(&confirm), Got::Keepalive);
    assert_eq!(b.open(&old), Got::Packet(packet(1, 40)), "data of the old session still opens");
    pass_one_each_way(&mut a, &mut b);
}

fn a_late_response_to_the_initiation_before_is_good<T: Tunnel>([mut a, mut b]: [End<T>; 2]) {
    let first = a.start();
    let late = b.reply(&first);
    a.start();
    let Got::Established(Some(confirm)) = a.open(&late) else { panic!("the response was only late") };
    assert_eq!(b.open(&confirm), Got::Keepalive);
    pass_one_each_way(&mut a, &mut b);
}

fn a_late_response_never_displaces_a_newer_session<T: Tunnel>([mut a, mut b]: [End<T>; 2]) {
    let first = a.start();
    let late = b.reply(&first);
    let second = a.start();
    let response = b.reply(&second);
    let Got::Established(Some(confirm)) = a.open(&response) else { panic!("the response to the last initiation") };
    assert_eq!(b.open(&confirm), Got::Keepalive);
    assert!(matches!(a.open(&late), Got::Dropped(_)), "the peer may have forgotten the session of the first");
    // Its receiver index names the session.
    assert_eq!(a.seal_data(&packet(1, 40))[4..8], confirm[4..8]);
}

fn both_ends_may_initiate_at_once<T: Tunnel>([mut a, mut b]: [End<T>; 2]) {
    let (from_a, from_b) = (a.start(), b.start());
    let (to_b, to_a) = (a.reply(&from_b), b.reply(&from_a));
    let Got::Established(Some(confirm)) = a.open(&to_a) else { panic!("the first crossing response") };
    assert_eq!(b.open(&confirm), Got::Keepalive);
    let Got::Established(Some(confirm)) = b.open(&to_b) else { panic!("the second crossing response") };
    assert_eq!(a.open(&confirm), Got::Keepalive);
    pass_one_each_way(&mut a, &mut b);
}

fn nothing_opens<T: Tunnel>([mut a, mut b]: [End<T>; 2]) {
    let Sent::Handshake(initiation) = a.seal(&packet(1, 40)) else { panic!("a handshake starts") };
    // A wrong preshared key shows only in the response, a wrong key at once.
    if let Got::Reply(response) = b.open(&initiation) {
        let got = a.open(&response);
        assert!(matches!(got, Got::Dropped(_)), "the response of a stranger: {got:?}");
    }
    assert_eq!(a.flush(), None);
    assert_eq!(a.seal(&packet(2, 40)), Sent::Queued, "no session, so nothing is sealed");
    for end in [&a, &b] {
        assert_eq!(end.tunnel.since_handshake(now()), None, "no handshake completed");
    }
}
