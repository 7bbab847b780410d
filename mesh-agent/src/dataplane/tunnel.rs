//! boringtun behind the seam: one [`Tunn`] a peer, with every trap of it handled here and nowhere else.
//!
//! - boringtun panics when a destination is too short, so lengths are checked first.
//! - Its timers see time only through `update_timers`, which idle peers do not get. Whoever wakes a tunnel therefore ticks
//!   it first: otherwise a fresh session would carry a stale stamp and be thrown away, and an old one would still open.
//! - After 90 s without an answer it gives up for good; a persistent keepalive starts over here, packets do by themselves.
//! - It takes a late response to the initiation before the last one even when the last one was answered already, and would send
//!   on that session from then on: a WireGuard peer, which keeps but one unconfirmed session, has forgotten it, and is
//!   deaf until the next handshake 15 s later. Such a response is dropped.
//! - A session that we only answered is used for sending once the peer has used it, never before.
//! - It counts handshakes to judge load and forgets only when told: [`BoringTunnels::reset_limits`], each second. The
//!   dispatcher's check comes before any key agreement; the one inside `Tunn` would count twice, so it never limits.
//! - Making a [`Tunn`] takes two key agreements (80 us). It is made when first needed: a node that meets a thousand peers at
//!   once routes to them before it has made one, and most of them stay silent.
//! - An empty datagram means "next queued packet" to it, so none gets that far.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use mesh_common::key::{PresharedKey, WgPublicKey, WgSecret};
use mesh_common::time::Instant;
use mesh_proto::device::PeerSpec;
use mesh_proto::wg::{DropReason, MIN_BUFFER, OVERHEAD, Opened, Sealed, Tunnel};
use x25519_dalek::{PublicKey, StaticSecret};

/// Handshakes a second before senders must prove their address: 500 cost a tenth of a core.
const HANDSHAKES_PER_SECOND: u64 = 500;
/// How far a tunnel's idea of time may lag behind.
const TICK: Duration = Duration::from_secs(1);

const RESPONSE: u8 = 2;
const DATA: u8 = 4;

/// Makes tunnels, and judges handshakes before any tunnel is known. One a node.
pub trait TunnelFactory: Send + Sync + 'static {
    type Tunnel: Tunnel + 'static;

    /// A tunnel to `peer`; `index` has 24 bits and becomes the upper part of the receiver index in its datagrams.
    fn make(&self, peer: &WgPublicKey, spec: &PeerSpec, index: u32, now: Instant) -> Self::Tunnel;

    /// Whether an initiation is made for our key, by its first MAC: one hash, and whoever knows our key can pass it. The data
    /// threads ask, so that bytes of no peer never get as far as a queue.
    fn is_for_us(&self, initiation: &[u8]) -> bool;

    /// Judges a handshake message before it costs anything. An `Err` may hold a cookie to send back, written to `reply`.
    fn admit<'a>(&self, message: &[u8], source: IpAddr, reply: &'a mut [u8]) -> Result<(), Refused<'a>>;

    /// Who sent this initiation; `None` when it is not for us or not whole.
    fn initiator(&self, initiation: &[u8]) -> Option<WgPublicKey>;

    /// Forgets how many handshakes came: call once a second.
    fn reset_limits(&self);
}

/// Why a handshake message is not looked at further.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused<'a> {
    /// Not for our key, or malformed.
    Invalid,
    /// Too many came; the sender must repeat it with this cookie.
    UnderLoad(Option<&'a [u8]>),
}

/// Makes boringtun tunnels for one private key.
pub struct BoringTunnels {
    private: StaticSecret,
    public: PublicKey,
    admission: RateLimiter,
    unlimited: Arc<RateLimiter>,
}

impl BoringTunnels {
    pub fn new(key: &WgSecret) -> Self {
        let private = key.x25519();
        let public = PublicKey::from(&private);
        Self {
            admission: RateLimiter::new(&public, HANDSHAKES_PER_SECOND),
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            private,
            public,
        }
    }
}

impl TunnelFactory for BoringTunnels {
    type Tunnel = BoringTunnel;

    fn make(&self, peer: &WgPublicKey, spec: &PeerSpec, index: u32, now: Instant) -> BoringTunnel {
        let noise = Noise {
            tunn: None,
            private: self.private.clone(),
            peer: PublicKey::from(peer.0),
            preshared_key: spec.preshared_key.clone(),
            keepalive: spec.keepalive.map(|keepalive| u16::try_from(keepalive.as_secs().max(1)).unwrap_or(u16::MAX)),
            index,
            limiter: Arc::clone(&self.unlimited),
        };
        BoringTunnel {
            noise,
            ticked: now,
            established: None,
            initiations: [None; 2],
            unconfirmed: None,
            longest_queued: None,
        }
    }

    fn is_for_us(&self, initiation: &[u8]) -> bool {
        self.unlimited.verify_packet(None, initiation, &mut []).is_ok()
    }

    fn admit<'a>(&self, message: &[u8], source: IpAddr, reply: &'a mut [u8]) -> Result<(), Refused<'a>> {
        match self.admission.verify_packet(Some(source), message, reply) {
            Ok(_) => Ok(()),
            Err(TunnResult::WriteToNetwork(cookie)) => Err(Refused::UnderLoad(Some(cookie))),
            Err(TunnResult::Err(WireGuardError::UnderLoad | WireGuardError::DestinationBufferTooSmall)) => {
                Err(Refused::UnderLoad(None))
            }
            Err(_) => Err(Refused::Invalid),
        }
    }

    fn initiator(&self, initiation: &[u8]) -> Option<WgPublicKey> {
        let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(initiation) else { return None };
        let half = parse_handshake_anon(&self.private, &self.public, &initiation).ok()?;
        Some(WgPublicKey(half.peer_static_public))
    }

    fn reset_limits(&self) {
        self.admission.reset_count();
        self.unlimited.reset_count();
    }
}

impl fmt::Debug for BoringTunnels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoringTunnels").finish_non_exhaustive()
    }
}

/// boringtun's part of a tunnel, and what it is made of.
struct Noise {
    tunn: Option<Tunn>,
    private: StaticSecret,
    peer: PublicKey,
    preshared_key: Option<PresharedKey>,
    /// Seconds.
    keepalive: Option<u16>,
    index: u32,
    limiter: Arc<RateLimiter>,
}

impl Noise {
    fn tunn(&mut self) -> &mut Tunn {
        let Self { tunn, private, peer, preshared_key, keepalive, index, limiter } = self;
        tunn.get_or_insert_with(|| {
            let preshared_key = preshared_key.as_ref().map(|key| key.0);
            Tunn::new(private.clone(), *peer, preshared_key, *keepalive, *index, Some(Arc::clone(limiter)))
        })
    }

    /// One that was never used has nothing to do, unless it is to keep its peer's NAT open.
    fn has_timers(&self) -> bool {
        self.tunn.is_some() || self.keepalive.is_some()
    }
}

/// One peer's tunnel.
pub struct BoringTunnel {
    noise: Noise,
    /// When boringtun last saw the time.
    ticked: Instant,
    established: Option<Instant>,
    /// The session indices of our last initiation and of the one before, while a response to them is good.
    initiations: [Option<u32>; 2],
    /// The session index of our last response, until data comes with it.
    unconfirmed: Option<u32>,
    /// The longest packet queued since the queue was empty; `None` = empty.
    longest_queued: Option<usize>,
}

impl BoringTunnel {
    /// Lets boringtun see the time when it has not for a while. True when that began a handshake whose initiation is lost:
    /// the caller sends its own.
    fn tick(&mut self, now: Instant) -> bool {
        if now.since(self.ticked) < TICK {
            return false;
        }
        let mut scratch = [0; MIN_BUFFER];
        self.update_timers(&mut scratch, now).is_some_and(is_initiation)
    }

    fn initiate<'a>(&mut self, dst: &'a mut [u8]) -> Option<&'a [u8]> {
        let TunnResult::WriteToNetwork(datagram) = self.noise.tunn().format_handshake_initiation(dst, true) else {
            return None;
        };
        self.note_initiation(datagram);
        Some(datagram)
    }

    fn note_initiation(&mut self, datagram: &[u8]) {
        if is_initiation(datagram) {
            self.initiations = [index_at(datagram, 4), self.initiations[0]];
        }
    }

    /// A later initiation than this response's was answered already, or none of ours has its index.
    fn is_superseded(&self, response: &[u8]) -> bool {
        !self.initiations.contains(&index_at(response, 8))
    }

    /// This response made the newest session: what was asked before it needs no answer any more.
    fn note_answered(&mut self, response: &[u8]) {
        let unanswered = self.initiations[0].filter(|last| index_at(response, 8) != Some(*last));
        self.initiations = [unanswered, None];
    }

    fn update_timers<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]> {
        self.ticked = now;
        if !self.noise.has_timers() {
            return None;
        }
        match self.noise.tunn().update_timers(dst) {
            TunnResult::WriteToNetwork(datagram) => {
                self.note_initiation(datagram);
                Some(datagram)
            }
            TunnResult::Err(WireGuardError::ConnectionExpired) => {
                self.longest_queued = None;
                None
            }
            _ => None,
        }
    }

    fn has_session(&self) -> bool {
        self.noise.tunn.as_ref().is_some_and(|tunn| tunn.time_since_last_handshake().is_some())
    }
}

impl Tunnel for BoringTunnel {
    fn seal<'a>(&mut self, packet: &[u8], dst: &'a mut [u8], now: Instant) -> Sealed<'a> {
        if dst.len() < (packet.len() + OVERHEAD).max(MIN_BUFFER) {
            return Sealed::Dropped(DropReason::ShortBuffer);
        }
        let initiation_lost = self.tick(now);
        // What comes back borrows `dst`, so the length of a written datagram stands in for it.
        let written = match self.noise.tunn().encapsulate(packet, dst) {
            TunnResult::WriteToNetwork(datagram) => datagram.len(),
            TunnResult::Done => 0,
            _ => return Sealed::Dropped(DropReason::NoSession),
        };
        if written > 0 && dst[0] == DATA {
            return Sealed::Data(&dst[..written]);
        }
        self.longest_queued = Some(self.longest_queued.unwrap_or(0).max(packet.len()));
        if written > 0 {
            self.note_initiation(&dst[..written]);
            return Sealed::Handshake(&dst[..written]);
        }
        if initiation_lost && let Some(datagram) = self.initiate(dst) {
            return Sealed::Handshake(datagram);
        }
        Sealed::Queued
    }

    fn open<'a>(&mut self, datagram: &[u8], source: IpAddr, dst: &'a mut [u8], now: Instant) -> Opened<'a> {
        let Some(kind) = datagram.first().copied() else { return Opened::Dropped(DropReason::Invalid) };
        if dst.len() < datagram.len().max(MIN_BUFFER) {
            return Opened::Dropped(DropReason::ShortBuffer);
        }
        self.tick(now);
        if kind == RESPONSE && self.is_superseded(datagram) {
            return Opened::Dropped(DropReason::NoSession);
        }
        let opened = match self.noise.tunn().decapsulate(Some(source), datagram, dst) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => Opened::Packet(packet),
            TunnResult::WriteToNetwork(reply) if kind == RESPONSE && reply[0] == DATA => {
                self.established = Some(now);
                self.unconfirmed = None;
                self.note_answered(datagram);
                Opened::Established(Some(reply))
            }
            TunnResult::WriteToNetwork(reply) => {
                if reply[0] == RESPONSE {
                    self.unconfirmed = index_at(reply, 4);
                }
                Opened::Reply(reply)
            }
            TunnResult::Done => Opened::Keepalive,
            TunnResult::Err(error) => Opened::Dropped(reason(&error)),
        };
        let authentic = matches!(opened, Opened::Packet(_) | Opened::Keepalive);
        if authentic && self.unconfirmed.is_some() && kind == DATA && index_at(datagram, 4) == self.unconfirmed {
            self.established = Some(now);
            self.unconfirmed = None;
        }
        opened
    }

    fn flush<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]> {
        let longest = self.longest_queued?;
        // Without a session boringtun would put the packet back at the end of its queue.
        if dst.len() < (longest + OVERHEAD).max(MIN_BUFFER) || !self.has_session() {
            return None;
        }
        self.tick(now);
        match self.noise.tunn().decapsulate(None, &[], dst) {
            TunnResult::WriteToNetwork(datagram) => Some(datagram),
            _ => {
                self.longest_queued = None;
                None
            }
        }
    }

    fn handle_timeout<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]> {
        if dst.len() < MIN_BUFFER {
            return None;
        }
        if let Some(written) = self.update_timers(dst, now).map(<[u8]>::len) {
            return Some(&dst[..written]);
        }
        if self.noise.keepalive.is_some() && self.noise.tunn().is_expired() {
            return self.start_handshake(dst, now);
        }
        None
    }

    fn start_handshake<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]> {
        if dst.len() < MIN_BUFFER {
            return None;
        }
        self.tick(now);
        self.initiate(dst)
    }

    fn since_handshake(&self, now: Instant) -> Option<Duration> {
        self.established.map(|at| now.since(at))
    }
}

impl fmt::Debug for BoringTunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoringTunnel").field("established", &self.established).finish_non_exhaustive()
    }
}

fn is_initiation(datagram: &[u8]) -> bool {
    datagram.first() == Some(&1)
}

fn index_at(datagram: &[u8], at: usize) -> Option<u32> {
    let bytes = datagram.get(at..at + 4)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn reason(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter | WireGuardError::WrongTai64nTimestamp => {
            DropReason::Replayed
        }
        WireGuardError::NoCurrentSession
        | WireGuardError::WrongIndex
        | WireGuardError::UnexpectedPacket
        | WireGuardError::ConnectionExpired => DropReason::NoSession,
        WireGuardError::UnderLoad => DropReason::UnderLoad,
        WireGuardError::DestinationBufferTooSmall => DropReason::ShortBuffer,
        _ => DropReason::Invalid,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::Ipv4Addr;

    use mesh_common::key::PresharedKey;
    use mesh_sim::conformance::{self, Pairing};

    use super::*;

    const SOURCE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn spec(preshared_key: u8) -> PeerSpec {
        PeerSpec {
            preshared_key: Some(PresharedKey([preshared_key; 32])),
            allowed_ips: Default::default(),
            keepalive: None,
            generation: 0,
        }
    }

    fn make(own: &WgSecret, peer: &WgSecret, spec: &PeerSpec, index: u32, now: Instant) -> BoringTunnel {
        BoringTunnels::new(own).make(&peer.public(), spec, index, now)
    }

    #[test]
    fn conforms() {
        let [a, b, stranger] = [1, 2, 3].map(|n| WgSecret::from_seed(&[n; 32]));
        conformance::run(|pairing| {
            let (psk, known) = match pairing {
                Pairing::Matching => (1, &a),
                Pairing::DifferentPsk => (2, &a),
                Pairing::WrongKey => (1, &stranger),
            };
            let now = Instant::ORIGIN;
            (make(&a, &b, &spec(1), 7, now), make(&b, known, &spec(psk), 0xff_ffff, now))
        });
    }

    /// boringtun's own clock does not move here; what is tested is that waking a tunnel costs no packet and no handshake.
    #[test]
    fn a_tunnel_that_slept_connects_at_once() {
        let [a, b] = [1, 2].map(|n| WgSecret::from_seed(&[n; 32]));
        let late = Instant::from_origin(Duration::from_secs(7200));
        let mut one = make(&a, &b, &spec(1), 1, Instant::ORIGIN);
        let mut two = make(&b, &a, &spec(1), 2, Instant::ORIGIN);
        let mut packet = [0; 40];
        packet[0] = 0x45;
        packet[3] = 40;
        let (mut x, mut y) = ([0; 2048], [0; 2048]);
        let Sealed::Handshake(init) = one.seal(&packet, &mut x, late) else { panic!("no handshake") };
        let Opened::Reply(response) = two.open(init, SOURCE, &mut y, late) else { panic!("no response") };
        let Opened::Established(Some(confirm)) = one.open(response, SOURCE, &mut x, late) else { panic!("no session") };
        assert_eq!(two.since_handshake(late), None, "unconfirmed yet");
        assert_eq!(two.open(confirm, SOURCE, &mut y, late), Opened::Keepalive);
        assert_eq!(two.since_handshake(late), Some(Duration::ZERO));
        let data = one.flush(&mut x, late).unwrap();
        assert_eq!(two.open(data, SOURCE, &mut y, late), Opened::Packet(&packet));
    }

    #[test]
    fn initiations_name_their_sender_and_strangers_are_refused_before_any_key_agreement() {
        let [a, b] = [1, 2].map(|n| WgSecret::from_seed(&[n; 32]));
        let mut tunnel = make(&a, &b, &spec(1), 1, Instant::ORIGIN);
        let mut buffer = [0; 2048];
        let init = tunnel.start_handshake(&mut buffer, Instant::ORIGIN).unwrap();
        let (mut reply, at_b, at_a) = ([0; 2048], BoringTunnels::new(&b), BoringTunnels::new(&a));
        assert_eq!(at_b.admit(init, SOURCE, &mut reply), Ok(()));
        assert_eq!(at_b.initiator(init), Some(a.public()));
        assert_eq!(at_a.admit(init, SOURCE, &mut reply), Err(Refused::Invalid), "it is for b's key");
        assert_eq!(at_a.initiator(init), None);
    }

    #[test]
    fn under_load_a_sender_gets_a_cookie_and_comes_back_with_it() {
        let [a, b] = [1, 2].map(|n| WgSecret::from_seed(&[n; 32]));
        let mut tunnel = make(&a, &b, &spec(1), 1, Instant::ORIGIN);
        let at_b = BoringTunnels::new(&b);
        let (mut buffer, mut reply) = ([0; 2048], [0; 2048]);
        let init = tunnel.start_handshake(&mut buffer, Instant::ORIGIN).unwrap();
        for n in 0..HANDSHAKES_PER_SECOND {
            assert_eq!(at_b.admit(init, SOURCE, &mut reply), Ok(()), "number {n}");
        }
        let Err(Refused::UnderLoad(Some(cookie))) = at_b.admit(init, SOURCE, &mut reply) else { panic!("no cookie") };
        assert_eq!(cookie.len(), 64);
        tunnel.open(cookie, SOURCE, &mut [0; 2048], Instant::ORIGIN);
        let init = tunnel.start_handshake(&mut buffer, Instant::ORIGIN).unwrap();
        assert_eq!(at_b.admit(init, SOURCE, &mut reply), Ok(()), "with the cookie it is admitted under load");
    }
}
