//! The flow cache: verdicts of this CPU on packets of established flows, one cache line each. See
//! `bridge_common::filter::flow_cache`.

use aya_ebpf::{
    Global,
    bindings::__sk_buff,
    helpers::{bpf_get_smp_processor_id, generated::bpf_get_prandom_u32},
};
use bridge_common::filter::{
    address::Address,
    counters::Reason,
    fast_path::{Outcome, ticks},
    flow::{Flow, FlowKey},
    flow_cache::{LIFETIME_TICKS, MAX_SETS, WAYS, stamp_index, stamp_of},
};

use bridge_ebpf::{atomic, protocol};

use crate::{
    action::NEXT,
    active::Active,
    cache_set::{Entry, NO_PATH, Place},
    fast_path, flow_filter,
    hook::Hook,
    maps::{FLOW_CACHE, FLOW_STAMPS, Route, Scratch, scratch},
    mark,
    packet::Packet,
    parse::fast::{Headers, established_v4},
    paths, report,
};

/// Sets of each CPU, a power of two. Set by the loader.
#[unsafe(no_mangle)]
static FLOW_CACHE_SETS: Global<u32> = Global::new(MAX_SETS);

/// A miss evicts a live entry with probability 1 / `TRIES`.
const TRIES: u32 = 8;

/// Returned by [`serve`] on a cache miss.
pub(crate) const MISS: i32 = i32::MIN;

/// Judges a packet by the cache. Returns the TC action, or [`MISS`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn serve(skb: *mut __sk_buff, hook: u32) -> i32 {
    let Some(Scratch { place, .. }) = scratch() else { return MISS };
    place.kind = Place::OTHER;
    let Some(plain) = established_v4(skb) else { return MISS };
    let Some(active) = Active::get() else { return MISS };
    // A datagram of no flow is spared the reads of two cache lines.
    if plain.protocol == protocol::UDP
        && !flow_filter::may_know(
            &Address::from_v4_word(plain.source),
            &Address::from_v4_word(plain.destination),
            plain.protocol,
        )
    {
        place.kind = Place::NO_FLOW;
        return MISS;
    }
    let [source_port, destination_port] = plain.ports();
    let stamp = stamp_index(plain.source, plain.destination, [source_port, destination_port]);
    let Some(stamp) = FLOW_STAMPS.get_ptr(stamp) else { return MISS };
    // Packets of pods must come by the interface of their flow. An index of more than 24 bits is beyond the entry.
    // SAFETY: the context is valid while the program runs.
    let interface = if hook == Hook::INTERNAL_INGRESS { unsafe { (*skb).ifindex } } else { 0 };
    if interface >> 24 != 0 {
        return MISS;
    }
    let entry = Entry {
        source: plain.source,
        destination: plain.destination,
        ports: plain.ports,
        protocol: plain.protocol,
        hook: hook as u8,
        direction: 0,
        interface_high: (interface >> 16) as u8,
        generation: active.settings.generation,
        // SAFETY: a valid element.
        stamp: unsafe { stamp.read_volatile() } as u32,
        expires: 0,
        path: NO_PATH,
        interface: interface as u16,
    };
    let index = set_index(&entry);
    let Some(set) = FLOW_CACHE.get_ptr(index) else { return MISS };
    // SAFETY: a valid element, of this CPU alone.
    let set = unsafe { &*set };
    let now = ticks(active.now);
    for way in &set.ways {
        if way.is_of(&entry) && way.is_good(&entry, now) {
            let action = pass(skb, way, &plain.headers, &active);
            if action != MISS {
                return action;
            }
        }
    }
    place.entry = entry;
    (place.set, place.kind) = (index, Place::MISSED);
    MISS
}

/// Whether [`serve`] may pass a packet from the LAN that [`crate::parse::fast::read_frame`] has read. The entry of a flow outlives
/// that of the flow table for a while, if the table needs its room.
#[inline(always)]
pub(crate) fn may_serve(packet: &Packet, active: &Active) -> bool {
    if packet.version != 4 {
        return false;
    }
    let word = |address: &Address| u32::from_ne_bytes(address.v4());
    let ([a, b], [c, d]) = (packet.source_port, packet.destination_port);
    let sought = Entry {
        source: word(&packet.source),
        destination: word(&packet.destination),
        ports: u32::from_ne_bytes([a, b, c, d]),
        protocol: packet.protocol,
        hook: Hook::EXTERNAL_INGRESS as u8,
        direction: 0,
        interface_high: 0,
        generation: active.settings.generation,
        stamp: 0,
        expires: 0,
        path: NO_PATH,
        interface: 0,
    };
    let Some(set) = FLOW_CACHE.get_ptr(set_index(&sought)) else { return true };
    // SAFETY: a valid element, of this CPU alone.
    let set = unsafe { &*set };
    let now = ticks(active.now);
    set.ways.iter().any(|way| way.is_of(&sought) && way.is_fresh(now))
}

/// Index of the set of this CPU for packets like this one.
#[inline(always)]
fn set_index(packet: &Entry) -> u32 {
    let addresses = u64::from(packet.source) << 32 | u64::from(packet.destination);
    let mixed = (addresses ^ u64::from(packet.ports).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .wrapping_mul(0xff51_afd7_ed55_8ccd);
    let sets = FLOW_CACHE_SETS.load();
    // SAFETY: no precondition.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    cpu * sets + ((mixed >> 40) as u32 & (sets - 1))
}

/// Passes a packet of this entry; [`MISS`]: its path must be learned.
#[inline(always)]
fn pass(skb: *mut __sk_buff, entry: &Entry, headers: &Headers, active: &Active) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    let action = match fast_path::control(active.now) {
        None => {
            mark::put(skb, mark::of_judged(entry.direction));
            NEXT
        }
        Some(control) if !control.allows(entry.protocol) => {
            fast_path::conclude(skb, entry.direction, Err(Outcome::off))
        }
        Some(_) if entry.path == NO_PATH => return MISS,
        Some(control) => match paths::held(entry.path, control.epoch) {
            None => return MISS,
            Some(path) => fast_path::forward_by(skb, headers, &path, entry.direction),
        },
    };
    report::count(entry.direction, Reason::established, length);
    action
}

/// Enters a verdict after a miss: packets like the one in [`scratch`] pass by its route.
#[inline(always)]
pub(crate) fn remember(flow: &mut Flow, now: u64) {
    let Some(Scratch { place, packet, route, .. }) = scratch() else { return };
    if place.kind != Place::MISSED || !flow.is_settled(packet.protocol) {
        return;
    }
    let Some(set) = FLOW_CACHE.get_ptr_mut(place.set) else { return };
    // SAFETY: a valid element, of this CPU alone.
    let set = unsafe { &mut *set };
    let ticks = ticks(now);
    let mut expires = ticks.wrapping_add(LIFETIME_TICKS);
    let mut path = NO_PATH;
    match route.kind {
        Route::UNKNOWN => return,
        Route::PATH => {
            path = route.lease.path;
            if expires.wrapping_sub(route.lease.expires) < LIFETIME_TICKS {
                expires = route.lease.expires;
            }
        }
        _ => {}
    }
    // If every miss evicted an entry of a full set, three flows would evict each other at every packet.
    // SAFETY: no precondition.
    let chance = unsafe { bpf_get_prandom_u32() } % (TRIES * WAYS as u32);
    for (index, way) in (0..).zip(&mut set.ways) {
        if index == chance || way.is_of(&place.entry) || !way.is_fresh(ticks) {
            *way = Entry { direction: flow.direction, expires, path, ..place.entry };
            // Packets of the cache do not touch the flow.
            flow.last_seen = now;
            return;
        }
    }
}

/// Invalidates the entries of a flow. Call after the flow is removed or leaves its settled state.
#[inline(always)]
pub(crate) fn forget(key: &FlowKey) {
    if let Some(index) = stamp_of(key)
        && let Some(stamp) = FLOW_STAMPS.get_ptr_mut(index)
    {
        // SAFETY: a valid element, aligned as its type; the instruction touches it alone.
        unsafe { atomic::add(stamp, 1) };
    }
}
