//! Where a peer can be reached: candidates, and which of them carries.

pub mod agent;
pub mod candidate;
pub(crate) mod exchange;
pub mod explain;
pub mod hard;
mod hunt;
pub mod mtu;
pub mod replay;
pub mod round;
mod route;
pub mod score;
mod track;
mod trust;
pub mod view;
mod watch;

#[cfg(test)]
mod tests;
