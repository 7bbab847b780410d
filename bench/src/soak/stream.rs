//! A stream of datagrams whose every byte is known, in one direction of a tunnel, and what became of it.
//!
//! A datagram is its number and bytes that follow from the number and the stream's seed. Sender and receiver are threads
//! of this process, so they share a clock: how long a direction stood still is told from when a number was sent, not from
//! gaps between arrivals, which pauses of the sender make too.

use std::{
    collections::BTreeMap,
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
use mesh_proto::random::SplitMix64;
use netns_tests::Host;

const SIZE: usize = 1200;
const NUMBER: usize = 8;
const EVERY: Duration = Duration::from_millis(20);
const LOOK: Duration = Duration::from_millis(50);
/// After the end of a stream its last datagrams may take so long.
const LATE: Duration = Duration::from_secs(1);

/// What became of a stream, and of several once they are added up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    pub sent: u64,
    pub received: u64,
    pub corrupt_bytes: u64,
    /// The longest time from when a datagram was sent until it, or a later one, arrived.
    pub longest_stall: Duration,
    /// Sent and arrived, by the second in which it was sent.
    windows: BTreeMap<u64, (u64, u64)>,
}

impl Tally {
    /// Seconds in which this direction was sent on and nothing arrived, while the other direction was not as silent.
    pub fn one_way_windows(&self, other: &Self) -> u64 {
        let silent = |tally: &Self, second: &u64| matches!(tally.windows.get(second), Some((1.., 0)));
        self.windows.keys().filter(|second| silent(self, second) && !silent(other, second)).count() as u64
    }

    pub fn add(&mut self, more: &Self) {
        self.sent += more.sent;
        self.received += more.received;
        self.corrupt_bytes += more.corrupt_bytes;
        self.longest_stall = self.longest_stall.max(more.longest_stall);
        for (second, (sent, arrived)) in &more.windows {
            let window = self.windows.entry(*second).or_default();
            *window = (window.0 + sent, window.1 + arrived);
        }
    }
}

/// A running stream.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Result<()>>,
    receiver: JoinHandle<Result<()>>,
    book: Arc<Mutex<Book>>,
}

impl Stream {
    /// Sends from one host to an address of the other; seconds of the tally count from `origin`.
    pub fn start(from: &Host, to: &Host, address: IpAddr, seed: u64, origin: Instant) -> Result<Self> {
        let inbox = to.inside(|| {
            UdpSocket::bind(SocketAddr::new(address, 0)).with_context(|| format!("cannot receive on {address}"))
        })?;
        let target = inbox.local_addr()?;
        let (stop, book) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Book::new(seed, origin))));
        let receiver = to.start_inside({
            let (stop, book) = (Arc::clone(&stop), Arc::clone(&book));
            move || receive(&inbox, &stop, &book)
        })?;
        let sender = from.start_inside({
            let (stop, book) = (Arc::clone(&stop), Arc::clone(&book));
            move || send(target, seed, &stop, &book)
        })?;
        Ok(Self { stop, sender, receiver, book })
    }

    /// Stops sending, waits for what is still under way, and counts.
    pub fn stop(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Release);
        for thread in [self.sender, self.receiver] {
            thread.join().map_err(|_| anyhow!("a stream panicked"))??;
        }
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(book.close(Instant::now()))
    }
}

/// Who sent what when, and what came.
#[derive(Debug)]
struct Book {
    seed: u64,
    origin: Instant,
    sent_at: Vec<Instant>,
    /// The highest number that came, and one more.
    next: usize,
    tally: Tally,
}

impl Book {
    fn new(seed: u64, origin: Instant) -> Self {
        Self { seed, origin, sent_at: Vec::new(), next: 0, tally: Tally::default() }
    }

    /// The number of the datagram that is about to be sent.
    fn send(&mut self, now: Instant) -> u64 {
        let number = self.sent_at.len() as u64;
        self.sent_at.push(now);
        self.tally.sent += 1;
        self.tally.windows.entry((now - self.origin).as_secs()).or_default().0 += 1;
        number
    }

    fn receive(&mut self, datagram: &[u8], now: Instant) {
        let number = datagram.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        let known =
            number.and_then(|number| usize::try_from(number).ok()).filter(|number| *number < self.sent_at.len());
        let Some(number) = known else {
            // Not even its number is what anybody sent.
            self.tally.corrupt_bytes += datagram.len() as u64;
            return;
        };
        let right = payload(self.seed, number as u64);
        let wrong = right.iter().zip(datagram).filter(|(right, got)| right != got).count();
        self.tally.corrupt_bytes += (wrong + right.len().abs_diff(datagram.len())) as u64;
        self.tally.received += 1;
        self.tally.windows.entry((self.sent_at[number] - self.origin).as_secs()).or_default().1 += 1;
        if number >= self.next {
            // The oldest that had to wait for this arrival: the first one lost before it, or itself.
            self.tally.longest_stall = self.tally.longest_stall.max(now - self.sent_at[self.next]);
            self.next = number + 1;
        }
    }

    /// The tally, with what never came.
    fn close(&self, now: Instant) -> Tally {
        let mut tally = self.tally.clone();
        if let Some(oldest) = self.sent_at.get(self.next) {
            tally.longest_stall = tally.longest_stall.max(now - *oldest);
        }
        tally
    }

    fn is_complete(&self) -> bool {
        self.next == self.sent_at.len()
    }
}

fn payload(seed: u64, number: u64) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    bytes[..NUMBER].copy_from_slice(&number.to_be_bytes());
    let mut random = SplitMix64::new(seed ^ number.rotate_left(32));
    for chunk in bytes[NUMBER..].chunks_mut(8) {
        chunk.copy_from_slice(&random.next_u64().to_le_bytes()[..chunk.len()]);
    }
    bytes
}

fn send(to: SocketAddr, seed: u64, stop: &AtomicBool, book: &Mutex<Book>) -> Result<()> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    let mut next = Instant::now();
    while !stop.load(Ordering::Acquire) {
        let number = book.lock().unwrap_or_else(PoisonError::into_inner).send(Instant::now());
        // A send that the kernel refuses is a datagram that never arrives.
        let _ = socket.send_to(&payload(seed, number), to);
        next += EVERY;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, book: &Mutex<Book>) -> Result<()> {
    socket.set_read_timeout(Some(LOOK))?;
    let mut block = [0; 2 * SIZE];
    let mut stopped: Option<Instant> = None;
    loop {
        match socket.recv(&mut block) {
            Ok(length) => {
                book.lock().unwrap_or_else(PoisonError::into_inner).receive(&block[..length], Instant::now());
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
        if stop.load(Ordering::Acquire) {
            let since = *stopped.get_or_insert_with(Instant::now);
            // Once LOOK has passed no sender is between its two steps any more.
            let complete = since.elapsed() >= LOOK && book.lock().unwrap_or_else(PoisonError::into_inner).is_complete();
            if complete || since.elapsed() >= LATE {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 7;

    fn at(origin: Instant, millis: u64) -> Instant {
        origin + Duration::from_millis(millis)
    }

    /// Sends at the first times and receives (number, time); gives the tally at the last time.
    fn play(sent: &[u64], received: &[(u64, u64)], end: u64) -> Tally {
        let origin = Instant::now();
        let mut book = Book::new(SEED, origin);
        for millis in sent {
            book.send(at(origin, *millis));
        }
        for (number, millis) in received {
            book.receive(&payload(SEED, *number), at(origin, *millis));
        }
        book.close(at(origin, end))
    }

    #[test]
    fn a_stall_is_told_from_sending_not_from_pauses() {
        let tally = play(&[0, 20, 60_000], &[(0, 1), (1, 25), (2, 60_003)], 60_010);
        assert_eq!((tally.longest_stall, tally.received), (Duration::from_millis(5), 3));
    }

    #[test]
    fn what_is_lost_stalls_until_the_next_arrival_or_the_end() {
        assert_eq!(play(&[0, 20, 1500], &[(0, 1), (2, 1501)], 1600).longest_stall, Duration::from_millis(1481));
        assert_eq!(play(&[0, 20], &[(0, 1)], 2020).longest_stall, Duration::from_secs(2));
    }

    #[test]
    fn every_wrong_byte_counts() {
        let origin = Instant::now();
        let mut book = Book::new(SEED, origin);
        for _ in 0..4 {
            book.send(origin);
        }
        let mut datagram = payload(SEED, 0).to_vec();
        (datagram[100], datagram[900]) = (!datagram[100], !datagram[900]);
        book.receive(&datagram, origin);
        book.receive(&payload(SEED, 1)[..SIZE - 3], origin);
        assert_eq!(book.tally.corrupt_bytes, 5);
        // Another datagram's bytes, and a number that was never sent.
        book.receive(&payload(SEED + 1, 2), origin);
        assert!(book.tally.corrupt_bytes > 1000);
        let before = book.tally.corrupt_bytes;
        book.receive(&payload(SEED, 99), origin);
        assert_eq!(book.tally.corrupt_bytes, before + SIZE as u64);
    }

    #[test]
    fn silence_of_one_way_is_told_from_silence_of_both() {
        let works = play(&[0, 1000, 2000], &[(0, 1), (1, 1001), (2, 2001)], 3000);
        let deaf = play(&[0, 1000, 2000], &[(0, 1)], 3000);
        let pauses = play(&[0], &[(0, 1)], 3000);
        assert_eq!((deaf.one_way_windows(&works), works.one_way_windows(&deaf)), (2, 0));
        assert_eq!(deaf.one_way_windows(&deaf), 0, "both are silent: that is a stall");
        assert_eq!(deaf.one_way_windows(&pauses), 2, "the other way was not even used");
    }

    #[test]
    fn tallies_add_up() {
        let mut sum = play(&[0, 20], &[(0, 1)], 500);
        sum.add(&play(&[0], &[(0, 3)], 10));
        assert_eq!((sum.sent, sum.received, sum.longest_stall), (3, 2, Duration::from_millis(480)));
        assert_eq!(sum.windows, BTreeMap::from([(0, (3, 2))]));
    }
}
