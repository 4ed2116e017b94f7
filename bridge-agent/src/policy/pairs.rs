//! Rules that name both sides: from pairs of lists to pairs of address classes.

use std::cmp::Reverse;

use bridge_common::filter::policy::{PairKey, PairSets};

use super::addresses::Side;
use super::numbered::Numbered;
use super::ports::{Exhausted, Ports};
use super::tables::{Error, MAX_PAIRS, names};
use crate::model::Rule;

/// Rules of one direction that name both sides by the same two lists.
pub(super) struct Combination<'a> {
    pub(super) direction: usize,
    /// Number of the list of LAN hosts.
    pub(super) external: u32,
    /// Number of the list of pods.
    pub(super) pods: u32,
    /// Index of the rules' port table.
    pub(super) table: u32,
    /// Their indexes.
    pub(super) rules: &'a [u32],
}

/// The pairs of classes that `combinations` name, ascending. Their `sets` are numbers of tables, not yet of rule
/// sets.
pub(super) fn pairs(
    combinations: &[Combination<'_>],
    sides: &[Side; 2],
    rules: Numbered<'_>,
    ports: &mut Ports,
) -> Result<Vec<(PairKey, PairSets)>, Error> {
    let [external, pods] = sides.each_ref().map(classes_by_list);
    let size = |combination: &Combination<'_>| {
        external[combination.external as usize].len() as u64 * pods[combination.pods as usize].len() as u64
    };
    let total: u64 = combinations.iter().map(size).sum();
    if total > MAX_PAIRS as u64 {
        let mut largest: Vec<&Combination<'_>> = combinations.iter().collect();
        largest.sort_by_key(|combination| Reverse(size(combination)));
        let largest: Vec<&Rule> =
            largest.iter().flat_map(|combination| combination.rules).map(|&index| rules.get(index)).collect();
        return Err(Error::TooManyPairs { pairs: total, rules: names(largest.into_iter()) });
    }

    let mut claims: Vec<(PairKey, usize, u32)> = Vec::new();
    for combination in combinations {
        for &external in &external[combination.external as usize] {
            for &pod in &pods[combination.pods as usize] {
                claims.push((PairKey { external, pod }, combination.direction, combination.table));
            }
        }
    }
    claims.sort_unstable_by_key(|&(key, direction, table)| (key.external, key.pod, direction, table));

    let mut pairs: Vec<(PairKey, PairSets)> = Vec::new();
    for claims in claims.chunk_by(|a, b| a.0 == b.0) {
        let mut sets = [0; 2];
        for claims in claims.chunk_by(|a, b| a.1 == b.1) {
            let tables = claims.iter().map(|&(_, _, table)| table).collect();
            sets[claims[0].1] = ports.merge_all(tables).map_err(|Exhausted| Error::TooManyPortRanges {
                rules: "rules that name the same external and pods in different lists".to_owned(),
            })?;
        }
        pairs.push((claims[0].0, PairSets { sets }));
    }
    Ok(pairs)
}

/// By list, the classes that it names.
fn classes_by_list(side: &Side) -> Vec<Vec<u32>> {
    let mut by_list = vec![Vec::new(); side.list_count()];
    for (class, lists) in (0..).zip(side.classes()) {
        for &list in lists.iter() {
            by_list[list as usize].push(class);
        }
    }
    by_list
}
