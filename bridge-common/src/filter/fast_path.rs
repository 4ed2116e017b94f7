//! The fast path: established flows that go from interface to interface past the network stack.
//!
//! The network stack decides routing, so paths are learned by observing it: from packets that have taken the normal
//! path, where they leave: the interface, the Ethernet header, and that the routing table agrees. The result is a
//! [`Path`], which all flows that take it share; a flow has a [`Lease`] of it, which holds for [`LEASE_TICKS`], and
//! only until the next change that the agent sees ([`Control::epoch`]). When it has expired, packets take the normal
//! path again, and the path is learned again: so conntrack, the neighbour table and every filter beside bridge see
//! every flow at least that often, and can stop it.

use super::counters::Counter;
use crate::protocol;

/// Whether flows may take the fast path; kept by the agent, in a map that it shares with the kernel side.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Control {
    /// The deadline of the fast path, in nanoseconds of `CLOCK_MONOTONIC`; 0: disabled. The agent extends it as long as
    /// it watches the inputs of the fast path.
    pub until: u64,
    /// Grows by one with each change of an input of the fast path: the policy, routes, neighbours, interfaces; never 0.
    pub epoch: u32,
    /// Bits of [`protocols`].
    pub protocols: u32,
}

impl Control {
    /// Whether flows of this IP protocol may.
    #[must_use]
    #[inline(always)]
    pub const fn allows(&self, protocol: u8) -> bool {
        let allowed = match protocol {
            protocol::TCP => protocols::TCP,
            protocol::UDP => protocols::UDP,
            _ => 0,
        };
        self.protocols & allowed != 0
    }
}

/// Bits of [`Control::protocols`].
pub mod protocols {
    /// TCP flows may.
    pub const TCP: u32 = 1;
    /// UDP flows may.
    pub const UDP: u32 = 2;
}

/// A way from interface to interface. Flows that take the same share it: an element of an array of [`PATHS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Path {
    /// The epoch in which it was learnt; 0: none yet; [`WRITING`]: just now.
    pub epoch: u32,
    /// Until when flows may hold it, in [`ticks`]: then another may have its place.
    pub expires: u32,
    /// Index of the interface that packets come in by.
    pub input: u32,
    /// Index of the interface that they leave by.
    pub output: u32,
    /// The longest packet that fits, from the IP header on, in bytes.
    pub mtu: u16,
    /// One of [`means`].
    pub means: u8,
    /// Zero.
    pub padding: u8,
    /// Destination and source of the Ethernet header that they leave with, as they lie in it.
    pub addresses: [u32; 3],
}

/// How many different ways flows may take at a time; those of more go by the network stack.
pub const PATHS: u32 = 1 << 14;
/// Value of [`Path::epoch`] of a place that is being written to.
pub const WRITING: u32 = u32::MAX;

/// The lease of a [`Path`] for one direction of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Lease {
    /// Until when, in [`ticks`].
    pub expires: u32,
    /// The epoch, by [`Lease::epoch_of`], in which packets have last come out; 0: none have.
    pub epoch: u16,
    /// Index of the path.
    pub path: u16,
}

/// Index into [`crate::filter::flow::Flow::leases`].
pub mod towards {
    /// From the LAN to the pod.
    pub const POD: usize = 0;
    /// From the pod to the LAN.
    pub const LAN: usize = 1;
    /// How many there are.
    pub const COUNT: usize = 2;
}

/// Values of [`Path::means`].
pub mod means {
    /// To the other end of the interface, in another network namespace (`bpf_redirect_peer`).
    pub const PEER: u8 = 1;
    /// Out by the interface, through its queueing discipline and its egress hooks (`bpf_redirect`).
    pub const QUEUE: u8 = 2;
}

/// Bits of [`crate::filter::interface::Interface::fast_path`].
pub mod ability {
    /// Packets that come in by this interface may take the fast path.
    pub const INPUT: u32 = 1;
    /// Packets may leave by this interface.
    pub const OUTPUT: u32 = 2;
    /// And may go straight to its other end: nothing waits for them on the way.
    pub const PEER: u32 = 4;
}

const TICK_SHIFT: u32 = 24;

/// Nanoseconds of `CLOCK_MONOTONIC` in units of 2^24 ns (16.8 ms); they come round after 2.3 years.
#[must_use]
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "they come round")]
pub const fn ticks(nanoseconds: u64) -> u32 {
    (nanoseconds >> TICK_SHIFT) as u32
}

/// Converts [`ticks`] to nanoseconds.
#[must_use]
pub const fn nanoseconds(ticks: u32) -> u64 {
    (ticks as u64) << TICK_SHIFT
}

/// How long a lease is: 5 seconds.
pub const LEASE_TICKS: u32 = ticks(5_000_000_000);

/// How much longer than its last lease a path keeps its place: packets may be under way that have read the time before.
pub const PATH_SLACK_TICKS: u32 = ticks(1_000_000_000);

impl Path {
    /// Whether no flow holds it any more at `now` (in [`ticks`]) and in `epoch`, so that another may have its place.
    #[must_use]
    #[inline(always)]
    pub const fn is_free(&self, now: u32, epoch: u32) -> bool {
        const HELD: u32 = LEASE_TICKS + PATH_SLACK_TICKS;
        self.epoch != WRITING
            && (self.epoch != epoch || self.expires.wrapping_sub(now).wrapping_sub(1) >= HELD)
    }

    /// Whether both are the same way.
    #[must_use]
    #[inline(always)]
    pub const fn is_way_of(&self, other: &Self) -> bool {
        let ([a, b, c], [d, e, f]) = (self.addresses, other.addresses);
        self.input == other.input
            && self.output == other.output
            && self.mtu == other.mtu
            && self.means == other.means
            && a == d
            && b == e
            && c == f
    }
}

impl Lease {
    /// An epoch as leases have it: never 0. They come round after 65,535, which a lease does not live to see.
    #[must_use]
    #[inline(always)]
    pub const fn epoch_of(epoch: u32) -> u16 {
        (epoch % 0xffff) as u16 + 1
    }

    /// Whether it holds at `now` (in [`ticks`]) and in `epoch`.
    #[must_use]
    #[inline(always)]
    pub const fn holds(&self, now: u32, epoch: u32) -> bool {
        // Modulo 2^32: a long expired lease is as far behind as a future one is ahead.
        self.epoch == Self::epoch_of(epoch) && self.expires.wrapping_sub(now).wrapping_sub(1) < LEASE_TICKS
    }

    /// Whether packets of this direction have come out, in whatever epoch.
    #[must_use]
    #[inline(always)]
    pub const fn is_known(&self) -> bool {
        self.epoch != 0
    }
}

crate::named! {
    /// Result for a packet of an established flow; index of [`Outcomes::by_outcome`].
    Outcome {
        forwarded, 0, "Took the fast path.";
        off, 1, "The fast path is off, or no agent keeps it.";
        protocol, 2, "Neither TCP nor UDP.";
        state, 3, "The flow is beginning or ending, or the packet changes its state (SYN, FIN, RST).";
        header, 4, "IP options, extension headers, a fragment, or a VLAN tag.";
        unseen, 5, "Not both directions have come out at the far side under the same addresses: just opened, translated, filtered, or its interfaces do not allow it.";
        expired, 6, "The lease of the path has expired, or an input has changed: the path is learned again.";
        interface, 7, "Came in by another interface than those before it, or is for another host.";
        ttl, 8, "Its time to live is over with this node, which answers.";
        mtu, 9, "Longer than fits the way out: the node answers, or makes fragments.";
    }
}

/// Packets of established flows, by outcome: one such record for each direction and CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Outcomes {
    /// By [`Outcome`].
    pub by_outcome: [Counter; Outcome::COUNT],
}

crate::plain_old_data!(Control: 16, Path: 32, Lease: 8, Outcomes: 160);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_holds_for_its_time_in_its_epoch() {
        for now in [0, 1000, u32::MAX - 10] {
            let lease = Lease { expires: now.wrapping_add(LEASE_TICKS), epoch: Lease::epoch_of(7), path: 1 };
            assert!(lease.holds(now, 7));
            assert!(lease.holds(now.wrapping_add(LEASE_TICKS - 1), 7));
            assert!(!lease.holds(now.wrapping_add(LEASE_TICKS), 7));
            assert!(!lease.holds(now.wrapping_add(LEASE_TICKS + 1), 7));
            assert!(!lease.holds(now.wrapping_add(1 << 31), 7));
            assert!(!lease.holds(now, 8));
        }
    }

    #[test]
    fn no_epoch_is_none_to_a_lease() {
        for epoch in [1, 0xfffe, 0xffff, 0x1_0000, 0x1_fffe, u32::MAX] {
            assert!(!Lease::default().holds(0, epoch), "{epoch}");
            assert_ne!(Lease::epoch_of(epoch), Lease::epoch_of(epoch - 1), "{epoch}");
        }
    }

    #[test]
    fn a_path_keeps_its_place_longer_than_the_longest_lease() {
        for now in [0, 1000, u32::MAX - 10] {
            let path = Path {
                expires: now.wrapping_add(LEASE_TICKS + PATH_SLACK_TICKS),
                epoch: 7,
                ..Path::default()
            };
            let after = |ticks: u32| now.wrapping_add(ticks);
            assert!(!path.is_free(now, 7));
            assert!(!path.is_free(after(LEASE_TICKS), 7));
            assert!(!path.is_free(after(LEASE_TICKS + PATH_SLACK_TICKS - 1), 7));
            assert!(path.is_free(after(LEASE_TICKS + PATH_SLACK_TICKS), 7));
            assert!(path.is_free(now, 8));
            assert!(!Path { epoch: WRITING, ..path }.is_free(now, 8));
        }
    }
}
