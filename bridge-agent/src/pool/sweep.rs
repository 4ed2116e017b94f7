//! Periodic work of the agent in the pool: warm ports that conntrack has forgotten become free for all, lost ports are
//! found, unused slots are taken back.
//!
//! The hooks go on meanwhile. Why nothing is found that is not lost: a port is missing if no socket held it, and then no
//! place had it free. One that was merely on its way at that moment is held by a socket from then on, or has been given
//! back since, which leaves a mark. A port is lost only if it is missing twice in a row without that mark.
//!
//! A lost port's seat ends with it, if its owner is known. Marks are collected before the owners are looked up, so that
//! a mark ends the knowledge of earlier rounds about a port, and not that of this one: a port that was given back and
//! then
//! left the pool with a reload is nowhere as well when it comes back, but its seat has ended.

use std::collections::{HashMap, HashSet};

use bridge_common::pool::{
    Destination, FREE_SLOTS, Owner, SLOT_OPEN, bitmap,
    slots::{self, Seat, Tables},
};

use super::Layout;

/// Result of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Warm ports that became free for everybody.
    pub cooled: u32,
    /// Idle warm ports that conntrack still knows.
    pub kept: u32,
    /// Lost ports that became free again.
    pub recovered: u32,
    /// Slots taken back.
    pub retired: u32,
}

/// The pool as one round sees it.
#[derive(Debug)]
pub struct View<'a> {
    /// Marks that [`marks`] collected before any other look-up.
    pub touched: &'a HashSet<(u32, u32)>,
    /// Every port (slot of the destination, index) that a socket or a lease of the agent holds, and the owner's slot;
    /// looked up before the rest.
    pub held: &'a HashMap<(u32, u32), u32>,
    /// Every destination and its slot.
    pub destinations: &'a [(Destination, u32)],
    /// Every owner and its slot.
    pub owners: &'a [(Owner, u32)],
}

/// State from one round to the next.
#[derive(Debug, Default)]
pub struct Sweeper {
    /// With their destinations: a slot may serve another one by the next round.
    missing: HashMap<(u32, u32), Destination>,
    /// The owner's slot of ports that were held in an earlier round, as long as they are held or missing.
    holders: HashMap<(u32, u32), u32>,
}

impl Sweeper {
    /// One round. `known` says whether conntrack still has the tuple of a destination and a port (host byte order).
    /// Rounds lie at least a second apart, better as much as conntrack remembers a closed connection (120 s).
    pub fn round<T: Tables>(
        &mut self,
        tables: &T,
        layout: &Layout,
        view: &View<'_>,
        mut known: impl FnMut(&Destination, u16) -> bool,
    ) -> Swept {
        let mut swept = Swept::default();
        let destinations: HashMap<u32, &Destination> =
            view.destinations.iter().map(|(d, slot)| (*slot, d)).collect();
        let touched = view.touched;
        for (owner, owner_slot) in view.owners {
            if let Some(destination) = destinations.get(&owner.slot)
                && let Some(_pins) = Pins::of(tables, destination, owner, *owner_slot)
            {
                let mut cooling = Cooling { tables, layout, swept: &mut swept, touched };
                cooling.owner(owner, *owner_slot, destination, &mut known);
            }
        }
        self.holders.retain(|port, _| !touched.contains(port));
        let owner_slots = owner_slots(view);
        let missing = missing(tables, layout, view, &owner_slots);
        for &(slot, index) in &missing {
            let marked = || {
                // Since the marks were collected.
                let mut places = owner_slots.get(&slot).into_iter().flatten();
                places.any(|place| {
                    tables.load(layout.geometry().touched(*place) + index / 64) & (1 << (index % 64)) != 0
                })
            };
            let destination = destinations[&slot];
            let again = self.missing.get(&(slot, index)) == Some(destination);
            let lost = again && !touched.contains(&(slot, index)) && !marked();
            if lost
                && !known(destination, layout.port(index))
                && slots::pin(tables, slot, &destination.words())
            {
                bitmap::free(tables, layout.geometry().free(slot), index);
                if let Some(&owner_slot) = self.holders.get(&(slot, index)) {
                    let seat = Seat { slot, owner_slot };
                    slots::disown(tables, seat);
                    slots::leave(tables, seat);
                }
                slots::unpin(tables, slot);
                swept.recovered += 1;
            }
        }
        self.holders.retain(|port, _| missing.contains(port));
        self.holders.extend(view.held);
        self.missing = missing.iter().map(|port| (*port, *destinations[&port.0])).collect();
        swept.retired = retire(tables, view);
        swept
    }
}

/// Takes up the marks of ports that were given back since this was done last: slots of destinations and indexes.
pub fn marks<T: Tables>(tables: &T, owners: &[(Owner, u32)]) -> HashSet<(u32, u32)> {
    let geometry = tables.geometry();
    let mut marks = HashSet::new();
    for (owner, owner_slot) in owners {
        if !slots::pin(tables, *owner_slot, &slots::owner_key(owner, 0)) {
            continue;
        }
        for word in 0..geometry.words {
            let touched = tables.fetch_and(geometry.touched(*owner_slot) + word, 0);
            marks.extend(bits(touched).map(|bit| (owner.slot, word * 64 + bit)));
        }
        slots::unpin(tables, *owner_slot);
    }
    marks
}

/// Keeps the slots of an owner and its destination as they are.
struct Pins<'a, T: Tables> {
    tables: &'a T,
    slots: [u32; 2],
}

impl<'a, T: Tables> Pins<'a, T> {
    /// `None`: one of them has been taken away.
    fn of(tables: &'a T, destination: &Destination, owner: &Owner, owner_slot: u32) -> Option<Self> {
        if !slots::pin(tables, owner.slot, &destination.words()) {
            return None;
        }
        if !slots::pin(tables, owner_slot, &slots::owner_key(owner, 0)) {
            slots::unpin(tables, owner.slot);
            return None;
        }
        Some(Self { tables, slots: [owner.slot, owner_slot] })
    }
}

impl<T: Tables> Drop for Pins<'_, T> {
    fn drop(&mut self) {
        self.slots.iter().for_each(|slot| slots::unpin(self.tables, *slot));
    }
}

struct Cooling<'a, T> {
    tables: &'a T,
    layout: &'a Layout,
    swept: &'a mut Swept,
    touched: &'a HashSet<(u32, u32)>,
}

impl<T: Tables> Cooling<'_, T> {
    /// Frees the ports that were warm, and not touched, for a whole round.
    fn owner(
        &mut self,
        owner: &Owner,
        owner_slot: u32,
        destination: &Destination,
        known: &mut impl FnMut(&Destination, u16) -> bool,
    ) {
        let (tables, geometry) = (self.tables, self.layout.geometry());
        let template = self.layout.template(slots::template(destination));
        let (warm, free) = (geometry.free(owner_slot), geometry.free(owner.slot));
        for word in 0..geometry.words {
            for bit in bits(tables.load(warm.word(word))) {
                let (index, mask) = (word * 64 + bit, 1 << bit);
                if self.touched.contains(&(owner.slot, index)) {
                    continue;
                }
                if known(destination, self.layout.port(index)) {
                    self.swept.kept += 1;
                    continue;
                }
                if !bitmap::take(tables, warm, index) {
                    continue;
                }
                if tables.load(geometry.touched(owner_slot) + word) & mask != 0 {
                    // It was claimed and given back after the marks were collected.
                    bitmap::free(tables, warm, index);
                    continue;
                }
                slots::disown(tables, Seat { slot: owner.slot, owner_slot });
                if template.contains(self.layout.port(index)) {
                    bitmap::free(tables, free, index);
                    self.swept.cooled += 1;
                }
            }
        }
    }
}

/// The slots of the owners at each destination.
fn owner_slots(view: &View<'_>) -> HashMap<u32, Vec<u32>> {
    let mut owner_slots: HashMap<u32, Vec<u32>> = HashMap::new();
    for (owner, slot) in view.owners {
        owner_slots.entry(owner.slot).or_default().push(*slot);
    }
    owner_slots
}

/// The ports that are nowhere: not held, not free, not warm.
fn missing<T: Tables>(
    tables: &T,
    layout: &Layout,
    view: &View<'_>,
    owner_slots: &HashMap<u32, Vec<u32>>,
) -> HashSet<(u32, u32)> {
    let geometry = layout.geometry();
    let mut missing = HashSet::new();
    for (destination, slot) in view.destinations {
        let template = layout.template(slots::template(destination));
        for word in 0..geometry.words {
            let wanted = template.word((layout.config.base / 64 + word) as usize);
            let places = owner_slots.get(slot).into_iter().flatten().chain([slot]);
            let somewhere = places.fold(0, |all, place| all | tables.load(geometry.free(*place).word(word)));
            let nowhere = bits(wanted & !somewhere).map(|bit| (*slot, word * 64 + bit));
            missing.extend(nowhere.filter(|port| !view.held.contains_key(port)));
        }
    }
    missing
}

/// The ports that a destination of this protocol keeps from others: those that are not free there.
pub fn kept<T: Tables>(
    tables: &T,
    layout: &Layout,
    destinations: &[(Destination, u32)],
    protocol: u8,
) -> HashSet<u32> {
    let geometry = layout.geometry();
    let mut kept = HashSet::new();
    for (destination, slot) in destinations.iter().filter(|(to, _)| to.protocol() == protocol) {
        let template = geometry.free(slots::template(destination));
        for word in 0..geometry.words {
            let gone = tables.load(template.word(word)) & !tables.load(geometry.free(*slot).word(word));
            kept.extend(bits(gone).map(|bit| word * 64 + bit));
        }
    }
    kept
}

/// Takes back the slots of owners without a port, and of destinations without an owner.
fn retire<T: Tables>(tables: &T, view: &View<'_>) -> u32 {
    let geometry = tables.geometry();
    let before = tables.load(FREE_SLOTS);
    let retire = |slot: u32, key: &[u64; 3], idle: &dyn Fn() -> bool| {
        if !idle() || !slots::close(tables, slot) {
            return;
        }
        if idle() && slots::has_key(tables, slot, key) {
            slots::take_away(tables, slot);
        } else {
            slots::reopen(tables, slot);
        }
    };
    for (owner, slot) in view.owners {
        let idle = || (0..geometry.words).all(|word| tables.load(geometry.free(*slot).word(word)) == 0);
        retire(*slot, &slots::owner_key(owner, 0), &idle);
    }
    for (destination, slot) in view.destinations {
        retire(*slot, &destination.words(), &|| true);
    }
    u32::try_from(tables.load(FREE_SLOTS).saturating_sub(before)).unwrap_or(u32::MAX)
}

/// Repairs the leftovers of an earlier agent: slots that are closed and still in a table, since it ended in the middle of a
/// round, and counts of live claims below zero, since it ended seats twice.
pub fn repair<T: Tables>(
    tables: &T,
    held: &HashMap<(u32, u32), u32>,
    destinations: &[(Destination, u32)],
    owners: &[(Owner, u32)],
) {
    let mut seats: HashMap<u32, u64> = HashMap::new();
    for ((slot, _), owner_slot) in held {
        *seats.entry(*slot).or_default() += 1;
        *seats.entry(*owner_slot).or_default() += 1;
    }
    for (owner, _) in owners {
        *seats.entry(owner.slot).or_default() += 1;
    }
    let slots = destinations.iter().map(|(_, slot)| slot).chain(owners.iter().map(|(_, slot)| slot));
    for slot in slots {
        let (state, live) = (tables.geometry().slot(*slot), tables.geometry().live(*slot));
        if tables.load(state) & SLOT_OPEN != 0 {
            tables.fetch_and(state, SLOT_OPEN);
        }
        let count = tables.load(live);
        if count.cast_signed() < 0 {
            // Added, not written: hooks go on counting.
            tables.fetch_add(live, seats.get(slot).copied().unwrap_or(0).wrapping_sub(count));
        }
    }
}

fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        (word != 0).then(|| {
            let bit = word.trailing_zeros();
            word &= word - 1;
            bit
        })
    })
}
