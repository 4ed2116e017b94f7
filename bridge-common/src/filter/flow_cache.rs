//! A per-CPU cache in front of the flow table: flows whose packets the CPU has lately allowed, so that it need not look
//! them up in a table whose lines are not in its own cache.
//!
//! An entry of the cache is a copy of a verdict. It is good for [`LIFETIME_TICKS`], in the policy in which it was made, and
//! as long as the flow is established in the flow table: code that removes it from there, or sees it begin to end,
//! increments its stamp afterwards ([`stamp_of`]), and an entry has the stamp that was read before the flow was looked
//! up. IPv4 alone.

use super::{address::Address, fast_path::ticks, flow::FlowKey};

/// How many stamps there are, 64-bit numbers: flows share them, and lose their entries when another one ends. A power of
/// two.
pub const STAMPS: u32 = 4096;

/// How long an entry is good for, in [`ticks`]: half a second.
pub const LIFETIME_TICKS: u32 = ticks(500_000_000);

/// Entries that one hash value leads to: those of one cache line.
pub const WAYS: usize = 2;

/// Maximum number of sets of [`WAYS`] entries for a CPU. A power of two, as is the number that the loader chooses.
pub const MAX_SETS: u32 = 1 << 15;

/// Maximum number of sets of all CPUs together, of 64 bytes each, unless each CPU already has no more than
/// [`MIN_SETS`].
pub const MAX_SETS_TOGETHER: u32 = 1 << 18;

/// Least sets of a CPU.
pub const MIN_SETS: u32 = 1 << 10;

/// Addresses of which a CPU remembers the properties, a power of two.
pub const ADDRESSES: u32 = 1024;

/// How many sets each of `cpus` CPUs has.
#[must_use]
pub const fn sets(cpus: u32) -> u32 {
    let mut sets = MAX_SETS;
    while sets > MIN_SETS && sets.saturating_mul(cpus) > MAX_SETS_TOGETHER {
        sets /= 2;
    }
    sets
}

/// Index of the stamp of the flows between these ends, whichever of them is the source: words and ports as they lie in the
/// headers.
#[must_use]
#[inline(always)]
pub const fn stamp_index(source: u32, destination: u32, ports: [u16; 2]) -> u32 {
    let ports = ports[0] as u32 + ports[1] as u32;
    let mixed = source.wrapping_add(destination).wrapping_mul(0x9e37_79b1) ^ ports.wrapping_mul(0x85eb_ca6b);
    mixed >> (u32::BITS - STAMPS.trailing_zeros())
}

/// As [`stamp_index`], of the flow with this key. `None`: flows of IPv6 have no stamp.
#[must_use]
#[inline(always)]
pub const fn stamp_of(key: &FlowKey) -> Option<u32> {
    const fn word(address: &Address) -> u32 {
        u32::from_ne_bytes(address.v4())
    }
    if !key.low.is_v4() {
        return None;
    }
    let ports = [u16::from_ne_bytes(key.low_port), u16::from_ne_bytes(key.high_port)];
    Some(stamp_index(word(&key.low), word(&key.high), ports))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_have_one_stamp() {
        let (source, destination) = ([10, 200, 1, 91], [192, 168, 31, 67]);
        let (source_port, destination_port) = (61001u16.to_be_bytes(), 8443u16.to_be_bytes());
        let word = u32::from_ne_bytes;
        let ports = [u16::from_ne_bytes(source_port), u16::from_ne_bytes(destination_port)];
        let index = stamp_index(word(source), word(destination), ports);
        assert_eq!(index, stamp_index(word(destination), word(source), [ports[1], ports[0]]));
        let of = |source, source_port, destination, destination_port| {
            let (from, to) = (Address::from_v4(source), Address::from_v4(destination));
            stamp_of(&FlowKey::new(&from, source_port, &to, destination_port, 6).0)
        };
        assert_eq!(of(source, source_port, destination, destination_port), Some(index));
        assert_eq!(of(destination, destination_port, source, source_port), Some(index));
        assert!(index < STAMPS);
    }

    #[test]
    fn sets_are_bounded_together() {
        assert_eq!(sets(1), MAX_SETS);
        assert_eq!(sets(8), MAX_SETS);
        assert_eq!(sets(9), MAX_SETS / 2);
        assert_eq!(sets(256), MIN_SETS);
        assert_eq!(sets(u32::MAX), MIN_SETS);
    }
}
