//! The fast path: established flows that go from interface to interface past the network stack.
//!
//! Nobody knows better than the network stack which way a packet goes. So a flow's way is learnt from packets that have
//! taken the normal one, where they come out: the interface, the Ethernet header, and that the routing table says the
//! same. What was learnt is a [`Path`]; it holds for [`LEASE_TICKS`], and only as long as nothing has changed that the
//! agent knows of ([`Control::epoch`]). When it has run out, packets take the normal way again, and what
//! they meet there is learnt anew: so conntrack, the neighbour table and whatever filters beside bridge hear of every
//! flow at least that often, and what would stop it stops it.

use crate::counters::Counter;

/// Whether flows may take the fast path; kept by the agent, in a map that it shares with the kernel side.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Until when, in nanoseconds of `CLOCK_MONOTONIC`; 0: they may not. Put off by the agent as long as it watches what
    /// the fast path depends on.
    pub until: u64,
    /// Grows by one with each change of what the fast path depends on: the policy, routes, neighbours, interfaces; never
    /// 0.
    pub epoch: u32,
    /// Bits of [`protocols`].
    pub protocols: u32,
}

/// Bits of [`Control::protocols`].
pub mod protocols {
    /// TCP flows may.
    pub const TCP: u32 = 1;
    /// UDP flows may.
    pub const UDP: u32 = 2;
}

/// The way of one direction of a flow, from interface to interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Until when it holds, in [`ticks`].
    pub expires: u32,
    /// The epoch in which it was learnt; 0: in none yet.
    pub epoch: u32,
    /// Index of the interface that packets come in by; 0: nothing has come out yet.
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

/// Index into [`crate::flow::Flow::paths`].
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

/// Bits of [`crate::interface::Interface::fast_path`].
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

/// How long a path holds: 5 seconds.
pub const LEASE_TICKS: u32 = ticks(5_000_000_000);

impl Path {
    /// Whether it holds at `now` (in [`ticks`]) and in `epoch`.
    #[must_use]
    #[inline(always)]
    pub const fn holds(&self, now: u32, epoch: u32) -> bool {
        // Modulo 2^32: what has run out long ago is as far behind as what is yet to come is ahead.
        self.epoch == epoch && self.expires.wrapping_sub(now).wrapping_sub(1) < LEASE_TICKS
    }
}

/// Defines the outcomes twice: as numbers and as names.
macro_rules! outcomes {
    ($($name:ident, $number:literal, $text:literal;)+) => {
        /// What became of a packet of an established flow; index of [`Outcomes::by_outcome`].
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[expect(non_camel_case_types, reason = "one spelling for the number and what the operator reads")]
        pub enum Outcome {
            $(#[doc = $text] $name = $number,)+
        }

        impl Outcome {
            /// Every outcome, by number.
            pub const ALL: &[Self] = &[$(Self::$name),+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name, as it is shown.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// What it means, in a sentence.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

outcomes! {
    forwarded, 0, "Took the fast path.";
    off, 1, "The fast path is off, or no agent keeps it.";
    protocol, 2, "Neither TCP nor UDP.";
    state, 3, "The flow is beginning or ending, or the packet changes its state (SYN, FIN, RST).";
    header, 4, "IP options, extension headers, a fragment, or a VLAN tag.";
    unseen, 5, "Not both directions have come out at the far side under the same addresses: just opened, translated, filtered, or its interfaces do not allow it.";
    expired, 6, "What was learnt of the way has run out, or something has changed: it is learnt anew.";
    interface, 7, "Came in by another interface than those before it, or is for another host.";
    ttl, 8, "Its time to live is over with this node, which answers.";
    mtu, 9, "Longer than fits the way out: the node answers, or makes fragments.";
}

/// Packets of established flows, by outcome: one such record for each direction and CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// By [`Outcome`].
    pub by_outcome: [Counter; Outcome::COUNT],
}

crate::plain_old_data!(Control: 16, Path: 32, Outcomes: 160);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_holds_for_its_lease_in_its_epoch() {
        for now in [0, 1000, u32::MAX - 10] {
            let path = Path { expires: now.wrapping_add(LEASE_TICKS), epoch: 7, ..Path::default() };
            assert!(path.holds(now, 7));
            assert!(path.holds(now.wrapping_add(LEASE_TICKS - 1), 7));
            assert!(!path.holds(now.wrapping_add(LEASE_TICKS), 7));
            assert!(!path.holds(now.wrapping_add(LEASE_TICKS + 1), 7));
            assert!(!path.holds(now.wrapping_add(1 << 31), 7));
            assert!(!path.holds(now, 8));
        }
    }
}
