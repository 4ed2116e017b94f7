//! The mark that a packet carries from its ingress hook to its egress hook: whether it has been judged, else who its source
//! is, whatever address translation makes of that.
//!
//! The field has no other reader: the classifier and the scheduler of RFC 2475 were removed from Linux. A program that
//! writes to it removes the mark, and the packet is judged by its addresses.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::policy::{AddressInfo, direction, origin};

/// No ingress hook has seen the packet.
pub(crate) const NONE: u32 = 0;
/// Fully judged.
pub(crate) const JUDGED: u32 = 1;
/// From a node of the cluster, or from a pod of another node.
pub(crate) const CLUSTER: u32 = 2;
/// Let in on a NodePort, or an answer in a translated flow: final, whatever the addresses become.
pub(crate) const ADMITTED: u32 = 3;
/// From a source that is no pod, no node, and no LAN host of the configuration.
pub(crate) const FOREIGN: u32 = 4;
/// Fully judged; its path is yet to be learned where it leaves.
pub(crate) const LEARN: u32 = 5;
/// From a source of this [`AddressInfo::origin`], of the policy with this generation.
pub(crate) const ORIGIN: u32 = 1 << 15;

#[inline(always)]
pub(crate) fn read(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).tc_index }
}

#[inline(always)]
pub(crate) fn put(skb: *mut __sk_buff, mark: u32) {
    // SAFETY: the context is valid while the program runs.
    unsafe { (*skb).tc_index = mark };
}

/// The mark of a packet from a source with these properties.
#[inline(always)]
pub(crate) fn of_origin(info: &AddressInfo, generation: u32) -> u32 {
    ORIGIN | (generation & 3) << 13 | u32::from(info.origin)
}

/// Returns the index into the policy's origins, if the mark is of this policy.
#[inline(always)]
pub(crate) fn origin(mark: u32, generation: u32) -> Option<u32> {
    let index = mark & u32::from(origin::OVERFLOW);
    (mark & ORIGIN != 0 && mark >> 13 & 3 == generation & 3 && index != u32::from(origin::OVERFLOW))
        .then_some(index)
}

/// The mark of a judged packet of a flow of this direction. The pod's address of a NodePort flow is still unknown.
#[inline(always)]
pub(crate) fn of_judged(direction: u8) -> u32 {
    if direction == direction::NODE_PORT { ADMITTED } else { JUDGED }
}
