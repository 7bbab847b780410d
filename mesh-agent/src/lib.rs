//! The shell around the mesh core: a node's files, its command line, its local API, the host and the data plane.
//!
//! A library so that `bench` and the tests of other crates can drive its parts; the binary only calls it.

pub mod api;
pub mod backend;
pub mod cli;
pub mod clock;
pub mod daemon;
pub mod dataplane;
pub mod device;
pub mod doctor;
pub mod durable;
pub mod eventloop;
pub mod http;
pub mod io;
pub mod kernel;
pub mod logging;
pub mod node_settings;
pub mod secrets;
pub mod services;
pub mod settings;
pub mod speedtest;
pub mod state;
pub mod status;
