//! Two path agents and what lies between them, in simulated time.
#![allow(clippy::unwrap_used)]

mod change;
mod death;
mod guess;
mod pair;
mod punch;
mod single;
