//! The seam to WireGuard: what a tunnel to one peer can do, and nothing of how.
//!
//! mesh-agent implements it with boringtun, the simulator with a model that has the same timers and no crypto; both pass
//! one conformance script (mesh-sim, `conformance`). The implementation owns handshakes, sessions, rekey timers and the
//! replay window of one peer. It never looks at addresses of inner packets: that check is the caller's.

use std::net::IpAddr;
use std::time::Duration;

use mesh_common::time::Instant;

/// `seal` and `open` need room for this much more than their input, and never less than a handshake (148 bytes).
pub const OVERHEAD: usize = 32;
pub const MIN_BUFFER: usize = 148;

/// A tunnel to one peer. Every method writes at most one datagram or packet to the beginning of `dst`; a `dst` that is too short loses the
/// input ([`DropReason::ShortBuffer`]) and never panics.
pub trait Tunnel: Send {
    /// Seals one inner IP packet. Without a session the packet is queued (bounded) and a handshake starts.
    fn seal<'a>(&mut self, packet: &[u8], dst: &'a mut [u8], now: Instant) -> Sealed<'a>;

    /// Opens one datagram that was addressed to this tunnel.
    fn open<'a>(&mut self, datagram: &[u8], source: IpAddr, dst: &'a mut [u8], now: Instant) -> Opened<'a>;

    /// Gives the next packet that was queued while there was no session; call until `None` after a handshake.
    fn flush<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]>;

    /// Runs the timers (rekey, keepalive, expiry); call about every 250 ms while the tunnel is in use.
    fn handle_timeout<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]>;

    /// Starts a handshake whatever the state, for a new endpoint or a slow retry.
    fn start_handshake<'a>(&mut self, dst: &'a mut [u8], now: Instant) -> Option<&'a [u8]>;

    /// How long ago the last handshake completed.
    fn since_handshake(&self, now: Instant) -> Option<Duration>;
}

#[derive(Debug, PartialEq, Eq)]
pub enum Sealed<'a> {
    /// Transport data, ready to send.
    Data(&'a [u8]),
    /// The packet is queued; this handshake initiation goes out first.
    Handshake(&'a [u8]),
    /// The packet is queued behind a handshake that is under way.
    Queued,
    Dropped(DropReason),
}

#[derive(Debug, PartialEq, Eq)]
pub enum Opened<'a> {
    /// An inner packet. The caller checks its source against the peer's allowed IPs before anything else.
    Packet(&'a [u8]),
    /// Authentic, and nothing to deliver or answer (a keepalive).
    Keepalive,
    /// A handshake message or cookie to send back to where the datagram came from.
    Reply(&'a [u8]),
    /// Our handshake was answered and is complete; `Some` is a datagram that confirms it.
    Established(Option<&'a [u8]>),
    Dropped(DropReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DropReason {
    /// Not authentic, of another session, or malformed.
    Invalid,
    Replayed,
    /// No session and no way to make one with this input.
    NoSession,
    ShortBuffer,
    /// The receiver is under load and asked for a cookie.
    UnderLoad,
}
