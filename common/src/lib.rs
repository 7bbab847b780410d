//! Vocabulary of the mesh: keys, ids, addresses, prefixes, limits, configuration and the words of RFC 4787.
//!
//! Owns types and pure derivations that every other crate speaks in. Refuses I/O, async, clocks, environment and
//! randomness: bytes and `now` are arguments.

#![forbid(unsafe_code)]

pub mod addr;
pub mod allowed_ips;
pub mod config;
pub mod host_name;
pub mod id;
pub mod key;
pub mod limits;
pub mod nat;
pub mod time;
pub mod token;
