//! The server's key: made once, kept, named when it is damaged, and what agents know the server by.

use std::fs;
use std::process::Stdio;
use std::time::Instant;

use mesh_agent::io::session::{CarrierKind, DialError, Dialer, ServerAddress};
use mesh_common::config::Pin;
use mesh_common::limits::SESSION_IDLE;
use mesh_common::token::ServerToken;
use mesh_proto::wire::session::ClientMessage;
use nix::sys::signal::Signal;

use super::support::{Member, Running, binary, in_time, key_file, tcp_only};

#[tokio::test]
async fn a_killed_server_comes_back_with_the_same_pin() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Running::start(dir.path(), &[]);
    first.signal(Signal::SIGKILL);
    first.wait().await;
    let second = Running::start(dir.path(), &[]);
    assert_eq!(first.pin, second.pin);
    Member::join(&Dialer::new().unwrap(), &second.address(), 1, 1).await;
}

#[tokio::test]
async fn a_client_of_a_killed_server_learns_of_it_at_its_next_packet() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Running::start(dir.path(), &[]);
    let (mut member, _) = Member::join(&Dialer::new().unwrap(), &first.address(), 1, 1).await;
    assert_eq!(member.carrier.kind, CarrierKind::Quic);
    first.signal(Signal::SIGKILL);
    first.wait().await;
    let _second = Running::start(dir.path(), &["--listen", &first.socket().to_string()]);
    let asked = Instant::now();
    member.say(&ClientMessage::Ping(1)).await;
    while let Some(Ok(_)) = in_time("the end of the session", member.carrier.receiver.next()).await {}
    assert!(asked.elapsed() < SESSION_IDLE / 2, "the client had to wait {:?} for its own timeout", asked.elapsed());
}

#[tokio::test]
async fn a_server_with_another_key_is_refused_by_name_over_both_carriers() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    for address in [server.address(), tcp_only(&server).await] {
        let expected = [7; 32];
        let address = ServerAddress { pin: expected, ..address };
        let error = Dialer::new().unwrap().dial(&address).await.unwrap_err();
        assert!(matches!(error, DialError::WrongPin { .. }), "{error}");
        let text = error.to_string();
        for part in
            [format!("https://127.0.0.1:{}", address.port), Pin(server.pin).to_string(), Pin(expected).to_string()]
        {
            assert!(text.contains(&part), "{text}");
        }
    }
}

#[test]
fn a_damaged_key_file_is_named_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(key_file(dir.path()), "-----BEGIN PRIVATE KEY-----\nMIGH").unwrap();
    let output = binary().args(["--listen", "127.0.0.1:0", "--state-dir"]).arg(dir.path()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains(key_file(dir.path()).to_str().unwrap()) && error.contains("damaged"), "{error}");
    assert!(output.stdout.is_empty());
    assert_eq!(fs::read_to_string(key_file(dir.path())).unwrap(), "-----BEGIN PRIVATE KEY-----\nMIGH");
}

#[tokio::test]
async fn without_a_place_for_its_key_the_server_warns_and_serves() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let server = Running::start(&file.join("state"), &[]);
    let warning = server.logged("cannot keep a TLS key");
    assert_eq!(warning["level"], "WARN");
    assert!(warning["message"].as_str().unwrap().contains("--state-dir"));
    Member::join(&Dialer::new().unwrap(), &server.address(), 1, 1).await;
}

#[test]
fn the_token_says_endpoint_and_pin() {
    let dir = tempfile::tempdir().unwrap();
    let token = || {
        let output = binary()
            .args(["token", "--advertise", "disc.example:7443", "--state-dir"])
            .arg(dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, _, error) = token();
    assert_eq!(code, Some(1));
    assert!(error.contains("there is no key in") && error.contains("start the server once"), "{error}");

    let server = Running::start(dir.path(), &[]);
    let (code, text, error) = token();
    assert_eq!(code, Some(0), "{error}");
    let parsed = ServerToken::parse(text.trim()).unwrap();
    assert_eq!(parsed.servers.len(), 1);
    assert_eq!(parsed.servers[0].endpoint.to_string(), "https://disc.example:7443");
    assert_eq!(parsed.servers[0].pin.0, server.pin);
}
