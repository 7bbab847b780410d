//! From records to what should be on the host: members, peers, desired state, the difference, and the composed machine.

pub mod members;
