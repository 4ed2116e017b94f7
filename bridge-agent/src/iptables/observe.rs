//! Parses the output of `iptables-save -c`; pure.

use std::collections::{BTreeMap, BTreeSet};

use super::ruleset::is_own;
use super::ruleset::{Jump, Table, TableRules};
use crate::firewall::Hits;

/// The rules in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedTable {
    /// Whether the table is there at all; the kernel makes one when it is first used.
    pub present: bool,
    /// In the order of the output; own and foreign.
    pub chains: Vec<ObservedChain>,
}

/// A chain and its rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedChain {
    /// Built-in or not.
    pub name: String,
    /// `ACCEPT` or `DROP`, or `-` if the chain is not built in.
    pub policy: String,
    /// In order.
    pub rules: Vec<ObservedRule>,
}

/// A rule as the kernel gives it back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedRule {
    /// Without `-A CHAIN`.
    pub rule: String,
    /// Packets and bytes; zero if the output has no counters.
    pub hits: Hits,
}

/// A rule in a foreign chain that leads to an own one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedJump {
    /// The chain it stands in.
    pub hook: String,
    /// From 1.
    pub position: usize,
    /// Without `-A CHAIN`.
    pub rule: String,
}

/// Comment of a jump whose table was not there before bridge came.
pub(super) const TABLE_WAS_ABSENT: &str = "bridge:jump:table-was-absent";

impl ObservedJump {
    /// Whether this is the wanted jump, in the wanted place.
    #[must_use]
    pub fn is(&self, wanted: &Jump) -> bool {
        let target = target(&self.rule);
        let plain = self.rule.split_whitespace().count() == 6;
        self.position == 1 && plain && format!("-j {}", target.unwrap_or_default()) == wanted.line.target
    }
}

impl ObservedTable {
    /// Names of bridge's chains.
    pub fn own_chains(&self) -> impl Iterator<Item = &str> {
        self.chains.iter().map(|chain| chain.name.as_str()).filter(|name| is_own(name))
    }

    /// Rules in foreign chains that lead to own ones.
    #[must_use]
    pub fn own_jumps(&self) -> Vec<ObservedJump> {
        let foreign = self.chains.iter().filter(|chain| !is_own(&chain.name));
        foreign
            .flat_map(|chain| {
                let jumps =
                    chain.rules.iter().enumerate().filter(|(_, r)| target(&r.rule).is_some_and(is_own));
                jumps.map(|(index, rule)| ObservedJump {
                    hook: chain.name.clone(),
                    position: index + 1,
                    rule: rule.rule.clone(),
                })
            })
            .collect()
    }

    /// Whether bridge made the table: a jump says so.
    #[must_use]
    pub fn was_absent(&self) -> bool {
        self.own_jumps().iter().any(|jump| comment(&jump.rule) == Some(TABLE_WAS_ABSENT))
    }

    /// Whether nothing stands in the table that its mere existence does not bring.
    #[must_use]
    pub fn is_pristine(&self) -> bool {
        self.chains.iter().all(|chain| chain.policy == "ACCEPT" && chain.rules.is_empty())
    }

    /// Returns the rules of bridge, in a form that differs whenever the verdict on some packet may differ.
    #[must_use]
    pub fn own(&self) -> OwnRules {
        let chains = self.chains.iter().filter(|chain| is_own(&chain.name));
        OwnRules {
            chains: chains
                .map(|chain| (chain.name.clone(), chain.rules.iter().map(|r| r.rule.clone()).collect()))
                .collect(),
            jumps: self.own_jumps().into_iter().map(|jump| (jump.hook, jump.position, jump.rule)).collect(),
        }
    }

    /// Leaves out the rules of own chains: a plan does not depend on them.
    pub(super) fn without_own_rules(mut self) -> Self {
        for chain in self.chains.iter_mut().filter(|chain| is_own(&chain.name)) {
            chain.rules = Vec::new();
        }
        self
    }

    /// Packets and bytes of each rule of own chains, added up by the name in its comment.
    #[must_use]
    pub fn hits(&self) -> BTreeMap<String, Hits> {
        let mut hits: BTreeMap<String, Hits> = BTreeMap::new();
        for rule in self.chains.iter().filter(|chain| is_own(&chain.name)).flat_map(|chain| &chain.rules) {
            if let Some(name) = comment(&rule.rule) {
                *hits.entry(name.into()).or_default() += rule.hits;
            }
        }
        hits
    }

    /// The first way in which the table is not as `wanted`, in words; `None` if nothing is missing.
    ///
    /// Matches are not compared: iptables prints them in words of its own. [`ObservedTable::own`] of right after an
    /// apply is the reference for later states.
    #[must_use]
    pub fn mismatch(&self, table: Table, wanted: Option<&TableRules>) -> Option<String> {
        let own = self.own();
        let Some(wanted) = wanted else {
            return (own != OwnRules::default()).then(|| format!("table {table} still has chains of bridge"));
        };
        for jump in &wanted.jumps {
            let there: Vec<_> = self.own_jumps().into_iter().filter(|j| j.hook == jump.hook).collect();
            match there.as_slice() {
                [one] if one.is(jump) => {}
                [] => {
                    return Some(format!(
                        "table {table}, chain {}: the jump to bridge is missing",
                        jump.hook
                    ));
                }
                _ => {
                    return Some(format!(
                        "table {table}, chain {}: the jump to bridge is not first",
                        jump.hook
                    ));
                }
            }
        }
        for chain in &wanted.chains {
            let Some(there) = self.chains.iter().find(|c| c.name == chain.name) else {
                return Some(format!("table {table}: chain {} is missing", chain.name));
            };
            let names = there.rules.iter().map(|r| comment(&r.rule).unwrap_or_default());
            if !names.eq(chain.lines.iter().map(|line| line.name.as_str())) {
                return Some(format!(
                    "table {table}: chain {} does not have the rules it should",
                    chain.name
                ));
            }
        }
        let extra = self.own_chains().find(|name| !wanted.chains.iter().any(|chain| chain.name == **name));
        extra.map(|name| format!("table {table}: chain {name} should not be there"))
    }
}

/// See [`ObservedTable::own`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnRules {
    chains: BTreeMap<String, Vec<String>>,
    jumps: Vec<(String, usize, String)>,
}

impl OwnRules {
    /// Returns the number of rules in own chains, and of jumps to them.
    pub(super) fn rules(&self) -> usize {
        self.chains.values().map(Vec::len).sum::<usize>() + self.jumps.len()
    }

    /// The rules of an own chain, in order.
    pub(super) fn chain(&self, name: &str) -> Option<impl Iterator<Item = &str>> {
        self.chains.get(name).map(|rules| rules.iter().map(String::as_str))
    }

    /// Returns whether a chain is in `table` as it is here.
    pub(super) fn has_chain(&self, name: &str, table: &ObservedTable) -> bool {
        let there = table.chains.iter().find(|chain| chain.name == name);
        there
            .zip(self.chains.get(name))
            .is_some_and(|(there, rules)| there.rules.iter().map(|rule| &rule.rule).eq(rules))
    }

    /// Chains that are here as they are there.
    pub(super) fn same_chains(&self, other: &Self) -> BTreeSet<&str> {
        let same = self.chains.iter().filter(|(name, rules)| other.chains.get(*name) == Some(*rules));
        same.map(|(name, _)| name.as_str()).collect()
    }

    /// The rules of a built-in chain that lead to own ones, in order.
    pub(super) fn jumps_of(&self, hook: &str) -> impl Iterator<Item = &str> {
        self.jumps.iter().filter(move |(at, ..)| at == hook).map(|(_, _, rule)| rule.as_str())
    }

    /// Describes the first change to these rules; `None` if there is none.
    #[must_use]
    pub fn drift(&self, table: Table, now: &Self) -> Option<String> {
        if self == now {
            return None;
        }
        for (hook, ..) in &self.jumps {
            let of = |rules: &Self| rules.jumps.iter().filter(|j| j.0 == *hook).cloned().collect::<Vec<_>>();
            if of(now).is_empty() {
                return Some(format!("table {table}, chain {hook}: the jump to bridge was removed"));
            }
            if of(now) != of(self) {
                return Some(format!("table {table}, chain {hook}: the jump to bridge is no longer first"));
            }
        }
        for (name, rules) in &self.chains {
            let Some(there) = now.chains.get(name) else {
                return Some(format!("table {table}: chain {name} was removed"));
            };
            if there != rules {
                let before = rules.len();
                let after = there.len();
                return Some(format!(
                    "table {table}: chain {name} was changed ({before} rules, now {after})"
                ));
            }
        }
        Some(format!("table {table}: something was added under the name of bridge"))
    }
}

/// Reads the output of `iptables-save`, with or without `-c`. Lines that are no rules are passed over.
#[must_use]
pub fn parse(save: &str) -> BTreeMap<String, ObservedTable> {
    let mut tables: BTreeMap<String, ObservedTable> = BTreeMap::new();
    let mut current = String::new();
    let mut last = 0;
    for line in save.lines() {
        if let Some(name) = line.strip_prefix('*') {
            name.trim_end().clone_into(&mut current);
            tables.insert(current.clone(), ObservedTable { present: true, chains: Vec::new() });
        } else if let Some(table) = tables.get_mut(&current) {
            last = table.line(line, last);
        }
    }
    tables
}

impl ObservedTable {
    /// Takes in one line; `last` is the index of the chain of the rule before, since a chain's rules come in a row.
    fn line(&mut self, line: &str, last: usize) -> usize {
        if let Some(declared) = line.strip_prefix(':') {
            let mut words = declared.split_whitespace();
            let name = words.next().unwrap_or_default().to_owned();
            let policy = words.next().unwrap_or("-").to_owned();
            self.chains.push(ObservedChain { name, policy, rules: Vec::new() });
            return 0;
        }
        let (hits, rest) = match line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
            Some((counters, rest)) => (parse_hits(counters), rest),
            None => (Hits::default(), line),
        };
        let Some((chain, rule)) =
            rest.strip_prefix("-A ").map(|rest| rest.split_once(' ').unwrap_or((rest, "")))
        else {
            return last;
        };
        let rule = ObservedRule { rule: rule.to_owned(), hits };
        let from_last = (last..self.chains.len()).chain(0..last);
        let Some(index) = from_last.into_iter().find(|index| self.chains[*index].name == chain) else {
            return last;
        };
        self.chains[index].rules.push(rule);
        index
    }
}

fn parse_hits(counters: &str) -> Hits {
    let (packets, bytes) = counters.split_once(':').unwrap_or((counters, "0"));
    Hits { packets: packets.parse().unwrap_or(0), bytes: bytes.parse().unwrap_or(0) }
}

/// The chain or target that a rule leads to.
pub(super) fn target(rule: &str) -> Option<&str> {
    // A comment is quoted if it holds a blank, and could hold anything: text between quotes does not count. An
    // escaped quote inside ends one part and begins another, which makes no difference here.
    let outside = rule.split('"').step_by(2);
    outside.into_iter().find_map(|part| {
        let mut words = part.split_whitespace();
        words.by_ref().find(|word| matches!(*word, "-j" | "-g"))?;
        words.next()
    })
}

/// The text of the comment; own comments hold neither blanks nor quotes.
pub(super) fn comment(rule: &str) -> Option<&str> {
    let (_, after) = rule.split_once("--comment ")?;
    after.split_whitespace().next().map(|word| word.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_told_from_a_comment() {
        assert_eq!(target("-j BRIDGE-FORWARD"), Some("BRIDGE-FORWARD"));
        assert_eq!(target("-s 192.0.2.1/32 -g X --opt"), Some("X"));
        assert_eq!(target(r#"-m comment --comment "see -j BRIDGE-FORWARD""#), None);
        assert_eq!(target(r#"-m comment --comment "a -j BRIDGE-X" -j ACCEPT"#), Some("ACCEPT"));
    }

    const SAVE: &str = "# remark\n*filter\n:FORWARD DROP [1:2]\n:BRIDGE-FORWARD - [0:0]\n\
                        [3:4] -A FORWARD -m comment --comment \"bridge:jump\" -j BRIDGE-FORWARD\n\
                        [5:6] -A FORWARD -j ACCEPT\n[7:8] -A BRIDGE-FORWARD -m comment --comment ping -j RETURN\n\
                        [1:1] -A BRIDGE-FORWARD -m comment --comment ping -j DROP\nCOMMIT\n";

    #[test]
    fn counters_are_added_up_by_name() {
        let table = parse(SAVE).remove("filter").unwrap();
        assert_eq!(table.hits(), BTreeMap::from([("ping".to_owned(), Hits { packets: 8, bytes: 9 })]));
    }

    #[test]
    fn drift_is_told_in_words_and_foreign_changes_are_none() {
        let written = parse(SAVE).remove("filter").unwrap().own();
        let drift = |from: &str, to: &str| {
            let changed = SAVE.replacen(from, to, 1);
            assert_ne!(changed, SAVE);
            written.drift(Table::Filter, &parse(&changed).remove("filter").unwrap().own())
        };
        assert_eq!(drift("[5:6] -A FORWARD -j ACCEPT\n", ""), None);
        assert_eq!(drift("[7:8]", "[9:9]"), None);
        let first = drift("[3:4]", "[0:0] -A FORWARD -j ACCEPT\n[3:4]").unwrap();
        assert!(first.ends_with("the jump to bridge is no longer first"), "{first}");
        let removed =
            drift("[3:4] -A FORWARD -m comment --comment \"bridge:jump\" -j BRIDGE-FORWARD\n", "").unwrap();
        assert!(removed.ends_with("the jump to bridge was removed"), "{removed}");
        let changed = drift("[1:1] -A BRIDGE-FORWARD -m comment --comment ping -j DROP\n", "").unwrap();
        assert!(changed.ends_with("chain BRIDGE-FORWARD was changed (2 rules, now 1)"), "{changed}");
    }
}
