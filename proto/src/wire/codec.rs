//! The only user of bincode, and the shapes that its messages are built from.
//!
//! Fixed-width little-endian integers, a limit on every call, trailing bytes refused. Lengths of strings and lists are u64.
//! A list refuses a count over its limit before it allocates anything. The encoding is canonical: bytes that decode
//! encode to the same bytes again.

use std::fmt;
use std::marker::PhantomData;

use bincode::{DefaultOptions, Options};
use serde::de::{DeserializeOwned, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The value does not fit its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value needs more than {0} bytes")]
pub struct TooLarge(pub usize);

/// The bytes are no value of this type, or more than it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the bytes are malformed")]
pub struct Malformed;

/// Encodes a value of at most `limit` bytes.
pub fn serialize<T: Serialize>(value: &T, limit: usize) -> Result<Vec<u8>, TooLarge> {
    options(limit).serialize(value).map_err(|_| TooLarge(limit))
}

/// Decodes exactly these bytes, at most `limit` of them.
pub fn deserialize<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, Malformed> {
    if bytes.len() > limit {
        return Err(Malformed);
    }
    options(limit).deserialize(bytes).map_err(|_| Malformed)
}

fn options(limit: usize) -> impl Options {
    DefaultOptions::new().with_fixint_encoding().with_limit(limit as u64).reject_trailing_bytes()
}

/// A list of at most `MAX` items: u64 count, then the items.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct List<T, const MAX: usize>(pub(crate) Vec<T>);

impl<T: Serialize, const MAX: usize> Serialize for List<T, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(&self.0)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items<T, const MAX: usize>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Items<T, MAX> {
            type Value = List<T, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} items")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
                let count =
                    seq.size_hint().filter(|count| *count <= MAX).ok_or_else(|| A::Error::custom("too many"))?;
                let mut items = Vec::with_capacity(count);
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(List(items))
            }
        }

        deserializer.deserialize_seq(Items(PhantomData))
    }
}

/// 64 bytes, no length: serde knows arrays up to 32 only.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Bytes64([[u8; 32]; 2]);

impl From<[u8; 64]> for Bytes64 {
    fn from(bytes: [u8; 64]) -> Self {
        let (low, high) = bytes.split_at(32);
        let half = |half: &[u8]| half.try_into().expect("64 bytes split into halves of 32");
        Self([half(low), half(high)])
    }
}

impl From<Bytes64> for [u8; 64] {
    fn from(Bytes64(halves): Bytes64) -> Self {
        halves.concat().try_into().expect("two halves of 32 make 64 bytes")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_list_over_its_limit_is_refused_by_its_count_alone() {
        let four = serialize(&List::<u16, 4>(vec![1, 2, 3, 4]), 100).unwrap();
        assert_eq!(four.len(), 8 + 8);
        assert_eq!(deserialize::<List<u16, 4>>(&four, 100), Ok(List(vec![1, 2, 3, 4])));
        assert_eq!(deserialize::<List<u16, 3>>(&four, 100), Err(Malformed));
        assert_eq!(deserialize::<List<u16, 4>>(&u64::MAX.to_le_bytes(), 100), Err(Malformed));
    }

    #[test]
    fn limits_hold_both_ways_and_trailing_bytes_are_refused() {
        assert_eq!(serialize(&[0u8; 9], 8), Err(TooLarge(8)));
        assert_eq!(deserialize::<[u8; 9]>(&[0; 9], 8), Err(Malformed));
        assert_eq!(deserialize::<[u8; 7]>(&[0; 8], 8), Err(Malformed));
        assert_eq!(deserialize::<[u8; 8]>(&[0; 8], 8), Ok([0; 8]));
    }
}
