//! The difference between desired and observed, applied to the model kernel: whatever the damage, it converges, it stays
//! converged, and no step on the way opens a leak.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use mesh_common::key::WgPublicKey;
use mesh_proto::device::{Action, Desired, Family, Link, MssClamp, Observed, PeerSpec, Route, RouteKind, UnderlayLink};
use mesh_proto::mesh::reconcile::reconcile;
use mesh_sim::kernel::{Decision, Kernel};
use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;

/// A kernel with peers: what the engine holds on a real host.
#[derive(Debug)]
struct Machine {
    kernel: Kernel,
    peers: BTreeMap<WgPublicKey, PeerSpec>,
}

impl Machine {
    fn apply(&mut self, action: &Action) {
        match action {
            Action::CreateLink(_) | Action::DeleteLink { .. } => self.peers.clear(),
            Action::SetPeer(key, spec) => {
                self.peers.insert(*key, spec.clone());
            }
            Action::RemovePeer(key) => {
                self.peers.remove(key);
            }
            _ => {}
        }
        // A route to a link that is gone fails, and is a fact for the next round.
        let _failed = self.kernel.apply(action);
    }

    fn observe(&self) -> Observed {
        self.kernel.observe(self.peers.clone())
    }
}

fn prefix() -> impl Strategy<Value = IpNet> {
    (0u8..12, any::<bool>()).prop_map(|(number, v4)| {
        let text = if v4 { format!("10.{number}.0.0/16") } else { format!("fd00:{number}::/32") };
        text.parse().unwrap()
    })
}

fn link() -> impl Strategy<Value = Link> {
    (prop_oneof![Just("mesh0"), Just("mesh1")], 1280u16..1283, 51872u16..51874).prop_map(|(name, mtu, listen_port)| {
        Link { name: name.into(), mtu, listen_port, addresses: BTreeSet::from(["198.19.0.1/32".parse().unwrap()]) }
    })
}

fn peers() -> impl Strategy<Value = BTreeMap<WgPublicKey, PeerSpec>> {
    btree_map(0u8..6, (btree_set(prefix(), 0..3), 0u64..3), 0..5).prop_map(|peers| {
        let peer = |(key, (allowed_ips, generation))| {
            let spec = PeerSpec { preshared_key: None, allowed_ips, keepalive: None, generation };
            (WgPublicKey([key; 32]), spec)
        };
        peers.into_iter().map(peer).collect()
    })
}

fn route(prefix: IpNet, kind: RouteKind) -> Route {
    Route { prefix, kind }
}

fn dev() -> RouteKind {
    RouteKind::Dev { mtu: None, source: None }
}

/// In forced mode: a floor below every prefix, some of them with a device route.
fn desired() -> impl Strategy<Value = Desired> {
    (link(), peers(), btree_map(prefix(), any::<bool>(), 0..10), any::<bool>()).prop_map(
        |(link, peers, prefixes, loose)| {
            let floor = prefixes.keys().map(|prefix| route(*prefix, RouteKind::Unreachable));
            let up = prefixes.iter().filter(|(_, up)| **up).map(|(prefix, _)| route(*prefix, dev()));
            Desired {
                link: Some(link),
                peers,
                routes: floor.chain(up).collect(),
                rules: Family::ALL.into(),
                loose_rp_filter: loose.then(|| "eth0".to_owned()).into_iter().collect(),
                mss_clamp: true,
            }
        },
    )
}

/// Any state that a host may be found in.
fn machine() -> impl Strategy<Value = Machine> {
    let kind = prop_oneof![
        Just(dev()),
        Just(RouteKind::Unreachable),
        Just(RouteKind::Throw),
        Just(RouteKind::Foreign { metric: 5, description: "somebody's".into() })
    ];
    let routes = btree_set((prefix(), kind).prop_map(|(prefix, kind)| route(prefix, kind)), 0..12);
    let rules = btree_set(prop_oneof![Just(Family::V4), Just(Family::V6)], 0..3);
    (proptest::option::of(link()), peers(), routes, rules, 0u8..3).prop_map(
        |(link, peers, routes, rules, rp_filter)| {
            let eth0 = UnderlayLink {
                name: "eth0".into(),
                addresses: vec!["192.0.2.1/24".parse().unwrap()],
                rp_filter,
                virtual_kind: None,
            };
            let mut kernel = Kernel::new(vec![eth0], false);
            kernel.link = link;
            kernel.routes = routes;
            kernel.rules = rules;
            if kernel.link.is_none() {
                kernel.delete_link();
            }
            let peers = if kernel.link.is_some() { peers } else { BTreeMap::new() };
            Machine { kernel, peers }
        },
    )
}

/// Rounds until nothing differs; every round begins with a fresh look, as the agent's do.
fn converge(machine: &mut Machine, desired: &Desired) -> usize {
    for round in 0..5 {
        let steps = reconcile(desired, &machine.observe());
        if steps.is_empty() {
            return round;
        }
        for step in &steps {
            machine.apply(step);
        }
    }
    5
}

proptest! {
    #[test]
    fn any_damage_is_repaired_and_nothing_is_done_twice(mut machine in machine(), desired in desired()) {
        let rounds = converge(&mut machine, &desired);
        prop_assert!(rounds <= 3, "{rounds} rounds");
        let observed = machine.observe();
        prop_assert_eq!(&observed.link, &desired.link);
        prop_assert_eq!(&observed.routes, &desired.routes);
        prop_assert_eq!(&observed.rules, &desired.rules);
        prop_assert_eq!(&observed.peers, &desired.peers);
        prop_assert_eq!(observed.mss_clamp, MssClamp::Present);
    }

    #[test]
    fn steps_are_idempotent(mut machine in machine(), desired in desired()) {
        let steps = reconcile(&desired, &machine.observe());
        for step in &steps {
            machine.apply(step);
            let once = machine.observe();
            // Making a link anew empties it by design.
            if !matches!(step, Action::CreateLink(_)) {
                machine.apply(step);
                prop_assert_eq!(&once, &machine.observe(), "{:?}", step);
            }
        }
    }

    #[test]
    fn a_guarded_prefix_never_takes_the_underlay_on_the_way(mut machine in machine(), from in desired(), to in desired()) {
        converge(&mut machine, &from);
        let prefixes = |desired: &Desired| desired.routes.iter().map(|route| route.prefix).collect::<BTreeSet<_>>();
        let kept: Vec<IpNet> = prefixes(&from).intersection(&prefixes(&to)).copied().collect();
        for _ in 0..3 {
            for step in reconcile(&to, &machine.observe()) {
                machine.apply(&step);
                for prefix in &kept {
                    let decision = machine.kernel.decide(prefix.network());
                    prop_assert_ne!(decision, Decision::Underlay, "{} after {:?}", prefix, step);
                }
            }
        }
    }

    #[test]
    fn a_new_prefix_has_its_floor_and_rule_before_its_device_route(mut machine in machine(), desired in desired()) {
        machine.kernel.rules.clear();
        for step in reconcile(&desired, &machine.observe()) {
            if let Action::AddRoute(Route { prefix, kind: RouteKind::Dev { .. } }) = &step {
                prop_assert!(machine.kernel.routes.contains(&route(*prefix, RouteKind::Unreachable)));
                prop_assert_eq!(&machine.kernel.rules, &BTreeSet::from(Family::ALL));
            }
            machine.apply(&step);
        }
    }

    #[test]
    fn wanting_nothing_leaves_nothing_and_touches_nothing_else(mut machine in machine(), desired in desired()) {
        let underlay = machine.kernel.underlay.clone();
        converge(&mut machine, &desired);
        converge(&mut machine, &Desired::default());
        let observed = machine.observe();
        prop_assert_eq!(observed, Observed { underlay, ..Observed::default() });
    }
}
