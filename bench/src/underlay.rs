//! What the wire between the two ends can do for a sender: the offloads of the veth pair, set by ethtool ioctls.
//!
//! A veth hands a segmentation super-packet to its other end whole, which no network card does; so results on `on` alone
//! would say little. `swgso` is nearest to a card without UDP segmentation: the kernel cuts in software on sending, and
//! coalesces on receiving (NAPI GRO). `nogso` has neither.
#![allow(unsafe_code)]

use std::{
    ffi::c_char,
    fmt,
    os::fd::{AsRawFd, OwnedFd},
};

use anyhow::{Context, Result, ensure};
use netns_tests::Host;
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};
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
    host.inside(|| {
        let device = Device::open(link)?;
        let names = device.feature_names()?;
        let wanted = underlay
            .features()
            .into_iter()
            .map(|(name, on)| {
                let at = names.iter().position(|known| known == name);
                Ok((at.with_context(|| format!("this kernel knows no feature {name}"))?, name, on))
            })
            .collect::<Result<Vec<_>>>()?;
        device.set_features(names.len(), wanted.iter().map(|(at, _, on)| (*at, *on)))?;
        let active = device.active_features(names.len())?;
        for (at, name, on) in wanted {
            ensure!(active[at] == on, "{name} stays {}", if active[at] { "on" } else { "off" });
        }
        Ok(())
    })
    .with_context(|| format!("cannot set the offloads of {link} for --underlay {underlay}"))
}

// From linux/ethtool.h.
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;

struct Device {
    socket: OwnedFd,
    name: [c_char; libc::IFNAMSIZ],
}

impl Device {
    fn open(link: &str) -> Result<Self> {
        ensure!(link.len() < libc::IFNAMSIZ, "{link} is no name of a link");
        let mut name = [0; libc::IFNAMSIZ];
        for (to, from) in name.iter_mut().zip(link.bytes()) {
            *to = from as c_char;
        }
        Ok(Self { socket: socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?, name })
    }

    /// The names of all features, by their number.
    fn feature_names(&self) -> Result<Vec<String>> {
        // struct ethtool_sset_info: cmd, reserved, u64 mask, then one u32 per set.
        let mut info = [ETHTOOL_GSSET_INFO, 0, 0, 0, 0];
        info[2..4].copy_from_slice(&halves(1 << ETH_SS_FEATURES));
        self.ioctl(&mut info)?;
        let count = info[4] as usize;
        // struct ethtool_gstrings: cmd, string_set, len, then the strings.
        let mut strings = vec![0; 3 + count * ETH_GSTRING_LEN / 4];
        strings[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count as u32]);
        self.ioctl(&mut strings)?;
        let bytes: Vec<u8> = strings[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
        Ok(bytes
            .chunks(ETH_GSTRING_LEN)
            .map(|name| String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
            .collect())
    }

    fn active_features(&self, count: usize) -> Result<Vec<bool>> {
        // struct ethtool_gfeatures: cmd, size, then per 32 features: available, requested, active, never_changed.
        let blocks = count.div_ceil(32);
        let mut request = vec![0; 2 + blocks * 4];
        request[..2].copy_from_slice(&[ETHTOOL_GFEATURES, blocks as u32]);
        self.ioctl(&mut request)?;
        Ok((0..count).map(|at| request[2 + at / 32 * 4 + 2] >> (at % 32) & 1 == 1).collect())
    }

    fn set_features(&self, count: usize, wanted: impl Iterator<Item = (usize, bool)>) -> Result<()> {
        // struct ethtool_sfeatures: cmd, size, then per 32 features: valid, requested.
        let blocks = count.div_ceil(32);
        let mut request = vec![0; 2 + blocks * 2];
        request[..2].copy_from_slice(&[ETHTOOL_SFEATURES, blocks as u32]);
        for (at, on) in wanted {
            request[2 + at / 32 * 2] |= 1 << (at % 32);
            request[2 + at / 32 * 2 + 1] |= u32::from(on) << (at % 32);
        }
        self.ioctl(&mut request)
    }

    /// `request` begins with its command and is as long as that says.
    fn ioctl(&self, request: &mut [u32]) -> Result<()> {
        // SAFETY: an all-zero ifreq is valid: it holds integers, arrays and pointers that are not followed.
        let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
        ifreq.ifr_name = self.name;
        ifreq.ifr_ifru.ifru_data = request.as_mut_ptr().cast();
        // SAFETY: SIOCETHTOOL reads and writes one ifreq and the request it points to, whose length each caller above makes
        // what its command and counts say; the kernel keeps no reference to either.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCETHTOOL as _, &mut ifreq) };
        Errno::result(result).map(drop).context("SIOCETHTOOL")
    }
}

/// A u64 as the kernel finds it in two u32.
fn halves(value: u64) -> [u32; 2] {
    let bytes = value.to_ne_bytes();
    let half = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [half(0), half(4)]
}
