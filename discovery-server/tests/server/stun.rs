//! The STUN service.

use std::net::{SocketAddr, UdpSocket};

use mesh_proto::wire::stun::{Change, binding_request, parse_response};

use super::support::{PATIENCE, Running};

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
fn off_means_off() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Running::start(dir.path(), &["--stun", "off"]).stun.is_empty());
}
