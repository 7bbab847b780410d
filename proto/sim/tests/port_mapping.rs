//! A hard pair whose one router leads ports on request. A complaint names its seed.
#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;
use std::time::Duration;

use mesh_proto::net::port_mapping::MappingProtocol;
use mesh_proto::path::agent::PathPolicy;
use mesh_sim::campaign::complaint;
use mesh_sim::internet::RouterId;
use mesh_sim::nat::NatKind;
use mesh_sim::oracle;
use mesh_sim::paths::plan::{Plan, class_pairs};
use mesh_sim::paths::port_mapping::{Manner, PlannedMapper};
use mesh_sim::paths::{self, Options, Outcome};

const RUNS: usize = 12;
/// No other way than a port of the router: none is guessed.
fn policy() -> PathPolicy {
    PathPolicy { guess_ports: false, ..PathPolicy::default() }
}

/// Seeds of this pair of classes with one router on the side that changes its ports, IPv4 and UDP. The router, too.
fn plans(classes: [&str; 2], routers: usize) -> impl Iterator<Item = (u64, Plan, RouterId)> {
    let classes = classes.map(|name| NatKind::all().find(|kind| kind.name() == name).unwrap());
    let pairs = class_pairs();
    let (place, count) = (pairs.iter().position(|pair| *pair == classes).unwrap(), pairs.len());
    (0..4000).map(move |turn| (place + turn * count) as u64).filter_map(move |seed| {
        let plan = Plan::new(seed);
        let sides: Vec<_> = plan.hosts.iter().map(|host| host.uplinks[0].side(&plan.internet)).collect();
        let has_udp = sides.iter().all(|side| side.routers.iter().all(|hop| !hop.blocks_udp));
        let hard = plan.internet.routers_before(plan.hosts[1].uplinks[0].network);
        let is_fitting = !plan.is_troubled
            && plan.fault.is_none()
            && plan.hosts.len() == 2
            && has_udp
            && hard.len() == routers
            && !sides[1].routers[0].renumbers
            && !sides.iter().all(|side| side.has_v6)
            && !oracle::must_be_direct(&sides[0], &sides[1]);
        let router = *hard.first()?;
        is_fitting.then_some((seed, plan, router))
    })
}

fn run(seed: u64, mut plan: Plan, mapper: PlannedMapper) -> Outcome {
    plan.mappers.push(mapper);
    paths::run_plan(plan, Options { seed, policy: policy(), traces: false })
}

fn mapper(router: RouterId, manner: Manner) -> PlannedMapper {
    let lifetime = Duration::from_secs(3600);
    PlannedMapper { router, protocol: MappingProtocol::Pcp, lifetime, manner, restarts: None }
}

const HARD: [&str; 2] = ["eim-apdf", "apdm-apdf"];

#[test]
fn a_hard_pair_is_direct_through_a_port_of_the_router() {
    for protocol in MappingProtocol::ALL {
        for lifetime in [Duration::from_secs(20), Duration::from_secs(3600)] {
            for (seed, plan, router) in plans(HARD, 1).take(RUNS) {
                let outcome = run(seed, plan, PlannedMapper { protocol, lifetime, ..mapper(router, Manner::Honest) });
                assert_eq!(complaint(&outcome), None);
                let direct = outcome.to_direct;
                assert!(
                    outcome.was_direct && direct.is_some_and(|at| at < Duration::from_secs(3)),
                    "{seed}: {direct:?}"
                );
            }
        }
    }
}

#[test]
fn a_router_that_refuses_hangs_or_lies_changes_nothing_and_nobody_else_is_written_to() {
    let lies = ["198.51.103.77", "100.64.0.77", "192.168.9.9", "127.0.0.1", "224.0.0.5", "0.0.0.0"];
    let lies = lies.map(|address| Manner::Lies(address.parse::<Ipv4Addr>().unwrap()));
    for manner in [Manner::Refuses, Manner::Hangs].into_iter().chain(lies) {
        for (seed, plan, router) in plans(HARD, 1).take(RUNS / 2) {
            let outcome = run(seed, plan, mapper(router, manner));
            assert_eq!(complaint(&outcome), None, "{manner:?}");
            assert!(!outcome.was_direct, "{manner:?}, seed {seed}: by what way?");
        }
    }
}

#[test]
fn behind_two_routers_a_port_of_the_inner_one_is_announced_to_nobody() {
    let mut runs = 0;
    for (seed, plan, router) in plans(HARD, 2).take(RUNS) {
        let outcome = run(seed, plan, mapper(router, Manner::Honest));
        assert_eq!(complaint(&outcome), None);
        runs += 1;
    }
    assert!(runs > RUNS / 2);
}

#[test]
fn a_router_that_restarts_and_forgets_is_asked_again() {
    let mut runs = 0;
    for (seed, plan, router) in plans(HARD, 1).filter(|(_, plan, _)| plan.resume_at.is_some()).take(RUNS) {
        // While nobody talks, so that nothing but the clock tells of it.
        let restarts = Some(plan.quiet_at + Duration::from_secs(20));
        let lifetime = Duration::from_secs(40);
        let outcome = run(seed, plan, PlannedMapper { lifetime, restarts, ..mapper(router, Manner::Honest) });
        assert_eq!(complaint(&outcome), None);
        runs += 1;
    }
    assert!(runs > RUNS / 2);
}
