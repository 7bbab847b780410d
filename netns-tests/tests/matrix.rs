//! The matrix believes wires only: what flows in clear, over the server, or with gaps is seen and called so.
//!
//! No agent runs here: shell scripts stand in for the programs, hosts reach each other in clear, and the tests send what
//! a tunnel and a relay would.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use netns_tests::{
    Entry, Host, Lab,
    binaries::Binaries,
    enter_or_skip,
    impair::Impairment,
    link::{MAIN_TABLE, To},
    matrix::{
        judge::{Evidence, Got, PER_SECOND, Verdict},
        pair::Bench,
    },
    nat::{
        Kind, Ports,
        oracle::{Expect, Pair},
        world::SERVER,
    },
};

const DELAY: Duration = Duration::from_millis(5);
const OPEN: Pair = Pair::Apart(Kind::Open, Kind::Open);
/// Longer than what is judged: two seconds of quiet.
const WATCHED: Duration = Duration::from_secs(3);
const OVERLAY: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 19, 0, 1), Ipv4Addr::new(198, 19, 0, 2)];
/// A question in a tunnel, and the same in a relay's message.
const TUNNELLED: usize = 860;
const RELAYED: usize = 930;

fn stand_ins(dir: &Path) -> Binaries {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    let server =
        "#!/bin/sh\n[ \"$1\" = --help ] && exit 0\necho endpoint=https://a:1\necho pin=none\nexec sleep 1000\n";
    Binaries { agent: write("mesh-agent", "#!/bin/sh\nexec sleep 1000\n"), server: write("discovery-server", server) }
}

/// Two open sites whose hosts have overlay addresses that the internet carries in clear.
fn in_clear(dir: &Path) -> Bench {
    let mut bench = Bench::build(Lab::new().unwrap(), &stand_ins(dir), DELAY, Ports::Kept).unwrap();
    for (index, last) in [(0, 10), (1, 20)] {
        let (site, node) = (&bench.world.sites[index], &mut bench.nodes[index]);
        site.attach(&node.host, last, false).unwrap();
        let address = site.inner_address(last);
        let overlay = ipnet::IpNet::new(OVERLAY[index].into(), 32).unwrap();
        node.host.add_address("lo", overlay).unwrap();
        node.address = address.into();
        node.overlay = Some((OVERLAY[index], "fd00::1".parse().unwrap()));
        let home: Ipv4Addr = site.home_address();
        site.home.add_route(MAIN_TABLE, overlay, &To::Gateway(address.into())).unwrap();
        bench.world.internet.add_route(MAIN_TABLE, overlay, &To::Gateway(home.into())).unwrap();
    }
    bench
}

/// Datagrams at the pace of an exchange until it is dropped.
struct Flow {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Flow {
    fn start(from: &Host, to: SocketAddr, datagram: Vec<u8>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = from
            .start_inside({
                let stop = Arc::clone(&stop);
                move || {
                    let socket = UdpSocket::bind("0.0.0.0:0")?;
                    let mut next = Instant::now();
                    while !stop.load(Ordering::Relaxed) {
                        socket.send_to(&datagram, to)?;
                        next += Duration::from_secs(1) / PER_SECOND;
                        std::thread::sleep(next.saturating_duration_since(Instant::now()));
                    }
                    Ok(())
                }
            })
            .unwrap();
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

/// What a tunnel between the two hosts sends.
fn tunnel(bench: &Bench) -> [Flow; 2] {
    let mut datagram = vec![0; TUNNELLED];
    datagram[0] = 4;
    [(0, 1), (1, 0)]
        .map(|(from, to)| Flow::start(&bench.nodes[from].host, (bench.nodes[to].address, 9).into(), datagram.clone()))
}

fn judge(evidence: &Evidence, expect: Expect) -> Verdict {
    evidence.judge(expect, Duration::from_secs(1))
}

#[test]
fn a_path_is_what_the_wires_say() {
    if enter_or_skip("a_path_is_what_the_wires_say") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut bench = in_clear(dir.path());

    let verdict = judge(&bench.exchange(OPEN, WATCHED).unwrap(), Expect::Direct);
    assert_eq!(verdict.got, Got::None, "in clear: {verdict:?}");
    assert!(verdict.first_byte.is_some() && !verdict.faults.is_empty());

    let flows = tunnel(&bench);
    let evidence = bench.exchange(OPEN, WATCHED).unwrap();
    let verdict = judge(&evidence, Expect::Direct);
    assert_eq!((verdict.got, verdict.lost_on_switch), (Got::Direct, Some(0)), "{verdict:?}");
    assert_eq!(verdict.faults, [] as [String; 0]);

    let relay = Flow::start(&bench.nodes[0].host, (SERVER[1], 9).into(), vec![1; RELAYED]);
    let verdict = judge(&bench.exchange(OPEN, WATCHED).unwrap(), Expect::Direct);
    assert_eq!(verdict.got, Got::Relay, "{verdict:?}");
    assert!(verdict.faults.contains(&"not direct".to_owned()), "{verdict:?}");
    drop(relay);
    drop(flows);
}

#[test]
fn a_gap_at_the_switch_is_counted() {
    if enter_or_skip("a_gap_at_the_switch_is_counted") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut bench = in_clear(dir.path());
    // One datagram of a hundred: some within two seconds of whenever the flow is taken to have begun.
    bench.world.impair(Impairment { loss: 10, ..Impairment::delay(DELAY) });
    let flows = tunnel(&bench);
    let verdict = judge(&bench.exchange(OPEN, WATCHED).unwrap(), Expect::Direct);
    assert_eq!(verdict.got, Got::Direct, "{verdict:?}");
    assert!(verdict.lost_on_switch.unwrap() > 0, "{verdict:?}");
    assert!(verdict.faults.iter().any(|fault| fault.contains("of the switch")), "{verdict:?}");
    drop(flows);
}
