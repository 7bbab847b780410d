//! What a link's device may do with super-packets, by ethtool ioctls.
#![allow(unsafe_code)]

use std::{
    ffi::c_char,
    os::fd::{AsRawFd, OwnedFd},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, socket},
        utsname::uname,
    },
};

use crate::Host;

/// Switches features on or off by the kernel's names for them (`ethtool -k`), and checks that they are.
pub fn set_features(host: &Host, link: &str, features: &[(&str, bool)]) -> Result<()> {
    host.inside(|| {
        let device = Device::open(link)?;
        let names = device.feature_names()?;
        let wanted = features
            .iter()
            .map(|(name, on)| {
                let at = names.iter().position(|known| known == name);
                Ok((at.with_context(|| format!("this kernel knows no feature {name}"))?, *name, *on))
            })
            .collect::<Result<Vec<_>>>()?;
        device.set_features(names.len(), wanted.iter().map(|(at, _, on)| (*at, *on)))?;
        let active = device.active_features(names.len())?;
        for (at, name, on) in wanted {
            ensure!(active[at] == on, "{name} stays {}", if active[at] { "on" } else { "off" });
        }
        Ok(())
    })
    .with_context(|| format!("cannot set the offloads of {link}"))
}

/// Whether packet sockets can be given UDP super-packets. Before Linux 6.2 their header has no word for them, and reading one
/// is an error.
pub(crate) fn shows_udp_super_packets() -> bool {
    uname().is_ok_and(|name| is_since_6_2(&name.release().to_string_lossy()))
}

fn is_since_6_2(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or_default());
    (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default()) >= (6, 2)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        for (release, since) in
            [("6.1.0-56-cloud-amd64", false), ("5.15.0", false), ("6.2", true), ("6.18.44-fc", true)]
        {
            assert_eq!(is_since_6_2(release), since, "{release}");
        }
    }
}
