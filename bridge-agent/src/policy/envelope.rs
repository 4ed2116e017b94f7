//! Which of the active rules wins at each source port, while the sweep over destination ports adds and removes rules.

use std::collections::BTreeSet;

use super::interval::{Cell, Interval, NO_RULE, push};
use crate::model::PortRange;

/// A segment tree over the source ports: a change costs the square of its depth, asking for the winners costs its
/// depth for each interval they have, however many rules are hidden behind them.
pub(super) struct Envelope {
    /// First port of each segment, ascending from 0. No range begins or ends inside a segment.
    segments: Vec<u16>,
    /// How many leaves the tree has: a power of two, not less than there are segments.
    leaves: usize,
    /// Ranks that hold for all of a node, by node: 1 is the root, the children of `n` are `2n` and `2n + 1`.
    ranks: Vec<BTreeSet<Cell>>,
    /// The best rank at a node or below it.
    best: Vec<Cell>,
}

impl Envelope {
    /// For ranges of `ranges`.
    pub(super) fn new<'a>(ranges: impl Iterator<Item = &'a PortRange>) -> Self {
        let mut segments = vec![0];
        for range in ranges {
            segments.push(range.first);
            segments.extend(range.last.checked_add(1));
        }
        segments.sort_unstable();
        segments.dedup();
        let leaves = segments.len().next_power_of_two();
        Self { segments, leaves, ranks: vec![BTreeSet::new(); 2 * leaves], best: vec![NO_RULE; 2 * leaves] }
    }

    /// `rank` claims the source ports of `range`, or no longer does.
    pub(super) fn apply(&mut self, range: PortRange, rank: Cell, claims: bool) {
        let segment = |port| self.leaves + self.segments.partition_point(|&first| first < port);
        let mut left = segment(range.first);
        // Up to the last leaf, though no segment may belong to it: all source ports are then one node, the root.
        let mut right = range.last.checked_add(1).map_or(2 * self.leaves, segment);
        while left < right {
            if left & 1 == 1 {
                self.apply_to_node(left, rank, claims);
                left += 1;
            }
            if right & 1 == 1 {
                right -= 1;
                self.apply_to_node(right, rank, claims);
            }
            left /= 2;
            right /= 2;
        }
    }

    fn apply_to_node(&mut self, mut node: usize, rank: Cell, claims: bool) {
        if claims {
            self.ranks[node].insert(rank);
        } else {
            self.ranks[node].remove(&rank);
        }
        while node > 0 {
            let best = self.rank(node).min(self.best_below(node));
            if self.best[node] == best {
                break;
            }
            self.best[node] = best;
            node /= 2;
        }
    }

    /// The winners by source port.
    pub(super) fn winners(&self) -> Vec<Interval> {
        let mut winners = Vec::new();
        self.descend(1, 0, self.leaves, NO_RULE, &mut winners);
        winners
    }

    /// `node` stands for `width` segments from `first` on, for which `best` holds at least.
    fn descend(&self, node: usize, first: usize, width: usize, best: Cell, winners: &mut Vec<Interval>) {
        let Some(&port) = self.segments.get(first) else { return };
        let best = best.min(self.rank(node));
        if self.best_below(node) >= best {
            push(winners, port, best);
        } else {
            self.descend(2 * node, first, width / 2, best, winners);
            self.descend(2 * node + 1, first + width / 2, width / 2, best, winners);
        }
    }

    fn rank(&self, node: usize) -> Cell {
        self.ranks[node].first().copied().unwrap_or(NO_RULE)
    }

    fn best_below(&self, node: usize) -> Cell {
        if node < self.leaves { self.best[2 * node].min(self.best[2 * node + 1]) } else { NO_RULE }
    }
}
