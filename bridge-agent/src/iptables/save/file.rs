//! The text of a file of saved rules: pure.

use std::fmt::Write as _;

use crate::iptables::observe::target;
use crate::iptables::ruleset::is_own;
use crate::iptables::ruleset::{Ruleset, TableRules};

/// A file that bridge made, with nothing in it.
pub(super) const NEW: &str = "# Made by bridge\n";
/// Stands before a table that was not in the file.
const ADDED: &str = "# Added by bridge";

/// The file with the chains of `ruleset` in it, and none of bridge's that are not in `ruleset`.
pub(crate) fn with(old: &str, ruleset: &Ruleset) -> String {
    let mut text = without(old);
    for table in &ruleset.tables {
        text = insert(&text, table);
    }
    text
}

/// The file without anything of bridge's.
pub(crate) fn without(old: &str) -> String {
    let own_line = |line: &str| {
        if let Some(declared) = line.strip_prefix(':') {
            return is_own(declared.split_whitespace().next().unwrap_or_default());
        }
        let rule = rule_of(line);
        rule.is_some_and(|(chain, rule)| is_own(chain) || target(rule).is_some_and(is_own))
    };
    let kept: Vec<&str> = old.split_inclusive('\n').filter(|line| !own_line(line.trim_end())).collect();
    // A table that bridge added goes, if it is empty.
    let mut text = String::with_capacity(old.len());
    let mut lines = kept.as_slice();
    while let [first, rest @ ..] = lines {
        if first.trim_end() == ADDED
            && let [table, commit, after @ ..] = rest
            && table.starts_with('*')
            && commit.trim_end() == "COMMIT"
        {
            lines = after;
            continue;
        }
        text.push_str(first);
        lines = rest;
    }
    text
}

/// Chain and rest of an `-A` line, with or without counters before it.
fn rule_of(line: &str) -> Option<(&str, &str)> {
    let line = match line.strip_prefix('[') {
        Some(counted) => counted.split_once("] ")?.1,
        None => line,
    };
    let rest = line.strip_prefix("-A ")?;
    Some(rest.split_once(' ').unwrap_or((rest, "")))
}

/// Puts declarations before the first rule of the table, jumps before the first rule of all, and own rules last.
fn insert(text: &str, wanted: &TableRules) -> String {
    let header = format!("*{}", wanted.table);
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let start = lines.iter().position(|line| line.trim_end() == header);
    let end =
        start.and_then(|start| Some(start + lines[start..].iter().position(|l| l.trim_end() == "COMMIT")?));
    let (Some(start), Some(end)) = (start, end) else {
        let mut added = text.to_owned();
        if !added.is_empty() && !added.ends_with('\n') {
            added.push('\n');
        }
        added.push_str(&format!("{ADDED}\n{header}\nCOMMIT\n"));
        return insert(&added, wanted);
    };
    let declared = |line: &&str| line.starts_with(':') || line.starts_with('#') || line.trim().is_empty();
    let first_rule = start + 1 + lines[start + 1..end].iter().take_while(|line| declared(line)).count();

    let mut own = String::new();
    for chain in &wanted.chains {
        write_line(&mut own, format_args!(":{} - [0:0]", chain.name));
    }
    for jump in &wanted.jumps {
        write_line(&mut own, format_args!("-A {}{}", jump.hook, jump.line));
    }
    let mut rules = String::new();
    for chain in &wanted.chains {
        for line in &chain.lines {
            write_line(&mut rules, format_args!("-A {}{line}", chain.name));
        }
    }
    [&lines[..first_rule].concat(), &own, &lines[first_rule..end].concat(), &rules, &lines[end..].concat()]
        .map(String::as_str)
        .concat()
}

fn write_line(text: &mut String, line: std::fmt::Arguments<'_>) {
    let written = writeln!(text, "{line}");
    debug_assert!(written.is_ok(), "writing to a String does not fail");
}
