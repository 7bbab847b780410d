#![allow(clippy::unwrap_used)]

use mesh_common::id::ServerId;
use mesh_common::key::PresharedKey;

use super::*;

const RELAY: Endpoint = Endpoint::Relay(ServerId(0));

fn at(millis: u64) -> Instant {
    Instant::from_origin(Duration::from_secs(1000) + Duration::from_millis(millis))
}

fn address(last: u8) -> SocketAddr {
    ([192, 0, 2, last], 51872).into()
}

fn proxy() -> SocketAddr {
    ([127, 64, 0, 1], 4000).into()
}

fn spec() -> PeerSpec {
    PeerSpec {
        preshared_key: Some(PresharedKey([9; 32])),
        allowed_ips: ["10.0.0.1/32".parse().unwrap()].into(),
        keepalive: None,
        generation: 0,
    }
}

/// The kernel in a few lines: it takes what it is told and says it again.
struct Kernel {
    peer: Peer,
    state: PeerState,
    changes: usize,
}

impl Kernel {
    fn new(route: Endpoint) -> Self {
        let mut peer = Peer::new(spec(), Ipv4Addr::new(127, 64, 0, 1), proxy(), true);
        peer.set_route(Some(route));
        let mut kernel = Self { peer, state: PeerState::default(), changes: 0 };
        kernel.write(0);
        kernel
    }

    /// With a session over `endpoint`.
    fn up(route: Endpoint, endpoint: SocketAddr) -> Self {
        let mut kernel = Self::new(route);
        kernel.handshake(endpoint, 1);
        kernel.write(1);
        kernel
    }

    fn write(&mut self, now: u64) -> Option<PeerChange> {
        let change = self.peer.take_change(at(now))?;
        self.changes += 1;
        if change.remove {
            self.state = PeerState::default();
        }
        self.state.endpoint = change.endpoint.or(self.state.endpoint);
        if let Some(key) = &change.preshared_key {
            self.state.preshared_key.clone_from(key);
        }
        if let Some(allowed) = &change.allowed_ips {
            self.state.allowed_ips = allowed.iter().copied().collect();
        }
        Some(change)
    }

    fn handshake(&mut self, endpoint: SocketAddr, now: u64) -> Vec<PeerReport> {
        self.state.endpoint = Some(endpoint);
        self.state.last_handshake = (1_700_000_000, i64::try_from(now).unwrap() + 1);
        self.look(now)
    }

    fn look(&mut self, now: u64) -> Vec<PeerReport> {
        self.peer.observe(self.state.clone(), at(now))
    }
}

#[test]
fn a_peer_is_proxied_until_it_has_a_session_and_a_direct_path() {
    let mut kernel = Kernel::new(Endpoint::Direct(address(1)));
    assert_eq!(kernel.state.endpoint, Some(proxy()), "no session: its initiations pass the proxy");
    let reports = kernel.handshake(address(1), 10);
    assert_eq!(reports, [PeerReport::Handshake { endpoint: Endpoint::Direct(address(1)) }]);
    assert_eq!(kernel.write(10), None, "the kernel is there already");
    kernel.peer.set_route(Some(RELAY));
    assert_eq!(kernel.write(20).unwrap().endpoint, Some(proxy()));
    kernel.peer.set_route(Some(Endpoint::Extra(mesh_proto::device::SocketId(1), address(1))));
    assert_eq!(kernel.write(21), None, "another socket is the proxy's as well");
    kernel.peer.set_route(Some(Endpoint::Direct(address(1))));
    assert_eq!(kernel.write(22).unwrap().endpoint, Some(address(1)));
    let later = u64::try_from(REJECT_AFTER_TIME.as_millis()).unwrap() + 11;
    assert_eq!(kernel.write(later).unwrap().endpoint, Some(proxy()), "the session is over");
}

#[test]
fn roaming_among_direct_addresses_is_told_and_never_undone() {
    let mut kernel = Kernel::up(Endpoint::Direct(address(1)), address(1));
    let before = kernel.changes;
    for step in 1..20 {
        kernel.state.endpoint = Some(address(2));
        let reports = kernel.look(step * 250);
        let is_told = reports.contains(&PeerReport::Roamed { endpoint: Endpoint::Direct(address(2)) });
        assert_eq!(is_told, step == 1);
        assert!(!kernel.peer.needs_change(at(step * 250)) && kernel.write(step * 250).is_none());
    }
    assert_eq!(kernel.changes, before);
    // The path agent follows: nothing to write either.
    kernel.peer.set_route(Some(Endpoint::Direct(address(2))));
    assert_eq!(kernel.write(6000), None);
    kernel.peer.set_route(Some(Endpoint::Direct(address(3))));
    assert_eq!(kernel.write(6001).unwrap().endpoint, Some(address(3)), "a new choice is written");
}

#[test]
fn a_relayed_peer_that_went_direct_by_itself_is_brought_back_unless_that_is_chosen_soon() {
    let mut kernel = Kernel::up(RELAY, proxy());
    kernel.state.endpoint = Some(address(1));
    kernel.look(1000);
    assert_eq!(kernel.write(1000), None);
    kernel.look(1300);
    assert_eq!(kernel.write(1300).unwrap().endpoint, Some(proxy()));
    kernel.state.endpoint = Some(address(1));
    kernel.look(2000);
    kernel.peer.set_route(Some(Endpoint::Direct(address(1))));
    assert_eq!(kernel.write(2100), None, "chosen meanwhile");
    kernel.look(2400);
    assert_eq!(kernel.write(2400), None);
}

#[test]
fn stragglers_of_a_relay_come_in_as_if_they_had_come_straight() {
    let mut kernel = Kernel::up(RELAY, proxy());
    let data = WireGuardKind::Data;
    assert_eq!(kernel.peer.take_incoming(data, 100, RELAY, at(10)), Entrance::Proxy);
    kernel.peer.set_route(Some(Endpoint::Direct(address(1))));
    kernel.write(20);
    assert_eq!(kernel.peer.take_incoming(data, 100, RELAY, at(30)), Entrance::From(address(1)));
    kernel.state.endpoint = Some(address(2));
    kernel.look(40);
    assert_eq!(kernel.peer.take_incoming(data, 100, RELAY, at(50)), Entrance::From(address(2)), "where it roamed to");
    // A handshake is answered the way it came.
    assert_eq!(kernel.peer.take_incoming(WireGuardKind::Initiation, 148, RELAY, at(60)), Entrance::Proxy);
    assert_eq!(kernel.peer.take_outgoing(WireGuardKind::Response, &[2; 92], at(61)).to, Some(RELAY));
    // One that was under way led the kernel back to the proxy: what then comes is sent on, and the endpoint written again.
    assert_eq!(kernel.peer.take_outgoing(data, &[4; 100], at(62)).to, Some(Endpoint::Direct(address(1))));
    assert!(kernel.peer.needs_change(at(62)));
    assert_eq!(kernel.write(62).unwrap().endpoint, Some(address(1)));
}

#[test]
fn a_handshake_that_is_wanted_is_forced_once_and_then_sent_again() {
    let mut kernel = Kernel::up(Endpoint::Direct(address(1)), address(1));
    assert_eq!(kernel.peer.start_handshake(at(1000)), None);
    let change = kernel.write(1000).unwrap();
    assert!(
        change.remove && change.set && change.poke,
        "with a session the kernel would not begin another: {change:?}"
    );
    assert_eq!(change.endpoint, Some(proxy()));
    let asked = kernel.peer.take_outgoing(WireGuardKind::Initiation, &[1; 148], at(1010));
    assert_eq!(asked, Outgoing { to: Some(Endpoint::Direct(address(1))), is_demand: false });
    let again = kernel.peer.start_handshake(at(2000)).unwrap();
    assert_eq!(again, (Bytes::from_static(&[1; 148]), Some(Endpoint::Direct(address(1)))));
    assert_eq!(kernel.write(2000), None);
    assert_eq!(kernel.peer.start_handshake(at(7000)), None, "the kernel has forgotten that one");
    let change = kernel.write(7000).unwrap();
    assert!(change.poke && !change.remove);
}

#[test]
fn of_two_initiations_that_cross_one_side_s_is_made_anew_unless_a_session_came_of_them() {
    let crossed = |begins_again| {
        let mut kernel = Kernel::new(Endpoint::Direct(address(1)));
        kernel.peer.begins_again = begins_again;
        kernel.peer.take_outgoing(WireGuardKind::Initiation, &[1; 148], at(1000));
        // The peer's initiation, and where it came from.
        kernel.state.rx_bytes += 148;
        kernel.state.endpoint = Some(address(1));
        kernel.look(1020);
        kernel
    };
    let begins_anew =
        |change: Option<PeerChange>| change.is_some_and(|change| change.remove && change.set && change.poke);
    let mut kernel = crossed(true);
    assert!(!begins_anew(kernel.write(1030)), "the answer may be under way");
    kernel.look(1440);
    assert!(begins_anew(kernel.write(1440)));
    kernel.look(2000);
    assert!(!begins_anew(kernel.write(2000)), "once");

    let mut kernel = crossed(false);
    kernel.look(1440);
    assert!(!begins_anew(kernel.write(1440)), "the other side does");

    let mut kernel = crossed(true);
    kernel.handshake(address(1), 1060);
    kernel.look(1440);
    assert!(!begins_anew(kernel.write(1440)), "there is a session");

    let mut kernel = Kernel::new(Endpoint::Direct(address(1)));
    kernel.peer.take_outgoing(WireGuardKind::Initiation, &[1; 148], at(1000));
    kernel.look(1020);
    kernel.look(1440);
    assert!(!begins_anew(kernel.write(1440)), "nothing came");
}

#[test]
fn initiations_of_the_kernel_s_own_are_demand_and_told_once_a_second() {
    let mut kernel = Kernel::new(RELAY);
    let mut demand = |now| kernel.peer.take_outgoing(WireGuardKind::Initiation, &[1; 148], at(now)).is_demand;
    assert!(demand(5000));
    assert!(!demand(5500));
    assert!(demand(6100));
}

#[test]
fn a_new_generation_or_key_makes_the_tunnel_anew_and_allowed_ips_do_not() {
    let mut kernel = Kernel::up(RELAY, proxy());
    kernel.peer.set_spec(PeerSpec { allowed_ips: ["10.0.0.2/32".parse().unwrap()].into(), ..spec() });
    let change = kernel.write(100).unwrap();
    assert!(!change.remove && change.allowed_ips.is_some() && change.preshared_key.is_none());
    kernel.peer.set_spec(PeerSpec { generation: 1, ..spec() });
    let change = kernel.write(200).unwrap();
    assert!(change.remove && change.set && change.poke, "it was in use: {change:?}");
    assert!(!kernel.peer.has_session(at(201)));
    kernel.peer.set_spec(PeerSpec { preshared_key: None, generation: 1, ..spec() });
    assert!(kernel.write(300).unwrap().remove);
    assert_eq!(kernel.write(301), None);
}

#[test]
fn what_somebody_else_changed_is_a_difference_and_the_same_step_mends_it() {
    let mut kernel = Kernel::new(RELAY);
    kernel.look(10);
    assert!(kernel.peer.is_as_written());
    kernel.state.allowed_ips.clear();
    kernel.look(20);
    assert!(!kernel.peer.is_as_written());
    assert_ne!(kernel.peer.written(), Some(&spec()));
    kernel.peer.set_spec(spec());
    assert!(kernel.write(30).unwrap().allowed_ips.is_some());
    kernel.look(40);
    assert!(kernel.peer.is_as_written());
    kernel.peer.forget();
    assert_eq!(kernel.peer.written(), None);
    assert!(kernel.write(50).unwrap().set);
}

#[test]
fn traffic_is_counted_by_path_and_never_too_high() {
    let mut kernel = Kernel::up(RELAY, proxy());
    for _ in 0..3 {
        kernel.peer.take_outgoing(WireGuardKind::Data, &[4; 100], at(10));
        kernel.peer.take_incoming(WireGuardKind::Data, 100, RELAY, at(10));
    }
    let traffic =
        |path: Endpoint, sent, received| PeerReport::Traffic(vec![PathTraffic { endpoint: path, sent, received }]);
    (kernel.state.tx_bytes, kernel.state.rx_bytes) = (300, 300);
    assert_eq!(kernel.look(20), [traffic(RELAY, 3, 3)]);
    // Garbage of a relay: the kernel took none of it.
    kernel.peer.take_incoming(WireGuardKind::Data, 100, RELAY, at(30));
    assert_eq!(kernel.look(40), []);
    kernel.peer.set_route(Some(Endpoint::Direct(address(1))));
    kernel.write(50);
    (kernel.state.tx_bytes, kernel.state.rx_bytes) = (300 + 10 * 1452, 300 + 40);
    assert_eq!(kernel.look(60), [traffic(Endpoint::Direct(address(1)), 10, 1)]);
    assert_eq!(kernel.look(70), []);
    // A handshake is no data.
    kernel.state.tx_bytes += 148;
    kernel.state.rx_bytes += 92;
    let reports = kernel.handshake(address(1), 80);
    assert_eq!(reports, [PeerReport::Handshake { endpoint: Endpoint::Direct(address(1)) }]);
}
