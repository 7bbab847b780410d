//! What strangers, peers and relays send to the machine that nobody honest would: it costs a counter, and at most the probes
//! that the budget allows.

use mesh_common::key::ProbeKeys;
use mesh_common::limits::{PROBE_BURST, PROBE_INTERVAL};

use super::*;
use crate::wire::demux;
use crate::wire::probe::{self, Call, Probe};

const PEER: &str = "198.51.100.8:51872";
const PING: Probe = Probe::Ping { id: 7, heard: 0 };

/// An agent behind a NAT with one peer, whose keys it knows, and what came of events so far is forgotten.
struct Scene {
    agent: Agent,
    peer: Other,
    keys: ProbeKeys,
    now: Instant,
}

impl Scene {
    fn new() -> Self {
        let mut agent = fresh(settings(1));
        agent.handle_observed(behind_nat(), at(1));
        welcome(&mut agent, at(1));
        let mut peer = Other::new(7);
        peer.record.candidates = vec![candidate(CandidateKind::Reflexive, PEER)];
        peer.tell(&mut agent, at(1));
        run(&mut agent, &behind_nat(), at(1), Duration::from_secs(5), |_| "203.0.113.7:40000");
        let ours = (agent.identity.node_id(), agent.wg_public);
        let keys = agent.keys.probe_keys((peer.identity.node_id(), &peer.wg), ours).unwrap();
        Self { agent, peer, keys, now: at(6) }
    }

    /// As the peer seals it.
    fn sealed(&self, counter: u64, probe: &Probe) -> Bytes {
        let nonce = [u8::try_from(counter % 251).unwrap(); 24];
        probe::seal(&self.keys.send, &self.peer.record.instance, counter, nonce, probe, None)
    }

    fn counted(&self, why: &str) -> u64 {
        self.agent.view(self.now).dropped_probes.get(why).copied().unwrap_or_default()
    }

    /// A datagram from there to the WireGuard port. Gives where probes go in answer, at once.
    fn receive(&mut self, from: &str, datagram: &[u8]) -> Vec<SocketAddr> {
        self.agent.handle_datagram(from.parse::<SocketAddr>().unwrap().into(), datagram, self.now);
        let events = std::iter::from_fn(|| self.agent.poll_event());
        events
            .filter_map(|event| match event {
                AgentEvent::SendRaw { to, bytes, .. } => is_probe(&bytes).then_some(to),
                _ => None,
            })
            .collect()
    }

    /// Somebody wants to talk to the peer: the id of the ping that asks it.
    fn asked(&mut self) -> u32 {
        self.agent.handle_peer_report(&self.peer.record.wg_key, &PeerReport::Demand, self.now);
        self.asked_again()
    }

    /// The id of the next ping, when its time has come.
    fn asked_again(&mut self) -> u32 {
        let peer: SocketAddr = PEER.parse().unwrap();
        for _ in 0..1000 {
            let events = std::iter::from_fn(|| self.agent.poll_event());
            let probes = events.filter_map(|event| match event {
                AgentEvent::SendRaw { to, bytes, .. } if to == peer => probe::open(&self.keys.receive, &bytes).ok(),
                _ => None,
            });
            let pings = probes.filter_map(|opened| match opened.probe {
                Probe::Ping { id, .. } => Some(id),
                _ => None,
            });
            if let Some(id) = pings.last() {
                return id;
            }
            self.now += Duration::from_millis(5);
            self.agent.handle_timeout(self.now);
        }
        panic!("nobody is asked");
    }

    /// Somebody wants to talk to the peer for so long: where probes go and how many.
    fn demand(&mut self, time: Duration) -> BTreeMap<SocketAddr, u32> {
        let key = self.peer.record.wg_key;
        self.agent.handle_peer_report(&key, &PeerReport::Demand, self.now);
        let mut probes = BTreeMap::new();
        run_with(
            &mut self.agent,
            &behind_nat(),
            self.now,
            time,
            |_| "203.0.113.7:40000",
            |_, event, _| {
                if let AgentEvent::SendRaw { to, bytes, .. } = event
                    && is_probe(&bytes)
                {
                    *probes.entry(to).or_default() += 1;
                }
            },
        );
        self.now += time;
        probes
    }
}

fn is_probe(bytes: &[u8]) -> bool {
    demux::classify(bytes) == demux::Datagram::Probe
}

#[test]
fn a_probe_is_answered_once_and_every_false_one_counted() {
    let mut scene = Scene::new();
    let genuine = scene.sealed(1, &PING);
    let peer: SocketAddr = PEER.parse().unwrap();
    assert_eq!(scene.receive(PEER, &genuine), [peer]);

    // Replayed, from wherever.
    for from in [PEER, "192.0.2.99:9"] {
        assert_eq!(scene.receive(from, &genuine), []);
    }
    assert_eq!(scene.counted("probe_replayed"), 2);

    // Forged: one bit of what is sealed.
    let fresh = scene.sealed(2, &PING);
    for place in [12, 40, fresh.len() - 1] {
        let mut forged = fresh.to_vec();
        forged[place] ^= 1;
        assert_eq!(scene.receive(PEER, &forged), []);
    }
    assert_eq!(scene.counted("probe_forged"), 3);

    // Truncated, anywhere: too short to be one, or cut within what is sealed.
    let long = probe::seal(&scene.keys.send, &scene.peer.record.instance, 3, [9; 24], &PING, Some(1200));
    for length in 0..long.len() {
        assert_eq!(scene.receive(PEER, &long[..length]), []);
    }
    let cut = scene.counted("probe_malformed") + scene.counted("probe_forged") - 3;
    assert_eq!(cut, long.len() as u64);

    // Of no key that is known, and of a start of the peer's agent that is not.
    let mut stranger = fresh.to_vec();
    stranger[4] ^= 1;
    assert_eq!(scene.receive(PEER, &stranger), []);
    let call = Probe::Call(Call { answer_wanted: true, ..Call::default() });
    let other_start = probe::seal(&scene.keys.send, &[99; 16], 3, [9; 24], &call, None);
    assert_eq!(scene.receive(PEER, &other_start), []);
    assert_eq!((scene.counted("probe_unknown_key"), scene.counted("probe_unknown_instance")), (1, 1));

    // None of them spoiled what comes after.
    assert_eq!(scene.receive(PEER, &fresh), [peer]);
}

#[test]
fn a_peer_that_started_anew_and_reaches_no_server_is_known_by_its_answer_and_by_nothing_else() {
    let mut scene = Scene::new();
    let peer: SocketAddr = PEER.parse().unwrap();
    let sealed = |scene: &Scene, counter, probe: &Probe| {
        probe::seal(&scene.keys.send, &[99; 16], counter, [counter as u8; 24], probe, None)
    };
    let pong = |id| Probe::Pong { id, heard: 0, observed: None };
    // A ping may be an old one: it is answered, which tells the peer that we are here, and that is all, however many come.
    let ping = sealed(&scene, 1, &PING);
    let answers: usize = (0..1000).map(|_| scene.receive(PEER, &ping).len()).sum();
    assert!((1..=8).contains(&answers), "{answers}");
    assert_eq!(scene.receive(PEER, &sealed(&scene, 2, &pong(7))), []);
    assert_eq!(scene.counted("probe_unknown_instance"), 1001);

    // Asked, it answers.
    let asked = scene.asked();
    let answer = sealed(&scene, 3, &pong(asked));
    scene.receive(PEER, &answer);
    let up = |scene: &Scene| {
        let path = scene.agent.view(scene.now).peers[0].path.clone().unwrap();
        path.candidates.iter().any(|tried| tried.endpoint == Endpoint::Direct(peer) && tried.rtt.is_some())
    };
    assert!(up(&scene), "the address answers");
    // From then on it is that start that speaks: it is answered as usual, replays and the start before are not.
    let ping = sealed(&scene, 4, &PING);
    assert_eq!(scene.receive(PEER, &ping), [peer]);
    assert_eq!((scene.receive(PEER, &ping), scene.counted("probe_replayed")), (Vec::new(), 1));
    scene.receive(PEER, &answer);
    assert_eq!(scene.counted("probe_replayed"), 2);
    // The same record again changes nothing of that, and the one of the new start neither.
    for instance in [scene.peer.record.instance, [99; 16]] {
        scene.peer.record.instance = instance;
        scene.peer.tell(&mut scene.agent, scene.now);
        scene.agent.handle_timeout(scene.now + SETTLE);
        scene.receive(PEER, &ping);
    }
    assert_eq!(scene.counted("probe_replayed"), 4);
}

#[test]
fn a_late_answer_of_the_start_before_does_not_bring_it_back() {
    let mut scene = Scene::new();
    let pong = |id| Probe::Pong { id, heard: 0, observed: None };
    let asked = [scene.asked(), scene.asked_again()];
    // The start that died answered one ping, its answer is late; the new one answers the other.
    let late = scene.sealed(1, &pong(asked[0]));
    scene.peer.record.instance = [99; 16];
    let (answer, ping) = (scene.sealed(1, &pong(asked[1])), scene.sealed(2, &PING));
    for datagram in [&answer, &ping, &late] {
        scene.receive(PEER, datagram);
    }
    assert_eq!(scene.counted("probe_unknown_instance"), 1);
    scene.receive(PEER, &ping);
    assert_eq!(scene.counted("probe_replayed"), 1, "what the new start sent is remembered");
}

#[test]
fn our_own_probes_that_come_back_are_nobodys() {
    let mut scene = Scene::new();
    let key = scene.peer.record.wg_key;
    scene.agent.handle_peer_report(&key, &PeerReport::Demand, scene.now);
    let mut sent = Vec::new();
    let time = Duration::from_secs(2);
    run_with(
        &mut scene.agent,
        &behind_nat(),
        scene.now,
        time,
        |_| "203.0.113.7:40000",
        |_, event, _| {
            if let AgentEvent::SendRaw { bytes, .. } = event {
                sent.push(bytes);
            }
        },
    );
    assert!(!sent.is_empty());
    scene.now += time;
    for bytes in &sent {
        assert_eq!(scene.receive(PEER, bytes), [], "a reflected probe has an answer");
    }
    assert_eq!(scene.counted("probe_unknown_key"), sent.len() as u64);
}

#[test]
fn pongs_that_answer_nothing_make_no_path() {
    let mut scene = Scene::new();
    scene.demand(Duration::from_secs(1));
    for id in 0..1000 {
        let pong = scene.sealed(10 + u64::from(id), &Probe::Pong { id, heard: 0, observed: None });
        scene.receive("192.0.2.99:9", &pong);
    }
    let peer = &scene.agent.view(scene.now).peers[0];
    let path = peer.path.as_ref().unwrap();
    assert_eq!((path.tier, path.rtt, path.switches), (None, None, 0), "{path:?}");
    assert!(path.candidates.iter().all(|tried| tried.endpoint != Endpoint::Direct("192.0.2.99:9".parse().unwrap())));
}

#[test]
fn a_relay_cannot_lend_a_peer_anothers_voice() {
    let mut scene = Scene::new();
    let mut liar = Other::new(8);
    liar.tell(&mut scene.agent, scene.now);
    scene.agent.handle_timeout(scene.now + SETTLE);
    let from = liar.identity.node_id();
    let genuine = scene.sealed(1, &PING);
    for (payload, counted) in [
        (genuine.clone(), "probe_foreign_sender"),
        (Bytes::from_static(b"hello, what are you doing?"), "relayed_unknown_payload"),
    ] {
        let event = ClientEvent::Relayed { from, payload };
        scene.agent.handle_client_event(ServerId(0), event, scene.now);
        assert_eq!(scene.counted(counted), 1, "{counted}");
    }
    let nobody = ClientEvent::Relayed { from: NodeId([77; 32]), payload: genuine };
    scene.agent.handle_client_event(ServerId(0), nobody, scene.now);
    assert_eq!(scene.counted("relayed_unknown_sender"), 1);
}

#[test]
fn ten_thousand_announced_addresses_cost_the_probe_budget_and_no_more() {
    // A record has room for few, and a call has; a peer that wants more says others each time.
    let many = |number: u32| {
        let [_, b, c, d] = number.to_be_bytes();
        candidate(CandidateKind::Reflexive, &format!("198.{}.{c}.{d}:{}", 100 + b, 9 + number % 50_000))
    };
    let mut scene = Scene::new();
    scene.demand(Duration::from_millis(1));
    let mut probes: BTreeMap<SocketAddr, u32> = BTreeMap::new();
    let mut number = 0;
    let seconds = 30;
    for _ in 0..seconds * 20 {
        scene.peer.record.candidates = (0..MAX_CANDIDATES)
            .map(|_| {
                number += 1;
                many(number)
            })
            .collect();
        let record = Probe::Call(Call {
            answer_wanted: true,
            candidates: scene.peer.record.candidates.clone(),
            ..Default::default()
        });
        let call = scene.sealed(u64::from(number), &record);
        let event = ClientEvent::Relayed { from: scene.peer.identity.node_id(), payload: call };
        scene.agent.handle_client_event(ServerId(0), event, scene.now);
        for (to, count) in scene.demand(Duration::from_millis(50)) {
            *probes.entry(to).or_default() += count;
        }
    }
    assert!(number >= 9_600);
    let all: u32 = probes.values().sum();
    let budget =
        PROBE_BURST + u32::try_from(Duration::from_secs(seconds).as_nanos() / PROBE_INTERVAL.as_nanos()).unwrap();
    assert!(all <= budget, "{all} probes, the budget allows {budget}");
    let most = probes.values().max().copied().unwrap_or_default();
    assert!(most <= 12, "one address got {most}");
}
