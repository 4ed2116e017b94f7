//! The pool's own code, in memory that no kernel knows of: whatever is asked for in whatever order, no port is ever held
//! twice, none gets lost, and none comes from outside.

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    sync::Mutex,
};

use bridge_common::pool::{
    self, Destination, Geometry, Owner, Refusal,
    bitmap::{self, Bitmap, Memory},
    shares,
    slots::{self, Seat, Tables},
};
use bridge_common::protocol;
use proptest::prelude::*;

use super::{
    Layout, Settings,
    layout::Occupied,
    sweep::{self, Sweeper, View},
    tables::lock,
    words::Words,
};
use crate::model::PortRange;

mod quota;

/// After 1 is subtracted from this word, another processor does this, once.
type Interruption = (u32, fn(&Private));

struct Private {
    geometry: Geometry,
    words: Words,
    destinations: Mutex<HashMap<Destination, u32>>,
    owners: Mutex<HashMap<Owner, u32>>,
    shares: Mutex<HashMap<u64, u64>>,
    processor: std::sync::atomic::AtomicU32,
    interruption: Mutex<Option<Interruption>>,
}

impl Private {
    fn new(layout: &Layout) -> Self {
        let words = Words::private(layout.geometry().total(layout.config.slots));
        layout.initialise(&words);
        let (destinations, owners, shares, processor, interruption) = Default::default();
        Self { geometry: layout.geometry(), words, destinations, owners, shares, processor, interruption }
    }

    fn sweep(&self, layout: &Layout, sweeper: &mut Sweeper, held: &[(u8, Seat, u32)]) -> sweep::Swept {
        let destinations: Vec<_> = lock(&self.destinations).iter().map(|(d, s)| (*d, *s)).collect();
        let owners: Vec<_> = lock(&self.owners).iter().map(|(o, s)| (*o, *s)).collect();
        let touched = sweep::marks(self, &owners);
        let held = held.iter().map(|(_, seat, index)| ((seat.slot, *index), seat.owner_slot)).collect();
        let view = View { touched: &touched, held: &held, destinations: &destinations, owners: &owners };
        sweeper.round(self, layout, &view, |_, _| false)
    }
}

impl Memory for Private {
    fn load(&self, at: u32) -> u64 {
        self.words.load(at)
    }
    fn store(&self, at: u32, value: u64) {
        self.words.store(at, value);
    }
    fn fetch_or(&self, at: u32, bits: u64) -> u64 {
        self.words.fetch_or(at, bits)
    }
    fn fetch_and(&self, at: u32, bits: u64) -> u64 {
        self.words.fetch_and(at, bits)
    }
    fn fetch_add(&self, at: u32, n: u64) -> u64 {
        let before = self.words.fetch_add(at, n);
        let interruption = lock(&self.interruption).take_if(|(word, _)| *word == at && n == u64::MAX);
        interruption.inspect(|(_, run)| run(self));
        before
    }
}

impl Tables for Private {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn destination_slot(&self, destination: &Destination) -> Option<u32> {
        lock(&self.destinations).get(destination).copied()
    }
    fn insert_destination(&self, destination: &Destination, slot: u32) -> bool {
        let mut map = lock(&self.destinations);
        !map.contains_key(destination) && map.insert(*destination, slot).is_none()
    }
    fn owner_slot(&self, owner: &Owner) -> Option<u32> {
        lock(&self.owners).get(owner).copied()
    }
    fn insert_owner(&self, owner: &Owner, slot: u32) -> bool {
        let mut map = lock(&self.owners);
        !map.contains_key(owner) && map.insert(*owner, slot).is_none()
    }
    fn share(&self, key: u64) -> u64 {
        shares::known(lock(&self.shares).get(&key).copied().unwrap_or(0))
    }
    fn extend_share(&self, key: u64) -> u64 {
        let mut shares = lock(&self.shares);
        let share = shares.entry(key).or_default();
        *share += 1;
        *share - 1
    }
    fn reduce_share(&self, key: u64, n: u64) {
        if let Some(share) = lock(&self.shares).get_mut(&key) {
            *share = share.wrapping_sub(n);
        }
    }
    fn remove_destination(&self, destination: &Destination) {
        lock(&self.destinations).remove(destination);
    }
    fn remove_owner(&self, owner: &Owner) {
        lock(&self.owners).remove(owner);
    }
    fn now(&self) -> u64 {
        crate::kernel::clock::monotonic_ns()
    }
    fn processor(&self) -> u32 {
        self.processor.load(std::sync::atomic::Ordering::SeqCst)
    }
    fn random(&self) -> u32 {
        thread_local!(static STATE: Cell<u32> = const { Cell::new(0x9e37_79b9) });
        STATE.with(|state| {
            let mut x = state.get();
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            state.set(x);
            x
        })
    }
}

fn layout(ports: &[(u16, u16)]) -> Layout {
    let ports = ports.iter().map(|&(first, last)| PortRange { first, last }).collect();
    Layout::plan(&Settings { ports, bind_udp: false, ..Settings::default() }, &Occupied::default()).unwrap()
}

fn destination(n: u8) -> Destination {
    Destination::from_network_v4([192, 168, 31, n], 443_u16.to_be_bytes(), protocol::TCP)
}

#[derive(Clone, Debug)]
enum Step {
    Claim {
        to: u8,
        by: u64,
    },
    Release(prop::sample::Index),
    /// A socket vanishes and its port is not given back.
    Lose(prop::sample::Index),
    Sweep,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3_u8, 1..4_u64).prop_map(|(to, by)| Step::Claim { to, by }),
        4 => any::<prop::sample::Index>().prop_map(Step::Release),
        1 => any::<prop::sample::Index>().prop_map(Step::Lose),
        1 => Just(Step::Sweep),
    ]
}

proptest! {
    #[test]
    fn no_port_is_held_twice_and_none_gets_lost(steps in prop::collection::vec(step(), 1..300)) {
        let layout = layout(&[(61003, 61010), (61060, 61070)]);
        let tables = Private::new(&layout);
        let mut sweeper = Sweeper::default();
        let mut held: Vec<(u8, Seat, u32)> = Vec::new();
        for step in steps {
            match step {
                Step::Claim { to, by } => {
                    let seat = slots::enter(&tables, &destination(to), by, 0).unwrap();
                    match slots::claim(&tables, seat, 0, false) {
                        Ok(claim) => {
                            prop_assert!(layout.ports.contains(layout.port(claim.index)));
                            prop_assert!(held.iter().all(|(d, _, i)| (*d, *i) != (to, claim.index)));
                            held.push((to, seat, claim.index));
                        }
                        Err(refusal) => {
                            prop_assert_eq!(refusal, Refusal::EXHAUSTED);
                            slots::leave(&tables, seat);
                        }
                    }
                }
                Step::Release(which) if !held.is_empty() => {
                    let (_, seat, index) = held.swap_remove(which.index(held.len()));
                    slots::release(&tables, seat, index);
                }
                Step::Lose(which) if !held.is_empty() => {
                    tables.sweep(&layout, &mut sweeper, &held);
                    held.swap_remove(which.index(held.len()));
                }
                Step::Sweep => {
                    tables.sweep(&layout, &mut sweeper, &held);
                }
                Step::Release(_) | Step::Lose(_) => {}
            }
        }
        // Afterwards everything comes back: two rounds find what is lost, one more cools what is warm.
        for (_, seat, index) in held {
            slots::release(&tables, seat, index);
        }
        for _ in 0..4 {
            tables.sweep(&layout, &mut sweeper, &[]);
        }
        prop_assert!(lock(&tables.owners).is_empty());
        prop_assert!(lock(&tables.destinations).is_empty());
        let free = (pool::FIRST_SLOT..layout.config.slots).filter(|slot| bitmap::is_free(&tables, pool::ALLOCATOR, *slot));
        let all = layout.config.slots - pool::FIRST_SLOT;
        prop_assert_eq!(free.count(), all as usize);
        prop_assert_eq!(tables.load(pool::FREE_SLOTS), u64::from(all));
    }

    #[test]
    fn every_free_bit_is_found_and_nothing_else(
        words in 1..1025_u32,
        bits in prop::collection::hash_set(0..65536_u32, 0..40),
        random: u32,
    ) {
        let map = Bitmap { at: 3, summary: words.div_ceil(64), words };
        let memory = Words::private(3 + map.summary + words);
        let mut bits: HashSet<_> = bits.into_iter().map(|bit| bit % (words * 64)).collect();
        for bit in &bits {
            prop_assert!(bitmap::free(&memory, map, *bit));
        }
        let mut random = random;
        while let Some(bit) = bitmap::claim(&memory, map, random) {
            prop_assert!(bits.remove(&bit));
            random = random.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f);
        }
        prop_assert!(bits.is_empty());
    }

    #[test]
    fn the_lowest_bit_is_found_without_a_branch(word in 1..u64::MAX) {
        prop_assert_eq!(bitmap::lowest(word), word.trailing_zeros());
    }
}

/// The live claims of a destination, with one for each owner, and of the namespace that made them.
fn live(tables: &Private, seat: Seat) -> [u64; 2] {
    [seat.slot, seat.owner_slot].map(|slot| tables.load(tables.geometry.live(slot)))
}

/// What a reload does to a port that is free or warm and leaves the pool.
fn withdraw(tables: &Private, seat: Seat, index: u32) {
    for place in [seat.slot, seat.owner_slot] {
        tables.fetch_and(tables.geometry.free(place).word(index / 64), !(1 << (index % 64)));
    }
}

#[test]
fn a_port_that_was_given_back_and_left_the_pool_for_a_while_is_not_given_back_twice() {
    let layout = layout(&[(61001, 61003)]);
    let (tables, mut sweeper) = (Private::new(&layout), Sweeper::default());
    let seat = slots::enter(&tables, &destination(1), 1, 0).unwrap();
    let index = slots::claim(&tables, seat, 0, false).unwrap().index;
    // Another one holds its seat all the time: no slot is taken back.
    let other = slots::enter(&tables, &destination(1), 1, 0).unwrap();
    tables.sweep(&layout, &mut sweeper, &[(1, seat, index)]);
    slots::release(&tables, seat, index);
    withdraw(&tables, seat, index);
    // By now it is back: a port that is nowhere.
    assert_eq!(tables.sweep(&layout, &mut sweeper, &[]).recovered, 0);
    assert_eq!(tables.sweep(&layout, &mut sweeper, &[]).recovered, 1);
    assert_eq!(live(&tables, other), [2, 1]);

    // Given back after it was seen to be held, within the round itself.
    let seat = slots::enter(&tables, &destination(1), 1, 0).unwrap();
    let index = slots::claim(&tables, seat, 0, false).unwrap().index;
    let (destinations, owners) = (
        [(destination(1), seat.slot)],
        [(Owner { netns_cookie: 1, slot: seat.slot, padding: 0 }, seat.owner_slot)],
    );
    let touched = sweep::marks(&tables, &owners);
    let held = HashMap::from([((seat.slot, index), seat.owner_slot)]);
    slots::release(&tables, seat, index);
    withdraw(&tables, seat, index);
    let view = View { touched: &touched, held: &held, destinations: &destinations, owners: &owners };
    sweeper.round(&tables, &layout, &view, |_, _| false);
    let recovered: u32 = (0..3).map(|_| tables.sweep(&layout, &mut sweeper, &[]).recovered).sum();
    assert_eq!((recovered, live(&tables, other)), (1, [2, 1]));
}

#[test]
fn the_seat_of_a_port_that_got_lost_ends_even_if_the_port_was_used_before() {
    let layout = layout(&[(61001, 61001)]);
    let (tables, mut sweeper) = (Private::new(&layout), Sweeper::default());
    let claim = || {
        let seat = slots::enter(&tables, &destination(1), 1, 0).unwrap();
        (seat, slots::claim(&tables, seat, 0, false).unwrap().index)
    };
    let (seat, index) = claim();
    slots::release(&tables, seat, index);
    let (seat, index) = claim();
    // Both the mark of the first and the hold of the second are seen in one round.
    tables.sweep(&layout, &mut sweeper, &[(1, seat, index)]);
    let recovered: u32 = (0..2).map(|_| tables.sweep(&layout, &mut sweeper, &[]).recovered).sum();
    // The owner is retired in the same round, and its destination with it.
    assert_eq!((recovered, live(&tables, seat)), (1, [0, 0]));
}

#[test]
fn a_count_below_zero_is_repaired_and_others_are_left_alone() {
    let layout = layout(&[(61001, 61003)]);
    let tables = Private::new(&layout);
    let claim = |to| {
        let seat = slots::enter(&tables, &destination(to), 1, 0).unwrap();
        (seat, slots::claim(&tables, seat, 0, false).unwrap().index)
    };
    let ((wrong, index), (right, _)) = (claim(1), claim(2));
    for _ in 0..5 {
        slots::leave(&tables, wrong);
    }
    assert_eq!(live(&tables, wrong).map(u64::cast_signed), [-3, -4]);
    let destinations: Vec<_> = lock(&tables.destinations).iter().map(|(d, s)| (*d, *s)).collect();
    let owners: Vec<_> = lock(&tables.owners).iter().map(|(o, s)| (*o, *s)).collect();
    let held = HashMap::from([((wrong.slot, index), wrong.owner_slot)]);
    sweep::repair(&tables, &held, &destinations, &owners);
    assert_eq!((live(&tables, wrong), live(&tables, right)), ([2, 1], [2, 1]));
}

#[test]
fn a_full_pool_says_so_and_a_warm_port_is_for_its_owner_only() {
    let layout = layout(&[(61001, 61003)]);
    let tables = Private::new(&layout);
    let (one, other) = (1, 2);
    let seat = || slots::enter(&tables, &destination(1), one, 0).unwrap();
    let held: Vec<_> =
        (0..3).map(|_| seat()).map(|s| (s, slots::claim(&tables, s, 0, false).unwrap())).collect();
    let late = slots::enter(&tables, &destination(1), other, 0).unwrap();
    assert_eq!(slots::claim(&tables, late, 0, false), Err(Refusal::EXHAUSTED));
    let (seat, claim) = held[1];
    slots::release(&tables, seat, claim.index);
    assert_eq!(slots::claim(&tables, late, 0, false), Err(Refusal::EXHAUSTED));
    assert_eq!(slots::claim_exact(&tables, late, 0, claim.index), Err(Refusal::TAKEN));
    let again = slots::enter(&tables, &destination(1), one, 0).unwrap();
    assert_eq!(slots::claim(&tables, again, 0, false).unwrap().index, claim.index);
    // Towards another destination all three are free.
    let elsewhere = slots::enter(&tables, &destination(2), other, 0).unwrap();
    assert!((0..3).all(|_| slots::claim(&tables, elsewhere, 0, false).is_ok()));
}

#[test]
fn a_namespace_leaves_slots_to_others_however_many_destinations_it_has() {
    let layout = layout(&[(1, 65535)]);
    let tables = Private::new(&layout);
    let many = |by| {
        let to = |n: u32| Destination::from_network_v4(n.to_be_bytes(), [1, 187], protocol::TCP);
        let entered =
            (1..u32::MAX).map(|n| slots::enter(&tables, &to(n << 8 | u32::try_from(by).unwrap()), by, 0));
        let mut count = 0_u32;
        for result in entered {
            match result {
                Ok(_) => count += 1,
                Err(refusal) => return (count, refusal),
            }
        }
        unreachable!("a table without an end")
    };
    let slots = layout.config.slots - pool::FIRST_SLOT;
    let (first, refusal) = many(1);
    assert_eq!(refusal, Refusal::SHARE);
    assert!(first.abs_diff(slots * 3 / 8) <= 1, "{first} destinations in {slots} slots");
    let (second, refusal) = many(2);
    assert_eq!(refusal, Refusal::SHARE);
    assert!(second.abs_diff(slots * 3 / 32) <= 1, "{second} destinations in {slots} slots");
    // Where it has slots already, it goes on.
    let known = Destination::from_network_v4((1 << 8 | 1_u32).to_be_bytes(), [1, 187], protocol::TCP);
    assert!(slots::enter(&tables, &known, 1, 0).is_ok());
    // A destination of another namespace needs slots, too.
    assert_eq!(slots::enter(&tables, &known, 2, 0), Err(Refusal::SHARE));
    assert!(slots::enter(&tables, &known, 3, 0).is_ok());
}

#[test]
fn many_namespaces_of_a_group_leave_slots_to_other_groups() {
    let layout = narrow(16_000);
    let tables = Private::new(&layout);
    let to = |n: u32| Destination::from_network_v4(n.to_be_bytes(), [1, 187], protocol::TCP);
    // Each of a thousand namespaces holds what it can get.
    let mut refused = 0;
    for netns in 1..=1000 {
        let mut held = (0..100_u32).map(|n| slots::enter(&tables, &to(netns * 1000 + n), netns.into(), 7));
        refused += u32::from(held.any(|result| result == Err(Refusal::SHARE)));
    }
    assert!(refused > 900, "{refused}");
    let free = tables.load(pool::FREE_SLOTS);
    assert!((999..=1001).contains(&free), "{free} of 16,000 slots are left");
    assert!((0..300).all(|n| slots::enter(&tables, &to(n), 2000, 8).is_ok()));
}

/// A pool with room for this number of slots.
fn narrow(slots: u32) -> Layout {
    let mut layout = layout(&[(61001, 61040)]);
    layout.config.slots = pool::FIRST_SLOT + slots;
    layout
}

#[test]
fn a_namespace_without_open_sockets_reaches_any_number_of_destinations() {
    let layout = narrow(1000);
    let tables = Private::new(&layout);
    let to = |n: u32| Destination::from_network_v4(n.to_be_bytes(), [1, 187], protocol::TCP);
    let connect = |by: u64, n: u32| {
        let seat = slots::enter(&tables, &to(n), by, 0).unwrap();
        let claim = slots::claim(&tables, seat, 0, false).unwrap();
        slots::release(&tables, seat, claim.index);
        claim.index
    };
    let port = connect(2, 1);
    for n in 0..20_000 {
        connect(1, 1000 + n);
    }
    assert!(
        tables.load(pool::FREE_SLOTS) >= 240,
        "{} slots are left to others",
        tables.load(pool::FREE_SLOTS)
    );
    assert_eq!(connect(2, 1), port, "the idle slots of another namespace stay");
    assert_eq!(
        tables.share(shares::namespace(1)),
        lock(&tables.owners).keys().filter(|owner| owner.netns_cookie == 1).count() as u64
    );
    // Held: now the share counts, and is given back with the sockets.
    let held: Vec<_> = (0..).map_while(|n| slots::enter(&tables, &to(5_000_000 + n), 1, 0).ok()).collect();
    assert!(held.len().abs_diff(1000 * 3 / 8) <= 2, "{} destinations", held.len());
    let more: Vec<_> = (0..10).map(|n| slots::enter(&tables, &to(n), 1, 0)).collect();
    assert!(more.iter().filter(|result| **result == Err(Refusal::SHARE)).count() >= 8, "{more:?}");
    assert_eq!(connect(2, 1), port);
    more.into_iter().flatten().for_each(|seat| slots::leave(&tables, seat));
    held.into_iter().for_each(|seat| slots::leave(&tables, seat));
    connect(1, 1);
}

#[test]
fn threads_that_take_slots_from_each_other_never_hold_the_same_port() {
    let layout = narrow(48);
    let tables = Private::new(&layout);
    let held: Vec<std::sync::atomic::AtomicBool> = (0..64 * 64).map(|_| Default::default()).collect();
    let working = std::sync::atomic::AtomicU32::new(4);
    let refused = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for owner in 1..=4_u64 {
            let (tables, held, working, refused) = (&tables, &held, &working, &refused);
            scope.spawn(move || {
                for turn in 0..30_000_u64 {
                    let to = u8::try_from((turn * 7 + owner * turn / 3) % 60).unwrap();
                    let Ok(seat) = slots::enter(tables, &destination(to), owner % 3, 0) else {
                        refused.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        continue;
                    };
                    let Ok(claim) = slots::claim(tables, seat, 0, false) else {
                        slots::leave(tables, seat);
                        continue;
                    };
                    let place = &held[usize::from(to) * 64 + claim.index as usize];
                    assert!(!place.swap(true, std::sync::atomic::Ordering::SeqCst));
                    place.store(false, std::sync::atomic::Ordering::SeqCst);
                    slots::release(tables, seat, claim.index);
                }
                working.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
            });
        }
        // The agent sweeps meanwhile. It cannot know what is held: nothing is lost, so nothing may be recovered.
        let mut sweeper = Sweeper::default();
        while working.load(std::sync::atomic::Ordering::SeqCst) > 0 {
            tables.sweep(&layout, &mut sweeper, &[]);
            sweeper = Sweeper::default();
        }
    });
    let refused = refused.into_inner();
    assert!(refused < 1_200, "{refused} of 120,000 were refused");
    // All slots come back, with their counts.
    let mut sweeper = Sweeper::default();
    for _ in 0..4 {
        tables.sweep(&layout, &mut sweeper, &[]);
    }
    assert_eq!(tables.load(pool::FREE_SLOTS), 48);
    let live = (pool::FIRST_SLOT..layout.config.slots).map(|slot| tables.load(tables.geometry.live(slot)));
    assert_eq!(live.sum::<u64>(), 0);
}

#[test]
fn a_slot_that_is_used_again_while_its_last_owner_goes_is_kept() {
    let tables = Private::new(&narrow(48));
    let seat = slots::enter(&tables, &destination(1), 1, 0).unwrap();
    slots::leave(&tables, seat);
    *lock(&tables.interruption) = Some((tables.geometry.live(seat.slot), |tables| {
        let slot = tables.destination_slot(&destination(1)).unwrap();
        assert!(slots::evict(tables, slot), "a destination without owners");
        let enter = || slots::enter(tables, &destination(2), 2, 0).inspect(|s| slots::leave(tables, *s));
        while enter().is_ok_and(|s| s.owner_slot != slot && slots::evict(tables, s.owner_slot)) {}
    }));
    assert!(slots::evict(&tables, seat.owner_slot));
    assert_eq!(tables.load(tables.geometry.slot(seat.slot)), pool::SLOT_OPEN, "it serves a namespace now");
}

#[test]
fn a_warm_port_that_conntrack_knows_stays_warm() {
    let layout = layout(&[(61001, 61001)]);
    let tables = Private::new(&layout);
    let seat = slots::enter(&tables, &destination(1), 1, 0).unwrap();
    let claim = slots::claim(&tables, seat, 0, false).unwrap();
    slots::release(&tables, seat, claim.index);
    let (destinations, owners) = (
        [(destination(1), seat.slot)],
        [(Owner { netns_cookie: 1, slot: seat.slot, padding: 0 }, seat.owner_slot)],
    );
    let mut sweeper = Sweeper::default();
    let mut round = |known: bool| {
        let (touched, held) = (&sweep::marks(&tables, &owners), &HashMap::new());
        let view = View { touched, held, destinations: &destinations, owners: &owners };
        sweeper.round(&tables, &layout, &view, |_, port| known && port == 61001)
    };
    assert_eq!(round(true).cooled, 0, "touched since the last round");
    assert_eq!(round(true).kept, 1);
    assert_eq!(round(false).cooled, 1);
    assert!(bitmap::is_free(&tables, layout.geometry().free(seat.slot), claim.index));
}

#[test]
fn threads_never_hold_the_same_port() {
    let layout = layout(&[(61001, 61040)]);
    let tables = Private::new(&layout);
    let held: Vec<std::sync::atomic::AtomicBool> = (0..65536).map(|_| Default::default()).collect();
    std::thread::scope(|scope| {
        for owner in 1..=4 {
            let (tables, layout, held) = (&tables, &layout, &held);
            scope.spawn(move || {
                for _ in 0..20_000 {
                    let seat = slots::enter(tables, &destination(1), owner, 0).unwrap();
                    let Ok(claim) = slots::claim(tables, seat, 0, false) else {
                        slots::leave(tables, seat);
                        continue;
                    };
                    let port = usize::from(layout.port(claim.index));
                    assert!(!held[port].swap(true, std::sync::atomic::Ordering::SeqCst));
                    held[port].store(false, std::sync::atomic::Ordering::SeqCst);
                    slots::release(tables, seat, claim.index);
                }
            });
        }
    });
}

#[test]
fn a_port_that_was_just_given_back_is_known_to_be_settling() {
    let layout = layout(&[(61001, 61009)]);
    let tables = Private::new(&layout);
    let seat = || slots::enter(&tables, &destination(1), 1, 0).unwrap();
    let first = seat();
    let claim = slots::claim(&tables, first, 0, false).unwrap();
    assert!(!slots::settling(&tables, first, claim), "never used");
    slots::release(&tables, first, claim.index);
    let again = slots::claim(&tables, seat(), 0, false).unwrap();
    assert_eq!(again.index, claim.index, "the only warm one");
    assert!(!slots::settling(&tables, first, again), "on the same processor it is over");
    tables.processor.store(1, std::sync::atomic::Ordering::SeqCst);
    assert!(slots::settling(&tables, first, again));
    std::thread::sleep(std::time::Duration::from_micros(300));
    assert!(!slots::settling(&tables, first, again), "200 us later");
}
