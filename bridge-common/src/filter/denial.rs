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

    /// Returns the number of its set.
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
    /// Counts a connection from a source port, in host byte order.
    #[inline(always)]
    pub const fn see(&mut self, now: u64, port: u16) {
        if self.count == 0 {
            self.first = now;
            (self.lowest, self.highest) = (port, port);
        }
        self.count += 1;
        self.last = now;
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
            known[4] & KIND == words[4] & KIND
                && known[1] == words[1]
                && known[3] == words[3]
                && known[0] == words[0]
                && known[2] == words[2]
                && way.settled == 1
                && way.generation == generation
        })
    }

    /// Returns the entry of a class denied for one reason. One with a count of 0 is new: it is free, or the class that was not
    /// seen for the longest time made room.
    #[inline(always)]
    pub fn entry(&mut self, class: Class, reason: u8) -> &mut Denial {
        let key = class.because(reason);
        let words = key.words();
        let is = |way: &Denial| {
            let known = way.key.words();
            // First the words that differ most: ports, host, pod.
            known[4] == words[4]
                && known[1] == words[1]
                && known[3] == words[3]
                && known[0] == words[0]
                && known[2] == words[2]
                && way.count != 0
        };
        let [a, b, c, d] = &mut self.ways;
        if is(a) {
            return a;
        }
        if is(b) {
            return b;
        }
        if is(c) {
            return c;
        }
        if is(d) {
            return d;
        }
        // A free place has the time 0.
        let first = if b.last < a.last { b } else { a };
        let second = if d.last < c.last { d } else { c };
        let oldest = if second.last < first.last { second } else { first };
        self.evicted += u64::from(oldest.count != 0);
        (oldest.key, oldest.count) = (key, 0);
        oldest
    }
}

crate::plain_old_data!(DenialKey: 40, Denial: 80, DenialSet: 328);

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{collections::BTreeMap, vec::Vec};

    use super::*;

    fn class(host: u8, pod: u8, port: u16) -> Class {
        let (external, pod) = (Address::from_v4([192, 168, 31, host]), Address::from_v4([10, 200, 1, pod]));
        Class::new(&external, &pod, port.to_be_bytes(), 6, 0)
    }

    #[test]
    fn connections_of_a_class_are_one_entry() {
        let mut set = DenialSet::default();
        for (time, source_port) in [(5, 70), (6, 60), (7, 80)] {
            set.entry(class(1, 91, 502), 1).see(time, source_port);
        }
        set.entry(class(1, 91, 503), 1).see(8, 70);
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
            set.entry(class(1, 91, port), 1).see(u64::from(port), 1);
        }
        set.entry(class(1, 91, 1), 1).see(9, 1);
        let Denial { key, count, first, lowest, .. } = *set.entry(class(1, 91, 5), 1);
        assert_eq!((key, count, first, lowest), (class(1, 91, 5).because(1), 0, 2, 1));
        set.entry(class(1, 91, 5), 1).see(10, 7);
        // The same class for another reason is another entry.
        assert_eq!(set.entry(class(1, 91, 5), 1).count, 1);
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
                *sets.entry(class(host, 91, port).set()).or_default() += 1;
            }
        }
        let beyond = |sets: &BTreeMap<u32, usize>| -> usize {
            sets.values().map(|count| count.saturating_sub(WAYS)).sum()
        };
        assert!(beyond(&sets) <= 5, "{} of 500 classes find no room", beyond(&sets));

        sets.clear();
        for (host, pod) in (1..=10).flat_map(|host| (1..=50).map(move |pod| (host, pod))) {
            *sets.entry(class(host, pod, 8080).set()).or_default() += 1;
        }
        assert!(beyond(&sets) <= 5, "{} of 500 pods and hosts find no room", beyond(&sets));
    }
}
