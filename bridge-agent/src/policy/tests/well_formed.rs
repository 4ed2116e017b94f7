//! Properties that the kernel relies on without a check.

use std::collections::HashSet;

use bridge_common::filter::policy::{INTERVALS, PortIntervals, PortPage, reference as abi};
use ipnet::IpNet;

use crate::model::Policy;
use crate::policy::{NODE_PORTS_RULE, Tables};

/// Position of a reference, and so its possible kinds.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    /// Resolved by destination port.
    Root,
    /// A result by destination port; resolved by source port.
    Second,
    /// A result by source port.
    Leaf,
}

pub(super) fn check(policy: &Policy, tables: &Tables) {
    let rules = u32::try_from(tables.rules.len()).expect("few");
    assert_eq!(tables.rule_count, rules);
    let first_audited = policy.rules.len() + usize::from(policy.node_ports.is_some());
    assert_eq!(tables.rules.len(), first_audited + policy.audited.len());
    for (index, info) in tables.rules.iter().enumerate() {
        let audited = index.checked_sub(first_audited).map(|index| &policy.audited[index]);
        let rule = policy.rules.get(index).or(audited);
        let name = rule.map_or(NODE_PORTS_RULE, |rule| &rule.name);
        assert_eq!(info.audit != 0, audited.is_some());
        assert_eq!(&info.name[..name.len()], name.as_bytes());
        assert!(info.name[name.len()..].iter().all(|&byte| byte == 0), "filled up with zeros");
    }

    assert!(tables.addresses.is_sorted_by(|a, b| a.0 < b.0), "prefixes ascend, each once");
    assert!(tables.addresses.iter().all(|(prefix, _)| *prefix == prefix.trunc()), "no host bits");
    assert!(tables.pairs.is_sorted_by(|a, b| (a.0.external, a.0.pod) < (b.0.external, b.0.pod)));
    let used_by_addresses = tables.addresses.iter().flat_map(|(_, info)| info.sets);
    let used_by_pairs = tables.pairs.iter().flat_map(|(_, pair)| pair.sets);
    for set in used_by_addresses.chain(used_by_pairs).chain(tables.global_sets) {
        assert!((set as usize) < tables.rule_sets.len(), "set {set} is there");
    }
    assert!(tables.pairs.iter().all(|(key, _)| key.external != 0 && key.pod != 0), "class 0 is in no pair");
    assert_eq!(tables.rule_sets[0].roots, [0; 5], "set 0 is empty");
    let mut references = References { tables, seen: HashSet::new() };
    for set in &tables.rule_sets {
        for (number, root) in set.roots.into_iter().chain(set.audited).enumerate() {
            references.check(root, Place::Root);
            let protocol = number % set.roots.len();
            if protocol > 2 {
                assert_eq!(abi::tag(root), abi::LEAF, "protocol {protocol} has no ports");
            }
        }
    }
    references.check(tables.node_port_root, Place::Root);

    let narrows: HashSet<&PortIntervals> = tables.narrows.iter().collect();
    assert_eq!(narrows.len(), tables.narrows.len(), "each is there once");
    let pages: HashSet<&PortPage> = tables.pages.iter().collect();
    assert_eq!(pages.len(), tables.pages.len(), "each is there once");
    let v4 = tables.addresses.iter().filter(|(prefix, _)| matches!(prefix, IpNet::V4(_))).count();
    assert_eq!(tables.stats().addresses4, v4);
    assert_eq!(tables.stats().addresses6, tables.addresses.len() - v4);
}

struct References<'a> {
    tables: &'a Tables,
    seen: HashSet<(u32, Place)>,
}

impl References<'_> {
    fn check(&mut self, value: u32, place: Place) {
        if !self.seen.insert((value, place)) {
            return;
        }
        let tables = self.tables;
        let index = (value & abi::VALUE) as usize;
        let below = if place == Place::Root { Place::Second } else { Place::Leaf };
        match abi::tag(value) {
            abi::LEAF => leaf(tables, value),
            _ if place == Place::Leaf => panic!("{value:#x} would need a third lookup"),
            abi::INTERVALS => {
                let narrow = &tables.narrows[index];
                padding(narrow);
                narrow.references.iter().for_each(|&result| self.check(result, below));
            }
            abi::DIRECTORY => {
                for &entry in &tables.pages[index].references {
                    if abi::tag(entry) == abi::PAGE {
                        let page = &tables.pages[(entry & abi::VALUE) as usize];
                        page.references.iter().for_each(|&result| self.check(result, below));
                    } else {
                        self.check(entry, below);
                    }
                }
            }
            _ => panic!("{value:#x} is a page outside a directory"),
        }
    }
}

fn leaf(tables: &Tables, value: u32) {
    let rule = value & abi::RULE;
    assert!(rule <= tables.rule_count, "rule {rule} is there");
    if rule > 0 {
        let info = tables.rules[rule as usize - 1];
        assert_eq!(value & abi::DENY != 0, info.deny == 1, "leaf {value:#x} has the action of rule {rule}");
    } else {
        assert_eq!(value, 0, "no rule, no verdict");
    }
}

fn padding(narrow: &PortIntervals) {
    assert_eq!(narrow.first[0], 0, "covers every port");
    assert_eq!(narrow.padding, 0);
    let used = 1 + narrow.first.windows(2).take_while(|pair| pair[0] < pair[1]).count();
    for slot in used..INTERVALS {
        assert_eq!(narrow.first[slot], narrow.first[used - 1], "unused intervals repeat the last");
        assert_eq!(narrow.references[slot], narrow.references[used - 1], "unused intervals repeat the last");
    }
}
