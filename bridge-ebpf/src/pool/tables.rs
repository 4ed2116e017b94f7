//! The tables of the pool, as the hooks see them.

use core::ptr;

use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_loop,
};
use bridge_common::pool::{
    Destination, Geometry, MAX_WORDS, Owner, Refusal,
    bitmap::{self, Bitmap, Memory},
    shares,
    slots::{self, Claim, MAX_SAMPLE, Room, Search, Seat, Tables},
};

use bridge_ebpf::atomic::{fetch_add, fetch_and, fetch_or};

use crate::maps::{POOL_DESTINATIONS, POOL_OWNERS, POOL_SHARES, POOL_WORDS};

const BPF_NOEXIST: u64 = 1;

/// The maps of the pool.
#[derive(Clone, Copy)]
pub(crate) struct Maps {
    pub(crate) words: u32,
}

impl Memory for Maps {
    #[inline(always)]
    fn load(&self, at: u32) -> u64 {
        match POOL_WORDS.get_ptr(at) {
            // SAFETY: a pointer to a map's value; an aligned 64-bit load is one instruction.
            Some(word) => unsafe { word.read_volatile() },
            None => 0,
        }
    }

    #[inline(always)]
    fn store(&self, at: u32, value: u64) {
        if let Some(word) = POOL_WORDS.get_ptr_mut(at) {
            // SAFETY: as in `load`.
            unsafe { word.write_volatile(value) };
        }
    }

    #[inline(always)]
    fn fetch_or(&self, at: u32, bits: u64) -> u64 {
        match POOL_WORDS.get_ptr_mut(at) {
            // SAFETY: a pointer to a map's value.
            Some(word) => unsafe { fetch_or(word, bits) },
            None => 0,
        }
    }

    #[inline(always)]
    fn fetch_and(&self, at: u32, bits: u64) -> u64 {
        match POOL_WORDS.get_ptr_mut(at) {
            // SAFETY: a pointer to a map's value.
            Some(word) => unsafe { fetch_and(word, bits) },
            None => 0,
        }
    }

    #[inline(always)]
    fn fetch_add(&self, at: u32, n: u64) -> u64 {
        match POOL_WORDS.get_ptr_mut(at) {
            // SAFETY: a pointer to a map's value.
            Some(word) => unsafe { fetch_add(word, n) },
            None => 0,
        }
    }

    #[inline(always)]
    fn find_word(&self, map: Bitmap, start: u32) -> Option<u32> {
        u32::try_from(pool_find(map.at, map.summary, start)).ok()
    }
}

impl Tables for Maps {
    #[inline(always)]
    fn geometry(&self) -> Geometry {
        Geometry { words: self.words }
    }

    #[inline(always)]
    fn destination_slot(&self, destination: &Destination) -> Option<u32> {
        // SAFETY: the value is an aligned u32 that is written once, at insertion.
        unsafe { POOL_DESTINATIONS.get(destination) }.copied()
    }

    #[inline(always)]
    fn insert_destination(&self, destination: &Destination, slot: u32) -> bool {
        POOL_DESTINATIONS.insert(destination, slot, BPF_NOEXIST).is_ok()
    }

    #[inline(always)]
    fn owner_slot(&self, owner: &Owner) -> Option<u32> {
        // SAFETY: as in `destination_slot`.
        unsafe { POOL_OWNERS.get(owner) }.copied()
    }

    #[inline(always)]
    fn insert_owner(&self, owner: &Owner, slot: u32) -> bool {
        POOL_OWNERS.insert(owner, slot, BPF_NOEXIST).is_ok()
    }

    #[inline(always)]
    fn share(&self, key: u64) -> u64 {
        pool_share(key)
    }

    #[inline(always)]
    fn extend_share(&self, key: u64) -> u64 {
        pool_extend_share(key)
    }

    #[inline(always)]
    fn reduce_share(&self, key: u64, n: u64) {
        pool_reduce_share(key, n);
    }

    #[inline(always)]
    fn remove_destination(&self, destination: &Destination) {
        // An error can only mean that it is gone.
        let _ = POOL_DESTINATIONS.remove(destination);
    }

    #[inline(always)]
    fn remove_owner(&self, owner: &Owner) {
        // As above.
        let _ = POOL_OWNERS.remove(owner);
    }

    #[inline(always)]
    fn find_room(&self, netns_cookie: u64, group: u64) -> Room {
        let packed = pool_find_room(self.words, netns_cookie, group);
        Room { evictable: (packed >> 32) as u32, refusal: packed as u32 }
    }

    #[inline(always)]
    fn search(&self, search: &mut Search) {
        let turn = search_turn as *const ();
        // SAFETY: a callback with the arguments that the helper gives it, and memory that outlives the call.
        unsafe { bpf_loop(MAX_SAMPLE, turn.cast_mut().cast(), ptr::from_mut(search).cast(), 0) };
    }

    #[inline(always)]
    fn evict(&self, slot: u32) -> bool {
        pool_evict(self.words, slot) != 0
    }

    #[inline(always)]
    fn free_warm(&self, slot: u32, destination: u32) {
        pool_free_warm(self.words, slot, destination);
    }

    #[inline(always)]
    fn free_warm_group(&self, slot: u32, destination: u32, group: u32) {
        pool_free_warm_group(self.words, slot, destination, group);
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes no argument.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: the helper takes no argument.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn processor(&self) -> u32 {
        // SAFETY: the helper takes no argument. Hooks do not migrate.
        unsafe { bpf_get_smp_processor_id() }
    }

    #[inline(always)]
    fn claim(&self, map: Bitmap, random: u32) -> Option<u32> {
        let index = pool_claim(map.at, map.summary, map.words, random);
        u32::try_from(index).ok()
    }

    #[inline(always)]
    fn new_slot(&self, template: u32, key: &[u64; 3]) -> Option<u32> {
        u32::try_from(pool_new_slot(
            u64::from(self.words) << 32 | u64::from(template),
            key[0],
            key[1],
            key[2],
        ))
        .ok()
    }

    #[inline(always)]
    fn begin_fresh(&self, seat: Seat, quota: u32) -> bool {
        pool_begin_fresh(self.words, seat.slot, seat.owner_slot, quota) != 0
    }

    #[inline(always)]
    fn cancel_fresh(&self, seat: Seat, quota: u32) {
        pool_cancel_fresh(self.words, seat.slot, seat.owner_slot, quota);
    }

    #[inline(always)]
    fn claim_exact(&self, seat: Seat, quota: u32, index: u32) -> Result<Claim, Refusal> {
        match pool_claim_exact(self.words, seat.slot, seat.owner_slot, quota, index) {
            refusal if refusal < 0 => Err(Refusal(refusal.unsigned_abs() as u32)),
            from => Ok(Claim { index, from: from.cast_unsigned() as u32 }),
        }
    }

    #[inline(always)]
    fn arrive(&self, slot: u32) -> bool {
        pool_arrive(self.words, slot) != 0
    }

    #[inline(always)]
    fn fill(&self, slot: u32, template: u32) {
        let geometry = self.geometry();
        pool_copy(
            geometry.free(slot).at,
            geometry.free(template).at,
            geometry.summary() + 2 * geometry.words,
        );
    }
}

/// [`bitmap::find_word`] as a global function: the verifier follows it once, for all arguments, and not once per call.
/// Answers -1 if there is none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_find(at: u32, summary: u32, start: u32) -> i64 {
    match bitmap::find_word(&Maps { words: 0 }, Bitmap { at, summary, words: 0 }, start) {
        Some(word) => i64::from(word),
        None => -1,
    }
}

/// [`bitmap::claim`]; global for the same reason as [`pool_find`].
/// Answers -1 if nothing is free.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_claim(at: u32, summary: u32, words: u32, random: u32) -> i64 {
    match bitmap::claim(&Maps { words }, Bitmap { at, summary, words }, random) {
        Some(index) => i64::from(index),
        None => -1,
    }
}

/// [`Tables::share`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn pool_share(key: u64) -> u64 {
    // SAFETY: an aligned u64 that is changed by atomic operations.
    shares::known(unsafe { POOL_SHARES.get(key) }.copied().unwrap_or(0))
}

/// [`Tables::extend_share`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn pool_extend_share(key: u64) -> u64 {
    if let Some(share) = POOL_SHARES.get_ptr_mut(key) {
        // SAFETY: a pointer to a map's value.
        return unsafe { fetch_add(share, 1) };
    }
    if POOL_SHARES.insert(key, 1, BPF_NOEXIST).is_ok() {
        return 0;
    }
    match POOL_SHARES.get_ptr_mut(key) {
        // SAFETY: as above.
        Some(share) => unsafe { fetch_add(share, 1) },
        None => 0,
    }
}

/// [`Tables::reduce_share`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn pool_reduce_share(key: u64, n: u64) -> u64 {
    match POOL_SHARES.get_ptr_mut(key) {
        // SAFETY: a pointer to a map's value.
        Some(share) => unsafe { fetch_add(share, n.wrapping_neg()) },
        None => 0,
    }
}

/// [`slots::begin_fresh`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_begin_fresh(words: u32, slot: u32, owner_slot: u32, quota: u32) -> u32 {
    u32::from(slots::begin_fresh(&Maps { words }, Seat { slot, owner_slot }, quota))
}

/// [`slots::cancel_fresh`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_cancel_fresh(words: u32, slot: u32, owner_slot: u32, quota: u32) -> u32 {
    slots::cancel_fresh(&Maps { words }, Seat { slot, owner_slot }, quota);
    0
}

/// [`slots::find_room`]; global for the same reason as [`pool_find`]. The upper half of the answer has the slot.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_find_room(words: u32, netns_cookie: u64, group: u64) -> u64 {
    let room = slots::find_room(&Maps { words }, netns_cookie, group);
    u64::from(room.evictable) << 32 | u64::from(room.refusal)
}

/// One step of [`slots::find_room`]'s search.
#[inline(never)]
extern "C" fn search_turn(_turn: u64, search: *mut Search) -> i64 {
    // SAFETY: the memory that [`Tables::search`] gave to `bpf_loop`.
    let search = unsafe { &mut *search };
    i64::from(search.check(&Maps { words: search.words }))
}

/// [`slots::evict`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_evict(words: u32, slot: u32) -> u32 {
    u32::from(slots::evict(&Maps { words }, slot))
}

/// [`slots::free_warm`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_free_warm(words: u32, slot: u32, destination: u32) -> u32 {
    slots::free_warm(&Maps { words }, slot, destination);
    0
}

/// [`slots::free_warm_group`]; a subprogram, so that the verifier follows the rounds of one group.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_free_warm_group(words: u32, slot: u32, destination: u32, group: u32) -> u32 {
    slots::free_warm_group(&Maps { words }, slot, destination, group);
    0
}

/// [`slots::new_slot`]; global for the same reason as [`pool_find`]. The upper half of `words_and_template` has the words of the pool, the
/// lower the template. Answers -1 if there is none.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_new_slot(words_and_template: u64, first: u64, second: u64, third: u64) -> i64 {
    let (words, template) = ((words_and_template >> 32) as u32, words_and_template as u32);
    match slots::new_slot(&Maps { words }, template, &[first, second, third]) {
        Some(slot) => i64::from(slot),
        None => -1,
    }
}

/// [`slots::claim_exact`]; global for the same reason as [`pool_find`].
/// Answers the slot that the port was taken from, or a [`Refusal`] below zero.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_claim_exact(words: u32, slot: u32, owner_slot: u32, quota: u32, index: u32) -> i64 {
    match slots::claim_exact(&Maps { words }, Seat { slot, owner_slot }, quota, index) {
        Ok(claim) => i64::from(claim.from),
        Err(refusal) => -i64::from(refusal.0),
    }
}

/// [`slots::arrive`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_arrive(words: u32, slot: u32) -> u32 {
    u32::from(slots::arrive(&Maps { words }, slot))
}

/// [`slots::unclaim`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn pool_unclaim(words: u32, seat: u64, quota: u32, index: u32, from: u32) -> i64 {
    let seat = Seat { slot: seat as u32, owner_slot: (seat >> 32) as u32 };
    slots::unclaim(&Maps { words }, seat, quota, Claim { index, from });
    0
}

/// [`slots::release`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn pool_put_back(words: u32, slot: u32, owner_slot: u32, index: u32) -> i64 {
    slots::release(&Maps { words }, Seat { slot, owner_slot }, index);
    0
}

/// Words that are copied by one call of [`pool_copy_block`].
const BLOCK: u32 = 64;

/// Copies words between slots; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_copy(to: u32, from: u32, words: u32) -> i64 {
    let mut at = 0;
    while at < 2 * MAX_WORDS + MAX_WORDS / 64 {
        if at >= words {
            break;
        }
        pool_copy_block(to + at, from + at, words - at);
        at += BLOCK;
    }
    i64::from(at)
}

/// Copies at most [`BLOCK`] words; a subprogram, so that the verifier follows that many rounds and not all of
/// [`pool_copy`]'s.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_copy_block(to: u32, from: u32, words: u32) -> i64 {
    let maps = Maps { words };
    let mut word = 0;
    while word < BLOCK {
        if word >= words {
            break;
        }
        maps.store(to + word, maps.load(from + word));
        word += 1;
    }
    i64::from(word)
}
