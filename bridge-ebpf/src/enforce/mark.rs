//! A mark that a packet bears between the hook where it comes in and that where it goes out: all there is to know of it is
//! known already, and it need not be read again.
//!
//! It is in a field that nothing else reads: what used to, the classifier and the scheduler of RFC 2475, are gone from
//! Linux. Whatever writes there takes the mark off, and the packet is read twice.

use aya_ebpf::bindings::__sk_buff;
use bridge_common::filter::policy::direction;

/// In `__sk_buff::tc_index`.
const KNOWN: u32 = 0xb21d;

/// Whether the packet bears the mark; it does no longer.
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

/// Marks a packet of a flow of this direction. Not one of a NodePort: the address of a pod that it gets is news.
#[inline(always)]
pub(crate) fn put_on(skb: *mut __sk_buff, direction: u8) {
    if direction != direction::NODE_PORT {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*skb).tc_index = KNOWN };
    }
}
