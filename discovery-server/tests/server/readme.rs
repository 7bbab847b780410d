//! The README's word on discovery servers: each error it quotes is said here, by a real server where that is possible.

use std::net::UdpSocket;
use std::path::Path;

use mesh_agent::clock;
use mesh_agent::io::session::{DialError, Dialer, ServerAddress};
use mesh_common::key::SignKey;
use mesh_proto::discovery::client::{Client, ClientConfig, ClientEvent};
use mesh_proto::wire::session::{ClientMessage, ErrorCode, ServerMessage, SessionError};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use super::proxy::{Behaviour, Proxy};
use super::support::{Member, Running, binary, cluster, in_time, key_file};
use crate::markdown::{self, compare};

const ENDPOINT: &str = "disc.example:443";
const STATE_DIR: &str = "/var/lib/meshspan-discovery";

fn quoted(part: &str) -> Vec<String> {
    let blocks = markdown::blocks().into_iter();
    let blocks = blocks.filter(|block| block.chapter == markdown::TROUBLES && block.part == part);
    blocks.filter(|block| block.language == "text").map(|block| block.text).collect()
}

#[tokio::test]
async fn what_an_agent_says_about_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let dialer = Dialer::new().unwrap();
    let server = Running::start(dir.path(), &["--max-connections", "1"]);
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let name = "disc.example".to_owned();
    let mut said = vec![
        dial(&dialer, &ServerAddress { port: free, ..server.address() }).await,
        dial(&dialer, &mail_server(server.address()).await).await,
        dial(&dialer, &closing_server(server.address()).await).await,
        DialError::NameNotResolved { host: name, reason: "Name or service not known".to_owned() }.to_string(),
    ];
    let not_ours = "it answers HTTP status 404".to_owned();
    said.push(DialError::NotADiscoveryServer { endpoint: format!("https://{ENDPOINT}"), reason: not_ours }.to_string());
    let away = ServerAddress { host: "disc.invalid".to_owned(), ..server.address() };
    for behaviour in [Behaviour::Answers("407 Authenticate"), Behaviour::Answers("403 Forbidden"), Behaviour::Hangs] {
        let proxy = Proxy::start(behaviour).await;
        let text = dial(&dialer, &ServerAddress { proxy: proxy.address("", &server).proxy, ..away.clone() }).await;
        let text = text.replace(&format!("disc.invalid:{}", server.port), ENDPOINT);
        said.push(text.replace(&proxy.at.to_string(), "proxy.example:3128"));
    }
    let other_key = dial(&dialer, &ServerAddress { pin: [7; 32], ..server.address() }).await;
    let pin = mesh_common::config::Pin;
    said.push(
        other_key
            .replace(&pin(server.pin).to_string(), "sha256:4f0c…")
            .replace(&pin([7; 32]).to_string(), "sha256:e3b0…"),
    );

    let _only_place = Member::join(&dialer, &server.address(), 1, 1).await;
    said.push(turned_away(&dialer, &server).await);
    let closed_dir = tempfile::tempdir().unwrap();
    let closed = Running::start(closed_dir.path(), &["--only-namespace", &cluster(9).namespace.to_string()]);
    let refused = turned_away(&dialer, &closed).await;
    said.push(refused.replace(&cluster(1).namespace.to_string(), "7a31…"));

    let unproven = SessionError { code: ErrorCode::AuthFailed, limit: String::new(), retry_after: Default::default() };
    let unproven = ServerMessage::Error(unproven).encode();
    said.push(lost(client(false), &unproven));
    said.push(lost(client(true), &unproven));
    // Nothing is stored before anybody was let in.
    said.push(lost(client(false), &ServerMessage::Stored { seq: 1 }.encode()));
    compare(quoted("Reaching a discovery server"), said);
}

#[test]
fn what_a_server_says_to_its_admin() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let taken = server.socket().to_string();
    let mut said = vec![
        error(dir.path(), &["--listen", &taken]).replace(&taken, "[::]:443"),
        server.logged("open to every cluster")["message"].as_str().unwrap().to_owned(),
    ];
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let stun = taken.local_addr().unwrap().to_string();
    said.push(error(dir.path(), &["--listen", "127.0.0.1:0", "--stun", &stun]).replace(&stun, "[::]:3478"));
    // An address for documentation is no host's.
    said.push(error(dir.path(), &["--listen", "127.0.0.1:0", "--stun-alt-address", "203.0.113.2"]));

    let cut = tempfile::tempdir().unwrap();
    std::fs::write(key_file(cut.path()), "-----BEGIN PRIVATE KEY-----\n").unwrap();
    let damaged = error(cut.path(), &[]);
    let (before, after) = (damaged.find(" (").unwrap(), damaged.find("): ").unwrap());
    said.push(format!("{} (…{}", &damaged[..before], &damaged[after..]));
    let empty = tempfile::tempdir().unwrap();
    said.push(error(empty.path(), &["token"]));

    let file = tempfile::NamedTempFile::new().unwrap();
    let nowhere = file.path().join("state");
    let throwaway =
        Running::start(&nowhere, &[]).logged("cannot keep a TLS key")["message"].as_str().unwrap().to_owned();
    said.push(
        throwaway
            .replace(nowhere.to_str().unwrap(), STATE_DIR)
            .replace("Not a directory (os error 20)", "Permission denied (os error 13)"),
    );
    compare(quoted("Running a discovery server"), said);
}

#[test]
fn every_command_of_the_server_that_it_names_exists() {
    let commands = markdown::commands("discovery-server");
    assert!(commands.len() > 2, "{commands:?}");
    for command in &commands {
        let output = binary().args(&command.subcommands).arg("--help").output().unwrap();
        assert!(output.status.success(), "{command:?}");
        let help = String::from_utf8(output.stdout).unwrap();
        for flag in &command.flags {
            assert!(help.contains(flag.as_str()), "{command:?} has no {flag}");
        }
    }
}

#[tokio::test]
async fn every_metric_of_the_server_that_it_names_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &["--max-connections", "1"]);
    let dialer = Dialer::new().unwrap();
    let (mut only_one, _) = Member::join(&dialer, &server.address(), 1, 1).await;
    turned_away(&dialer, &server).await;
    let absent = mesh_common::id::NodeId([7; 32]);
    only_one.say(&ClientMessage::Relay { to: absent, payload: "nobody gets this".into() }).await;
    only_one.until(|message| matches!(message, ServerMessage::NoPeer(node) if node == absent).then_some(())).await;
    let (_, page) = server.get("/metrics");
    let served: Vec<&str> = page.lines().filter_map(|line| line.split(['{', ' ']).next()).collect();
    let named = markdown::spans("meshspan_discovery_");
    // This one is an agent's.
    let named: Vec<_> = named.iter().filter(|name| *name != "meshspan_discovery_server_connected").collect();
    assert!(named.len() >= 6, "{named:?}");
    for name in named {
        assert!(served.contains(&name.as_str()), "{name} is not in\n{page}");
    }
}

/// Why there is no carrier, with the address as in the README.
async fn dial(dialer: &Dialer, server: &ServerAddress) -> String {
    let error = dialer.dial(server).await.err().unwrap().to_string();
    error.replace(&format!("127.0.0.1:{}", server.port), ENDPOINT)
}

async fn mail_server(like: ServerAddress) -> ServerAddress {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            // The other side may hang up first.
            let _ = stream.write_all(b"220 mail.example ESMTP ready\r\n").await;
            held.push(stream);
        }
    });
    ServerAddress { port, ..like }
}

async fn closing_server(like: ServerAddress) -> ServerAddress {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream)
        }
    });
    ServerAddress { port, ..like }
}

fn client(proxied: bool) -> Client {
    let config = ClientConfig {
        server_name: ENDPOINT.to_owned(),
        keys: cluster(1),
        identity: SignKey::from_seed(&[2; 32]),
        instance: [2; 16],
        proxied,
    };
    Client::new(config, 1, clock::now())
}

/// What an agent says after this message.
fn lost(mut client: Client, message: &[u8]) -> String {
    client.handle_connected([0; 32], clock::now());
    client.handle_message(message, clock::now());
    reason(&mut client).unwrap()
}

fn reason(client: &mut Client) -> Option<String> {
    std::iter::from_fn(|| client.poll_event()).find_map(|event| match event {
        ClientEvent::Lost { reason, .. } => Some(reason),
        _ => None,
    })
}

/// What an agent says that a server turns away.
async fn turned_away(dialer: &Dialer, server: &Running) -> String {
    let mut carrier = dialer.dial(&server.address()).await.unwrap();
    let mut client = client(false);
    client.handle_connected(carrier.exporter, clock::now());
    in_time("the refusal", async {
        loop {
            while let Some(message) = client.poll_transmit() {
                // The refusal may come before anything is asked.
                let _ = carrier.sender.send(message).await;
            }
            let message = carrier.receiver.next().await.expect("a refusal before the end").unwrap();
            client.handle_message(&message, clock::now());
            if let Some(reason) = reason(&mut client) {
                return reason;
            }
        }
    })
    .await
}

/// What a server says that cannot start.
fn error(state_dir: &Path, args: &[&str]) -> String {
    let output = binary().args(args).arg("--state-dir").arg(state_dir).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    let error = stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    error.replace(state_dir.to_str().unwrap(), STATE_DIR)
}
