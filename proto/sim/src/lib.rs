//! Placeholder.
//!

pub mod conformance;
pub mod tunnel;
