//! Traffic between hosts, sent and judged outside the programs under test: echo requests, numbered UDP, hashed TCP.

pub mod echo;
pub mod tcp;
pub mod udp;

pub use echo::{EchoStream, EchoTotals, first_reply, first_unreachable};
pub use tcp::{Transfer, transfer};
pub use udp::{UdpStream, UdpTotals, send_clear};
