//! The world outside the process, one file a kind.

pub mod carriers;
pub mod session;
