//! Counters of the kernel side, summed over CPUs.

use bridge_common::filter::{
    counters::{Counter, Counters, Reason},
    fast_path::{Outcome, Outcomes},
    policy::{RuleHits, RuleInfo, direction},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    error::{Error, Result},
    flows::rule_name,
    maps::Maps,
};
use crate::model::Mode;

/// Packets of one direction that were judged alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReasonCount {
    /// `inbound`, `outbound` or `nodeport`.
    pub direction: String,
    /// Name of a [`Reason`].
    pub reason: String,
    /// Whether it denies.
    pub denies: bool,
    /// Packets that this became of.
    pub packets: u64,
    /// Their lengths from the link layer header on, in bytes.
    pub bytes: u64,
    /// Packets that would have been denied for this reason, but for audit mode.
    pub audited_packets: u64,
    /// Their lengths.
    pub audited_bytes: u64,
}

/// A rule, and how often it decided about a new flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RuleCount {
    /// Index in the policy.
    pub index: u32,
    /// Unique in the policy.
    pub name: String,
    /// `inbound`, `outbound` or `nodeport`.
    pub direction: String,
    /// `allow` or `deny`.
    pub action: String,
    /// `enforce`, or `audit`: the rule decides nothing, and is counted as if it did.
    #[serde(default)]
    pub mode: Mode,
    /// New flows that the rule decided about.
    pub hits: u64,
    /// Lengths of their first packets from the link layer header on, in bytes.
    pub bytes: u64,
}

/// Packets of established flows of one direction that fared alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutcomeCount {
    /// `inbound`, `outbound` or `nodeport`.
    pub direction: String,
    /// `forwarded`, or the name of the [`Outcome`] that says why the packet took the normal path.
    pub outcome: String,
    pub packets: u64,
    /// Their lengths from the link layer header on, in bytes.
    pub bytes: u64,
}

impl Maps {
    /// What became of packets of established flows, also what became of none: by direction, then by outcome.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn outcome_counts(&self) -> Result<Vec<OutcomeCount>> {
        let mut counts = Vec::with_capacity(direction::COUNT * Outcome::COUNT);
        for (index, name) in (0..).zip(direction::NAMES) {
            let rows = self.outcomes.get(&index, 0).map_err(Error::aya_map("outcomes"))?;
            for outcome in Outcome::ALL {
                let of = |row: &Outcomes| row.by_outcome[*outcome as usize];
                counts.push(OutcomeCount {
                    direction: name.to_owned(),
                    outcome: outcome.name().to_owned(),
                    packets: rows.iter().map(|row| of(row).packets).sum(),
                    bytes: rows.iter().map(|row| of(row).bytes).sum(),
                });
            }
        }
        Ok(counts)
    }

    /// Every counter, also those at zero: by direction, then by reason.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn reason_counts(&self) -> Result<Vec<ReasonCount>> {
        let mut counts = Vec::with_capacity(direction::COUNT * Reason::ALL.len());
        for (index, name) in (0..).zip(direction::NAMES) {
            let judged = self.counters.get(&index, 0).map_err(Error::aya_map("counters"))?;
            let audited = self.audited.get(&index, 0).map_err(Error::aya_map("audited"))?;
            for reason in Reason::ALL {
                let (judged, audited) = (sum(&judged, *reason), sum(&audited, *reason));
                counts.push(ReasonCount {
                    direction: name.to_owned(),
                    reason: reason.name().to_owned(),
                    denies: reason.denies(),
                    packets: judged.packets,
                    bytes: judged.bytes,
                    audited_packets: audited.packets,
                    audited_bytes: audited.bytes,
                });
            }
        }
        Ok(counts)
    }

    /// Returns the active rules, in their order, with their hits.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn rule_counts(&self) -> Result<Vec<RuleCount>> {
        Ok(self.each_rule_count()?.collect())
    }

    /// As [`Self::rule_counts`], one after the other: of 100,000 rules, texts take three times the memory of the rest.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn each_rule_count(&self) -> Result<impl Iterator<Item = RuleCount> + use<>> {
        let both = |slot| Ok((self.rule_info(slot)?, self.rule_hits(slot)?));
        let (_, (rules, hits)) = self.of_one_policy(|| self.slot(), both)?;
        Ok((0..).zip(rules.into_iter().zip(hits)).map(|(index, (rule, hits))| rule_count(index, &rule, hits)))
    }

    /// Returns the active rules that decided about a flow, by index.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn hit_rules(&self) -> Result<Vec<RuleCount>> {
        let read = |slot| {
            let (hits, mut rules) = (self.rule_hits(slot)?, Vec::new());
            self.each_rule(slot, |index, rule| {
                let hits = hits.get(index).copied().unwrap_or_default();
                if hits.packets > 0 {
                    rules.push(rule_count(u32::try_from(index).unwrap_or(u32::MAX), &rule, hits));
                }
            })?;
            Ok(rules)
        };
        self.of_one_policy(|| self.slot(), read).map(|(_, rules)| rules)
    }

    /// Returns the packets that the shield has dropped; each of them is also one of [`Maps::reason_counts`].
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn shielded(&self) -> Result<Counter> {
        let shields = self.shielded.get(&0, 0).map_err(Error::aya_map("shielded"))?;
        Ok(shields.iter().map(|shield| shield.dropped).fold(Counter::default(), add))
    }

    /// Returns the number of events that were suppressed so far, by the rate limit or a full buffer.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn suppressed_events(&self) -> Result<u64> {
        let budgets = self.event_budget.get(&0, 0).map_err(Error::aya_map("event_budget"))?;
        Ok(budgets.iter().map(|budget| budget.suppressed_total).sum())
    }
}

fn rule_count(index: u32, rule: &RuleInfo, hits: RuleHits) -> RuleCount {
    RuleCount {
        index,
        name: rule_name(rule),
        direction: direction::NAMES.get(rule.direction as usize).unwrap_or(&"?").to_string(),
        action: if rule.deny == 0 { "allow" } else { "deny" }.to_owned(),
        mode: if rule.audit == 0 { Mode::Enforce } else { Mode::Audit },
        hits: hits.packets,
        bytes: hits.bytes,
    }
}

fn sum(per_cpu: &[Counters], reason: Reason) -> Counter {
    per_cpu.iter().map(|counters| counters.get(reason)).fold(Counter::default(), add)
}

const fn add(sum: Counter, counter: Counter) -> Counter {
    Counter { packets: sum.packets + counter.packets, bytes: sum.bytes + counter.bytes }
}
