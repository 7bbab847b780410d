//! What judges paths believes wires only: what flows in clear, over the server, or with gaps is seen and called so.
//!
//! No agent runs here: shell scripts stand in for the programs, hosts reach each other in clear, and the tests send what
//! a tunnel and a relay would.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
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
        judge::{self, Evidence, Got, PER_SECOND},
        pair::{Bench, BenchOptions, LAST, Place, Watched},
    },
    nat::{
        Kind,
        classify::Reflector,
        oracle::{Expect, Pair},
        rules,
        world::SERVER,
    },
    nft::rules::{Chain, ChainType, Family, Hook, Rule, TCP, Table, Verdict},
    proxy::Proxy,
    roaming::gap,
    traffic::{Chat, first_reply},
    wait,
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
    let server = "#!/bin/sh\necho endpoint=https://a:1\necho pin=none\nexec sleep 1000\n";
    Binaries { agent: write("mesh-agent", "#!/bin/sh\nexec sleep 1000\n"), server: write("discovery-server", server) }
}

/// Two open sites whose hosts have overlay addresses that the internet carries in clear.
fn in_clear(dir: &Path) -> Bench {
    let mut bench =
        Bench::build(Lab::new().unwrap(), &stand_ins(dir), &BenchOptions { delay: DELAY, ..BenchOptions::default() })
            .unwrap();
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

fn judge(evidence: &Evidence, expect: Expect) -> judge::Verdict {
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
    assert!(verdict.faults.iter().any(|fault| fault.contains("not direct")), "{verdict:?}");
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

const SOON: Duration = Duration::from_secs(5);
const PLACES: [Place; 2] = [Place { site: 0, last: LAST[0] }, Place { site: 1, last: LAST[1] }];

#[test]
fn a_dead_path_is_a_gap_as_long_as_it_was_dead() {
    if enter_or_skip("a_dead_path_is_a_gap_as_long_as_it_was_dead") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bench = in_clear(dir.path());
    let answered = |count: usize, watched: &Watched| {
        wait::until_true("answers", SOON, || Ok(gap::answers(&watched.beats()).count() >= count)).unwrap();
    };
    let watched = bench.watch([0, 1], PLACES).unwrap();
    let chat = Chat::start(&bench.nodes[0].host, &bench.nodes[1].host, OVERLAY[1].into()).unwrap();
    answered(100, &watched);
    let event = Instant::now();
    // In clear, questions come from the host's own address.
    let asks = bench.world.sites[0].inner_address(LAST[0]);
    bench.world.cut_between(Some([asks, OVERLAY[1]])).unwrap();
    // What the pair loses the server does not.
    let to_server = IpAddr::from(SERVER[0]);
    first_reply(&bench.nodes[0].host, to_server, b"still there", Duration::from_millis(50), SOON).unwrap();
    wait::until_true("a second to pass", SOON, || Ok(event.elapsed() >= Duration::from_secs(1))).unwrap();
    let back = Instant::now();
    bench.world.cut_between(None).unwrap();
    wait::until_true("TCP to flow again", SOON, || Ok(chat.answered().last().is_some_and(|at| *at > back))).unwrap();
    answered(200, &watched);
    chat.stop().unwrap();
    let end = Instant::now();
    let beats = watched.stop().unwrap().beats;
    let gap = gap::longest_gap(gap::answers(&beats), event, end);
    assert!((Duration::from_secs(1)..Duration::from_millis(1500)).contains(&gap), "{gap:?}");
    let lost = gap::lost_since(&beats, event);
    assert!((150..300).contains(&lost), "{lost}");
}

#[test]
fn a_connection_that_broke_is_named() {
    if enter_or_skip("a_connection_that_broke_is_named") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bench = in_clear(dir.path());
    let chat = Chat::start(&bench.nodes[0].host, &bench.nodes[1].host, OVERLAY[1].into()).unwrap();
    wait::until_true("answers", SOON, || Ok(chat.answered().len() > 3)).unwrap();
    let reset = Chain {
        name: "forw",
        kind: ChainType::Filter,
        hook: Hook::Forward,
        priority: 0,
        policy: Verdict::Accept,
        rules: vec![Rule::new().protocol(TCP).reset()],
    };
    let table = Table { family: Family::Ip, name: "reset", sets: Vec::new(), chains: vec![reset] };
    bench.world.sites[0].home.load_rules(&[table]).unwrap();
    // The connection may break before it is told to end.
    let seen = chat.answered().len();
    wait::until_true("answers to end", SOON, || {
        let start = Instant::now();
        let now = chat.answered().len();
        wait::until_true("some time", SOON, || Ok(start.elapsed() >= Duration::from_millis(100)))?;
        Ok(now >= seen && chat.answered().len() == now)
    })
    .unwrap();
    let broken = chat.stop().unwrap_err();
    assert!(format!("{broken:#}").contains("the connection broke"), "{broken:#}");
}

#[test]
fn a_network_with_a_proxy_lets_nothing_else_out() {
    if enter_or_skip("a_network_with_a_proxy_lets_nothing_else_out") == Entry::Handled {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bench = in_clear(dir.path());
    let (site, host) = (&bench.world.sites[0], &bench.nodes[0].host);
    let reflector = Reflector::start(&bench.world.server, SERVER.map(Into::into)).unwrap();
    assert!(reflector.tcp_passes(host, 443).unwrap());
    site.home.load_rules(&rules::proxy_only(3128)).unwrap();
    site.home.flush_connections().unwrap();
    assert!(!reflector.tcp_passes(host, 443).unwrap());
    assert_eq!(reflector.classify(host).unwrap(), None);

    let proxy = Proxy::start(&site.home, (site.inner_address(1), 3128).into()).unwrap();
    let ask = |request: &str| {
        host.inside(|| {
            let mut stream = TcpStream::connect_timeout(&proxy.address, SOON)?;
            stream.set_read_timeout(Some(SOON))?;
            write!(stream, "{request}\r\n\r\n")?;
            let mut answer = [0; 12];
            stream.read_exact(&mut answer)?;
            Ok(String::from_utf8_lossy(&answer).into_owned())
        })
        .unwrap()
    };
    assert_eq!(ask("CONNECT 5.0.0.2:443 HTTP/1.1"), "HTTP/1.1 200");
    assert_eq!(ask("CONNECT 5.0.0.2:9 HTTP/1.1"), "HTTP/1.1 502");
    assert_eq!(ask("GET / HTTP/1.1"), "HTTP/1.1 405");
}
