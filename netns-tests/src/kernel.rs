//! What agents must do whose packets the kernel's WireGuard carries; run inside a machine whose kernel has it ([`crate::vm`]).
//!
//! Every verdict comes from packets, from the kernel's own words about its links ([`wg`]) and from `/proc`. A check counts only
//! if the links that it is about are of kind wireguard at that moment.

pub mod host;
pub mod many;
pub mod nat;
pub mod report;
pub mod wg;

use std::{
    io::{self, Write},
    time::Instant,
};

use anyhow::{Result, ensure};

use self::report::{CHECKS, Finding, Report};
use crate::{Lab, binaries::Binaries, mesh::node::Node};

/// The lines under `mesh:` that ask for the kernel's WireGuard.
pub const KERNEL: &str = "backend: kernel";
pub const USERSPACE: &str = "backend: userspace";
/// Kernel modules of the lab and of what it runs.
pub const MODULES: &[&str] = &[
    "virtio_rng",
    "wireguard",
    "tun",
    "veth",
    "bridge",
    "br_netfilter",
    "nf_tables",
    "nfnetlink",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nf_nat",
    "nft_chain_nat",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_fib",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "nft_fib_inet",
    "nft_numgen",
    "nft_hash",
    "nft_limit",
    "nft_reject",
    "nft_reject_inet",
    "nft_rt",
    "nft_exthdr",
    "dummy",
    "sch_tbf",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    "inet_diag",
    "udp_diag",
    "tcp_diag",
    "unix_diag",
    "af_packet_diag",
    "netlink_diag",
];

#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Names of checks; all when empty.
    pub only: Vec<String>,
}

/// Runs the checks. What could not be made fails the checks that need it; why is in their details.
pub fn run(binaries: &Binaries, options: &Options) -> Result<Report> {
    for name in &options.only {
        ensure!(CHECKS.contains(&name.as_str()), "there is no check {name}; checks are {}", CHECKS.join(" "));
    }
    let mut run = Run { only: options.only.clone(), start: Instant::now(), report: Report::of_this_kernel()? };
    run.part(&nat::CHECKS, |run| nat::run(run, binaries));
    run.part(&host::CHECKS, |run| host::run(run, binaries));
    run.part(&many::CHECKS, |run| many::run(run, binaries));
    Ok(run.report)
}

/// A run under way.
#[derive(Debug)]
pub(crate) struct Run {
    only: Vec<String>,
    start: Instant,
    report: Report,
}

impl Run {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }

    /// Checks that share what they are made on: without it all of them fail.
    fn part(&mut self, names: &[&'static str], run: impl FnOnce(&mut Self) -> Result<()>) {
        if !names.iter().any(|name| self.wants(name)) {
            return;
        }
        if let Err(error) = run(self) {
            for name in names {
                if self.wants(name) && !self.report.has(name) {
                    self.add(name, Instant::now(), Err(anyhow::anyhow!("{error:#}")));
                }
            }
        }
    }

    pub(crate) fn check(&mut self, name: &'static str, judge: impl FnOnce() -> Result<Finding>) {
        if self.wants(name) {
            let start = Instant::now();
            let finding = judge();
            self.add(name, start, finding);
        }
    }

    fn add(&mut self, name: &'static str, start: Instant, finding: Result<Finding>) {
        let check = self.report.add(name, start.elapsed(), finding);
        let word = if check.ok { "ok  " } else { "FAIL" };
        let line = format!("{:>7.1} s  {word} {name}: {}", self.start.elapsed().as_secs_f64(), check.detail);
        // A closed pipe must not end the run before it has cleaned up.
        let _ = writeln!(io::stderr(), "{line}");
    }
}

/// The kinds of the mesh links of these nodes, as their kernels say it now.
pub(crate) fn kinds(nodes: &[&Node]) -> Result<Vec<String>> {
    nodes.iter().map(|node| wg::link_kind(&node.host, crate::mesh::MESH_LINK)).collect()
}

/// A lab of its own: inside the machine nobody else has one.
pub(crate) fn lab() -> Result<Lab> {
    Lab::new()
}
