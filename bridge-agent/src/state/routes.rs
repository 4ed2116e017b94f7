//! Routes as the status and `GET /v1/routes` show them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::routes::{DesiredRoute, NextHopStatus, RouteStatus, SourceKind, State, View};

/// Maximum number of reasons in the status; all of them are in `GET /v1/routes`.
const PROBLEMS: usize = 20;

/// The routes in short, as the agent says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RoutesStatus {
    /// How many networks are wanted, by any source.
    pub wanted: usize,
    /// How many of them are in which state; see [`State`].
    pub states: BTreeMap<State, usize>,
    /// Why some are not, or not wholly, in the kernel: the first few reasons.
    pub problems: Vec<String>,
    /// How many more reasons there are.
    pub problems_left_off: usize,
    /// Sources that have not said anything yet: until then nothing is withdrawn.
    pub waiting_for: Vec<String>,
    /// How many nodes are on the way to pods.
    pub next_hops: usize,
    /// Those of them that do not answer.
    pub next_hops_down: Vec<NextHopStatus>,
    /// Operations since the agent has started, by name.
    pub counters: BTreeMap<String, u64>,
    /// Discovery, if it is configured.
    pub discovery: Option<DiscoveryStatus>,
    /// Why the kernel cannot be talked to, if that is so now.
    pub failure: Option<String>,
}

/// Announcements of pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DiscoveryStatus {
    /// Where announcements are taken.
    pub listen: String,
    /// Why no announcements can be taken, if that is so now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// How many pods are known.
    pub pods: usize,
    /// Results of announcements since discovery has started, by name.
    pub counters: BTreeMap<String, u64>,
}

/// All routes and next hops: the answer to `GET /v1/routes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouteList {
    /// A row for each route anybody wants.
    pub routes: Vec<RouteStatus>,
    /// A row for each node on the way.
    pub next_hops: Vec<NextHopStatus>,
    /// The desired routes themselves, of every source, those that yield to another source included.
    #[serde(default)]
    pub desired: Vec<DesiredRoute>,
    /// Sources that have not published yet.
    #[serde(default)]
    pub waiting_for: Vec<SourceKind>,
}

impl RoutesStatus {
    pub(crate) fn of(view: &View) -> Self {
        let snapshot = view.status.borrow().clone();
        let mut problems = Vec::new();
        let mut problems_left_off = 0;
        let states: BTreeMap<_, _> = snapshot.totals().into_iter().filter(|(_, count)| *count > 0).collect();
        // A row is formatted only if it has a problem to report.
        let fine = |state: &State| matches!(state, State::Installed | State::Shadowed | State::Pending);
        if states.keys().any(|state| !fine(state)) {
            for row in snapshot.rows().filter(|row| !fine(&row.state)) {
                if problems.len() < PROBLEMS {
                    problems.push(format!("{}: {}", row.state, row.reason.unwrap_or(row.route)));
                } else {
                    problems_left_off += 1;
                }
            }
        }
        let named = |counters: &[(&str, u64)]| {
            counters.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
        };
        Self {
            wanted: states
                .iter()
                .filter(|(state, _)| **state != State::Shadowed)
                .map(|(_, count)| count)
                .sum(),
            states,
            problems,
            problems_left_off,
            waiting_for: snapshot.silent().iter().map(ToString::to_string).collect(),
            next_hops: snapshot.next_hops().count(),
            next_hops_down: snapshot.next_hops().filter(|hop| !hop.up).collect(),
            counters: named(&view.counters.read()),
            discovery: view.discovery.as_ref().map(|discovery| DiscoveryStatus {
                listen: discovery.address().to_string(),
                failure: discovery.failure(),
                pods: discovery.known(),
                counters: named(&discovery.counters().read()),
            }),
            failure: view.failure.borrow().clone(),
        }
    }
}

impl RouteList {
    pub(crate) fn of(view: &View) -> Self {
        let snapshot = view.status.borrow().clone();
        Self {
            routes: snapshot.rows().collect(),
            next_hops: snapshot.next_hops().collect(),
            desired: snapshot.desired().cloned().collect(),
            waiting_for: snapshot.silent().to_vec(),
        }
    }
}
