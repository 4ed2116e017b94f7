//! The routes as the run loop keeps them: started, updated and withdrawn with the configuration.
//!
//! Wanted where the configuration has a section `routes`, whatever the role. When the agent ends, they stay.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::config::Config;
use crate::routes::{
    Change, DesiredRoute, Error, NextHopStatus, RouteEvent, RouteStatus, Service, Setup, SourceKind, State,
    View, carry_out, withdrawal,
};

/// So many reasons are told; all of them are in `GET /v1/routes`.
const PROBLEMS: usize = 20;

/// The routes in short, as the agent says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// What was done since the agent has started, by name.
    pub counters: BTreeMap<String, u64>,
    /// Discovery, if it is configured.
    pub discovery: Option<DiscoveryStatus>,
    /// Why the kernel cannot be talked to, if that is so now.
    pub failure: Option<String>,
}

/// What pods have announced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DiscoveryStatus {
    /// Where announcements are taken.
    pub listen: String,
    /// How many pods are known.
    pub pods: usize,
    /// What became of announcements since discovery has started, by name.
    pub counters: BTreeMap<String, u64>,
}

/// All routes and next hops: the answer to `GET /v1/routes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteList {
    /// A row for each route anybody wants.
    pub routes: Vec<RouteStatus>,
    /// A row for each node on the way.
    pub next_hops: Vec<NextHopStatus>,
}

impl RoutesStatus {
    pub(super) fn of(view: &View) -> Self {
        let snapshot = view.status.borrow().clone();
        let mut problems = Vec::new();
        let mut problems_left_off = 0;
        let states: BTreeMap<_, _> = snapshot.totals().into_iter().filter(|(_, count)| *count > 0).collect();
        // Each row is put into words: only where there is something to tell.
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
        Self { routes: snapshot.rows().collect(), next_hops: snapshot.next_hops().collect() }
    }
}

/// The routes, while they are wanted.
#[derive(Default)]
pub(super) struct Routing {
    service: Option<Service>,
}

/// A configuration of which everything has been done that can fail.
pub(super) enum Prepared {
    /// The routes are not wanted.
    Unwanted,
    /// They are from now on.
    Started(Box<Service>),
    /// They were, and still are.
    Changed(Box<Change>),
}

impl Routing {
    /// Does what can fail; nothing that is in force changes by that. (A new service begins when the run loop next
    /// waits, and never if it is dropped before.)
    pub(super) fn prepare(
        &self,
        config: &Config,
        happenings: &broadcast::Sender<RouteEvent>,
    ) -> Result<Prepared, Error> {
        if config.routes.is_none() {
            return Ok(Prepared::Unwanted);
        }
        let setup = Setup::from_config(config)?;
        Ok(match &self.service {
            Some(service) => Prepared::Changed(Box::new(service.prepare(setup)?)),
            None => Prepared::Started(Box::new(Service::start(setup, happenings.clone())?)),
        })
    }

    /// Brings a prepared configuration into force.
    pub(super) fn commit(&mut self, prepared: Prepared) {
        match (prepared, &mut self.service) {
            (Prepared::Unwanted, service) => {
                // Its tasks end with it, so that nothing is put back.
                *service = None;
                withdraw();
            }
            (Prepared::Changed(change), Some(service)) => service.commit(*change),
            (Prepared::Started(service), _) => self.service = Some(*service),
            (Prepared::Changed(_), None) => unreachable!("a change is prepared by a service that is there"),
        }
    }

    /// The API server has said which routes it wants.
    pub(super) fn publish(&self, routes: Vec<DesiredRoute>) {
        if let Some(service) = &self.service {
            service.desired().register(SourceKind::Kubernetes).publish(routes);
        }
    }

    pub(super) fn view(&self) -> Option<View> {
        self.service.as_ref().map(Service::view)
    }
}

/// Takes away every route that bears the mark, of an earlier configuration or an earlier run. What cannot be removed is
/// logged: nothing else hinders going on.
fn withdraw() {
    let done = withdrawal().and_then(|(observed, operations)| {
        let failures = carry_out(&operations)?;
        for (operation, reason) in &failures {
            tracing::error!(reason, "a route is left: {}", operation.show(&observed));
        }
        Ok(operations.len() - failures.len())
    });
    match done {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "withdrew the routes: the configuration has no `routes`"),
        Err(error) => tracing::error!(%error, "cannot look for routes of an earlier configuration"),
    }
}
