//! Claiming and giving back ports: the code that the connect hooks and the agent share.
//!
//! A port is free in exactly one place: the destination's slot, or the slot of one namespace (warm), or nowhere while a
//! socket or a lease holds it. Moving it is taking its bit away in one place before setting it in another, so it can
//! never be held twice.

use super::bitmap::{self, Bitmap, Memory};
pub use super::room::{
    MAX_SAMPLE, Room, Search, close, evict, find_room, free_warm, free_warm_group, group_of, has_key,
    make_room, owner_key, pin, reopen, take_away, unpin,
};
use super::{
    ALLOCATOR, Destination, FREE_SLOTS, Geometry, Owner, Refusal, SLOT_CLOSED, SLOT_OPEN, TEMPLATE_EMPTY,
    TEMPLATE_TCP, TEMPLATE_UDP, TEMPLATE_UDP_ANY, shares,
};
use crate::protocol;

/// Number of tries of [`enter`] when a slot is taken away meanwhile.
const ENTER_TRIES: u32 = 4;

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
    /// The count under a key of [`shares`]; 0 if there is none.
    fn share(&self, key: u64) -> u64;
    /// Adds one to [`Tables::share`]; returns the former count.
    fn extend_share(&self, key: u64) -> u64;
    /// Subtracts from [`Tables::share`], if there is a count.
    fn reduce_share(&self, key: u64, n: u64);
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

    /// [`find_room`].
    fn find_room(&self, netns_cookie: u64, group: u64) -> Room {
        find_room(self, netns_cookie, group)
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

    /// [`free_warm`].
    fn free_warm(&self, slot: u32, destination: u32) {
        free_warm(self, slot, destination);
    }

    /// [`free_warm_group`].
    fn free_warm_group(&self, slot: u32, destination: u32, group: u32) {
        free_warm_group(self, slot, destination, group);
    }

    /// [`begin_fresh`].
    fn begin_fresh(&self, seat: Seat, quota: u32) -> bool {
        begin_fresh(self, seat, quota)
    }

    /// [`cancel_fresh`].
    fn cancel_fresh(&self, seat: Seat, quota: u32) {
        cancel_fresh(self, seat, quota);
    }

    /// [`claim_exact`].
    ///
    /// # Errors
    /// [`Refusal::TAKEN`] or [`Refusal::QUOTA`].
    fn claim_exact(&self, seat: Seat, quota: u32, index: u32) -> Result<Claim, Refusal> {
        claim_exact(self, seat, quota, index)
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
/// [`Refusal::SHARE`] or [`Refusal::TABLE_FULL`] as [`make_room`].
#[inline(always)]
pub fn enter<T: Tables>(
    tables: &T,
    destination: &Destination,
    netns_cookie: u64,
    group: u64,
) -> Result<Seat, Refusal> {
    let geometry = tables.geometry();
    let mut tries = 0;
    while tries < ENTER_TRIES {
        tries += 1;
        let Some(slot) = enter_destination(tables, destination, netns_cookie, group)? else { continue };
        let owner = Owner { netns_cookie, slot, padding: 0 };
        match enter_owner(tables, &owner, group) {
            Ok(Some(owner_slot)) => return Ok(Seat { slot, owner_slot }),
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
    group: u64,
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
    make_room(tables, netns_cookie, group)?;
    let Some(slot) = tables.new_slot(template(destination), &destination.words()) else { return Ok(None) };
    if tables.insert_destination(destination, slot) {
        return Ok(Some(slot));
    }
    discard(tables, slot);
    Ok(None)
}

/// Finds or makes the slot of an owner, with one more live claim. `None`: another processor was faster.
#[inline(always)]
fn enter_owner<T: Tables>(tables: &T, owner: &Owner, group: u64) -> Result<Option<u32>, Refusal> {
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
    make_room(tables, owner.netns_cookie, group)?;
    let Some(slot) = tables.new_slot(TEMPLATE_EMPTY, &owner_key(owner, group)) else { return Ok(None) };
    if tables.insert_owner(owner, slot) {
        tables.extend_share(shares::namespace(owner.netns_cookie));
        tables.extend_share(shares::group(group));
        tables.extend_share(shares::ALL_DESTINATIONS);
        tables.fetch_add(tables.geometry().live(owner.slot), 1);
        return Ok(Some(slot));
    }
    discard(tables, slot);
    Ok(None)
}

/// Undoes [`enter`], for a claim that failed.
#[inline(always)]
pub fn leave<T: Tables>(tables: &T, seat: Seat) {
    let geometry = tables.geometry();
    depart(tables, geometry, seat.owner_slot);
    depart(tables, geometry, seat.slot);
}

/// Takes any port: a warm one first, then one that has not been used lately. `fresh_first` turns that around. `quota` is
/// for [`claim_exact`], too.
///
/// # Errors
/// [`Refusal::EXHAUSTED`]; [`Refusal::QUOTA`] if the namespace keeps `quota` ports from others already, in use, warm or
/// resting, or all namespaces of its group twice as many (0: no limit); [`Refusal::SHARE`] beyond a [`shares::SHARE`].
#[inline(always)]
pub fn claim<T: Tables>(tables: &T, seat: Seat, quota: u32, fresh_first: bool) -> Result<Claim, Refusal> {
    let random = tables.random();
    let warm = tables.geometry().free(seat.owner_slot);
    if !fresh_first && let Some(index) = tables.claim(warm, random) {
        return Ok(Claim { index, from: seat.owner_slot });
    }
    let refusal = if tables.begin_fresh(seat, quota) {
        if let Some(index) = tables.claim(tables.geometry().free(seat.slot), random) {
            return Ok(Claim { index, from: seat.slot });
        }
        tables.cancel_fresh(seat, quota);
        Refusal::EXHAUSTED
    } else {
        over(quota)
    };
    if fresh_first && let Some(index) = tables.claim(warm, random) {
        return Ok(Claim { index, from: seat.owner_slot });
    }
    Err(refusal)
}

/// Why there is no port beyond a quota.
#[inline(always)]
const fn over(quota: u32) -> Refusal {
    if quota & shares::SHARE == 0 { Refusal::QUOTA } else { Refusal::SHARE }
}

/// Counts one more port that a namespace keeps from others. `false`: that is one too many.
#[inline(always)]
pub fn begin_fresh<T: Tables + ?Sized>(tables: &T, seat: Seat, quota: u32) -> bool {
    let owned = tables.geometry().owned(seat.owner_slot);
    let before = tables.fetch_add(owned, 1);
    // One below zero is an error of counting.
    let before = if before.cast_signed() < 0 { 0 } else { before };
    let limit = u64::from(quota);
    let granted = if quota & shares::SHARE != 0 {
        shares::take_port(tables, seat, quota, before)
    } else {
        let group = shares::ports(group_of(tables, seat.owner_slot), seat.slot);
        limit == 0 || before < limit && shares::take(tables, group, 2 * limit)
    };
    if !granted {
        tables.fetch_add(owned, u64::MAX);
    }
    granted
}

/// Undoes [`begin_fresh`].
#[inline(always)]
pub fn cancel_fresh<T: Tables + ?Sized>(tables: &T, seat: Seat, quota: u32) {
    tables.fetch_add(tables.geometry().owned(seat.owner_slot), u64::MAX);
    if quota != 0 {
        tables.reduce_share(shares::ports(group_of(tables, seat.owner_slot), seat.slot), 1);
    }
    if quota & shares::SHARE != 0 {
        tables.reduce_share(shares::all_ports(seat.slot), 1);
    }
}

/// Notes that a port of a namespace is free for everybody from now on, or nowhere.
pub fn disown<T: Tables + ?Sized>(tables: &T, seat: Seat) {
    let group = group_of(tables, seat.owner_slot);
    tables.fetch_add(tables.geometry().owned(seat.owner_slot), u64::MAX);
    tables.reduce_share(shares::ports(group, seat.slot), 1);
    tables.reduce_share(shares::all_ports(seat.slot), 1);
}

/// Takes a random port for a socket that may send to every destination: a resolver relies on it (RFC 5452). There are `all`
/// ports for such sockets.
///
/// A namespace takes unused ports only until it has as many warm ones as are left for others, so that a program that
/// binds in a loop leaves ports to other namespaces; this compares within one word, chosen at random. And it leaves a quarter
/// of them to others if it keeps its sockets, its group a sixteenth.
///
/// # Errors
/// [`Refusal::EXHAUSTED`], or [`Refusal::SHARE`].
#[inline(always)]
pub fn claim_random<T: Tables>(tables: &T, seat: Seat, all: u32) -> Result<Claim, Refusal> {
    /// The ports of [`TEMPLATE_UDP_ANY`] are the highest eighth: the search starts there.
    const HIGHEST_EIGHTH: u32 = 7 << 29;
    let geometry = tables.geometry();
    let (unused, warm) = (geometry.free(seat.slot), geometry.free(seat.owner_slot));
    let random = tables.random() | HIGHEST_EIGHTH;
    let group = shares::ports(group_of(tables, seat.owner_slot), seat.slot);
    let free = u64::from(all).saturating_sub(tables.share(shares::all_ports(seat.slot)));
    let in_share = shares::leaves_a_quarter(tables.load(geometry.owned(seat.owner_slot)), free)
        && shares::leaves_a_sixteenth(tables.share(group), free);
    let index = if in_share { tables.claim(unused, random) } else { None };
    let Some(index) = index else {
        let refusal = if in_share { Refusal::EXHAUSTED } else { Refusal::SHARE };
        let index = tables.claim(warm, random).ok_or(refusal)?;
        return Ok(Claim { index, from: seat.owner_slot });
    };
    let claim = Claim { index, from: seat.slot };
    let word = index >> 6;
    let own = tables.load(warm.word(word));
    if bitmap::count(own) > bitmap::count(tables.load(unused.word(word))) {
        let turn = tables.random() & 63;
        let index = (word << 6) + ((bitmap::lowest(own.rotate_right(turn)) + turn) & 63);
        if bitmap::take(tables, warm, index) {
            touch(tables, seat.owner_slot, claim.index);
            bitmap::free(tables, unused, claim.index);
            return Ok(Claim { index, from: seat.owner_slot });
        }
    }
    tables.fetch_add(geometry.owned(seat.owner_slot), 1);
    tables.extend_share(group);
    tables.extend_share(shares::all_ports(seat.slot));
    Ok(claim)
}

/// Takes this very port if it is warm with the namespace or free for everybody.
///
/// # Errors
/// [`Refusal::TAKEN`], or [`Refusal::QUOTA`] and [`Refusal::SHARE`] as [`claim`].
#[inline(always)]
pub fn claim_exact<T: Tables + ?Sized>(
    tables: &T,
    seat: Seat,
    quota: u32,
    index: u32,
) -> Result<Claim, Refusal> {
    let geometry = tables.geometry();
    if bitmap::take(tables, geometry.free(seat.owner_slot), index) {
        return Ok(Claim { index, from: seat.owner_slot });
    }
    if !bitmap::is_free(tables, geometry.free(seat.slot), index) {
        return Err(Refusal::TAKEN);
    }
    if !tables.begin_fresh(seat, quota) {
        return Err(over(quota));
    }
    if bitmap::take(tables, geometry.free(seat.slot), index) {
        return Ok(Claim { index, from: seat.slot });
    }
    tables.cancel_fresh(seat, quota);
    Err(Refusal::TAKEN)
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

/// Puts a port that was never used back to where it came from; the seat stays. `quota` as it was claimed with.
#[inline(always)]
pub fn unclaim<T: Tables>(tables: &T, seat: Seat, quota: u32, claim: Claim) {
    touch(tables, seat.owner_slot, claim.index);
    bitmap::free(tables, tables.geometry().free(claim.from), claim.index);
    if claim.from == seat.slot {
        tables.cancel_fresh(seat, quota);
    }
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
    } else {
        tables.fetch_add(geometry.owned(seat.owner_slot), u64::MAX);
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
    tables.store(geometry.owned(slot), 0);
    tables.store(geometry.resting(slot), 0);
    tables.store(geometry.searched(slot), 0);
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
