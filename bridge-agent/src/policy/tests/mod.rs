//! The compiler against the documented meaning of a policy.

mod examples;
mod generate;
mod limits;
mod well_formed;

use std::collections::BTreeMap;

use bridge_common::filter::policy::{direction, reference as abi};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::reference::{
    Packet, audit_model, audit_tables, evaluate_model, evaluate_tables, scope_model, scope_tables,
};
use super::{Tables, compile};
use crate::model::Action;
use generate::{Case, packets};

/// Asserts that tables and model say the same of `packet`, and returns it.
#[track_caller]
fn agreed(case: &Case, tables: &Tables, packet: &Packet) -> (Option<u8>, Option<(u32, Action)>) {
    let scope = scope_model(&case.policy, &case.local, packet);
    assert_eq!(scope_tables(tables, packet), scope, "scope of {packet:?}");
    let verdict = evaluate_model(&case.policy, &case.local, packet);
    assert_eq!(evaluate_tables(tables, packet), verdict, "verdict on {packet:?}");
    let audited = audit_model(&case.policy, &case.local, packet);
    assert_eq!(audit_tables(tables, packet), audited, "rule in audit mode for {packet:?}");
    (scope, verdict)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn tables_say_what_the_rules_say(case in generate::case(), seed: u64) {
        let tables = compile(&case.policy, &case.local).expect("small policy");
        well_formed::check(&case.policy, &tables);
        for packet in packets(&case, seed, 150) {
            agreed(&case, &tables, &packet);
        }
    }

    #[test]
    fn compiling_again_gives_the_same_tables(case in generate::case()) {
        prop_assert_eq!(compile(&case.policy, &case.local), compile(&case.policy, &case.local));
    }
}

/// The property is worth something only if the generated packets get every kind of answer, from every kind of table.
#[test]
fn generated_policies_and_packets_reach_everything() {
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..300 {
        let case = generate::case().new_tree(&mut runner).expect("no filters").current();
        let tables = compile(&case.policy, &case.local).expect("small policy");
        let mut count = |case, when| *seen.entry(case).or_default() += usize::from(when);
        count("pairs", !tables.pairs.is_empty());
        count("directories", has_directory(&tables));
        count("lookups by source port", has_second_lookup(&tables));
        count("global sets", tables.global_sets.iter().any(|&set| set != 0));
        for packet in packets(&case, seed, 150) {
            let (scope, verdict) = agreed(&case, &tables, &packet);
            count("out of scope", scope.is_none());
            count("no rule", scope.is_some() && verdict.is_none());
            count("IPv6 verdicts", verdict.is_some() && packet.source.is_ipv6());
            for (number, name) in direction::NAMES.into_iter().enumerate() {
                count(name, scope.map(usize::from) == Some(number) && verdict.is_some());
            }
            count("allow", verdict.is_some_and(|(_, action)| action == Action::Allow));
            count("deny", verdict.is_some_and(|(_, action)| action == Action::Deny));
            let audited = audit_tables(&tables, &packet).map(|(_, action)| action);
            count("would allow", verdict.is_none() && audited == Some(Action::Allow));
            let is_allowed = verdict.is_some_and(|(_, action)| action == Action::Allow);
            count("would deny", is_allowed && audited == Some(Action::Deny));
        }
    }
    println!("{seen:?}");
    for (case, count) in seen {
        assert!(count >= 50, "only {count} of {case}");
    }
}

fn has_directory(tables: &Tables) -> bool {
    roots(tables).any(|root| abi::tag(root) == abi::DIRECTORY)
}

fn has_second_lookup(tables: &Tables) -> bool {
    let narrow = roots(tables).filter(|&root| abi::tag(root) == abi::INTERVALS);
    let mut inner = narrow.flat_map(|root| tables.narrows[(root & abi::VALUE) as usize].references);
    inner.any(|reference| abi::tag(reference) != abi::LEAF)
}

fn roots(tables: &Tables) -> impl Iterator<Item = u32> + '_ {
    tables.rule_sets.iter().flat_map(|set| set.roots.into_iter().chain(set.audited))
}
