//! Shares: counts of what one client of the pool uses, so that it leaves the rest to others.
//!
//! A client is a network namespace, and a *group*: the control group of the processes that connect. A process makes any number
//! of network namespaces, but does not leave its control group. So each rule has a part for both: a namespace leaves a
//! quarter of what others have left, and all namespaces of a group together a sixteenth.

use super::slots::{Seat, Tables, group_of};

/// A quota: no number of ports, but the share of a client while others use the pool. The low bits have the number of ports of
/// the pool.
pub const SHARE: u32 = 1 << 31;
/// A quota, in addition to [`SHARE`]: there are others, even if they do not use the pool yet.
pub const OTHERS: u32 = 1 << 30;

/// The number of ports of a quota that is a [`SHARE`].
const PORTS: u32 = OTHERS - 1;

/// Bits of a key that name a namespace or a group.
const NAME_BITS: u32 = 46;
const NAME: u64 = (1 << NAME_BITS) - 1;
/// Above the slot that a key names.
const KIND: u32 = 62;

/// A name that no namespace and no group has.
const ALL: u64 = NAME;

/// Key of the sum of destinations that namespaces have slots for. It is counted up after, and down before, those of the namespace and
/// of its group: it is above them only if there are others.
pub const ALL_DESTINATIONS: u64 = namespace(ALL);

/// Key of the number of ports of all groups that rest.
pub const ALL_RESTING: u64 = resting(ALL);

/// Key of the number of destinations that a namespace has slots for.
#[inline(always)]
#[must_use]
pub const fn namespace(netns_cookie: u64) -> u64 {
    netns_cookie & NAME
}

/// Key of the number of sockets of a namespace that have a port and no destination yet.
#[inline(always)]
#[must_use]
pub const fn bound(netns_cookie: u64) -> u64 {
    1 << NAME_BITS | netns_cookie & NAME
}

/// Whether a key is one of [`bound`].
#[must_use]
pub const fn is_bound(key: u64) -> bool {
    key >> NAME_BITS == 1
}

/// Returns a count as it is known: one below zero is an error of counting, which the agent corrects.
#[inline(always)]
#[must_use]
pub const fn known(count: u64) -> u64 {
    if count.cast_signed() < 0 { 0 } else { count }
}

/// Key of the number of destinations that a group has slots for.
#[inline(always)]
#[must_use]
pub const fn group(group: u64) -> u64 {
    1 << KIND | group & NAME
}

/// Key of the number of ports of a group that rest.
#[inline(always)]
#[must_use]
pub const fn resting(group: u64) -> u64 {
    2 << KIND | group & NAME
}

/// Key of the number of ports that all groups keep at the destination of a slot (a 16-bit number).
#[inline(always)]
#[must_use]
pub const fn all_ports(slot: u32) -> u64 {
    ports(ALL, slot)
}

/// Key of the number of ports that a group keeps from others at the destination of a slot (a 16-bit number).
#[inline(always)]
#[must_use]
pub const fn ports(group: u64, slot: u32) -> u64 {
    3 << KIND | (slot as u64 & 0xffff) << NAME_BITS | group & NAME
}

/// Whether a client that has `own` of something may take one more, while `free` are left. The last one is for who has none.
#[inline(always)]
#[must_use]
pub const fn leaves_a_quarter(own: u64, free: u64) -> bool {
    own == 0 || free > 1 && own < 3 * free
}

/// [`leaves_a_quarter`] for all namespaces of a group.
#[inline(always)]
#[must_use]
pub const fn leaves_a_sixteenth(own: u64, free: u64) -> bool {
    own == 0 || free > 1 && own < 15 * free
}

/// Counts one more port that a namespace keeps from others at a destination, if that is within its share. It has `own` already.
///
/// As long as a client is the only one with slots in the pool, it may take all ports.
#[inline(always)]
pub fn take_port<T: Tables + ?Sized>(tables: &T, seat: Seat, quota: u32, own: u64) -> bool {
    let geometry = tables.geometry();
    let group_name = group_of(tables, seat.owner_slot);
    let of_group = ports(group_name, seat.slot);
    let all = tables.share(ALL_DESTINATIONS);
    let others = |client| quota & OTHERS != 0 || all > tables.share(client);
    let free = u64::from(quota & PORTS).saturating_sub(tables.share(all_ports(seat.slot)));
    // Without a free port the search for one has the right refusal.
    let in_share = free == 0
        || (leaves_a_quarter(own, free) || !others(namespace(tables.load(geometry.key(seat.owner_slot)))))
            && (leaves_a_sixteenth(tables.share(of_group), free) || !others(group(group_name)));
    if in_share {
        tables.extend_share(of_group);
        tables.extend_share(all_ports(seat.slot));
    }
    in_share
}

/// Counts one more under a key unless there are `limit` already (0: no limit).
#[inline(always)]
pub fn take<T: Tables + ?Sized>(tables: &T, key: u64, limit: u64) -> bool {
    let before = tables.extend_share(key);
    // One below zero is an error of counting, which the agent corrects.
    if limit == 0 || before < limit || before.cast_signed() < 0 {
        return true;
    }
    tables.reduce_share(key, 1);
    false
}
