//! The process: usage, health, metrics, shutdown, and what it tells of others.

use std::os::unix::net::UnixDatagram;
use std::process::Stdio;
use std::time::{Duration, Instant};

use mesh_agent::io::session::{CarrierKind, Dialer};
use mesh_proto::wire::session::ServerMessage;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::support::{Member, PATIENCE, Running, address_for, binary, key_file};

#[test]
fn a_wrong_flag_is_a_usage_error() {
    for args in [&["--ttl", "never"][..], &["--no-such-flag"], &["--tls-key", "a.pem"], &["no-such-command"]] {
        let output = binary().args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
}

#[test]
fn a_taken_address_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let taken = server.socket().to_string();
    let output = binary().args(["--listen", &taken, "--state-dir"]).arg(dir.path()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains(&taken) && error.contains("--listen"), "{error}");
}

#[tokio::test]
async fn health_and_metrics_show_what_happens() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    assert_eq!(server.get("/livez"), (200, "ok\n".to_owned()));
    assert_eq!(server.get("/readyz"), (200, "ok\n".to_owned()));
    assert_eq!(server.get("/").0, 404);
    let dialer = Dialer::new().unwrap();
    let (mut member, _) = Member::join(&dialer, &server.address(), 1, 1).await;
    let stored = member.put(1).await;
    member.until(|message| matches!(message, ServerMessage::Stored { seq: 1 }).then_some(())).await;
    let (status, page) = server.get("/metrics");
    assert_eq!(status, 200);
    for line in [
        "meshspan_discovery_connections 1",
        "meshspan_discovery_namespaces 1",
        "meshspan_discovery_slots 1",
        "meshspan_discovery_hellos_accepted_total 1",
        "meshspan_discovery_puts_accepted_total 1",
        "meshspan_discovery_handshakes_turned_away_total 0",
        "# EOF",
    ] {
        assert!(page.lines().any(|shown| shown == line), "{line} is missing in\n{page}");
    }
    assert!(page.contains("process_resident_memory_bytes "));
    assert!(!page.contains(&member.keys.namespace.to_string()) && !page.contains("127.0.0.1"));
    assert!(!stored.is_empty());
}

#[tokio::test]
async fn the_log_tells_a_story_and_no_addresses_of_clients() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    assert_eq!(server.logged("open to every cluster")["level"], "WARN");
    let (member, welcome) = Member::join(&Dialer::new().unwrap(), &server.address(), 1, 1).await;
    let opened = server.logged("cluster opened");
    assert_eq!(opened["namespace"], member.keys.namespace.to_string()[..8]);
    let text = server.log_text();
    assert!(
        !text.contains(&welcome.observed.to_string()) && !text.contains(&member.keys.namespace.to_string()),
        "{text}"
    );
}

#[tokio::test]
async fn sigterm_asks_the_clients_to_come_back_and_ends_in_order() {
    for kind in [CarrierKind::Quic, CarrierKind::WebSocket] {
        for polite in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let mut server = Running::start(dir.path(), &[]);
            let dialer = Dialer::new().unwrap();
            let (mut member, _) = Member::join(&dialer, &address_for(kind, &server).await, 1, 1).await;
            server.signal(Signal::SIGTERM);
            let asked = Instant::now();
            let spread = member
                .until(|message| match message {
                    ServerMessage::Drain { retry_after } => Some(retry_after),
                    _ => None,
                })
                .await;
            assert!(spread <= Duration::from_millis(500), "a lone client comes back soon, not after {spread:?}");
            if polite {
                member.carrier.sender.close().await;
                drop(member.carrier.receiver);
                assert_eq!(server.wait().await.code(), Some(0));
            } else {
                // Stays until the server has had enough of waiting.
                assert_eq!(server.wait().await.code(), Some(0));
                assert!(asked.elapsed() < PATIENCE / 2);
            }
            assert_eq!(server.logged("stopped")["all_left"], polite, "{kind:?}");
        }
    }
}

#[test]
fn the_service_manager_hears_of_start_and_stop() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = || {
        let mut message = [0; 256];
        let len = manager.recv(&mut message).unwrap();
        String::from_utf8(message[..len].to_vec()).unwrap()
    };
    let mut server = binary()
        .env("NOTIFY_SOCKET", &path)
        .env("STATE_DIRECTORY", dir.path())
        .args(["--listen", "127.0.0.1:0", "--stun", "off"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(hear().trim(), "READY=1");
    assert!(key_file(dir.path()).exists(), "systemd's directory is the state directory");
    kill(Pid::from_raw(server.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(hear().trim(), "STOPPING=1");
    assert_eq!(server.wait().unwrap().code(), Some(0));
}

#[tokio::test]
async fn nobody_has_to_read_its_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Running::start_unheard(dir.path());
    assert_eq!(server.get("/readyz").0, 200);
    server.signal(Signal::SIGINT);
    assert_eq!(server.wait().await.code(), Some(0));
}
