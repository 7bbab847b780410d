//! The world outside the process, one file a kind.

pub mod session;
