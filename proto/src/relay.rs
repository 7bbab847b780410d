//! Datagrams between nodes of one namespace that have no direct path: what a server forwards, and to whom.
//!
//! `budget` says how much, `queue` what waits for a slow reader (at both ends), `switch` brings them together for the server
//! machine.

mod budget;
pub mod queue;
pub mod switch;
