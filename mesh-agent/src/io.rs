//! The world outside the process, one file a kind.

pub mod carriers;
pub mod port_mapping;
pub mod relay_queue;
pub mod session;
