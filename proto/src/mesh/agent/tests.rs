//! Scenarios of the whole machine: inputs in, steps out.
#![allow(clippy::unwrap_used)]

mod hostile;
mod port;

use mesh_common::config::EndpointFilter;
use mesh_common::host_name::HostName;
use mesh_common::key::{ClusterSecret, WgSecret};
use mesh_common::limits::{LINK_MTU, LISTEN_PORT, MAX_CANDIDATES, MAX_PREFIXES};
use mesh_common::nat::{Filtering, Mapping, NatClass};

use super::*;
use crate::device::{Route, UnderlayLink};
use crate::discovery::client::ClientEvent;
use crate::mesh::settings::ServerSettings;
use crate::sealed::{self, Opened};
use crate::wire::frame::Frame;
use crate::wire::probe::{self, Probe};
use crate::wire::record::{Candidate, CandidateKind, Record};
use crate::wire::session::{Cursor, ServerMessage, Welcome};
use crate::wire::stun;

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
        port_mapping: true,
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
        wg,
        path_policy: PathPolicy::default(),
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

/// A host behind a NAT, on one LAN.
fn behind_nat() -> Observed {
    let link = |name: &str, addresses: &[&str], virtual_kind: Option<&str>| UnderlayLink {
        name: name.to_owned(),
        addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        rp_filter: 0,
        virtual_kind: virtual_kind.map(str::to_owned),
    };
    let eth0 = link("eth0", &["10.0.0.2/24"], None);
    let docker = link("docker0", &["172.17.0.1/16"], Some("bridge"));
    Observed { underlay: vec![eth0, docker], ..Observed::default() }
}

/// A session with the server at 192.0.2.1, which has another address, too.
fn welcome(agent: &mut Agent, now: Instant) {
    agent.handle_connected(ServerId(0), [0; 32], vec!["192.0.2.1".parse().unwrap()], now);
    let welcomed = ClientEvent::Welcomed {
        observed: "203.0.113.7:4000".parse().unwrap(),
        stun_ports: vec![3478, 3479],
        stun_alt: vec!["192.0.2.2:3478".parse().unwrap(), "192.0.2.2:3479".parse().unwrap()],
        relay: false,
    };
    agent.handle_client_event(ServerId(0), welcomed, now);
}

/// Runs the machine for a while and answers its STUN questions as `seen` says. Whoever is to answer from elsewhere is not
/// heard. Gives what is announced then.
fn run(
    agent: &mut Agent,
    host: &Observed,
    from: Instant,
    time: Duration,
    seen: impl Fn(SocketAddr) -> &'static str,
) -> Record {
    run_with(agent, host, from, time, seen, |_, _, _| {});
    let frame = agent.publisher.frame().unwrap();
    let Opened::Record(record) = sealed::open(&agent.keys, "test", frame).unwrap() else { panic!("the agent left") };
    *record
}

/// The same; every other event is given to `look`.
fn run_with(
    agent: &mut Agent,
    host: &Observed,
    from: Instant,
    time: Duration,
    seen: impl Fn(SocketAddr) -> &'static str,
    mut look: impl FnMut(&mut Agent, AgentEvent, Instant),
) {
    let mut now = from;
    agent.handle_observed(host.clone(), now);
    loop {
        while let Some(event) = agent.poll_event() {
            match event {
                AgentEvent::ReserveSeq(seq) => agent.handle_seq_reserved(seq, now),
                AgentEvent::Apply(_) => agent.handle_applied(Vec::new(), host.clone(), now),
                AgentEvent::SendRaw { to, ref bytes, .. } => {
                    let Some(answer) = stun::answer(bytes, seen(to).parse().unwrap()) else {
                        look(agent, event, now);
                        continue;
                    };
                    if answer.from == stun::Change::NONE {
                        agent.handle_datagram(to.into(), &answer.bytes, now);
                    }
                }
                _ => look(agent, event, now),
            }
        }
        let Some((at, _)) = agent.poll_timeout().filter(|(at, _)| *at <= from + time) else { break };
        now = now.max(at);
        agent.handle_timeout(now);
    }
}

/// Another member, and what it says of itself.
struct Other {
    identity: SignKey,
    wg: WgSecret,
    record: Record,
    seq: u64,
}

impl Other {
    fn new(seed: u8) -> Self {
        let (identity, wg) = (SignKey::from_seed(&[seed; 32]), WgSecret::from_seed(&[seed + 100; 32]));
        let node = identity.node_id();
        let record = Record {
            wg_key: wg.public(),
            wg_proof: wg.prove(&node),
            host_name: HostName::try_from(format!("n{seed}")).unwrap(),
            overlay_v6: addr::overlay_v6("test", &node),
            overlay_v4: None,
            prefixes: Vec::new(),
            excluded_prefixes: Vec::new(),
            candidates: Vec::new(),
            nat_v4: NatClass::default(),
            nat_v6: NatClass::default(),
            instance: [seed; 16],
            started_at_ms: 1,
            valid_for: Duration::from_secs(3600),
            wire_min: 1,
            wire_max: 1,
            features: 0,
            admission: Vec::new(),
            ext: Vec::new(),
        };
        Self { identity, wg, record, seq: 0 }
    }

    /// Its record as it is now, told by a server that lists it.
    fn tell(&mut self, agent: &mut Agent, now: Instant) {
        self.seq += 1;
        let nonce = [u8::try_from(self.seq).unwrap(); 24];
        let frame = sealed::seal(&agent.keys, &self.identity, self.seq, Some(&self.record), nonce).unwrap();
        agent.handle_client_event(ServerId(0), ClientEvent::Frame(frame.as_bytes().clone()), now);
        let listed = agent.members().iter().map(|(node, _)| *node).collect();
        agent.handle_client_event(ServerId(0), ClientEvent::Synced { listed }, now);
        agent.settle(now);
    }
}

fn candidate(kind: CandidateKind, addr: &str) -> Candidate {
    Candidate { kind, addr: addr.parse().unwrap() }
}

fn texts(candidates: &[Candidate]) -> Vec<String> {
    candidates.iter().map(|candidate| format!("{:?} {}", candidate.kind, candidate.addr)).collect()
}

#[test]
fn the_port_outside_is_a_guess_until_stun_tells_it() {
    let mut agent = fresh(settings(1));
    let host = behind_nat();
    agent.handle_observed(host.clone(), at(1));
    welcome(&mut agent, at(1));
    assert_eq!(texts(&agent.candidates()), ["Host 10.0.0.2:51872", "Reflexive 203.0.113.7:51872"]);
    let record = run(&mut agent, &host, at(1), Duration::from_secs(5), |_| "203.0.113.7:40000");
    assert_eq!(texts(&record.candidates), ["Host 10.0.0.2:51872", "Reflexive 203.0.113.7:40000"]);
    assert_eq!((record.nat_v4.mapping, record.nat_v6), (Mapping::EndpointIndependent, NatClass::default()));
    assert_eq!(record.nat_v4.filtering, Filtering::AddressAndPortDependent);
    assert_eq!(agent.view(at(6)).net.v4.reflexive, ["203.0.113.7:40000".parse().unwrap()]);

    // A NAT that moves us makes a new record, once it was asked again.
    let record = run(&mut agent, &host, at(6), Duration::from_secs(40), |_| "203.0.113.7:40001");
    assert_eq!(texts(&record.candidates), ["Host 10.0.0.2:51872", "Reflexive 203.0.113.7:40001"]);
}

#[test]
fn behind_a_nat_that_depends_on_the_peer_the_own_port_is_worth_a_try() {
    let mut agent = fresh(settings(1));
    let host = behind_nat();
    agent.handle_observed(host.clone(), at(1));
    welcome(&mut agent, at(1));
    let seen = |to: SocketAddr| match to.to_string().as_str() {
        "192.0.2.1:3478" => "203.0.113.7:40000",
        "192.0.2.1:3479" => "203.0.113.7:40001",
        _ => "203.0.113.7:40002",
    };
    let record = run(&mut agent, &host, at(1), Duration::from_secs(5), seen);
    assert_eq!(record.nat_v4.mapping, Mapping::AddressAndPortDependent);
    let expected = ["Host 10.0.0.2:51872", "Reflexive 203.0.113.7:40000", "Reflexive 203.0.113.7:51872"];
    assert_eq!(texts(&record.candidates), expected);
}

#[test]
fn of_too_many_addresses_those_that_open_a_nat_are_announced_first() {
    let mut agent = fresh(settings(1));
    let mut host = behind_nat();
    host.underlay[0].addresses = (2..60).map(|last| IpNet::new([10, 0, 0, last].into(), 24).unwrap()).collect();
    agent.handle_observed(host.clone(), at(1));
    welcome(&mut agent, at(1));
    let record = run(&mut agent, &host, at(1), Duration::from_secs(5), |_| "203.0.113.7:40000");
    assert_eq!(record.candidates.len(), MAX_CANDIDATES);
    assert_eq!(texts(&record.candidates).last().unwrap(), "Reflexive 203.0.113.7:40000");
}

#[test]
fn the_filter_holds_for_what_is_announced_and_for_what_is_tried() {
    let filter = |entries: &[&str]| EndpointFilter(entries.iter().map(|entry| entry.parse().unwrap()).collect());
    for (entries, announced, tried) in [
        (&["!10.0.0.0/8"][..], &["Reflexive 203.0.113.7:40000"][..], &["Reflexive 198.51.100.8:9"][..]),
        (&["10.0.0.0/8"], &["Host 10.0.0.2:51872"], &["Host 10.9.0.9:51872"]),
        (&["!0.0.0.0/0"], &[], &[]),
    ] {
        let mut agent = fresh(Settings { endpoint_filter: filter(entries), ..settings(1) });
        let host = behind_nat();
        agent.handle_observed(host.clone(), at(1));
        welcome(&mut agent, at(1));
        let record = run(&mut agent, &host, at(1), Duration::from_secs(5), |_| "203.0.113.7:40000");
        assert_eq!(texts(&record.candidates), announced, "{entries:?}");
        let theirs = [
            Candidate { kind: CandidateKind::Host, addr: "10.9.0.9:51872".parse().unwrap() },
            Candidate { kind: CandidateKind::Reflexive, addr: "198.51.100.8:9".parse().unwrap() },
        ];
        assert_eq!(texts(&agent.surroundings(at(6)).usable_candidates(&theirs)), tried, "{entries:?}");
    }
}

#[test]
fn where_no_peer_can_be_is_never_tried() {
    let mut agent = fresh(settings(1));
    let host = behind_nat();
    agent.handle_observed(host.clone(), at(1));
    welcome(&mut agent, at(1));
    run(&mut agent, &host, at(1), Duration::from_secs(5), |_| "203.0.113.7:40000");
    let overlay = format!("[{}]:51872", addr::overlay_v6("test", &NodeId([9; 32])));
    let refused = [
        "192.0.2.1:7443",
        "192.0.2.1:3478",
        "192.0.2.1:3479",
        "192.0.2.2:3478",
        "10.0.0.2:51872",
        "10.0.0.2:1",
        "172.17.0.1:51872",
        "203.0.113.7:40000",
        "10.0.0.255:51872",
        "127.0.0.1:51872",
        "169.254.0.1:51872",
        "224.0.0.1:51872",
        "255.255.255.255:51872",
        "0.0.0.0:51872",
        "198.51.100.8:0",
        "198.19.3.4:51872",
        "[::1]:51872",
        "[fe80::1]:51872",
        "[ff02::1]:51872",
        &overlay,
    ];
    // One on the same LAN, one beside a server, one that is just somewhere, one behind the same NAT.
    let tried = ["10.0.0.3:51872", "192.0.2.1:51872", "198.51.100.8:9", "203.0.113.7:51872"];
    let theirs = refused.into_iter().chain(tried);
    let theirs: Vec<Candidate> =
        theirs.map(|at| Candidate { kind: CandidateKind::Reflexive, addr: at.parse().unwrap() }).collect();
    let usable = agent.surroundings(at(6)).usable_candidates(&theirs);
    assert_eq!(texts(&usable), tried.map(|at| format!("Reflexive {at}")));
}

#[test]
fn nobody_is_asked_by_an_agent_that_left() {
    let mut agent = fresh(settings(1));
    let host = behind_nat();
    agent.handle_observed(host.clone(), at(1));
    welcome(&mut agent, at(1));
    run(&mut agent, &host, at(1), Duration::from_secs(5), |_| "203.0.113.7:40000");
    agent.handle_leave(at(7));
    while let Some((due, _)) = agent.poll_timeout().filter(|(due, _)| *due <= at(20)) {
        agent.handle_timeout(due);
        while let Some(event) = agent.poll_event() {
            if matches!(event, AgentEvent::Apply(_)) {
                agent.handle_applied(Vec::new(), Observed::default(), due);
            }
        }
    }
    agent.handle_timeout(at(1000));
    let asks = |event: AgentEvent| matches!(event, AgentEvent::SendRaw { .. });
    assert!(!std::iter::from_fn(|| agent.poll_event()).any(asks));
}

#[test]
fn what_a_proxys_name_resolves_to_is_no_stun_server() {
    let mut proxied = settings(1);
    proxied.servers[0].proxied = true;
    for (settings, is_asked) in [(settings(1), true), (proxied, false)] {
        let mut agent = fresh(settings);
        agent.handle_observed(behind_nat(), at(1));
        welcome(&mut agent, at(1));
        agent.handle_timeout(at(1));
        let asks = |event: AgentEvent| matches!(event, AgentEvent::SendRaw { .. });
        assert_eq!(std::iter::from_fn(|| agent.poll_event()).any(asks), is_asked);
    }
}

#[test]
fn a_relay_over_its_limit_is_shown_as_long_as_it_is_met() {
    use crate::wire::session::{ErrorCode, SessionError};
    let mut agent = fresh(settings(1));
    let refuse = |agent: &mut Agent, code, limit: &str, now| {
        let error = SessionError { code, limit: limit.to_owned(), retry_after: Duration::from_secs(1) };
        agent.handle_client_event(ServerId(0), ClientEvent::Refused(error), now);
    };
    let detail = |agent: &Agent, now| agent.view(now).servers[0].detail.clone();
    refuse(&mut agent, ErrorCode::RateLimited, "relay-client-bytes", at(1));
    let shown = "this relay drops what is over its limit relay-client-bytes: send less, or raise --relay-client-bytes on the \
                 server";
    assert_eq!(detail(&agent, at(5)).as_deref(), Some(shown));
    assert_eq!(detail(&agent, at(11)), None);
    refuse(&mut agent, ErrorCode::ServerFull, "max-connections", at(12));
    assert_eq!(detail(&agent, at(100)).as_deref(), Some("the server is full (max-connections)"));
}

/// A new agent with a session whose server is about to tell all it lists.
fn listening(now: Instant) -> Agent {
    let mut agent = fresh(settings(1));
    agent.handle_observed(Observed::default(), now);
    agent.handle_connected(ServerId(0), [0; 32], Vec::new(), now);
    let welcome = Welcome {
        server_instance: 1,
        observed: "203.0.113.7:4000".parse().unwrap(),
        stun_ports: Vec::new(),
        slot_ttl: Duration::from_secs(60),
        max_slots: 1024,
        relay: false,
        stun_alt: Vec::new(),
    };
    for message in [ServerMessage::Welcome(welcome), ServerMessage::Restart] {
        agent.handle_message(ServerId(0), &message.encode(), now);
    }
    agent.handle_timeout(now);
    agent
}

#[test]
fn what_a_server_lists_is_worked_out_once_at_its_end_unless_that_takes_long() {
    let start = at(1);
    let frame = |agent: &Agent, seed| {
        let other = Other::new(seed);
        let frame = sealed::seal(&agent.keys, &other.identity, 1, Some(&other.record), [seed; 24]).unwrap();
        ServerMessage::Frame(frame.as_bytes().clone()).encode()
    };
    for is_slow in [false, true] {
        let mut agent = listening(start);
        for (seed, after) in [(8, 0), (9, 10), (10, 20)] {
            let now = start + Duration::from_millis(after);
            let message = frame(&agent, seed);
            agent.handle_message(ServerId(0), &message, now);
            agent.handle_timeout(now + SETTLE);
            assert!(agent.peers.is_empty(), "{after} ms");
        }
        if is_slow {
            agent.handle_timeout(start + LISTING_SETTLE);
        } else {
            let end = ServerMessage::Synced(Cursor { server_instance: 1, version: 3 });
            agent.handle_message(ServerId(0), &end.encode(), start + Duration::from_millis(30));
        }
        assert_eq!(agent.peers.len(), 3, "slow: {is_slow}");
    }

    // The same after a session was lost: of what is told anew, what is new.
    let mut agent = listening(start);
    let message = frame(&agent, 8);
    agent.handle_message(ServerId(0), &message, start);
    let end = |version| ServerMessage::Synced(Cursor { server_instance: 1, version }).encode();
    agent.handle_message(ServerId(0), &end(1), start);
    let again = at(5);
    let messages = [ServerMessage::Restart.encode(), message, frame(&agent, 9), end(2)];
    for message in messages {
        agent.handle_message(ServerId(0), &message, again);
    }
    agent.handle_timeout(again + SETTLE);
    assert_eq!(agent.peers.len(), 2);
    // News come one at a time.
    let message = frame(&agent, 10);
    agent.handle_message(ServerId(0), &message, at(6));
    agent.handle_timeout(at(6) + SETTLE);
    assert_eq!(agent.peers.len(), 3);
}

#[test]
fn of_many_new_peers_each_is_routed_to_at_once_and_heard_right_after() {
    let now = at(1);
    let mut agent = listening(now);
    // What the host was asked for before is another test's.
    while agent.poll_event().is_some() {}
    (agent.applying, agent.last_steps, agent.retry_at) = (false, None, None);
    let others: Vec<Other> = (10..110).map(Other::new).collect();
    for other in &others {
        let frame = sealed::seal(&agent.keys, &other.identity, 1, Some(&other.record), [9; 24]).unwrap();
        agent.handle_message(ServerId(0), &ServerMessage::Frame(frame.as_bytes().clone()).encode(), now);
    }
    let end = ServerMessage::Synced(Cursor { server_instance: 1, version: 100 });
    agent.handle_message(ServerId(0), &end.encode(), now);
    let asked_for = std::iter::from_fn(|| agent.poll_event()).find_map(|event| match event {
        AgentEvent::Apply(steps) => Some(steps.iter().filter(|step| matches!(step, Action::SetPeer(..))).count()),
        _ => None,
    });
    assert_eq!(asked_for, Some(others.len()));

    let ours = (agent.identity.node_id(), agent.wg_public);
    let heard = |agent: &mut Agent| {
        let is_heard = |other: &&Other| {
            let keys = agent.keys.probe_keys((other.identity.node_id(), &other.wg), ours).unwrap();
            let ping = Probe::Ping { id: 7, heard: 0 };
            let datagram = probe::seal(&keys.send, &other.record.instance, 1, [1; 24], &ping, None);
            let unknown = |agent: &Agent| agent.view(now).dropped_probes["probe_unknown_key"];
            let before = unknown(agent);
            agent.handle_datagram("198.51.100.8:51872".parse::<SocketAddr>().unwrap().into(), &datagram, now);
            unknown(agent) == before
        };
        others.iter().filter(is_heard).count()
    };
    assert!(heard(&mut agent) < others.len(), "the steps for the host did not wait for all keys");
    for _ in 0..others.len() {
        if agent.poll_timeout().is_some_and(|(due, _)| due <= now) {
            agent.handle_timeout(now);
        }
    }
    assert_eq!(heard(&mut agent), others.len());
}
