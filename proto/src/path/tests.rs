//! Two path agents and what lies between them, in simulated time.
#![allow(clippy::unwrap_used)]

mod change;
mod death;
mod pair;
mod punch;
