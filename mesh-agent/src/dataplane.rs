//! The userspace data plane: packets between the TUN device and the UDP socket pair, sealed and opened by a tunnel a peer.
//!
//! Plain threads move packets, two a lane: `outbound` (TUN, lookup of the destination, seal, UDP) and `inbound` (UDP, classify,
//! open, check of the source, TUN). Everything else (handshakes, timers, peers, routes) happens on the caller's control
//! thread through [`Engine`], so that a 0.2 ms handshake never holds up a packet.
//!
//! Invariants:
//! - Control publishes what the threads read: one immutable snapshot (peers, receiver index, allowed IPs) and per peer a
//!   path. A thread loads them once a batch.
//! - What goes over a relay leaves through control: the threads only queue it.
//! - A tunnel's lock is taken once per super-packet or received run; with it held nothing is sent, received or waited for.
//! - Bytes from the network cost a named counter ([`EngineStats`]), never a panic, and queues are bounded.
//! - An inner packet goes to the host only if its source is in the allowed IPs of the peer whose tunnel opened it.
//!
//! Devices and sockets are seen through two traits, [`PacketDevice`] and [`DatagramSocket`]. The host hands over super-packets
//! and takes them ([`mesh_proto::offload`] cuts and joins), the kernel takes and gives runs of datagrams; what it lacks of that
//! ([`Offloads`]) is done without, packet by packet.

mod connected;
mod control;
mod drops;
mod ecn;
mod engine;
mod extra;
mod inbound;
mod index;
mod inner;
mod io;
#[cfg(test)]
pub(crate) mod memory;
mod mmsg;
mod offloads;
mod outbound;
mod peer;
mod queues;
mod scheduling;
mod shared;
mod table;
mod traffic;
pub mod tun;
mod tunnel;
pub mod udp;

pub use drops::EngineStats;
pub use ecn::Ecn;
pub use engine::{Clock, Engine};
pub(crate) use extra::ExtraSockets;
pub use io::{Arrival, DatagramSocket, Descriptors, MAX_BATCH, Outgoing, Packed, PacketDevice, Ready, Received, RunOf};
pub use offloads::{DeviceOffloads, Offloads, SocketOffloads};
pub use queues::ControlDatagram;
pub use tun::{Tun, TunError};
pub use tunnel::{BoringTunnel, BoringTunnels, Refused, TunnelFactory};
pub use udp::UdpSockets;
