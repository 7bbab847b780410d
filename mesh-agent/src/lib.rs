//! The shell around the mesh core: a node's files, its command line and its local API.

pub mod api;
pub mod cli;
pub mod daemon;
pub mod durable;
pub mod logging;
pub mod secrets;
pub mod settings;
pub mod state;
pub mod status;
