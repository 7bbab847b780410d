//! The whole mesh in one thread: the real agents, the real server machine, virtual time, and models of all the rest.
//!
//! [`world`] runs a [`scenario`] made from a seed; [`model`] judges it. [`calm`] is for scenarios written by hand. Nothing here reads a clock or opens a socket, so a
//! seed is a complete description of a run.

pub mod calm;
pub mod campaign;
pub mod clock;
pub mod conformance;
pub mod engine;
pub mod host;
pub mod internet;
pub mod kernel;
pub mod link;
pub mod model;
pub mod nat;
pub mod oracle;
pub mod packet;
pub mod paths;
pub mod scenario;
pub mod server;
pub mod tunnel;
pub mod world;
