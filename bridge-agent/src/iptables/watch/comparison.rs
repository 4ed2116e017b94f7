//! Compares the verdicts of eBPF with those of iptables.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::iptables::Error;
use crate::iptables::divergence::{Counters, Divergence};
use crate::iptables::driver::Iptables;
use crate::iptables::observe::{ObservedTable, OwnRules};
use crate::iptables::ruleset::{Family, Table};
use crate::iptables::walk::{self, Packet, Verdict};
use crate::model::Mode;

/// Between two readings of the counters, and how many times its own duration a reading must leave free.
const COUNTING: Duration = Duration::from_secs(5);
const COUNTING_SHARE: u32 = 200;

#[derive(Debug)]
pub(super) struct Comparison {
    counters: Counters,
    /// [`Iptables::denied`] right before the counters were read.
    denied: Option<u64>,
    /// When the counters are to be read again.
    next: Instant,
}

impl Comparison {
    /// Begins with the counters of now.
    ///
    /// # Errors
    /// The rules cannot be read.
    pub(super) fn begin(firewall: &Iptables) -> Result<Self, Error> {
        let denied = firewall.denied();
        let mut counters = Counters::default();
        counters.begin(&firewall.read_back()?);
        Ok(Self { counters, denied, next: Instant::now() + COUNTING })
    }

    /// Counts the packets that iptables has denied since the last reading, if there are any.
    ///
    /// # Errors
    /// The rules cannot be read.
    pub(super) fn count(
        &mut self,
        firewall: &Iptables,
        mode: Mode,
        divergence: &mut Divergence,
    ) -> Result<(), Error> {
        let denied = firewall.denied();
        if mode == Mode::Enforce && (denied.is_none() || denied != self.denied) {
            self.add(&firewall.read_back()?, mode, divergence);
            self.denied = denied;
        }
        Ok(())
    }

    /// Counts the packets that iptables has denied since the last reading.
    pub(super) fn add(
        &mut self,
        tables: &BTreeMap<(Family, Table), ObservedTable>,
        mode: Mode,
        divergence: &mut Divergence,
    ) {
        // In audit mode eBPF passes everything, also packets that it would have denied.
        if mode == Mode::Enforce {
            self.counters.count(tables, &mut divergence.denied_by_iptables);
        }
    }

    /// Whether the counters are to be read now.
    pub(super) fn is_due(&self) -> bool {
        Instant::now() >= self.next
    }

    /// Takes note of a reading that began at `begun`.
    pub(super) fn done(&mut self, begun: Instant) {
        self.next = Instant::now() + COUNTING.max(begun.elapsed() * COUNTING_SHARE);
    }
}

/// Compares packets that eBPF has denied with `rules`.
pub(super) fn compare(
    packets: &[Packet],
    rules: &BTreeMap<(Family, Table), OwnRules>,
    audit: bool,
    divergence: &mut Divergence,
) {
    for packet in packets {
        let verdict = walk::verdict(rules, packet, audit);
        *if verdict.is_some() { &mut divergence.compared } else { &mut divergence.not_compared } += 1;
        if verdict == Some(Verdict::Passes) {
            divergence.denied_by_ebpf += 1;
            divergence.last = Some(*packet);
        }
    }
}
