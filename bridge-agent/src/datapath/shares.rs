//! The share that the flows of one initiator have in the tables of established flows; see [`bridge_common::filter::shares`].

use std::sync::atomic::Ordering;

use aya::maps::MapData;
use bridge_common::{
    filter::{
        flow::{Flow, FlowKey},
        shares::{COUNTERS, DIVISOR, LENGTH, LIMITS, SEED, STAMP, counter},
    },
    protocol,
};

use super::error::{Error, Result};
use crate::kernel::{bpf, clock::monotonic_ns, mapping::SharedCounters};

/// Longer than a program runs, in nanoseconds: it has entered its flow this long after it has written the stamp.
const ENTERED: u64 = 1_000_000_000;

/// The map `shares`.
#[derive(Debug)]
pub(super) struct Shares(SharedCounters);

impl Shares {
    pub(super) fn open(map: &MapData) -> Result<Self> {
        SharedCounters::new(bpf::fd(map), LENGTH).map(Self).map_err(Error::map("shares"))
    }

    /// Sets the limits by the capacities of the tables: of TCP connections, and of other flows.
    pub(super) fn set_limits(&self, capacities: [u32; 2]) {
        if self.get(SEED) == 0 {
            self.set(SEED, rand::random());
        }
        for (index, capacity) in (LIMITS..).zip(capacities) {
            self.set(index, u64::from((capacity / DIVISOR).max(1)));
        }
    }

    fn get(&self, index: u32) -> u64 {
        self.0.words()[index as usize].load(Ordering::Acquire)
    }

    fn set(&self, index: u32, value: u64) {
        self.0.words()[index as usize].store(value, Ordering::Release);
    }

    /// Returns counters of no flow.
    pub(super) fn count(&self) -> Count {
        Count { seed: self.get(SEED), counters: vec![0; LENGTH as usize] }
    }

    /// Replaces the counters, which miss the flows that were entered since the count began.
    pub(super) fn replace(&self, count: &Count) {
        for index in COUNTERS..LENGTH {
            self.set(index, count.counters[index as usize]);
        }
    }

    /// `CLOCK_MONOTONIC` of the last entry in the table `overflow`, in nanoseconds; 0: it is not looked into.
    pub(super) fn last_overflow(&self) -> u64 {
        self.get(STAMP)
    }

    /// Ends look-ups in the table `overflow`, which was seen empty after this stamp was read.
    pub(super) fn end_overflow(&self, stamp: u64) {
        if monotonic_ns().saturating_sub(stamp) > ENTERED {
            let word = &self.0.words()[STAMP as usize];
            // A flow was entered meanwhile if it fails.
            let _ = word.compare_exchange(stamp, 0, Ordering::AcqRel, Ordering::Acquire);
        }
    }
}

/// The number of flows of each initiator.
pub(super) struct Count {
    seed: u64,
    counters: Vec<u64>,
}

impl Count {
    pub(super) fn add(&mut self, key: &FlowKey, flow: &Flow) {
        let initiator = key.end(flow.initiator);
        self.counters[counter(initiator, key.protocol == protocol::TCP, self.seed) as usize] += 1;
    }
}
