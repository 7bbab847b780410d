//! What every contender of a run finds alike: the wire, and the congestion control of whoever sends TCP.
//!
//! The latter is a setting of the machine, and tells on every figure of TCP: BBR lets one super-packet go at a time by a
//! timer of its own, cubic lets as many go as the window holds. So it is set, never left to what a new namespace happens to
//! get, and told.

use std::fs;

use anyhow::{Context, Result};
use netns_tests::Host;
use serde::Serialize;

use crate::underlay::{self, Underlay};

const KEY: &str = "ipv4/tcp_congestion_control";

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Conditions {
    pub underlay: Underlay,
    /// The kernel's name for it, such as `cubic`.
    pub congestion: String,
}

impl Conditions {
    /// With the congestion control that this machine has set where none is named.
    pub fn new(underlay: Underlay, congestion: Option<&str>) -> Result<Self> {
        let file = format!("/proc/sys/net/{KEY}");
        let congestion = match congestion {
            Some(name) => name.to_owned(),
            None => fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?.trim().to_owned(),
        };
        Ok(Self { underlay, congestion })
    }

    /// Sets up a host that sends, and its end of the wire.
    pub fn apply(&self, host: &Host, link: &str) -> Result<()> {
        underlay::set(host, link, self.underlay)?;
        let name = &self.congestion;
        host.set_sysctl(KEY, name).with_context(|| {
            let of = |which: &str| host.sysctl(&format!("ipv4/tcp_{which}_congestion_control")).unwrap_or_default();
            format!(
                "TCP cannot have the congestion control {name}: the kernel has {} (modprobe tcp_{name} may add it), and namespaces \
                 may set {} (sysctl net.ipv4.tcp_allowed_congestion_control)",
                of("available"),
                of("allowed")
            )
        })
    }
}
