//! A lab in network namespaces: hosts, links, traffic, captures and dumps made by system calls and netlink, around the
//! real `mesh-agent` and `discovery-server` binaries.
//!
//! Reads from the ground up: [`isolation`] decides whether this process may make namespaces at all, [`lab`] owns what a
//! run creates and removes it, [`host`] is one namespace, [`link`] wires hosts together, [`process`] runs programs in
//! them, [`traffic`], [`capture`], [`monitor`] and [`snapshot`] judge from outside, [`mesh`] puts a server and some nodes
//! on sites, [`checks`] says what they must do, and [`demo`] is the newcomer's tour. [`nat`] puts routers with NAT and bad
//! wires ([`impair`]) in between: [`matrix`] connects every kind with every other, [`roaming`] breaks what is connected. [`vm`]
//! boots a machine whose kernel has WireGuard, and [`kernel`] is what agents that use it must do there. [`program`] is how
//! each program of this crate begins and ends.
//!
//! Refuses to know the inside of the programs under test: it drives them through their command lines, their config
//! files and packets. It runs no network tool (`ip`, `nft`, `wg`, `tcpdump`).

pub mod binaries;
pub mod capture;
pub mod checks;
pub mod demo;
pub mod ethtool;
pub mod gateway;
pub mod host;
pub mod impair;
pub mod isolation;
pub mod kernel;
pub mod lab;
pub mod link;
pub mod matrix;
pub mod mesh;
pub mod messages;
pub mod monitor;
pub mod nat;
pub mod nft;
mod packet;
pub mod process;
pub mod program;
pub mod proxy;
pub mod roaming;
pub mod snapshot;
pub mod traffic;
pub mod vm;
pub mod wait;
pub mod wireguard;

pub use capture::{Capture, Counts, Marker, Watch};
pub use host::Host;
pub use isolation::{Entry, Unavailable, enter_or_skip};
pub use lab::Lab;
pub use mesh::{Mesh, MeshOptions};
pub use monitor::Monitor;
pub use snapshot::Snapshot;
