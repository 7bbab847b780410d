//! Overlay addresses, and which prefixes may be announced.
//!
//! IPv6 is a pure function of cluster id and node id, so nobody can claim another's. IPv4 comes from a small pool: the
//! n-th choice of a node is a function of its id, and who keeps a clashing one is decided by [`Claim`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::id::NodeId;

/// The pool of overlay IPv4 addresses unless configured otherwise: half of the benchmarking range, which no LAN uses.
pub const OVERLAY_V4_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 19, 0, 0), 16);

/// The overlay IPv6 /64 of a cluster: `fd`, then 7 bytes of SHA-256(`meshspan/v1 ula`, cluster id).
pub fn overlay_v6_prefix(cluster_id: &str) -> [u8; 8] {
    let hash = Sha256::new().chain_update(b"meshspan/v1 ula").chain_update(cluster_id.as_bytes()).finalize();
    let mut prefix = [0xfd; 8];
    prefix[1..].copy_from_slice(&hash[..7]);
    prefix
}

/// The overlay IPv6 address of a node: the cluster's /64, then 8 bytes of SHA-256(node id). Outlives a new secret.
pub fn overlay_v6(cluster_id: &str, node: &NodeId) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets[..8].copy_from_slice(&overlay_v6_prefix(cluster_id));
    octets[8..].copy_from_slice(&Sha256::digest(node.0)[..8]);
    Ipv6Addr::from(octets)
}

/// The `attempt`-th choice of overlay IPv4 address for a node: SHA-256(`meshspan/v1 v4`, node id, attempt as u32
/// little-endian), its first 4 bytes big-endian modulo the pool, network and broadcast address left out.
/// `None` for a pool with no usable host.
pub fn overlay_v4_choice(pool: Ipv4Net, node: &NodeId, attempt: u32) -> Option<Ipv4Addr> {
    let hosts = (1u64 << (32 - u32::from(pool.prefix_len()))).checked_sub(2).filter(|hosts| *hosts > 0)?;
    let hash = Sha256::new()
        .chain_update(b"meshspan/v1 v4")
        .chain_update(node.0)
        .chain_update(attempt.to_le_bytes())
        .finalize();
    let word = u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]);
    let offset = u32::try_from(1 + u64::from(word) % hosts).expect("the offset stays inside a 32-bit pool");
    Some(Ipv4Addr::from(u32::from(pool.network()) + offset))
}

/// A node's claim on its overlay IPv4 address. The smaller claim keeps a clashing address: older first, then the smaller
/// node id, so a newcomer never moves a running node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Claim {
    /// Unix milliseconds, by the claimer's clock, when the address was first taken.
    pub claimed_at_ms: u64,
    pub node: NodeId,
}

/// Why a prefix is not accepted from anyone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum PrefixRefusal {
    #[error("it is a default route")]
    DefaultRoute,
    #[error("it is wider than /8 (IPv4) or /16 (IPv6)")]
    TooWide,
    #[error("it is or holds loopback, link-local, multicast or unspecified space")]
    Unroutable,
}

/// What no router forwards as unicast. In IPv6 also IPv4 in disguise.
const UNROUTABLE_V4: [Ipv4Net; 5] = [
    Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8),
    Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4),
    Ipv4Net::new_assert(Ipv4Addr::BROADCAST, 32),
];
const UNROUTABLE_V6: [Ipv6Net; 5] = [
    Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 128),
    Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128),
    Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96),
    Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
];

/// What is an address on some network only: private, between a carrier and its customers (100.64.0.0/10), of a transition
/// mechanism, for benchmarks, reserved.
const NOT_PUBLIC_V4: [Ipv4Net; 7] = [
    Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 8),
    Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10),
    Ipv4Net::new_assert(Ipv4Addr::new(172, 16, 0, 0), 12),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 0, 0), 24),
    Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 0, 0), 16),
    Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 15),
    Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4),
];

/// Judges a prefix by itself. `allow_wide` lifts the refusal of default and very wide routes, which hold unroutable space
/// and cannot do without; never that of others.
pub fn check_prefix(prefix: IpNet, allow_wide: bool) -> Result<(), PrefixRefusal> {
    let widest = match prefix {
        IpNet::V4(_) => 8,
        IpNet::V6(_) => 16,
    };
    if !allow_wide && prefix.prefix_len() == 0 {
        return Err(PrefixRefusal::DefaultRoute);
    }
    if !allow_wide && prefix.prefix_len() < widest {
        return Err(PrefixRefusal::TooWide);
    }
    let is_wide = prefix.prefix_len() < widest;
    let is_refused = |range: IpNet| range.contains(&prefix) || !is_wide && prefix.contains(&range);
    if unroutable().any(is_refused) { Err(PrefixRefusal::Unroutable) } else { Ok(()) }
}

/// Whether unicast traffic to this address can cross a router.
pub fn is_routable(addr: IpAddr) -> bool {
    !unroutable().any(|range| range.contains(&addr))
}

/// Whether the Internet can have a host of this address.
pub fn is_public_v4(addr: Ipv4Addr) -> bool {
    is_routable(addr.into()) && !NOT_PUBLIC_V4.iter().any(|range| range.contains(&addr))
}

fn unroutable() -> impl Iterator<Item = IpNet> {
    UNROUTABLE_V4.into_iter().map(IpNet::V4).chain(UNROUTABLE_V6.into_iter().map(IpNet::V6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_v6_depends_on_cluster_and_node_only() {
        let node = NodeId([3; 32]);
        let addr = overlay_v6("home", &node);
        assert_eq!(addr.octets()[0], 0xfd);
        assert_eq!(addr, overlay_v6("home", &node));
        assert_ne!(addr.octets()[..8], overlay_v6("work", &node).octets()[..8]);
        assert_ne!(addr, overlay_v6("home", &NodeId([4; 32])));
    }

    #[test]
    fn overlay_v4_choices_stay_inside_and_skip_the_ends() {
        let pool: Ipv4Net = "10.9.0.0/30".parse().unwrap();
        for attempt in 0..100 {
            let addr = overlay_v4_choice(pool, &NodeId([9; 32]), attempt).unwrap();
            assert!(addr > pool.network() && addr < pool.broadcast(), "{addr}");
        }
        assert_eq!(overlay_v4_choice("10.9.0.0/31".parse().unwrap(), &NodeId([9; 32]), 0), None);
    }

    #[test]
    fn an_older_claim_wins_and_a_tie_goes_to_the_smaller_id() {
        let claim = |claimed_at_ms, id| Claim { claimed_at_ms, node: NodeId([id; 32]) };
        assert!(claim(1, 9) < claim(2, 1));
        assert!(claim(1, 1) < claim(1, 9));
    }

    #[test]
    fn wide_and_unroutable_prefixes_are_refused() {
        let check = |text: &str, wide| check_prefix(text.parse().unwrap(), wide);
        assert_eq!(check("0.0.0.0/0", false), Err(PrefixRefusal::DefaultRoute));
        assert_eq!(check("::/0", false), Err(PrefixRefusal::DefaultRoute));
        assert_eq!(check("128.0.0.0/1", false), Err(PrefixRefusal::TooWide));
        assert_eq!(check("2000::/12", false), Err(PrefixRefusal::TooWide));
        assert_eq!(check("0.0.0.0/0", true), Ok(()));
        assert_eq!(check("10.0.0.0/8", false), Ok(()));
    }

    #[test]
    fn prefixes_inside_and_around_unroutable_space_are_refused_and_their_neighbours_are_not() {
        let check = |text: &str, wide| check_prefix(text.parse().unwrap(), wide);
        let inside = [
            ("0.0.0.0/8", "127.1.2.3/32"),
            ("127.0.0.0/8", "127.0.0.1/32"),
            ("169.254.0.0/16", "169.254.1.0/24"),
            ("224.0.0.0/8", "239.255.255.255/32"),
            ("255.255.255.255/32", "::/128"),
            ("fe80::/64", "febf::/16"),
            ("ff02::1/128", "ffff::/16"),
            ("::1/128", "::ffff:10.0.0.0/104"),
        ];
        let around = [("169.0.0.0/8", "169.252.0.0/14"), ("255.0.0.0/8", "255.255.255.254/31"), ("::/16", "::/95")];
        for text in inside.into_iter().chain(around).flat_map(<[&str; 2]>::from) {
            assert_eq!(check(text, true), Err(PrefixRefusal::Unroutable), "{text}");
            assert_eq!(check(text, false), Err(PrefixRefusal::Unroutable), "{text}");
        }
        assert_eq!(check("224.0.0.0/4", true), Err(PrefixRefusal::Unroutable), "wide, and nothing but multicast");
        assert_eq!(check("224.0.0.0/4", false), Err(PrefixRefusal::TooWide));
        // Wide ones that are wanted hold more than that.
        for text in ["0.0.0.0/0", "::/0", "128.0.0.0/1", "fc00::/6"] {
            assert_eq!(check(text, true), Ok(()), "{text}");
        }
        let neighbours = ["1.0.0.0/8", "126.0.0.0/8", "128.0.0.0/8", "169.252.0.0/15", "169.255.0.0/16", "223.0.0.0/8"];
        let neighbours = neighbours.into_iter().chain(["240.0.0.0/8", "255.255.255.254/32", "fec0::/10", "::2/128"]);
        for text in neighbours {
            let expected = if text == "fec0::/10" { Err(PrefixRefusal::TooWide) } else { Ok(()) };
            assert_eq!(check(text, false), expected, "{text}");
        }
    }

    #[test]
    fn an_address_is_routable_outside_of_that_space_only() {
        let routable = |text: &str| is_routable(text.parse().unwrap());
        for text in ["1.1.1.1", "10.0.0.1", "169.255.0.1", "240.0.0.1", "2001:db8::1", "fd00::1", "fec0::1"] {
            assert!(routable(text), "{text}");
        }
        for text in ["0.1.2.3", "127.0.0.1", "169.254.169.254", "224.0.0.251", "255.255.255.255"] {
            assert!(!routable(text), "{text}");
            assert!(!routable(&format!("::ffff:{text}")), "{text} as IPv6");
        }
        for text in ["::", "::1", "::ffff:10.0.0.1", "fe80::1", "ff02::1"] {
            assert!(!routable(text), "{text}");
        }
    }

    #[test]
    fn addresses_behind_some_nat_are_not_public() {
        for text in ["1.1.1.1", "100.63.255.255", "100.128.0.0", "172.15.0.1", "192.0.2.1", "203.0.113.9"] {
            assert!(is_public_v4(text.parse().unwrap()), "{text}");
        }
        for text in
            ["10.1.2.3", "100.64.0.1", "100.127.255.255", "172.31.0.1", "192.0.0.2", "192.168.1.1", "198.19.0.1"]
        {
            assert!(!is_public_v4(text.parse().unwrap()), "{text}");
        }
        for text in ["0.0.0.0", "127.0.0.1", "169.254.3.4", "224.0.0.1", "250.1.1.1", "255.255.255.255"] {
            assert!(!is_public_v4(text.parse().unwrap()), "{text}");
        }
    }
}
