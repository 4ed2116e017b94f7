//! The plan: pure, `(desired, observed) -> operations`.
//!
//! What is refused is not in the kernel afterwards: if somebody else makes a route that overlaps one of ours, ours
//! is withdrawn. The outcome therefore depends on what is wanted and what others did, never on who came first, and
//! is the same after a restart.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

use super::model::{DesiredRoute, KernelRoute, Observed, PROTOCOL, RouteKey, RouteKind};
use super::prefix_map::PrefixMap;
use super::refusal::Refusal;
use super::resolve::{Resolved, Surroundings};
use super::{OnWithdraw, Settings};

/// One change to the kernel's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Nothing is there: create, and fail if something came meanwhile.
    Add(KernelRoute),
    /// Ours is there with another target: exchange it in one step, without a gap.
    Replace {
        /// What is there.
        old: KernelRoute,
        /// What shall be there.
        new: KernelRoute,
    },
    /// Ours is there and nobody wants it.
    Delete(KernelRoute),
}

impl Operation {
    /// Which route it is about.
    #[must_use]
    pub const fn key(&self) -> RouteKey {
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
        route: KernelRoute,
        /// Why one of several next hops is left out.
        partly: Option<Refusal>,
    },
    /// It may not be.
    Refused(Refusal),
    /// No next hop answers: withdrawn, or a blackhole if so configured.
    Down,
}

impl Verdict {
    /// Why it, or one of its next hops, may not be in the kernel.
    #[must_use]
    pub const fn refusal(&self) -> Option<&Refusal> {
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
}

/// Compares what is wanted with what is there.
///
/// `desired` has no two routes to one network in one table; [`super::sources`] sees to that. With
/// `keep_unwanted`, own routes that nobody wants stay: some source has not spoken yet.
#[must_use]
pub fn plan<R: Borrow<DesiredRoute>>(
    desired: &[R],
    observed: &Observed,
    settings: &Settings,
    keep_unwanted: bool,
) -> Plan {
    let surroundings = Surroundings::new(observed, settings);
    let mut plan = Plan::default();
    let mut wanted = BTreeMap::<RouteKey, KernelRoute>::new();
    let mut refused = BTreeSet::new();
    for desired in desired.iter().map(Borrow::borrow) {
        let Resolved { route, refusal, down } = surroundings.resolve(desired);
        plan.verdicts.push(match (&route, refusal, down) {
            (_, _, true) => Verdict::Down,
            (Some(route), partly, _) => Verdict::Installed { route: route.clone(), partly },
            (None, Some(refusal), _) => Verdict::Refused(refusal),
            (None, None, false) => unreachable!("resolve gives a route or a reason"),
        });
        match route {
            Some(route) => _ = wanted.insert(route.key, route),
            None => _ = refused.insert(surroundings.key(desired)),
        }
    }

    let mut own = BTreeMap::<RouteKey, Vec<&KernelRoute>>::new();
    for route in observed.routes.iter().filter(|route| route.is_own()) {
        own.entry(route.key).or_default().push(route);
    }
    let mut deletes = Vec::new();
    for (key, route) in &wanted {
        let Some(present) = own.remove(key) else {
            plan.operations.push(Operation::Add(route.clone()));
            continue;
        };
        // IPv4 can hold several routes of one key (`ip route append`); only the first one forwards.
        let (first, rest) = present.split_first().expect("grouped by key");
        if *first != route {
            plan.operations.push(Operation::Replace { old: (*first).clone(), new: route.clone() });
        }
        deletes.extend(rest.iter().map(|route| Operation::Delete((*route).clone())));
    }
    let wanted_networks = networks_by_table(wanted.keys());
    for (key, present) in own {
        if keep_unwanted && !refused.contains(&key) {
            continue;
        }
        let covered = wanted_networks.get(&key.table).is_some_and(|networks| networks.overlaps(key.to));
        let blackhole = settings.on_withdraw == OnWithdraw::Blackhole
            && !covered
            && key.tos == 0
            && !refused.contains(&key)
            && !surroundings.is_contested(key);
        let mut rest = present.as_slice();
        if let (true, Some((first, others))) = (blackhole, present.split_first()) {
            let new = KernelRoute {
                key,
                protocol: PROTOCOL,
                kind: RouteKind::Blackhole,
                hops: Vec::new(),
                altered: false,
            };
            if **first != new {
                plan.operations.push(Operation::Replace { old: (*first).clone(), new });
            }
            rest = others;
        }
        deletes.extend(rest.iter().map(|route| Operation::Delete((*route).clone())));
    }
    plan.operations.append(&mut deletes);
    plan
}

/// What takes away everything bridge ever added, and nothing else.
#[must_use]
pub fn withdraw(observed: &Observed) -> Vec<Operation> {
    observed.routes.iter().filter(|route| route.is_own()).cloned().map(Operation::Delete).collect()
}

fn networks_by_table<'a>(keys: impl Iterator<Item = &'a RouteKey>) -> BTreeMap<u32, PrefixMap<()>> {
    let mut tables = BTreeMap::<u32, PrefixMap<()>>::new();
    for key in keys {
        tables.entry(key.table).or_default().insert(key.to, ());
    }
    tables
}

#[cfg(test)]
mod tests;
