//! Both ends over the loopback interface.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::thread::{self, JoinHandle};

use super::client::{Test, TestError};
use super::service::{Service, listen};
use super::*;

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A service in a thread of its own, until it is dropped.
struct There {
    at: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for There {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

fn start(overlay: &str, dir: &Path) -> There {
    let listener = listen(HERE, 0, None).unwrap();
    let at = listener.local_addr().unwrap();
    let overlay = [overlay.parse().unwrap(), "fd00::/64".parse().unwrap()];
    let lock = dir.join("there.lock");
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let thread = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let _service = Service::on(listener, overlay, lock).unwrap();
            let _dropped: Result<(), _> = stopped.await;
        });
    });
    There { at, stop: Some(stop), thread: Some(thread) }
}

#[test]
fn both_ways_are_measured_and_what_arrived_is_what_counts() {
    let dir = tempfile::tempdir().unwrap();
    let there = start("127.0.0.0/8", dir.path());
    let mut test = Test::begin_at(there.at, &dir.path().join("here.lock")).unwrap();
    let idle = test.idle().unwrap();
    assert!(idle.count > 5 && idle.median_us <= idle.max_us, "{idle:?}");
    for flow in [test.up(1).unwrap(), test.down(1).unwrap()] {
        assert!(flow.bytes > 1_000_000 && flow.loaded.count > 0, "{flow:?}");
        let expected = u128::from(flow.bytes) * 8_000_000 / u128::from(flow.micros);
        assert_eq!(u128::from(flow.bits_per_second), expected);
    }
}

#[test]
fn one_test_at_a_time_on_either_side_and_a_rest_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let there = start("127.0.0.0/8", dir.path());
    let lock = |name: &str| dir.path().join(name);
    let test = Test::begin_at(there.at, &lock("here.lock")).unwrap();
    assert!(matches!(Test::begin_at(there.at, &lock("here.lock")), Err(TestError::BusyHere)));
    assert!(matches!(Test::begin_at(there.at, &lock("other.lock")), Err(TestError::BusyThere)));
    drop(test);
    let rests = loop {
        match Test::begin_at(there.at, &lock("other.lock")) {
            Err(TestError::Rests { seconds }) => break seconds,
            // The end of the first one has not arrived yet.
            Err(TestError::BusyThere) => thread::yield_now(),
            other => panic!("{other:?}"),
        }
    };
    assert!((1..=11).contains(&rests), "{rests}");
}

#[test]
fn a_node_that_measures_answers_nobody_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let there = start("127.0.0.0/8", dir.path());
    let _measures = take_turn(&dir.path().join("there.lock")).unwrap().unwrap();
    assert!(matches!(Test::begin_at(there.at, &dir.path().join("here.lock")), Err(TestError::BusyThere)));
}

#[test]
fn who_is_no_peer_is_not_answered() {
    let dir = tempfile::tempdir().unwrap();
    let there = start("198.19.0.0/16", dir.path());
    assert!(matches!(Test::begin_at(there.at, &dir.path().join("here.lock")), Err(TestError::NoService { .. })));
}

#[test]
fn nonsense_and_transfers_without_a_test_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let there = start("127.0.0.0/8", dir.path());
    let say = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(there.at).unwrap();
        stream.write_all(bytes).unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).unwrap();
        reply
    };
    let refused = Reply::Refused.to_bytes().to_vec();
    let hello = |purpose, seconds| Hello { purpose, seconds }.to_bytes();
    for bytes in [
        hello(Purpose::Up, 1),
        hello(Purpose::Down, 1),
        hello(Purpose::Down, MAX_SECONDS + 1),
        hello(Purpose::Session, 0),
        *b"GET / HT",
        [0; 8],
    ] {
        assert_eq!(say(&bytes), refused, "{bytes:?}");
    }
}

#[test]
fn what_one_end_writes_the_other_reads() {
    for purpose in [Purpose::Session, Purpose::Up, Purpose::Down] {
        let hello = Hello { purpose, seconds: 5 };
        assert_eq!(Hello::parse(&hello.to_bytes()), Some(hello));
    }
    for reply in [Reply::Go, Reply::Busy, Reply::Rests { seconds: 7 }, Reply::Refused] {
        assert_eq!(Reply::parse(reply.to_bytes()), reply);
    }
}
