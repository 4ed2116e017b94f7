//! Room for one more destination or namespace: slots that are idle are taken away.

use super::slots::{Tables, depart, free_slot, template};
use super::{
    ALL_SLOTS, CURSOR, Destination, FIRST_SLOT, FREE_SLOTS, MAX_WORDS, Owner, Refusal, SLOT_CLOSED,
    SLOT_OPEN, SLOT_PINNED, shares,
};

/// With fewer free slots than this, a namespace within its share takes idle slots of any other.
const RESERVE: u64 = 64;

/// Slots that a search for an idle slot checks if it finds one among them.
const SAMPLE: u32 = 64;
/// Slots that it checks at most.
pub const MAX_SAMPLE: u32 = 4096;

/// Marks the third word of the key of an owner slot, whose other bits name the group that made it; that of a destination is
/// below.
pub(super) const OWNER_KEY: u64 = 1 << 63;

/// Makes sure that a client may take one more slot, if need be by taking an idle one away. Group 0: unknown.
///
/// A namespace has its share as long as its destinations use at most three times as many slots as are free: one that takes
/// all it can leaves a quarter of the table to others, two leave a sixteenth; all namespaces of a group together leave a
/// sixteenth. Beyond its share it takes the place of its own idle slots. So it is refused only for sockets that it holds
/// itself.
///
/// # Errors
/// [`Refusal::SHARE`] beyond the share, if all its slots are in use; [`Refusal::TABLE_FULL`] if all slots are.
#[inline(always)]
pub fn make_room<T: Tables + ?Sized>(tables: &T, netns_cookie: u64, group: u64) -> Result<(), Refusal> {
    let Room { evictable, refusal } = tables.find_room(netns_cookie, group);
    // One of the last free slots is kept, if this works.
    let evicted = evictable != 0 && tables.evict(evictable);
    if evicted || refusal == 0 { Ok(()) } else { Err(Refusal(refusal)) }
}

/// The result of [`find_room`].
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// A slot that may be taken away; 0: none.
    pub evictable: u32,
    /// The [`Refusal`] if that fails; 0: there is a free slot.
    pub refusal: u32,
}

/// The first half of [`make_room`]; apart from the second, so that in the kernel its frame of the stack ends before that
/// begins.
#[expect(clippy::cast_possible_truncation, reason = "slots are 32-bit numbers, kept in 64-bit words")]
#[inline(always)]
pub fn find_room<T: Tables + ?Sized>(tables: &T, netns_cookie: u64, group: u64) -> Room {
    let free = tables.load(FREE_SLOTS);
    // Two slots for each destination.
    let namespace_in_share =
        shares::leaves_a_quarter(2 * tables.share(shares::namespace(netns_cookie)), free);
    let group_in_share =
        group == 0 || shares::leaves_a_sixteenth(2 * tables.share(shares::group(group)), free);
    let in_share = namespace_in_share && group_in_share;
    if in_share && free >= RESERVE {
        return Room { evictable: 0, refusal: 0 };
    }
    let any = in_share || free == 0;
    let start = tables.fetch_add(CURSOR, u64::from(SAMPLE)) as u32;
    let mut search = Search {
        netns_cookie,
        group: if namespace_in_share { group } else { 0 },
        any: u64::from(any),
        oldest: u64::MAX,
        start,
        checked: 0,
        found: 0,
        words: tables.geometry().words,
    };
    tables.search(&mut search);
    let refusal = match (in_share && free > 0, any) {
        (true, _) => 0,
        (false, true) => Refusal::TABLE_FULL.0,
        (false, false) => Refusal::SHARE.0,
    };
    Room { evictable: search.found(), refusal }
}

/// The search for the slot that was idle longest in a sample.
#[repr(C)]
#[derive(Debug)]
pub struct Search {
    netns_cookie: u64,
    /// Slots of every namespace of this group are usable; 0: only those of this namespace.
    group: u64,
    /// 1: slots of every client.
    any: u64,
    /// The time when the slot that was found was last used.
    oldest: u64,
    start: u32,
    checked: u32,
    /// The result; 0: none.
    found: u32,
    /// As [`super::Geometry::words`], for [`Tables::search`] in the kernel.
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
            let third = tables.load(key + 2);
            let owner = third & OWNER_KEY != 0;
            let of_group = self.group != 0 && third == OWNER_KEY | self.group;
            // Nothing depends on the slot of a destination without owners.
            let usable = !owner || self.any != 0 || of_group || tables.load(key) == self.netns_cookie;
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

/// Whether a slot, which does not change meanwhile, has this key, whichever group made it.
#[must_use]
pub fn has_key<T: Tables + ?Sized>(tables: &T, slot: u32, key: &[u64; 3]) -> bool {
    let found = key_of(tables, slot);
    let compared = if key[2] & OWNER_KEY == 0 { u64::MAX } else { OWNER_KEY };
    found[0] == key[0] && found[1] == key[1] && (found[2] ^ key[2]) & compared == 0
}

#[inline(always)]
fn key_of<T: Tables + ?Sized>(tables: &T, slot: u32) -> [u64; 3] {
    let key = tables.geometry().key(slot);
    [tables.load(key), tables.load(key + 1), tables.load(key + 2)]
}

/// The key of an owner's slot that a group made.
#[inline(always)]
#[must_use]
pub const fn owner_key(owner: &Owner, group: u64) -> [u64; 3] {
    [owner.netns_cookie, owner.slot as u64, OWNER_KEY | group]
}

/// The group that made the slot of an owner.
#[inline(always)]
pub fn group_of<T: Tables + ?Sized>(tables: &T, owner_slot: u32) -> u64 {
    tables.load(tables.geometry().key(owner_slot) + 2) & !OWNER_KEY
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
    let (netns_cookie, destination, group) = (key[0], key[1] as u32, key[2] & !OWNER_KEY);
    tables.remove_owner(&Owner { netns_cookie, slot: destination, padding: 0 });
    tables.reduce_share(shares::ALL_DESTINATIONS, 1);
    tables.reduce_share(shares::namespace(netns_cookie), 1);
    tables.reduce_share(shares::group(group), 1);
    tables.free_warm(slot, destination);
    let owned = tables.load(tables.geometry().owned(slot));
    tables.reduce_share(shares::ports(group, destination), owned);
    tables.reduce_share(shares::all_ports(destination), owned);
    free_slot(tables, slot);
    // The slot keeps its key while the owner counts in it; after `depart`, another caller may evict it, and `new_slot` reuse it.
    let known = key_of(tables, destination);
    depart(tables, tables.geometry(), destination);
    if close(tables, destination) {
        if key_of(tables, destination) == known {
            remove(tables, destination, &Destination::from_words(known));
        } else {
            reopen(tables, destination);
        }
    }
}

/// Makes the warm ports of an owner's slot, which the caller has closed, free for every namespace at its destination, as far as they
/// are in the pool.
#[inline(always)]
pub fn free_warm<T: Tables + ?Sized>(tables: &T, slot: u32, destination: u32) {
    let geometry = tables.geometry();
    let warm = geometry.free(slot);
    let mut group = 0;
    while group < MAX_WORDS / 64 {
        if group >= warm.summary {
            break;
        }
        if tables.load(warm.at + group) != 0 {
            tables.free_warm_group(slot, destination, group);
        }
        group += 1;
    }
}

/// [`free_warm`] for the words of one summary word.
#[inline(always)]
pub fn free_warm_group<T: Tables + ?Sized>(tables: &T, slot: u32, destination: u32, group: u32) {
    let geometry = tables.geometry();
    let template = template(&Destination::from_words(key_of(tables, destination)));
    let (warm, free) = (geometry.free(slot), geometry.free(destination));
    let mut at = 0;
    while at < 64 {
        let word = group * 64 + at;
        if word >= geometry.words {
            break;
        }
        // Taken away here before it is set there.
        let ports = tables.fetch_and(warm.word(word), 0) & tables.load(geometry.free(template).word(word));
        if ports != 0 {
            tables.fetch_or(free.word(word), ports);
            tables.fetch_or(free.at + group, 1 << at);
        }
        at += 1;
    }
}

/// Removes a destination whose slot is closed.
#[inline(always)]
fn remove<T: Tables + ?Sized>(tables: &T, slot: u32, destination: &Destination) {
    tables.remove_destination(destination);
    free_slot(tables, slot);
}
