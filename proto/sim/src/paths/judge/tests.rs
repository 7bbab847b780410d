//! Each rule, broken on purpose.
#![allow(clippy::unwrap_used)]

use mesh_common::id::ServerId;

use super::*;
use crate::oracle::Hop;

const RELAY: Endpoint = Endpoint::Relay(ServerId(0));
const RTT: Duration = Duration::from_millis(100);

fn at(millis: u64) -> Instant {
    Instant::from_origin(Duration::from_millis(millis))
}

fn peer() -> SocketAddr {
    "198.51.100.2:51872".parse().unwrap()
}

fn direct() -> Endpoint {
    Endpoint::Direct(peer())
}

/// One talk of host 0 to host 1 that must be direct.
struct Bench(Judge);

impl Bench {
    fn new(loses: bool) -> Self {
        let mut judge = Judge::new(vec![Talk::new(0, 1)], loses);
        judge.note_addresses(0, BTreeSet::from(["198.51.100.1".parse().unwrap()]));
        judge.note_addresses(1, BTreeSet::from([peer().ip()]));
        judge.note_servers(BTreeSet::from(["203.0.113.10".parse().unwrap()]));
        judge.note_first(0, RTT, true, at(0));
        Self(judge)
    }

    /// A packet every 20 ms by this path, each 50 ms under way.
    fn talk(&mut self, range: std::ops::Range<u64>, path: Endpoint) {
        for millis in range.step_by(20) {
            self.say(millis, path);
            self.0.note_delivered(0, 1, at(millis), path, at(millis + 50));
        }
    }

    fn say(&mut self, millis: u64, path: Endpoint) {
        self.0.note_sent(0, &[path], at(millis));
    }

    fn end(self, millis: u64) -> Vec<Violation> {
        self.0.finish(at(millis)).violations.into_iter().map(|(_, violation)| violation).collect()
    }
}

#[test]
fn a_good_run_breaks_no_rule_and_is_timed() {
    let mut bench = Bench::new(false);
    bench.talk(0..700, RELAY);
    bench.talk(700..8000, direct());
    bench.0.note_silence(at(8000));
    let summary = bench.0.finish(at(11_000));
    assert_eq!(summary.violations, []);
    assert!(summary.was_direct);
    assert_eq!(summary.first_byte, Some(Duration::from_millis(50)));
    assert_eq!(summary.to_direct, Some(Duration::from_millis(680)));
}

#[test]
fn a_late_first_byte_and_none_at_all_are_seen() {
    let mut late = Bench::new(false);
    late.say(0, direct());
    late.0.note_delivered(0, 1, at(0), direct(), at(401));
    assert!(matches!(late.end(500)[..], [Violation::FirstByte { after: Some(_), .. }]));
    let mut none = Bench::new(true);
    none.say(0, direct());
    assert!(matches!(none.end(9000)[..], [Violation::FirstByte { after: None, .. }]));
}

#[test]
fn data_on_the_relay_after_the_deadline_is_seen_once() {
    let mut bench = Bench::new(false);
    bench.talk(0..3500, RELAY);
    assert!(matches!(bench.end(3600)[..], [Violation::Relayed { since: "the first packet", .. }]));
    let mut fell_back = Bench::new(false);
    fell_back.talk(0..4000, direct());
    fell_back.talk(4000..4100, RELAY);
    assert!(matches!(fell_back.end(4200)[..], [Violation::Relayed { .. }]));
    let mut lossy = Bench::new(true);
    lossy.talk(0..4900, RELAY);
    lossy.talk(4900..6000, direct());
    assert_eq!(lossy.end(6100), []);
}

#[test]
fn a_missing_packet_is_lost_unless_it_may_be_under_way_or_links_lose() {
    let lost = |loses, millis, end| {
        let mut bench = Bench::new(loses);
        bench.talk(0..millis, direct());
        bench.say(millis + 5, direct());
        bench.talk(millis + 10..4000, direct());
        bench.end(end)
    };
    assert!(matches!(lost(false, 1000, 4050)[..], [Violation::Lost { packets: 1, .. }]));
    assert_eq!(lost(false, 3000, 4050), []);
    assert_eq!(lost(true, 1000, 4050), []);
}

#[test]
fn a_gap_is_measured_between_packets_from_a_fault_on_and_to_the_last() {
    let mut calm = Bench::new(false);
    calm.talk(0..1000, direct());
    calm.talk(1600..2000, direct());
    assert!(matches!(calm.end(2050)[..], [Violation::Gap { .. }]));
    let swapped = |back| {
        let mut bench = Bench::new(false);
        bench.talk(0..10_000, direct());
        bench.0.note_fault(Fault::Swap { host: 1 }, &[true], at(10_000));
        bench.talk(back..back + 500, RELAY);
        bench.end(back + 600)
    };
    assert_eq!(swapped(14_900), []);
    assert!(matches!(swapped(15_000)[..], [Violation::Gap { .. }]));
    let mut silent = Bench::new(false);
    silent.talk(0..1000, direct());
    silent.0.note_silence(at(2000));
    assert!(matches!(silent.end(5000)[..], [Violation::Gap { .. }]));
}

#[test]
fn after_a_fault_a_pair_has_its_time_to_be_direct_again() {
    let relayed_until = |millis| {
        let mut bench = Bench::new(false);
        bench.talk(0..10_000, direct());
        bench.0.note_fault(Fault::Rebind { host: 0 }, &[true], at(10_000));
        bench.talk(10_000..millis, RELAY);
        bench.talk(millis..25_000, direct());
        bench.end(25_100)
    };
    assert_eq!(relayed_until(22_900), []);
    assert!(matches!(relayed_until(23_100)[..], [Violation::Relayed { since: "the fault", .. }]));
}

#[test]
fn who_speaks_while_nobody_talks_is_seen_and_servers_may_be_spoken_to() {
    let mut bench = Bench::new(false);
    bench.talk(0..1000, direct());
    bench.0.note_silence(at(1000));
    let stun: SocketAddr = "203.0.113.10:3478".parse().unwrap();
    bench.0.note_datagram(0, (LISTEN_PORT, peer()), &[4], at(60_900));
    bench.0.note_datagram(0, (LISTEN_PORT, stun), &[0], at(65_000));
    bench.0.note_datagram(0, (LISTEN_PORT, peer()), &[demux::PROBE], at(65_000));
    bench.0.note_relayed(1, at(65_001));
    let broken = [("a probe", 0), ("a relayed datagram", 1)];
    assert_eq!(bench.end(66_000), broken.map(|(what, host)| Violation::SentWhileIdle { host, what }));
}

#[test]
fn a_report_that_claims_what_is_not_so_or_nothing_is_seen() {
    let is_right = |truth: &str, loses, mapping, filtering| {
        let kind = NatKind::all().find(|kind| kind.name() == truth).unwrap();
        let hop = Hop { router: 1, kind, is_forwarded: false, hairpins: false, blocks_udp: false, renumbers: false };
        let side = Side { network: 1, routers: vec![hop], has_v6: false };
        let mut judge = Judge::new(Vec::new(), loses);
        judge.note_report(0, &side, NatClass { mapping, filtering }, at(0));
        judge.summary.violations.is_empty()
    };
    use {Filtering as F, Mapping as M};
    assert!(is_right("eim-apdf", false, M::PortIndependent, F::AddressAndPortDependent));
    assert!(is_right("adm-eif", false, M::PortIndependent, F::AddressDependent));
    assert!(!is_right("apdm-eif", false, M::PortIndependent, F::AddressDependent));
    assert!(!is_right("adm-eif", false, M::EndpointIndependent, F::AddressDependent));
    assert!(!is_right("eim-eif", false, M::EndpointIndependent, F::AddressAndPortDependent));
    assert!(is_right("eim-eif", true, M::EndpointIndependent, F::AddressAndPortDependent));
    assert!(!is_right("eim-apdf", true, M::EndpointIndependent, F::AddressDependent));
    assert!(!is_right("eim-eif", false, M::Unknown, F::Unknown));
}

#[test]
fn too_many_probes_and_datagrams_to_strangers_are_seen() {
    let mut bench = Bench::new(false);
    bench.talk(0..20, direct());
    for probe in 0..400 {
        bench.0.note_datagram(0, (LISTEN_PORT, peer()), &[demux::PROBE], at(probe * 5));
    }
    bench.0.note_datagram(0, (LISTEN_PORT, peer()), &[demux::PROBE], at(1999));
    let stranger: SocketAddr = "192.0.2.99:51872".parse().unwrap();
    bench.0.note_datagram(0, (LISTEN_PORT, stranger), &[1], at(2000));
    bench.talk(500..520, direct());
    let broken = bench.0.summary.violations;
    let broken: Vec<_> = broken.into_iter().map(|(_, violation)| violation).collect();
    assert_eq!(
        broken,
        [Violation::TooManyProbes { host: 0, within_a_second: 201 }, Violation::ThirdParty { host: 0, to: stranger }]
    );
}
