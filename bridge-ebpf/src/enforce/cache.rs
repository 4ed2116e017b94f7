//! The flow cache: packets of flows that this CPU has lately let through, judged by one line of memory. See
//! `bridge_common::filter::flow_cache`.

use core::arch::asm;

use aya_ebpf::{
    Global,
    bindings::__sk_buff,
    helpers::{bpf_get_smp_processor_id, generated::bpf_get_prandom_u32},
};
use bridge_common::filter::{
    counters::Reason,
    fast_path::{Lease, Outcome, ticks},
    flow::{Flow, FlowKey},
    flow_cache::{LIFETIME_TICKS, MOST_SETS, WAYS, stamp_index, stamp_of},
};

use crate::{
    NEXT, fast_path,
    judge::Active,
    maps::{FLOW_CACHE, FLOW_STAMPS, Scratch, scratch},
    mark,
    packet::{self, Headers},
    paths, report,
};

/// How many sets each CPU has, a power of two. Set by the loader.
#[unsafe(no_mangle)]
static FLOW_CACHE_SETS: Global<u32> = Global::new(MOST_SETS);

/// Packets of one direction of a flow pass.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// Addresses and ports, as they lie in the headers.
    source: u32,
    destination: u32,
    ports: u32,
    protocol: u8,
    /// Where packets come in: what comes from a pod's interface cannot be of a LAN host.
    hook: u8,
    /// Of the flow.
    direction: u8,
    padding: u8,
    /// Of the policy.
    generation: u32,
    /// The flow's, from before it was looked up; its lower half.
    stamp: u32,
    /// Until when it is good, in `ticks`.
    expires: u32,
    /// Index of the path that packets take; [`NO_PATH`]: the network stack's.
    path: u16,
    padding_after: u16,
}

const NO_PATH: u16 = u16::MAX;

/// One of so many misses takes the place of another flow, where there is no free one.
const TRIES: u32 = 8;

/// The entries that one hash value leads to.
#[repr(C, align(64))]
pub(crate) struct Set {
    ways: [Entry; WAYS],
}
const _: () = assert!(size_of::<Set>() == 64);

/// Where in the cache the flow of a packet belongs.
#[repr(C)]
pub(crate) struct Place {
    entry: Entry,
    /// Index of the set.
    set: u32,
    /// 0: the cache is not for packets like this one.
    known: u32,
}

impl Entry {
    #[inline(always)]
    fn is_of(&self, packet: &Self) -> bool {
        self.source == packet.source
            && self.destination == packet.destination
            && self.ports == packet.ports
            && self.protocol == packet.protocol
            && self.hook == packet.hook
    }

    #[inline(always)]
    fn is_good(&self, packet: &Self, now: u32) -> bool {
        self.generation == packet.generation && self.stamp == packet.stamp && self.is_fresh(now)
    }

    #[inline(always)]
    fn is_fresh(&self, now: u32) -> bool {
        self.expires.wrapping_sub(now).wrapping_sub(1) < LIFETIME_TICKS
    }
}

/// What [`serve`] returns of a packet that it knows nothing of.
pub(crate) const MISS: i32 = i32::MIN;

/// Lets a packet through by the cache: what to return from the program, or [`MISS`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn serve(skb: *mut __sk_buff, hook: u32) -> i32 {
    let Some(Scratch { place, .. }) = scratch() else { return MISS };
    place.known = 0;
    let Some(plain) = packet::established_v4(skb) else { return MISS };
    let Some(active) = Active::get() else { return MISS };
    let [source_port, destination_port] = plain.ports();
    let stamp = stamp_index(plain.source, plain.destination, [source_port, destination_port]);
    let Some(stamp) = FLOW_STAMPS.get_ptr(stamp) else { return MISS };
    let entry = Entry {
        source: plain.source,
        destination: plain.destination,
        ports: plain.ports,
        protocol: plain.protocol,
        hook: hook as u8,
        direction: 0,
        padding: 0,
        generation: active.settings.generation,
        // SAFETY: a valid element.
        stamp: unsafe { stamp.read_volatile() } as u32,
        expires: 0,
        path: NO_PATH,
        padding_after: 0,
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
    (place.set, place.known) = (index, 1);
    MISS
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

/// What becomes of a packet of this entry; [`MISS`]: its way must be learnt.
#[inline(always)]
fn pass(skb: *mut __sk_buff, entry: &Entry, headers: &Headers, active: &Active) -> i32 {
    // SAFETY: the context is valid while the program runs.
    let length = unsafe { (*skb).len };
    let action = match fast_path::control(active.now) {
        None => {
            mark::put_on(skb, entry.direction);
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

/// Remembers that packets like the one in [`scratch`], which [`serve`] did not know, pass: by the path of a lease that
/// holds, or by the network stack.
#[inline(always)]
pub(crate) fn remember(flow: &mut Flow, lease: Option<&Lease>, now: u64) {
    let Some(Scratch { place, packet, .. }) = scratch() else { return };
    if place.known == 0 || !flow.is_settled(packet.protocol) {
        return;
    }
    let Some(set) = FLOW_CACHE.get_ptr_mut(place.set) else { return };
    // SAFETY: a valid element, of this CPU alone.
    let set = unsafe { &mut *set };
    let ticks = ticks(now);
    let mut expires = ticks.wrapping_add(LIFETIME_TICKS);
    let mut path = NO_PATH;
    if let Some(lease) = lease {
        path = lease.path;
        if expires.wrapping_sub(lease.expires) < LIFETIME_TICKS {
            expires = lease.expires;
        }
    }
    // Where others have all the places, few of those that miss take one: else all of them would, and all would miss. A flow
    // of many packets is soon among them.
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

/// To be called after a flow was taken from the flow table, or is settled there no longer.
#[inline(always)]
pub(crate) fn forget(key: &FlowKey) {
    if let Some(index) = stamp_of(key)
        && let Some(stamp) = FLOW_STAMPS.get_ptr_mut(index)
    {
        // SAFETY: a valid element, aligned as its type; the instruction touches it alone.
        unsafe { asm!("lock *(u64 *)({p} + 0) += {v}", p = in(reg) stamp, v = in(reg) 1u64) };
    }
}
