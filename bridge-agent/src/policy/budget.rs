//! The budget of the rules of one author, so that one policy cannot exhaust a node. Pure.
//!
//! A policy of the cluster may be written by a tenant. It is compiled by itself within limits that keep the memory and the
//! time of a node small, whichever engines it runs. See [`check`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{Error, compile_within};
use crate::model::{Policy, PortRange, Protocol, Rule};

/// Pairs of address lists, 64 bytes of kernel memory each.
pub const MAX_PAIRS: u64 = 200_000;
/// Port intervals computed while compiling: a hundredth of a second.
pub const MAX_INTERVALS: usize = 1 << 17;
/// Pages of port lookups, 1 KiB of kernel memory each.
pub const MAX_PAGES: usize = 1 << 13;
/// iptables rules.
pub const MAX_LINES: u64 = 20_000;
/// Ports that one `multiport` match of iptables takes; a range counts twice.
const MULTIPORT: usize = 15;

/// The cost of a set of rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Pairs of address lists, at most.
    pub pairs: u64,
    /// iptables rules.
    pub lines: u64,
    /// Pages of port lookups.
    pub pages: usize,
}

/// Limits of all policies of a cluster together, on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    /// Pairs of address lists.
    pub pairs: u64,
    /// iptables rules; `u64::MAX` where iptables is not used.
    pub lines: u64,
    /// Pages of port lookups.
    pub pages: usize,
}

/// The share of the limits that the policies of one namespace may use together.
const NAMESPACE_SHARE: u64 = 16;

impl Shared {
    /// Chooses policies by namespace: those of the cluster (`None`) come first, so that no tenant excludes one. All of one namespace
    /// together may use a sixteenth of the limits, so that no tenant excludes another.
    ///
    /// # Errors
    /// Each policy that does not fit, with the figure.
    #[must_use]
    pub fn choose_by_namespace(&self, costs: &[(Option<&str>, Cost)]) -> Vec<Result<(), Exceeded>> {
        let mut outcome = vec![Ok(()); costs.len()];
        let mut members: BTreeMap<Option<&str>, Vec<usize>> = BTreeMap::new();
        for (index, (namespace, _)) in costs.iter().enumerate() {
            members.entry(*namespace).or_default().push(index);
        }
        let choose = |limits: &Self, indexes: &[usize], outcome: &mut [Result<(), Exceeded>]| {
            let costs: Vec<Cost> = indexes.iter().map(|index| costs[*index].1).collect();
            for (index, chosen) in indexes.iter().zip(limits.choose(&costs)) {
                outcome[*index] = chosen;
            }
            let fits = indexes.iter().copied().filter(|index| outcome[*index].is_ok());
            fits.collect::<Vec<usize>>()
        };
        let of_cluster = members.remove(&None).unwrap_or_default();
        let mut left = *self;
        for index in choose(self, &of_cluster, &mut outcome) {
            left = left.without(&costs[index].1);
        }
        let share = |limit: u64| if limit == u64::MAX { limit } else { limit / NAMESPACE_SHARE };
        let namespace = Self {
            pairs: share(self.pairs),
            lines: share(self.lines),
            pages: self.pages / usize::try_from(NAMESPACE_SHARE).unwrap_or(usize::MAX),
        };
        let within: Vec<usize> =
            members.values().flat_map(|indexes| choose(&namespace, indexes, &mut outcome)).collect();
        choose(&left, &within, &mut outcome);
        outcome
    }

    /// Returns the limits that a policy leaves.
    const fn without(&self, cost: &Cost) -> Self {
        Self {
            pairs: self.pairs.saturating_sub(cost.pairs),
            lines: if self.lines == u64::MAX { u64::MAX } else { self.lines.saturating_sub(cost.lines) },
            pages: self.pages.saturating_sub(cost.pages),
        }
    }

    /// Limits of a node whose engine is eBPF alone.
    pub const EBPF: Self = Self { pairs: 1_000_000, lines: u64::MAX, pages: 1 << 16 };
    /// iptables rules of a node that writes them, so that a change takes effect within a second.
    pub const LINES: u64 = 10_000;

    /// Chooses the policies that fit together, the cheapest first: an expensive one excludes no other. Returns for each
    /// whether it fits.
    ///
    /// # Errors
    /// Each policy that does not fit, with the figure.
    #[must_use]
    pub fn choose(&self, costs: &[Cost]) -> Vec<Result<(), Exceeded>> {
        #[expect(clippy::cast_precision_loss, reason = "only the order counts")]
        let fraction = |cost: &Cost| {
            let parts = [
                cost.pairs as f64 / self.pairs as f64,
                cost.lines as f64 / self.lines as f64,
                cost.pages as f64 / self.pages as f64,
            ];
            parts.into_iter().fold(0.0, f64::max)
        };
        let mut order: Vec<usize> = (0..costs.len()).collect();
        order.sort_by(|a, b| fraction(&costs[*a]).total_cmp(&fraction(&costs[*b])));
        let mut outcome = vec![Ok(()); costs.len()];
        let mut left = *self;
        for index in order {
            let Cost { pairs, lines, pages } = costs[index];
            outcome[index] = [
                ("pairs of external and pod networks", pairs, left.pairs, self.pairs),
                ("iptables rules", lines, left.lines, self.lines),
                ("pages of 1 KiB for its ports", pages as u64, left.pages as u64, self.pages as u64),
            ]
            .into_iter()
            .find(|(_, need, left, _)| need > left)
            .map_or(Ok(()), |(kind, need, left, limit)| Err(Exceeded::Together { kind, need, left, limit }));
            if outcome[index].is_ok() {
                left =
                    Self { pairs: left.pairs - pairs, lines: left.lines - lines, pages: left.pages - pages };
            }
        }
        outcome
    }
}

/// The limit that a set of rules exceeds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// Combinations of `external` and `pods`.
    #[error(
        "its rules make {pairs} pairs of external and pod networks, and {MAX_PAIRS} are allowed; most come from rule \
         `{rule}`: write one prefix in place of many addresses, or leave one side out"
    )]
    Pairs {
        /// Of all rules.
        pairs: u64,
        /// The most expensive one.
        rule: String,
    },
    /// Rules of iptables.
    #[error(
        "its rules need {lines} iptables rules, and {MAX_LINES} are allowed; most come from rule `{rule}`: join its ports \
         into ranges, its networks into prefixes, or leave sourcePorts out"
    )]
    Lines {
        /// Of all rules.
        lines: u64,
        /// The most expensive one.
        rule: String,
    },
    /// Intervals of ports.
    #[error(
        "the ports and sourcePorts of {rules} overlap in more than {MAX_INTERVALS} ways: join ports into ranges, or leave \
         sourcePorts out"
    )]
    Intervals {
        /// The rules that overlap.
        rules: String,
    },
    /// Pages of ports.
    #[error(
        "the ports of its rules need {pages} pages of 1 KiB, and {MAX_PAGES} are allowed: join ports into ranges, or leave \
         sourcePorts out"
    )]
    Pages {
        /// Of all rules.
        pages: usize,
    },
    /// All policies of the cluster together.
    #[error(
        "it needs {need} {kind}, and other policies leave {left} of the {limit} of this node; cheaper policies come first: \
         split it, or write fewer addresses and ports"
    )]
    Together {
        /// The kind of limit, in the plural.
        kind: &'static str,
        /// Cost of this policy.
        need: u64,
        /// The rest that cheaper policies leave.
        left: u64,
        /// The limit of the node.
        limit: u64,
    },
    /// The compiler refuses the rules for another reason.
    #[error(transparent)]
    Compile(#[from] std::sync::Arc<Error>),
}

/// Returns the cost of `policy`, whose rules are those of one author, on a node whose own addresses are `local`.
///
/// # Errors
/// The cost exceeds the budget; the text has the figure and the remedy.
pub fn check(policy: &Policy, local: &[IpAddr]) -> Result<Cost, Exceeded> {
    let rules = || policy.rules.iter().chain(&policy.audited);
    let (pairs, rule) = sum(rules(), pairs);
    if pairs > MAX_PAIRS {
        return Err(Exceeded::Pairs { pairs, rule });
    }
    let (lines, rule) = sum(rules(), lines);
    if lines > MAX_LINES {
        return Err(Exceeded::Lines { lines, rule });
    }
    let tables = compile_within(policy, local, MAX_INTERVALS).map_err(|error| match error {
        Error::TooManyPortRanges { rules } => Exceeded::Intervals { rules },
        Error::TooManyPages { pages } => Exceeded::Pages { pages },
        error => Exceeded::Compile(error.into()),
    })?;
    let pages = tables.pages.len();
    if pages > MAX_PAGES {
        return Err(Exceeded::Pages { pages });
    }
    Ok(Cost { pairs, lines, pages })
}

/// The sum over all rules, and the name of the rule that contributes most.
fn sum<'r>(rules: impl Iterator<Item = &'r Rule> + Clone, cost: impl Fn(&Rule) -> u64) -> (u64, String) {
    let costs = rules.map(|rule| (cost(rule), rule));
    let most = costs.clone().max_by_key(|(cost, _)| *cost);
    let total = costs.fold(0_u64, |total, (cost, _)| total.saturating_add(cost));
    (total, most.map(|(_, rule)| rule.name.clone()).unwrap_or_default())
}

fn pairs(rule: &Rule) -> u64 {
    match (&rule.external, &rule.pods) {
        (Some(external), Some(pods)) => product(&[external.len(), pods.len()]),
        _ => 0,
    }
}

/// The number of iptables rules of one rule, both families together; at least the number that is rendered.
pub(crate) fn lines(rule: &Rule) -> u64 {
    let side = |nets: &Option<Vec<IpNet>>, v4: bool| match nets {
        None => 1,
        Some(nets) => nets.iter().filter(|net| matches!(net, IpNet::V4(_)) == v4).count(),
    };
    let has_ports = !rule.ports.is_empty() || !rule.source_ports.is_empty();
    let protocols = if rule.protocol == Protocol::Any && has_ports { 3 } else { 1 };
    let ports = [protocols, lists(&rule.ports), lists(&rule.source_ports)];
    let family = |v4: bool| product(&[side(&rule.external, v4), side(&rule.pods, v4)]);
    (family(true) + family(false)).saturating_mul(product(&ports))
}

/// The number of `multiport` matches that a list of ports takes, at most one more than the renderer needs.
fn lists(ports: &[PortRange]) -> usize {
    let slots: usize = ports.iter().map(|range| if range.first == range.last { 1 } else { 2 }).sum();
    slots.div_ceil(MULTIPORT - 1).max(1)
}

fn product(factors: &[usize]) -> u64 {
    factors.iter().fold(1, |product: u64, factor| product.saturating_mul(*factor as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Action, Direction, Mode, OnDeny};

    fn policy(rules: Vec<Rule>) -> Policy {
        Policy {
            mode: Mode::Enforce,
            on_deny: OnDeny::Reject,
            pods: vec!["10.200.0.0/16".parse().unwrap()],
            external: vec!["192.168.0.0/16".parse().unwrap()],
            nodes: Vec::new(),
            rules,
            audited: Vec::new(),
            node_ports: None,
        }
    }

    fn rule(ports: usize, source_ports: usize, networks: usize) -> Rule {
        let single = |count: usize| {
            let port = |index: usize| u16::try_from(index * 2 + 1).unwrap();
            (0..count).map(|index| PortRange { first: port(index), last: port(index) }).collect()
        };
        let nets = |prefix: &str| {
            let net = |index: usize| format!("{prefix}.{}.{}/32", index / 250, index % 250).parse().unwrap();
            (networks > 0).then(|| (0..networks).map(net).collect())
        };
        Rule {
            name: "r".into(),
            direction: Direction::Inbound,
            external: nets("192.168"),
            pods: nets("10.200"),
            protocol: Protocol::Tcp,
            ports: single(ports),
            source_ports: single(source_ports),
            action: Action::Allow,
        }
    }

    #[test]
    fn a_namespace_has_a_share_and_the_cluster_comes_first() {
        let limits = Shared { pairs: 1600, lines: 1600, pages: 1600 };
        let cost = |lines| Cost { lines, ..Cost::default() };
        let fits = |costs: &[(Option<&str>, Cost)]| -> Vec<bool> {
            limits.choose_by_namespace(costs).iter().map(Result::is_ok).collect()
        };
        // One tenant takes its sixteenth, and leaves that of another.
        let costs = [(Some("greedy"), cost(60)), (Some("greedy"), cost(60)), (Some("small"), cost(100))];
        assert_eq!(fits(&costs), [true, false, true]);
        // Policies of the cluster are cheaper or not: none is excluded by a namespace.
        assert_eq!(fits(&[(Some("a"), cost(1)), (None, cost(1600))]), [false, true]);
        assert_eq!(fits(&[(Some("a"), cost(1)), (None, cost(1599))]), [true, true]);
        // Tenants together: the cheapest first.
        let names: Vec<String> = (0..17).map(|number| format!("tenant-{number}")).collect();
        let mut costs: Vec<(Option<&str>, Cost)> =
            names.iter().map(|name| (Some(name.as_str()), cost(100))).collect();
        costs.push((Some("tiny"), cost(1)));
        let fit = fits(&costs);
        assert!(fit[17] && fit.iter().filter(|fits| **fits).count() == 16, "{fit:?}");
    }

    #[test]
    fn expensive_policies_exclude_no_cheap_one() {
        let cost = |lines| Cost { pairs: 1, lines, pages: 1 };
        let limits = Shared { lines: 100, ..Shared::EBPF };
        let outcome = limits.choose(&[cost(90), cost(10), cost(60), cost(20), cost(10)]);
        let fits: Vec<bool> = outcome.iter().map(Result::is_ok).collect();
        assert_eq!(fits, [false, true, true, true, true]);
        let said = outcome[0].as_ref().unwrap_err().to_string();
        assert!(
            said.starts_with("it needs 90 iptables rules, and other policies leave 0 of the 100"),
            "{said}"
        );
        assert!(Shared::EBPF.choose(&[cost(90_000); 9]).iter().all(Result::is_ok));
        let outcome = Shared::EBPF.choose(&[Cost { pairs: 200_000, ..Cost::default() }; 6]);
        assert_eq!(outcome.iter().filter(|outcome| outcome.is_ok()).count(), 5);
    }

    #[test]
    fn ordinary_rules_are_within_the_budget() {
        let cost = check(&policy(vec![rule(60, 1, 40); 2]), &[]).unwrap();
        assert_eq!((cost.pairs, cost.lines), (3200, 2 * 40 * 40 * 5));
        check(&policy(vec![rule(1, 0, 0); 4000]), &[]).unwrap();
    }

    #[test]
    fn each_kind_of_excess_is_refused_with_its_figure() {
        let refused = |rules: Vec<Rule>| check(&policy(rules), &[]).unwrap_err().to_string();
        let lines = refused(vec![rule(60, 60, 40)]);
        assert!(lines.contains("need 40000 iptables rules, and 20000 are allowed"), "{lines}");
        let pairs = refused(vec![rule(1, 0, 450)]);
        assert!(pairs.contains("202500 pairs of external and pod networks, and 200000"), "{pairs}");
        // One of these stopped all policies of a cluster.
        let intervals = refused(vec![rule(1300, 1300, 0)]);
        assert!(intervals.contains("overlap in more than 131072 ways"), "{intervals}");
        let pages = refused(
            (0..600)
                .map(|index| Rule {
                    ports: vec![PortRange { first: index + 1, last: index + 1 }],
                    source_ports: (0..40)
                        .map(|port| PortRange { first: port * 300 + index, last: port * 300 + index })
                        .collect(),
                    ..rule(0, 0, 0)
                })
                .collect(),
        );
        assert!(pages.contains("pages of 1 KiB") || pages.contains("overlap"), "{pages}");
    }
}
