//! The mark that a packet carries from its ingress hook to its egress hook: whether it has been judged, else who its source
//! is, whatever address translation makes of that.
//!
//! The kernel has no other reader of `tc_index`: the classifier and the scheduler of RFC 2475 were removed from Linux. Cilium's
//! programs at the same hooks have flags in its five lowest bits (`TC_INDEX_F_*`, bpf/lib/common.h), by which a packet skips
//! its network policy: these bits stay as they are. A program that writes to the other bits removes the mark, and the packet
//! is judged by its addresses.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::policy::{AddressInfo, direction};

/// No ingress hook has seen the packet.
pub(crate) const NONE: u32 = 0;
/// Fully judged.
pub(crate) const JUDGED: u32 = 1 << FIRST_BIT;
/// From a node of the cluster, or from a pod of another node.
pub(crate) const CLUSTER: u32 = 2 << FIRST_BIT;
/// Let in on a NodePort, or an answer in a translated flow: final, whatever the addresses become.
pub(crate) const ADMITTED: u32 = 3 << FIRST_BIT;
/// From a source that is no pod, no node, and no LAN host of the configuration.
pub(crate) const FOREIGN: u32 = 4 << FIRST_BIT;
/// Fully judged; its path is yet to be learned where it leaves.
pub(crate) const LEARN: u32 = 5 << FIRST_BIT;
/// From a source of the first [`AddressInfo::origin`], of a policy with an even generation; one with an odd generation has
/// [`ODD`], too.
pub(crate) const ORIGIN: u32 = 8 << FIRST_BIT;
/// See [`ORIGIN`].
pub(crate) const ODD: u32 = 1 << 15;
/// Stands for the origins from this one on, for which the mark has no room.
const NO_ORIGIN: u32 = 1015;
/// The lowest bit of the mark.
const FIRST_BIT: u32 = 5;
/// The bits of others.
const OTHERS: u32 = (1 << FIRST_BIT) - 1;

#[inline(always)]
pub(crate) fn read(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).tc_index & !OTHERS }
}

#[inline(always)]
pub(crate) fn put(skb: *mut __sk_buff, mark: u32) {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).tc_index = (*skb).tc_index & OTHERS | mark };
}

/// The mark of a packet from a source with these properties.
#[inline(always)]
pub(crate) fn of_origin(info: &AddressInfo, generation: u32) -> u32 {
    (generation & 1) << 15 | (ORIGIN + (u32::from(info.origin).min(NO_ORIGIN) << FIRST_BIT))
}

/// Returns the index into the policy's origins, if the mark is of this policy.
#[inline(always)]
pub(crate) fn origin(mark: u32, generation: u32) -> Option<u32> {
    let index = ((mark & !ODD) >> FIRST_BIT).wrapping_sub(ORIGIN >> FIRST_BIT);
    (mark >> 15 == generation & 1 && index < NO_ORIGIN).then_some(index)
}

/// The mark of a judged packet of a flow of this direction. The pod's address of a NodePort flow is still unknown.
#[inline(always)]
pub(crate) fn of_judged(direction: u8) -> u32 {
    if direction == direction::NODE_PORT { ADMITTED } else { JUDGED }
}
