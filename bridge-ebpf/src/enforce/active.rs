//! The active policy.

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use bridge_common::filter::control::Settings;

use crate::maps::{CONTROL, SETTINGS};

/// The policy that judges a packet, and the time.
pub(crate) struct Active {
    pub(crate) slot: u32,
    pub(crate) settings: &'static Settings,
    /// Nanoseconds of `CLOCK_MONOTONIC`, a few milliseconds late.
    pub(crate) now: u64,
}

impl Active {
    /// Reads the active policy; `None`: there has never been one.
    #[inline(always)]
    pub(crate) fn get() -> Option<Self> {
        // SAFETY: no precondition.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        let slot = CONTROL.get(0)?.slot_at(now);
        Self::of_slot(slot, now)
    }

    /// The policy in a slot that was active at `now`.
    #[inline(always)]
    pub(crate) fn of_slot(slot: u32, now: u64) -> Option<Self> {
        let settings = SETTINGS.get(slot)?;
        if settings.generation == 0 { None } else { Some(Self { slot, settings, now }) }
    }
}
