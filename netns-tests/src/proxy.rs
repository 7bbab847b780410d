//! A small HTTP proxy that knows only CONNECT.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::Host;

/// A request's head is shorter.
const HEAD: usize = 8192;

/// A running proxy. Dropping it ends it and every connection through it.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    stop: EventFd,
    carried: AtomicU64,
    streams: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    pub fn start(host: &Host, address: SocketAddr) -> Result<Self> {
        let listener = host.inside(|| TcpListener::bind(address).context("cannot listen as a proxy"))?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { stop, carried: AtomicU64::new(0), streams: Mutex::new(Vec::new()) });
        let thread = host.start_inside({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        })?;
        Ok(Self { address, shared, thread: Some(thread) })
    }

    /// Bytes that went through, both ways.
    pub fn carried(&self) -> u64 {
        self.shared.carried.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.shared.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn keep(&self, stream: &TcpStream) -> Result<()> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).push(stream.try_clone()?);
        Ok(())
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) -> Result<()> {
    let mut connections: Vec<JoinHandle<Result<()>>> = Vec::new();
    loop {
        let mut fds =
            [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(shared.stop.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE)?;
        if shared.stop.read().is_ok() {
            break;
        }
        let (client, _) = listener.accept()?;
        shared.keep(&client)?;
        let shared = Arc::clone(shared);
        // Threads of a thread inside a host are inside it too.
        connections.push(thread::spawn(move || serve(client, &shared)));
    }
    for stream in shared.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let _ = stream.shutdown(Shutdown::Both);
    }
    for connection in connections {
        // How a connection ended is its client's business.
        let _ = connection.join();
    }
    Ok(())
}

fn serve(mut client: TcpStream, shared: &Arc<Shared>) -> Result<()> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < HEAD && client.read(&mut byte)? == 1, "no request");
        head.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&head);
    let mut words = text.split_ascii_whitespace();
    let (Some("CONNECT"), Some(target)) = (words.next(), words.next()) else {
        client.write_all(b"HTTP/1.1 405 Method Not Allowed\r\n\r\n")?;
        return Ok(());
    };
    let Ok(server) = TcpStream::connect(target) else {
        client.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")?;
        return Ok(());
    };
    shared.keep(&server)?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let (from_client, to_server) = (client.try_clone()?, server.try_clone()?);
    let back = {
        let shared = Arc::clone(shared);
        thread::spawn(move || pump(server, client, &shared))
    };
    pump(from_client, to_server, shared);
    let _ = back.join();
    Ok(())
}

fn pump(mut from: TcpStream, mut to: TcpStream, shared: &Shared) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
        shared.carried.fetch_add(length as u64, Ordering::Relaxed);
    }
    let _ = to.shutdown(Shutdown::Write);
}
