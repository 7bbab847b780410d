#![allow(clippy::unwrap_used)]
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use super::*;

fn server(host: &str, port: u16) -> ServerAddress {
    ServerAddress { host: host.to_owned(), port, pin: [7; 32], proxy: None }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_and_soon() {
    // Bound and released: nobody listens there now.
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let dialer = Dialer::new().unwrap();
    let started = Instant::now();
    let error = dialer.dial(&server("127.0.0.1", port)).await.unwrap_err();
    assert!(started.elapsed() < CONNECT_TIMEOUT, "a refused connection need not wait for the whole timeout");
    assert_eq!(
        error.to_string(),
        format!(
            "nothing answers at https://127.0.0.1:{port} (connection refused): is the server running, is the port open for UDP and TCP?"
        )
    );
}

#[tokio::test]
async fn a_server_that_answers_garbage_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let garbage = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"220 mail.example ESMTP ready, how do you do\r\n").await.unwrap();
            // Keeps the connection until the other side has had enough.
            let mut rest = Vec::new();
            let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest).await;
        }
    });
    let error = Dialer::new().unwrap().dial(&server("127.0.0.1", port)).await.unwrap_err();
    assert_eq!(error.to_string(), format!("https://127.0.0.1:{port} does not speak TLS: is it a discovery server?"));
    garbage.abort();
}

#[tokio::test]
async fn a_name_that_does_not_resolve_is_named() {
    let error = Dialer::new().unwrap().dial(&server("no-such-host.invalid", 7443)).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("the name no-such-host.invalid does not resolve (") && text.contains("DNS"), "{text}");
}

#[test]
fn quic_goes_first_tcp_follows_then_the_proxy_and_port_443_comes_last() {
    let addresses = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let order = |port| {
        let mut plan = plan(&addresses, port);
        plan.extend(plan_proxy(port));
        plan.sort_by_key(|attempt| attempt.after);
        plan.iter().map(|a| (a.way, a.port, a.after.as_millis())).collect::<Vec<_>>()
    };
    let with_fallback = order(7443);
    assert_eq!(with_fallback[0], (Way::Quic(addresses[0]), 7443, 0));
    assert_eq!(with_fallback[1], (Way::Quic(addresses[1]), 7443, 100));
    assert_eq!(with_fallback[2], (Way::Tcp(addresses[0]), 7443, 200));
    assert!(with_fallback.contains(&(Way::Proxy, 7443, 400)));
    assert_eq!(with_fallback[9], (Way::Proxy, 443, 800));
    assert_eq!(with_fallback.iter().filter(|(_, port, _)| *port == 443).count(), 5);
    assert_eq!(order(443).len(), 5);
}

#[test]
fn families_take_turns() {
    let found = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.1"].map(|ip| ip.parse().unwrap()).to_vec();
    let turns: Vec<_> = interleave(found).iter().map(ToString::to_string).collect();
    assert_eq!(turns, ["2001:db8::1", "192.0.2.1", "2001:db8::2", "2001:db8::3"]);
}

#[test]
fn the_most_telling_failure_wins() {
    let server = server("2001:db8::1", 7443);
    let no_ipv6 = || Failure::Unreachable("Network is unreachable".to_owned());
    let refused = server.explain([Failure::Refused, no_ipv6(), Failure::TimedOut].into_iter().max().unwrap());
    assert!(refused.to_string().contains("(connection refused)"), "{refused}");
    let worst = [Failure::TimedOut, Failure::WrongPin([1; 32]), Failure::HungUp].into_iter().max().unwrap();
    let text = server.explain(worst).to_string();
    assert!(text.starts_with("the server at https://[2001:db8::1]:7443 has key sha256:0101"), "{text}");
    assert!(text.contains("the configuration expects sha256:0707"), "{text}");
}
