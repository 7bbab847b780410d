//! The shell around the mesh core: a node's files, its command line and its local API.

pub mod durable;
pub mod secrets;
pub mod state;
