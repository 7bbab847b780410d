//! This node's own place in the network: how servers see its WireGuard socket, and what that says of the NAT before it.
//!
//! The data flows through the files in this order: [`exchange`] asks one question until it is answered, [`reflector`] puts the
//! questions to one server address in the order that does not spoil the answers, [`classify`] reads the class out of what was
//! seen, [`family`] repeats all that for one address family when it is due, [`report`] is the whole. Beside it [`port_mapping`] asks the
//! router for a port, and believes no more of its answer than servers see.

mod classify;
mod exchange;
mod family;
pub mod port_mapping;
mod reflector;
pub mod report;
#[cfg(test)]
mod tests;
