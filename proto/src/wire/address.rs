//! Socket addresses and prefixes inside messages: family u8 (4 or 6), address, then port u16 or length u8.
//!
//! One address has one form: IPv4 written as IPv6 is turned into IPv4 when it is written and refused when it is read, and so
//! are host bits of a prefix. Flow labels and scopes are of one host only and do not travel.

use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::de::{DeserializeOwned, Error as _, SeqAccess, Visitor};
use serde::ser::SerializeTuple;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A socket address as it travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WireAddr(pub(crate) SocketAddr);

/// A prefix as it travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WirePrefix(pub(crate) IpNet);

/// The one form of an address: IPv4 where it is IPv4, no flow label, no scope.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

impl Serialize for WireAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let addr = canonical(self.0);
        write(addr.ip(), addr.port(), serializer)
    }
}

impl<'de> Deserialize<'de> for WireAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (ip, port) = read(deserializer)?;
        let addr = SocketAddr::new(ip, port);
        if canonical(addr) != addr {
            return Err(D::Error::custom("IPv4 written as IPv6"));
        }
        Ok(Self(addr))
    }
}

impl Serialize for WirePrefix {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        write(self.0.network(), self.0.prefix_len(), serializer)
    }
}

impl<'de> Deserialize<'de> for WirePrefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (ip, len) = read(deserializer)?;
        let prefix = IpNet::new(ip, len).map_err(D::Error::custom)?;
        if prefix.trunc() != prefix {
            return Err(D::Error::custom("host bits in a prefix"));
        }
        Ok(Self(prefix))
    }
}

fn write<S: Serializer>(ip: IpAddr, suffix: impl Serialize, serializer: S) -> Result<S::Ok, S::Error> {
    let mut tuple = serializer.serialize_tuple(3)?;
    match ip {
        IpAddr::V4(v4) => {
            tuple.serialize_element(&4u8)?;
            tuple.serialize_element(&v4.octets())?;
        }
        IpAddr::V6(v6) => {
            tuple.serialize_element(&6u8)?;
            tuple.serialize_element(&v6.octets())?;
        }
    }
    tuple.serialize_element(&suffix)?;
    tuple.end()
}

fn read<'de, D: Deserializer<'de>, T: DeserializeOwned>(deserializer: D) -> Result<(IpAddr, T), D::Error> {
    struct Parts<T>(PhantomData<T>);

    impl<'de, T: DeserializeOwned> Visitor<'de> for Parts<T> {
        type Value = (IpAddr, T);

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("family, address, port or length")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let ip = match element::<u8, A>(&mut seq)? {
                4 => IpAddr::from(element::<[u8; 4], A>(&mut seq)?),
                6 => IpAddr::from(element::<[u8; 16], A>(&mut seq)?),
                _ => return Err(A::Error::custom("unknown address family")),
            };
            Ok((ip, element(&mut seq)?))
        }
    }

    deserializer.deserialize_tuple(3, Parts(PhantomData))
}

fn element<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(seq: &mut A) -> Result<T, A::Error> {
    seq.next_element()?.ok_or_else(|| A::Error::custom("cut short"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::wire::codec::{deserialize, serialize};

    #[test]
    fn ipv4_has_one_form() {
        let mapped: SocketAddr = "[::ffff:192.0.2.1]:7".parse().unwrap();
        let bytes = serialize(&WireAddr(mapped), 32).unwrap();
        assert_eq!(bytes, [4, 192, 0, 2, 1, 7, 0]);
        assert_eq!(deserialize::<WireAddr>(&bytes, 32).unwrap().0, "192.0.2.1:7".parse().unwrap());

        let mut smuggled = vec![6];
        smuggled.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 0, 2, 1, 7, 0]);
        assert!(deserialize::<WireAddr>(&smuggled, 32).is_err());
    }

    #[test]
    fn host_bits_long_lengths_and_unknown_families_are_refused() {
        assert_eq!(deserialize::<WirePrefix>(&[4, 10, 1, 0, 0, 16], 32).unwrap().0, "10.1.0.0/16".parse().unwrap());
        for bad in [[4, 10, 1, 0, 1, 16], [4, 10, 1, 0, 0, 33], [5, 10, 1, 0, 0, 16], [0, 10, 1, 0, 0, 16]] {
            assert!(deserialize::<WirePrefix>(&bad, 32).is_err(), "{bad:?}");
        }
        let sloppy = WirePrefix("10.1.2.3/16".parse().unwrap());
        assert_eq!(serialize(&sloppy, 32).unwrap(), [4, 10, 1, 0, 0, 16]);
    }
}
