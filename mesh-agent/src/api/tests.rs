#![allow(clippy::unwrap_used)]

use std::os::unix::fs::MetadataExt;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::status::tests::example;

fn socket() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("run/agent.sock");
    (dir, socket)
}

/// An agent that answers: its status is the example's, a reload fails, a leave works.
fn agent(socket: &std::path::Path) -> tokio::task::JoinHandle<()> {
    let listener = bind(socket).unwrap();
    let (handle, mut requests) = channel();
    tokio::spawn(serve(listener, handle));
    tokio::spawn(async move {
        while let Some(request) = requests.recv().await {
            match request {
                ApiRequest::Status(answer) => drop(answer.send(Box::new(example()))),
                ApiRequest::Reload(answer) => drop(answer.send(Err("line 3: unknown key".to_owned()))),
                ApiRequest::Leave(answer) => drop(answer.send(Ok(()))),
                ApiRequest::Netcheck(answer) => drop(answer.send(Err("the mesh is switched off".to_owned()))),
                ApiRequest::Ping(PingRequest { peer, via }, answer) => {
                    drop(answer.send(Ok(PingOutcome::Lost { peer, via, waited_ms: 1000 })));
                }
            }
        }
    })
}

#[tokio::test]
async fn what_the_event_loop_answers_arrives() {
    let (_dir, socket) = socket();
    agent(&socket);
    assert_eq!(std::fs::metadata(&socket).unwrap().mode() & 0o777, 0o660);
    assert_eq!(client::status(&socket).await.unwrap(), example());
    client::leave(&socket).await.unwrap();
    let error = client::reload(&socket).await.unwrap_err().to_string();
    assert_eq!(error, "the agent refused: line 3: unknown key");
}

#[tokio::test]
async fn a_ping_says_whom_it_is_for_whatever_the_name_is_made_of() {
    let (_dir, socket) = socket();
    agent(&socket);
    for (peer, via) in [("b", PingVia::Any), ("AbC+/=&via=relay%00\u{1b} é", PingVia::Direct), ("", PingVia::Relay)] {
        let outcome = client::ping(&socket, &PingRequest { peer: peer.to_owned(), via }).await.unwrap();
        assert_eq!(outcome, PingOutcome::Lost { peer: peer.to_owned(), via, waited_ms: 1000 });
    }
    let refused = client::netcheck(&socket).await.unwrap_err().to_string();
    assert_eq!(refused, "the mesh is switched off");
}

#[tokio::test]
async fn an_agent_that_does_not_know_a_request_is_too_old() {
    let (_dir, socket) = socket();
    let listener = bind(&socket).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 1024];
        let _length = stream.read(&mut request).await.unwrap();
        let answer = "HTTP/1.1 404 Not Found\r\ncontent-length: 37\r\n\r\n{\"error\":\"there is no /v1/netcheck\"}\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
    });
    let error = client::netcheck(&socket).await.unwrap_err().to_string();
    assert!(error.contains("is of an older version and cannot do this: restart it"), "{error}");
}

#[tokio::test]
async fn a_live_socket_is_refused_and_a_dead_one_replaced() {
    let (_dir, socket) = socket();
    let missing = client::status(&socket).await.unwrap_err();
    assert!(matches!(missing, ApiError::NotRunning { .. }), "{missing}");
    let listener = bind(&socket).unwrap();
    let error = bind(&socket).unwrap_err().to_string();
    assert_eq!(error, format!("another agent answers on {}: stop it, or give --socket", socket.display()));
    drop(listener);
    assert!(socket.exists(), "a killed agent leaves its socket behind");
    assert!(matches!(client::status(&socket).await, Err(ApiError::NotRunning { .. })));
    agent(&socket);
    client::status(&socket).await.unwrap();

    let file = socket.with_extension("txt");
    std::fs::write(&file, "mine").unwrap();
    assert!(matches!(bind(&file), Err(BindError::NotASocket { .. })));
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
}

#[tokio::test]
async fn an_event_loop_that_is_gone_is_a_refusal_not_a_hang() {
    let (_dir, socket) = socket();
    let (handle, requests) = channel();
    tokio::spawn(serve(bind(&socket).unwrap(), handle));
    drop(requests);
    let error = client::status(&socket).await.unwrap_err().to_string();
    assert_eq!(error, "the agent refused: the agent is stopping");
}

#[tokio::test]
async fn a_full_queue_is_answered_at_once() {
    let (_dir, socket) = socket();
    let (handle, requests) = channel();
    tokio::spawn(serve(bind(&socket).unwrap(), handle.clone()));
    let waiting: Vec<_> = (0..QUEUE)
        .map(|_| {
            let (sender, answer) = oneshot::channel();
            handle.requests.try_send(ApiRequest::Leave(sender)).unwrap();
            answer
        })
        .collect();
    let error = client::leave(&socket).await.unwrap_err().to_string();
    assert_eq!(error, "the agent refused: the agent has too many requests: try again");
    drop((waiting, requests));
}

async fn raw(socket: &std::path::Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn wrong_requests_get_wrong_status_codes() {
    let (_dir, socket) = socket();
    agent(&socket);
    for (request, expected) in [
        ("POST /v1/status HTTP/1.1\r\nconnection: close\r\n\r\n", "405"),
        ("GET /v1/leave HTTP/1.1\r\nconnection: close\r\n\r\n", "405"),
        ("GET /v1/ping?peer=b HTTP/1.1\r\nconnection: close\r\n\r\n", "405"),
        ("POST /v1/ping HTTP/1.1\r\nconnection: close\r\n\r\n", "400"),
        ("POST /v1/ping?peer=b&via=pigeon HTTP/1.1\r\nconnection: close\r\n\r\n", "400"),
        ("POST /v1/ping?peer=%fg HTTP/1.1\r\nconnection: close\r\n\r\n", "400"),
        ("POST /v1/ping?peer=b&count=9 HTTP/1.1\r\nconnection: close\r\n\r\n", "400"),
        ("GET /v1/secrets HTTP/1.1\r\nconnection: close\r\n\r\n", "404"),
        ("rubbish\r\n\r\n", "400"),
    ] {
        let answer = raw(&socket, request).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected}")), "{request:?} gives {answer:?}");
    }
    client::status(&socket).await.unwrap();
}

#[tokio::test]
async fn others_may_look_and_not_change() {
    let (handle, mut requests) = channel();
    for path in ["/v1/reload", "/v1/leave", "/v1/netcheck", "/v1/ping?peer=b"] {
        let request = hyper::Request::post(path).body(()).unwrap();
        assert_eq!(server::answer(&request, false, &handle).await.status(), 403, "{path}");
    }
    assert!(requests.try_recv().is_err(), "a refused request reached the event loop");
}
