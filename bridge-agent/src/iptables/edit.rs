//! The change of a chain as single edits, so that the rules that stay are not written again and keep their counters. Pure.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::plan::{Restore, RestoreLine};
use super::ruleset::{Line, TableRules};
use crate::firewall::Hits;

/// A hash of each rule of each chain of a table, in order.
pub(super) type Fingerprints = BTreeMap<String, Vec<u64>>;

/// Returns the fingerprints of all chains of a table.
pub(super) fn fingerprints(rules: &TableRules) -> Fingerprints {
    let chains = rules.chains.iter();
    chains.map(|chain| (chain.name.clone(), chain.lines.iter().map(fingerprint).collect())).collect()
}

fn fingerprint(line: &Line) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&line.matches, &line.name, &line.target).hash(&mut hasher);
    hasher.finish()
}

impl Restore {
    /// Reduces the change to `wanted` to the rules that differ from `before`, which holds the chains that are in the kernel
    /// exactly as they were written. Returns whether anything is left to do.
    pub(super) fn reduce(&mut self, wanted: &TableRules, before: &Fingerprints) -> bool {
        let (mut left, mut edited) = (Vec::new(), Vec::new());
        for chain in &wanted.chains {
            let Some(edits) = before.get(&chain.name).and_then(|old| edits(&chain.name, old, &chain.lines))
            else {
                continue;
            };
            left.push(chain.name.as_str());
            edited.extend(edits);
        }
        self.leave_out(&left.into_iter().collect());
        // Chains are removed last, when no rule leads to them any more.
        let is_end = |line: &RestoreLine| line.text.starts_with("-X ") || line.text == "COMMIT";
        let end = self.lines.iter().position(is_end).unwrap_or(self.lines.len());
        self.lines.splice(end..end, edited);
        self.lines.len() > 2
    }
}

/// Returns the commands that change a chain from `before` to `after`; `None` if writing all of it is less work.
fn edits(chain: &str, before: &[u64], after: &[Line]) -> Option<Vec<RestoreLine>> {
    let wanted: Vec<u64> = after.iter().map(fingerprint).collect();
    if before == wanted {
        return Some(Vec::new());
    }
    // How many of each rule are still to come.
    let count = |of: &[u64]| {
        let mut counts: HashMap<u64, usize> = HashMap::new();
        of.iter().for_each(|hash| *counts.entry(*hash).or_default() += 1);
        counts
    };
    let (mut old, mut new) = (count(before), count(&wanted));
    let comes = |counts: &HashMap<u64, usize>, hash: u64| counts.get(&hash).is_some_and(|count| *count > 0);
    let take = |counts: &mut HashMap<u64, usize>, hash: u64| {
        if let Some(count) = counts.get_mut(&hash) {
            *count -= 1;
        }
    };
    let most = after.len() / 4;
    let mut lines = Vec::new();
    let (mut from, mut to) = (0, 0);
    // Each rule before the one at `to` is as wanted, so positions in the chain are those of `after`.
    loop {
        if lines.len() > most {
            return None;
        }
        match (before.get(from).copied(), wanted.get(to).copied()) {
            (None, None) => return Some(lines),
            (Some(here), Some(next)) if here == next => {
                take(&mut old, here);
                take(&mut new, next);
                (from, to) = (from + 1, to + 1);
            }
            (Some(here), next) if next.is_none_or(|next| !comes(&new, here) || comes(&old, next)) => {
                let (text, name) = (format!("-D {chain} {}", to + 1), String::new());
                lines.push(RestoreLine { text, name, hits: Hits::default() });
                take(&mut old, here);
                from += 1;
            }
            (_, next) => {
                let line = &after[to];
                let text = format!("-I {chain} {}{line}", to + 1);
                lines.push(RestoreLine { text, name: line.name.clone(), hits: Hits::default() });
                next.into_iter().for_each(|next| take(&mut new, next));
                to += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(name: &str) -> Line {
        Line { matches: format!(" -s {name}"), name: name.into(), target: "-j RETURN".into() }
    }

    fn lines(names: &[u8]) -> Vec<Line> {
        names.iter().map(|name| line(&name.to_string())).collect()
    }

    /// Follows the commands as iptables-restore does.
    fn follow(before: &[Line], commands: &[RestoreLine]) -> Vec<String> {
        let mut chain: Vec<String> = before.iter().map(ToString::to_string).collect();
        for command in commands {
            let mut words = command.text.splitn(3, ' ');
            let (kind, name, rest) = (words.next(), words.next(), words.next().unwrap());
            assert_eq!(name, Some("C"));
            let (number, line) = rest.split_once(' ').unwrap_or((rest, ""));
            let index = number.parse::<usize>().unwrap() - 1;
            match kind {
                Some("-D") => drop(chain.remove(index)),
                Some("-I") => chain.insert(index, format!(" {line}")),
                other => panic!("{other:?}"),
            }
        }
        chain
    }

    #[test]
    fn one_changed_rule_is_two_commands() {
        let before = lines(&(0..100).collect::<Vec<u8>>());
        let mut after = before.clone();
        after[50] = line("new");
        let old: Vec<u64> = before.iter().map(fingerprint).collect();
        let texts: Vec<String> =
            edits("C", &old, &after).unwrap().into_iter().map(|line| line.text).collect();
        assert_eq!(texts, ["-D C 51", "-I C 51 -s new -m comment --comment \"new\" -j RETURN"]);
        assert_eq!(edits("C", &old, &before).unwrap(), []);
        assert_eq!(edits("C", &old, &lines(&[1])), None, "cheaper as a whole");
    }

    proptest! {
        #[test]
        fn commands_lead_from_any_chain_to_any_other(
            before in prop::collection::vec(0_u8..20, 0..40),
            changes in prop::collection::vec((0_usize..40, any::<bool>(), 0_u8..20), 0..4),
        ) {
            let mut after = before.clone();
            for (index, removes, value) in changes {
                let index = index.min(after.len());
                if removes && index < after.len() { _ = after.remove(index) } else { after.insert(index, value) }
            }
            let (before, after) = (lines(&before), lines(&after));
            let old: Vec<u64> = before.iter().map(fingerprint).collect();
            if let Some(commands) = edits("C", &old, &after) {
                let wanted: Vec<String> = after.iter().map(ToString::to_string).collect();
                prop_assert_eq!(follow(&before, &commands), wanted);
            }
        }
    }
}
