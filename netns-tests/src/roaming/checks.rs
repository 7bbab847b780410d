//! One function for each event. Each puts the nodes where it needs them, as a new cluster.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{gap, report::Outcome};
use crate::{
    matrix::pair::{Bench, LAST, Place, Watched, wait_ready},
    nat::{Kind, Ports, oracle::Pair, rules},
    proxy::Proxy,
    traffic::Chat,
    wait,
};

const PUNCHABLE: Pair = Pair::Apart(Kind::EimApdf, Kind::EimApdf);
/// No NAT kind has it easier with a relay: none of the two is ever direct.
const RELAYED: Pair = Pair::Apart(Kind::EdmApdf, Kind::EdmApdf);
const LEFT: Place = Place { site: 0, last: LAST[0] };
const RIGHT: Place = Place { site: 1, last: LAST[1] };
/// Beside left.
const SECOND: Place = Place { site: 0, last: 11 };
/// The site that left moves to.
const OTHER_SITE: usize = 2;
const PROXY_PORT: u16 = 3128;
/// Longer than a silent session with the server lives.
const SUSPENDED: Duration = Duration::from_secs(40);

/// DESIGN.md 8.
const DIRECT_DIES: Duration = Duration::from_secs(3);
const UPLINK_CHANGES: Duration = Duration::from_secs(5);
const CONNECTED_OVER_TCP: Duration = Duration::from_secs(2);
const DIRECT_P95: Duration = Duration::from_secs(3);

const DIRECT_WITHIN: Duration = Duration::from_secs(15);
const CARRIED_WITHIN: Duration = Duration::from_secs(10);
/// How long after the bound a pair is still waited for, to tell how late it was.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longer than a round trip by any path of the lab.
const UNDER_WAY: Duration = Duration::from_millis(400);

/// Only the path between the two outer addresses dies.
pub fn direct_cut_relay_up(bench: &mut Bench) -> Result<Outcome> {
    let watched = direct(bench)?;
    let ends = [(0, LAST[0]), (1, LAST[1])].map(|(site, last)| bench.world.sites[site].outer_address(last));
    let event = Instant::now();
    bench.world.cut_between(Some(ends))?;
    let outcome = recover(watched, event, DIRECT_DIES);
    bench.world.cut_between(None)?;
    outcome
}

/// Left is unplugged and plugged in behind another router, of another kind.
pub fn uplink_swap(bench: &mut Bench) -> Result<Outcome> {
    let watched = direct(bench)?;
    bench.world.sites[OTHER_SITE].become_kind(Kind::EimAdf, Ports::Kept, false)?;
    let event = Instant::now();
    bench.world.sites[OTHER_SITE].attach(&bench.nodes[0].host, LAST[0], false)?;
    recover(watched, event, UPLINK_CHANGES)
}

/// From the start of left's agent until right knows it; then traffic flows over the relay.
pub fn udp_blocked_start(bench: &mut Bench) -> Result<Outcome> {
    bench.place(&[Kind::UdpBlocked, Kind::EimApdf], &[LEFT, RIGHT])?;
    start_and_join(bench, CONNECTED_OVER_TCP)
}

/// A TCP connection through a direct tunnel, and UDP ends.
pub fn udp_blocked_midflight_tcp_survives(bench: &mut Bench) -> Result<Outcome> {
    let watched = direct(bench)?;
    let chat = Chat::start(&bench.nodes[0].host, &bench.nodes[1].host, bench.nodes[1].overlay_v4()?)?;
    wait::until_true("TCP to flow", CARRIED_WITHIN, || Ok(chat.answered().len() > 10))?;
    let event = Instant::now();
    bench.world.sites[LEFT.site].become_kind(Kind::UdpBlocked, Ports::Kept, false)?;
    let outcome = recover(watched, event, UPLINK_CHANGES)?;
    // TCP backs off while nothing comes through, so it notices later.
    let noticed = Instant::now();
    wait::until_true("TCP to flow again", PATIENCE, || Ok(chat.answered().last().is_some_and(|at| *at > noticed)))?;
    chat.stop().context("the TCP connection")?;
    Ok(outcome)
}

/// Left's router gets another address and forgets every mapping.
pub fn nat_rebind(bench: &mut Bench) -> Result<Outcome> {
    let watched = direct(bench)?;
    let event = Instant::now();
    bench.world.sites[LEFT.site].change_home_address(3)?;
    let outcome = recover(watched, event, UPLINK_CHANGES);
    bench.world.sites[LEFT.site].change_home_address(2)?;
    outcome
}

/// Left's agent does not run until its sessions and mappings have ended; the gap counts from its return.
pub fn suspend_resume(bench: &mut Bench) -> Result<Outcome> {
    let watched = direct(bench)?;
    bench.nodes[0].suspend()?;
    let start = Instant::now();
    wait::until_true("the suspension", SUSPENDED * 2, || Ok(start.elapsed() >= SUSPENDED))?;
    bench.world.sites[LEFT.site].reload()?;
    let event = Instant::now();
    bench.nodes[0].resume()?;
    recover(watched, event, UPLINK_CHANGES)
}

/// A pair that has nothing but the relay, and the server restarts.
pub fn relay_restart(bench: &mut Bench) -> Result<Outcome> {
    bench.arrange(RELAYED)?;
    let watched = carried(bench)?;
    let event = Instant::now();
    bench.server.stop()?;
    bench.server.start()?;
    recover(watched, event, UPLINK_CHANGES)
}

/// Two nodes behind one router that are told the same port move to ports of their own, keep them, and are direct with a
/// third. The gap is the longer time to direct.
pub fn same_port_behind_one_nat(bench: &mut Bench) -> Result<Outcome> {
    bench.place(&[Kind::EimApdf, Kind::EimApdf], &[LEFT, RIGHT, SECOND])?;
    bench.start_in_turn(3)?;
    let moved = bench.start_again_on_own_ports(3, [0, 2])?;
    bench.wait_until_idle(3)?;
    let mut outcome = Outcome { gap: Duration::ZERO, bound: DIRECT_P95, lost: 0 };
    for (node, place) in [(0, LEFT), (2, SECOND)] {
        let watched = bench.watch([node, 1], [place, RIGHT])?;
        let direct = watched.wait_direct(DIRECT_WITHIN);
        let evidence = watched.stop()?;
        direct.with_context(|| format!("{} with {}", bench.nodes[node].name(), bench.nodes[1].name()))?;
        let verdict = evidence.judge(PUNCHABLE.expect(), bench.world.relay_round_trip());
        outcome.gap = outcome.gap.max(verdict.direct.context("not direct")?);
        outcome.lost += verdict.lost_on_switch.unwrap_or_default();
    }
    for node in [0, 2] {
        bench.nodes[node].stop()?;
        bench.nodes[node].start()?;
    }
    let kept = bench.wait_for_own_ports([0, 2])?;
    ensure!(kept == moved, "after a restart the ports are {kept:?}, before they were {moved:?}");
    Ok(outcome)
}

/// Left's network lets nothing out but by an HTTP proxy.
pub fn connect_proxy(bench: &mut Bench) -> Result<Outcome> {
    bench.place(&[Kind::EimApdf, Kind::EimApdf], &[LEFT, RIGHT])?;
    let site = &bench.world.sites[LEFT.site];
    site.home.load_rules(&rules::proxy_only(PROXY_PORT))?;
    let proxy = Proxy::start(&site.home, SocketAddr::new(site.inner_address(1).into(), PROXY_PORT))?;
    let variables = ["HTTPS_PROXY", "https_proxy"];
    for name in variables {
        bench.nodes[0].environment.insert(name.to_owned(), format!("http://{}", proxy.address));
    }
    let outcome = start_and_join(bench, CONNECTED_OVER_TCP);
    bench.nodes[0].environment.clear();
    // The agent must not outlive its proxy: its environment names it.
    bench.nodes[0].stop()?;
    ensure!(proxy.carried() > 0 || outcome.is_err(), "nothing went through the proxy");
    outcome
}

/// A punchable pair with traffic over its direct path.
fn direct(bench: &mut Bench) -> Result<Watched> {
    bench.arrange(PUNCHABLE)?;
    let watched = bench.watch([0, 1], [LEFT, RIGHT])?;
    watched.wait_direct(DIRECT_WITHIN)?;
    Ok(watched)
}

/// A pair with traffic by any path.
fn carried(bench: &Bench) -> Result<Watched> {
    let watched = bench.watch([0, 1], [LEFT, RIGHT])?;
    wait_recovered(&watched, CARRIED_WITHIN)?;
    Ok(watched)
}

/// Right runs already when left starts.
fn start_and_join(bench: &mut Bench, bound: Duration) -> Result<Outcome> {
    bench.found_cluster()?;
    bench.nodes[1].start()?;
    wait_ready(&mut bench.nodes[1], 0)?;
    bench.nodes[0].start()?;
    let known = wait::until_true("right to know left", bound + PATIENCE, || {
        Ok(bench.nodes[1].status()?.peers.iter().any(|peer| peer.overlay_v4.is_some()))
    });
    let took = bench.nodes[0].explain(known)?;
    bench.wait_until_idle(2)?;
    let watched = carried(bench)?;
    let evidence = watched.stop()?;
    let first = evidence.beats.iter().find(|beat| !beat.lost()).context("nothing was answered")?.sent;
    Ok(Outcome { gap: took, bound, lost: gap::lost_since(&evidence.beats, first) })
}

fn recover(watched: Watched, event: Instant, bound: Duration) -> Result<Outcome> {
    // Whether it did is judged below, by what was seen.
    let recovered = wait_recovered_since(&watched, event, bound + PATIENCE);
    let end = Instant::now();
    let evidence = watched.stop()?;
    let outcome = Outcome {
        gap: gap::longest_gap(gap::answers(&evidence.beats), event, end),
        bound,
        lost: gap::lost_since(&evidence.beats, event),
    };
    recovered.with_context(|| format!("after {:?} without an answer", outcome.gap))?;
    Ok(outcome)
}

fn wait_recovered(watched: &Watched, within: Duration) -> Result<()> {
    wait_recovered_since(watched, Instant::now(), within)
}

/// All questions of one second after `since` were answered.
fn wait_recovered_since(watched: &Watched, since: Instant, within: Duration) -> Result<()> {
    wait::until_true("every question of a second to be answered", within, || {
        let beats = watched.beats();
        let after: Vec<_> = beats.into_iter().filter(|beat| beat.sent >= since).collect();
        let long_enough = since.elapsed() > gap::RECOVERED + UNDER_WAY;
        Ok(long_enough && gap::has_recovered(&after, UNDER_WAY))
    })
    .map(drop)
}
