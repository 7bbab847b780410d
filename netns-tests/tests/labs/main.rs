//! Every test that builds a lab, in one program: what waits by protocol (a rekey, a lease) lives beside the others there.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bad_input;
mod impair;
mod interop;
mod judge;
mod kill;
mod lab;
mod leak;
mod lifecycle;
mod nat;
mod outage;
mod path_judges;
mod port_mapping;
mod routing;
mod speedtest;
