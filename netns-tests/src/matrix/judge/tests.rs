#![allow(clippy::unwrap_used)]
use std::net::SocketAddr;

use super::*;

const STEP: Duration = Duration::from_millis(5);
const RELAY_ROUND_TRIP: Duration = Duration::from_millis(80);
const LEFT: &str = "5.1.1.2:51872";
const RIGHT: &str = "5.2.1.2:51872";
const SERVER: &str = "5.0.0.2:7443";

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn passed(at: Instant, source: &str, destination: &str) -> Passed {
    Passed {
        at,
        transport: Transport::Udp,
        source: address(source),
        destination: address(destination),
        length: TUNNELLED,
        tunnel_data: true,
    }
}

/// An exchange of eight seconds: answered after 160 ms, relayed until the switch and copied for a second after it.
fn good(switch: Option<Duration>) -> Evidence {
    let start = Instant::now();
    let mut evidence = Evidence {
        beats: Vec::new(),
        tunnel: Vec::new(),
        relayed: Vec::new(),
        left: address(LEFT).ip(),
        seen_until: start + ms(8000),
    };
    for number in 0..1600u32 {
        let sent = start + STEP * number;
        let answered = (sent + ms(40)).max(start + ms(160));
        evidence.beats.push(Beat { sent, arrived: Some(sent + ms(20)), answered: Some(answered) });
        if switch.is_none_or(|switch| sent < start + switch + ms(1000)) {
            evidence.relayed.extend([passed(sent, LEFT, SERVER), passed(sent, SERVER, LEFT)]);
        }
        if switch.is_some_and(|switch| sent >= start + switch) {
            evidence.tunnel.extend([passed(sent, LEFT, RIGHT), passed(sent + ms(1), RIGHT, LEFT)]);
        }
    }
    evidence
}

fn red(evidence: &Evidence, expect: Expect, word: &str) {
    let verdict = evidence.judge(expect, RELAY_ROUND_TRIP);
    assert!(verdict.faults.iter().any(|fault| fault.contains(word)), "no {word:?} in {verdict:?}");
}

#[test]
fn a_switch_is_found_at_its_time() {
    let verdict = good(Some(ms(700))).judge(Expect::Direct, RELAY_ROUND_TRIP);
    assert_eq!(verdict.faults, [] as [String; 0]);
    assert_eq!((verdict.got, verdict.lost_on_switch), (Got::Direct, Some(0)));
    assert_eq!(verdict.first_byte, Some(ms(160)));
    assert_eq!(verdict.direct, Some(ms(701)));
    let relayed = good(None).judge(Expect::Relay, RELAY_ROUND_TRIP);
    assert_eq!((relayed.got, relayed.direct, relayed.lost_on_switch), (Got::Relay, None, None));
    assert_eq!(relayed.faults, [] as [String; 0]);
}

#[test]
fn a_pair_that_stays_on_the_relay_or_goes_back_is_not_direct() {
    red(&good(None), Expect::Direct, "not direct");
    let mut back = good(Some(ms(700)));
    let more: Vec<Passed> = back.beats.iter().map(|beat| passed(beat.sent, SERVER, LEFT)).collect();
    back.relayed = more;
    red(&back, Expect::Direct, "not direct");
    // One way only.
    let mut half = good(Some(ms(700)));
    half.tunnel.retain(|line| line.source == address(LEFT));
    half.relayed = half.beats.iter().map(|beat| passed(beat.sent, SERVER, LEFT)).collect();
    red(&half, Expect::Direct, "not direct");
}

#[test]
fn a_direct_flow_that_broke_off_counts_from_its_last_beginning() {
    let mut evidence = good(Some(ms(300)));
    let start = evidence.beats[0].sent;
    evidence.tunnel.retain(|line| !(start + ms(500)..start + ms(2000)).contains(&line.at));
    evidence.relayed = (0..500).map(|number| passed(start + STEP * number, SERVER, LEFT)).collect();
    let direct = evidence.judge(Expect::Direct, RELAY_ROUND_TRIP).direct.unwrap();
    assert!((ms(2000)..ms(2010)).contains(&direct), "{direct:?}");
}

#[test]
fn losses_near_the_switch_count_and_others_do_not() {
    let lose = |evidence: &mut Evidence, at: u64| {
        let place = (at / 5) as usize;
        evidence.beats[place].answered = None;
    };
    let mut evidence = good(Some(ms(3000)));
    lose(&mut evidence, 900);
    lose(&mut evidence, 5100);
    assert_eq!(evidence.judge(Expect::Direct, RELAY_ROUND_TRIP).lost_on_switch, Some(0));
    lose(&mut evidence, 1200);
    lose(&mut evidence, 4800);
    assert_eq!(evidence.judge(Expect::Direct, RELAY_ROUND_TRIP).lost_on_switch, Some(2));
    red(&evidence, Expect::Direct, "2 lost");
}

#[test]
fn slow_and_silent_pairs_are_red() {
    let mut slow = good(Some(ms(700)));
    let start = slow.beats[0].sent;
    for beat in &mut slow.beats {
        beat.answered = beat.answered.map(|at| at.max(start + ms(370)));
    }
    red(&slow, Expect::Direct, "the first byte took 370ms");
    red(&good(Some(ms(3300))), Expect::Direct, "direct after");
    assert!(good(Some(ms(3300))).judge(Expect::Relay, RELAY_ROUND_TRIP).faults.is_empty(), "a bonus has no bound");

    let mut silent = good(None);
    silent.beats.iter_mut().for_each(|beat| beat.answered = None);
    red(&silent, Expect::Relay, "no question was ever answered");
    assert_eq!(silent.judge(Expect::Relay, RELAY_ROUND_TRIP).got, Got::None);

    let mut fading = good(None);
    fading.beats.iter_mut().rev().take(20).for_each(|beat| beat.answered = None);
    red(&fading, Expect::Relay, "were answered");

    let mut in_clear = good(None);
    in_clear.relayed.clear();
    red(&in_clear, Expect::Relay, "neither between");
    assert_eq!(in_clear.judge(Expect::Relay, RELAY_ROUND_TRIP).got, Got::None);
}

#[test]
fn only_tunnelled_and_relayed_questions_count() {
    let now = Instant::now();
    let ends = [address(LEFT).ip(), address(RIGHT).ip()];
    assert!(is_tunnelled(&passed(now, RIGHT, LEFT), ends));
    assert!(!is_tunnelled(&passed(now, LEFT, SERVER), ends));
    assert!(!is_tunnelled(&Passed { length: 32, ..passed(now, LEFT, RIGHT) }, ends), "a keepalive is no data");
    assert!(!is_tunnelled(&Passed { tunnel_data: false, ..passed(now, LEFT, RIGHT) }, ends));
    let server = [address(SERVER).ip()];
    let relayed = Passed { length: TUNNELLED + 70, tunnel_data: false, ..passed(now, SERVER, LEFT) };
    assert!(may_be_relayed(&relayed, &server));
    assert!(!may_be_relayed(&Passed { length: 100, ..relayed }, &server));
    assert!(!may_be_relayed(&Passed { length: 1400, ..relayed }, &server));
    assert!(may_be_relayed(&Passed { length: 1400, transport: Transport::Tcp, ..relayed }, &server));
    assert!(!may_be_relayed(&passed(now, LEFT, RIGHT), &server));
}
