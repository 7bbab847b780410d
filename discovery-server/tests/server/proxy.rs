//! An agent whose only way out is an HTTP proxy.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_agent::io::session::{CarrierKind, Dialer, ServerAddress};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::support::{Member, Running};

/// `joe:canary`
const CREDENTIALS: &str = "Basic am9lOmNhbmFyeQ==";

#[tokio::test]
async fn a_proxy_that_alone_knows_the_name_leads_to_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let proxy = Proxy::start(Behaviour::Connects { to: server.socket(), credentials: Some(CREDENTIALS) }).await;
    let address = proxy.address("joe:canary@", &server);
    let dialer = Dialer::new().unwrap();
    let (member, welcome) = Member::join(&dialer, &address, 1, 1).await;
    assert_eq!(member.carrier.kind, CarrierKind::WebSocket);
    assert_eq!(member.carrier.addresses, Vec::<std::net::IpAddr>::new());
    assert!(welcome.relay);
    assert_eq!(proxy.asked(), [format!("CONNECT disc.invalid:{} HTTP/1.1", server.port)]);
}

#[tokio::test]
async fn where_the_server_is_reached_directly_no_proxy_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let proxy = Proxy::start(Behaviour::Hangs).await;
    let address = ServerAddress { host: "127.0.0.1".to_owned(), ..proxy.address("", &server) };
    let (member, _) = Member::join(&Dialer::new().unwrap(), &address, 1, 1).await;
    assert_eq!(member.carrier.kind, CarrierKind::Quic);
    assert_eq!(proxy.asked(), Vec::<String>::new());
}

#[tokio::test]
async fn a_proxy_that_does_not_help_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let answers = |status| Behaviour::Answers(status);
    for (behaviour, userinfo, expected) in [
        (
            answers("407 Authenticate"),
            "",
            "asks for a user name and a password (407): write http://user:password@host:port",
        ),
        (
            answers("407 Authenticate"),
            "joe:canary@",
            "does not accept the user name and password of its URL (407): correct them",
        ),
        (answers("403 Forbidden"), "", "refuses to connect to disc.invalid:PORT (403): allow it there"),
        (
            Behaviour::Hangs,
            "joe:canary@",
            "does not answer within 3s: is it an HTTP proxy? See mesh.proxy and HTTPS_PROXY",
        ),
        (Behaviour::Garbage, "", "does not answer like an HTTP proxy ("),
        (Behaviour::Closed, "", "cannot be reached ("),
    ] {
        let proxy = Proxy::start(behaviour).await;
        let started = Instant::now();
        let error = Dialer::new().unwrap().dial(&proxy.address(userinfo, &server)).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_millis(5500), "{behaviour:?}");
        let text = error.to_string().replace(&server.port.to_string(), "PORT");
        let hidden = if userinfo.is_empty() { "" } else { "(hidden)@" };
        assert!(
            text.starts_with(&format!("the proxy http://{hidden}{} {expected}", proxy.at)),
            "{behaviour:?}: {text}"
        );
        assert!(!format!("{error:?} {text}").contains("canary"));
    }
}

/// What stands behind the proxy may be somebody else.
#[tokio::test]
async fn the_pin_holds_through_a_proxy() {
    let dir = tempfile::tempdir().unwrap();
    let server = Running::start(dir.path(), &[]);
    let proxy = Proxy::start(Behaviour::Connects { to: server.socket(), credentials: None }).await;
    let address = ServerAddress { pin: [7; 32], ..proxy.address("", &server) };
    let error = Dialer::new().unwrap().dial(&address).await.unwrap_err().to_string();
    assert!(error.contains("has key sha256:") && error.contains("expects sha256:0707"), "{error}");
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Behaviour {
    /// A tunnel to there, for whoever shows these credentials.
    Connects {
        to: SocketAddr,
        credentials: Option<&'static str>,
    },
    Answers(&'static str),
    Garbage,
    Hangs,
    Closed,
}

pub(crate) struct Proxy {
    pub(crate) at: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    pub(crate) async fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        if !matches!(behaviour, Behaviour::Closed) {
            let asked = asked.clone();
            tokio::spawn(async move {
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(serve(client, behaviour, asked.clone()));
                }
            });
        }
        Self { at, asked }
    }

    /// The server by a name that only the proxy knows.
    pub(crate) fn address(&self, userinfo: &str, server: &Running) -> ServerAddress {
        let proxy = format!("http://{userinfo}{}", self.at).parse().unwrap();
        ServerAddress { host: "disc.invalid".to_owned(), proxy: Some(proxy), ..server.address() }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn serve(mut client: TcpStream, behaviour: Behaviour, asked: Arc<Mutex<Vec<String>>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match client.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    asked.lock().unwrap().push(head.lines().next().unwrap().to_owned());
    let shown = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("proxy-authorization").then(|| value.to_owned())
    });
    let answer = match behaviour {
        Behaviour::Connects { to, credentials } => {
            assert_eq!(shown.as_deref(), credentials);
            client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
            let mut far = TcpStream::connect(to).await.unwrap();
            // Either end may close first.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut far).await;
            return;
        }
        Behaviour::Answers(status) => format!("HTTP/1.1 {status}\r\nContent-Length: 3\r\n\r\nno\n"),
        Behaviour::Garbage => "220 mail.example ESMTP ready\r\n".to_owned(),
        Behaviour::Hangs | Behaviour::Closed => String::new(),
    };
    // The other side may have had enough.
    let _ = client.write_all(answer.as_bytes()).await;
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest).await;
}
