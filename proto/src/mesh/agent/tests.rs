//! Scenarios of the whole machine: inputs in, steps out.
#![allow(clippy::unwrap_used)]

use mesh_common::config::EndpointFilter;
use mesh_common::host_name::HostName;
use mesh_common::key::{ClusterSecret, WgSecret};
use mesh_common::limits::{LINK_MTU, LISTEN_PORT, MAX_PREFIXES};

use super::*;
use crate::device::{Route, UnderlayLink};
use crate::discovery::client::ClientEvent;
use crate::mesh::settings::ServerSettings;
use crate::sealed::{self, Opened};
use crate::wire::frame::Frame;

fn settings(servers: usize) -> Settings {
    let server = |number| ServerSettings { name: format!("server{number}:7443"), proxied: false };
    Settings {
        cluster_id: "test".to_owned(),
        host_name: HostName::try_from("n1".to_owned()).unwrap(),
        servers: (0..servers).map(server).collect(),
        link_name: "mesh0".to_owned(),
        listen_port: LISTEN_PORT,
        mtu: LINK_MTU,
        overlay_v4_pool: "198.19.0.0/16".parse().unwrap(),
        prefixes: BTreeSet::new(),
        advertise_node_addresses: true,
        endpoint_filter: EndpointFilter::default(),
        static_peers: Vec::new(),
        deny_nodes: BTreeSet::new(),
        allow_down_peer_bypass: false,
        allow_wide_prefixes: false,
    }
}

/// An agent with an identity and an empty cache.
fn fresh(settings: Settings) -> Agent {
    let (identity, wg) = (SignKey::from_seed(&[1; 32]), WgSecret::from_seed(&[2; 32]));
    let start = Start {
        keys: ClusterSecret::from_bytes([3; 32]).derive(),
        wg_public: wg.public(),
        wg_proof: wg.prove(&identity.node_id()),
        identity,
        instance: [4; 16],
        seed: [5; 32],
        unix_ms: 1_700_000_000_000,
        last_seq: 0,
        claim: None,
        announced: Announced::default(),
        marks: BTreeMap::new(),
        frames: Vec::new(),
    };
    Agent::new(settings, start, Instant::from_origin(Duration::ZERO))
}

fn at(seconds: u64) -> Instant {
    Instant::from_origin(Duration::from_secs(seconds))
}

/// Takes the steps that are asked for and tells of what stands then.
fn steps(agent: &mut Agent, routes: &BTreeSet<Route>, now: Instant) -> Vec<Action> {
    agent.handle_observed(Observed { routes: routes.clone(), ..Observed::default() }, now);
    agent.applying = false;
    agent.last_steps = None;
    agent.retry_at = None;
    let mut events = std::iter::from_fn(|| agent.poll_event());
    let steps = events.find_map(|event| match event {
        AgentEvent::Apply(steps) => Some(steps),
        _ => None,
    });
    steps.expect("a host without a link needs steps")
}

#[test]
fn a_floor_of_the_last_run_waits_for_its_member() {
    let route = |kind| Route { prefix: "10.244.2.0/24".parse().unwrap(), kind };
    let floor = route(RouteKind::Unreachable);
    let foreign = route(RouteKind::Foreign { metric: 1, description: "unicast".to_owned() });
    let found: BTreeSet<Route> = [floor.clone(), foreign.clone()].into();
    let bypass = Settings { allow_down_peer_bypass: true, ..settings(1) };
    for (settings, goes) in [(settings(1), false), (settings(0), true), (bypass, true)] {
        let what = format!("{} servers, bypass {}", settings.servers.len(), settings.allow_down_peer_bypass);
        let steps = steps(&mut fresh(settings), &found, at(1));
        assert_eq!(steps.contains(&Action::RemoveRoute(floor.clone())), goes, "{what}");
        assert!(steps.contains(&Action::RemoveRoute(foreign.clone())), "{what}");
    }

    // Neither time nor an empty list of a server that has just started is a reason; both together are.
    let mut agent = fresh(settings(1));
    let gone = Action::RemoveRoute(floor);
    for now in [at(1), at(1000)] {
        assert!(!steps(&mut agent, &found, now).contains(&gone));
    }
    agent.handle_client_event(ServerId(0), ClientEvent::Synced { listed: BTreeSet::new() }, at(1000));
    assert!(!steps(&mut agent, &found, at(1001)).contains(&gone));
    assert!(!steps(&mut agent, &found, at(999) + ORPHAN_FLOOR_WAIT).contains(&gone));
    assert!(steps(&mut agent, &found, at(1000) + ORPHAN_FLOOR_WAIT).contains(&gone));
    // One that appears later is not of the last run.
    assert!(steps(&mut agent, &found, at(2000)).contains(&gone));
}

/// Lets an agent publish, and does what its events ask.
fn published(agent: &mut Agent, host: &Observed, now: Instant) -> Frame {
    agent.handle_observed(host.clone(), now);
    agent.handle_client_event(ServerId(0), ClientEvent::Synced { listed: BTreeSet::new() }, now);
    agent.handle_timeout(now);
    while let Some(event) = agent.poll_event() {
        match event {
            AgentEvent::ReserveSeq(seq) => agent.handle_seq_reserved(seq, now),
            AgentEvent::Apply(_) => agent.handle_applied(Vec::new(), host.clone(), now),
            _ => {}
        }
    }
    agent.publisher.frame().unwrap().clone()
}

#[test]
fn the_own_record_of_this_run_or_the_last_comes_back_for_nothing() {
    let mut agent = fresh(settings(1));
    let own = published(&mut agent, &Observed::default(), at(1));
    let sealed_before = |seq| sealed::seal(&agent.keys, &agent.identity, seq, None, [7; 24]).unwrap();
    let frames = [own.clone(), sealed_before(own.seq() - 1), sealed_before(1)];
    let due = agent.due;
    for frame in frames {
        agent.handle_client_event(ServerId(0), ClientEvent::Frame(frame.as_bytes().clone()), at(2));
        assert_eq!((agent.due, agent.poll_event(), agent.poll_transmit().is_some()), (due, None, false));
    }
    assert!(!agent.clone_seen && agent.publisher.published_seq() == Some(own.seq()));
    assert!(agent.members.rejected().is_empty());
}

#[test]
fn of_too_many_prefixes_the_configured_ones_are_announced_first() {
    let addresses: Vec<IpNet> = (1..=9).map(|host| IpNet::new([192, 0, 2, host].into(), 24).unwrap()).collect();
    let eth0 = UnderlayLink { name: "eth0".to_owned(), addresses, rp_filter: 0, virtual_kind: None };
    let host = Observed { underlay: vec![eth0], ..Observed::default() };
    // They sort behind the addresses.
    let configured = |count: u8| -> BTreeSet<IpNet> {
        (0..count).map(|third| IpNet::new([203, 0, third, 0].into(), 24).unwrap()).collect()
    };
    for (count, addresses) in [(0, 9), (60, 4), (64, 0), (100, 0)] {
        let mut agent = fresh(Settings { prefixes: configured(count), ..settings(1) });
        let frame = published(&mut agent, &host, at(1));
        let opened = sealed::open(&agent.keys, "test", &frame).unwrap();
        let Opened::Record(record) = opened else { panic!("the agent left") };
        let announced: BTreeSet<IpNet> = record.prefixes.iter().map(|claim| claim.prefix).collect();
        let kept = announced.intersection(&configured(count)).count();
        assert_eq!((kept, announced.len() - kept), (usize::from(count).min(MAX_PREFIXES), addresses), "{count}");
    }
}
