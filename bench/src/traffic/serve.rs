//! The child's side: takes orders, a thread each.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};

use super::{Done, Order, Reply, echo, junk, tcp, udp};

/// Serves orders at a unix socket until the process is killed.
pub fn serve(socket: &Path) -> Result<()> {
    // Under its final name only when it listens.
    let unnamed = socket.with_extension("new");
    let listener = UnixListener::bind(&unnamed).with_context(|| format!("cannot listen on {}", unnamed.display()))?;
    fs::rename(&unnamed, socket)?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(error) = handle(stream) {
                eprintln!("{error:#}");
            }
        });
    }
    Ok(())
}

/// The parent at the other end of one order.
pub(super) struct Parent(UnixStream);

impl Parent {
    pub(super) fn ready(&mut self, at: SocketAddr) -> Result<()> {
        self.reply(&Reply::Ready(at.port()))
    }

    /// Turns true when the parent says `finish` or is gone.
    pub(super) fn finished(&self) -> Result<Arc<AtomicBool>> {
        let finished = Arc::new(AtomicBool::new(false));
        let mut stream = BufReader::new(self.0.try_clone()?);
        let flag = Arc::clone(&finished);
        thread::spawn(move || {
            let _ = stream.read_line(&mut String::new());
            flag.store(true, Ordering::Release);
        });
        Ok(finished)
    }

    fn reply(&mut self, reply: &Reply) -> Result<()> {
        Ok(self.0.write_all((serde_json::to_string(reply)? + "\n").as_bytes())?)
    }
}

fn handle(stream: UnixStream) -> Result<()> {
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    if line.is_empty() {
        // Somebody only looked whether we are there.
        return Ok(());
    }
    let mut parent = Parent(stream);
    let reply = match obey(&serde_json::from_str(&line)?, &mut parent) {
        Ok(done) => Reply::Done(done),
        Err(error) => Reply::Failed(format!("{error:#}")),
    };
    parent.reply(&reply)
}

fn obey(order: &Order, parent: &mut Parent) -> Result<Done> {
    match order {
        Order::TcpSource { meet, seconds } => tcp::send(meet, *seconds, parent),
        Order::TcpSink { meet } => tcp::receive(meet, parent),
        Order::UdpSource { to, run, size, rate, seconds } => udp::send(*to, *run, *size, *rate, *seconds),
        Order::UdpSink { at, run } => udp::receive(*at, *run, parent),
        Order::Echo { at } => echo::echo(*at, parent),
        Order::Ping { to, every_micros, seconds } => echo::ping(*to, *every_micros, *seconds),
        Order::Junk { to, seconds } => junk::send(*to, *seconds),
    }
}
