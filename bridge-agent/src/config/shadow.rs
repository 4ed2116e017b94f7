//! Finds rules that never match because a deny covers all of them.

use ipnet::IpNet;

use super::leaf::Problem;
use super::network::Network;
use super::ports::Ports;
use super::report::{Path, Report};
use super::rules::Rule;
use crate::model::{Action, PortRange, Protocol};

/// At most this many pairs of rules are compared, which takes some tens of milliseconds.
const MAX_COMPARISONS: usize = 1_000_000;

/// Warns of each allow that one deny covers. `path` points to the list.
pub(super) fn check(rules: &[Rule], path: &Path<'_>, report: &mut Report<'_>) {
    // Rules in audit mode decide nothing about others.
    let enforced = |rule: &&Rule| !rule.is_audited();
    let denies: Vec<&Rule> =
        rules.iter().filter(enforced).filter(|rule| rule.action == Action::Deny).collect();
    let mut left = MAX_COMPARISONS;
    for (index, rule) in
        rules.iter().enumerate().filter(|(_, rule)| rule.action == Action::Allow && !rule.is_audited())
    {
        let Some(rest) = left.checked_sub(denies.len()) else { return };
        left = rest;
        if let Some(deny) = denies.iter().find(|deny| covers(deny, rule)) {
            let message = format!("rule `{}` never matches: `{}` denies all of it", rule.name, deny.name);
            let help =
                format!("remove `{}`, or narrow `{}`; a deny wins over every allow", rule.name, deny.name);
            report.warn(&path.index(index), Problem::new(message, help));
        }
    }
}

/// Whether `wide` matches every flow that `narrow` matches.
fn covers(wide: &Rule, narrow: &Rule) -> bool {
    wide.direction == narrow.direction
        && covers_protocol(wide, narrow)
        && covers_networks(wide.external.as_deref(), narrow.external.as_deref())
        && covers_pods(wide, narrow)
        && covers_ports(wide.ports.as_ref(), narrow.ports.as_ref())
        && covers_ports(wide.source_ports.as_ref(), narrow.source_ports.as_ref())
}

fn covers_protocol(wide: &Rule, narrow: &Rule) -> bool {
    wide.protocol == narrow.protocol
        || wide.protocol == Protocol::Any
            && (narrow.protocol != Protocol::Icmp || wide.ports.is_none() && wide.source_ports.is_none())
}

fn covers_pods(wide: &Rule, narrow: &Rule) -> bool {
    if wide.selects() {
        return (&wide.pod_selector, &wide.namespace_selector)
            == (&narrow.pod_selector, &narrow.namespace_selector);
    }
    match &wide.pods {
        None => true,
        Some(_) => !narrow.selects() && covers_networks(wide.pods.as_deref(), narrow.pods.as_deref()),
    }
}

fn covers_networks(wide: Option<&[Network]>, narrow: Option<&[Network]>) -> bool {
    match (wide, narrow) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(wide), Some(narrow)) => {
            let contains = |inner: IpNet| wide.iter().any(|outer| outer.net().contains(&inner));
            narrow.iter().all(|inner| contains(inner.net()))
        }
    }
}

fn covers_ports(wide: Option<&Ports>, narrow: Option<&Ports>) -> bool {
    let Some(wide) = wide.map(Ports::normalised) else { return true };
    let narrow = narrow.map_or_else(|| vec![PortRange { first: 1, last: u16::MAX }], Ports::normalised);
    let contains =
        |inner: &PortRange| wide.iter().any(|outer| outer.first <= inner.first && inner.last <= outer.last);
    narrow.iter().all(contains)
}
