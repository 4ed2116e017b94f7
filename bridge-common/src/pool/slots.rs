//! Claiming and giving back ports: the code that the connect hooks and the agent share.
//!
//! A port is free in exactly one place: the destination's slot, or the slot of one namespace (warm), or nowhere while a
//! socket or a lease holds it. Moving it is taking its bit away in one place before setting it in another, so it can
//! never be held twice.

use super::bitmap::{self, Bitmap, Memory};
use super::{
    ALL_SLOTS, ALLOCATOR, CURSOR, Destination, FIRST_SLOT, FREE_SLOTS, Geometry, Owner, Refusal, SLOT_CLOSED,
    SLOT_OPEN, SLOT_PINNED, TEMPLATE_EMPTY, TEMPLATE_TCP, TEMPLATE_UDP, TEMPLATE_UDP_ANY,
};
use crate::protocol;

/// Number of tries of [`enter`] when a slot is taken away meanwhile.
const ENTER_TRIES: u32 = 4;

/// With fewer free slots than this, a namespace within its share takes idle slots of any other.
const RESERVE: u64 = 64;

/// Slots that a search for an idle slot checks if it finds one among them.
pub const SAMPLE: u32 = 64;
/// Slots that it checks at most.
pub const MAX_SAMPLE: u32 = 4096;

/// Marks the third word of the key of an owner slot; that of a destination is below.
const OWNER_KEY: u64 = 1 << 63;

/// How long, in microseconds, a port that was given back on another processor is passed over if there is another one.
///
/// TCP says that a connection is in CLOSE before it sends the RST that ends it (`tcp_disconnect`, `__tcp_close`): a
/// connect on another processor could overtake that. On the same one it comes after, and takes the port as it is: who
/// connects in a loop does not spread over the whole pool.
const SETTLING_US: u64 = 200;

/// Stands for no processor in particular. Numbers of processors are kept modulo 1024, so some machines have one of this
/// number; there it is passed over too seldom, for 200 us.
pub const NO_PROCESSOR: u32 = 1023;

/// A `closing` word: the port in the low 16 bits, the processor in the next 10, the time in the 38 above.
#[inline(always)]
fn closing<T: Tables>(tables: &T, index: u32) -> u64 {
    let place = u64::from(tables.processor() & NO_PROCESSOR) << 16 | u64::from(index & 0xffff);
    (tables.now() / 1000) << 26 | place
}

/// The tables of the pool.
pub trait Tables: Memory {
    /// See [`Geometry`].
    fn geometry(&self) -> Geometry;
    /// Slot of a destination.
    fn destination_slot(&self, destination: &Destination) -> Option<u32>;
    /// Enters a destination unless it is there; `false` if it is, or if the table is full.
    fn insert_destination(&self, destination: &Destination, slot: u32) -> bool;
    /// Slot of an owner.
    fn owner_slot(&self, owner: &Owner) -> Option<u32>;
    /// Enters an owner unless it is there; `false` if it is, or if the table is full.
    fn insert_owner(&self, owner: &Owner, slot: u32) -> bool;
    /// Destinations that a namespace has slots for.
    fn share(&self, netns_cookie: u64) -> u64;
    /// Adds one to [`Tables::share`].
    fn extend_share(&self, netns_cookie: u64);
    /// Subtracts one from [`Tables::share`].
    fn reduce_share(&self, netns_cookie: u64);
    /// Removes a destination from the table.
    fn remove_destination(&self, destination: &Destination);
    /// Removes an owner from the table.
    fn remove_owner(&self, owner: &Owner);
    /// A random number; need not be unpredictable.
    fn random(&self) -> u32;
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    fn now(&self) -> u64;
    /// The processor that runs this; [`NO_PROCESSOR`] if it may be another one at the next instruction.
    fn processor(&self) -> u32;

    /// [`bitmap::claim`].
    fn claim(&self, map: Bitmap, random: u32) -> Option<u32> {
        bitmap::claim(self, map, random)
    }

    /// [`new_slot`].
    fn new_slot(&self, template: u32, key: &[u64; 3]) -> Option<u32> {
        new_slot(self, template, key)
    }

    /// [`make_room`].
    ///
    /// # Errors
    /// [`Refusal::SHARE`] or [`Refusal::TABLE_FULL`].
    fn make_room(&self, netns_cookie: u64) -> Result<(), Refusal> {
        make_room(self, netns_cookie)
    }

    /// Checks slots with [`Search::check`] until it ends the search.
    fn search(&self, search: &mut Search) {
        for _ in 0..MAX_SAMPLE {
            if search.check(self) {
                return;
            }
        }
    }

    /// [`evict`].
    fn evict(&self, slot: u32) -> bool {
        evict(self, slot)
    }

    /// [`claim_exact`].
    ///
    /// # Errors
    /// [`Refusal::TAKEN`].
    fn claim_exact(&self, seat: Seat, index: u32) -> Result<Claim, Refusal> {
        claim_exact(self, seat, index)
    }

    /// [`arrive`].
    fn arrive(&self, slot: u32) -> bool {
        arrive(self, slot)
    }

    /// Copies summary, free and touched words from a template to an unused slot.
    fn fill(&self, slot: u32, template: u32) {
        let geometry = self.geometry();
        let (to, from) = (geometry.free(slot).at, geometry.free(template).at);
        for word in 0..geometry.summary() + 2 * geometry.words {
            self.store(to + word, self.load(from + word));
        }
    }
}

/// A namespace's seat at a destination: as long as it lasts, the agent takes neither slot away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    /// Slot of the destination.
    pub slot: u32,
    /// Slot of the namespace's warm ports.
    pub owner_slot: u32,
}

/// Where a claimed port came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The port, counted from the base of the pool.
    pub index: u32,
    /// The slot it was taken from.
    pub from: u32,
}

/// The template of a destination.
#[inline(always)]
#[must_use]
pub fn template(destination: &Destination) -> u32 {
    if destination.protocol() != protocol::UDP {
        TEMPLATE_TCP
    } else if destination.port() == 0 {
        TEMPLATE_UDP_ANY
    } else {
        TEMPLATE_UDP
    }
}

/// Finds or makes the slots of a destination and a namespace, and counts one live claim in both.
///
/// A slot that was looked up may have been taken away, and serve another destination by now. So this first counts a live
/// claim, which keeps the slot as it is, and then looks it up again.
///
/// # Errors
/// [`Refusal::SHARE`] or [`Refusal::TABLE_FULL`] as [`make_room`], [`Refusal::QUOTA`] if the namespace has `quota` live
/// claims already (0: no limit).
#[inline(always)]
pub fn enter<T: Tables>(
    tables: &T,
    destination: &Destination,
    netns_cookie: u64,
    quota: u32,
) -> Result<Seat, Refusal> {
    let geometry = tables.geometry();
    let mut tries = 0;
    while tries < ENTER_TRIES {
        tries += 1;
        let Some(slot) = enter_destination(tables, destination, netns_cookie)? else { continue };
        let owner = Owner { netns_cookie, slot, padding: 0 };
        match enter_owner(tables, &owner) {
            Ok(Some(owner_slot)) => {
                if quota != 0 && tables.load(geometry.live(owner_slot)) > u64::from(quota) {
                    leave(tables, Seat { slot, owner_slot });
                    return Err(Refusal::QUOTA);
                }
                return Ok(Seat { slot, owner_slot });
            }
            Ok(None) => depart(tables, geometry, slot),
            Err(refusal) => {
                depart(tables, geometry, slot);
                return Err(refusal);
            }
        }
    }
    Err(Refusal::TABLE_FULL)
}

/// Finds or makes the slot of a destination, with one more live claim. `None`: another processor was faster.
#[inline(always)]
fn enter_destination<T: Tables>(
    tables: &T,
    destination: &Destination,
    netns_cookie: u64,
) -> Result<Option<u32>, Refusal> {
    if let Some(slot) = tables.destination_slot(destination) {
        if !tables.arrive(slot) {
            return Ok(None);
        }
        if tables.destination_slot(destination) == Some(slot) {
            return Ok(Some(slot));
        }
        depart(tables, tables.geometry(), slot);
        return Ok(None);
    }
    tables.make_room(netns_cookie)?;
    let Some(slot) = tables.new_slot(template(destination), &destination.words()) else { return Ok(None) };
    if tables.insert_destination(destination, slot) {
        return Ok(Some(slot));
    }
    discard(tables, slot);
    Ok(None)
}

/// Finds or makes the slot of an owner, with one more live claim. `None`: another processor was faster.
#[inline(always)]
fn enter_owner<T: Tables>(tables: &T, owner: &Owner) -> Result<Option<u32>, Refusal> {
    if let Some(slot) = tables.owner_slot(owner) {
        if !tables.arrive(slot) {
            return Ok(None);
        }
        if tables.owner_slot(owner) == Some(slot) {
            return Ok(Some(slot));
        }
        depart(tables, tables.geometry(), slot);
        return Ok(None);
    }
    tables.make_room(owner.netns_cookie)?;
    let Some(slot) = tables.new_slot(TEMPLATE_EMPTY, &owner_key(owner)) else { return Ok(None) };
    if tables.insert_owner(owner, slot) {
        tables.extend_share(owner.netns_cookie);
        tables.fetch_add(tables.geometry().live(owner.slot), 1);
        return Ok(Some(slot));
    }
    discard(tables, slot);
    Ok(None)
}

/// Makes sure that a namespace may take one more slot, if need be by taking an idle one away.
///
/// A namespace has its share as long as its destinations use at most three times as many slots as are free: one that takes
/// all it can leaves a quarter of the table to others, two leave a sixteenth. Beyond its share it takes the place of its
/// own idle slots. So it is refused only for sockets that it holds itself.
///
/// # Errors
/// [`Refusal::SHARE`] beyond the share, if all its slots are in use; [`Refusal::TABLE_FULL`] if all slots are.
#[expect(clippy::cast_possible_truncation, reason = "slots are 32-bit numbers, kept in 64-bit words")]
#[inline(always)]
pub fn make_room<T: Tables + ?Sized>(tables: &T, netns_cookie: u64) -> Result<(), Refusal> {
    let free = tables.load(FREE_SLOTS);
    let in_share = 2 * tables.share(netns_cookie) < 3 * free;
    if in_share && free >= RESERVE {
        return Ok(());
    }
    let any = in_share || free == 0;
    let start = tables.fetch_add(CURSOR, u64::from(SAMPLE)) as u32;
    let mut search = Search {
        netns_cookie,
        any: u64::from(any),
        oldest: u64::MAX,
        start,
        checked: 0,
        found: 0,
        words: tables.geometry().words,
    };
    tables.search(&mut search);
    if search.found() != 0 && tables.evict(search.found()) || in_share && free > 0 {
        return Ok(());
    }
    Err(if any { Refusal::TABLE_FULL } else { Refusal::SHARE })
}

/// The search for the slot that was idle longest in a sample.
#[repr(C)]
#[derive(Debug)]
pub struct Search {
    netns_cookie: u64,
    /// 1: slots of every namespace, not only of this one.
    any: u64,
    /// The time when the slot that was found was last used.
    oldest: u64,
    start: u32,
    checked: u32,
    /// The result; 0: none.
    found: u32,
    /// As [`Geometry::words`], for [`Tables::search`] in the kernel.
    pub words: u32,
}

impl Search {
    /// Checks the next slot; returns whether the search ends.
    #[expect(clippy::cast_possible_truncation, reason = "slots are 32-bit numbers, kept in 64-bit words")]
    #[inline(always)]
    pub fn check<T: Tables + ?Sized>(&mut self, tables: &T) -> bool {
        let geometry = tables.geometry();
        let slots = (tables.load(ALL_SLOTS) as u32).max(FIRST_SLOT + 1) - FIRST_SLOT;
        let slot = FIRST_SLOT + self.start.wrapping_add(self.checked) % slots;
        self.checked += 1;
        if tables.load(geometry.slot(slot)) == SLOT_OPEN && tables.load(geometry.live(slot)) == 0 {
            let key = geometry.key(slot);
            let owner = tables.load(key + 2) & OWNER_KEY != 0;
            // Nothing depends on the slot of a destination without owners.
            let usable = !owner || self.any != 0 || tables.load(key) == self.netns_cookie;
            let used = if owner { tables.load(geometry.used(slot)) } else { 0 };
            if usable && used < self.oldest {
                self.oldest = used;
                self.found = slot;
            }
        }
        self.checked >= slots || self.checked >= SAMPLE && self.found != 0
    }

    /// Volatile: in the kernel, a callback has written it.
    #[inline(always)]
    fn found(&self) -> u32 {
        // SAFETY: an initialised field.
        unsafe { (&raw const self.found).read_volatile() }
    }
}

/// Closes a slot, for the only caller that may take it away then. `false`: it has a live claim, or another one closes it.
///
/// This closes the slot before it looks at the count; [`arrive`] counts before it looks at the state: one of them sees the
/// other.
#[inline(always)]
pub fn close<T: Tables + ?Sized>(tables: &T, slot: u32) -> bool {
    let (state, live) = (tables.geometry().slot(slot), tables.geometry().live(slot));
    if tables.load(live) != 0 || tables.load(state) != SLOT_OPEN {
        return false;
    }
    let before = tables.fetch_or(state, SLOT_CLOSED);
    if before == SLOT_OPEN && tables.load(live) == 0 {
        return true;
    }
    if before & SLOT_CLOSED == 0 {
        reopen(tables, slot);
    }
    false
}

/// Undoes [`close`].
#[inline(always)]
pub fn reopen<T: Tables + ?Sized>(tables: &T, slot: u32) {
    tables.fetch_and(tables.geometry().slot(slot), !SLOT_CLOSED);
}

/// Keeps a slot as it is, without a live claim, which would count for the quota. `false`: it is being taken away, or has
/// another key.
pub fn pin<T: Tables + ?Sized>(tables: &T, slot: u32, key: &[u64; 3]) -> bool {
    let before = tables.fetch_or(tables.geometry().slot(slot), SLOT_PINNED);
    if before & (SLOT_OPEN | SLOT_CLOSED) == SLOT_OPEN && has_key(tables, slot, key) {
        return true;
    }
    unpin(tables, slot);
    false
}

/// Undoes [`pin`].
pub fn unpin<T: Tables + ?Sized>(tables: &T, slot: u32) {
    tables.fetch_and(tables.geometry().slot(slot), !SLOT_PINNED);
}

/// Whether a slot, which does not change meanwhile, has this key.
#[must_use]
pub fn has_key<T: Tables + ?Sized>(tables: &T, slot: u32, key: &[u64; 3]) -> bool {
    key_of(tables, slot) == *key
}

#[inline(always)]
fn key_of<T: Tables + ?Sized>(tables: &T, slot: u32) -> [u64; 3] {
    let key = tables.geometry().key(slot);
    [tables.load(key), tables.load(key + 1), tables.load(key + 2)]
}

/// The key of an owner's slot.
#[inline(always)]
#[must_use]
pub const fn owner_key(owner: &Owner) -> [u64; 3] {
    [owner.netns_cookie, owner.slot as u64, OWNER_KEY]
}

/// Takes an idle slot out of its table and hands it back to the allocator; with an owner its destination, if that has no
/// other. `false`: it is in use.
///
/// Ports that are warm in it become free for every namespace.
#[inline(always)]
pub fn evict<T: Tables + ?Sized>(tables: &T, slot: u32) -> bool {
    let closed = close(tables, slot);
    if closed {
        take_away(tables, slot);
    }
    closed
}

/// [`evict`] for a slot that the caller has closed.
#[expect(clippy::cast_possible_truncation, reason = "slots are 32-bit numbers, kept in 64-bit words")]
#[inline(always)]
pub fn take_away<T: Tables + ?Sized>(tables: &T, slot: u32) {
    let key = key_of(tables, slot);
    if key[2] & OWNER_KEY == 0 {
        return remove(tables, slot, &Destination::from_words(key));
    }
    let (netns_cookie, destination) = (key[0], key[1] as u32);
    tables.remove_owner(&Owner { netns_cookie, slot: destination, padding: 0 });
    tables.reduce_share(netns_cookie);
    free_slot(tables, slot);
    depart(tables, tables.geometry(), destination);
    if close(tables, destination) {
        remove(tables, destination, &Destination::from_words(key_of(tables, destination)));
    }
}

/// Removes a destination whose slot is closed.
#[inline(always)]
fn remove<T: Tables + ?Sized>(tables: &T, slot: u32, destination: &Destination) {
    tables.remove_destination(destination);
    free_slot(tables, slot);
}

/// Undoes [`enter`], for a claim that failed.
#[inline(always)]
pub fn leave<T: Tables>(tables: &T, seat: Seat) {
    let geometry = tables.geometry();
    depart(tables, geometry, seat.owner_slot);
    depart(tables, geometry, seat.slot);
}

/// Takes any port: a warm one first, then one that has not been used lately. `fresh_first` turns that around.
///
/// # Errors
/// [`Refusal::EXHAUSTED`].
#[inline(always)]
pub fn claim<T: Tables>(tables: &T, seat: Seat, fresh_first: bool) -> Result<Claim, Refusal> {
    let geometry = tables.geometry();
    let random = tables.random();
    let (first, second) =
        if fresh_first { (seat.slot, seat.owner_slot) } else { (seat.owner_slot, seat.slot) };
    if let Some(index) = tables.claim(geometry.free(first), random) {
        return Ok(Claim { index, from: first });
    }
    match tables.claim(geometry.free(second), random) {
        Some(index) => Ok(Claim { index, from: second }),
        None => Err(Refusal::EXHAUSTED),
    }
}

/// Takes a random port for a socket that may send to every destination: a resolver relies on it (RFC 5452).
///
/// A namespace takes unused ports only until it has as many warm ones as are left for others, so that a program that
/// binds in a loop leaves ports to other namespaces. This compares within one word, chosen at random.
///
/// # Errors
/// [`Refusal::EXHAUSTED`].
#[inline(always)]
pub fn claim_random<T: Tables>(tables: &T, seat: Seat) -> Result<Claim, Refusal> {
    /// The ports of [`TEMPLATE_UDP_ANY`] are the highest eighth: the search starts there.
    const HIGHEST_EIGHTH: u32 = 7 << 29;
    let geometry = tables.geometry();
    let (unused, warm) = (geometry.free(seat.slot), geometry.free(seat.owner_slot));
    let random = tables.random() | HIGHEST_EIGHTH;
    let Some(index) = tables.claim(unused, random) else {
        let index = tables.claim(warm, random).ok_or(Refusal::EXHAUSTED)?;
        return Ok(Claim { index, from: seat.owner_slot });
    };
    let claim = Claim { index, from: seat.slot };
    let word = index >> 6;
    let own = tables.load(warm.word(word));
    if bitmap::count(own) > bitmap::count(tables.load(unused.word(word))) {
        let turn = tables.random() & 63;
        let index = (word << 6) + ((bitmap::lowest(own.rotate_right(turn)) + turn) & 63);
        if bitmap::take(tables, warm, index) {
            unclaim(tables, seat.owner_slot, claim);
            return Ok(Claim { index, from: seat.owner_slot });
        }
    }
    Ok(claim)
}

/// Takes this very port if it is warm with the namespace or free for everybody.
///
/// # Errors
/// [`Refusal::TAKEN`].
#[inline(always)]
pub fn claim_exact<T: Tables + ?Sized>(tables: &T, seat: Seat, index: u32) -> Result<Claim, Refusal> {
    let geometry = tables.geometry();
    if bitmap::take(tables, geometry.free(seat.owner_slot), index) {
        Ok(Claim { index, from: seat.owner_slot })
    } else if bitmap::take(tables, geometry.free(seat.slot), index) {
        Ok(Claim { index, from: seat.slot })
    } else {
        Err(Refusal::TAKEN)
    }
}

/// Whether a port was given back so lately that its connection may still have something to send.
#[inline(always)]
pub fn settling<T: Tables>(tables: &T, seat: Seat, claim: Claim) -> bool {
    let then = tables.load(tables.geometry().closing(seat.owner_slot, claim.index));
    let now = closing(tables, claim.index);
    let same_port = (then ^ now) & 0xffff == 0;
    let same_processor =
        ((then ^ now) >> 16) & u64::from(NO_PROCESSOR) == 0 && tables.processor() != NO_PROCESSOR;
    // 38 bits of microseconds wrap around after three days.
    let age = (now >> 26).wrapping_sub(then >> 26) & ((1 << 38) - 1);
    same_port && !same_processor && age < SETTLING_US
}

/// Puts a port that was never used back to where it came from. The seat, of which this wants the slot of the namespace,
/// stays.
#[inline(always)]
pub fn unclaim<T: Tables>(tables: &T, owner_slot: u32, claim: Claim) {
    touch(tables, owner_slot, claim.index);
    bitmap::free(tables, tables.geometry().free(claim.from), claim.index);
}

/// Notes that a port was given back, for the sweep and for the search for ports that got lost.
#[inline(always)]
fn touch<T: Tables>(tables: &T, owner_slot: u32, index: u32) {
    tables.fetch_or(tables.geometry().touched(owner_slot) + (index >> 6), 1 << (index & 63));
}

/// Gives a used port back: it is warm from now on, unless it has left the pool meanwhile. The seat ends.
#[inline(always)]
pub fn release<T: Tables>(tables: &T, seat: Seat, index: u32) {
    let geometry = tables.geometry();
    tables.store(geometry.closing(seat.owner_slot, index), closing(tables, index));
    // First touched, then free: a sweep that finds the port free finds it touched as well.
    touch(tables, seat.owner_slot, index);
    if bitmap::is_free(tables, geometry.free(TEMPLATE_TCP), index) {
        bitmap::free(tables, geometry.free(seat.owner_slot), index);
    }
    tables.store(geometry.used(seat.owner_slot), tables.now());
    leave(tables, seat);
}

/// Counts one more live claim, unless the slot is being taken away.
#[inline(always)]
pub fn arrive<T: Tables + ?Sized>(tables: &T, slot: u32) -> bool {
    let geometry = tables.geometry();
    tables.fetch_add(geometry.live(slot), 1);
    if tables.load(geometry.slot(slot)) & (SLOT_OPEN | SLOT_CLOSED) == SLOT_OPEN {
        return true;
    }
    depart(tables, geometry, slot);
    false
}

/// Undoes [`arrive`].
#[inline(always)]
pub fn depart<T: Tables + ?Sized>(tables: &T, geometry: Geometry, slot: u32) {
    tables.fetch_add(geometry.live(slot), u64::MAX);
}

/// Takes an unused slot that begins with the free ports of a template and has one live claim. `None`: there is none.
#[inline(always)]
pub fn new_slot<T: Tables + ?Sized>(tables: &T, template: u32, key: &[u64; 3]) -> Option<u32> {
    let geometry = tables.geometry();
    let slot = tables.claim(ALLOCATOR, tables.random())?;
    tables.fetch_add(FREE_SLOTS, u64::MAX);
    tables.fill(slot, template);
    tables.store(geometry.key(slot), key[0]);
    tables.store(geometry.key(slot) + 1, key[1]);
    tables.store(geometry.key(slot) + 2, key[2]);
    tables.store(geometry.used(slot), tables.now());
    // Added: a hook with an earlier look-up of this slot may be counting, and finds that it came too late.
    tables.fetch_add(geometry.live(slot), 1);
    tables.fetch_or(geometry.slot(slot), SLOT_OPEN);
    Some(slot)
}

/// Hands a slot back that never was in a table, with its live claim.
#[inline(always)]
fn discard<T: Tables + ?Sized>(tables: &T, slot: u32) {
    free_slot(tables, slot);
    depart(tables, tables.geometry(), slot);
}

/// Hands a slot that no table mentions back to the allocator.
#[inline(always)]
pub fn free_slot<T: Tables + ?Sized>(tables: &T, slot: u32) {
    tables.fetch_and(tables.geometry().slot(slot), 0);
    if bitmap::free(tables, ALLOCATOR, slot) {
        tables.fetch_add(FREE_SLOTS, 1);
    }
}
