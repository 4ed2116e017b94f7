//! Intervals of ports, each with the rule that wins in it.

use std::hash::{Hash, Hasher};

/// A rank (the lower wins), or [`BY_SOURCE`] and the number of a partition of the source ports.
pub(super) type Cell = u32;
/// The rank of "no rule matches".
pub(super) const NO_RULE: Cell = 1 << 30;
/// Marks a cell that is no rank.
pub(super) const BY_SOURCE: Cell = 1 << 31;

/// Ports from `first` up to the next interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interval {
    pub(super) first: u16,
    pub(super) cell: Cell,
}

impl Hash for Interval {
    /// As one number: hashing is most of the cost of many small partitions.
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(u64::from(self.first) << 32 | u64::from(self.cell));
    }
}

/// Appends an interval, unless it continues the one before.
pub(super) fn push(intervals: &mut Vec<Interval>, first: u16, cell: Cell) {
    if intervals.last().is_none_or(|last| last.cell != cell) {
        intervals.push(Interval { first, cell });
    }
}
