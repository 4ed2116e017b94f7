//! Elements of the flow cache.

use bridge_common::filter::flow_cache::{LIFETIME_TICKS, WAYS};

/// A verdict: packets of one direction of a flow pass.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// Addresses and ports, as they lie in the headers.
    pub(crate) source: u32,
    pub(crate) destination: u32,
    pub(crate) ports: u32,
    pub(crate) protocol: u8,
    /// The ingress hook: a packet from a pod's interface cannot be a LAN host's.
    pub(crate) hook: u8,
    /// Of the flow.
    pub(crate) direction: u8,
    /// Bits 16 to 23 of `interface`.
    pub(crate) interface_high: u8,
    /// Of the policy.
    pub(crate) generation: u32,
    /// Lower half of the flow's stamp, read before the flow was looked up.
    pub(crate) stamp: u32,
    /// When it expires, in `ticks`.
    pub(crate) expires: u32,
    /// Index of the path that packets take; [`NO_PATH`]: they pass to the network stack.
    pub(crate) path: u16,
    /// Of a packet from a pod: the interface that it came in by, bits 0 to 15; else 0.
    pub(crate) interface: u16,
}

pub(crate) const NO_PATH: u16 = u16::MAX;

/// The entries that one hash value leads to.
#[repr(C, align(64))]
pub(crate) struct Set {
    pub(crate) ways: [Entry; WAYS],
}
const _: () = assert!(size_of::<Set>() == 64);

/// The place of a packet's flow in the cache.
#[repr(C)]
pub(crate) struct Place {
    pub(crate) entry: Entry,
    /// Index of the set.
    pub(crate) set: u32,
    /// [`Place::OTHER`], [`Place::MISSED`] or [`Place::NO_FLOW`].
    pub(crate) kind: u32,
}

impl Place {
    /// The cache does not serve packets of this kind.
    pub(crate) const OTHER: u32 = 0;
    /// A miss, whose verdict may be entered.
    pub(crate) const MISSED: u32 = 1;
    /// The flow tables have no entry for the packet either.
    pub(crate) const NO_FLOW: u32 = 2;
}

impl Entry {
    #[inline(always)]
    pub(crate) fn is_of(&self, packet: &Self) -> bool {
        self.source == packet.source
            && self.destination == packet.destination
            && self.ports == packet.ports
            && self.protocol == packet.protocol
            && self.hook == packet.hook
            && self.interface == packet.interface
            && self.interface_high == packet.interface_high
    }

    #[inline(always)]
    pub(crate) fn is_good(&self, packet: &Self, now: u32) -> bool {
        self.generation == packet.generation && self.stamp == packet.stamp && self.is_fresh(now)
    }

    #[inline(always)]
    pub(crate) fn is_fresh(&self, now: u32) -> bool {
        self.expires.wrapping_sub(now).wrapping_sub(1) < LIFETIME_TICKS
    }
}
