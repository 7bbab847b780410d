//! The shell around the mesh core: a node's files, its command line, its local API, the host and the data plane.
//!
//! A library so that `bench` and the tests of other crates can drive its parts; the binary only calls it.

pub mod api;
pub mod cli;
pub mod clock;
pub mod daemon;
pub mod device;
pub mod durable;
pub mod io;
pub mod logging;
pub mod options;
pub mod secrets;
pub mod settings;
pub mod state;
pub mod status;
