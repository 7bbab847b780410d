//! The Internet checksum (RFC 1071), fast.
//!
//! Sums are of native words: the one's complement sum does not care for byte order as long as it is written back as it was
//! read. They are made with the widest vectors of the processor they run on.

use pulp::{Arch, Simd, WithSimd};

/// An unfinished sum of 16-bit words. All parts but the last must have an even length.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum(u64);

const LANES: usize = 8;
/// Headers: not worth the look at what the processor has.
const SHORT: usize = 64;

impl Sum {
    #[inline]
    #[must_use]
    pub fn plus(self, bytes: &[u8]) -> Self {
        let sum = if bytes.len() < SHORT { Words(bytes).sum() } else { Arch::new().dispatch(Words(bytes)) };
        Self(self.0 + (sum >> 32) + (sum & 0xffff_ffff))
    }

    /// Adds a number as the two bytes it has on the wire.
    #[inline]
    #[must_use]
    pub fn plus_u16(self, value: u16) -> Self {
        Self(self.0 + u64::from(u16::from_ne_bytes(value.to_be_bytes())))
    }

    /// The sum as it stands in a field whose checksum is still to be completed.
    #[inline]
    pub fn partial(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum: the complement.
    #[inline]
    pub fn finish(self) -> [u8; 2] {
        self.partial().map(|byte| !byte)
    }
}

/// Bytes whose words are to be added.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    // Part of each caller, since it is their vectors that count.
    #[inline(always)]
    fn sum(&self) -> u64 {
        // 32-bit words into 64-bit lanes: 2^32 words fit before a lane overflows, and a compiler makes vectors of them.
        let mut lanes = [0u64; LANES];
        let mut blocks = self.0.chunks_exact(4 * LANES);
        for block in &mut blocks {
            for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
                *lane += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
            }
        }
        let mut sum = lanes.iter().sum::<u64>();
        let mut words = blocks.remainder().chunks_exact(4);
        for word in &mut words {
            sum += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        }
        let mut last = [0; 4];
        last[..words.remainder().len()].copy_from_slice(words.remainder());
        sum + u64::from(u32::from_ne_bytes(last))
    }
}

impl WithSimd for Words<'_> {
    type Output = u64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _vectors: S) -> u64 {
        self.sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071, word by word.
    fn naive(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for word in bytes.chunks(2) {
            sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be_bytes()
    }

    proptest! {
        #[test]
        fn equals_the_definition_however_it_is_split(
            bytes in proptest::collection::vec(any::<u8>(), 0..2000),
            at in 0usize..1000,
            number: u16,
        ) {
            prop_assert_eq!(Sum::default().plus(&bytes).finish(), naive(&bytes));
            let (one, other) = bytes.split_at((at * 2).min(bytes.len() & !1));
            prop_assert_eq!(Sum::default().plus(one).plus(other).finish(), naive(&bytes));
            let with_number = [&number.to_be_bytes()[..], &bytes].concat();
            prop_assert_eq!(Sum::default().plus(&bytes).plus_u16(number).finish(), naive(&with_number));
        }
    }

    #[test]
    fn the_largest_packet_of_the_largest_bytes_does_not_overflow() {
        let bytes = vec![0xff; 65_535];
        assert_eq!(Sum::default().plus(&bytes).finish(), naive(&bytes));
    }
}
