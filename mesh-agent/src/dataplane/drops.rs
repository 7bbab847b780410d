//! What was dropped and why, by name.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! drops {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a packet or a datagram went no further.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Drop {
            $($(#[$doc])* $variant,)*
        }

        const NAMES: &[&str] = &[$($name,)*];
    };
}

drops! {
    /// From the host: not a whole IP packet.
    OutMalformed = "out_malformed",
    /// From the host: nobody's allowed IPs hold the destination.
    OutNoPeer = "out_no_peer",
    /// The peer has a session, and no endpoint is known.
    OutNoEndpoint = "out_no_endpoint",
    /// The tunnel refused the packet, or the batch had no room for it.
    OutNotSealed = "out_not_sealed",
    /// The kernel did not take the datagram.
    OutNotSent = "out_not_sent",
    /// The kernel did not take a probe or a STUN message, most often because there is no route to where it should go.
    OutControlNotSent = "out_control_not_sent",
    /// Not a packet: the host had no room for the sockets that guessing ports takes.
    ExtraNotOpened = "extra_not_opened",
    /// More came for relays than control hands on: the oldest went.
    OutRelayQueueFull = "out_relay_queue_full",
    /// The socket failed to receive.
    InSocketError = "in_socket_error",
    /// Neither WireGuard nor a protocol of ours, or too long for what it looks like.
    InUnknown = "in_unknown",
    /// Of no tunnel of ours: an old session, or a guess.
    InUnknownIndex = "in_unknown_index",
    /// Not authentic.
    InInvalid = "in_invalid",
    InReplayed = "in_replayed",
    /// The session has ended.
    InNoSession = "in_no_session",
    /// The opened packet is not a whole IP packet.
    InMalformed = "in_malformed",
    /// The opened packet's source is not its peer's.
    InForeignSource = "in_foreign_source",
    /// The host did not take the packet, or there is no link.
    InNotDelivered = "in_not_delivered",
    /// Over a relay, from a node that is no peer.
    RelayedUnknownPeer = "relayed_unknown_peer",
    /// Over a relay, of another peer's tunnel than of the one that the relay names as its sender.
    RelayedForeign = "relayed_foreign",
    /// More probes and STUN messages came than control takes: this one was a probe.
    ProbeQueueFull = "probe_queue_full",
    /// The same, and this one was a STUN message.
    StunQueueFull = "stun_queue_full",
    /// More handshake messages came than control takes.
    HandshakeQueueFull = "handshake_queue_full",
    /// A handshake message that is not for our key, or is not authentic.
    HandshakeInvalid = "handshake_invalid",
    HandshakeReplayed = "handshake_replayed",
    /// An answer to no handshake of ours.
    HandshakeUnexpected = "handshake_unexpected",
    /// Too many came; the sender got a cookie to come back with.
    HandshakeUnderLoad = "handshake_under_load",
    /// A good initiation of somebody who is not a peer.
    HandshakeUnknownKey = "handshake_unknown_key",
}

/// What the engine dropped since it started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Every reason with its count, zeros too.
    pub drops: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Default)]
pub(super) struct Drops([AtomicU64; NAMES.len()]);

impl Drops {
    pub(super) fn count(&self, why: Drop) {
        self.add(why, 1);
    }

    pub(super) fn add(&self, why: Drop, times: usize) {
        if times > 0 {
            self.0[why as usize].fetch_add(times as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn stats(&self) -> EngineStats {
        let counts = self.0.iter().map(|count| count.load(Ordering::Relaxed));
        EngineStats { drops: NAMES.iter().copied().zip(counts).collect() }
    }
}
