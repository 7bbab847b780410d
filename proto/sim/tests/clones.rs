//! Frames of our own identity that come back from a server: our own, a former run's, and a clone's.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use mesh_proto::mesh::agent::OwnClaim;
use mesh_sim::calm::{Calm, plan};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// The node, its clone, and a third one.
const NODE: usize = 0;
const CLONE: usize = 1;
const OTHER: usize = 2;

/// The node and another one, a minute later its clone with a copy of its state directory. The clone's clock goes so much
/// later or earlier.
fn cloned(clock_ms: i64) -> Calm {
    let mut twin = plan(1, &[]);
    twin.seed = 99;
    twin.unix_ms = twin.unix_ms.checked_add_signed(clock_ms).unwrap();
    let mut mesh = Calm::new(vec![plan(1, &[]), twin, plan(2, &[])]);
    mesh.start(NODE);
    mesh.start(OTHER);
    mesh.run_for(MINUTE);
    mesh.hosts[CLONE].disk = mesh.hosts[NODE].disk.clone();
    mesh
}

/// The number and the instance of the node's record as the third node has it.
fn record(mesh: &Calm) -> (u64, [u8; 16]) {
    let agent = mesh.hosts[OTHER].agent.as_ref().unwrap();
    let member = agent.members().get(&mesh.hosts[NODE].node()).unwrap();
    (member.frame.seq(), member.record.instance)
}

#[test]
fn an_agent_alone_takes_its_own_record_for_what_it_is() {
    let mut mesh = cloned(0);
    mesh.run_for(MINUTE * 60);
    assert_eq!((mesh.puts(NODE), mesh.view(NODE).clone_seen), (1, false));
}

#[test]
fn clones_notice_each_other_at_once_whatever_their_clocks_say() {
    for clock_ms in [0, 3_600_000, -3_600_000] {
        let mut mesh = cloned(clock_ms);
        mesh.start(CLONE);
        mesh.run_for(SECOND * 3);
        assert!(mesh.view(NODE).clone_seen && mesh.view(CLONE).clone_seen, "clock {clock_ms}");
        assert!(!mesh.view(OTHER).clone_seen);
    }
}

#[test]
fn clones_do_not_outbid_each_other_at_the_speed_of_the_network() {
    let mut mesh = cloned(0);
    mesh.start(CLONE);
    let before = [NODE, CLONE].map(|host| mesh.puts(host));
    mesh.run_for(MINUTE * 30);
    let puts = [0, 1].map(|host| mesh.puts(host) - before[host]);
    assert!(puts.iter().all(|puts| (1..=62).contains(puts)), "puts in half an hour: {puts:?}");

    // Changes of the record are no way around it.
    let before = mesh.puts(NODE);
    for second in 0..60 {
        let prefix = format!("10.1.{second}.0/24").parse().unwrap();
        mesh.change_settings(NODE, |settings| settings.prefixes = [prefix].into());
        mesh.run_for(SECOND);
    }
    assert!(mesh.puts(NODE) - before <= 3, "{} puts in a minute", mesh.puts(NODE) - before);
}

#[test]
fn the_clone_that_is_left_is_the_one_that_members_know() {
    let mut mesh = cloned(0);
    mesh.start(CLONE);
    mesh.run_for(MINUTE * 2);
    for left in [NODE, CLONE] {
        mesh.kill(NODE + CLONE - left);
        mesh.run_for(SECOND * 31);
        assert_eq!(Some(record(&mesh).0), mesh.view(left).published_seq);
        mesh.start(NODE + CLONE - left);
        mesh.run_for(MINUTE);
    }
}

#[test]
fn a_restarted_agent_does_not_take_its_last_run_for_a_clone() {
    let mut mesh = cloned(0);
    for pause in [0, 1, 60, 600] {
        let before = record(&mesh);
        mesh.kill(NODE);
        mesh.run_for(SECOND * pause);
        mesh.start(NODE);
        mesh.run_for(MINUTE);
        let after = record(&mesh);
        assert!(after.0 > before.0 && after.1 != before.1, "away for {pause} s: members know the new run");
        assert!(!mesh.view(NODE).clone_seen, "away for {pause} s");
    }
}

#[test]
fn a_run_that_the_state_directory_forgot_is_outbid_and_no_clone() {
    // Clock and state directory both go back, with and without an address: then the record waits for the first snapshot.
    let claim = OwnClaim { addr: "198.19.0.9".parse().unwrap(), claimed_at_ms: 1 };
    for (clock_ms, claim) in [(0, None), (0, Some(claim)), (3_600_000, None)] {
        let mut mesh = cloned(0);
        let before = record(&mesh);
        mesh.kill(NODE);
        mesh.hosts[NODE].plan.unix_ms -= clock_ms;
        mesh.hosts[NODE].disk.last_seq = 1;
        mesh.hosts[NODE].disk.claim = claim;
        mesh.start(NODE);
        mesh.run_for(MINUTE);
        let after = record(&mesh);
        assert!(after.0 > before.0 && after.1 != before.1, "members know the new run");
        assert!(!mesh.view(NODE).clone_seen);
    }
}
