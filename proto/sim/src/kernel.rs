//! The model of a host's kernel: our link, table 818, the rules, and the reverse path filter.
//!
//! Applies the real agent's steps and answers what it then observes. Semantics are Linux's: the longest prefix decides, then
//! the smallest metric; deleting a link takes its routes along; a packet from the underlay is dropped when the route back to
//! its source leads elsewhere (strict), or to no device at all (loose: `unreachable` fails the lookup).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_common::allowed_ips::AllowedIps;
use mesh_common::key::WgPublicKey;
use mesh_proto::device::{Action, Family, Gateway, Link, MssClamp, Observed, PeerSpec, Route, RouteKind, UnderlayLink};
use mesh_proto::mesh::agent::StepError;

/// Where a packet without a mark goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Mesh,
    Unreachable,
    Underlay,
}

#[derive(Debug, Default)]
pub struct Kernel {
    pub link: Option<Link>,
    pub routes: BTreeSet<Route>,
    pub rules: BTreeSet<Family>,
    pub underlay: Vec<UnderlayLink>,
    /// The router on its way to the Internet.
    pub gateway: Option<Gateway>,
    /// With the value before.
    loosened: BTreeMap<String, u8>,
    pub mss_clamp: MssClamp,
    /// rp_filter may not be written here.
    pub rp_filter_read_only: bool,
    /// Table 818 by prefix, made anew after a change.
    table: Option<AllowedIps<Decision>>,
}

impl Kernel {
    pub fn new(underlay: Vec<UnderlayLink>, rp_filter_read_only: bool) -> Self {
        Self { underlay, rp_filter_read_only, ..Self::default() }
    }

    /// One step; peers are the engine's and not handled here.
    pub fn apply(&mut self, action: &Action) -> Result<(), StepError> {
        self.table = None;
        match action {
            Action::CreateLink(link) => {
                self.delete_link();
                self.link = Some(link.clone());
            }
            Action::UpdateLink(link) => match &mut self.link {
                Some(current) => *current = link.clone(),
                None => return Err(step_error("there is no interface to update")),
            },
            Action::DeleteLink { name } => {
                if self.link.as_ref().is_some_and(|link| link.name == *name) {
                    self.delete_link();
                }
            }
            Action::AddRoute(route) => {
                if matches!(route.kind, RouteKind::Dev { .. }) {
                    if self.link.is_none() {
                        return Err(step_error("there is no interface to route to"));
                    }
                    self.routes
                        .retain(|other| other.prefix != route.prefix || !matches!(other.kind, RouteKind::Dev { .. }));
                }
                self.routes.insert(route.clone());
            }
            Action::RemoveRoute(route) => {
                self.routes.remove(route);
            }
            Action::AddRule(family) => {
                self.rules.insert(*family);
            }
            Action::RemoveRule(family) => {
                self.rules.remove(family);
            }
            Action::LoosenRpFilter { link } => {
                if self.rp_filter_read_only {
                    return Err(StepError { text: "rp_filter is read-only here".into(), not_permitted: true });
                }
                let before = self.set_rp_filter(link, 2);
                self.loosened.entry(link.clone()).or_insert(before);
            }
            Action::RestoreRpFilter { link } => {
                if let Some(before) = self.loosened.remove(link) {
                    self.set_rp_filter(link, before);
                }
            }
            Action::SetMssClamp => self.mss_clamp = MssClamp::Present,
            Action::RemoveMssClamp => self.mss_clamp = MssClamp::Absent,
            Action::SetPeer(..) | Action::RemovePeer(_) => {}
        }
        Ok(())
    }

    /// The link goes, and its routes with it. The floor stays.
    pub fn delete_link(&mut self) {
        self.link = None;
        self.routes.retain(|route| !matches!(route.kind, RouteKind::Dev { .. }));
        self.table = None;
    }

    /// Damage from outside: removes the routes that `chosen` picks.
    pub fn lose_routes(&mut self, mut chosen: impl FnMut(&Route) -> bool) {
        self.routes.retain(|route| !chosen(route));
        self.table = None;
    }

    /// Damage from outside: somebody else's route in our table.
    pub fn add_foreign_route(&mut self, prefix: IpNet, metric: u32) {
        self.routes.insert(Route {
            prefix,
            kind: RouteKind::Foreign { metric, description: format!("{prefix} dev eth0 metric {metric}") },
        });
        self.table = None;
    }

    pub fn observe(&self, peers: BTreeMap<WgPublicKey, PeerSpec>) -> Observed {
        Observed {
            link: self.link.clone(),
            peers,
            routes: self.routes.clone(),
            rules: self.rules.clone(),
            underlay: self.underlay.clone(),
            gateway: self.gateway,
            loosened: self.loosened.keys().cloned().collect(),
            mss_clamp: self.mss_clamp,
        }
    }

    /// Where an application's packet goes.
    pub fn decide(&mut self, destination: IpAddr) -> Decision {
        if !self.rules.contains(&Family::of(destination)) {
            return Decision::Underlay;
        }
        let routes = &self.routes;
        let table = self.table.get_or_insert_with(|| table_of(routes));
        table.lookup(destination).copied().unwrap_or(Decision::Underlay)
    }

    /// Whether a packet from this source, come in by this underlay link, passes the reverse path filter.
    pub fn accepts(&mut self, link: &str, source: IpAddr) -> bool {
        let filter =
            self.underlay.iter().find(|underlay| underlay.name == link).map_or(0, |underlay| underlay.rp_filter);
        // IPv6 has no such filter.
        if filter == 0 || source.is_ipv6() {
            return true;
        }
        match self.decide(source) {
            Decision::Underlay => true,
            Decision::Mesh => filter == 2,
            Decision::Unreachable => false,
        }
    }

    /// Gives the value before.
    fn set_rp_filter(&mut self, name: &str, value: u8) -> u8 {
        let link = self.underlay.iter_mut().find(|link| link.name == name);
        link.map_or(0, |link| std::mem::replace(&mut link.rp_filter, value))
    }
}

fn table_of(routes: &BTreeSet<Route>) -> AllowedIps<Decision> {
    let mut best: BTreeMap<IpNet, (u32, Decision)> = BTreeMap::new();
    for route in routes {
        let (metric, decision) = match &route.kind {
            RouteKind::Dev { .. } => (RouteKind::DEV_METRIC, Decision::Mesh),
            RouteKind::Unreachable => (RouteKind::FLOOR_METRIC, Decision::Unreachable),
            RouteKind::Throw => (RouteKind::DEV_METRIC + 1, Decision::Underlay),
            RouteKind::Foreign { metric, .. } => (*metric, Decision::Underlay),
        };
        let entry = best.entry(route.prefix).or_insert((metric, decision));
        if metric < entry.0 {
            *entry = (metric, decision);
        }
    }
    best.into_iter().map(|(prefix, (_, decision))| (prefix, decision)).collect()
}

fn step_error(text: &str) -> StepError {
    StepError { text: text.to_owned(), not_permitted: false }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn route(prefix: &str, kind: RouteKind) -> Action {
        Action::AddRoute(Route { prefix: prefix.parse().unwrap(), kind })
    }

    fn dev() -> RouteKind {
        RouteKind::Dev { mtu: None, source: None }
    }

    fn kernel(rp_filter: u8) -> Kernel {
        let eth0 = UnderlayLink {
            name: "eth0".into(),
            addresses: vec!["192.0.2.1/24".parse().unwrap()],
            rp_filter,
            virtual_kind: None,
        };
        let link = Link { name: "mesh0".into(), mtu: 1420, listen_port: 51872, addresses: BTreeSet::new() };
        let mut kernel = Kernel::new(vec![eth0], false);
        for action in [
            Action::AddRule(Family::V4),
            Action::CreateLink(link),
            route("10.0.0.0/8", dev()),
            route("10.0.0.0/8", RouteKind::Unreachable),
            route("10.1.0.0/16", RouteKind::Throw),
            route("10.2.0.0/16", RouteKind::Unreachable),
        ] {
            kernel.apply(&action).unwrap();
        }
        kernel
    }

    #[test]
    fn the_longest_prefix_decides_then_the_smallest_metric() {
        let mut kernel = kernel(0);
        let mut decide = |addr: &str| kernel.decide(addr.parse().unwrap());
        assert_eq!(decide("10.3.0.1"), Decision::Mesh);
        assert_eq!(decide("10.1.0.1"), Decision::Underlay);
        assert_eq!(decide("10.2.0.1"), Decision::Unreachable);
        assert_eq!(decide("8.8.8.8"), Decision::Underlay);
        kernel.delete_link();
        assert_eq!(kernel.decide("10.3.0.1".parse().unwrap()), Decision::Unreachable);
        assert!(kernel.apply(&route("10.0.0.0/8", dev())).is_err(), "no link, no route to it");
        kernel.apply(&Action::RemoveRule(Family::V4)).unwrap();
        assert_eq!(kernel.decide("10.3.0.1".parse().unwrap()), Decision::Underlay);
    }

    #[test]
    fn the_reverse_path_filter_looks_at_table_818_as_linux_does() {
        for (filter, mesh, unreachable) in [(0, true, true), (1, false, false), (2, true, false)] {
            let mut kernel = kernel(filter);
            let mut accepts = |addr: &str| kernel.accepts("eth0", addr.parse().unwrap());
            assert!(accepts("192.0.2.9"));
            assert_eq!(accepts("10.3.0.1"), mesh, "rp_filter {filter}");
            assert_eq!(accepts("10.2.0.1"), unreachable, "rp_filter {filter}");
        }
    }
}
