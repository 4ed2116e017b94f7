//! The properties of addresses: the tries of the policy, and in front of them a cache of each CPU.
//!
//! A lookup in a trie goes through a node for each bit in which prefixes differ. The tables of a policy do not change while
//! packets read them, and no two policies have the same generation: an entry with the generation of the active policy holds.

use aya_ebpf::{btf_maps::lpm_trie::Key, helpers::bpf_get_smp_processor_id};
use bridge_common::filter::{address::Address, flow_cache::ADDRESSES, policy::AddressInfo};

use crate::{
    active::Active,
    maps::{ADDRESS_CACHE, ADDRESSES4, ADDRESSES6},
    values::CachedAddress,
};

/// Returns the properties of an address.
#[inline(always)]
pub(crate) fn lookup(slot: u32, address: &Address, version: u8) -> AddressInfo {
    let found = if version == 4 {
        ADDRESSES4.get(slot).and_then(|trie| trie.get(&Key::new(32, address.v4())))
    } else {
        ADDRESSES6.get(slot).and_then(|trie| trie.get(&Key::new(128, address.octets)))
    };
    found.copied().unwrap_or_default()
}

/// As [`lookup`], by the cache where it can.
#[inline(always)]
pub(crate) fn lookup_cached(active: &Active, address: &Address, version: u8) -> AddressInfo {
    if version != 4 {
        return lookup(active.slot, address, version);
    }
    let word = u32::from_ne_bytes(address.v4());
    // SAFETY: no precondition.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let index = word.wrapping_mul(0x9e37_79b1) >> (u32::BITS - ADDRESSES.trailing_zeros());
    let Some(entry) = ADDRESS_CACHE.get_ptr_mut(cpu * ADDRESSES + index) else {
        return lookup(active.slot, address, version);
    };
    // SAFETY: a valid element, of this CPU alone.
    let entry = unsafe { &mut *entry };
    let generation = active.settings.generation;
    if entry.address != word || entry.generation != generation {
        *entry = CachedAddress {
            address: word,
            generation,
            info: lookup(active.slot, address, version),
            padding: 0,
        };
    }
    entry.info
}
