//! Rules that name several LAN hosts and several pods, without a line for each pair.
//!
//! Two lists of n and m prefixes are n times m lines if written out: iptables takes one prefix of each side a line,
//! and a jump cannot return "allowed, leave" apart from "no match, go on". Instead the pods are looked up first: a
//! packet goes, by its pod's longest prefix, to a chain that holds just the rules for that pod, LAN hosts only. Pods
//! with the same rules share a chain, so the lines are n plus m. An ipset would do it in one line, but a saved table
//! that refers to a set is refused at boot if the set is not there yet.

use std::collections::{BTreeMap, BTreeSet};

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

/// The form in which rules of one direction and action are written.
struct Form<'a, 's> {
    /// Rules that are looked up by pod; empty if all are written out.
    by_pod: Vec<&'a Selected<'s>>,
    /// Lines of all chains.
    lines: usize,
}

impl<'a, 's> Form<'a, 's> {
    /// Chooses the form that takes fewer lines.
    fn choose(rules: &'a [Selected<'s>], may_dispatch: bool) -> Self {
        let flat = |rules: &[&Selected<'_>]| {
            rules
                .iter()
                .map(|rule| pairs(rule).saturating_mul(rule.layer4_count()))
                .fold(0, usize::saturating_add)
        };
        let all: Vec<&Selected<'_>> = rules.iter().collect();
        let by_pod: Vec<&Selected<'_>> = rules.iter().filter(|rule| is_wide(rule)).collect();
        let written_out = Self { by_pod: Vec::new(), lines: flat(&all) };
        if !may_dispatch || by_pod.is_empty() {
            return written_out;
        }
        let narrow: Vec<&Selected<'_>> = rules.iter().filter(|rule| !is_wide(rule)).collect();
        let lines = flat(&narrow).saturating_add(by_pod_count(&by_pod));
        if lines < written_out.lines { Self { by_pod, lines } } else { written_out }
    }
}

/// Returns the number of lines that [`section`] writes, without writing them.
pub(super) fn count(rules: &[Selected<'_>], may_dispatch: bool) -> usize {
    Form::choose(rules, may_dispatch).lines
}

/// Writes rules of one direction and action; in order, but for those that are looked up by pod, which come last.
pub(super) fn section(
    rules: &[Selected<'_>],
    direction: Direction,
    action: Action,
    may_dispatch: bool,
) -> Section {
    let form = Form::choose(rules, may_dispatch);
    let mut section = Section::default();
    for rule in rules {
        if form.by_pod.is_empty() || !is_wide(rule) {
            section.lines.extend(written_out(rule, direction, action));
        }
    }
    if !form.by_pod.is_empty() {
        let dispatched = by_pod_section(&form.by_pod, direction, action);
        section.lines.extend(dispatched.lines);
        section.chains = dispatched.chains;
    }
    section
}

fn pairs(rule: &Selected<'_>) -> usize {
    len(&rule.external).saturating_mul(len(&rule.pods))
}

/// Whether a rule has more pairs of prefixes than prefixes.
fn is_wide(rule: &Selected<'_>) -> bool {
    pairs(rule) > len(&rule.external) + len(&rule.pods)
}

/// Returns the number of lines that [`by_pod_section`] writes for rules of one action.
fn by_pod_count(rules: &[&Selected<'_>]) -> usize {
    let classes = classes(rules);
    let chains: BTreeSet<&[usize]> = classes.iter().map(|(_, members)| members.as_slice()).collect();
    // Allow chains end in a line of their own.
    let last = usize::from(rules.iter().any(|rule| rule.rule.action == Action::Allow));
    let lines = |index: &usize| len(&rules[*index].external).saturating_mul(rules[*index].layer4_count());
    let chains =
        chains.into_iter().map(|members| members.iter().map(lines).fold(last, usize::saturating_add));
    chains.fold(classes.len(), usize::saturating_add)
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
