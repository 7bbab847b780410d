//! From records to what should be on the host: members, peers, desired state, the difference, and the composed machine.

pub mod agent;
pub mod desired;
pub mod members;
mod path_table;
pub mod peer;
pub mod reconcile;
pub mod settings;
