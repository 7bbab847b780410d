//! The difference between what should be and what is, as ordered steps.
//!
//! Applying the steps to a host that took them all leaves no difference, whatever damage it had. The order never opens a
//! leak: the floor and the rules stand before anything is routed, and go after the link.

use crate::device::{Action, Desired, MssClamp, Observed, Route, RouteKind};

/// Steps from `observed` to `desired`; empty when nothing differs.
pub fn reconcile(desired: &Desired, observed: &Observed) -> Vec<Action> {
    let mut actions = Vec::new();
    let wanted = |kinds: fn(&RouteKind) -> bool| {
        desired.routes.difference(&observed.routes).filter(move |route| kinds(&route.kind)).cloned()
    };
    let is_floor = |kind: &RouteKind| matches!(kind, RouteKind::Unreachable);
    let is_not_floor = |kind: &RouteKind| !matches!(kind, RouteKind::Unreachable);
    let unwanted: Vec<&Route> = observed.routes.difference(&desired.routes).collect();
    let (unwanted_floor, unwanted_routes): (Vec<&Route>, Vec<&Route>) =
        unwanted.into_iter().partition(|route| is_floor(&route.kind));

    actions.extend(wanted(is_floor).map(Action::AddRoute));
    actions.extend(desired.rules.difference(&observed.rules).map(|family| Action::AddRule(*family)));

    let changed = desired.loose_rp_filter.iter().filter(|name| !is_loose(observed, name));
    actions.extend(changed.map(|link| Action::LoosenRpFilter { link: link.clone() }));

    actions.extend(
        observed.peers.keys().filter(|key| !desired.peers.contains_key(*key)).map(|key| Action::RemovePeer(*key)),
    );
    if let (None, Some(link)) = (&desired.link, &observed.link) {
        actions.push(Action::DeleteLink { name: link.name.clone() });
    }
    actions.extend(unwanted_routes.into_iter().cloned().map(Action::RemoveRoute));
    if let Some(link) = &desired.link {
        match &observed.link {
            None => actions.push(Action::CreateLink(link.clone())),
            Some(current) if current.name != link.name || current.listen_port != link.listen_port => {
                actions.push(Action::DeleteLink { name: current.name.clone() });
                actions.push(Action::CreateLink(link.clone()));
            }
            Some(current) if current != link => actions.push(Action::UpdateLink(link.clone())),
            Some(_) => {}
        }
    }
    let differing = desired.peers.iter().filter(|(key, spec)| observed.peers.get(*key) != Some(*spec));
    actions.extend(differing.map(|(key, spec)| Action::SetPeer(*key, spec.clone())));
    match (desired.mss_clamp, observed.mss_clamp) {
        (true, MssClamp::Absent) => actions.push(Action::SetMssClamp),
        (false, MssClamp::Present) => actions.push(Action::RemoveMssClamp),
        _ => {}
    }
    actions.extend(wanted(is_not_floor).map(Action::AddRoute));

    let restored = observed.loosened.difference(&desired.loose_rp_filter);
    actions.extend(restored.map(|link| Action::RestoreRpFilter { link: link.clone() }));
    actions.extend(observed.rules.difference(&desired.rules).map(|family| Action::RemoveRule(*family)));
    actions.extend(unwanted_floor.into_iter().cloned().map(Action::RemoveRoute));
    actions
}

fn is_loose(observed: &Observed, name: &str) -> bool {
    observed.underlay.iter().any(|link| link.name == name && link.rp_filter != 1) && observed.loosened.contains(name)
}
