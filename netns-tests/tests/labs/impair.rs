//! A wire does what it was told, measured by its ends.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use netns_tests::{
    Entry, Host, Lab, enter_or_skip,
    impair::{Impairment, Wire},
    traffic::{UdpStream, UdpTotals, first_reply, transfer},
    wait,
};
use nix::{sys::resource::UsageWho, sys::time::TimeValLike};

const EVERY: Duration = Duration::from_millis(200);
const SOON: Duration = Duration::from_secs(5);
const SEED: u64 = 11;

fn wired(impairment: Impairment) -> (Lab, Host, Host, Wire) {
    let mut lab = Lab::new().unwrap();
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    let wire = Wire::connect(&mut lab, (&a, "eth0"), (&b, "eth0"), impairment, SEED).unwrap();
    for (host, number) in [(&a, 1), (&b, 2)] {
        host.add_address("eth0", format!("10.9.0.{number}/24").parse().unwrap()).unwrap();
        host.add_address("eth0", format!("2001:db8::{number}/64").parse().unwrap()).unwrap();
    }
    (lab, a, b, wire)
}

fn b_v4() -> IpAddr {
    "10.9.0.2".parse().unwrap()
}

fn stream(a: &Host, b: &Host, datagrams: u64) -> UdpTotals {
    let stream = UdpStream::start(a, b, b_v4(), 1000, b"impaired").unwrap();
    wait::until_true("the stream", SOON * 4, || Ok(stream.sent() >= datagrams)).unwrap();
    stream.stop().unwrap()
}

#[test]
fn a_wire_delays_both_ways_and_unharmed() {
    if enter_or_skip("a_wire_delays_both_ways_and_unharmed") == Entry::Handled {
        return;
    }
    let (_lab, a, b, wire) = wired(Impairment::default());
    let quick = first_reply(&a, b_v4(), b"quick", EVERY, SOON).unwrap();
    // Large segments and unfinished checksums come through.
    let done = transfer(&a, &b, b_v4(), 4_000_001, SEED, b"").unwrap();
    assert_eq!((done.bytes, done.sha256_sent), (4_000_001, done.sha256_received));
    assert!(quick < Duration::from_millis(40), "{quick:?}");

    wire.impair(Impairment::delay(Duration::from_millis(40)));
    for to in [b_v4(), "2001:db8::2".parse().unwrap()] {
        // The best of some: the machine may be busy, but no packet can be early.
        let best = (0..5).map(|_| first_reply(&a, to, b"slow", EVERY, SOON).unwrap()).min().unwrap();
        assert!((Duration::from_millis(80)..Duration::from_millis(100)).contains(&best), "{best:?}");
    }
    assert_eq!(wire.overflowed(), 0);
    wire.cut().unwrap();
    first_reply(&a, b_v4(), b"cut", EVERY, Duration::from_millis(500)).unwrap_err();
}

#[test]
fn a_wire_loses_and_doubles_as_often_as_it_was_told() {
    if enter_or_skip("a_wire_loses_and_doubles_as_often_as_it_was_told") == Entry::Handled {
        return;
    }
    let (_lab, a, b, wire) = wired(Impairment { loss: 200, ..Impairment::default() });
    let totals = stream(&a, &b, 2000);
    let lost = totals.lost * 1000 / totals.sent;
    assert!((160..240).contains(&lost), "{lost} of 1000: {totals:?}");
    assert_eq!(totals.duplicate, 0);
    wire.impair(Impairment { duplicate: 100, jitter: Duration::from_millis(3), ..Impairment::default() });
    let totals = stream(&a, &b, 2000);
    let doubled = totals.duplicate * 1000 / totals.sent;
    assert!((70..130).contains(&doubled), "{doubled} of 1000: {totals:?}");
    assert_eq!((totals.lost, totals.corrupt), (0, 0), "{totals:?}");
}

#[test]
fn an_idle_wire_costs_nothing() {
    if enter_or_skip("an_idle_wire_costs_nothing") == Entry::Handled {
        return;
    }
    let (_lab, a, _b, _wire) = wired(Impairment::delay(Duration::from_millis(10)));
    first_reply(&a, b_v4(), b"once", EVERY, SOON).unwrap();
    let used = || {
        let usage = nix::sys::resource::getrusage(UsageWho::RUSAGE_SELF).unwrap();
        Duration::from_micros((usage.user_time() + usage.system_time()).num_microseconds().cast_unsigned())
    };
    let before = used();
    let start = Instant::now();
    wait::until_true("a second to pass", SOON, || Ok(start.elapsed() > Duration::from_secs(1))).unwrap();
    let cost = used() - before;
    assert!(cost < Duration::from_millis(100), "{cost:?}");
}
