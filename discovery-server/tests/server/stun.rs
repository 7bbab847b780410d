//! The STUN service.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use mesh_agent::io::session::{CarrierKind, Dialer};
use mesh_proto::wire::stun::{Change, binding_request, parse_response};

use super::support::{Member, PATIENCE, Running, address_for, binary};

fn client() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn both_ports_tell_the_clients_address_and_answer_for_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let [first, second]: [u16; 2] = server.stun.clone().try_into().unwrap();
    assert_ne!(first, second);
    let client = client();
    let mut transaction = [0; 12];
    for (asked, other) in [(first, second), (second, first)] {
        for change_port in [false, true] {
            transaction[0] += 1;
            let request = binding_request(&transaction, Change { port: change_port, ..Change::NONE });
            client.send_to(&request, ("127.0.0.1", asked)).unwrap();
            let mut answer = [0; 1500];
            let (len, from) = client.recv_from(&mut answer).unwrap();
            assert!(len <= request.len(), "{len} bytes for {}", request.len());
            assert_eq!(from, SocketAddr::from(([127, 0, 0, 1], if change_port { other } else { asked })));
            let response = parse_response(&answer[..len]).unwrap();
            assert_eq!((response.transaction, response.mapped), (transaction, client.local_addr().unwrap()));
        }
    }
}

#[test]
fn garbage_and_requests_too_short_for_their_answer_get_none() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let client = client();
    let bare: Vec<u8> = [&[0, 1, 0, 0][..], &0x2112_a442_u32.to_be_bytes(), &[5; 12]].concat();
    for datagram in [&bare[..], b"", b"hello", &[0xff; 1400]] {
        client.send_to(datagram, ("127.0.0.1", server.stun[0])).unwrap();
    }
    // The first answer is the one to the first good request, sent last.
    let request = binding_request(&[6; 12], Change::NONE);
    client.send_to(&request, ("127.0.0.1", server.stun[0])).unwrap();
    let mut answer = [0; 1500];
    let (len, _) = client.recv_from(&mut answer).unwrap();
    assert_eq!(parse_response(&answer[..len]).unwrap().transaction, [6; 12]);
    let (_, page) = server.get("/metrics");
    assert!(page.contains("meshspan_discovery_stun_requests_total{outcome=\"answered\"} 1"), "{page}");
}

#[test]
fn a_source_has_one_budget_on_all_ports_and_addresses() {
    /// A burst, then so many a second (stun.rs).
    const BUDGET: (f64, f64) = (1000.0, 100.0);
    const ROUNDS: usize = 40;
    const A_ROUND: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &["--stun", "127.0.0.1:0", "--stun-alt-address", "127.0.0.2"]);
    let addresses = [[127, 0, 0, 1], [127, 0, 0, 2]].map(IpAddr::from);
    let sockets: Vec<SocketAddr> =
        addresses.iter().flat_map(|ip| server.stun.iter().map(|port| SocketAddr::new(*ip, *port))).collect();
    let client = client();
    let outcome = |page: &str, outcome: &str| -> usize {
        let line = format!("meshspan_discovery_stun_requests_total{{outcome=\"{outcome}\"}} ");
        page.lines().find_map(|found| found.strip_prefix(&line)).unwrap().parse().unwrap()
    };
    let start = Instant::now();
    let mut answered = 0;
    for round in 1..=ROUNDS {
        for socket in &sockets {
            for number in 0..A_ROUND {
                let request = binding_request(&[number as u8; 12], Change::NONE);
                client.send_to(&request, socket).unwrap();
            }
        }
        // No socket holds more than a round, so nothing is lost uncounted.
        let sent = round * A_ROUND * sockets.len();
        loop {
            let (_, page) = server.get("/metrics");
            answered = outcome(&page, "answered");
            let heard = answered + outcome(&page, "over-budget");
            if heard == sent {
                break;
            }
            assert!(heard < sent && start.elapsed() < PATIENCE, "{heard} of {sent} requests were counted");
        }
    }
    let allowed = BUDGET.0 + BUDGET.1 * start.elapsed().as_secs_f64() + 1.0;
    assert!(answered as f64 <= allowed, "{answered} answers, {allowed} are one budget");
    assert!(answered as f64 >= BUDGET.0, "{answered} answers are less than a burst");
}

#[test]
fn off_means_off() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Running::start(dir.path(), &["--stun", "off"]).stun.is_empty());
}

/// Asks for an answer from elsewhere: who answered, if anybody.
fn asked(client: &UdpSocket, to: SocketAddr, from: Change, number: u8) -> Option<SocketAddr> {
    let request = binding_request(&[number; 12], from);
    client.send_to(&request, to).unwrap();
    let mut answer = [0; 1500];
    let (len, source) = client.recv_from(&mut answer).ok()?;
    assert!(len <= request.len(), "{len} bytes for {}", request.len());
    let response = parse_response(&answer[..len]).unwrap();
    let local = client.local_addr().unwrap();
    assert_eq!((response.transaction, response.mapped), ([number; 12], local), "asked {to} for {from:?}");
    Some(source)
}

#[tokio::test]
async fn another_address_answers_for_the_first_and_the_other_way_round() {
    // With sockets on one address each, and with one that has all addresses.
    for listen in ["127.0.0.1:0", "[::]:0"] {
        let dir = tempfile::tempdir().unwrap();
        let server = Running::start(dir.path(), &["--stun", listen, "--stun-alt-address", "127.0.0.2"]);
        let ports: [u16; 2] = server.stun.clone().try_into().unwrap();
        let addresses: [IpAddr; 2] = [[127, 0, 0, 1].into(), [127, 0, 0, 2].into()];
        let (client, mut number) = (client(), 0);
        for (address, other_address) in [(0, 1), (1, 0)] {
            for (port, other_port) in [(0, 1), (1, 0)] {
                let at = |address: usize, port: usize| SocketAddr::new(addresses[address], ports[port]);
                for (from, expected) in [
                    (Change::NONE, at(address, port)),
                    (Change::PORT, at(address, other_port)),
                    (Change::ADDRESS, at(other_address, port)),
                    (Change::BOTH, at(other_address, other_port)),
                ] {
                    number += 1;
                    let to = at(address, port);
                    assert_eq!(asked(&client, to, from, number), Some(expected), "{listen}: {to} for {from:?}");
                }
            }
        }
        let kind = CarrierKind::Quic;
        let (_, welcome) = Member::join(&Dialer::new().unwrap(), &address_for(kind, &server).await, 1, 1).await;
        assert_eq!(welcome.stun_ports, ports);
        assert_eq!(welcome.stun_alt, ports.map(|port| SocketAddr::new(addresses[1], port)), "{listen}");
    }
}

#[test]
fn the_other_address_may_have_ports_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &["--stun", "127.0.0.1:0", "--stun-alt-address", "127.0.0.2:0"]);
    let source = asked(&client(), ([127, 0, 0, 1], server.stun[0]).into(), Change::ADDRESS, 1).unwrap();
    assert_eq!(source.ip(), IpAddr::from([127, 0, 0, 2]));
    assert!(!server.stun.contains(&source.port()), "{source}");
}

#[test]
fn nobody_answers_for_an_address_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    for (more, to) in [
        (&[][..], "127.0.0.1"),
        // It has no IPv6.
        (&["--stun", "[::]:0", "--stun-alt-address", "127.0.0.2"], "::1"),
    ] {
        let server = Running::start(dir.path(), more);
        let to = SocketAddr::new(to.parse().unwrap(), server.stun[0]);
        let client = UdpSocket::bind(SocketAddr::new(to.ip(), 0)).unwrap();
        client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        assert_eq!(asked(&client, to, Change::ADDRESS, 1), None, "{more:?}");
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(asked(&client, to, Change::NONE, 2), Some(to), "{more:?}");
        let (_, page) = server.get("/metrics");
        assert!(page.contains("meshspan_discovery_stun_requests_total{outcome=\"malformed\"} 1"), "{page}");
    }
}

#[test]
fn another_address_that_is_none_is_refused_with_the_fix() {
    let dir = tempfile::tempdir().unwrap();
    for (more, says) in [
        (&["--stun", "off", "--stun-alt-address", "127.0.0.2"][..], "leave one out"),
        (&["--stun", "127.0.0.1:0", "--stun-alt-address", "127.0.0.1:0"], "answers there already"),
        (
            &["--stun", "127.0.0.1:0", "--stun-alt-address", "127.0.0.2", "--stun-alt-address", "127.0.0.3"],
            "one address of each family",
        ),
    ] {
        let mut command = binary();
        let output = command.arg("--state-dir").arg(dir.path()).args(["--listen", "127.0.0.1:0"]).args(more).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("--stun-alt-address") && said.contains(says), "{said}");
    }
}
