//! The filter in front of the flow tables, kept free of the bits of flows that have ended; see
//! [`bridge_common::filter::flow_filter`].

use std::sync::{Mutex, atomic::Ordering};

use aya::maps::MapData;
use bridge_common::filter::{
    flow::FlowKey,
    flow_filter::{HALVES, LENGTH, bit, element, mask},
};

use super::error::{Error, Result};
use crate::kernel::{bpf, clock::monotonic_ns, lock::lock, mapping::SharedCounters};

/// Longer than a program runs, in nanoseconds: between the bits of a flow and its entry, or between its reads of both halves.
const RUN: u64 = 1_000_000_000;

/// Words of all elements.
const WORDS: u32 = {
    assert!(HALVES == 2);
    2 * LENGTH
};

/// The map `flow_filter`.
#[derive(Debug)]
pub(super) struct FlowFilterMap {
    words: SharedCounters,
    next: Mutex<Next>,
}

/// The next step, and the earliest time for it.
#[derive(Clone, Copy, Debug)]
struct Next {
    half: usize,
    /// Whether the half is to be filled, or else cleared.
    fills: bool,
    /// In nanoseconds of `CLOCK_MONOTONIC`.
    from: u64,
}

impl FlowFilterMap {
    pub(super) fn open(map: &MapData) -> Result<Self> {
        let words = SharedCounters::new(bpf::fd(map), WORDS).map_err(Error::map("flow_filter"))?;
        // The agent before may have left one half cleared, and either may be that.
        let next = Next { half: 0, fills: true, from: monotonic_ns() + RUN };
        Ok(Self { words, next: Mutex::new(next) })
    }

    /// Sets the bits of a flow. Call before it is entered.
    pub(super) fn note(&self, key: &FlowKey) {
        for half in 0..HALVES {
            self.set(half, key);
        }
    }

    fn set(&self, half: usize, key: &FlowKey) {
        let bit = bit(&key.low, &key.high, key.protocol);
        self.words.words()[element(bit) as usize * HALVES + half].fetch_or(mask(bit), Ordering::AcqRel);
    }

    /// Sets all bits.
    pub(super) fn fill(&self) {
        for half in 0..HALVES {
            self.write(half, u64::MAX);
        }
    }

    fn write(&self, half: usize, value: u64) {
        for word in self.words.words()[half..].iter().step_by(HALVES) {
            word.store(value, Ordering::Release);
        }
    }

    /// Begins to fill a half that was cleared long enough ago, or clears one if the other was filled long enough ago.
    pub(super) fn rebuild(&self) -> Rebuild<'_> {
        let mut next = lock(&self.next);
        let is_due = monotonic_ns() >= next.from;
        if is_due && !next.fills {
            self.write(next.half, 0);
            *next = Next { fills: true, from: monotonic_ns() + RUN, ..*next };
            return Rebuild { filter: self, half: None };
        }
        Rebuild { filter: self, half: is_due.then_some(next.half) }
    }
}

/// A walk through the flow tables that fills a half.
pub(super) struct Rebuild<'a> {
    filter: &'a FlowFilterMap,
    /// `None`: this walk fills none.
    half: Option<usize>,
}

impl Rebuild<'_> {
    /// Sets the bit of an entry.
    pub(super) fn note(&self, key: &FlowKey) {
        if let Some(half) = self.half {
            self.filter.set(half, key);
        }
    }

    /// The half has the bits of all entries of all tables: the other one is next.
    pub(super) fn finish(self) {
        if let Some(half) = self.half {
            let next = Next { half: HALVES - 1 - half, fills: false, from: monotonic_ns() + RUN };
            *lock(&self.filter.next) = next;
        }
    }
}
