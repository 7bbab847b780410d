//! The rendezvous: what a server keeps and tells, and how an agent keeps a session with one server.
//!
//! `limits` (budgets) and `store` (slots, versions, cursors) are used by `server` (every connection); `client` is the other
//! end. Client and server know each other by [`crate::wire::session`] only.

pub mod client;
pub mod limits;
pub mod server;
pub mod store;

#[cfg(test)]
mod tests;
