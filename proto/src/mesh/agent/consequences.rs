//! From facts to consequences: peers and their paths, our overlay address, the desired state, and the steps towards it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use mesh_common::addr::Claim;
use mesh_common::key::WgPublicKey;
use mesh_common::limits::{FIRST_SNAPSHOT_WAIT, RECONCILE_INTERVAL};
use mesh_common::time::Instant;

use super::guessing::turn_of;
use super::{Agent, AgentEvent, ORPHAN_FLOOR_WAIT, OwnClaim, RETRY_FAILED_STEPS, is_down};
use crate::device::{Desired, Endpoint, Observed, PeerRoute};
use crate::mesh::desired::Inputs;
use crate::mesh::peer::{self, Peer, Surroundings};
use crate::mesh::reconcile::reconcile;
use crate::mesh::settings::StaticPeer;
use crate::path::agent::PathAgent;

impl Agent {
    /// From all facts to all consequences: peers, paths, desired state, steps, our own record.
    pub(super) fn work_out(&mut self, now: Instant) {
        if self.leaving.is_none() {
            self.resolve_overlay_v4(now);
            self.peers = self.judge_peers(now);
            self.store_announced_if_contested(now);
            self.sync_paths(now);
            self.move_from_shared_port(now);
        }
        self.reconcile(now);
        self.publish_if_changed(now);
    }

    /// From peers, paths and what is on the host to the steps that it still needs.
    pub(super) fn reconcile(&mut self, now: Instant) {
        self.down = self.paths.iter().filter(|(_, path)| is_down(path.state(now))).map(|(key, _)| *key).collect();
        if self.applying || self.retry_at.is_some() {
            return;
        }
        let desired = match &self.observed {
            None => return,
            Some(_) if self.leaving.is_some() => Desired::default(),
            Some(observed) => {
                let desired = self.desired(observed);
                self.with_orphan_floor(desired, now)
            }
        };
        let steps = self.observed.as_ref().map(|observed| reconcile(&desired, observed)).unwrap_or_default();
        if !steps.is_empty() && self.last_steps.replace(steps.clone()).as_ref() == Some(&steps) {
            // Done without an error and without effect: somebody undoes them, or this host does not take them.
            self.retry_at = Some(now + self.retry_pause);
            self.retry_pause = (self.retry_pause * 2).min(RECONCILE_INTERVAL);
            self.last_steps = None;
        } else if steps.is_empty() {
            // What failed is not wanted any more.
            self.failed.clear();
            self.last_steps = None;
            self.retry_pause = RETRY_FAILED_STEPS;
        } else {
            self.applying = true;
            self.events.push_back(AgentEvent::Apply(steps));
        }
    }

    fn desired(&self, observed: &Observed) -> Desired {
        Inputs {
            settings: &self.settings,
            preshared_keys: &self.preshared_keys,
            overlay_v6: self.overlay_v6(),
            overlay_v4: self.overlay_v4(),
            peers: &self.peers,
            tunnels: &self.paths.iter().map(|(key, path)| (*key, path.tunnel_generation())).collect(),
            mtus: &self.paths.iter().filter_map(|(key, path)| Some((*key, path.mtu()?))).collect(),
            down: &self.down,
            underlay: &observed.underlay,
            loosened: &observed.loosened,
            rp_filter_denied: &self.rp_filter_denied,
        }
        .desired()
    }

    /// A floor of the last run that no member accounts for stays until members had time to show up: the cache may have been
    /// lost in a crash, and a server that restarted lists only those who found it again.
    fn with_orphan_floor(&mut self, mut desired: Desired, now: Instant) -> Desired {
        if self.synced_at.is_some_and(|at| now.since(at) >= ORPHAN_FLOOR_WAIT) {
            self.orphan_floor.clear();
        }
        // A floor that has a member again goes with it.
        self.orphan_floor.retain(|route| !desired.routes.contains(route));
        desired.routes.extend(self.orphan_floor.iter().cloned());
        desired
    }

    fn judge_peers(&self, now: Instant) -> Vec<Peer> {
        self.surroundings(now).peers()
    }

    /// What peers are judged by.
    pub(super) fn surroundings(&self, now: Instant) -> Surroundings<'_> {
        Surroundings {
            settings: &self.settings,
            members: &self.members,
            own: self.identity.node_id(),
            own_overlay_v4: self.own_claim(),
            own_prefixes: &self.own_prefixes,
            underlay: self.underlay(),
            rp_filter_denied: &self.rp_filter_denied,
            taken_sockets: self.taken_sockets(),
            now,
        }
    }

    /// One path agent a member, one route a static peer.
    fn sync_paths(&mut self, now: Instant) {
        let keys: BTreeSet<WgPublicKey> = self.peers.iter().map(|peer| peer.key).collect();
        self.keep_paths(|key| keys.contains(key), now);
        self.preshared_keys.retain(|(key, _), _| keys.contains(key));
        let own = (self.identity.node_id(), self.wg_public);
        for peer in &self.peers {
            self.preshared_keys
                .entry((peer.key, peer.node))
                .or_insert_with(|| self.keys.pair_psk(own, (peer.node, peer.key)));
            let is_new = self.paths.add(peer.key, || PathAgent::new(self.random.next_u64(), self.path_policy));
            let turn = turn_of(&peer.key, self.guessing_turns);
            let device = self.device;
            self.paths.with(&peer.key, |path| {
                path.handle_device(device, now);
                if is_new {
                    path.handle_guessing_turn(turn, now);
                }
                path.handle_candidates(&peer.candidates, now);
                path.handle_instance(peer.instance, now);
            });
        }
        self.sync_probing(now);
        let statics: BTreeMap<WgPublicKey, &StaticPeer> =
            self.settings.static_peers.iter().map(|peer| (peer.public_key, peer)).collect();
        self.static_routes.retain(|key, _| statics.contains_key(key));
        for (key, peer) in statics {
            self.static_routes.entry(key).or_insert_with(|| {
                let route = PeerRoute { primary: peer.endpoint.map(Endpoint::Direct), ..PeerRoute::default() };
                self.events.push_back(AgentEvent::SetRoute(key, route.clone()));
                route
            });
        }
    }

    /// Takes an overlay IPv4 address when it is time to, and another one when an older claim holds ours.
    fn resolve_overlay_v4(&mut self, now: Instant) {
        let own = self.identity.node_id();
        let is_held = |claim: &OwnClaim| {
            let ours = Claim { claimed_at_ms: claim.claimed_at_ms, node: own };
            self.members.iter().filter(|(_, member)| member.is_live(now)).any(|(node, member)| {
                member.record.overlay_v4.is_some_and(|theirs| {
                    theirs.addr == claim.addr && Claim { claimed_at_ms: theirs.claimed_at_ms, node: *node } < ours
                })
            })
        };
        let pool = self.settings.overlay_v4_pool;
        match self.publisher.claim.filter(|claim| pool.contains(&claim.addr)) {
            Some(claim) if !is_held(&claim) => return,
            Some(claim) => {
                tracing::warn!(addr = %claim.addr, "an older claim holds our overlay IPv4 address: taking another")
            }
            None => {}
        }
        if !self.may_claim(now) {
            self.work_out_at(self.started.0 + FIRST_SNAPSHOT_WAIT);
            return;
        }
        let chosen = peer::choose_overlay_v4(pool, &self.members, &own, now);
        self.publisher.claim = chosen.map(|addr| OwnClaim { addr, claimed_at_ms: self.unix_ms(now) });
        if let Some(claim) = self.publisher.claim {
            tracing::info!(addr = %claim.addr, "took an overlay IPv4 address");
            self.events.push_back(AgentEvent::StoreClaim(claim));
        }
    }

    /// Whether enough is known of others to take an address.
    pub(super) fn may_claim(&self, now: Instant) -> bool {
        self.synced_at.is_some() || self.clients.is_empty() || now.since(self.started.0) >= FIRST_SNAPSHOT_WAIT
    }

    pub(super) fn own_claim(&self) -> Option<(Ipv4Addr, Claim)> {
        let claim = self.publisher.claim?;
        Some((claim.addr, Claim { claimed_at_ms: claim.claimed_at_ms, node: self.identity.node_id() }))
    }
}
