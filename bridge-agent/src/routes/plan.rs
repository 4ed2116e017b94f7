//! The plan: pure, `(desired, observed) -> operations`.
//!
//! What is refused is not in the kernel afterwards: if another program makes a route that overlaps one of ours, ours
//! is withdrawn. The outcome therefore depends on what is wanted and what others did, never on who came first, and
//! is the same after a restart.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::model::Hop;
use super::model::{DesiredRoute, KernelRoute, Observed, PROTOCOL, RouteKey, RouteKind};
use super::prefix_map::PrefixMap;
use super::refusal::Refusal;
use super::resolve::{Resolved, Surroundings};
use super::settings::Settings;
use crate::config::OnWithdraw;

/// One change to the kernel's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Nothing is there: create, and fail if something came meanwhile.
    Add(Arc<KernelRoute>),
    /// Ours is there with another target: exchange it in one step, without a gap.
    Replace {
        /// What is there.
        old: Arc<KernelRoute>,
        /// What shall be there.
        new: Arc<KernelRoute>,
    },
    /// Ours is there and no source wants it.
    Delete(Arc<KernelRoute>),
}

impl Operation {
    /// Which route it is about.
    #[must_use]
    pub fn key(&self) -> RouteKey {
        match self {
            Self::Add(route) | Self::Replace { new: route, .. } | Self::Delete(route) => route.key,
        }
    }

    /// The line `routes plan` and `--dry-run` print for it.
    #[must_use]
    pub fn show(&self, observed: &Observed) -> String {
        match self {
            Self::Add(route) => format!("+ {}", observed.show(route)),
            Self::Replace { old, new } => format!("~ {}  (was {})", observed.show(new), observed.show(old)),
            Self::Delete(route) => format!("- {}", observed.show(route)),
        }
    }
}

/// What becomes of one desired route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in the kernel, or will be once the plan is applied.
    Installed {
        /// As the kernel has it.
        route: Arc<KernelRoute>,
        /// Why one of several next hops is left out.
        partly: Option<Box<Refusal>>,
    },
    /// It may not be.
    Refused(Box<Refusal>),
    /// No next hop answers: withdrawn, or a blackhole if so configured.
    Down,
}

impl Verdict {
    /// Why it, or one of its next hops, may not be in the kernel.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) | Self::Installed { partly: Some(refusal), .. } => Some(refusal),
            Self::Installed { partly: None, .. } | Self::Down => None,
        }
    }
}

/// Operations in the order they are to be applied: nothing is taken away before its successor is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Adds and replaces, then deletes.
    pub operations: Vec<Operation>,
    /// One for each desired route, in the same order.
    pub verdicts: Vec<Verdict>,
    /// The next hops whose health matters: all that are on-link, backups too.
    pub next_hops: BTreeSet<Hop>,
}

/// Compares the desired routes with the observed ones.
///
/// `desired` has no two routes to one network in one table; [`super::sources`] sees to that. With
/// `keep_unwanted`, own routes that no source wants stay: some source has not spoken yet.
#[must_use]
pub fn plan<R: Borrow<DesiredRoute>>(
    desired: &[R],
    observed: &Observed,
    settings: &Settings,
    keep_unwanted: bool,
) -> Plan {
    let surroundings = Surroundings::new(observed, settings);
    let mut plan = Plan::default();
    let mut wanted = Vec::<Arc<KernelRoute>>::with_capacity(desired.len());
    let mut refused = BTreeSet::new();
    for desired in desired.iter().map(Borrow::borrow) {
        let Resolved { route, refusal, down } = surroundings.resolve(desired);
        let (route, refusal) = (route.map(Arc::new), refusal.map(Box::new));
        plan.verdicts.push(match (&route, refusal, down) {
            (_, _, true) => Verdict::Down,
            (Some(route), partly, _) => Verdict::Installed { route: route.clone(), partly },
            (None, Some(refusal), _) => Verdict::Refused(refusal),
            (None, None, false) => unreachable!("resolve gives a route or a reason"),
        });
        match route {
            Some(route) => wanted.push(route),
            None => _ = refused.insert(surroundings.key(desired)),
        }
    }

    plan.next_hops = surroundings.next_hops();

    wanted.sort_unstable_by_key(|route| route.key);
    // Stable: of several routes with one key the first stays the first.
    let mut own: Vec<_> = observed.routes.iter().filter(|route| route.is_own()).collect();
    own.sort_by_key(|route| route.key);
    let mut deletes = Vec::new();
    let mut unwanted = Vec::new();
    // Both are in order of key: one walk finds what is on one side only.
    let mut missing = wanted.iter().peekable();
    for present in own.chunk_by(|a, b| a.key == b.key) {
        let (first, rest) = present.split_first().expect("a chunk is not empty");
        while let Some(route) = missing.next_if(|route| route.key < first.key) {
            plan.operations.push(Operation::Add(route.clone()));
        }
        let Some(route) = missing.next_if(|route| route.key == first.key) else {
            unwanted.push(present);
            continue;
        };
        if **first != **route {
            plan.operations.push(Operation::Replace { old: copy(first), new: route.clone() });
        }
        // IPv4 can hold several routes of one key (`ip route append`); only the first one forwards.
        deletes.extend(rest.iter().map(|route| Operation::Delete(copy(route))));
    }
    plan.operations.extend(missing.map(|route| Operation::Add(route.clone())));

    let wanted_networks = if unwanted.is_empty() { BTreeMap::new() } else { networks_by_table(&wanted) };
    for present in unwanted {
        let key = present[0].key;
        if keep_unwanted && !refused.contains(&key) {
            continue;
        }
        let covered = wanted_networks.get(&key.table).is_some_and(|networks| networks.overlaps(key.to));
        let blackhole = settings.on_withdraw == OnWithdraw::Blackhole
            && !covered
            && key.tos == 0
            && !refused.contains(&key)
            && !surroundings.is_contested(key);
        let mut rest = present;
        if let (true, Some((first, others))) = (blackhole, present.split_first()) {
            let new = KernelRoute {
                key,
                protocol: PROTOCOL,
                kind: RouteKind::Blackhole,
                hops: Vec::new(),
                altered: false,
            };
            if **first != new {
                plan.operations.push(Operation::Replace { old: copy(first), new: Arc::new(new) });
            }
            rest = others;
        }
        deletes.extend(rest.iter().map(|route| Operation::Delete(copy(route))));
    }
    plan.operations.append(&mut deletes);
    plan
}

/// What takes away everything bridge ever added, and nothing else.
#[must_use]
pub fn withdraw(observed: &Observed) -> Vec<Operation> {
    observed
        .routes
        .iter()
        .filter(|route| route.is_own())
        .map(|route| Operation::Delete(copy(route)))
        .collect()
}

fn copy(route: &KernelRoute) -> Arc<KernelRoute> {
    Arc::new(route.clone())
}

fn networks_by_table(routes: &[Arc<KernelRoute>]) -> BTreeMap<u32, PrefixMap<()>> {
    let mut tables = BTreeMap::<u32, PrefixMap<()>>::new();
    for route in routes {
        tables.entry(route.key.table).or_default().insert(route.key.to, ());
    }
    tables
}

#[cfg(test)]
mod tests;
