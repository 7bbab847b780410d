//! What a member gets from the server, over both carriers.

use mesh_agent::io::session::{CarrierKind, Dialer, ServerAddress};
use mesh_proto::wire::session::{Binding, ClientMessage, ErrorCode, ServerMessage};

use super::support::{Member, Running, address_for, cluster};

const BOTH: [CarrierKind; 2] = [CarrierKind::Quic, CarrierKind::WebSocket];

#[tokio::test]
async fn members_find_each_other_over_any_pair_of_carriers() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let dialer = Dialer::new().unwrap();
    let mut cluster_seed = 0;
    for near in BOTH {
        for far in BOTH {
            cluster_seed += 1;
            let (mut reader, welcome) = Member::join(&dialer, &address_for(near, &server).await, cluster_seed, 1).await;
            assert_eq!(reader.carrier.kind, near);
            assert!(welcome.observed.ip().is_loopback());
            assert_eq!(welcome.stun_ports, server.stun);
            reader.say(&ClientMessage::Watch(None)).await;
            reader.until(|message| matches!(message, ServerMessage::Synced(_)).then_some(())).await;

            let (mut writer, _) = Member::join(&dialer, &address_for(far, &server).await, cluster_seed, 2).await;
            assert_eq!(writer.carrier.kind, far);
            for seq in 1..=3 {
                let put = writer.put(seq).await;
                let got = reader
                    .until(|message| match message {
                        ServerMessage::Frame(frame) => Some(frame),
                        _ => None,
                    })
                    .await;
                assert_eq!(got, put, "{near:?} {far:?}");
            }
            writer.carrier.sender.close().await;
        }
    }
}

#[tokio::test]
async fn one_port_serves_both_families() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &["--listen", ":0"]);
    let dialer = Dialer::new().unwrap();
    for host in ["127.0.0.1", "::1", "localhost"] {
        let address = ServerAddress { host: host.to_owned(), ..server.address() };
        let (member, welcome) = Member::join(&dialer, &address, 1, 1).await;
        assert_eq!(member.carrier.kind, CarrierKind::Quic);
        assert_eq!(welcome.observed.ip(), member.carrier.remote.ip(), "both ends are on loopback, nothing is mapped");
    }
}

#[tokio::test]
async fn clusters_do_not_see_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let dialer = Dialer::new().unwrap();
    let (mut one, _) = Member::join(&dialer, &server.address(), 1, 1).await;
    one.put(1).await;
    one.until(|message| matches!(message, ServerMessage::Stored { seq: 1 }).then_some(())).await;
    let (mut other, _) = Member::join(&dialer, &server.address(), 2, 2).await;
    other.say(&ClientMessage::Watch(None)).await;
    other
        .until(|message| {
            assert!(!matches!(message, ServerMessage::Frame(_)), "a frame of another cluster");
            matches!(message, ServerMessage::Synced(_)).then_some(())
        })
        .await;
}

#[tokio::test]
async fn the_server_speaks_first_so_a_challenge_can_be_signed_on_both_carriers() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &["--own-name", "disc.example"]);
    let dialer = Dialer::new().unwrap();
    for kind in BOTH {
        let mut member = Member::connect(&dialer, &address_for(kind, &server).await, 1, 1).await;
        let challenge = member
            .until(|message| match message {
                ServerMessage::Challenge(challenge) => Some(challenge),
                _ => None,
            })
            .await;
        member.hello(Binding::Challenge(challenge), "disc.example:443").await;
        member.until(|message| matches!(message, ServerMessage::Welcome(_)).then_some(())).await;
    }
}

#[tokio::test]
async fn a_proof_made_for_another_connection_does_not_hold() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let dialer = Dialer::new().unwrap();
    for kind in BOTH {
        let address = address_for(kind, &server).await;
        let other = Member::connect(&dialer, &address, 1, 1).await;
        let mut member = Member::connect(&dialer, &address, 1, 1).await;
        assert_ne!(other.carrier.exporter, member.carrier.exporter);
        member.hello(Binding::Exporter(other.carrier.exporter), "127.0.0.1:1").await;
        assert_eq!(member.ended().await.unwrap().code, ErrorCode::AuthFailed);
    }
}

#[tokio::test]
async fn a_closed_server_says_so_before_it_hangs_up() {
    let dir = tempfile::tempdir().unwrap();
    let served = cluster(1).namespace.to_string();
    let server = Running::start(dir.path(), &["--only-namespace", &served]);
    let dialer = Dialer::new().unwrap();
    for kind in BOTH {
        let address = address_for(kind, &server).await;
        Member::join(&dialer, &address, 1, 1).await;
        let mut stranger = Member::connect(&dialer, &address, 2, 1).await;
        stranger.hello(Binding::Exporter(stranger.carrier.exporter), "127.0.0.1:1").await;
        assert_eq!(stranger.ended().await.unwrap().code, ErrorCode::NamespaceRefused);
    }
    assert!(!server.log_text().contains("open to every cluster"));
}

#[tokio::test]
async fn a_full_server_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &["--max-connections", "1"]);
    let dialer = Dialer::new().unwrap();
    let (_member, _) = Member::join(&dialer, &server.address(), 1, 1).await;
    let mut late = Member::connect(&dialer, &server.address(), 1, 2).await;
    assert_eq!(late.ended().await.unwrap().code, ErrorCode::ServerFull);
}
