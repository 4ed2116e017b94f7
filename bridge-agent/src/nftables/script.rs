//! Scripts for `nft -f`, each one transaction: pure.

use std::{collections::BTreeMap, fmt::Write as _};

use super::carry::Carry;
use super::ruleset::{Chain, Collection, Element, Ruleset, TABLE};
use crate::firewall::Hits;

/// Elements of one command.
const CHUNK: usize = 1_000;

/// Returns the script that replaces whatever the table holds.
#[must_use]
pub fn full(wanted: &Ruleset) -> String {
    full_with(wanted, BTreeMap::new())
}

/// As [`full`]; named counters and the first element of each rule begin with these hits.
pub(super) fn full_with(wanted: &Ruleset, hits: BTreeMap<String, Hits>) -> String {
    let carry = Carry { hits, ..Carry::default() };
    removal() + &change_with(&Ruleset::default(), wanted, &carry)
}

/// Returns the script that removes the table, whether or not it exists.
pub(super) fn removal() -> String {
    format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
}

/// Returns the script from one content of the table to another; elements that stay keep their counters. Empty if
/// nothing changes.
pub(super) fn change(from: &Ruleset, to: &Ruleset) -> String {
    change_with(from, to, &Carry::default())
}

/// As [`change`], and rules whose elements move keep their hits.
pub(super) fn change_with(from: &Ruleset, to: &Ruleset, carry: &Carry) -> String {
    let mut text = String::new();
    declare(&mut text, from, to, &carry.hits);
    let stale = from.chains.iter().filter(|(name, chain)| {
        to.chains.get(*name).is_none_or(|next| next.rules != chain.rules) && !chain.rules.is_empty()
    });
    for (name, _) in stale {
        line(&mut text, format_args!("flush chain inet {TABLE} {name}"));
    }
    for (kind, name, collection) in from.collections() {
        match find(to, kind, name) {
            None => line(&mut text, format_args!("delete {kind} inet {TABLE} {name}")),
            Some(next) => {
                let gone = collection
                    .elements
                    .iter()
                    .filter(|(key, e)| next.elements.get(*key) != Some(e) || carry.rewrites(name, &e.rule));
                elements(&mut text, "delete", name, gone, None);
            }
        }
    }
    let mut hits = carry.hits.clone();
    for (kind, name, collection) in to.collections() {
        let before = find(from, kind, name);
        let fresh = |(key, element): &(&String, &Element)| {
            before.is_none_or(|before| before.elements.get(*key) != Some(element))
                || carry.rewrites(name, &element.rule)
        };
        let counts = collection.counts.then_some(&mut hits);
        elements(&mut text, "add", name, collection.elements.iter().filter(fresh), counts);
    }
    for (name, chain) in &to.chains {
        if from.chains.get(name).is_none_or(|before| before.rules != chain.rules) {
            for rule in &chain.rules {
                line(&mut text, format_args!("add rule inet {TABLE} {name} {rule}"));
            }
        }
    }
    for name in from.chains.keys().filter(|name| !to.chains.contains_key(*name)) {
        line(&mut text, format_args!("delete chain inet {TABLE} {name}"));
    }
    for name in from.counters.difference(&to.counters) {
        line(&mut text, format_args!("delete counter inet {TABLE} {name}"));
    }
    text
}

/// Declares everything new, without content.
fn declare(text: &mut String, from: &Ruleset, to: &Ruleset, hits: &BTreeMap<String, Hits>) {
    let mut body = String::new();
    for name in to.counters.difference(&from.counters) {
        match hits.get(&format!("bridge:{name}")) {
            Some(Hits { packets, bytes }) => {
                line(&mut body, format_args!("\tcounter {name} {{ packets {packets} bytes {bytes} }}"));
            }
            None => line(&mut body, format_args!("\tcounter {name} {{ }}")),
        }
    }
    for (kind, name, collection) in to.collections() {
        if find(from, kind, name).is_none() {
            let verdict = if kind == "map" { " : verdict" } else { "" };
            let counter = if collection.counts { " counter;" } else { "" };
            let key = &collection.key;
            let interval = if collection.exact { "" } else { " flags interval;" };
            line(&mut body, format_args!("\t{kind} {name} {{ typeof {key}{verdict};{interval}{counter} }}"));
        }
    }
    for (name, Chain { hook, .. }) in to.chains.iter().filter(|(name, _)| !from.chains.contains_key(*name)) {
        match hook {
            Some(hook) => line(
                &mut body,
                format_args!(
                    "\tchain {name} {{ type filter hook {} priority {}; policy accept; }}",
                    hook.name, hook.priority
                ),
            ),
            None => line(&mut body, format_args!("\tchain {name} {{ }}")),
        }
    }
    if !body.is_empty() {
        line(text, format_args!("table inet {TABLE} {{\n{body}}}"));
    }
}

fn find<'a>(of: &'a Ruleset, kind: &str, name: &str) -> Option<&'a Collection> {
    if kind == "map" { of.maps.get(name) } else { of.sets.get(name) }
}

/// `counts`: hits with which the first element of a rule begins, if packets are counted.
fn elements<'a>(
    text: &mut String,
    verb: &str,
    collection: &str,
    elements: impl Iterator<Item = (&'a String, &'a Element)>,
    mut counts: Option<&mut BTreeMap<String, Hits>>,
) {
    let mut elements = elements.peekable();
    while elements.peek().is_some() {
        line(text, format_args!("{verb} element inet {TABLE} {collection} {{"));
        for (key, Element { rule, verdict }) in elements.by_ref().take(CHUNK) {
            let counter = match counts.as_deref_mut().map(|hits| hits.remove(rule)) {
                None => String::new(),
                Some(None) => " counter".to_owned(),
                Some(Some(Hits { packets, bytes })) => format!(" counter packets {packets} bytes {bytes}"),
            };
            let comment = if counts.is_some() && !rule.is_empty() {
                format!(" comment \"{rule}\"")
            } else {
                String::new()
            };
            let verdict = if verdict.is_empty() { String::new() } else { format!(" : {verdict}") };
            line(text, format_args!("\t{key}{counter}{comment}{verdict},"));
        }
        text.push_str("}\n");
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    let written = writeln!(text, "{line}");
    debug_assert!(written.is_ok(), "writing to a String does not fail");
}
