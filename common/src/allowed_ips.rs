//! Which peer an inner address belongs to: longest prefix match over both families.
//!
//! Owns no policy: who may announce what is decided before a prefix gets here.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

/// Maps prefixes to values; a lookup gives the value of the longest prefix that holds the address.
#[derive(Debug, Clone)]
pub struct AllowedIps<T> {
    v4: PrefixMap<Ipv4Net, T>,
    v6: PrefixMap<Ipv6Net, T>,
}

impl<T> Default for AllowedIps<T> {
    fn default() -> Self {
        Self { v4: PrefixMap::new(), v6: PrefixMap::new() }
    }
}

impl<T> AllowedIps<T> {
    /// Sets the value of a prefix (host bits are ignored); returns the one it replaces.
    pub fn insert(&mut self, prefix: IpNet, value: T) -> Option<T> {
        match prefix.trunc() {
            IpNet::V4(prefix) => self.v4.insert(prefix, value),
            IpNet::V6(prefix) => self.v6.insert(prefix, value),
        }
    }

    pub fn lookup(&self, addr: IpAddr) -> Option<&T> {
        match addr {
            IpAddr::V4(addr) => self.v4.get_lpm(&Ipv4Net::from(addr)).map(|(_, value)| value),
            IpAddr::V6(addr) => self.v6.get_lpm(&Ipv6Net::from(addr)).map(|(_, value)| value),
        }
    }
}

impl<T> FromIterator<(IpNet, T)> for AllowedIps<T> {
    fn from_iter<I: IntoIterator<Item = (IpNet, T)>>(entries: I) -> Self {
        let mut table = Self::default();
        for (prefix, value) in entries {
            table.insert(prefix, value);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    fn naive(entries: &BTreeMap<IpNet, u8>, addr: IpAddr) -> Option<u8> {
        let holding = entries.iter().filter(|(prefix, _)| prefix.contains(&addr));
        holding.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, value)| *value)
    }

    /// Few bits vary, so that prefixes nest and collide often.
    fn addr() -> impl Strategy<Value = IpAddr> {
        (any::<bool>(), 0u32..64, any::<bool>()).prop_map(|(v4, low, high)| {
            if v4 {
                IpAddr::V4(Ipv4Addr::from(u32::from(high) << 31 | low))
            } else {
                IpAddr::V6(Ipv6Addr::from(u128::from(high) << 127 | u128::from(low)))
            }
        })
    }

    fn prefix() -> impl Strategy<Value = IpNet> {
        (addr(), 0u8..=128)
            .prop_map(|(addr, len)| IpNet::new(addr, if addr.is_ipv4() { len % 33 } else { len }).unwrap().trunc())
    }

    proptest! {
        #[test]
        fn lookup_equals_a_naive_search(
            entries in proptest::collection::btree_map(prefix(), any::<u8>(), 0..40),
            probes in proptest::collection::vec(addr(), 20),
        ) {
            let table: AllowedIps<u8> = entries.clone().into_iter().collect();
            for addr in probes {
                prop_assert_eq!(table.lookup(addr).copied(), naive(&entries, addr), "{}", addr);
            }
        }
    }
}
