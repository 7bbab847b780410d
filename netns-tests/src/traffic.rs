//! Traffic between hosts, sent and judged outside the programs under test: echo requests, numbered UDP, questions and
//! answers, TCP hashed or kept alive.

pub mod chat;
pub mod echo;
pub mod exchange;
pub mod tcp;
pub mod udp;

pub use chat::Chat;
pub use echo::{EchoStream, EchoTotals, first_reply, first_unreachable};
pub use exchange::{Beat, Exchange};
pub use tcp::{Transfer, transfer};
pub use udp::{UdpStream, UdpTotals, send_clear};
