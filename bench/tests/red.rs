//! The verdicts turn red when something is broken on purpose, and the whole program says so at its end.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use mesh_bench::{
    bed::{Bed, LINK},
    conditions::Conditions,
    contender::Contender,
    converge::{ConvergeReport, Converged, Rest},
    measure::{Figures, Measuring},
    metric::{Metric, Step},
    rival,
    soak::{
        self, SoakReport,
        pair::{Pair, Pattern, Starter},
    },
    underlay::Underlay,
};
use netns_tests::{
    Entry, Lab,
    binaries::BIN_DIR,
    checks::life::pass,
    enter_or_skip,
    impair::{Impairment, Wire},
    isolation,
    mesh::{self, MESH_TABLE},
    nft::rules::{Chain, ChainType, Family, Hook, Rule, Table, Verdict},
    wait,
};
use nix::sys::socket::{getsockopt, sockopt};

const PROGRAM: &str = env!("CARGO_BIN_EXE_mesh-bench");

/// The figures of some steps over the bare wire of a bed.
fn over_the_wire(bed: &Bed, steps: &[Step]) -> anyhow::Result<Figures> {
    let running = Contender::Veth.start(bed)?;
    let (mut figures, before) = (Figures::new(), Figures::new());
    let measuring = Measuring { bed, running: &running, seconds: 0.4, before: &before, tries: 4 };
    steps.iter().try_for_each(|step| measuring.step(*step, &mut figures))?;
    Ok(figures)
}

#[test]
fn a_wire_that_loses_has_no_lossfree_rate_and_fails_the_step_that_wants_all() {
    if enter_or_skip("a_wire_that_loses_has_no_lossfree_rate_and_fails_the_step_that_wants_all") == Entry::Handled {
        return;
    }
    let mut wire = None;
    let join = |lab: &mut Lab, left: &_, right: &_| {
        wire = Some(Wire::connect(lab, (left, LINK), (right, LINK), Impairment::default(), 1)?);
        Ok(())
    };
    let bed = Bed::joined(Path::new(PROGRAM), join).unwrap();
    let good = over_the_wire(&bed, &[Step::Udp1400, Step::Rtt]).unwrap();
    assert!(good[&Metric::Udp1400] > 0.0, "a wire that loses nothing: {good:?}");

    wire.as_ref().unwrap().impair(Impairment { loss: 30, delay: Duration::from_millis(20), ..Impairment::default() });
    let bad = over_the_wire(&bed, &[Step::Udp1400, Step::Rtt]).unwrap();
    assert_eq!(bad[&Metric::Udp1400], 0.0, "{bad:?}");
    assert!(bad[&Metric::RttIdleP50] >= 40_000.0, "20 ms each way: {bad:?}");
    let error = over_the_wire(&bed, &[Step::Udp200]).unwrap_err().to_string();
    assert!(error.contains("arrived"), "{error}");
}

#[test]
fn each_kind_of_wire_is_what_it_says() {
    if enter_or_skip("each_kind_of_wire_is_what_it_says") == Entry::Handled {
        return;
    }
    for underlay in Underlay::ALL {
        let bed = Bed::new(Path::new(PROGRAM), &Conditions::new(underlay, None).unwrap()).unwrap();
        let figures = over_the_wire(&bed, &[Step::Tcp1, Step::Reverse, Step::Bidir]).unwrap();
        assert!(figures[&Metric::Tcp1] > 0.1 && figures[&Metric::CpuPerByte] > 0.0, "{underlay}: {figures:?}");
    }
}

#[test]
fn tcp_has_the_congestion_control_that_the_report_names() {
    if enter_or_skip("tcp_has_the_congestion_control_that_the_report_names") == Entry::Handled {
        return;
    }
    let bed = |congestion: Option<&str>| {
        let conditions = Conditions::new(Underlay::On, congestion).unwrap();
        Bed::new(Path::new(PROGRAM), &conditions).map(|bed| (bed, conditions.congestion))
    };
    // Every kernel has Reno.
    for asked in [None, Some("reno")] {
        let (bed, told) = bed(asked).unwrap();
        for end in bed.ends() {
            let socket = end.host.inside(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?)).unwrap();
            assert_eq!(getsockopt(&socket, sockopt::TcpCongestion).unwrap().to_str(), Some(told.as_str()));
        }
    }
    let error = format!("{:#}", bed(Some("teapot")).unwrap_err());
    assert!(error.contains("congestion control teapot") && error.contains("reno"), "{error}");
}

/// Runs the program to its end, with the programs that this test built.
fn bench(args: &[&str], bin_dir: &Path) -> Output {
    Command::new(PROGRAM).args(args).env(BIN_DIR, bin_dir).output().unwrap()
}

fn last_line(output: &Output) -> serde_json::Value {
    let said = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(said.lines().last().unwrap_or_default())
        .unwrap_or_else(|error| panic!("{error}: {said}{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn a_short_run_is_ok_and_one_with_a_rival_that_does_not_work_is_not() {
    let name = "a_short_run_is_ok_and_one_with_a_rival_that_does_not_work_is_not";
    let Some(binaries) = mesh::enter_or_skip(name).unwrap() else { return };
    let dir = binaries.dir();
    let good = ["throughput", "--smoke", "--json", "--contenders", "meshspan,veth", "--only", "tcp1,udp1400"];
    let output = bench(&good, &dir);
    let report = last_line(&output);
    assert!(output.status.success() && report["ok"] == true, "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(report["contenders"][0]["tcp1_gbps"]["median"].as_f64().unwrap() > 0.0, "{report}");

    let liar = ["--contenders", "veth,liar", "--rival", "liar=/bin/false", "--require", "liar", "--only", "tcp1"];
    let output = bench(&[&["throughput", "--smoke", "--json"][..], &liar[..]].concat(), &dir);
    let report = last_line(&output);
    assert!(!output.status.success() && report["ok"] == false, "{report}");
    assert!(report["failures"][0].as_str().unwrap().contains("liar"), "{report}");

    let output = bench(&["throughput", "--smoke", "--require", "nobody"], &dir);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("absent: nobody"));
}

#[test]
fn an_agent_that_stands_still_and_a_rival_that_is_not_heard_turn_the_soak_red() {
    let name = "an_agent_that_stands_still_and_a_rival_that_is_not_heard_turn_the_soak_red";
    let Some(binaries) = mesh::enter_or_skip(name).unwrap() else { return };
    let Ok(rival) = rival::by_name("wireguard-go") else {
        let _ = isolation::skip(
            name,
            "wireguard-go is not installed",
            "apt-get install --no-install-recommends wireguard-go",
        );
        return;
    };
    if isolation::is_rootless() {
        let _ = isolation::skip(name, "wireguard-go keeps its socket in /var/run", "run as root");
        return;
    }
    let mut lab = Lab::new().unwrap();
    let pair = Pair::start(&mut lab, &binaries, &rival, 1, Pattern::Bursty, Starter::Agent).unwrap();
    let pairs = [pair];
    let second = Duration::from_secs(1);

    let calm = SoakReport::of("x", &soak::talk(&pairs, second, 1).unwrap());
    assert_eq!((calm.corrupt_bytes, calm.one_way_windows), (0, 0), "{calm:?}");
    assert!(calm.sent > 0 && calm.lost == 0 && calm.max_stall_ms < 1000, "{calm:?}");
    assert!(!calm.ok, "without a rekey nothing is proved");

    // The agent stands still for longer than a stall may last.
    pairs[0].node.suspend().unwrap();
    let stopped = soak::talk(&pairs, 2 * second, 2);
    pairs[0].node.resume().unwrap();
    let stopped = SoakReport::of("x", &stopped.unwrap());
    assert!(stopped.max_stall_ms > 1000 && stopped.lost > 0 && !stopped.ok, "{stopped:?}");

    // The rival hears and is not heard.
    let [agent, device] = pairs[0].wire;
    let deaf = Chain {
        name: "inp",
        kind: ChainType::Filter,
        hook: Hook::Input,
        priority: 0,
        policy: Verdict::Accept,
        rules: vec![Rule::new().between(device, agent).drop()],
    };
    let deaf = Table { family: Family::Ip, name: "deaf", sets: Vec::new(), chains: vec![deaf] };
    pairs[0].node.host.load_rules(&[deaf]).unwrap();
    let deaf = SoakReport::of("x", &soak::talk(&pairs, 2 * second, 3).unwrap());
    assert!(deaf.one_way_windows > 0 && !deaf.ok, "{deaf:?}");
}

#[test]
fn a_route_that_somebody_deletes_turns_converge_red() {
    let name = "a_route_that_somebody_deletes_turns_converge_red";
    let Some(binaries) = mesh::enter_or_skip(name).unwrap() else { return };
    const PEERS: u16 = 50;
    let mut converged = Converged::form(&binaries, PEERS).unwrap();
    let resting = converged.begin_rest().unwrap();
    pass(Duration::from_secs(1)).unwrap();
    let calm = converged.end_rest(resting).unwrap();

    let host = converged.node.host.clone();
    let resting = converged.begin_rest().unwrap();
    let before = host.routes(MESH_TABLE).unwrap();
    host.delete_route(before[0].clone()).unwrap();
    wait::until_true("the agent to put it back", Duration::from_secs(5), || {
        Ok(host.routes(MESH_TABLE)?.len() == before.len())
    })
    .unwrap();
    let meddled = converged.end_rest(resting).unwrap();
    drop(converged);
    assert_eq!(calm.writes.len(), 0, "{:?}", calm.writes);
    assert!(meddled.writes.len() >= 2, "deleted and put back: {:?}", meddled.writes);
    // Whatever else a busy machine does to the figures.
    let judged = |writes: Vec<_>| {
        let rest = Rest { writes, rss_mib: 1.0, idle_cpu_percent: 0.0 };
        ConvergeReport::of(PEERS, Duration::from_millis(1), &rest).ok
    };
    assert!(judged(calm.writes) && !judged(meddled.writes));

    let output = bench(&["converge", "--peers", "20", "--seconds", "1", "--json"], &binaries.dir());
    let report = last_line(&output);
    assert_eq!(output.status.success(), report["ok"] == true, "{report}");
    assert_eq!((&report["peers"], &report["steady_netlink_writes"]), (&20.into(), &0.into()), "{report}");
    assert!(report["route_sync_ms"].as_f64().unwrap() > 0.0 && report["rss_mib"].as_f64().unwrap() > 1.0, "{report}");
}
