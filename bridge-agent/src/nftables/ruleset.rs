//! The table of bridge: counters, sets, verdict maps and chains, as text that nft reads.

use std::collections::{BTreeMap, BTreeSet};

/// The table of bridge, of family inet. (`bridge` alone is a word of nft's language.)
pub const TABLE: &str = "bridge-agent";

/// A set of prefixes or a verdict map by prefixes and ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collection {
    /// The expressions that an element is looked up by, joined by ` . `.
    pub key: String,
    /// Whether no element has a prefix or range: it is found by a hash of the key.
    pub exact: bool,
    /// Whether packets are counted by element.
    pub counts: bool,
    /// By key; sets have no verdicts.
    pub elements: BTreeMap<String, Element>,
}

/// The rest of an element beside its key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// The configured name of the rule; empty in sets and maps that lead to other chains.
    pub rule: String,
    /// `accept`, `goto CHAIN` or `jump CHAIN`; empty in sets.
    pub verdict: String,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Hook and priority of a base chain.
    pub hook: Option<Hook>,
    /// As nft reads them.
    pub rules: Vec<String>,
}

/// A place in the path of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// As nft names it.
    pub name: &'static str,
    /// Lower numbers come first.
    pub priority: i32,
}

/// All rules of bridge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Named counters: the reasons of denials.
    pub counters: BTreeSet<&'static str>,
    /// By name.
    pub sets: BTreeMap<String, Collection>,
    /// By name.
    pub maps: BTreeMap<String, Collection>,
    /// By name.
    pub chains: BTreeMap<String, Chain>,
}

impl Ruleset {
    /// Returns the number of elements of all sets and maps.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.collections().map(|(_, _, collection)| collection.elements.len()).sum()
    }

    /// Returns the number of rules of all chains.
    #[must_use]
    pub fn rules(&self) -> usize {
        self.chains.values().map(|chain| chain.rules.len()).sum()
    }

    /// Returns kind (`set` or `map`), name and content of every set and map.
    pub(super) fn collections(&self) -> impl Iterator<Item = (&'static str, &str, &Collection)> {
        let of = |kind| {
            move |(name, collection)| -> (&'static str, &String, &Collection) { (kind, name, collection) }
        };
        let all = self.sets.iter().map(of("set")).chain(self.maps.iter().map(of("map")));
        all.map(|(kind, name, collection)| (kind, name.as_str(), collection))
    }

    /// Adds a rule to a chain.
    pub(super) fn rule(&mut self, chain: impl Into<String>, rule: impl Into<String>) {
        self.chains.entry(chain.into()).or_default().rules.push(rule.into());
    }

    /// Adds a chain that packets enter at a hook.
    pub(super) fn base(&mut self, chain: &str, name: &'static str, priority: i32) {
        self.chains.entry(chain.into()).or_default().hook = Some(Hook { name, priority });
    }
}
