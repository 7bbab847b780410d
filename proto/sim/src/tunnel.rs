//! The model tunnel: what WireGuard does to one peer, in virtual time and without crypto.
//!
//! Owns sessions, timers, the replay window and the queue of one peer, with the constants of the WireGuard paper, section
//! 6. A datagram has the type byte, the indices and the lengths of the real one, so hosts classify and dispatch it as they
//! would on the wire; handshakes carry the sender's public key in clear ([`sender_key`]). Instead of ciphers there are
//! hashes over everything that real keys would bind: a changed byte, a wrong preshared key and a wrong key do not open.
//! It keeps nobody out who knows this file: actors in a simulation replay and mangle, they do not forge.

use std::collections::{BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::time::Duration;

use mesh_common::key::{PresharedKey, WgPublicKey};
use mesh_common::limits::{REJECT_AFTER_TIME, REKEY_TIMEOUT};
use mesh_common::time::Instant;
use mesh_proto::wg::{DropReason, MIN_BUFFER, OVERHEAD, Opened, Sealed, Tunnel};

/// Age of a session at which its initiator makes a new one.
pub const REKEY_AFTER_TIME: Duration = Duration::from_secs(120);
/// How long initiations are repeated before the queue is dropped.
pub const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(90);
/// Data that is not answered for this long is answered with an empty packet.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Packets kept while there is no session.
pub const MAX_QUEUED: usize = 256;

const MAX_SESSIONS: usize = 8;

const INIT: u8 = 1;
const RESPONSE: u8 = 2;
const DATA: u8 = 4;
const INIT_LEN: usize = 148;
const RESPONSE_LEN: usize = 92;
const DATA_HEAD: usize = 16;
/// Counters this far behind the newest are refused unseen.
const REPLAY_WINDOW: u64 = 1024;

/// The public key of the sender of an initiation or a response.
pub fn sender_key(datagram: &[u8]) -> Option<WgPublicKey> {
    let start = match (datagram.first()?, datagram.len()) {
        (&INIT, INIT_LEN) => 8,
        (&RESPONSE, RESPONSE_LEN) => 12,
        _ => return None,
    };
    datagram[start..start + 32].try_into().ok().map(WgPublicKey)
}

/// The receiver's index of a response or of data; its upper 24 bits are the index the tunnel was made with.
pub fn receiver_index(datagram: &[u8]) -> Option<u32> {
    match (datagram.first()?, datagram.len()) {
        (&RESPONSE, RESPONSE_LEN) => Some(read_u32(datagram, 8)),
        (&DATA, len) if len >= OVERHEAD => Some(read_u32(datagram, 4)),
        _ => None,
    }
}

/// One peer's tunnel.
#[derive(Debug)]
pub struct ModelTunnel {
    own: WgPublicKey,
    peer: WgPublicKey,
    preshared_key: Option<PresharedKey>,
    keepalive: Option<Duration>,
    index: u32,
    /// Handshakes begun or answered so far: the low byte of session indices and a source of distinct nonces.
    handshakes: u64,
    seed: u64,
    initiated: Option<Initiated>,
    /// The initiation before, whose response may be late: boringtun keeps as many.
    initiated_before: Option<Initiated>,
    newest_sent: u64,
    newest_seen: u64,
    /// By age. As many as boringtun keeps: what is under way on one that was left still opens, and one that we only answered
    /// waits for the peer to use it.
    sessions: VecDeque<Session>,
    /// The local index of the one we send on.
    current: Option<u32>,
    queue: VecDeque<Vec<u8>>,
    established: Option<Instant>,
    last_sent: Option<Instant>,
    /// Since when data went out and nothing authentic came back.
    unanswered: Option<Instant>,
    /// Since when data came in and nothing went back.
    owed: Option<Instant>,
    rekey: bool,
}

#[derive(Debug, Clone, Copy)]
struct Initiated {
    local_index: u32,
    nonce: u64,
    first_sent: Instant,
    sent: Instant,
}

#[derive(Debug)]
struct Session {
    local_index: u32,
    remote_index: u32,
    secret: u64,
    created: Instant,
    initiator: bool,
    sent: u64,
    received: Received,
}

/// Which counters came already.
#[derive(Debug, Default)]
struct Received {
    next: u64,
    seen: BTreeSet<u64>,
}

impl ModelTunnel {
    /// A tunnel of `own` to `peer`. `index` has 24 bits; `seed` makes the nonces of this tunnel.
    pub fn new(
        own: WgPublicKey,
        peer: WgPublicKey,
        preshared_key: Option<PresharedKey>,
        keepalive: Option<Duration>,
        index: u32,
        seed: u64,
    ) -> Self {
        Self {
            own,
            peer,
            preshared_key,
            keepalive,
            index,
            handshakes: 0,
            seed,
            initiated: None,
            initiated_before: None,
            newest_sent: 0,
            newest_seen: 0,
            sessions: VecDeque::new(),
            current: None,
            queue: VecDeque::new(),
            established: None,
            last_sent: None,
            unanswered: None,
            owed: None,
            rekey: false,
        }
    }

    fn begin_handshake(&mut self) -> (u32, u64) {
        self.handshakes += 1;
        let local_index = self.index << 8 | (self.handshakes & 0xff) as u32;
        (local_index, digest(&(self.seed, self.handshakes, self.own.0)))
    }

    fn initiate<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> &'a [u8] {
        let (local_index, nonce) = self.begin_handshake();
        // Two initiations in one instant must differ, or the second is a replay of the first.
        let stamp = u64::try_from(now.since_origin().as_nanos()).unwrap_or(u64::MAX).max(self.newest_sent + 1);
        self.newest_sent = stamp;
        let first_sent = self.initiated.as_ref().map_or(now, |initiated| initiated.first_sent);
        let initiated = Initiated { local_index, nonce, first_sent, sent: now };
        self.initiated_before = self.initiated.replace(initiated).or(self.initiated_before);
        self.last_sent = Some(now);
        self.rekey = false;
        let message = &mut dst[..INIT_LEN];
        message.fill(0);
        message[0] = INIT;
        message[4..8].copy_from_slice(&local_index.to_le_bytes());
        message[8..40].copy_from_slice(&self.own.0);
        message[40..72].copy_from_slice(&self.peer.0);
        message[72..80].copy_from_slice(&stamp.to_le_bytes());
        message[80..88].copy_from_slice(&nonce.to_le_bytes());
        finish(message)
    }

    fn answer<'a>(&mut self, init: &[u8], dst: &'a mut [u8], now: Instant) -> Opened<'a> {
        let expected = init[8..40] == self.peer.0 && init[40..72] == self.own.0;
        if !expected || !is_whole(init) {
            return Opened::Dropped(DropReason::Invalid);
        }
        let stamp = read_u64(init, 72);
        if stamp <= self.newest_seen {
            return Opened::Dropped(DropReason::Replayed);
        }
        self.newest_seen = stamp;
        let (local_index, nonce) = self.begin_handshake();
        let secret = self.secret(read_u64(init, 80), nonce);
        let remote_index = read_u32(init, 4);
        self.keep(Session::new(local_index, remote_index, secret, now, false));
        self.last_sent = Some(now);
        let message = &mut dst[..RESPONSE_LEN];
        message.fill(0);
        message[0] = RESPONSE;
        message[4..8].copy_from_slice(&local_index.to_le_bytes());
        message[8..12].copy_from_slice(&remote_index.to_le_bytes());
        message[12..44].copy_from_slice(&self.own.0);
        message[44..52].copy_from_slice(&nonce.to_le_bytes());
        message[52..60].copy_from_slice(&digest(&secret).to_le_bytes());
        Opened::Reply(finish(message))
    }

    fn establish<'a>(&mut self, response: &[u8], dst: &'a mut [u8], now: Instant) -> Opened<'a> {
        let receiver = read_u32(response, 8);
        let is_answered = |initiated: &Initiated| initiated.local_index == receiver;
        let initiated = [self.initiated, self.initiated_before].into_iter().flatten().find(is_answered);
        let Some(initiated) = initiated else {
            return Opened::Dropped(DropReason::NoSession);
        };
        let secret = self.secret(initiated.nonce, read_u64(response, 44));
        if response[12..44] != self.peer.0 || read_u64(response, 52) != digest(&secret) || !is_whole(response) {
            return Opened::Dropped(DropReason::Invalid);
        }
        let session = Session::new(receiver, read_u32(response, 4), secret, now, true);
        // What was asked before needs no answer any more: the older session would take the place of the newer one.
        self.initiated_before = None;
        self.initiated = self.initiated.filter(|initiated| !is_answered(initiated));
        self.keep(session);
        self.current = Some(receiver);
        self.established = Some(now);
        self.unanswered = None;
        Opened::Established(self.send(&[], dst, now))
    }

    fn receive<'a>(&mut self, datagram: &[u8], dst: &'a mut [u8], now: Instant) -> Opened<'a> {
        let receiver = read_u32(datagram, 4);
        let current = self.current().map(|session| (session.local_index, session.created));
        let Some(session) = self.sessions.iter_mut().find(|session| session.local_index == receiver) else {
            return Opened::Dropped(DropReason::NoSession);
        };
        let counter = read_u64(datagram, 8);
        let (packet, tag) = datagram[DATA_HEAD..].split_at(datagram.len() - OVERHEAD);
        if *tag != seal_tag(session.secret, receiver, counter, packet) {
            return Opened::Dropped(DropReason::Invalid);
        }
        if !session.received.accept(counter) {
            return Opened::Dropped(DropReason::Replayed);
        }
        let rekey_age = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT;
        self.rekey |= session.initiator && now.since(session.created) >= rekey_age;
        if current.is_none_or(|(index, created)| index != receiver && session.created >= created) {
            self.current = Some(receiver);
            self.established = Some(now);
        }
        self.unanswered = None;
        if packet.is_empty() {
            return Opened::Keepalive;
        }
        self.owed.get_or_insert(now);
        let out = &mut dst[..packet.len()];
        out.copy_from_slice(packet);
        Opened::Packet(out)
    }

    /// Sends on the current session; `None` without one.
    fn send<'a>(&mut self, packet: &[u8], dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]> {
        let current = self.current?;
        let session = self.sessions.iter_mut().find(|session| session.local_index == current)?;
        let counter = session.sent;
        session.sent += 1;
        let message = &mut dst[..packet.len() + OVERHEAD];
        message[..4].copy_from_slice(&[DATA, 0, 0, 0]);
        message[4..8].copy_from_slice(&session.remote_index.to_le_bytes());
        message[8..16].copy_from_slice(&counter.to_le_bytes());
        message[DATA_HEAD..DATA_HEAD + packet.len()].copy_from_slice(packet);
        let tag = seal_tag(session.secret, session.remote_index, counter, packet);
        message[DATA_HEAD + packet.len()..].copy_from_slice(&tag);
        self.rekey |= session.initiator && now.since(session.created) >= REKEY_AFTER_TIME;
        self.last_sent = Some(now);
        self.owed = None;
        if !packet.is_empty() {
            self.unanswered.get_or_insert(now);
        }
        Some(message)
    }

    fn expire(&mut self, now: Instant) {
        self.sessions.retain(|session| now.since(session.created) < REJECT_AFTER_TIME);
    }

    fn keep(&mut self, session: Session) {
        if self.sessions.len() >= MAX_SESSIONS {
            self.sessions.pop_front();
        }
        self.sessions.push_back(session);
    }

    fn current(&self) -> Option<&Session> {
        self.sessions.iter().find(|session| Some(session.local_index) == self.current)
    }

    fn secret(&self, initiator_nonce: u64, responder_nonce: u64) -> u64 {
        let preshared_key = self.preshared_key.as_ref().map_or([0; 32], |key| key.0);
        digest(&(initiator_nonce, responder_nonce, preshared_key))
    }
}

impl Tunnel for ModelTunnel {
    fn seal<'a>(&mut self, packet: &[u8], dst: &'a mut [u8], now: Instant) -> Sealed<'a> {
        if dst.len() < (packet.len() + OVERHEAD).max(MIN_BUFFER) {
            return Sealed::Dropped(DropReason::ShortBuffer);
        }
        self.expire(now);
        if self.current().is_some() {
            return match self.send(packet, dst, now) {
                Some(datagram) => Sealed::Data(datagram),
                None => Sealed::Dropped(DropReason::NoSession),
            };
        }
        if self.queue.len() < MAX_QUEUED {
            self.queue.push_back(packet.to_vec());
        }
        if self.initiated.is_some() { Sealed::Queued } else { Sealed::Handshake(self.initiate(dst, now)) }
    }

    fn open<'a>(&mut self, datagram: &[u8], _source: IpAddr, dst: &'a mut [u8], now: Instant) -> Opened<'a> {
        if dst.len() < datagram.len().max(MIN_BUFFER) {
            return Opened::Dropped(DropReason::ShortBuffer);
        }
        self.expire(now);
        match (datagram, datagram.len()) {
            ([INIT, 0, 0, 0, ..], INIT_LEN) => self.answer(datagram, dst, now),
            ([RESPONSE, 0, 0, 0, ..], RESPONSE_LEN) => self.establish(datagram, dst, now),
            ([DATA, 0, 0, 0, ..], OVERHEAD..) => self.receive(datagram, dst, now),
            _ => Opened::Dropped(DropReason::Invalid),
        }
    }

    fn flush<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]> {
        self.expire(now);
        self.current()?;
        if dst.len() < (self.queue.front()?.len() + OVERHEAD).max(MIN_BUFFER) {
            return None;
        }
        let packet = self.queue.pop_front()?;
        self.send(&packet, dst, now)
    }

    fn handle_timeout<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]> {
        if dst.len() < MIN_BUFFER {
            return None;
        }
        self.expire(now);
        let overdue = |since: Option<Instant>, limit| since.is_some_and(|since| now.since(since) >= limit);
        if let Some(initiated) = &self.initiated {
            if now.since(initiated.first_sent) >= REKEY_ATTEMPT_TIME {
                self.initiated = None;
                self.queue.clear();
                self.unanswered = None;
            } else if now.since(initiated.sent) >= REKEY_TIMEOUT {
                return Some(self.initiate(dst, now));
            }
        } else if self.rekey || overdue(self.unanswered, KEEPALIVE_TIMEOUT + REKEY_TIMEOUT) {
            self.unanswered = None;
            return Some(self.initiate(dst, now));
        }
        let silent = self.keepalive.is_some_and(|keepalive| self.last_sent.is_none_or(|at| now.since(at) >= keepalive));
        if silent || overdue(self.owed, KEEPALIVE_TIMEOUT) {
            self.owed = None;
            if self.current().is_some() {
                return self.send(&[], dst, now);
            }
            if silent && self.initiated.is_none() {
                return Some(self.initiate(dst, now));
            }
        }
        None
    }

    fn start_handshake<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]> {
        if dst.len() < MIN_BUFFER {
            return None;
        }
        self.initiated_before = self.initiated.take().or(self.initiated_before);
        Some(self.initiate(dst, now))
    }

    fn since_handshake(&self, now: Instant) -> Option<Duration> {
        self.established.map(|at| now.since(at))
    }
}

impl Session {
    fn new(local_index: u32, remote_index: u32, secret: u64, created: Instant, initiator: bool) -> Self {
        Self { local_index, remote_index, secret, created, initiator, sent: 0, received: Received::default() }
    }
}

impl Received {
    /// Notes a counter; false when it came before or is too old to tell.
    fn accept(&mut self, counter: u64) -> bool {
        if counter + REPLAY_WINDOW < self.next || !self.seen.insert(counter) {
            return false;
        }
        if counter >= self.next {
            self.next = counter + 1;
            self.seen = self.seen.split_off(&self.next.saturating_sub(REPLAY_WINDOW));
        }
        true
    }
}

fn digest(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn seal_tag(secret: u64, receiver: u32, counter: u64, packet: &[u8]) -> [u8; 16] {
    let low = digest(&(secret, receiver, counter, packet));
    let mut tag = [0; 16];
    tag[..8].copy_from_slice(&low.to_le_bytes());
    tag[8..].copy_from_slice(&digest(&(low, secret)).to_le_bytes());
    tag
}

/// Puts the checksum of a handshake message into its last 8 bytes.
fn finish(message: &mut [u8]) -> &[u8] {
    let (body, sum) = message.split_at_mut(message.len() - 8);
    sum.copy_from_slice(&digest(&&*body).to_le_bytes());
    message
}

fn is_whole(message: &[u8]) -> bool {
    let (body, sum) = message.split_at(message.len() - 8);
    *sum == digest(&body).to_le_bytes()
}

/// Callers checked the length.
fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(read_u32(bytes, at)) | u64::from(read_u32(bytes, at + 4)) << 32
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::conformance::{self, Pairing};

    const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const KEYS: [WgPublicKey; 2] = [WgPublicKey([1; 32]), WgPublicKey([2; 32])];

    fn pair(keepalive: Option<Duration>) -> [ModelTunnel; 2] {
        [
            ModelTunnel::new(KEYS[0], KEYS[1], None, keepalive, 7, 1),
            ModelTunnel::new(KEYS[1], KEYS[0], None, None, 9, 2),
        ]
    }

    fn at(seconds: u64) -> Instant {
        Instant::from_origin(Duration::from_secs(seconds))
    }

    /// Opens `datagram` at one end and gives what comes of it.
    fn deliver(tunnel: &mut ModelTunnel, datagram: &[u8], now: Instant) -> Option<Vec<u8>> {
        match tunnel.open(datagram, SOURCE, &mut [0; 2048], now) {
            Opened::Reply(reply) | Opened::Established(Some(reply)) => Some(reply.to_vec()),
            Opened::Packet(_) | Opened::Keepalive | Opened::Established(None) => None,
            Opened::Dropped(reason) => panic!("dropped: {reason:?}"),
        }
    }

    fn timeout(tunnel: &mut ModelTunnel, now: Instant) -> Option<Vec<u8>> {
        tunnel.handle_timeout(&mut [0; 2048], now).map(<[u8]>::to_vec)
    }

    fn seal(tunnel: &mut ModelTunnel, now: Instant) -> Option<Vec<u8>> {
        match tunnel.seal(b"packet", &mut [0; 2048], now) {
            Sealed::Data(datagram) => Some(datagram.to_vec()),
            _ => None,
        }
    }

    fn connect([a, b]: &mut [ModelTunnel; 2], now: Instant) {
        let init = a.start_handshake(&mut [0; 2048], now).unwrap().to_vec();
        let response = deliver(b, &init, now).unwrap();
        let confirm = deliver(a, &response, now).unwrap();
        deliver(b, &confirm, now);
    }

    #[test]
    fn conforms() {
        conformance::run(|pairing| {
            let psk = |byte| Some(PresharedKey([byte; 32]));
            let (theirs, known) = match pairing {
                Pairing::Matching => (psk(1), KEYS[0]),
                Pairing::DifferentPsk => (psk(2), KEYS[0]),
                Pairing::WrongKey => (psk(1), WgPublicKey([3; 32])),
            };
            (
                ModelTunnel::new(KEYS[0], KEYS[1], psk(1), None, 7, 1),
                ModelTunnel::new(KEYS[1], known, theirs, None, 9, 2),
            )
        });
    }

    #[test]
    fn a_datagram_tells_a_host_whom_it_is_for() {
        let mut ends = pair(None);
        let init = ends[0].start_handshake(&mut [0; 2048], at(1)).unwrap().to_vec();
        assert_eq!((init.len(), sender_key(&init), receiver_index(&init)), (148, Some(KEYS[0]), None));
        let response = deliver(&mut ends[1], &init, at(1)).unwrap();
        assert_eq!((response.len(), sender_key(&response)), (92, Some(KEYS[1])));
        assert_eq!(receiver_index(&response).map(|index| index >> 8), Some(7));
        let confirm = deliver(&mut ends[0], &response, at(1)).unwrap();
        assert_eq!(receiver_index(&confirm).map(|index| index >> 8), Some(9));
    }

    #[test]
    fn only_the_initiator_renews_a_used_session_at_120_seconds() {
        let mut ends = pair(None);
        connect(&mut ends, at(0));
        for second in [119, 120] {
            let data = seal(&mut ends[0], at(second)).unwrap();
            deliver(&mut ends[1], &data, at(second));
            let data = seal(&mut ends[1], at(second)).unwrap();
            deliver(&mut ends[0], &data, at(second));
            let renewed = timeout(&mut ends[0], at(second)).is_some_and(|sent| sent[0] == INIT);
            assert_eq!(renewed, second == 120, "at {second}");
            assert_eq!(timeout(&mut ends[1], at(second)), None, "at {second}");
        }
    }

    #[test]
    fn a_session_ends_at_180_seconds_in_both_directions() {
        let mut ends = pair(None);
        connect(&mut ends, at(0));
        let late = seal(&mut ends[0], at(179)).unwrap();
        assert_eq!(seal(&mut ends[0], at(180)), None);
        let opened = ends[1].open(&late, SOURCE, &mut [0; 2048], at(180)) == Opened::Dropped(DropReason::NoSession);
        assert!(opened, "data of an expired session is refused");
    }

    #[test]
    fn initiations_repeat_every_5_seconds_and_give_up_after_90() {
        let [mut alone, _] = pair(None);
        assert_eq!(seal(&mut alone, at(0)), None);
        let sent: Vec<u64> = (1..200).filter(|second| timeout(&mut alone, at(*second)).is_some()).collect();
        assert_eq!(sent, (1..18).map(|n| n * 5).collect::<Vec<_>>());
        let again = matches!(alone.seal(b"packet", &mut [0; 2048], at(200)), Sealed::Handshake(_));
        assert!(again, "a packet after giving up starts anew");
    }

    #[test]
    fn data_is_acknowledged_after_10_seconds_and_silence_makes_a_new_handshake_after_15() {
        let mut ends = pair(None);
        connect(&mut ends, at(0));
        let data = seal(&mut ends[0], at(20)).unwrap();
        deliver(&mut ends[1], &data, at(20));
        let kept: Vec<u64> = (20..60).filter(|second| timeout(&mut ends[1], at(*second)).is_some()).collect();
        assert_eq!(kept, [30]);
        let first = (20..60).find_map(|second| timeout(&mut ends[0], at(second)).map(|sent| (second, sent[0])));
        assert_eq!(first, Some((35, INIT)));
    }

    #[test]
    fn persistent_keepalive_connects_and_keeps_sending() {
        let mut ends = pair(Some(Duration::from_secs(25)));
        let init = timeout(&mut ends[0], at(0)).unwrap();
        let response = deliver(&mut ends[1], &init, at(0)).unwrap();
        let confirm = deliver(&mut ends[0], &response, at(0)).unwrap();
        deliver(&mut ends[1], &confirm, at(0));
        let kept: Vec<u64> = (1..80).filter(|second| timeout(&mut ends[0], at(*second)).is_some()).collect();
        assert_eq!(kept, [25, 50, 75]);
        let restarts =
            (180..400).filter(|second| timeout(&mut ends[0], at(*second)).is_some_and(|sent| sent[0] == INIT));
        assert!(restarts.count() > 20, "it keeps trying past the 90 seconds");
    }
}
