//! Shares: counts of what one client of the pool uses, so that it leaves the rest to others.
//!
//! A client is a network namespace, and a *group*: the control group of the processes that connect. A process makes any number
//! of network namespaces, but does not leave its control group. So each rule has a part for both: a namespace leaves a
//! quarter of what others have left, and all namespaces of a group together a sixteenth.

use super::slots::Tables;

/// Bits of a key that name a namespace or a group.
const NAME_BITS: u32 = 46;
const NAME: u64 = (1 << NAME_BITS) - 1;
/// Above the slot that a key names.
const KIND: u32 = 62;

/// A name that no group has.
const ALL: u64 = NAME;

/// Key of the number of ports of all groups that rest.
pub const ALL_RESTING: u64 = resting(ALL);

/// Key of the number of destinations that a namespace has slots for.
#[inline(always)]
#[must_use]
pub const fn namespace(netns_cookie: u64) -> u64 {
    netns_cookie & NAME
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

/// Whether a client that has `own` of something may take one more, while `free` are left.
#[inline(always)]
#[must_use]
pub const fn leaves_a_quarter(own: u64, free: u64) -> bool {
    own < 3 * free
}

/// [`leaves_a_quarter`] for all namespaces of a group.
#[inline(always)]
#[must_use]
pub const fn leaves_a_sixteenth(own: u64, free: u64) -> bool {
    own < 15 * free
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
