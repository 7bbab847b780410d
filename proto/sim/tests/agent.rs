//! The composed agent, driven by hand: what it asks of its host for given members, settings and networks.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use mesh_common::addr::{OVERLAY_V4_POOL, overlay_v6};
use mesh_common::config::EndpointFilter;
use mesh_common::host_name::HostName;
use mesh_common::key::{ClusterSecret, SignKey, WgPublicKey, WgSecret};
use mesh_common::limits::{PEER_DOWN_AFTER, RECORD_VALID_FOR};
use mesh_common::nat::NatClass;
use mesh_common::time::Instant;
use mesh_proto::device::{Action, Family, PeerReport, Route, RouteKind, UnderlayLink};
use mesh_proto::mesh::agent::{Agent, AgentEvent, Announced, OwnClaim, Start, StepError};
use mesh_proto::mesh::peer::Verdict;
use mesh_proto::mesh::settings::{Settings, StaticPeer};
use mesh_proto::path::agent::PathPolicy;
use mesh_proto::sealed::{self, Opened};
use mesh_proto::wire::frame::Frame;
use mesh_proto::wire::record::{Candidate, CandidateKind, OverlayV4, PrefixClaim, Record};
use mesh_sim::kernel::Kernel;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry;

const CANARY: &[u8; 32] = b"canary-canary-canary-canary-0123";

fn secret() -> ClusterSecret {
    ClusterSecret::from_bytes(*CANARY)
}

fn at(millis: u64) -> Instant {
    Instant::from_origin(Duration::from_millis(millis))
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn settings() -> Settings {
    Settings {
        cluster_id: "home".into(),
        host_name: HostName::try_from("self".to_owned()).unwrap(),
        servers: vec![],
        link_name: "mesh0".into(),
        listen_port: 51872,
        mtu: 1420,
        overlay_v4_pool: OVERLAY_V4_POOL,
        prefixes: BTreeSet::new(),
        advertise_node_addresses: false,
        endpoint_filter: EndpointFilter::default(),
        port_mapping: true,
        static_peers: vec![],
        deny_nodes: BTreeSet::new(),
        allow_down_peer_bypass: false,
        allow_wide_prefixes: false,
    }
}

fn eth0(rp_filter: u8) -> UnderlayLink {
    UnderlayLink { name: "eth0".into(), addresses: vec![net("192.168.7.2/24")], rp_filter, virtual_kind: None }
}

fn peer_key(number: u8) -> WgPublicKey {
    WgSecret::from_seed(&[100 + number; 32]).public()
}

fn peer_id(number: u8) -> SignKey {
    SignKey::from_seed(&[number; 32])
}

/// A record of another node with these prefixes (announced since then) and endpoints.
fn peer(number: u8, prefixes: &[(&str, u64)], endpoints: &[&str]) -> Record {
    let node = peer_id(number).node_id();
    let wg = WgSecret::from_seed(&[100 + number; 32]);
    let claim = |(prefix, since_ms): &(&str, u64)| PrefixClaim { prefix: net(prefix), since_ms: *since_ms };
    let candidate = |at: &&str| Candidate { kind: CandidateKind::Host, addr: at.parse().unwrap() };
    Record {
        wg_key: wg.public(),
        wg_proof: wg.prove(&node),
        host_name: HostName::try_from(format!("node-{number}")).unwrap(),
        overlay_v6: overlay_v6("home", &node),
        overlay_v4: None,
        prefixes: prefixes.iter().map(claim).collect(),
        excluded_prefixes: vec![],
        candidates: endpoints.iter().map(candidate).collect(),
        nat_v4: NatClass::default(),
        nat_v6: NatClass::default(),
        instance: [number; 16],
        started_at_ms: 0,
        valid_for: RECORD_VALID_FOR,
        wire_min: 1,
        wire_max: 1,
        features: 0,
        admission: vec![],
        ext: vec![],
    }
}

fn frame(number: u8, record: &Record) -> Bytes {
    sealed::seal(&secret().derive(), &peer_id(number), 7, Some(record), [number; 24]).unwrap().as_bytes().clone()
}

/// An agent with its model kernel; members come from its cache.
struct Bench {
    agent: Agent,
    kernel: Kernel,
    peers: BTreeMap<WgPublicKey, mesh_proto::device::PeerSpec>,
    steps: Vec<Action>,
    claims: Vec<OwnClaim>,
    stopped: bool,
    /// The host does not take these steps.
    refused: fn(&Action) -> bool,
    now: Instant,
}

impl Bench {
    fn new(settings: Settings, underlay: Vec<UnderlayLink>, members: &[(u8, Record)], claim: Option<OwnClaim>) -> Self {
        Self::on(Kernel::new(underlay, false), settings, members, claim)
    }

    fn on(kernel: Kernel, settings: Settings, members: &[(u8, Record)], claim: Option<OwnClaim>) -> Self {
        Self::that_refuses(|_| false, kernel, settings, members, claim)
    }

    fn that_refuses(
        refused: fn(&Action) -> bool,
        kernel: Kernel,
        settings: Settings,
        members: &[(u8, Record)],
        claim: Option<OwnClaim>,
    ) -> Self {
        let identity = peer_id(200);
        let wg = WgSecret::from_seed(CANARY);
        let start = Start {
            keys: secret().derive(),
            wg,
            path_policy: PathPolicy::default(),
            identity,
            instance: [9; 16],
            seed: *CANARY,
            unix_ms: 1_000_000,
            last_seq: 0,
            claim,
            announced: Announced::default(),
            marks: BTreeMap::new(),
            frames: members.iter().map(|(number, record)| frame(*number, record)).collect(),
        };
        let mut bench = Self {
            agent: Agent::new(settings, start, at(0)),
            kernel,
            peers: BTreeMap::new(),
            steps: vec![],
            claims: vec![],
            stopped: false,
            refused,
            now: at(0),
        };
        bench.observe();
        bench
    }

    fn observe(&mut self) {
        self.agent.handle_observed(self.kernel.observe(self.peers.clone()), self.now);
        self.drain();
    }

    /// Carries out all that the agent wants, until it wants nothing more.
    fn drain(&mut self) {
        while let Some(event) = self.agent.poll_event() {
            match event {
                AgentEvent::ReserveSeq(seq) => self.agent.handle_seq_reserved(seq, self.now),
                AgentEvent::StoreClaim(claim) => self.claims.push(claim),
                AgentEvent::Stopped => self.stopped = true,
                AgentEvent::Apply(steps) => {
                    let failures: Vec<(Action, StepError)> =
                        steps.iter().filter_map(|step| Some((step.clone(), self.apply(step)?))).collect();
                    self.steps.extend(steps);
                    self.agent.handle_applied(failures, self.kernel.observe(self.peers.clone()), self.now);
                }
                _ => {}
            }
        }
    }

    fn apply(&mut self, step: &Action) -> Option<StepError> {
        if (self.refused)(step) {
            return Some(StepError { text: "the host refuses".to_owned(), not_permitted: false });
        }
        match step {
            Action::SetPeer(key, spec) => {
                self.peers.insert(*key, spec.clone());
            }
            Action::RemovePeer(key) => {
                self.peers.remove(key);
            }
            _ => {}
        }
        self.kernel.apply(step).err()
    }

    fn run_until(&mut self, end: Instant) {
        while let Some((due, _)) = self.agent.poll_timeout().filter(|(due, _)| *due <= end) {
            self.now = self.now.max(due);
            self.agent.handle_timeout(self.now);
            self.drain();
        }
        self.now = end;
    }

    fn has_route(&self, prefix: &str, wanted: fn(&RouteKind) -> bool) -> bool {
        self.kernel.routes.iter().any(|route| route.prefix == net(prefix) && wanted(&route.kind))
    }

    fn verdict(&self, number: u8, prefix: &str) -> Verdict {
        let view = self.agent.view(self.now);
        let peer = view.peers.iter().find(|peer| peer.key == peer_key(number)).unwrap();
        peer.prefixes.iter().find(|(announced, _)| *announced == net(prefix)).unwrap().1.clone()
    }
}

fn dev(kind: &RouteKind) -> bool {
    matches!(kind, RouteKind::Dev { .. })
}

fn floor(kind: &RouteKind) -> bool {
    *kind == RouteKind::Unreachable
}

#[test]
fn members_from_the_cache_are_routed_and_leaving_leaves_nothing() {
    let members = [(1, peer(1, &[("10.1.0.0/16", 1)], &["203.0.113.1:51872"]))];
    let mut bench = Bench::new(settings(), vec![eth0(0)], &members, None);
    assert!(bench.has_route("10.1.0.0/16", dev) && bench.has_route("10.1.0.0/16", floor));
    // While the link stands the host answers for its addresses itself; when it goes, nothing to them may leave the host.
    for own in bench.kernel.link.clone().unwrap().addresses {
        let own = own.to_string();
        assert!(bench.has_route(&own, floor) && !bench.has_route(&own, dev), "{own}");
    }
    assert_eq!(bench.kernel.rules, BTreeSet::from(Family::ALL));
    assert!(bench.peers.contains_key(&peer_key(1)));
    bench.agent.handle_leave(bench.now);
    bench.drain();
    bench.run_until(at(5000));
    assert!(bench.stopped && bench.kernel.link.is_none() && bench.peers.is_empty());
    assert!(bench.kernel.routes.is_empty() && bench.kernel.rules.is_empty());
}

#[test]
fn a_down_peer_loses_its_routes_but_for_those_that_hold_an_endpoint() {
    let record = peer(1, &[("10.1.0.0/16", 1), ("203.0.113.1/32", 1)], &["203.0.113.1:51872"]);
    let mut bench = Bench::new(settings(), vec![eth0(2)], &[(1, record)], None);
    bench.agent.handle_peer_report(&peer_key(1), &PeerReport::Demand, bench.now);
    bench.drain();
    bench.run_until(at(0) + PEER_DOWN_AFTER + Duration::from_secs(1));
    assert!(!bench.has_route("10.1.0.0/16", dev) && bench.has_route("10.1.0.0/16", floor));
    assert!(bench.has_route("203.0.113.1/32", dev));
    assert!(bench.kernel.accepts("eth0", "203.0.113.1".parse().unwrap()), "its answer gets through");
    let endpoint: SocketAddr = "203.0.113.1:51872".parse().unwrap();
    bench.agent.handle_peer_report(&peer_key(1), &PeerReport::Handshake { endpoint: endpoint.into() }, bench.now);
    bench.drain();
    bench.run_until(bench.now + Duration::from_secs(1));
    assert!(bench.has_route("10.1.0.0/16", dev));
}

#[test]
fn a_prefix_inside_a_connected_subnet_stays_there_and_a_wide_one_spares_the_lan() {
    let record = peer(1, &[("192.168.7.9/32", 1), ("192.168.0.0/16", 1)], &[]);
    let bench = Bench::new(settings(), vec![eth0(0)], &[(1, record)], None);
    assert!(matches!(bench.verdict(1, "192.168.7.9/32"), Verdict::LocalOverlap { link, .. } if link == "eth0"));
    assert!(!bench.has_route("192.168.7.9/32", |_| true));
    assert!(bench.has_route("192.168.0.0/16", dev));
    assert!(bench.has_route("192.168.7.0/24", |kind| *kind == RouteKind::Throw));
}

#[test]
fn the_older_announcement_owns_a_prefix_and_ties_go_to_the_smaller_id() {
    let members = |since: [u64; 2]| {
        [1, 2].map(|number| (number, peer(number, &[("10.1.0.0/16", since[usize::from(number) - 1])], &[])))
    };
    let bench = Bench::new(settings(), vec![eth0(0)], &members([5, 3]), None);
    assert_eq!(bench.verdict(2, "10.1.0.0/16"), Verdict::Routed);
    assert_eq!(bench.verdict(1, "10.1.0.0/16"), Verdict::OwnedBy(peer_id(2).node_id()));
    let bench = Bench::new(settings(), vec![eth0(0)], &members([5, 5]), None);
    let smaller = if peer_id(1).node_id() < peer_id(2).node_id() { 1 } else { 2 };
    assert_eq!(bench.verdict(smaller, "10.1.0.0/16"), Verdict::Routed);
}

#[test]
fn default_and_overlay_routes_of_a_peer_are_refused() {
    let ula = IpNet::new(IpAddr::V6(overlay_v6("home", &peer_id(3).node_id())), 128).unwrap().to_string();
    let record = peer(1, &[("0.0.0.0/0", 1), ("10.0.0.0/7", 1), ("198.19.4.0/24", 1), (&ula, 1)], &[]);
    let bench = Bench::new(settings(), vec![eth0(0)], &[(1, record)], None);
    for prefix in ["0.0.0.0/0", "10.0.0.0/7"] {
        assert!(matches!(bench.verdict(1, prefix), Verdict::Refused(_)), "{prefix}");
    }
    assert_eq!(bench.verdict(1, "198.19.4.0/24"), Verdict::OverlaySpace);
    assert_eq!(bench.verdict(1, &ula), Verdict::OverlaySpace);
}

#[test]
fn an_overlay_address_outside_of_the_pool_is_nobodys() {
    let member = |number: u8, addr: &str| {
        let mut record = peer(number, &[], &[]);
        record.overlay_v4 = Some(OverlayV4 { addr: addr.parse().unwrap(), claimed_at_ms: 1 });
        (number, record)
    };
    let outside = ["198.20.0.1", "8.8.8.8", "192.168.9.9"];
    let [one, two, three] = outside;
    let members = [member(1, one), member(2, two), member(3, three), member(4, "198.19.255.254")];
    let bench = Bench::new(settings(), vec![eth0(0)], &members, None);
    for addr in outside {
        assert!(!bench.has_route(&format!("{addr}/32"), |_| true), "{addr}");
    }
    assert!(bench.has_route("198.19.255.254/32", dev));
    let view = bench.agent.view(bench.now);
    let shown: Vec<_> = view.peers.iter().filter_map(|peer| peer.overlay_v4).collect();
    assert_eq!(shown, ["198.19.255.254".parse::<Ipv4Addr>().unwrap()]);
    let allowed: Vec<IpNet> = bench.peers.values().flat_map(|peer| peer.allowed_ips.iter().copied()).collect();
    assert!(outside.iter().all(|addr| !allowed.contains(&net(&format!("{addr}/32")))), "{allowed:?}");
}

#[test]
fn what_a_static_peer_is_configured_with_is_not_up_for_announcement() {
    let key = peer_key(50);
    let configured = StaticPeer {
        name: "router".to_owned(),
        public_key: key,
        endpoint: Some("203.0.113.50:51820".parse().unwrap()),
        allowed_ips: BTreeSet::from([net("10.1.0.0/16")]),
        preshared_key: None,
        keepalive: None,
    };
    let record = peer(1, &[("10.1.0.0/16", 1)], &[]);
    let settings = Settings { static_peers: vec![configured], ..settings() };
    let bench = Bench::new(settings, vec![eth0(0)], &[(1, record)], None);
    assert_eq!(bench.verdict(1, "10.1.0.0/16"), Verdict::OwnedBy(bench.agent.node_id()));
    assert!(bench.peers[&key].allowed_ips.contains(&net("10.1.0.0/16")));
    assert!(!bench.peers[&peer_key(1)].allowed_ips.contains(&net("10.1.0.0/16")));
}

#[test]
fn rp_filter_is_loosened_only_for_a_captured_endpoint_and_given_back() {
    let loosened = |bench: &Bench| bench.steps.iter().any(|step| matches!(step, Action::LoosenRpFilter { .. }));
    let free = peer(1, &[("10.1.0.0/16", 1)], &["203.0.113.1:51872"]);
    let captured = peer(2, &[("203.0.113.2/32", 1)], &["203.0.113.2:51872"]);
    assert!(!loosened(&Bench::new(settings(), vec![eth0(1)], &[(1, free.clone())], None)));
    assert!(!loosened(&Bench::new(settings(), vec![eth0(0)], &[(2, captured.clone())], None)));
    let mut bench = Bench::new(settings(), vec![eth0(1)], &[(1, free), (2, captured)], None);
    assert!(loosened(&bench));
    assert_eq!(bench.kernel.underlay[0].rp_filter, 2);
    bench.agent.handle_leave(bench.now);
    bench.drain();
    bench.run_until(at(5000));
    assert_eq!(bench.kernel.underlay[0].rp_filter, 1);
}

#[test]
fn where_rp_filter_may_not_be_loosened_the_prefix_is_not_captured() {
    let captured = peer(2, &[("203.0.113.2/32", 1), ("10.2.0.0/16", 1)], &["203.0.113.2:51872"]);
    let mut bench = Bench::on(Kernel::new(vec![eth0(1)], true), settings(), &[(2, captured)], None);
    bench.run_until(at(10_000));
    assert!(matches!(bench.verdict(2, "203.0.113.2/32"), Verdict::RpFilter { .. }));
    assert!(!bench.has_route("203.0.113.2/32", |_| true));
    assert!(bench.has_route("10.2.0.0/16", dev));
}

#[test]
fn an_older_claim_moves_us_and_a_newer_one_does_not() {
    let ours = OwnClaim { addr: "198.19.3.3".parse().unwrap(), claimed_at_ms: 500 };
    let rival = |claimed_at_ms| {
        let mut record = peer(1, &[], &[]);
        record.overlay_v4 = Some(OverlayV4 { addr: ours.addr, claimed_at_ms });
        [(1, record)]
    };
    let bench = Bench::new(settings(), vec![eth0(0)], &rival(501), Some(ours));
    assert_eq!(bench.agent.overlay_v4(), Some(ours.addr));
    assert!(!bench.has_route("198.19.3.3/32", dev), "the rival is not routed there");
    let bench = Bench::new(settings(), vec![eth0(0)], &rival(499), Some(ours));
    let moved = bench.agent.overlay_v4().unwrap();
    assert_ne!(moved, ours.addr);
    assert_eq!(bench.claims.last().map(|claim| claim.addr), Some(moved));
    assert!(bench.has_route("198.19.3.3/32", dev));
}

#[test]
fn own_addresses_and_impossible_ones_are_no_candidates_and_the_lan_comes_first() {
    let endpoints = ["203.0.113.1:51872", "192.168.7.2:51872", "127.0.0.1:51872", "203.0.113.1:0", "192.168.7.9:51872"];
    let bench = Bench::new(settings(), vec![eth0(0)], &[(1, peer(1, &[], &endpoints))], None);
    let view = bench.agent.view(bench.now);
    let expected: [SocketAddr; 2] = ["192.168.7.9:51872", "203.0.113.1:51872"].map(|at| at.parse().unwrap());
    assert_eq!(view.peers[0].candidates, expected);
}

#[test]
fn new_settings_are_carried_out_without_a_restart() {
    let members = [(1, peer(1, &[("10.1.0.0/16", 1)], &[])), (2, peer(2, &[], &[]))];
    let mut bench = Bench::new(settings(), vec![eth0(0)], &members, None);
    let mut changed = settings();
    changed.mtu = 1380;
    changed.deny_nodes = BTreeSet::from([peer_id(2).node_id()]);
    changed.allow_down_peer_bypass = true;
    bench.agent.handle_settings(changed, bench.now);
    bench.drain();
    bench.run_until(at(1000));
    assert_eq!(bench.kernel.link.as_ref().unwrap().mtu, 1380);
    assert_eq!(bench.peers.keys().collect::<Vec<_>>(), [&peer_key(1)]);
    assert!(bench.has_route("10.1.0.0/16", dev) && !bench.has_route("10.1.0.0/16", floor), "bypass has no floor");
}

#[test]
fn what_somebody_deletes_comes_back_and_what_somebody_adds_goes() {
    let members = [(1, peer(1, &[("10.1.0.0/16", 1)], &[]))];
    let mut bench = Bench::new(settings(), vec![eth0(0)], &members, None);
    let whole = bench.kernel.observe(bench.peers.clone());
    bench.kernel.delete_link();
    bench.kernel.rules.clear();
    bench.kernel.lose_routes(|_| true);
    bench.kernel.add_foreign_route(net("10.77.0.0/16"), 3);
    bench.peers.clear();
    bench.observe();
    assert_eq!(bench.kernel.observe(bench.peers.clone()), whole);
    let repairs = bench.steps.len();
    bench.observe();
    bench.run_until(at(100_000));
    assert_eq!(bench.steps.len(), repairs, "nothing is done twice");
}

/// Counts what is said at WARN.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl<S: tracing::Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() == tracing::Level::WARN {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_step_that_always_fails_does_not_hold_up_the_repair_of_what_is_deleted() {
    let refused = |step: &Action| *step == Action::SetMssClamp;
    let members = [(1, peer(1, &[("10.1.0.0/16", 1)], &[]))];
    let warnings = Warnings::default();
    let mut bench = tracing::subscriber::with_default(registry().with(warnings.clone()), || {
        let mut bench = Bench::that_refuses(refused, Kernel::new(vec![eth0(0)], false), settings(), &members, None);
        bench.run_until(at(600_000));
        bench
    });
    let tries = bench.steps.iter().filter(|step| refused(step)).count();
    assert!((15..40).contains(&tries), "{tries} tries in ten minutes");
    assert_eq!(warnings.0.load(Ordering::Relaxed), 1, "and one word about it");
    bench.kernel.delete_link();
    bench.observe();
    assert!(bench.kernel.link.is_some(), "at once, not with the next try of the other step");
    assert!(bench.has_route("10.1.0.0/16", dev));
}

#[test]
fn a_floor_stands_before_its_device_route() {
    let members = [(1, peer(1, &[("10.1.0.0/16", 1)], &[]))];
    let bench = Bench::new(settings(), vec![eth0(0)], &members, None);
    let position = |wanted: fn(&RouteKind) -> bool| {
        let is_it = |step: &Action| matches!(step, Action::AddRoute(Route { prefix, kind }) if *prefix == net("10.1.0.0/16") && wanted(kind));
        bench.steps.iter().position(is_it).unwrap()
    };
    assert!(position(floor) < position(dev));
}

#[test]
fn an_agent_and_its_view_show_no_secret() {
    let members = [(1, peer(1, &[("10.1.0.0/16", 1)], &[]))];
    let bench = Bench::new(settings(), vec![eth0(0)], &members, None);
    let keys = secret().derive();
    let psk = bench.peers[&peer_key(1)].preshared_key.clone().unwrap();
    let shown = format!("{:?} {:?} {:?}", bench.agent, bench.agent.view(bench.now), bench.steps);
    for bytes in [CANARY, keys.record.as_bytes(), &psk.0, &*peer_id(200).seed()] {
        let list = format!("{bytes:?}");
        let start = list.trim_start_matches('[').split(", ").take(6).collect::<Vec<_>>().join(", ");
        assert!(!shown.contains(&start), "{start}");
        let hex: String = bytes.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        assert!(!shown.contains(&hex), "{hex}");
    }
    assert!(!shown.contains("canary"));
    assert!(shown.contains("hidden"));
}

#[test]
fn frames_of_the_cache_open_as_what_was_put_in() {
    let record = peer(1, &[("10.1.0.0/16", 1)], &["203.0.113.1:51872"]);
    let bench = Bench::new(settings(), vec![eth0(0)], &[(1, record.clone())], None);
    let frame = Frame::parse(bench.agent.frames().remove(0)).unwrap();
    assert_eq!(sealed::open(&secret().derive(), "home", &frame), Ok(Opened::Record(Box::new(record))));
}
