//! Shares of the tables of established flows: how many entries the flows of each initiator have in them.
//!
//! Elements of the map `shares` are 64-bit numbers: the words below, then a counter for each hash of an initiator's address and
//! each table. A flow beyond its initiator's share is entered in the table `overflow` instead, where it can evict flows of its
//! kind alone. The kernel side increments; the agent corrects the counters whenever it has looked through the tables.

use super::address::Address;

/// `CLOCK_MONOTONIC` of the last entry in `overflow`, in nanoseconds; 0: the table is empty, and is not looked into.
///
/// Written before the entry.
pub const STAMP: u32 = 0;

/// Of the hash: random, so that no host chooses whose share it uses up.
pub const SEED: u32 = 1;

/// The most entries that an initiator has in the table of TCP connections; the next element is that of other flows.
pub const LIMITS: u32 = 2;

/// The first counter.
pub const COUNTERS: u32 = 4;

/// Counters of one table, a power of two.
pub const BUCKETS: u32 = 4096;

/// Number of elements.
pub const LENGTH: u32 = COUNTERS + 2 * BUCKETS;

/// A share is the capacity of a table divided by this.
pub const DIVISOR: u32 = 4;

/// Index of the counter of an initiator's flows.
#[must_use]
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "less than BUCKETS")]
pub const fn counter(initiator: &Address, is_tcp: bool, seed: u64) -> u32 {
    let [high, low] = initiator.words();
    // The finalizer of SplitMix64 over each half; the upper bits are the best mixed.
    let mixed = (high ^ seed).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ low;
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    let mixed = mixed ^ mixed >> 31;
    let mixed = (mixed ^ seed.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bucket = (mixed >> (u64::BITS - BUCKETS.trailing_zeros())) as u32;
    COUNTERS + if is_tcp { 0 } else { BUCKETS } + bucket
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn neighbours_have_counters_of_their_own() {
        let counters = |seed, is_tcp| -> std::collections::BTreeSet<u32> {
            (0..=255).map(|last| counter(&Address::from_v4([192, 168, 31, last]), is_tcp, seed)).collect()
        };
        for seed in [0, 1, 0x0123_4567_89ab_cdef] {
            let (tcp, other) = (counters(seed, true), counters(seed, false));
            // By chance, 256 of 4096 leave 248 different ones.
            assert!(tcp.len() > 235 && other.len() > 235, "{} {}", tcp.len(), other.len());
            assert!(tcp.is_disjoint(&other));
            assert!(tcp.first() >= Some(&COUNTERS) && other.last() < Some(&LENGTH));
        }
        assert_ne!(counters(1, true), counters(2, true));
    }
}
