//! Counters of a packet filter, in the form in which those of eBPF are shown.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    datapath::{ReasonCount, RuleCount},
    firewall::{Counts, Hits},
    model::{Action, Direction, Mode, Policy},
};

/// Reasons of a packet filter to deny, with the direction that each is about. All but two see both directions.
const REASONS: [(&str, &str); 10] = [
    ("no-rule", BOTH),
    ("deny-rule", BOTH),
    ("foreign", "inbound"),
    ("spoofed", BOTH),
    ("invalid", BOTH),
    ("not-syn", BOTH),
    ("not-init", BOTH),
    ("icmp-type", BOTH),
    ("nodeport-denied", "nodeport"),
    ("strict", BOTH),
];
const BOTH: &str = "both";

/// The counters of the packet filter that enforces alone, and the policy that it has.
pub struct FilterCounts {
    pub(super) counts: Arc<Counts>,
    pub(super) policy: Arc<Policy>,
}

impl FilterCounts {
    /// Returns every rule with its hits, in order; those in audit mode last.
    ///
    /// # Errors
    /// The kernel's rules cannot be read, with the reason.
    pub fn rules(&self) -> Result<Vec<RuleCount>, String> {
        self.counts.read().map(|hits| rules(&self.policy, &hits))
    }

    /// Returns every reason to deny, also those at zero.
    ///
    /// # Errors
    /// The kernel's rules cannot be read, with the reason.
    pub fn reasons(&self) -> Result<Vec<ReasonCount>, String> {
        self.counts.read().map(|hits| reasons(&self.policy, &hits))
    }
}

fn rules(policy: &Policy, hits: &BTreeMap<String, Hits>) -> Vec<RuleCount> {
    let enforced = policy.rules.iter().map(|rule| (rule, Mode::Enforce));
    let all = enforced.chain(policy.audited.iter().map(|rule| (rule, Mode::Audit)));
    let count = |(index, (rule, mode)): (u32, (&crate::model::Rule, Mode))| {
        let Hits { packets, bytes } = hits.get(&rule.name).copied().unwrap_or_default();
        RuleCount {
            index,
            name: rule.name.clone(),
            direction: match rule.direction {
                Direction::Inbound => "inbound",
                Direction::Outbound => "outbound",
            }
            .to_owned(),
            action: match rule.action {
                Action::Allow => "allow",
                Action::Deny => "deny",
            }
            .to_owned(),
            mode,
            hits: packets,
            bytes,
        }
    };
    (0..).zip(all).map(count).collect()
}

fn reasons(policy: &Policy, hits: &BTreeMap<String, Hits>) -> Vec<ReasonCount> {
    let mut by_rules = Hits::default();
    let denying = policy.rules.iter().filter(|rule| rule.action == Action::Deny);
    denying.filter_map(|rule| hits.get(&rule.name)).for_each(|of| by_rules += *of);
    let count = |(name, direction): (&str, &str)| {
        let counted = hits.get(&format!("bridge:{name}")).copied();
        let Hits { packets, bytes } = match name {
            "deny-rule" => by_rules,
            _ => counted.unwrap_or_default(),
        };
        let of = |mode| if policy.mode == mode { (packets, bytes) } else { (0, 0) };
        let ((packets, bytes), (audited_packets, audited_bytes)) = (of(Mode::Enforce), of(Mode::Audit));
        ReasonCount {
            direction: direction.to_owned(),
            reason: name.replace('-', "_"),
            denies: true,
            packets,
            bytes,
            audited_packets,
            audited_bytes,
        }
    };
    REASONS.into_iter().map(count).collect()
}
