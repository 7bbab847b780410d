//! Segmentation and receive offload in software: what a network card would do for the TUN device.
//!
//! The host hands over TCP and UDP super-packets of up to 64 KiB, described by a [`VnetHeader`]; [`cut`] makes the packets
//! of them that go on the wire. What comes from the wire [`coalesce`] joins again, so that the host takes many packets by
//! one call. Both work in the caller's memory: nothing is copied but headers.
//!
//! Refuses I/O, and trust: lengths and offsets come from the packet's own headers, checked against its bytes, never from the
//! header beside it. What does not fit is [`cut::Malformed`] or stays as it came; nothing here panics on any bytes.

pub mod checksum;
pub mod coalesce;
pub mod cut;
mod headers;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
pub mod vnet;

pub use coalesce::Coalescer;
pub use cut::{Cut, Malformed, Segments};
pub use vnet::VnetHeader;

/// The largest packet: what the length field of an IP header can say.
pub const MAX_PACKET: usize = 65_535;
