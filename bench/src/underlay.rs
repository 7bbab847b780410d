//! What the wire between the two ends can do for a sender: the offloads of the veth pair, set by ethtool ioctls.
//!
//! A veth hands a segmentation super-packet to its other end whole, which no network card does; so results on `on` alone
//! would say little. `swgso` is nearest to a card without UDP segmentation: the kernel cuts in software on sending, and
//! coalesces on receiving (NAPI GRO). `nogso` has neither.

use std::fmt;

use anyhow::{Context, Result};
use netns_tests::{Host, ethtool};
use serde::Serialize;

/// A kind of wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Underlay {
    /// Super-packets cross whole.
    On,
    /// The kernel cuts them before the wire and coalesces after it.
    #[value(name = "swgso")]
    SwGso,
    /// Every packet alone.
    #[value(name = "nogso")]
    NoGso,
}

impl Underlay {
    pub const ALL: [Self; 3] = [Self::On, Self::SwGso, Self::NoGso];

    fn features(self) -> Vec<(&'static str, bool)> {
        let (segments, software, coalesces) = match self {
            Self::On => (true, true, false),
            Self::SwGso => (false, true, true),
            Self::NoGso => (false, false, false),
        };
        let mut features: Vec<_> = SEGMENTATION.iter().map(|name| (*name, segments)).collect();
        features.extend([("tx-generic-segmentation", software), ("rx-gro", coalesces)]);
        features
    }
}

impl fmt::Display for Underlay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::SwGso => "swgso",
            Self::NoGso => "nogso",
        })
    }
}

/// What a device may do with a super-packet: the kernel's names (`ethtool -k`).
const SEGMENTATION: [&str; 5] = [
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
];

/// Makes one end of a veth pair such a wire, and checks that it is.
pub fn set(host: &Host, link: &str, underlay: Underlay) -> Result<()> {
    ethtool::set_features(host, link, &underlay.features())
        .with_context(|| format!("cannot make {link} what --underlay {underlay} asks for"))
}
