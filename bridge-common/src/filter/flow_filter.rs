//! A Bloom filter with one hash in front of the flow tables: the pairs of addresses that may have flows. A flood of packets that
//! belong to no flow, as most denied floods, is kept from searches in tables of many megabytes.
//!
//! An element of the map `flow_filter` has [`HALVES`] words of the same bits; the tables may have an entry if one of them has its
//! bit. The bit of a flow is set in each half before the flow is entered. The agent clears one half, sets the bits of all
//! entries of the tables in it, and then does so with the other: at any time one half has the bits of all entries.

use super::address::Address;

/// Number of halves.
pub const HALVES: usize = 2;

/// Bits of a half, a power of two.
pub const BITS: u32 = 1 << 20;

/// Number of elements.
pub const LENGTH: u32 = BITS / u64::BITS;

/// Bit of the flows of a protocol between two addresses, whichever of them is the source. Less than [`BITS`].
#[must_use]
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "less than BITS")]
pub const fn bit(source: &Address, destination: &Address, protocol: u8) -> u32 {
    let sum = mix(source.words()).wrapping_add(mix(destination.words()));
    ((sum ^ protocol as u64).wrapping_mul(0x94d0_49bb_1331_11eb) >> (u64::BITS - BITS.trailing_zeros()))
        as u32
}

/// So that the sums of neighbours differ: the last bytes of addresses are the highest of their words.
const fn mix([first, second]: [u64; 2]) -> u64 {
    let mixed = first.wrapping_mul(0xff51_afd7_ed55_8ccd) ^ second;
    let mixed = (mixed ^ mixed >> 32).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ mixed >> 29
}

/// Index of the element with a bit.
#[must_use]
#[inline(always)]
pub const fn element(bit: u32) -> u32 {
    bit / u64::BITS
}

/// The bit in its words.
#[must_use]
#[inline(always)]
pub const fn mask(bit: u32) -> u64 {
    1 << (bit % u64::BITS)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn both_directions_have_one_bit() {
        let ends = [
            (Address::from_v4([10, 200, 1, 91]), Address::from_v4([192, 168, 31, 67])),
            (Address::from_v6([0xfd; 16]), Address::from_v6([0x20; 16])),
        ];
        for (a, b) in ends {
            assert_eq!(bit(&a, &b, 6), bit(&b, &a, 6));
            assert_ne!(bit(&a, &b, 6), bit(&b, &a, 17));
        }
    }

    #[test]
    fn neighbours_have_bits_of_their_own() {
        let v6 = |first: u8, number: u8, at: usize| {
            let mut octets = [0; 16];
            (octets[0], octets[at]) = (first, number);
            Address::from_v6(octets)
        };
        let ends: [&dyn Fn(u8, u8) -> [Address; 2]; 4] = [
            &|a, b| [[192, 168, 31, a], [10, 200, 1, b]].map(Address::from_v4),
            &|a, b| [[10, 200, a, 5], [10, 201, b, 9]].map(Address::from_v4),
            &|a, b| [v6(0x20, a, 15), v6(0xfd, b, 15)],
            &|a, b| [v6(0x20, a, 3), v6(0xfd, b, 3)],
        ];
        for ends in ends {
            let mut bits = std::collections::BTreeSet::new();
            for (a, b) in (0..=255).flat_map(|a| (0..=255).map(move |b| (a, b))) {
                let [a, b] = ends(a, b);
                bits.insert(bit(&a, &b, 17));
            }
            // By chance, 65,536 of 1,048,576 leave 63,550 different ones.
            assert!(bits.len() > 63_000, "{}", bits.len());
            assert!(bits.last() < Some(&BITS));
        }
        assert_eq!(element(BITS - 1), LENGTH - 1);
    }
}
