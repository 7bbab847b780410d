//! Numbered questions at a steady pace, each answered by the other side: what both directions of a path lose, and when.

use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};

use crate::host::Host;

/// After the last question, an answer that takes longer counts as lost.
const LATE: Duration = Duration::from_secs(1);
/// Slice of waiting; the stop sign is looked at in between.
const LOOK: Duration = Duration::from_millis(20);

/// One question. A send that the local kernel refused arrives nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    pub sent: Instant,
    pub arrived: Option<Instant>,
    pub answered: Option<Instant>,
}

impl Beat {
    fn at(sent: Instant) -> Self {
        Self { sent, arrived: None, answered: None }
    }

    /// Datagrams of this beat that were lost: the question, or the answer.
    pub fn lost(&self) -> bool {
        self.answered.is_none()
    }
}

/// An exchange that runs in the background until it is stopped.
#[derive(Debug)]
pub struct Exchange {
    beats: Arc<Mutex<Vec<Beat>>>,
    stop_asking: Arc<AtomicBool>,
    stop_listening: Arc<AtomicBool>,
    asking: Option<JoinHandle<Result<()>>>,
    listening: Vec<JoinHandle<Result<()>>>,
}

impl Exchange {
    /// `from` asks `to` at `to_address`, `per_second` times; questions and answers are `length` bytes.
    pub fn start(from: &Host, to: &Host, to_address: IpAddr, per_second: u32, length: usize) -> Result<Self> {
        let inbox = to.inside(|| {
            UdpSocket::bind(SocketAddr::new(to_address, 0)).with_context(|| format!("cannot receive on {to_address}"))
        })?;
        let target = inbox.local_addr()?;
        let socket = from.inside(|| {
            let any: IpAddr = if target.is_ipv6() { [0u8; 16].into() } else { [0u8; 4].into() };
            Ok(UdpSocket::bind(SocketAddr::new(any, 0))?)
        })?;
        let answers = socket.try_clone()?;
        let beats = Arc::new(Mutex::new(Vec::new()));
        let (stop_asking, stop_listening) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let listen = |host: &Host, socket: UdpSocket, mark: fn(&mut Beat) -> &mut Option<Instant>, answer: bool| {
            let (beats, stop) = (Arc::clone(&beats), Arc::clone(&stop_listening));
            host.start_inside(move || note(&socket, &beats, &stop, mark, answer))
        };
        let listening = vec![
            listen(to, inbox, |beat| &mut beat.arrived, true)?,
            listen(from, answers, |beat| &mut beat.answered, false)?,
        ];
        let asking = from.start_inside({
            let (beats, stop) = (Arc::clone(&beats), Arc::clone(&stop_asking));
            move || ask(&socket, target, per_second, length, &beats, &stop)
        })?;
        Ok(Self { beats, stop_asking, stop_listening, asking: Some(asking), listening })
    }

    /// How it stands now; the newest questions may still be under way.
    pub fn beats(&self) -> Vec<Beat> {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops asking, waits for late answers, and gives all beats in order.
    pub fn stop(mut self) -> Result<Vec<Beat>> {
        self.join()?;
        Ok(self.beats())
    }

    fn join(&mut self) -> Result<()> {
        self.stop_asking.store(true, Ordering::Relaxed);
        let Some(asking) = self.asking.take() else {
            return Ok(());
        };
        let asked = asking.join().map_err(|_| anyhow!("the questions panicked"));
        let deadline = Instant::now() + LATE;
        while Instant::now() < deadline && self.beats().iter().any(Beat::lost) {
            std::thread::sleep(LOOK);
        }
        self.stop_listening.store(true, Ordering::Relaxed);
        for thread in self.listening.drain(..) {
            thread.join().map_err(|_| anyhow!("the answers panicked"))??;
        }
        asked?
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

fn ask(
    socket: &UdpSocket,
    target: SocketAddr,
    per_second: u32,
    length: usize,
    beats: &Mutex<Vec<Beat>>,
    stop: &AtomicBool,
) -> Result<()> {
    let step = Duration::from_secs(1) / per_second;
    let mut datagram = vec![0; length.max(8)];
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let number = {
            let mut beats = beats.lock().unwrap_or_else(PoisonError::into_inner);
            beats.push(Beat::at(Instant::now()));
            beats.len() as u64 - 1
        };
        datagram[..8].copy_from_slice(&number.to_be_bytes());
        let _ = socket.send_to(&datagram, target);
        next += step;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// Notes the first time that each number comes.
fn note(
    socket: &UdpSocket,
    beats: &Mutex<Vec<Beat>>,
    stop: &AtomicBool,
    mark: fn(&mut Beat) -> &mut Option<Instant>,
    answer: bool,
) -> Result<()> {
    socket.set_read_timeout(Some(LOOK))?;
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if error.raw_os_error().is_some() || error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("cannot receive"),
        };
        let now = Instant::now();
        let Some(number) = buffer[..length].first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes)) else {
            continue;
        };
        let is_first = {
            let mut beats = beats.lock().unwrap_or_else(PoisonError::into_inner);
            let place = usize::try_from(number).ok().and_then(|number| beats.get_mut(number)).map(mark);
            place.is_some_and(|place| place.is_none() && place.replace(now).is_none())
        };
        if answer && is_first {
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
    Ok(())
}
