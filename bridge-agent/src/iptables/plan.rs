//! Plans the input of `iptables-restore --noflush` from the wanted and the observed rules; pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::observe::{ObservedTable, TABLE_WAS_ABSENT, comment};
use super::ruleset::{Family, Ruleset, Table, TableRules, is_own};
use crate::firewall::Hits;

/// The input of one `iptables-restore` call: one table, all or nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// Which program.
    pub family: Family,
    /// Which table.
    pub table: Table,
    /// From `*table` to `COMMIT`.
    pub lines: Vec<RestoreLine>,
    /// Whether the table holds no rule of bridge afterwards, and bridge made it: it may be removed.
    pub last: bool,
}

/// See [`Restore::lines`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreLine {
    /// As iptables-restore reads it.
    pub text: String,
    /// Name of the rule that it comes from; empty where there is none.
    pub name: String,
    /// With which its counter begins.
    pub hits: Hits,
}

impl Restore {
    /// Whether a counter goes on.
    pub(super) fn counts(&self) -> bool {
        self.lines.iter().any(|line| line.hits != Hits::default())
    }

    /// Lets the first rule of each name begin with the hits that the rules of this name have in the same chain.
    fn carry(&mut self, observed: &ObservedTable) {
        let mut hits: BTreeMap<(&str, &str), Hits> = BTreeMap::new();
        for chain in observed.chains.iter().filter(|chain| is_own(&chain.name)) {
            for rule in chain.rules.iter().filter(|rule| rule.hits != Hits::default()) {
                if let Some(name) = comment(&rule.rule) {
                    *hits.entry((&chain.name, name)).or_default() += rule.hits;
                }
            }
        }
        for line in &mut self.lines {
            let chain = line.text.strip_prefix("-A ").and_then(|rest| rest.split(' ').next());
            line.hits = chain.and_then(|chain| hits.remove(&(chain, line.name.as_str()))).unwrap_or_default();
        }
    }

    /// Leaves chains as they are.
    pub(super) fn leave_out(&mut self, left: &BTreeSet<&str>) {
        self.lines.retain(|line| {
            let chain = line.text.strip_prefix(':').or_else(|| line.text.strip_prefix("-A "));
            !chain.and_then(|chain| chain.split(' ').next()).is_some_and(|chain| left.contains(chain))
        });
    }

    /// Returns the input of iptables-restore.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for RestoreLine { text: line, hits: Hits { packets, bytes }, .. } in &self.lines {
            // Writing to a string does not fail.
            let _ = match (packets, bytes) {
                (0, 0) => writeln!(text, "{line}"),
                _ => writeln!(text, "[{packets}:{bytes}] {line}"),
            };
        }
        text
    }
}

/// Collects lines, each with the rule name that an error in it refers to.
struct Writer {
    lines: Vec<RestoreLine>,
}

impl Writer {
    fn new(table: Table) -> Self {
        let mut writer = Self { lines: Vec::new() };
        writer.line(&format!("*{table}"), "");
        writer
    }

    fn line(&mut self, line: &str, name: &str) {
        self.lines.push(RestoreLine { text: line.into(), name: name.into(), hits: Hits::default() });
    }

    /// Declared chains are emptied first (`--noflush` spares the built-in ones and those that are not named), so the
    /// new content replaces the old in the same commit.
    fn chains(&mut self, wanted: &TableRules) {
        for chain in &wanted.chains {
            self.line(&format!(":{} - [0:0]", chain.name), "");
        }
    }

    fn rules(&mut self, wanted: &TableRules) {
        for chain in &wanted.chains {
            for line in &chain.lines {
                self.line(&format!("-A {}{line}", chain.name), &line.name);
            }
        }
    }

    fn finish(mut self, family: Family, table: Table, last: bool) -> Restore {
        self.line("COMMIT", "");
        Restore { family, table, lines: self.lines, last }
    }
}

/// Plans the change from `observed` to `wanted`; `None` if neither has rules of bridge.
///
/// Jumps that are where they belong are left in place, with their counters.
#[must_use]
pub fn restore(
    family: Family,
    table: Table,
    wanted: Option<&TableRules>,
    observed: &ObservedTable,
) -> Option<Restore> {
    let stale: Vec<&str> = observed
        .own_chains()
        .filter(|name| !wanted.is_some_and(|wanted| wanted.chains.iter().any(|chain| chain.name == *name)))
        .collect();
    let jumps = observed.own_jumps();
    if wanted.is_none() && stale.is_empty() && jumps.is_empty() {
        return None;
    }
    let mut writer = Writer::new(table);
    if let Some(wanted) = wanted {
        writer.chains(wanted);
    }
    for name in &stale {
        writer.line(&format!(":{name} - [0:0]"), "");
    }
    let in_place = |hook: &str| {
        let there: Vec<_> = jumps.iter().filter(|jump| jump.hook == hook).collect();
        let wanted = wanted.into_iter().flat_map(|wanted| &wanted.jumps).find(|jump| jump.hook == hook);
        matches!((there.as_slice(), wanted), ([one], Some(wanted)) if one.is(wanted))
    };
    for jump in jumps.iter().filter(|jump| !in_place(&jump.hook)) {
        writer.line(&format!("-D {} {}", jump.hook, jump.rule), "bridge:jump");
    }
    if let Some(wanted) = wanted {
        // Teardown takes away a table that was not there before; the kernel itself keeps the memory of it.
        let absent = !observed.present || observed.was_absent();
        for jump in wanted.jumps.iter().filter(|jump| !in_place(jump.hook)) {
            let mut line = jump.line.clone();
            if absent {
                TABLE_WAS_ABSENT.clone_into(&mut line.name);
            }
            writer.line(&format!("-I {} 1{line}", jump.hook), &line.name);
        }
        writer.rules(wanted);
    }
    for name in &stale {
        writer.line(&format!("-X {name}"), "");
    }
    let mut restore = writer.finish(family, table, wanted.is_none() && observed.was_absent());
    restore.carry(observed);
    Some(restore)
}

/// All tables of a ruleset, for a host on which bridge has no rules yet.
#[must_use]
pub fn fresh(ruleset: &Ruleset) -> String {
    let empty = ObservedTable { present: true, chains: Vec::new() };
    ruleset
        .tables
        .iter()
        .filter_map(|wanted| restore(ruleset.family, wanted.table, Some(wanted), &empty))
        .map(|restore| restore.text())
        .collect()
}
