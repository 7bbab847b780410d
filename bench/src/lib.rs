//! What the micro benches share: seeded members with their records, and a node that lives among them.
//!
//! Owns no measurement and reads no clock: keys, records and frames are functions of a number, so two runs measure the
//! same bytes. [`member`] makes the members, [`node`] the one that looks at them.

#![forbid(unsafe_code)]

pub mod member;
pub mod node;
