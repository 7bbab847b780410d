//! A wire that behaves like a bad one: delay, jitter, loss, duplicates and reordering, in user space, since not every
//! kernel has netem.
//!
//! ```text
//!  host a ── veth ── [packet socket]  thread with a heap of frames and their times  [packet socket] ── veth ── host b
//! ```
//! Invariants
//! - Frames of one direction leave in the order they came, whatever the jitter, but for those that are reordered.
//! - What resolves link addresses (ARP, neighbour discovery) passes at once and unharmed: it is the lab's, not the test's.
//! - Frames that wait are bounded; one too many is dropped and counted.
//! - An idle wire costs no CPU: the thread sleeps until a frame comes or is due.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io::{ErrorKind, Read, Write},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow};
use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
    },
};
use socket2::Socket;

use crate::{
    Host, Lab,
    link::connect,
    packet::{self, Offload},
};

/// Frames of both directions that wait at a time.
const QUEUE: usize = 8192;
/// Frames taken from one side before the other side and the clock are looked at.
const BATCH: usize = 64;

/// What a wire does to each frame, in both directions alike. Chances are of 1000.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Impairment {
    pub delay: Duration,
    /// Up to so much more, evenly spread.
    pub jitter: Duration,
    pub loss: u16,
    pub duplicate: u16,
    /// A frame is held back by `reorder_by` and may be passed by others.
    pub reorder: u16,
    pub reorder_by: Duration,
}

impl Impairment {
    pub fn delay(delay: Duration) -> Self {
        Self { delay, ..Self::default() }
    }
}

/// A wire between two hosts. Cut when dropped.
#[derive(Debug)]
pub struct Wire {
    state: Arc<State>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
struct State {
    impairment: Mutex<Impairment>,
    stop: EventFd,
    overflowed: AtomicU64,
}

impl Wire {
    /// Joins `a` and `b`, whose ends get the given names. What chance decides is decided by `seed`.
    pub fn connect(
        lab: &mut Lab,
        (a, a_link): (&Host, &str),
        (b, b_link): (&Host, &str),
        impairment: Impairment,
        seed: u64,
    ) -> Result<Self> {
        let middle = lab.host(&format!("wire-{}-{}", a.name(), a_link))?;
        // Says nothing of its own.
        middle.set_sysctl("ipv6/conf/all/disable_ipv6", "1")?;
        middle.set_sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        connect(a, a_link, &middle, "a")?;
        connect(b, b_link, &middle, "b")?;
        let ends = middle.inside(|| {
            let ends = [packet::open("a", true, false)?, packet::open("b", true, false)?];
            for end in &ends {
                end.set_nonblocking(true)?;
            }
            Ok(ends)
        })?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let state = Arc::new(State { impairment: Mutex::new(impairment), stop, overflowed: AtomicU64::new(0) });
        let thread = middle.start_inside({
            let state = Arc::clone(&state);
            move || carry(&ends, &state, seed)
        })?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Holds for frames that come from now on.
    pub fn impair(&self, impairment: Impairment) {
        *self.state.impairment.lock().unwrap_or_else(PoisonError::into_inner) = impairment;
    }

    /// Frames dropped because too many waited.
    pub fn overflowed(&self) -> u64 {
        self.state.overflowed.load(Ordering::Relaxed)
    }

    /// Cuts the wire; an error says why it was no good.
    pub fn cut(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.state.stop.write(1)?;
        thread.join().map_err(|_| anyhow!("the wire panicked"))?
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn carry(ends: &[Socket; 2], state: &State, seed: u64) -> Result<()> {
    let mut queue = Queue::new(seed);
    let mut buffer = vec![0; packet::FRAME];
    loop {
        let mut fds = [
            PollFd::new(ends[0].as_fd(), PollFlags::POLLIN),
            PollFd::new(ends[1].as_fd(), PollFlags::POLLIN),
            PollFd::new(state.stop.as_fd(), PollFlags::POLLIN),
        ];
        let timeout =
            queue.next_due().map(|due| TimeSpec::from_duration(due.saturating_duration_since(Instant::now())));
        match ppoll(&mut fds, timeout, None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for frames"),
        }
        if state.stop.read().is_ok() {
            return Ok(());
        }
        let impairment = *state.impairment.lock().unwrap_or_else(PoisonError::into_inner);
        for (from, end) in ends.iter().enumerate() {
            for _ in 0..BATCH {
                let mut end = end;
                match end.read(&mut buffer) {
                    Ok(length) => {
                        let full = !queue.take(1 - from, &buffer[..length], &impairment, Instant::now());
                        state.overflowed.fetch_add(full.into(), Ordering::Relaxed);
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::NetworkDown) => {}
                    Err(error) => return Err(error).context("cannot read frames"),
                }
            }
        }
        while let Some((to, frame)) = queue.pop(Instant::now()) {
            // A link that is down or full loses frames, as any wire's.
            let _ = (&ends[to]).write(&frame);
        }
    }
}

/// Frames and the times when they leave.
struct Queue {
    waiting: BinaryHeap<Reverse<Waiting>>,
    number: u64,
    /// When the last ordinary frame of a direction leaves.
    last: [Option<Instant>; 2],
    random: SplitMix64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Waiting {
    due: Instant,
    number: u64,
    to: usize,
    frame: Vec<u8>,
}

impl Queue {
    fn new(seed: u64) -> Self {
        Self { waiting: BinaryHeap::new(), number: 0, last: [None; 2], random: SplitMix64(seed) }
    }

    /// False when there is no room.
    fn take(&mut self, to: usize, frame: &[u8], impairment: &Impairment, now: Instant) -> bool {
        if resolves_addresses(frame.get(Offload::HEADER..).unwrap_or_default()) {
            return self.push(now, to, frame);
        }
        if self.happens(impairment.loss) {
            return true;
        }
        let jitter = impairment.jitter.mul_f64(self.random.fraction());
        let due = now + impairment.delay + jitter;
        if self.happens(impairment.reorder) {
            return self.push(due + impairment.reorder_by, to, frame);
        }
        let due = self.last[to].map_or(due, |last| due.max(last));
        self.last[to] = Some(due);
        if self.happens(impairment.duplicate) && !self.push(due, to, frame) {
            return false;
        }
        self.push(due, to, frame)
    }

    fn push(&mut self, due: Instant, to: usize, frame: &[u8]) -> bool {
        if self.waiting.len() >= QUEUE {
            return false;
        }
        self.number += 1;
        self.waiting.push(Reverse(Waiting { due, number: self.number, to, frame: frame.to_vec() }));
        true
    }

    fn next_due(&self) -> Option<Instant> {
        self.waiting.peek().map(|Reverse(first)| first.due)
    }

    fn pop(&mut self, now: Instant) -> Option<(usize, Vec<u8>)> {
        if self.next_due()? > now {
            return None;
        }
        self.waiting.pop().map(|Reverse(first)| (first.to, first.frame))
    }

    fn happens(&mut self, chance: u16) -> bool {
        chance > 0 && self.random.fraction() * 1000.0 < f64::from(chance)
    }
}

/// ARP and ICMPv6 neighbour discovery.
fn resolves_addresses(frame: &[u8]) -> bool {
    const ICMPV6: u8 = 58;
    match frame.get(12..14) {
        Some([0x08, 0x06]) => true,
        Some([0x86, 0xdd]) => {
            frame.get(20) == Some(&ICMPV6) && frame.get(54).is_some_and(|kind| (133..=137).contains(kind))
        }
        _ => false,
    }
}

struct SplitMix64(u64);

impl SplitMix64 {
    /// From 0 to less than 1.
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        (word >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn frame(number: u16) -> Vec<u8> {
        let mut frame = vec![0; Offload::HEADER + 12];
        frame.extend([0x08, 0x00]);
        frame.extend(number.to_be_bytes());
        frame
    }

    fn numbers(queue: &mut Queue, now: Instant) -> Vec<u16> {
        std::iter::from_fn(|| queue.pop(now))
            .map(|(_, frame)| u16::from_be_bytes([frame[frame.len() - 2], frame[frame.len() - 1]]))
            .collect()
    }

    #[test]
    fn nothing_leaves_before_its_time_and_jitter_keeps_the_order() {
        let start = Instant::now();
        let impairment =
            Impairment { delay: Duration::from_millis(20), jitter: Duration::from_millis(10), ..Impairment::default() };
        let mut queue = Queue::new(1);
        for number in 0..100 {
            assert!(queue.take(1, &frame(number), &impairment, start + Duration::from_micros(u64::from(number))));
        }
        assert!(numbers(&mut queue, start + Duration::from_millis(19)).is_empty());
        let in_time = numbers(&mut queue, start + Duration::from_millis(31));
        assert_eq!(in_time, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn chances_come_true_about_as_often_as_said() {
        let start = Instant::now();
        let impairment = Impairment {
            loss: 300,
            duplicate: 100,
            reorder: 200,
            reorder_by: Duration::from_secs(1),
            ..Impairment::default()
        };
        let mut queue = Queue::new(7);
        for number in 0..5000 {
            queue.take(0, &frame(number), &impairment, start);
        }
        let ordered = numbers(&mut queue, start);
        let held = numbers(&mut queue, start + Duration::from_secs(1));
        let duplicates = ordered.windows(2).filter(|pair| pair[0] == pair[1]).count();
        assert!(ordered.is_sorted());
        // 3500 pass, 700 of them late; a tenth of the other 2800 twice.
        assert!((600..800).contains(&held.len()), "{}", held.len());
        assert!((220..340).contains(&duplicates), "{duplicates}");
        assert!((3350..3650).contains(&(held.len() + ordered.len() - duplicates)));
    }

    #[test]
    fn a_full_wire_drops_and_addresses_are_resolved_at_once() {
        let start = Instant::now();
        let slow = Impairment::delay(Duration::from_secs(9));
        let mut queue = Queue::new(1);
        let mut arp = frame(77);
        arp[Offload::HEADER + 12..Offload::HEADER + 14].copy_from_slice(&[0x08, 0x06]);
        assert!(queue.take(0, &arp, &slow, start));
        assert_eq!(numbers(&mut queue, start), [77]);
        for _ in 0..QUEUE {
            assert!(queue.take(0, &frame(1), &slow, start));
        }
        assert!(!queue.take(0, &frame(1), &slow, start));
    }
}
