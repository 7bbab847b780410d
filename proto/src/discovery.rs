//! The rendezvous: what a server keeps and tells, and how an agent keeps a session with one server.

pub mod client;
pub mod server;
pub mod store;
