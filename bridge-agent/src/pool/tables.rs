//! The tables of the pool as the agent sees them: the same that the hooks use.

use std::{
    collections::{self, BTreeMap, HashSet},
    sync::Mutex,
};

use aya::maps::{HashMap, MapData, MapError};
use bridge_common::{
    pool::{
        Destination, FREE_SLOTS, Geometry, Grant, Granted, LEASE_BOUND, Lease, Owner, Rest, RestingPort,
        bitmap::Memory,
        shares,
        slots::{self, Seat, Tables},
        uses,
    },
    protocol::TCP,
};

use super::{Layout, words::Words};
use crate::kernel::clock::monotonic_ns;
pub(super) use crate::kernel::lock::lock;

const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

/// The words and hash tables of a loaded pool.
#[derive(Debug)]
pub struct KernelTables {
    pub(super) geometry: Geometry,
    /// As the hooks have it.
    pub(super) layout: Mutex<Layout>,
    pub(super) words: Words,
    /// See [`uses`].
    pub(super) uses: Words,
    /// Words of [`Self::uses`] that counted too many or too few sockets in the last round.
    pub(super) miscounted: Mutex<BTreeMap<u32, u64>>,
    pub(super) destinations: Mutex<HashMap<MapData, Destination, u32>>,
    pub(super) owners: Mutex<HashMap<MapData, Owner, u32>>,
    pub(super) shares: Mutex<HashMap<MapData, u64, u64>>,
    pub(super) grants: Mutex<HashMap<MapData, Grant, Granted>>,
    pub(super) resting: Mutex<HashMap<MapData, RestingPort, Rest>>,
}

impl KernelTables {
    /// Whether more than a quarter of the slots are taken.
    #[must_use]
    pub fn is_short_of_slots(&self) -> bool {
        4 * self.load(FREE_SLOTS) < 3 * u64::from(lock(&self.layout).config.slots)
    }

    /// Notes that a port is granted to a client that will bind it itself.
    ///
    /// # Errors
    /// What the kernel says: the table is full.
    pub fn grant(&self, grant: Grant, granted: Granted) -> Result<(), MapError> {
        lock(&self.grants).insert(grant, granted, BPF_NOEXIST)
    }

    /// Ends a grant. `false`: the hook has taken the port over, and will give it back itself.
    pub fn revoke(&self, grant: &Grant) -> bool {
        lock(&self.grants).remove(grant).is_ok()
    }

    /// Every port that rests.
    ///
    /// # Errors
    /// The kernel refuses to list the map.
    pub fn resting(&self) -> Result<Vec<(RestingPort, Rest)>, MapError> {
        lock(&self.resting).iter().collect()
    }

    /// Releases the ports whose rest is over; returns their number.
    ///
    /// # Errors
    /// The kernel refuses to list the map.
    pub fn wake(&self) -> Result<u32, MapError> {
        let now = monotonic_ns();
        self.wake_if(|_, rest| rest.until_ns <= now)
    }

    /// Releases the ports of a seat that the kernel has normally released by now; returns their number.
    ///
    /// # Errors
    /// The kernel refuses to list the map.
    pub fn wake_usable(&self, seat: Seat) -> Result<u32, MapError> {
        if self.load(self.geometry.resting(seat.owner_slot)) == 0 {
            return Ok(0);
        }
        let now = monotonic_ns();
        self.wake_if(|port, rest| {
            (port.slot, rest.owner_slot) == (seat.slot, seat.owner_slot) && rest.usable_ns <= now
        })
    }

    fn wake_if(&self, which: impl Fn(&RestingPort, &Rest) -> bool) -> Result<u32, MapError> {
        let mut woken = 0;
        for (port, rest) in self.resting()?.into_iter().filter(|(port, rest)| which(port, rest)) {
            // A hook may have removed it first: then it has released the port.
            if lock(&self.resting).remove(&port).is_ok() {
                self.reduce_share(shares::resting(rest.group), 1);
                self.reduce_share(shares::ALL_RESTING, 1);
                self.fetch_add(self.geometry.resting(rest.owner_slot), u64::MAX);
                slots::release(self, Seat { slot: port.slot, owner_slot: rest.owner_slot }, port.index);
                woken += 1;
            }
        }
        Ok(woken)
    }

    /// Every destination and its slot.
    ///
    /// # Errors
    /// A system call fails.
    pub fn destinations(&self) -> Result<Vec<(Destination, u32)>, MapError> {
        lock(&self.destinations).iter().collect()
    }

    /// Every owner and its slot.
    ///
    /// # Errors
    /// A system call fails.
    pub fn owners(&self) -> Result<Vec<(Owner, u32)>, MapError> {
        lock(&self.owners).iter().collect()
    }

    /// Every count of [`shares`].
    ///
    /// # Errors
    /// A system call fails.
    pub fn counted_shares(&self) -> Result<BTreeMap<u64, u64>, MapError> {
        lock(&self.shares).iter().collect()
    }

    /// Corrects the counts of [`shares`]. Those of ports are there for unconnected UDP, and as the quota needs them. `sockets` are all
    /// that have a port, with the counts from before they were listed. `gone`: owners that keep ports from others, and are no
    /// others to anyone themselves.
    ///
    /// A count that the hooks change meanwhile stays as it is until a later round.
    ///
    /// # Errors
    /// A system call fails.
    pub fn correct_shares(
        &self,
        quota: u32,
        (sockets, before): (&[Lease], &BTreeMap<u64, u64>),
        gone: &HashSet<Owner>,
    ) -> Result<(), MapError> {
        let counted = self.counted_shares()?;
        let mut actual: BTreeMap<u64, u64> = BTreeMap::new();
        let unconnected = lock(&self.destinations).get(&Destination::ANY_UDP, 0).ok();
        for (owner, slot) in self.owners()? {
            let group = slots::group_of(self, slot);
            *actual.entry(shares::namespace(owner.netns_cookie)).or_default() += 1;
            *actual.entry(shares::group(group)).or_default() += 1;
            *actual.entry(shares::ALL_DESTINATIONS).or_default() += u64::from(!gone.contains(&owner));
            let owned = self.load(self.geometry.owned(slot));
            let unconnected = unconnected == Some(owner.slot);
            if owned.cast_signed() > 0 && (quota != 0 || unconnected) {
                *actual.entry(shares::ports(group, owner.slot)).or_default() += owned;
                if quota & shares::SHARE != 0 || unconnected {
                    *actual.entry(shares::all_ports(owner.slot)).or_default() += owned;
                }
            }
        }
        for (_, rest) in self.resting()? {
            *actual.entry(shares::resting(rest.group)).or_default() += 1;
            *actual.entry(shares::ALL_RESTING).or_default() += 1;
        }
        for socket in sockets.iter().filter(|socket| socket.state & LEASE_BOUND != 0) {
            *actual.entry(shares::bound(socket.netns_cookie)).or_default() += 1;
        }
        let after = self.counted_shares()?;
        let mut shares = lock(&self.shares);
        for key in actual.keys().chain(after.keys().filter(|key| !actual.contains_key(key))) {
            let earlier = if shares::is_bound(*key) { before } else { &counted };
            let (count, actual) = (after.get(key), actual.get(key));
            if count == actual || count != earlier.get(key) {
                continue;
            }
            match (count, actual) {
                (_, None) => shares.remove(key)?,
                (count, Some(actual)) => {
                    let now = shares.get(key, 0).unwrap_or(0);
                    let wrong = actual.wrapping_sub(count.copied().unwrap_or(0));
                    shares.insert(key, now.wrapping_add(wrong), 0)?;
                }
            }
        }
        Ok(())
    }

    /// Corrects the words of [`uses`]: `sockets` are all that have a port, `kept` the ports that destinations keep, by protocol.
    ///
    /// A number of sockets is corrected if it is wrong by as many twice in a row: one may just have come or gone.
    pub fn correct_uses(&self, sockets: &[Lease], kept: [(u8, HashSet<u32>); 2]) {
        let mut actual: collections::HashMap<u32, u64> = collections::HashMap::new();
        for socket in sockets {
            let protocol = if socket.state & LEASE_BOUND == 0 { socket.destination.protocol() } else { TCP };
            *actual.entry(uses::word(socket.index, protocol)).or_default() += uses::SOCKET;
        }
        let mut miscounted = lock(&self.miscounted);
        let before = std::mem::take(&mut *miscounted);
        for (protocol, kept) in &kept {
            for index in 0..self.geometry.words * 64 {
                let at = uses::word(index, *protocol);
                let word = if kept.contains(&index) {
                    self.uses.fetch_or(at, uses::KEPT)
                } else {
                    self.uses.fetch_and(at, !uses::KEPT)
                };
                let wrong = actual.get(&at).copied().unwrap_or(0).wrapping_sub(word & !uses::KEPT);
                if wrong != 0 && before.get(&at) == Some(&wrong) {
                    self.uses.fetch_add(at, wrong);
                } else if wrong != 0 {
                    miscounted.insert(at, wrong);
                }
            }
        }
    }

    /// Every grant.
    ///
    /// # Errors
    /// A system call fails.
    pub fn grants(&self) -> Result<Vec<(Grant, Granted)>, MapError> {
        lock(&self.grants).iter().collect()
    }
}

impl Memory for KernelTables {
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
        self.words.fetch_add(at, n)
    }
}

impl Tables for KernelTables {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn destination_slot(&self, destination: &Destination) -> Option<u32> {
        lock(&self.destinations).get(destination, 0).ok()
    }

    fn insert_destination(&self, destination: &Destination, slot: u32) -> bool {
        lock(&self.destinations).insert(destination, slot, BPF_NOEXIST).is_ok()
    }

    fn owner_slot(&self, owner: &Owner) -> Option<u32> {
        lock(&self.owners).get(owner, 0).ok()
    }

    fn insert_owner(&self, owner: &Owner, slot: u32) -> bool {
        lock(&self.owners).insert(owner, slot, BPF_NOEXIST).is_ok()
    }

    fn share(&self, key: u64) -> u64 {
        shares::known(lock(&self.shares).get(&key, 0).unwrap_or(0))
    }

    fn extend_share(&self, key: u64) -> u64 {
        let mut shares = lock(&self.shares);
        let share = shares.get(&key, 0).unwrap_or(0);
        // An error can only mean that the map is full: this one is not counted.
        let _ = shares.insert(key, share.wrapping_add(1), 0);
        share
    }

    fn reduce_share(&self, key: u64, n: u64) {
        let mut shares = lock(&self.shares);
        if let Ok(share) = shares.get(&key, 0) {
            // An error can only mean that it is gone.
            let _ = shares.insert(key, share.wrapping_sub(n), BPF_EXIST);
        }
    }

    fn remove_destination(&self, destination: &Destination) {
        // An error can only mean that it is gone.
        let _ = lock(&self.destinations).remove(destination);
    }

    fn remove_owner(&self, owner: &Owner) {
        // As above.
        let _ = lock(&self.owners).remove(owner);
    }

    fn random(&self) -> u32 {
        rand::random()
    }

    fn now(&self) -> u64 {
        monotonic_ns()
    }

    fn processor(&self) -> u32 {
        slots::NO_PROCESSOR
    }
}
