//! The machine before a router that does what a test says.
#![allow(clippy::unwrap_used)]

use super::*;

const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const PORT: u16 = 51872;

/// What a router says to a request.
type Says = Box<dyn FnMut(&MappingRequest, Instant) -> Option<Result<Grant, MappingFailure>>>;

struct World {
    mapper: PortMapper,
    now: Instant,
    router: Says,
    /// Every request, and when.
    asked: Vec<(Instant, MappingRequest)>,
    remapped: usize,
}

fn gateway() -> Gateway {
    Gateway { router: ROUTER, client: Ipv4Addr::new(192, 168, 1, 10) }
}

fn seen(at: &[Ipv4Addr]) -> Seen {
    Seen { is_translated: (!at.is_empty()).then_some(true), at: at.iter().copied().collect() }
}

fn grant(address: Ipv4Addr, lifetime: u64) -> Grant {
    Grant { address: Some(address), port: PORT, lifetime: Some(Duration::from_secs(lifetime)), epoch: None }
}

/// A router that speaks one protocol and grants for so long.
fn honest(protocol: MappingProtocol, lifetime: u64) -> Says {
    Box::new(move |request, _| {
        let answer =
            if request.protocol == protocol { Ok(grant(OUTSIDE, lifetime)) } else { Err(MappingFailure::NoAnswer) };
        Some(answer)
    })
}

impl World {
    fn new(router: Says) -> Self {
        let mut world = Self {
            mapper: PortMapper::new(true, [7; 12], 1),
            now: Instant::from_origin(Duration::from_secs(1)),
            router,
            asked: Vec::new(),
            remapped: 0,
        };
        world.mapper.handle_seen(seen(&[OUTSIDE]), world.now);
        world.mapper.handle_host(Some(gateway()), PORT, world.now);
        world.drain();
        world
    }

    fn drain(&mut self) {
        while let Some(event) = self.mapper.poll_event() {
            match event {
                MapperEvent::Request(request) => {
                    self.asked.push((self.now, request.clone()));
                    if let Some(outcome) = (self.router)(&request, self.now) {
                        self.mapper.handle_outcome(request.id, outcome, self.now);
                    }
                }
                MapperEvent::Announced => {}
                MapperEvent::Remapped => self.remapped += 1,
            }
        }
    }

    fn run(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        while let Some((at, _)) = self.mapper.poll_timeout().filter(|(at, _)| *at <= end) {
            self.now = self.now.max(at);
            self.mapper.handle_timeout(self.now);
            self.drain();
        }
        self.now = end;
    }

    fn protocols(&self) -> Vec<MappingProtocol> {
        self.asked.iter().map(|(_, request)| request.protocol).collect()
    }

    fn external(&self) -> SocketAddr {
        (OUTSIDE, PORT).into()
    }
}

#[test]
fn protocols_are_tried_in_turn_until_one_works_and_the_port_is_announced() {
    for (n, protocol) in MappingProtocol::ALL.into_iter().enumerate() {
        let mut world = World::new(honest(protocol, 3600));
        assert_eq!(world.protocols(), MappingProtocol::ALL[..=n], "{protocol}");
        assert_eq!(world.mapper.announced(), Some(world.external()));
        assert_eq!(world.remapped, 1);
        let Ask::Map { external_port, lifetime, .. } = world.asked[n].1.ask else { panic!("{:?}", world.asked[n]) };
        assert_eq!((external_port, lifetime), (PORT, LIFETIME));
        world.run(10 * 3600);
        let renewals = world.asked.len() - (n + 1);
        assert!((20..=23).contains(&renewals), "{renewals} in ten hours");
        assert!(world.protocols()[n..].iter().all(|asked| *asked == protocol));
        assert_eq!((world.mapper.announced(), world.remapped), (Some(world.external()), 1));
    }
}

#[test]
fn a_short_life_is_renewed_at_half_of_it() {
    let mut world = World::new(honest(MappingProtocol::NatPmp, 30));
    world.run(600);
    let pauses: Vec<Duration> = world.asked[2..].windows(2).map(|pair| pair[1].0.since(pair[0].0)).collect();
    assert!(pauses.len() >= 39, "{}", pauses.len());
    for pause in pauses {
        assert!((Duration::from_millis(13_500)..=Duration::from_secs(15)).contains(&pause), "{pause:?}");
    }
}

#[test]
fn a_router_without_any_is_asked_ever_less_often() {
    let mut world = World::new(Box::new(|_, _| Some(Err(MappingFailure::NoAnswer))));
    assert_eq!(world.protocols(), MappingProtocol::ALL);
    assert_eq!(world.mapper.view().state, MapperState::Failed);
    world.run(24 * 3600);
    let rounds = world.asked.len() / 3;
    assert!((48..=60).contains(&rounds), "{rounds} rounds in a day");
    assert_eq!(world.mapper.counters()["port_mapping_no_answer: PCP"], rounds as u64);
    // Another network, another chance, at once.
    world.mapper.handle_network_changed(world.now);
    world.drain();
    assert_eq!(world.asked.len(), rounds * 3 + 3);
}

#[test]
fn a_shell_that_never_answers_stops_nothing() {
    let mut world = World::new(Box::new(|_, _| None));
    world.run(2 * 3600);
    assert!(world.asked.len() > 6 && world.asked.len() < 100, "{}", world.asked.len());
    assert!(world.mapper.abandoned.len() <= MAX_ABANDONED);
}

#[test]
fn what_a_router_tells_of_itself_is_announced_as_it_stands_or_not_at_all() {
    let foreign = Ipv4Addr::new(198, 51, 100, 9);
    for (told, doubt) in [
        ("100.64.3.2", Doubt::NotPublic { told: Ipv4Addr::new(100, 64, 3, 2) }),
        ("192.168.0.2", Doubt::NotPublic { told: Ipv4Addr::new(192, 168, 0, 2) }),
        ("127.0.0.1", Doubt::NotPublic { told: Ipv4Addr::LOCALHOST }),
        ("224.0.0.1", Doubt::NotPublic { told: Ipv4Addr::new(224, 0, 0, 1) }),
        ("0.0.0.0", Doubt::Untold),
        ("198.51.100.9", Doubt::Elsewhere { told: foreign, seen: OUTSIDE }),
    ] {
        let told: Ipv4Addr = told.parse().unwrap();
        let mut world = World::new(Box::new(move |_, _| Some(Ok(grant(told, 3600)))));
        assert_eq!(world.mapper.announced(), None, "{told}");
        let expected = MapperState::Doubted { protocol: MappingProtocol::Pcp, port: PORT, doubt };
        assert_eq!(world.mapper.view().state, expected);
        assert_eq!(world.mapper.counters()["port_mapping_not_believed"], 1);
        // It is kept: behind two NATs it opens the inner one.
        world.run(10 * 3600);
        assert!(world.asked.len() >= 20);
        assert_eq!(world.mapper.counters()["port_mapping_not_believed"], 1, "said once");
    }
}

#[test]
fn a_port_is_told_to_nobody_before_a_server_saw_this_node_there_and_not_after_it_was_seen_elsewhere() {
    let mut world = World::new(honest(MappingProtocol::Pcp, 3600));
    world.mapper.handle_seen(Seen::default(), world.now);
    world.drain();
    assert_eq!(world.mapper.announced(), None);
    world.mapper.handle_seen(seen(&[OUTSIDE]), world.now);
    assert_eq!(world.mapper.announced(), Some(world.external()));
    let elsewhere = Ipv4Addr::new(198, 51, 100, 9);
    world.run(60);
    let before = world.asked.len();
    world.mapper.handle_seen(seen(&[elsewhere]), world.now);
    world.drain();
    assert_eq!(world.mapper.announced(), None);
    assert_eq!(world.asked.len(), before + 1, "the router may have another address by now: it is asked at once");
    // One of several uplinks is enough.
    world.mapper.handle_seen(seen(&[elsewhere, OUTSIDE]), world.now);
    assert_eq!(world.mapper.announced(), Some(world.external()));
}

#[test]
fn nobody_is_asked_without_need() {
    let public = Gateway { router: Ipv4Addr::new(203, 0, 113, 1), client: OUTSIDE };
    for (is_on, gateway, is_translated, asks) in [
        (true, Some(gateway()), None, true),
        (true, Some(gateway()), Some(true), true),
        (true, Some(gateway()), Some(false), false),
        (true, Some(public), None, false),
        (true, Some(public), Some(true), true),
        (true, None, Some(true), false),
        (false, Some(gateway()), Some(true), false),
    ] {
        let now = Instant::ORIGIN;
        let mut mapper = PortMapper::new(is_on, [0; 12], 1);
        mapper.handle_seen(Seen { is_translated, at: BTreeSet::new() }, now);
        mapper.handle_host(gateway, PORT, now);
        assert_eq!(mapper.poll_event().is_some(), asks, "{is_on} {gateway:?} {is_translated:?}");
        assert_eq!(mapper.poll_timeout().is_some(), asks);
    }
}

#[test]
fn another_router_is_asked_and_the_old_one_gets_its_port_back() {
    let mut world = World::new(honest(MappingProtocol::Pcp, 3600));
    let other = Gateway { router: Ipv4Addr::new(10, 0, 0, 1), client: Ipv4Addr::new(10, 0, 0, 9) };
    world.mapper.handle_host(Some(other), PORT, world.now);
    world.drain();
    let [(_, first), (_, release), (_, again)] = &world.asked[..] else { panic!("{:?}", world.asked) };
    assert_eq!((release.gateway, release.ask), (first.gateway, Ask::Release { external_port: PORT }));
    assert_eq!((again.gateway, again.protocol), (other, MappingProtocol::Pcp));
    assert!(matches!(again.ask, Ask::Map { .. }));
}

#[test]
fn what_is_granted_after_the_network_was_left_is_given_back() {
    let mut world = World::new(Box::new(|_, _| None));
    let id = world.asked[0].1.id;
    world.mapper.handle_host(None, PORT, world.now);
    world.mapper.handle_outcome(id, Ok(grant(OUTSIDE, 3600)), world.now);
    world.drain();
    assert_eq!(world.asked.len(), 2);
    assert_eq!(world.asked[1].1.ask, Ask::Release { external_port: PORT });
    assert_eq!(world.mapper.announced(), None);
}

#[test]
fn a_stop_gives_the_port_back_and_nothing_is_asked_after_it() {
    let mut world = World::new(honest(MappingProtocol::Upnp, 3600));
    world.mapper.handle_stop(world.now);
    world.drain();
    let (_, last) = world.asked.last().unwrap();
    assert_eq!((last.protocol, last.ask), (MappingProtocol::Upnp, Ask::Release { external_port: PORT }));
    let asked = world.asked.len();
    world.mapper.handle_network_changed(world.now);
    world.run(7200);
    assert_eq!((world.asked.len(), world.mapper.announced()), (asked, None));
}

#[test]
fn a_router_that_stops_to_answer_loses_the_port_when_its_time_is_over_and_not_before() {
    let mut world = World::new(Box::new(|_, now| {
        let dead = now >= Instant::from_origin(Duration::from_secs(100));
        Some(if dead { Err(MappingFailure::NoAnswer) } else { Ok(grant(OUTSIDE, 3600)) })
    }));
    world.run(3500);
    assert_eq!(world.mapper.announced(), Some(world.external()));
    let tries = world.asked.len();
    assert!((6..100).contains(&tries), "{tries}");
    world.run(200);
    assert_eq!((world.mapper.announced(), world.mapper.view().state), (None, MapperState::Failed));
}

#[test]
fn a_router_that_forgot_is_asked_as_soon_as_a_path_falls_silent_but_not_by_every_one() {
    let mut world = World::new(honest(MappingProtocol::Pcp, 3600));
    for _ in 0..50 {
        world.mapper.handle_doubt(world.now);
        world.drain();
    }
    assert_eq!(world.asked.len(), 1, "it was granted a moment ago");
    world.run(60);
    for _ in 0..50 {
        world.mapper.handle_doubt(world.now);
        world.drain();
    }
    assert_eq!(world.asked.len(), 2);
}

#[test]
fn a_clock_of_the_router_that_began_anew_is_a_restart() {
    let began = std::rc::Rc::new(std::cell::Cell::new(0));
    let router = began.clone();
    let mut world = World::new(Box::new(move |_, now| {
        let epoch = now.since_origin().as_secs() - router.get();
        Some(Ok(Grant { epoch: Some(epoch as u32), ..grant(OUTSIDE, 3600) }))
    }));
    world.run(4 * 3600);
    assert_eq!(world.mapper.counters().get("port_mapping_router_restarted"), None);
    began.set(world.now.since_origin().as_secs());
    world.run(4 * 3600);
    assert_eq!(world.mapper.counters()["port_mapping_router_restarted"], 1);
    assert_eq!(world.mapper.announced(), Some(world.external()));
}

#[test]
fn another_port_at_the_renewal_is_another_announcement() {
    let mut world = World::new(Box::new(|_, now| {
        let port = if now < Instant::from_origin(Duration::from_secs(60)) { PORT } else { 4000 };
        Some(Ok(Grant { port, ..grant(OUTSIDE, 3600) }))
    }));
    world.run(3600);
    assert_eq!(world.mapper.announced(), Some((OUTSIDE, 4000).into()));
    assert_eq!(world.remapped, 2);
}

#[test]
fn nonsense_is_a_failure() {
    for (nonsense, why) in [
        (Grant { port: 0, ..grant(OUTSIDE, 3600) }, "port 0"),
        (grant(OUTSIDE, 0), "0 s only"),
        (grant(OUTSIDE, 19), "19 s only"),
    ] {
        let world = World::new(Box::new(move |_, _| Some(Ok(nonsense))));
        let view = world.mapper.view();
        assert_eq!(view.state, MapperState::Failed);
        let said = view.tried[&MappingProtocol::Pcp].clone().unwrap_err().to_string();
        assert!(said.contains(why), "{said}");
    }
    // A life beyond all measure is checked upon all the same.
    let mut world = World::new(honest(MappingProtocol::Pcp, u64::from(u32::MAX)));
    world.run(4 * 3600);
    assert!(world.asked.len() >= 4, "{}", world.asked.len());
}

#[test]
fn an_outcome_that_nobody_waits_for_changes_nothing() {
    let mut world = World::new(honest(MappingProtocol::Pcp, 3600));
    let id = world.asked[0].1.id;
    for id in [id, MappingId(99)] {
        world.mapper.handle_outcome(id, Ok(Grant { port: 9, ..grant(OUTSIDE, 3600) }), world.now);
        world.mapper.handle_outcome(id, Err(MappingFailure::NoAnswer), world.now);
    }
    world.drain();
    assert_eq!((world.asked.len(), world.mapper.announced()), (1, Some(world.external())));
}
