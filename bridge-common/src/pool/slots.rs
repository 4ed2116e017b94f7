//! Claiming and giving back ports: the code that the connect hooks and the agent share.
//!
//! A port is free in exactly one place: the destination's slot, or the slot of one namespace (warm), or nowhere while a
//! socket or a lease holds it. Moving it is taking its bit away in one place before setting it in another, so it can
//! never be held twice.

use super::bitmap::{self, Bitmap, Memory};
use super::{
    ALLOCATOR, Destination, FREE_SLOTS, Geometry, Owner, Refusal, SLOT_OPEN, TEMPLATE_EMPTY, TEMPLATE_TCP,
    TEMPLATE_UDP, TEMPLATE_UDP_ANY, UDP,
};

/// How often a claim is tried again when the agent takes a slot away under its hands. Slots are taken away only when
/// they have been idle for minutes.
const ENTER_TRIES: u32 = 3;

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
    fn new_slot(&self, template: u32) -> Option<u32> {
        new_slot(self, template)
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
    if destination.protocol() != UDP {
        TEMPLATE_TCP
    } else if destination.port() == 0 {
        TEMPLATE_UDP_ANY
    } else {
        TEMPLATE_UDP
    }
}

/// Finds or makes the slots of a destination and a namespace, and counts one live claim in both.
///
/// # Errors
/// [`Refusal::TABLE_FULL`] if no slot is left, [`Refusal::SHARE`] if the namespace must leave the rest to others (see
/// [`may_extend`]), [`Refusal::QUOTA`] if the namespace has `quota` live claims already
/// (0: no limit).
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
        let known = tables.destination_slot(destination);
        if known.is_none() {
            may_extend(tables, netns_cookie)?;
        }
        let Some(slot) = known.or_else(|| new_destination(tables, destination)) else { continue };
        if !tables.arrive(slot) {
            continue;
        }
        let owner = Owner { netns_cookie, slot, reserved: 0 };
        let known = tables.owner_slot(&owner);
        if known.is_none()
            && let Err(refusal) = may_extend(tables, netns_cookie)
        {
            depart(tables, geometry, slot);
            return Err(refusal);
        }
        if let Some(owner_slot) = known.or_else(|| new_owner(tables, &owner))
            && tables.arrive(owner_slot)
        {
            if quota != 0 && tables.load(geometry.live(owner_slot)) > u64::from(quota) {
                leave(tables, Seat { slot, owner_slot });
                return Err(Refusal::QUOTA);
            }
            return Ok(Seat { slot, owner_slot });
        }
        depart(tables, geometry, slot);
    }
    Err(Refusal::TABLE_FULL)
}

/// Whether a namespace may have slots for one more destination.
///
/// It may while it has at most half as many destinations as there are free slots. One that takes all it can leaves half of
/// the table to others, two leave a quarter: however many destinations a pod connects to, another finds slots.
///
/// # Errors
/// [`Refusal::SHARE`], or [`Refusal::TABLE_FULL`] if there is no free slot.
#[inline(always)]
fn may_extend<T: Tables>(tables: &T, netns_cookie: u64) -> Result<(), Refusal> {
    let free = tables.load(FREE_SLOTS);
    if free == 0 {
        return Err(Refusal::TABLE_FULL);
    }
    if 2 * tables.share(netns_cookie) < free { Ok(()) } else { Err(Refusal::SHARE) }
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
    leave(tables, seat);
}

/// Counts one more live claim, unless the slot is being taken away.
///
/// The agent closes a slot before it looks at the count; this counts before it looks at the state: one of them sees the
/// other.
#[inline(always)]
pub fn arrive<T: Tables + ?Sized>(tables: &T, slot: u32) -> bool {
    let geometry = tables.geometry();
    tables.fetch_add(geometry.live(slot), 1);
    if tables.load(geometry.slot(slot)) == SLOT_OPEN {
        return true;
    }
    depart(tables, geometry, slot);
    false
}

#[inline(always)]
fn depart<T: Tables + ?Sized>(tables: &T, geometry: Geometry, slot: u32) {
    tables.fetch_add(geometry.live(slot), u64::MAX);
}

#[inline(always)]
fn new_destination<T: Tables>(tables: &T, destination: &Destination) -> Option<u32> {
    let slot = tables.new_slot(template(destination))?;
    if tables.insert_destination(destination, slot) {
        return Some(slot);
    }
    free_slot(tables, slot);
    tables.destination_slot(destination)
}

#[inline(always)]
fn new_owner<T: Tables>(tables: &T, owner: &Owner) -> Option<u32> {
    let slot = tables.new_slot(TEMPLATE_EMPTY)?;
    if tables.insert_owner(owner, slot) {
        tables.extend_share(owner.netns_cookie);
        return Some(slot);
    }
    free_slot(tables, slot);
    tables.owner_slot(owner)
}

/// Takes an unused slot that begins with the free ports of a template. `None`: there is none.
#[inline(always)]
pub fn new_slot<T: Tables + ?Sized>(tables: &T, template: u32) -> Option<u32> {
    let geometry = tables.geometry();
    let slot = tables.claim(ALLOCATOR, tables.random())?;
    tables.fetch_add(FREE_SLOTS, u64::MAX);
    tables.fill(slot, template);
    tables.store(geometry.live(slot), 0);
    tables.fetch_and(geometry.slot(slot), 0);
    tables.fetch_or(geometry.slot(slot), SLOT_OPEN);
    Some(slot)
}

/// Hands a slot that no table mentions back to the allocator.
#[inline(always)]
pub fn free_slot<T: Tables>(tables: &T, slot: u32) {
    tables.fetch_and(tables.geometry().slot(slot), 0);
    if bitmap::free(tables, ALLOCATOR, slot) {
        tables.fetch_add(FREE_SLOTS, 1);
    }
}
