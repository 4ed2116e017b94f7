//! The word that selects the active policy, and the settings that come with a policy.

use crate::filter::flow;

/// Number of policies held at a time: the active one, the one it falls back to while it is on trial, and one that is
/// being written to replace either.
pub const SLOTS: u32 = 3;

/// The word that selects the active policy. One aligned store of it is one switch: no packet sees half of each policy.
///
/// Bits 0-7: the active slot. Bits 8-15: the slot to fall back to at the deadline. Bits 16-63: the deadline in
/// milliseconds of `CLOCK_MONOTONIC`; 0: none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Control {
    /// See the type.
    pub word: u64,
}

impl Control {
    /// `slot` is active, for good.
    #[must_use]
    pub const fn slot(slot: u32) -> Self {
        Self { word: slot as u64 & 0xff }
    }

    /// `slot` is active until `deadline`, in milliseconds of `CLOCK_MONOTONIC`, and `fallback` from then on.
    #[must_use]
    pub const fn until(slot: u32, fallback: u32, deadline: u64) -> Self {
        Self { word: slot as u64 & 0xff | (fallback as u64 & 0xff) << 8 | deadline << 16 }
    }

    /// Returns the slot that is active until the deadline.
    #[must_use]
    pub const fn slot_on_trial(self) -> u32 {
        (self.word & 0xff) as u32
    }

    /// Until when, in milliseconds of `CLOCK_MONOTONIC`; 0: for good.
    #[must_use]
    #[inline(always)]
    pub const fn deadline(self) -> u64 {
        self.word >> 16
    }

    /// Returns the slot that is active from the deadline on, if there is one.
    #[must_use]
    pub const fn fallback(self) -> u32 {
        (self.word >> 8 & 0xff) as u32
    }

    /// Returns the slot that is active at `now`, in nanoseconds of `CLOCK_MONOTONIC`.
    #[must_use]
    #[inline(always)]
    pub const fn slot_at(self, now: u64) -> u32 {
        let deadline = self.deadline();
        if deadline != 0 && now / 1_000_000 >= deadline { self.fallback() } else { self.slot_on_trial() }
    }
}

/// Settings of a policy beside its rules.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Settings {
    /// How long a flow may be silent, in nanoseconds, by [`flow::state`].
    pub timeouts: [u64; flow::state::COUNT],
    /// Number of the policy; grows by one with each. 0: the slot was never written.
    pub generation: u32,
    /// 1: denied packets pass, and are counted and reported as they would have been.
    pub audit: u32,
    /// 1: denied packets are answered (RST, ICMP port unreachable) where that can be done; 0: silence.
    pub reject: u32,
    /// Events each CPU may send in a second.
    pub events_per_second: u32,
    /// Answers to denied packets each CPU may send in a second; further packets are dropped silently.
    pub answers_per_second: u32,
    /// 1: new flows that were let through are reported too.
    pub report_allowed: u32,
    /// Sets of the rules that name neither side, by direction (inbound, outbound); 0: none.
    pub global_sets: [u32; 2],
    /// Lowest and highest NodePort, host byte order; 0 and 0: NodePort traffic is not judged.
    pub node_ports: [u16; 2],
    /// [`crate::filter::policy::reference`] to be resolved by NodePort.
    pub node_port_root: u32,
    /// How many rules the policy has. Hits of rule `r` on CPU `c` are at index `c * rule_count + r`.
    pub rule_count: u32,
    /// 1: there are rules in audit mode.
    pub has_audited: u32,
    /// How many elements the table of pairs has.
    pub pair_count: u32,
    /// Zero.
    pub padding: u32,
}

crate::plain_old_data!(Control: 8, Settings: 160);
