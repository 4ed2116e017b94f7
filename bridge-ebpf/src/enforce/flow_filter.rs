//! The filter in front of the flow tables. See `bridge_common::filter::flow_filter`.

use bridge_common::filter::{
    address::Address,
    flow::FlowKey,
    flow_filter::{HALVES, bit, element, mask},
};
use bridge_ebpf::atomic;

use crate::maps::FLOW_FILTER;

/// Whether the flow tables may have an entry of this protocol between two addresses, in whichever order.
#[inline(always)]
pub(crate) fn may_know(source: &Address, destination: &Address, protocol: u8) -> bool {
    let bit = bit(source, destination, protocol);
    match FLOW_FILTER.get(element(bit)) {
        Some([first, second]) => (*first | *second) & mask(bit) != 0,
        None => true,
    }
}

/// Sets the bits of a flow. Call before it is entered.
#[inline(always)]
pub(crate) fn note(key: &FlowKey) {
    let bit = bit(&key.low, &key.high, key.protocol);
    let Some(halves) = FLOW_FILTER.get_ptr_mut(element(bit)) else { return };
    let first = halves.cast::<u64>();
    for half in 0..HALVES {
        // SAFETY: a word of a valid element, aligned as its type.
        unsafe {
            let word = first.add(half);
            if word.read_volatile() & mask(bit) == 0 {
                atomic::fetch_or(word, mask(bit));
            }
        }
    }
}
