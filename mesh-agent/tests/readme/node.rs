//! A running node in trouble, without a host under it: what `status` says, made by the code that an agent says it with.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use mesh_agent::backend::BackendKind;
use mesh_agent::clock;
use mesh_agent::dataplane::{BoringTunnels, Engine, EngineStats, Offloads, Tun, UdpSockets};
use mesh_agent::io::carriers::Carriers;
use mesh_agent::io::session::Dialer;
use mesh_agent::status::BackendStatus;
use mesh_agent::status::{Show, Status, fill};
use mesh_common::addr::PrefixRefusal;
use mesh_common::config::Config;
use mesh_common::id::{Namespace, NodeId};
use mesh_common::key::{WgPublicKey, WgSecret};
use mesh_common::nat::NatClass;
use mesh_common::time::Instant;
use mesh_proto::device::PeerCounters;
use mesh_proto::discovery::client::ClientState;
use mesh_proto::mesh::agent::{Dropped, PeerView, ServerView, View};
use mesh_proto::mesh::members::{RejectedShape, Rejection};
use mesh_proto::mesh::peer::Verdict;
use mesh_proto::net::port_mapping::{MapperState, MapperView};
use mesh_proto::net::report::{FamilyReport, Report};
use mesh_proto::path::agent::{PathAgent, PathState};
use mesh_proto::sealed::OpenError;

/// Every way to be degraded that a host does not have to be broken for, and a peer for each odd prefix.
pub(crate) fn status() -> Status {
    let now = Instant::from_origin(Duration::from_secs(1000));
    shown(&view(now), true, now)
}

fn view(now: Instant) -> View {
    let verdicts = [
        Verdict::LocalOverlap { subnet: "10.0.0.0/24".parse().unwrap(), link: "eth0".to_owned() },
        Verdict::OwnedBy(NodeId([0x3f; 32])),
        Verdict::Refused(PrefixRefusal::TooWide),
        Verdict::OverlaySpace,
        Verdict::RpFilter { link: "eth0".to_owned() },
    ];
    let peer = PeerView {
        path: None,
        nat: [NatClass::default(); 2],
        node: Some(NodeId([1; 32])),
        name: "node-2".to_owned(),
        key: WgPublicKey([2; 32]),
        overlay_v6: None,
        overlay_v4: None,
        state: Some(PathState::Down { since: Instant::from_origin(Duration::from_secs(986)) }),
        endpoint: None,
        candidates: vec!["192.0.2.2:51872".parse().unwrap(), "[2001:db8::2]:51872".parse().unwrap()],
        prefixes: verdicts.map(|verdict| ("10.0.0.7/32".parse().unwrap(), verdict)).into(),
        last_evidence: None,
    };
    View {
        dropped_probes: Dropped::ALL.map(|why| (why.to_string(), 1)).into(),
        node: NodeId([3; 32]),
        namespace: Namespace([4; 32]),
        wg_public: WgPublicKey([5; 32]),
        overlay_v6: "fd00::1".parse().unwrap(),
        overlay_v4: None,
        listen_port: 51872,
        published_seq: None,
        servers: vec![ServerView {
            name: "disc.example:443".to_owned(),
            state: ClientState::Waiting { until: now },
            detail: Some("the reason, as below".to_owned()),
            relays: false,
            rtt: None,
        }],
        net: Report::default(),
        port_mapping: MapperView { state: MapperState::NotNeeded, router: None, next: None, tried: BTreeMap::new() },
        port_mapping_counters: BTreeMap::new(),
        stun_rejected: 0,
        peers: vec![peer],
        failed_steps: BTreeMap::new(),
        rp_filter_denied: vec!["eth0".to_owned()],
        clone_seen: true,
        rejected: rejections().into_iter().map(|why| (why, 1)).collect(),
        malformed: 1,
    }
}

/// The same node with one healthy server and a peer that somebody talks to, over this path.
pub(crate) fn in_use(path: &PathAgent, own_nat: NatClass, peer_nat: NatClass, now: Instant) -> Status {
    let mut view = view(now);
    view.servers[0] = ServerView { state: ClientState::Live, detail: None, relays: true, ..view.servers[0].clone() };
    view.net.v4 = FamilyReport { nat: own_nat, ..view.net.v4 };
    view.rp_filter_denied.clear();
    view.clone_seen = false;
    view.peers[0] = PeerView {
        state: Some(path.state(now)),
        path: Some(path.view(now)),
        nat: [peer_nat, NatClass::default()],
        ..view.peers[0].clone()
    };
    shown(&view, false, now)
}

fn shown(view: &View, is_state_dir_failing: bool, now: Instant) -> Status {
    let dialer = Dialer::new().unwrap();
    let counters = |_: &WgPublicKey| PeerCounters { last_handshake: Some(now), ..PeerCounters::default() };
    fill::running(&fill::Facts {
        backend: &BackendStatus { kind: BackendKind::Userspace, why_not_kernel: None },
        backend_problem: None,
        config: &Config::parse("").unwrap(),
        view,
        carriers: &Carriers::new(dialer),
        counters: &counters,
        engine: &drops(),
        offloads: Some(Offloads::default()),
        host_name: "node-1",
        started_at_ms: 0,
        is_ready: true,
        host_problem: None,
        is_state_dir_failing,
        now,
    })
}

/// What `status` and `peers` say about it.
pub(crate) fn troubles() -> Vec<String> {
    let status = status();
    let shown = status.to_table(Show { wide: true, colour: false, now_ms: 0 });
    let problems =
        status.node.problems.iter().map(|problem| format!("Problem: {}\n    Fix: {}", problem.what, problem.fix));
    let mut said: Vec<String> = problems.collect();
    for problem in &said {
        assert!(shown.contains(problem.as_str()), "{problem} is not in\n{shown}");
    }
    let peer = &status.peers[0];
    said.push(peer.detail.clone());
    said.extend(peer.prefixes.iter().map(|prefix| {
        let state = serde_json::to_value(prefix.state).unwrap();
        format!("{}: {}", state.as_str().unwrap(), prefix.detail)
    }));
    said
}

/// Every counter that there can be.
pub(crate) fn counters() -> BTreeSet<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    status().counters.into_keys().collect()
}

fn drops() -> EngineStats {
    let sockets = UdpSockets::bind(0, 0).unwrap();
    let tunnels = BoringTunnels::new(&WgSecret::from_seed(&[1; 32]));
    let mut engine = Engine::start(None::<Vec<Tun>>, vec![sockets], tunnels, Arc::new(clock::now)).unwrap();
    let stats = engine.stats();
    engine.stop();
    stats
}

fn rejections() -> Vec<String> {
    let shapes = [RejectedShape::Length, RejectedShape::Magic, RejectedShape::Unknown].map(Rejection::Shape);
    let opening = [
        OpenError::ForeignNamespace,
        OpenError::Signature,
        OpenError::Sealed,
        OpenError::Malformed,
        OpenError::UnknownExtension,
        OpenError::Proof,
        OpenError::OverlayAddress,
    ];
    let others = [Rejection::Stale, Rejection::KeyTaken, Rejection::Denied, Rejection::TooMany];
    let all = shapes.into_iter().chain(opening.map(Rejection::Open)).chain(others);
    all.map(|why| why.to_string()).collect()
}
