//! Strangers who say the wrong thing: they lose their own connection, nobody else notices.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use bytes::Bytes;
use mesh_agent::io::session::{CarrierKind, Dialer};
use mesh_common::limits::{MAX_MESSAGE, MAX_UNPROVEN_PER_IP};
use mesh_proto::wire::session::{ClientMessage, ServerMessage};
use socket2::{Domain, Socket, Type};

use super::support::{Member, PATIENCE, Running, address_for, in_time};

async fn alive(member: &mut Member, number: u64) {
    member.say(&ClientMessage::Ping(number)).await;
    member.until(|message| (message == ServerMessage::Pong(number)).then_some(())).await;
}

#[tokio::test]
async fn garbage_on_every_port_hurts_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let dialer = Dialer::new().unwrap();
    let (mut over_quic, _) = Member::join(&dialer, &server.address(), 1, 1).await;
    let (mut over_tcp, _) = Member::join(&dialer, &address_for(CarrierKind::WebSocket, &server).await, 1, 2).await;

    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    for (number, len) in [0, 1, 20, 1199, 1200, 1500, 9000].into_iter().enumerate() {
        for first in [0x00, 0x40, 0xc0, 0xff] {
            let mut datagram = vec![first ^ u8::try_from(number).unwrap(); len];
            if let Some(byte) = datagram.first_mut() {
                *byte = first;
            }
            udp.send_to(&datagram, server.socket()).unwrap();
        }
    }
    for (port, garbage) in [
        (server.socket(), &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..]),
        (server.socket(), &[0x16, 0x03, 0x01, 0xff, 0xff, 0x01]),
        (server.socket(), &[0; 4096]),
        (server.http.unwrap(), &[0xff; 64 * 1024]),
        (server.http.unwrap(), b"GET /metrics HTTP/9.9\r\n\r\n"),
    ] {
        let mut stream = TcpStream::connect(port).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The server may hang up while we still write or read: that is its right.
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }

    alive(&mut over_quic, 1).await;
    alive(&mut over_tcp, 2).await;
    Member::join(&dialer, &server.address(), 1, 3).await;
}

#[tokio::test]
async fn a_crowd_of_silent_connections_keeps_nobody_else_out() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    // From another address of loopback: as many as one address may have and some more.
    let crowd: Vec<_> = (0..MAX_UNPROVEN_PER_IP + 10)
        .map(|_| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into()).unwrap();
            socket.connect(&server.socket().into()).unwrap();
            socket
        })
        .collect();
    in_time("the crowd at the door", async {
        let mut look = tokio::time::interval(Duration::from_millis(5));
        while !server.get("/metrics").1.contains("meshspan_discovery_handshakes_turned_away_total 10\n") {
            look.tick().await;
        }
    })
    .await;
    // So many are at the door now that QUIC clients have to prove their address first.
    let dialer = Dialer::new().unwrap();
    for kind in [CarrierKind::Quic, CarrierKind::WebSocket] {
        let (member, _) = Member::join(&dialer, &address_for(kind, &server).await, 1, 1).await;
        assert_eq!(member.carrier.kind, kind);
    }
    drop(crowd);
}

#[tokio::test]
async fn a_member_that_breaks_the_protocol_loses_only_its_own_session() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let dialer = Dialer::new().unwrap();
    let (mut witness, _) = Member::join(&dialer, &server.address(), 1, 1).await;
    let malformed = ClientMessage::Ping(1).encode().slice(..3);
    let oversized = Bytes::from(vec![2; MAX_MESSAGE + 1]);
    for kind in [CarrierKind::Quic, CarrierKind::WebSocket] {
        let address = address_for(kind, &server).await;
        for (number, bad) in [malformed.clone(), oversized.clone()].into_iter().enumerate() {
            let (mut member, _) = Member::join(&dialer, &address, 1, 2).await;
            // A WebSocket client refuses to send what is over its own limit: then there is nothing to judge.
            if member.carrier.sender.send(bad).await.is_ok() {
                member.ended().await;
            }
            alive(&mut witness, number as u64).await;
        }
    }
}
