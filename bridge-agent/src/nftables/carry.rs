//! Counters of rules whose elements move to other maps or keys: pure.
//!
//! Another rule may push the elements of a rule into another layer, or a prefix its map into another kind. New elements
//! begin at zero, so the hits of the old ones are added to the first new one.

use std::collections::{BTreeMap, BTreeSet};

use super::ruleset::{Collection, Ruleset};
use crate::firewall::Hits;

/// The elements of one rule in one map: names of the map and of the rule.
pub(super) type Group = (String, String);

/// Hits to carry over in a change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Carry {
    /// Groups whose elements are all written again, with the counters that they had in `hits`.
    pub(super) groups: BTreeSet<Group>,
    /// By rule.
    pub(super) hits: BTreeMap<String, Hits>,
}

impl Carry {
    /// Carries the hits of `groups`.
    pub(super) fn new(groups: BTreeSet<Group>, counted: &BTreeMap<Group, Hits>) -> Self {
        let mut hits: BTreeMap<String, Hits> = BTreeMap::new();
        for group in &groups {
            *hits.entry(group.1.clone()).or_default() += counted.get(group).copied().unwrap_or_default();
        }
        hits.retain(|_, of| *of != Hits::default());
        Self { groups, hits }
    }

    /// Whether the element of a rule in a map is written again.
    pub(super) fn rewrites(&self, map: &str, rule: &str) -> bool {
        !self.groups.is_empty() && self.groups.contains(&(map.to_owned(), rule.to_owned()))
    }
}

/// Returns the groups whose elements move: those that lose some, of rules that have the same keys as before, and of these some
/// elsewhere. A rule with other keys is another rule: to read all counters takes longer than to change it.
pub(super) fn moved(from: &Ruleset, to: &Ruleset) -> BTreeSet<Group> {
    let mut groups = missing(from, to);
    let rules: BTreeSet<&str> = groups.iter().map(|(_, rule)| rule.as_str()).collect();
    let same: BTreeSet<String> = if rules.is_empty() {
        BTreeSet::new()
    } else {
        let (before, after) = (keys(from, &rules), keys(to, &rules));
        before
            .iter()
            .filter(|(rule, keys)| after.get(*rule) == Some(keys))
            .map(|(rule, _)| (*rule).to_owned())
            .collect()
    };
    groups.retain(|(_, rule)| same.contains(rule));
    groups
}

/// Returns the keys of rules, in whichever map they are.
fn keys<'a>(of: &'a Ruleset, rules: &BTreeSet<&str>) -> BTreeMap<&'a str, BTreeSet<&'a str>> {
    let elements = of.maps.values().filter(|map| map.counts).flat_map(|map| &map.elements);
    let mut keys: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (key, element) in elements.filter(|(_, element)| rules.contains(element.rule.as_str())) {
        keys.entry(element.rule.as_str()).or_default().insert(key.as_str());
    }
    keys
}

/// Returns the groups of `of` with elements that `other` lacks.
fn missing(of: &Ruleset, other: &Ruleset) -> BTreeSet<Group> {
    let counted = of.maps.iter().filter(|(_, map)| map.counts);
    let lost = |(name, map): (&String, &Collection)| -> Vec<Group> {
        let there = other.maps.get(name);
        let gone = map.elements.iter().filter(|(key, element)| {
            !element.rule.is_empty() && there.is_none_or(|there| there.elements.get(*key) != Some(*element))
        });
        gone.map(|(_, element)| (name.clone(), element.rule.clone())).collect()
    };
    counted.flat_map(lost).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nftables::{ruleset::Element, script};

    fn rules(maps: &[(&str, &[(&str, &str)])]) -> Ruleset {
        let mut rules = Ruleset::default();
        for (name, elements) in maps {
            let element = |rule: &str| Element { rule: rule.into(), verdict: "accept".into() };
            let elements = elements.iter().map(|(key, rule)| ((*key).to_owned(), element(rule))).collect();
            let map = Collection { key: "th dport".into(), exact: false, counts: true, elements };
            rules.maps.insert((*name).to_owned(), map);
        }
        rules
    }

    fn counted(map: &str, rule: &str, packets: u64) -> (Group, Hits) {
        ((map.into(), rule.into()), Hits { packets, bytes: packets * 60 })
    }

    #[test]
    fn hits_follow_a_rule_to_another_map() {
        let from = rules(&[("d-0", &[("8000-9000", "wide")]), ("d-1", &[("8500-9500", "other")])]);
        let to = rules(&[("d-0", &[("8500-9500", "other")])]);
        let groups = moved(&from, &to);
        assert_eq!(groups, BTreeSet::from([("d-1".into(), "other".into())]));
        let carry = Carry::new(groups, &[counted("d-0", "wide", 9), counted("d-1", "other", 6)].into());
        let script = script::change_with(&from, &to, &carry);
        assert!(
            script.contains("8500-9500 counter packets 6 bytes 360 comment \"other\" : accept,"),
            "{script}"
        );
        assert!(!script.contains("packets 9"), "{script}");
    }

    #[test]
    fn elements_that_stay_are_written_again_beside_those_that_move() {
        let from = rules(&[("d-0", &[("80", "other"), ("90", "api"), ("8500-9500", "other")])]);
        let to = rules(&[("d-0", &[("80", "other"), ("90", "api")]), ("d-1", &[("8500-9500", "other")])]);
        let carry = Carry::new(moved(&from, &to), &[counted("d-0", "other", 5)].into());
        let script = script::change_with(&from, &to, &carry);
        assert_eq!(script.matches("counter packets 5 bytes 300").count(), 1, "{script}");
        assert_eq!(script.matches("\t80 ").count(), 2, "deleted and added: {script}");
        assert!(!script.contains("90"), "{script}");
    }

    #[test]
    fn nothing_moves_with_a_rule_that_comes_or_goes_or_has_other_ports() {
        let (one, two) = (rules(&[("d-0", &[("80", "a")])]), rules(&[("d-0", &[("80", "a"), ("81", "b")])]));
        assert!(moved(&one, &two).is_empty() && moved(&two, &one).is_empty());
        let three = rules(&[("d-0", &[("80", "a"), ("82", "b")])]);
        assert!(moved(&two, &three).is_empty());
    }
}
