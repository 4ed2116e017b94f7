//! A mark that a packet carries from its ingress hook to its egress hook: it has been judged and need not be read again.
//!
//! The field has no other reader: the classifier and the scheduler of RFC 2475 were removed from Linux. A program that
//! writes to it removes the mark, and the packet is read twice.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::policy::direction;

/// In `__sk_buff::tc_index`.
const KNOWN: u32 = 0xb21d;

/// Removes the mark and returns whether the packet had it.
#[inline(always)]
pub(crate) fn take_off(skb: *mut __sk_buff) -> bool {
    // SAFETY: the context is valid while the program runs.
    unsafe {
        let known = (*skb).tc_index == KNOWN;
        if known {
            (*skb).tc_index = 0;
        }
        known
    }
}

/// Marks a packet of a flow of this direction, except of NodePort flows: their pod's address is yet unknown.
#[inline(always)]
pub(crate) fn put_on(skb: *mut __sk_buff, direction: u8) {
    if direction != direction::NODE_PORT {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*skb).tc_index = KNOWN };
    }
}
