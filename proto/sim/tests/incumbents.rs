//! One prefix announced twice belongs to the live incumbent, ties to the smaller node id, the same everywhere and without
//! flapping.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;

use ipnet::IpNet;
use mesh_common::id::NodeId;
use mesh_common::limits::SLOT_TTL;
use mesh_sim::calm::{Calm, plan};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

fn prefix() -> IpNet {
    "10.99.0.0/16".parse().unwrap()
}

/// Hosts 0 and 1 announce the prefix, host 2 looks on.
fn plans() -> Calm {
    Calm::new(vec![plan(1, &[prefix()]), plan(2, &[prefix()]), plan(3, &[])])
}

/// Both are there, the first since ten minutes before the second.
fn contested(first: usize) -> Calm {
    let mut mesh = plans();
    mesh.start(2);
    mesh.start(first);
    mesh.run_for(MINUTE * 10);
    mesh.start(1 - first);
    mesh.run_for(MINUTE * 10);
    mesh
}

fn node(mesh: &Calm, host: usize) -> NodeId {
    mesh.hosts[host].node()
}

/// Every host that runs sees this owner, at every moment of this time.
fn assert_owner(mesh: &mut Calm, owner: usize, lasts: Duration, context: &str) {
    let (owner, end) = (node(mesh, owner), mesh.now + lasts);
    loop {
        assert_eq!(mesh.owners(prefix()), BTreeSet::from([Some(owner)]), "{context}, at {:?}", mesh.now.since_origin());
        if mesh.now >= end {
            return;
        }
        mesh.run_for(SECOND / 4);
    }
}

#[test]
fn the_first_owns_it_everywhere() {
    for first in [0, 1] {
        assert_owner(&mut contested(first), first, MINUTE, "nothing happens");
    }
}

#[test]
fn a_tie_goes_to_the_smaller_node_id() {
    let mut mesh = plans();
    for host in 0..3 {
        mesh.start(host);
    }
    mesh.run_for(SECOND * 3);
    let since = [0, 1].map(|host| mesh.hosts[host].disk.announced.since_ms[&prefix()]);
    assert_eq!(since[0], since[1], "this is a tie");
    let smaller = usize::from(node(&mesh, 1) < node(&mesh, 0));
    assert_owner(&mut mesh, smaller, MINUTE * 5, "tie");
}

#[test]
fn a_restart_of_either_changes_nothing() {
    for first in [0, 1] {
        let mut mesh = contested(first);
        for restarted in [first, 1 - first, first] {
            mesh.kill(restarted);
            assert_owner(&mut mesh, first, MINUTE, "one is away");
            mesh.start(restarted);
            // Until it has observed its host and heard of the others.
            mesh.run_for(SECOND / 10);
            assert_owner(&mut mesh, first, MINUTE * 5, "it is back");
        }
    }
}

#[test]
fn an_incumbent_that_restarts_right_after_its_rival_came_keeps_it() {
    let mut mesh = plans();
    mesh.start(2);
    mesh.start(0);
    mesh.run_for(MINUTE * 10);
    mesh.start(1);
    mesh.run_for(SECOND);
    mesh.kill(0);
    mesh.run_for(SECOND * 5);
    mesh.start(0);
    mesh.run_for(SECOND / 10);
    assert_owner(&mut mesh, 0, MINUTE, "after the restart");
}

#[test]
fn who_was_away_until_another_took_over_does_not_take_it_back() {
    for away in [SLOT_TTL + SECOND, MINUTE * 60 * 24 * 3] {
        let mut mesh = contested(0);
        mesh.kill(0);
        assert_owner(&mut mesh, 0, SLOT_TTL - SECOND, "the server lists it still");
        mesh.run_for(away - (SLOT_TTL - SECOND));
        assert_owner(&mut mesh, 1, SECOND, "the other one took over");
        mesh.start(0);
        mesh.run_for(SECOND / 10);
        assert_owner(&mut mesh, 1, MINUTE * 5, "the first is back");
    }
}

#[test]
fn who_left_comes_back_as_a_newcomer() {
    let mut mesh = contested(0);
    mesh.leave(0);
    assert_owner(&mut mesh, 1, SECOND, "it left");
    mesh.start(0);
    mesh.run_for(SECOND / 10);
    assert_owner(&mut mesh, 1, MINUTE, "it is back");
}

#[test]
fn a_prefix_that_was_taken_out_of_the_configuration_is_announced_anew() {
    let mut mesh = contested(0);
    mesh.kill(0);
    mesh.start(0);
    mesh.run_for(MINUTE);
    mesh.change_settings(0, |settings| settings.prefixes.clear());
    mesh.run_for(SECOND * 2);
    assert_owner(&mut mesh, 1, SECOND, "only one announces it");
    mesh.change_settings(0, |settings| settings.prefixes = [prefix()].into());
    mesh.run_for(SECOND * 2);
    assert_owner(&mut mesh, 1, MINUTE, "both announce it again");
    // Nor does a restart bring the old claim back.
    mesh.kill(0);
    mesh.start(0);
    mesh.run_for(SECOND * 2);
    assert_owner(&mut mesh, 1, MINUTE, "after a restart");
}

#[test]
fn addresses_of_the_host_keep_their_claim_over_a_restart() {
    let mut mesh = contested(0);
    let before = mesh.hosts[0].disk.announced.since_ms.clone();
    assert_eq!(before.len(), 2, "the prefix and the address");
    mesh.kill(0);
    mesh.start(0);
    mesh.run_for(MINUTE);
    assert_eq!(mesh.hosts[0].disk.announced.since_ms, before);
}

#[test]
fn a_prefix_that_nobody_else_wants_is_stored_once() {
    let mut mesh = plans();
    mesh.start(0);
    mesh.run_for(SECOND * 3);
    let stored_at = mesh.hosts[0].disk.announced.at_ms;
    mesh.run_for(MINUTE * 60);
    assert_eq!(mesh.hosts[0].disk.announced.at_ms, stored_at);
    mesh.start(1);
    mesh.run_for(MINUTE);
    assert!(mesh.hosts[0].disk.announced.at_ms > stored_at + 3_600_000);
}
