//! The shield: an XDP program in front of the hook of packets from the LAN.

use crate::filter::counters::Counter;

/// Counters of the shield, of one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable))]
pub struct Shielded {
    /// Dropped packets, and their lengths from the link layer header on, in bytes.
    pub dropped: Counter,
    /// When the second ends, in nanoseconds of `CLOCK_MONOTONIC`.
    pub until: u64,
    /// Denied packets that went on in it, so that the hook behind answers and reports them.
    pub left: u32,
    /// Zero.
    pub padding: u32,
}

crate::plain_old_data!(Shielded: 32);
