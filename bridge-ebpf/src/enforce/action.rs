//! The TC actions of verdicts.

use aya_ebpf::bindings::TC_ACT_SHOT;

/// Passes a packet: to the next program, and to the network stack after the last (`TCX_NEXT`; `TC_ACT_UNSPEC` for clsact).
pub(crate) const NEXT: i32 = -1;
/// Drops a packet.
pub(crate) const DROP: i32 = TC_ACT_SHOT;
