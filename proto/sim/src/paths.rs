//! Two hosts or three behind NATs, one server or two that relay and answer STUN, and a judge: whether traffic flows at once,
//! goes direct where it must, loses nothing, survives faults, and costs nothing when nobody talks.
//!
//! A [`plan`] is made from a seed; [`crate::oracle`] says which pairs must be direct. A seed is a complete description of a
//! run.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use mesh_common::time::Instant;
use mesh_proto::path::agent::PathPolicy;

use self::judge::Violation;
use self::plan::{Fault, Plan};
use self::world::World;
use crate::nat::NatKind;

mod faults;
pub mod judge;
pub mod plan;
pub mod port_mapping;
mod sessions;
mod trace;
mod world;

/// What a run is made from.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub seed: u64,
    pub policy: PathPolicy,
    /// Write down everything that happens.
    pub traces: bool,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    pub seed: u64,
    pub classes: [NatKind; 2],
    pub is_troubled: bool,
    /// Links lose datagrams.
    pub loses: bool,
    pub fault: Option<Fault>,
    /// Whether the oracle calls the first pair direct, before any fault.
    pub must_be_direct: bool,
    /// Whether it was.
    pub was_direct: bool,
    pub first_byte: Option<Duration>,
    /// From the first packet until none of the first pair's took a relay.
    pub to_direct: Option<Duration>,
    pub violations: Vec<(Instant, Violation)>,
    pub delivered: u64,
    pub events: u64,
    pub trace: Vec<String>,
}

/// Runs a seed to its end.
pub fn run(options: Options) -> Outcome {
    run_plan(Plan::new(options.seed), options)
}

/// Runs a plan, of this seed or changed by hand.
pub fn run_plan(plan: Plan, options: Options) -> Outcome {
    World::new(plan, options).run()
}

fn is_tunnel_data(datagram: &[u8]) -> bool {
    datagram.first() == Some(&4)
}

/// The address and port of a host's socket.
fn socket(addr: IpAddr) -> SocketAddr {
    SocketAddr::new(addr, mesh_common::limits::LISTEN_PORT)
}
