//! What the reconciler tells: the state of each route, events as they happen, counters.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ipnet::IpNet;
use serde::Serialize;

use super::model::{DesiredRoute, Observed, RouteKey, SourceKind};
use super::plan::Verdict;
use super::sources::Merged;

/// One desired route and what became of it; a row of `routes list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RouteStatus {
    /// The network.
    pub to: IpNet,
    /// Who wants it.
    pub source: SourceKind,
    /// Which entry of the source.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub origin: String,
    /// What became of it.
    pub state: State,
    /// The route in the words of `ip route`, or what was wanted if it is not in the kernel.
    pub route: String,
    /// Why it is not, or not wholly, as wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What became of a desired route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// In the kernel as wanted.
    Installed,
    /// In the kernel, without some of its next hops.
    Partial,
    /// Not to be put there.
    Refused,
    /// Withdrawn: no next hop answers.
    Down,
    /// The kernel refused it; tried again.
    Failed,
    /// Another source wants the same network and comes first.
    Shadowed,
}

/// The outcome of the last comparison with the kernel. Made once for each, read by anybody.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub(super) merged: Merged,
    pub(super) verdicts: Vec<Verdict>,
    pub(super) failures: BTreeMap<RouteKey, String>,
    pub(super) observed: Observed,
}

impl Snapshot {
    /// A row for each route anybody wants, in order of network; those that lost to another source last.
    pub fn rows(&self) -> impl Iterator<Item = RouteStatus> {
        let decided = self.merged.routes.iter().zip(&self.verdicts).map(|(desired, verdict)| {
            let (state, route, reason) = match verdict {
                Verdict::Refused(refusal) => (State::Refused, desired.to_string(), Some(refusal.to_string())),
                Verdict::Down => (State::Down, desired.to_string(), Some("no next hop answers".to_owned())),
                Verdict::Installed { route, partly } => {
                    let shown = self.observed.show(route);
                    match (self.failures.get(&route.key), partly) {
                        (Some(failure), _) => (State::Failed, shown, Some(failure.clone())),
                        (None, Some(refusal)) => (State::Partial, shown, Some(refusal.to_string())),
                        (None, None) => (State::Installed, shown, None),
                    }
                }
            };
            row(desired, state, route, reason)
        });
        let shadowed = self.merged.shadowed.iter().map(|lost| {
            row(
                &lost.route,
                State::Shadowed,
                lost.route.to_string(),
                Some(format!("{} comes first", lost.by)),
            )
        });
        decided.chain(shadowed)
    }

    /// How many desired routes are in each state.
    #[must_use]
    pub fn totals(&self) -> BTreeMap<State, usize> {
        let mut totals = BTreeMap::new();
        for verdict in &self.verdicts {
            let state = match verdict {
                Verdict::Refused(_) => State::Refused,
                Verdict::Down => State::Down,
                Verdict::Installed { route, .. } if self.failures.contains_key(&route.key) => State::Failed,
                Verdict::Installed { partly: Some(_), .. } => State::Partial,
                Verdict::Installed { partly: None, .. } => State::Installed,
            };
            *totals.entry(state).or_default() += 1;
        }
        totals.insert(State::Shadowed, self.merged.shadowed.len());
        totals
    }

    /// Sources that have not said anything yet; as long as there are any, nothing unwanted is removed.
    #[must_use]
    pub fn silent(&self) -> &[SourceKind] {
        &self.merged.silent
    }
}

fn row(desired: &Arc<DesiredRoute>, state: State, route: String, reason: Option<String>) -> RouteStatus {
    RouteStatus {
        to: desired.to,
        source: desired.source,
        origin: desired.origin.clone(),
        state,
        route,
        reason,
    }
}

/// Something an operator wants to know when it happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RouteEvent {
    /// What happened.
    pub kind: EventKind,
    /// To which route or next hop, and why.
    pub text: String,
}

/// See [`RouteEvent::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A route was put into the kernel.
    RouteAdded,
    /// A route got another target.
    RouteReplaced,
    /// A route was taken out.
    RouteDeleted,
    /// A desired route may not be in the kernel.
    RouteRefused,
    /// The kernel did not do what it was asked for.
    RouteFailed,
    /// A next hop stopped answering.
    NextHopDown,
    /// A next hop answers again.
    NextHopUp,
    /// A next hop came and went too often; it stays down until it has been quiet.
    NextHopDamped,
    /// A pod announced itself.
    PodDiscovered,
    /// An announcement was refused.
    PodRefused,
    /// The announcement of a pod was not renewed in time.
    PodExpired,
}

/// Counts since the start of the process.
#[derive(Debug, Default)]
pub struct Counters {
    /// Comparisons with the kernel's tables.
    pub syncs: AtomicU64,
    /// Routes put into the kernel.
    pub added: AtomicU64,
    /// Routes that got another target.
    pub replaced: AtomicU64,
    /// Routes taken out.
    pub deleted: AtomicU64,
    /// Changes of the three kinds above that put right what others did.
    pub repaired: AtomicU64,
    /// Requests the kernel refused.
    pub failed: AtomicU64,
    /// Times the kernel dropped events (ENOBUFS) and everything was read again.
    pub overruns: AtomicU64,
    /// Dumps that changed while they were read and were given up for the moment.
    pub interrupted: AtomicU64,
    /// Next hops that went down.
    pub next_hops_down: AtomicU64,
    /// Next hops that came back.
    pub next_hops_up: AtomicU64,
    /// Next hops held down because they came and went too often.
    pub next_hops_damped: AtomicU64,
}

impl Counters {
    /// Name (without prefix) and value of each, for metrics.
    #[must_use]
    pub fn read(&self) -> [(&'static str, u64); 11] {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("syncs", get(&self.syncs)),
            ("added", get(&self.added)),
            ("replaced", get(&self.replaced)),
            ("deleted", get(&self.deleted)),
            ("repaired", get(&self.repaired)),
            ("failed", get(&self.failed)),
            ("overruns", get(&self.overruns)),
            ("interrupted_dumps", get(&self.interrupted)),
            ("next_hops_down", get(&self.next_hops_down)),
            ("next_hops_up", get(&self.next_hops_up)),
            ("next_hops_damped", get(&self.next_hops_damped)),
        ]
    }

    pub(super) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }
}
