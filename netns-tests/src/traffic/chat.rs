//! One TCP connection that must not break: numbered questions at a slow pace, each echoed.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};

use crate::host::Host;

const EVERY: Duration = Duration::from_millis(20);
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A connection that stands still for this long has broken.
const STALL: Duration = Duration::from_secs(30);

/// A connection that is used until it is stopped.
#[derive(Debug)]
pub struct Chat {
    stop: Arc<AtomicBool>,
    answered: Arc<Mutex<Vec<Instant>>>,
    asking: Option<JoinHandle<Result<()>>>,
    echoing: Option<JoinHandle<Result<()>>>,
}

impl Chat {
    /// Connected when this returns.
    pub fn start(from: &Host, to: &Host, to_address: IpAddr) -> Result<Self> {
        let listener = to.inside(|| Ok(TcpListener::bind(SocketAddr::new(to_address, 0))?))?;
        let target = listener.local_addr()?;
        let stream = from.inside(|| {
            TcpStream::connect_timeout(&target, CONNECT_WITHIN).with_context(|| format!("cannot connect to {target}"))
        })?;
        let echoing = to.start_inside(move || echo(&listener))?;
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let asking = from.start_inside({
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            move || ask(stream, &stop, &answered)
        })?;
        Ok(Self { stop, answered, asking: Some(asking), echoing: Some(echoing) })
    }

    /// Times of the answers so far.
    pub fn answered(&self) -> Vec<Instant> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the connection in order; an error when it was broken or its bytes were not the right ones.
    pub fn stop(mut self) -> Result<Vec<Instant>> {
        self.join()?;
        Ok(self.answered())
    }

    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let threads = [self.asking.take(), self.echoing.take()];
        let ended: Vec<_> = threads.into_iter().flatten().map(JoinHandle::join).collect();
        for end in ended {
            end.map_err(|_| anyhow!("a TCP thread panicked"))??;
        }
        Ok(())
    }
}

impl Drop for Chat {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

fn ask(mut stream: TcpStream, stop: &AtomicBool, answered: &Mutex<Vec<Instant>>) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STALL))?;
    stream.set_write_timeout(Some(STALL))?;
    let mut number = 0u64;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&number.to_be_bytes()).context("the connection broke")?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).context("the connection broke")?;
        ensure!(answer == number.to_be_bytes(), "other bytes came back");
        answered.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
        number += 1;
        next = (next + EVERY).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn echo(listener: &TcpListener) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STALL))?;
    let mut buffer = [0; 64];
    loop {
        match stream.read(&mut buffer).context("the connection broke")? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length]).context("the connection broke")?,
        }
    }
}
