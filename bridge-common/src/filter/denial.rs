//! Connections that rules denied, or would have denied, by class: counted in the kernel, read for suggestions.
//!
//! Each CPU has a table of its own: sets of a few classes. A class that finds its set full takes the place of the one that was
//! not seen for the longest time.
//!
//! The table is a cache of verdicts as well: see [`Denial::settled`].

use core::mem::transmute;

use crate::filter::address::Address;

/// Number of sets; a power of two.
pub const SETS: u32 = 512;
/// Classes of a set.
pub const WAYS: usize = 4;

/// The bytes of a key's last word that are in the packet: all but the reason.
const KIND: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);

/// Connections that a rule distinguishes by their source port alone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct DenialKey {
    /// The LAN host.
    pub external: Address,
    /// The pod; of a NodePort, the node.
    pub pod: Address,
    /// Destination port, network byte order; 0 where there is none.
    pub port: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    /// One of [`crate::filter::policy::direction`].
    pub direction: u8,
    /// Number of a [`crate::filter::counters::Reason`].
    pub reason: u8,
    /// Zero.
    pub padding: [u8; 3],
}

impl DenialKey {
    /// Returns the key as it lies in memory.
    #[inline(always)]
    const fn words(&self) -> &[u64; 5] {
        // SAFETY: of the same size and alignment, without padding, and any bits are words.
        unsafe { transmute::<&Self, &[u64; 5]>(self) }
    }

    /// Returns the number of its set. It does not depend on the reason.
    #[must_use]
    #[inline(always)]
    pub const fn set(&self) -> u32 {
        Class(*self.words()).set()
    }
}

/// A key but for its reason, in registers.
#[derive(Clone, Copy, Debug)]
pub struct Class([u64; 5]);

impl Class {
    /// From the fields of [`DenialKey`].
    #[must_use]
    #[inline(always)]
    pub const fn new(external: &Address, pod: &Address, port: [u8; 2], protocol: u8, direction: u8) -> Self {
        let ([a, b], [c, d]) = (external.words(), pod.words());
        let kind = [port[0], port[1], protocol, direction, 0, 0, 0, 0];
        Self([a, b, c, d, u64::from_ne_bytes(kind)])
    }

    /// Returns the key of the class with the number of a reason.
    #[must_use]
    #[inline(always)]
    pub const fn because(self, reason: u8) -> DenialKey {
        let Self([a, b, c, d, kind]) = self;
        let kind = kind & KIND | u64::from_ne_bytes([0, 0, 0, 0, reason, 0, 0, 0]);
        // SAFETY: of the same size, without padding, and any bits are a key.
        unsafe { transmute::<[u64; 5], DenialKey>([a, b, c, d, kind]) }
    }

    /// As [`DenialKey::set`].
    #[must_use]
    #[inline(always)]
    pub const fn set(&self) -> u32 {
        // Odd constants with about as many ones as zeros.
        const A: u64 = 0x9e37_79b9_7f4a_7c15;
        const B: u64 = 0xc2b2_ae3d_27d4_eb4f;
        let [a, b, c, d, kind] = self.0;
        let kind = kind & KIND;
        // Addresses differ in their last octets, the highest bits of b and d: these come down before they are multiplied.
        let external = fold(b ^ c.rotate_left(17) ^ kind.rotate_left(31)).wrapping_mul(A);
        let both = (external ^ external >> 29).wrapping_add(d) ^ a.rotate_left(29) ^ kind;
        (fold(both).wrapping_mul(B) >> 50) as u32 & (SETS - 1)
    }
}

/// Mixes the upper half of a word into the lower one.
#[inline(always)]
const fn fold(word: u64) -> u64 {
    word ^ word >> 32
}

/// A class of connections.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Denial {
    /// The class.
    pub key: DenialKey,
    /// Packets that asked for a connection; 0: the place is free.
    pub count: u64,
    /// Time of the first, in nanoseconds of `CLOCK_MONOTONIC`.
    pub first: u64,
    /// Time of the latest.
    pub last: u64,
    /// Index of the rule that denied the latest, plus one; 0: no rule did.
    pub rule: u32,
    /// Number of the policy that judged the latest.
    pub generation: u32,
    /// Lowest source port, host byte order.
    pub lowest: u16,
    /// Highest source port, host byte order.
    pub highest: u16,
    /// Verdict on the latest: one of [`crate::filter::event::verdict`].
    pub verdict: u8,
    /// 1: in the policy of [`Denial::generation`], every packet from the LAN that asks for a connection of this class is
    /// denied by [`Denial::rule`], whatever its source port, as long as the pod is one of this node. 0: unknown.
    pub settled: u8,
    /// Zero.
    pub padding: [u8; 2],
}

impl Denial {
    /// Includes a source port, in host byte order.
    #[inline(always)]
    pub const fn widen(&mut self, port: u16) {
        if port < self.lowest {
            self.lowest = port;
        }
        if port > self.highest {
            self.highest = port;
        }
    }
}

/// Classes of one set.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct DenialSet {
    /// In no order.
    pub ways: [Denial; WAYS],
    /// Classes that made room for others.
    pub evicted: u64,
}

impl DenialSet {
    /// Returns the entry of a class, whatever the reason, if it is settled in the policy with this number.
    #[inline(always)]
    pub fn settled(&mut self, class: &Class, generation: u32) -> Option<&mut Denial> {
        let words = class.0;
        self.ways.iter_mut().find(|way| {
            let known = way.key.words();
            known[1] == words[1]
                && known[3] == words[3]
                && known[4] & KIND == words[4] & KIND
                && known[0] == words[0]
                && known[2] == words[2]
                && way.settled == 1
                && way.generation == generation
        })
    }

    /// Counts a connection; `seen` has a count of 1, and one time and one port.
    #[inline(always)]
    pub fn note(&mut self, seen: &Denial) {
        let words = seen.key.words();
        let (mut oldest, mut age) = (0, u64::MAX);
        for (index, way) in self.ways.iter_mut().enumerate() {
            let known = way.key.words();
            // A free place has the time 0.
            if way.last < age {
                (oldest, age) = (index, way.last);
            }
            if known[0] == words[0]
                && known[1] == words[1]
                && known[2] == words[2]
                && known[3] == words[3]
                && known[4] == words[4]
                && way.count != 0
            {
                way.count += 1;
                way.last = seen.last;
                (way.rule, way.generation, way.verdict) = (seen.rule, seen.generation, seen.verdict);
                way.settled = seen.settled;
                way.widen(seen.lowest);
                return;
            }
        }
        if let Some(way) = self.ways.get_mut(oldest) {
            if way.count != 0 {
                self.evicted += 1;
            }
            *way = *seen;
        }
    }
}

crate::plain_old_data!(DenialKey: 40, Denial: 80, DenialSet: 328);

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{collections::BTreeMap, vec::Vec};

    use super::*;

    fn seen(host: u8, port: u16, source_port: u16, time: u64) -> Denial {
        Denial {
            key: DenialKey {
                external: Address::from_v4([192, 168, 31, host]),
                pod: Address::from_v4([10, 200, 1, 91]),
                port: port.to_be_bytes(),
                protocol: 6,
                ..DenialKey::default()
            },
            count: 1,
            first: time,
            last: time,
            lowest: source_port,
            highest: source_port,
            ..Denial::default()
        }
    }

    #[test]
    fn connections_of_a_class_are_one_entry() {
        let mut set = DenialSet::default();
        for (time, source_port) in [(5, 70), (6, 60), (7, 80)] {
            set.note(&seen(1, 502, source_port, time));
        }
        set.note(&seen(1, 503, 70, 8));
        let found: Vec<_> = set.ways.iter().filter(|way| way.count > 0).copied().collect();
        assert_eq!(found.len(), 2);
        let Denial { count, first, last, lowest, highest, .. } = found[0];
        assert_eq!((count, first, last, lowest, highest), (3, 5, 7, 60, 80));
        assert_eq!(set.evicted, 0);
    }

    #[test]
    fn the_class_that_was_not_seen_for_the_longest_time_makes_room() {
        let mut set = DenialSet::default();
        for port in 1..=4 {
            set.note(&seen(1, port, 1, u64::from(port)));
        }
        set.note(&seen(1, 1, 1, 9));
        set.note(&seen(1, 5, 1, 10));
        let mut ports: Vec<u16> = set.ways.iter().map(|way| u16::from_be_bytes(way.key.port)).collect();
        ports.sort_unstable();
        assert_eq!((ports.as_slice(), set.evicted), (&[1, 3, 4, 5][..], 1));
    }

    /// A plant has some hundred classes: nearly all of them find room.
    #[test]
    fn classes_spread_over_the_sets() {
        let mut sets: BTreeMap<u32, usize> = BTreeMap::new();
        for host in 1..=50 {
            for port in [22, 80, 443, 502, 4840, 8080, 9100, 44818, 102, 1883] {
                *sets.entry(seen(host, port, 1, 1).key.set()).or_default() += 1;
            }
        }
        let beyond = |sets: &BTreeMap<u32, usize>| -> usize {
            sets.values().map(|count| count.saturating_sub(WAYS)).sum()
        };
        assert!(beyond(&sets) <= 5, "{} of 500 classes find no room", beyond(&sets));

        sets.clear();
        for (host, pod) in (1..=10).flat_map(|host| (1..=50).map(move |pod| (host, pod))) {
            let key = DenialKey { pod: Address::from_v4([10, 200, 1, pod]), ..seen(host, 8080, 1, 1).key };
            *sets.entry(key.set()).or_default() += 1;
        }
        assert!(beyond(&sets) <= 5, "{} of 500 pods and hosts find no room", beyond(&sets));
    }
}
