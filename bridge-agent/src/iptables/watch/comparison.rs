//! Compares the verdicts of eBPF with those of iptables.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{Shared, State};
use crate::iptables::divergence::Counters;
use crate::iptables::driver::Rewritten;
use crate::iptables::observe::{ObservedTable, OwnRules};
use crate::iptables::question::{Answer, Question};
use crate::iptables::ruleset::{Family, Table};
use crate::iptables::walk::{self, Packet, Verdict};
use crate::model::Mode;

/// Between two readings of the counters, and how many times its own duration a reading must leave free.
const COUNTING: Duration = Duration::from_secs(5);
const COUNTING_SHARE: u32 = 200;

#[derive(Debug)]
pub(super) struct Comparison {
    counters: Counters,
    /// When the counters are to be read again.
    next: Instant,
}

impl Comparison {
    /// Begins with the counters of now.
    pub(super) fn begin(tables: &BTreeMap<(Family, Table), ObservedTable>) -> Self {
        let mut counters = Counters::default();
        counters.begin(tables);
        Self { counters, next: Instant::now() + COUNTING }
    }

    /// See [`Counters::rewritten`].
    pub(super) fn rewritten(&mut self, chains: &Rewritten) {
        self.counters.rewritten(chains);
    }
}

impl Shared {
    pub(super) fn add(
        &self,
        Comparison { counters, .. }: &mut Comparison,
        tables: &BTreeMap<(Family, Table), ObservedTable>,
        mode: Mode,
    ) {
        // In audit mode eBPF passes everything, also packets that it would have denied.
        if mode == Mode::Enforce {
            counters.count(tables, &mut self.status().divergence.denied_by_iptables);
        }
    }

    pub(super) fn count_now_and_then(&self) {
        let mut state = self.state();
        if state.comparison.as_ref().is_some_and(|comparison| Instant::now() >= comparison.next) {
            let begun = Instant::now();
            self.count(&mut state);
            if let Some(comparison) = &mut state.comparison {
                comparison.next = Instant::now() + COUNTING.max(begun.elapsed() * COUNTING_SHARE);
            }
        }
    }

    pub(super) fn count(&self, state: &mut State) {
        let State { firewall, policy, comparison: Some(comparison), .. } = state else {
            return;
        };
        match firewall.read_back() {
            Ok(tables) => self.add(comparison, &tables, policy.mode),
            Err(error) => tracing::debug!(%error, "the counters cannot be read"),
        }
    }

    /// Holds packets that eBPF has denied against the rules as they stand in the kernel now.
    pub(super) fn compare(&self, packets: &[Packet], question: &mut Question, known: Option<&Answer>) {
        let answer = question.ask().ok();
        let state = self.state();
        if state.comparison.is_none() {
            return;
        }
        let unharmed = answer.is_some() && answer.as_ref() == known;
        let read = if unharmed { None } else { Some(state.firewall.read_back()) };
        let changed: BTreeMap<(Family, Table), OwnRules>;
        let rules = match read {
            None => state.firewall.written(),
            Some(Ok(tables)) => {
                changed = tables.iter().map(|(key, table)| (*key, table.own())).collect();
                &changed
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "denied packets cannot be compared");
                self.status().divergence.not_compared += packets.len() as u64;
                return;
            }
        };
        let audit = state.policy.mode == Mode::Audit;
        let mut status = self.status();
        let divergence = &mut status.divergence;
        for packet in packets {
            let verdict = walk::verdict(rules, packet, audit);
            *if verdict.is_some() { &mut divergence.compared } else { &mut divergence.not_compared } += 1;
            if verdict == Some(Verdict::Passes) {
                divergence.denied_by_ebpf += 1;
                divergence.last = Some(*packet);
            }
        }
    }
}
