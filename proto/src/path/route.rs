//! The route that follows from the path that carries: where data goes, where else, and where handshakes go.

use mesh_common::time::Instant;

use crate::device::{Endpoint, PeerRoute};
use crate::path::agent::PathAgent;
use crate::path::candidate::RemoteKind;

impl PathAgent {
    pub(super) fn wanted_route(&self, now: Instant) -> PeerRoute {
        let relays: Vec<_> = self.available_relays(now).map(Endpoint::Relay).collect();
        let is_carried = self.is_live(now) && !relays.is_empty();
        if let Some(primary) = self.primary.filter(|_| self.attempt.is_none() || is_carried) {
            let primary = self.surer(primary, now);
            return PeerRoute { primary: Some(primary), second: self.second(now), handshake_fan_out: Vec::new() };
        }
        // A NAT must not be knocked at before its own side has opened it: with a relay, reflexive addresses wait for that.
        let is_greeted = |kind: RemoteKind, at: &Endpoint| {
            kind != RemoteKind::Reflexive || relays.is_empty() || self.is_trusted(*at, now)
        };
        let remotes = self.remotes.all().into_iter().map(|remote| (remote.kind, Endpoint::Direct(remote.addr)));
        let remotes = remotes.filter(|(kind, at)| is_greeted(*kind, at)).map(|(_, at)| at);
        let mut targets: Vec<Endpoint> = relays.iter().copied().chain(remotes).collect();
        let is_guess = |at: &Endpoint| targets.contains(at) && relays.is_empty() && Some(*at) != self.last_proven;
        let guess = self.route().primary.filter(is_guess);
        let primary = self.primary.map(|primary| self.surer(primary, now)).or(guess).or(targets.first().copied());
        if !self.device.several_endpoints {
            return PeerRoute { primary, ..PeerRoute::default() };
        }
        // Behind a NAT the endpoint that worked may be none that the peer knows of.
        targets.extend(self.last_proven.filter(|at| !targets.contains(at)));
        targets.retain(|at| Some(*at) != primary);
        PeerRoute { primary, second: None, handshake_fan_out: targets }
    }

    /// A device that sends to one place sends over the relay until the direct path is sure to carry.
    fn surer(&self, primary: Endpoint, now: Instant) -> Endpoint {
        let relay = self.best_relay(now).map(Endpoint::Relay);
        let needs_it = !self.device.several_endpoints && self.is_unsure(now);
        relay.filter(|_| needs_it).unwrap_or(primary)
    }

    /// Where data is sent as well.
    fn second(&self, now: Instant) -> Option<Endpoint> {
        let relay = self.best_relay(now).map(Endpoint::Relay);
        let second = if self.is_unsure(now) { relay } else { self.before.map(|before| before.endpoint) };
        second.filter(|second| self.sends_twice() && Some(*second) != self.primary)
    }
}
