//! Rules that name several LAN hosts and several pods, without a line for each pair.
//!
//! Two lists of n and m prefixes are n times m lines if written out: iptables takes one prefix of each side a line,
//! and a jump cannot return "allowed, leave" apart from "no match, go on". Instead the pods are looked up first: a
//! packet goes, by its pod's longest prefix, to a chain that holds just the rules for that pod, LAN hosts only. Pods
//! with the same rules share a chain, so the lines are n plus m. An ipset would do it in one line, but a saved table
//! that refers to a set is refused at boot if the set is not there yet.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::parts::{Selected, chain, line};
use crate::iptables::ruleset::{Chain, Line};
use crate::model::{Action, Direction};

/// A run of rules with the same action.
#[derive(Default)]
pub(super) struct Section {
    /// For the chain that judges.
    pub(super) lines: Vec<Line>,
    /// The chains that the lines lead to.
    pub(super) chains: Vec<Chain>,
}

/// Writes rules of one direction and action; in order, but for those that are looked up by pod, which come last.
pub(super) fn section(
    rules: &[Selected<'_>],
    direction: Direction,
    action: Action,
    may_dispatch: bool,
) -> Section {
    let pairs = |rule: &Selected<'_>| len(&rule.external) * len(&rule.pods);
    let wide = |rule: &&Selected<'_>| pairs(rule) > len(&rule.external) + len(&rule.pods);
    let by_pod: Vec<&Selected<'_>> = rules.iter().filter(wide).collect();
    let flat: usize = by_pod.iter().map(|rule| pairs(rule) * rule.layer4().len()).sum();
    let dispatched = by_pod_section(&by_pod, direction, action);
    let size = dispatched.lines.len() + dispatched.chains.iter().map(|c| c.lines.len()).sum::<usize>();
    let dispatch = may_dispatch && size < flat;

    let mut section = Section::default();
    for rule in rules {
        if !(dispatch && wide(&rule)) {
            section.lines.extend(written_out(rule, direction, action));
        }
    }
    if dispatch {
        section.lines.extend(dispatched.lines);
        section.chains = dispatched.chains;
    }
    section
}

fn len(side: &Option<Vec<IpNet>>) -> usize {
    side.as_ref().map_or(1, Vec::len)
}

/// A line for each pair of prefixes.
fn written_out(rule: &Selected<'_>, direction: Direction, action: Action) -> Vec<Line> {
    let layer4 = rule.layer4();
    let mut lines = Vec::new();
    for external in optional(&rule.external) {
        for pod in optional(&rule.pods) {
            lines.extend(layer4.iter().map(|l4| verdict(rule, direction, action, external, pod, l4)));
        }
    }
    lines
}

fn optional(side: &Option<Vec<IpNet>>) -> Vec<Option<IpNet>> {
    side.as_ref().map_or_else(|| vec![None], |nets| nets.iter().copied().map(Some).collect())
}

fn verdict(
    rule: &Selected<'_>,
    direction: Direction,
    action: Action,
    external: Option<IpNet>,
    pod: Option<IpNet>,
    layer4: &str,
) -> Line {
    let (source, destination) = match direction {
        Direction::Inbound => (external, pod),
        Direction::Outbound => (pod, external),
    };
    let side =
        |option: &str, net: Option<IpNet>| net.map_or_else(String::new, |net| format!(" {option} {net}"));
    let matches = format!("{}{}{layer4}", side("-s", source), side("-d", destination));
    let target = match action {
        Action::Allow => "-j RETURN",
        Action::Deny => "-g BRIDGE-DENY",
    };
    line(&matches, &rule.rule.name, target)
}

fn by_pod_section(rules: &[&Selected<'_>], direction: Direction, action: Action) -> Section {
    let (option, place) = match direction {
        Direction::Inbound => ("-d", "IN"),
        Direction::Outbound => ("-s", "OUT"),
    };
    let (kind, no_match) = match action {
        Action::Allow => ("ALLOW", Some(line("", "bridge:no-rule", "-g BRIDGE-DENY"))),
        Action::Deny => ("DENY", None),
    };
    // Deny chains are left again by a packet that nothing in them denies, so they are called; allow chains are not.
    let jump = if no_match.is_some() { "-g" } else { "-j" };
    let mut section = Section::default();
    let mut chain_of: BTreeMap<Vec<usize>, String> = BTreeMap::new();
    for (prefix, members) in classes(rules) {
        let number = chain_of.len() + 1;
        let name = chain_of.entry(members.clone()).or_insert_with(|| {
            let name = format!("BRIDGE-{place}-{kind}-{number}");
            let mut lines = Vec::new();
            for rule in members.iter().map(|index| rules[*index]) {
                for external in optional(&rule.external) {
                    let layer4 = rule.layer4();
                    lines
                        .extend(layer4.iter().map(|l4| verdict(rule, direction, action, external, None, l4)));
                }
            }
            lines.extend(no_match.clone());
            section.chains.push(chain(&name, lines));
            name
        });
        section.lines.push(line(&format!(" {option} {prefix}"), "bridge:pod", &format!("{jump} {name}")));
    }
    section
}

/// Every pod prefix of `rules`, longest first, with the rules that hold for the addresses which no longer prefix
/// covers: those that name it or a prefix around it.
fn classes(rules: &[&Selected<'_>]) -> Vec<(IpNet, Vec<usize>)> {
    let mut naming: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
    for (index, rule) in rules.iter().enumerate() {
        for prefix in rule.pods.iter().flatten() {
            naming.entry(*prefix).or_default().push(index);
        }
    }
    let mut classes: Vec<(IpNet, Vec<usize>)> = naming
        .keys()
        .map(|prefix| {
            let around =
                (0..=prefix.prefix_len()).filter_map(|length| IpNet::new(prefix.addr(), length).ok());
            let mut members: Vec<usize> =
                around.filter_map(|net| naming.get(&net.trunc())).flatten().copied().collect();
            members.sort_unstable();
            members.dedup();
            (*prefix, members)
        })
        .collect();
    classes.sort_by_key(|(prefix, _)| (std::cmp::Reverse(prefix.prefix_len()), *prefix));
    classes
}
