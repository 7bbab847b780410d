//! What measures Meshspan: the binary `mesh-bench`, and what the micro benches share.
//!
//! `mesh-bench throughput` reads from the ground up: [`underlay`], [`conditions`] and [`bed`] are the wire and its two hosts, [`traffic`]
//! loads them, [`rival`] and [`contender`] say who carries, [`machine`] who used the processors, [`measure`] does one
//! contender in one round, [`throughput`] all of them, [`gates`] judges, [`report`] shows. [`peers`] compares a large mesh
//! with a small one, [`soak`] lets one tunnel run for long, [`converge`] has one node meet a thousand others.
//!
//! The micro benches own no clock: keys, records and frames are functions of a number, so two runs measure the same bytes.
//! [`member`] makes the members, [`node`] the one that looks at them, [`cipher`] two ends of a tunnel.

pub mod bed;
pub mod cipher;
pub mod cli;
pub mod conditions;
pub mod contender;
pub mod converge;
pub mod gates;
pub mod iperf3;
pub mod machine;
pub mod measure;
pub mod member;
pub mod metric;
pub mod node;
pub mod peers;
pub mod report;
pub mod rival;
pub mod soak;
pub mod stats;
pub mod throughput;
pub mod traffic;
pub mod underlay;
