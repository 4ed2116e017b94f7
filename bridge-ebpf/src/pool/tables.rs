//! The tables of the pool, as the hooks see them.

use core::ptr;

use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_loop,
};
use bridge_common::pool::{
    Destination, Geometry, MAX_WORDS, Owner, Refusal,
    bitmap::{self, Bitmap, Memory},
    slots::{self, Claim, MAX_SAMPLE, Search, Seat, Tables},
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
    fn share(&self, netns_cookie: u64) -> u64 {
        pool_share(netns_cookie)
    }

    #[inline(always)]
    fn extend_share(&self, netns_cookie: u64) {
        pool_extend_share(netns_cookie);
    }

    #[inline(always)]
    fn reduce_share(&self, netns_cookie: u64) {
        pool_reduce_share(netns_cookie);
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
    fn make_room(&self, netns_cookie: u64) -> Result<(), Refusal> {
        match pool_make_room(self.words, netns_cookie) {
            0 => Ok(()),
            refusal => Err(Refusal(refusal)),
        }
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
    fn claim_exact(&self, seat: Seat, index: u32) -> Result<Claim, Refusal> {
        match u32::try_from(pool_claim_exact(self.words, seat.slot, seat.owner_slot, index)) {
            Ok(from) => Ok(Claim { index, from }),
            Err(_) => Err(Refusal::TAKEN),
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
extern "C" fn pool_share(netns_cookie: u64) -> u64 {
    // SAFETY: an aligned u64 that is changed by atomic operations.
    unsafe { POOL_SHARES.get(netns_cookie) }.copied().unwrap_or(0)
}

/// [`Tables::extend_share`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_extend_share(netns_cookie: u64) -> u64 {
    if POOL_SHARES.insert(netns_cookie, 1, BPF_NOEXIST).is_ok() {
        return 0;
    }
    match POOL_SHARES.get_ptr_mut(netns_cookie) {
        // SAFETY: a pointer to a map's value.
        Some(share) => unsafe { fetch_add(share, 1) },
        None => 0,
    }
}

/// [`Tables::reduce_share`]; global for the same reason as [`pool_find`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_reduce_share(netns_cookie: u64) -> u64 {
    match POOL_SHARES.get_ptr_mut(netns_cookie) {
        // SAFETY: a pointer to a map's value.
        Some(share) => unsafe { fetch_add(share, u64::MAX) },
        None => 0,
    }
}

/// [`slots::make_room`]; global for the same reason as [`pool_find`].
/// Answers a [`Refusal`], or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_make_room(words: u32, netns_cookie: u64) -> u32 {
    match slots::make_room(&Maps { words }, netns_cookie) {
        Ok(()) => 0,
        Err(refusal) => refusal.0,
    }
}

/// One step of [`slots::make_room`]'s search.
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
/// Answers the slot that the port was taken from, or -1.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn pool_claim_exact(words: u32, slot: u32, owner_slot: u32, index: u32) -> i64 {
    match slots::claim_exact(&Maps { words }, Seat { slot, owner_slot }, index) {
        Ok(claim) => i64::from(claim.from),
        Err(_) => -1,
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
pub(crate) extern "C" fn pool_unclaim(words: u32, owner_slot: u32, index: u32, from: u32) -> i64 {
    slots::unclaim(&Maps { words }, owner_slot, Claim { index, from });
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
