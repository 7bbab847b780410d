//! The lab judges the mesh, so the lab itself is judged first: each tool sees what is there and misses nothing planted.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use netns_tests::{
    Capture, Entry, Host, Lab, Monitor, Snapshot, Watch, enter_or_skip,
    lab::sweep,
    link::{MAIN_TABLE, To, connect},
    nft::rules::{Family, Table},
    process::Process,
    snapshot::{Kind, in_words},
    traffic::{EchoStream, UdpStream, first_reply, send_clear, transfer},
    wait,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const EVERY: Duration = Duration::from_millis(20);
const SOON: Duration = Duration::from_secs(5);

/// Two hosts on one wire: 10.9.0.1 and .2, 2001:db8::1 and ::2, both ends named `wire`.
fn two_hosts(lab: &mut Lab) -> (Host, Host) {
    let (a, b) = (lab.host("a").unwrap(), lab.host("b").unwrap());
    connect(&a, "wire", &b, "wire").unwrap();
    for (host, number) in [(&a, 1), (&b, 2)] {
        host.add_address("wire", format!("10.9.0.{number}/24").parse().unwrap()).unwrap();
        host.add_address("wire", format!("2001:db8::{number}/64").parse().unwrap()).unwrap();
    }
    (a, b)
}

fn b_v4() -> IpAddr {
    "10.9.0.2".parse().unwrap()
}

#[test]
fn two_hosts_reach_each_other_and_nobody_else() {
    if enter_or_skip("two_hosts_reach_each_other_and_nobody_else") == Entry::Handled {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, b) = two_hosts(&mut lab);
    first_reply(&a, b_v4(), b"hello", EVERY, SOON).unwrap();
    first_reply(&b, "2001:db8::1".parse().unwrap(), b"hello", EVERY, SOON).unwrap();
    let nobody = first_reply(&a, "10.9.0.77".parse().unwrap(), b"hello", EVERY, Duration::from_millis(200));
    assert!(nobody.unwrap_err().to_string().contains("host a"));
    assert!(first_reply(&lab.host("alone").unwrap(), b_v4(), b"hello", EVERY, Duration::from_millis(100)).is_err());
}

#[test]
fn a_router_and_a_bridge_carry_tcp_unchanged() {
    if enter_or_skip("a_router_and_a_bridge_carry_tcp_unchanged") == Entry::Handled {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let router = lab.router("router").unwrap();
    router.add_bridge("br").unwrap();
    router.add_address("br", "10.9.1.1/24".parse().unwrap()).unwrap();
    let (pod, far) = (lab.host("pod").unwrap(), lab.host("far").unwrap());
    connect(&router, "pod", &pod, "eth0").unwrap();
    router.enslave("pod", "br").unwrap();
    connect(&router, "far", &far, "eth0").unwrap();
    router.add_address("far", "10.9.2.1/24".parse().unwrap()).unwrap();
    for (host, address, gateway) in [(&pod, "10.9.1.2/24", "10.9.1.1"), (&far, "10.9.2.2/24", "10.9.2.1")] {
        host.add_address("eth0", address.parse().unwrap()).unwrap();
        host.add_route(MAIN_TABLE, "0.0.0.0/0".parse().unwrap(), &To::Gateway(gateway.parse().unwrap())).unwrap();
    }
    let watch = Watch::default();
    let marker = watch.marker("tcp").unwrap();
    let capture = Capture::start(&router, "far", &watch).unwrap();
    let done = transfer(&pod, &far, "10.9.2.2".parse().unwrap(), 3_000_001, 7, marker.bytes()).unwrap();
    assert_eq!((done.bytes, done.sha256_sent), (3_000_001, done.sha256_received));
    let again = transfer(&pod, &far, "10.9.2.2".parse().unwrap(), 3_000_001, 8, marker.bytes()).unwrap();
    assert_ne!(done.sha256_sent, again.sha256_sent, "the seed decides the bytes");
    let counts = capture.stop().unwrap();
    assert!(counts.of(&marker) > 10, "{counts:?}");
    assert_eq!(counts.missed, 0);
}

#[test]
fn a_capture_finds_what_was_sent_in_clear_and_nothing_else() {
    if enter_or_skip("a_capture_finds_what_was_sent_in_clear_and_nothing_else") == Entry::Handled {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, b) = two_hosts(&mut lab);
    let watch = Watch::default();
    let capture = Capture::start(&b, "wire", &watch).unwrap();
    let (sent, pinged, silent) =
        (watch.marker("sent").unwrap(), watch.marker("pinged").unwrap(), watch.marker("silent").unwrap());
    send_clear(&a, SocketAddr::new(b_v4(), 9), sent.bytes(), 0x10).unwrap();
    first_reply(&a, b_v4(), pinged.bytes(), EVERY, SOON).unwrap();
    // A datagram with the head of a WireGuard data message.
    send_clear(&a, SocketAddr::new(b_v4(), 9), &[4, 0, 0, 0, 1, 2, 3], 0).unwrap();
    let early = capture.counts();
    assert_eq!((&early.leaks, early.of(&silent)), (&None, 0));
    watch.leaks_of("10.9.0.2/32".parse().unwrap());
    first_reply(&a, b_v4(), b"to a watched prefix", EVERY, SOON).unwrap();
    let counts = capture.stop().unwrap();
    assert_eq!((counts.of(&silent), counts.wireguard, counts.missed), (0, 1, 0), "{counts:?}");
    // The other host may quote the datagram in its "port unreachable".
    assert!(counts.of(&sent) >= 1, "{counts:?}");
    assert!(counts.of(&pinged) >= 2, "a request and its reply: {counts:?}");
    let leaks = counts.leaks.as_ref().unwrap();
    assert!(leaks.count >= 2 && leaks.first.contains("10.9.0.2"), "{counts:?}");
}

#[test]
fn a_snapshot_is_stable_and_names_what_changed() {
    if enter_or_skip("a_snapshot_is_stable_and_names_what_changed") == Entry::Handled {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, b) = two_hosts(&mut lab);
    let files = lab.dir().join("files");
    fs::create_dir(&files).unwrap();
    let roots = [files.clone()];
    let before = Snapshot::take(&a, &roots).unwrap();
    first_reply(&a, b_v4(), b"traffic leaves no trace", EVERY, SOON).unwrap();
    transfer(&a, &b, b_v4(), 1000, 1, b"").unwrap();
    assert_eq!(in_words(&before.diff(&Snapshot::take(&a, &roots).unwrap())), "");

    connect(&a, "extra", &b, "extra").unwrap();
    a.add_address("extra", "10.7.0.1/32".parse().unwrap()).unwrap();
    a.add_route(818, "10.77.0.0/16".parse().unwrap(), &To::Link("extra".into())).unwrap();
    a.add_route(818, "fd00:77::/64".parse().unwrap(), &To::Unreachable).unwrap();
    a.add_rule(rtnetlink::IpVersion::V6, 1110, 818).unwrap();
    a.set_sysctl("ipv4/conf/wire/rp_filter", "2").unwrap();
    let _listener = a.inside(|| Ok(std::net::TcpListener::bind("10.9.0.1:7443")?)).unwrap();
    let mut sleep = Command::new("sleep");
    sleep.arg("1234");
    let mut process = Process::start(&a, sleep, &lab.dir().join("sleep")).unwrap();
    fs::write(files.join("left.txt"), "").unwrap();
    // The name of a process is its own only after exec.
    wait::until_true("sleep to start", SOON, || {
        Ok(Snapshot::take(&a, &roots)?.of(Kind::Process).any(|line| line == "sleep 1234"))
    })
    .unwrap();
    let after = Snapshot::take(&a, &roots).unwrap();
    let words = in_words(&before.diff(&after));
    for wanted in [
        "+ link extra up",
        "+ address extra 10.7.0.1/32",
        "+ route v4 table 818 Unicast 10.77.0.0/16 dev extra",
        "+ route v6 table 818 Unreachable fd00:77::/64",
        "+ rule v6 lookup 818 pref 1110",
        "- sysctl ipv4/conf/wire/rp_filter = 0",
        "+ sysctl ipv4/conf/wire/rp_filter = 2",
        "+ socket tcp 10.9.0.1 port 7443",
        "+ process sleep 1234",
        "left.txt",
    ] {
        assert!(words.contains(wanted), "no {wanted:?} in:\n{words}");
    }

    // What was listed can be deleted as it was listed, and is then gone from the dump.
    for route in a.routes(818).unwrap() {
        a.delete_route(route).unwrap();
    }
    for rule in a.rules_at(1110).unwrap() {
        a.delete_rule(rule).unwrap();
    }
    a.delete_link("extra").unwrap();
    a.set_sysctl("ipv4/conf/wire/rp_filter", "0").unwrap();
    process.crash().unwrap();
    drop(_listener);
    fs::remove_file(files.join("left.txt")).unwrap();
    assert_eq!(in_words(&before.diff(&Snapshot::take(&a, &roots).unwrap())), "");
}

#[test]
fn a_monitor_hears_of_each_change_and_of_nothing_else() {
    if enter_or_skip("a_monitor_hears_of_each_change_and_of_nothing_else") == Entry::Handled {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, _b) = two_hosts(&mut lab);
    let monitor = Monitor::start(&a).unwrap();
    // A new link has something to say for a while.
    let (start, rest) = (Instant::now(), Duration::from_millis(1500));
    wait::until_true("the new link to be quiet", SOON, || {
        Ok(monitor.after(0)?.last().map_or(start, |change| change.at).elapsed() >= rest)
    })
    .unwrap();
    let known = monitor.after(0).unwrap().len();
    first_reply(&a, b_v4(), b"traffic changes nothing", EVERY, SOON).unwrap();
    a.routes(818).unwrap();
    assert_eq!(monitor.after(known).unwrap().len(), 0, "neither traffic nor a look is a change");

    a.add_address("wire", "10.7.0.1/32".parse().unwrap()).unwrap();
    a.add_route(818, "10.77.0.0/16".parse().unwrap(), &To::Link("wire".into())).unwrap();
    a.add_route(818, "fd00:77::/64".parse().unwrap(), &To::Unreachable).unwrap();
    a.add_rule(rtnetlink::IpVersion::V6, 1110, 818).unwrap();
    a.set_sysctl("ipv4/conf/wire/rp_filter", "2").unwrap();
    a.set_mtu("wire", 1400).unwrap();
    let table = Table { family: Family::Inet, name: "heard", sets: Vec::new(), chains: Vec::new() };
    a.load_rules(&[table]).unwrap();
    a.routes(818).unwrap().into_iter().for_each(|route| a.delete_route(route).unwrap());
    let heard: Vec<String> = monitor.stop().unwrap().iter().map(|change| change.what.to_string()).collect();
    for wanted in [
        "address set",
        "route to 10.77.0.0/16 (Unicast) in table 818 set",
        "route to fd00:77::/64 (Unreachable) in table 818 set",
        "rule set",
        "rtnetlink message 80",
        "link set",
        "nftables message",
        "route to 10.77.0.0/16 (Unicast) in table 818 deleted",
        "route to fd00:77::/64 (Unreachable) in table 818 deleted",
    ] {
        assert!(heard.iter().any(|heard| heard.starts_with(wanted)), "no {wanted:?} in {heard:#?}");
    }
}

#[test]
fn a_udp_stream_counts_what_a_cut_wire_loses() {
    if enter_or_skip("a_udp_stream_counts_what_a_cut_wire_loses") == Entry::Handled {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let (a, b) = two_hosts(&mut lab);
    let whole = UdpStream::start(&a, &b, b_v4(), 500, b"whole").unwrap();
    wait::until_true("200 datagrams", SOON, || Ok(whole.sent() >= 200)).unwrap();
    let totals = whole.stop().unwrap();
    assert!(totals.sent >= 200 && totals.lost == 0 && totals.duplicate == 0, "{totals:?}");

    let echo = EchoStream::start(&a, b_v4(), b"steady".to_vec(), EVERY).unwrap();
    let cut = UdpStream::start(&a, &b, b_v4(), 500, b"cut").unwrap();
    wait::until_true("50 datagrams", SOON, || Ok(cut.sent() >= 50)).unwrap();
    b.set_up("wire", false).unwrap();
    let at_cut = cut.sent();
    wait::until_true("100 more datagrams", SOON, || Ok(cut.sent() >= at_cut + 100)).unwrap();
    b.set_up("wire", true).unwrap();
    let at_join = cut.sent();
    wait::until_true("200 more datagrams", SOON, || Ok(cut.sent() >= at_join + 200)).unwrap();
    let totals = cut.stop().unwrap();
    // The kernel may keep some of the 100 until the other end has answered for its address again.
    assert!(totals.lost >= 30 && totals.lost < totals.sent, "{totals:?}");
    assert!(totals.longest_gap >= Duration::from_millis(150), "{totals:?}");
    let pings = echo.stop().unwrap();
    assert!(pings.answered > 0 && pings.answered < pings.sent + pings.refused, "{pings:?}");
}

#[test]
fn a_process_runs_inside_and_ends_with_the_lab() {
    if enter_or_skip("a_process_runs_inside_and_ends_with_the_lab") == Entry::Handled {
        return;
    }
    let mut lab = Lab::new().unwrap();
    let a = lab.host("a").unwrap();
    let answer = netns_tests::process::run(
        &a,
        Path::new("/bin/sh"),
        &["-c".as_ref(), "readlink /proc/self/ns/net; exit 3".as_ref()],
        lab.dir(),
    )
    .unwrap();
    assert_eq!((answer.stdout.trim(), answer.status.code()), (format!("net:[{}]", a.inode()).as_str(), Some(3)));
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "echo up; sleep 4321 & wait"]);
    let process = Process::start(&a, shell, &lab.dir().join("shell")).unwrap();
    wait::until_true("the shell to speak", SOON, || Ok(process.stdout()? == "up\n")).unwrap();
    wait::until_true("its child to start", SOON, || Ok(sweep::processes_of(lab.dir()).len() == 2)).unwrap();
    let dir = lab.dir().to_owned();
    // The process handle outlives the lab on purpose.
    drop(lab);
    assert_eq!(sweep::processes_of(&dir), []);
    drop(process);
}

#[test]
fn nothing_stays_after_a_panic() {
    if enter_or_skip("nothing_stays_after_a_panic") == Entry::Handled {
        return;
    }
    let (tell, told) = std::sync::mpsc::channel::<(PathBuf, u64)>();
    let ended = std::thread::spawn(move || {
        let mut lab = Lab::new().unwrap();
        let (a, _b) = two_hosts(&mut lab);
        let mut sleep = Command::new("sleep");
        sleep.arg("2345");
        std::mem::forget(Process::start(&a, sleep, &lab.dir().join("sleep")).unwrap());
        tell.send((lab.dir().to_owned(), a.inode())).unwrap();
        panic!("on purpose");
    })
    .join();
    assert!(ended.is_err());
    let (dir, inode) = told.recv().unwrap();
    // Another test of this process may own a directory of the same name by now, but not these processes.
    assert!(!in_namespace(inode), "a process still lives in the lab's namespace");
    let _next = Lab::new().unwrap();
    assert!(!dir.join("sleep.out").exists());
}

fn in_namespace(inode: u64) -> bool {
    let link = format!("net:[{inode}]");
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .any(|entry| fs::read_link(entry.path().join("ns/net")).is_ok_and(|target| target == Path::new(&link)))
}

/// Names the directory that a copy of this program writes its lab's path to; only such a copy owns a lab to be killed.
const OWNER: &str = "MESHSPAN_TEST_LAB_OWNER";

/// Not a test of its own: the program that [`a_dead_owners_lab_is_swept`] and its like start and then end.
#[test]
fn owner_of_a_lab() {
    let Some(report) = std::env::var_os(OWNER) else {
        return;
    };
    let mut lab = Lab::new().unwrap();
    let a = lab.host("a").unwrap();
    let mut shell = Command::new("/bin/sh");
    // The shell dies with its owner; its child was not told to.
    shell.args(["-c", "sleep 3456 & wait"]);
    let _process = Process::start(&a, shell, &lab.dir().join("shell")).unwrap();
    wait::until_true("both processes", SOON, || Ok(sweep::processes_of(lab.dir()).len() == 2)).unwrap();
    fs::write(Path::new(&report).join("part"), lab.dir().to_str().unwrap()).unwrap();
    fs::rename(Path::new(&report).join("part"), Path::new(&report).join("dir")).unwrap();
    loop {
        std::thread::park();
    }
}

/// Starts an owner, ends it by `signal`, and returns the directory of its lab.
fn end_an_owner(signal: Signal) -> PathBuf {
    let report = tempfile::tempdir().unwrap();
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["lab::owner_of_a_lab", "--exact", "--nocapture"])
        .env(OWNER, report.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (dir, _) = wait::until("the owner's lab", Duration::from_secs(60), || {
        assert!(owner.try_wait()?.is_none(), "the owner ended early");
        Ok(fs::read_to_string(report.path().join("dir")).ok())
    })
    .unwrap();
    kill(Pid::from_raw(owner.id().cast_signed()), signal).unwrap();
    owner.wait().unwrap();
    dir.into()
}

#[test]
fn a_dead_owners_lab_is_swept() {
    if enter_or_skip("a_dead_owners_lab_is_swept") == Entry::Handled {
        return;
    }
    let dir = end_an_owner(Signal::SIGKILL);
    // Another lab of this program may have started meanwhile and swept it already: then this holds as well.
    let _next = Lab::new().unwrap();
    assert!(!dir.exists());
    assert_eq!(sweep::processes_of(&dir), []);
}

#[test]
fn an_interrupted_lab_removes_itself() {
    if enter_or_skip("an_interrupted_lab_removes_itself") == Entry::Handled {
        return;
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let dir = end_an_owner(signal);
        assert!(!dir.exists(), "{signal} left {}", dir.display());
        assert_eq!(sweep::processes_of(&dir), []);
    }
}

#[test]
fn a_lab_beside_others_waits_for_nobody_and_is_not_swept() {
    if enter_or_skip("a_lab_beside_others_waits_for_nobody_and_is_not_swept") == Entry::Handled {
        return;
    }
    let mut beside = Lab::beside_others().unwrap();
    let host = beside.host("beside").unwrap();
    let mut command = Command::new("sleep");
    command.arg("1000");
    let mut child = Process::start(&host, command, &beside.dir().join("log")).unwrap();
    // Each new lab sweeps.
    drop(Lab::new().unwrap());
    let other = Lab::new().unwrap();
    assert!(child.is_running().unwrap() && beside.dir().exists());
    let dir = beside.dir().to_owned();
    drop(beside);
    assert!(!dir.exists());
    // Killed, and perhaps not a zombie yet.
    child.ended(SOON).unwrap();
    assert!(other.dir().exists());
}
