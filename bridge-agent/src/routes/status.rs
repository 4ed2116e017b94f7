//! Reports of the reconciler: the state of each route, events, counters.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::model::{DesiredRoute, Hop, Observed, RouteKey, SourceKind};
use super::plan::Verdict;
use super::sources::Merged;

/// One desired route and what became of it; a row of `routes list`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RouteStatus {
    /// The network.
    #[schemars(with = "String")]
    pub to: IpNet,
    /// Who wants it.
    pub source: SourceKind,
    /// Which entry of the source.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub origin: String,
    /// What became of it.
    pub state: State,
    /// The route in the words of `ip route`, or what was wanted if it is not in the kernel.
    pub route: String,
    /// Why it is not, or not wholly, as wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What became of a desired route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "RouteState")]
pub enum State {
    /// In the kernel as wanted.
    Installed,
    /// In the kernel, without some of its next hops.
    Partial,
    /// Not yet in the kernel, or not yet as wanted.
    Pending,
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
    pub(super) version: u64,
    pub(super) merged: Arc<Merged>,
    pub(super) verdicts: Vec<Verdict>,
    pub(super) failures: BTreeMap<RouteKey, String>,
    /// What is still to be done for these.
    pub(super) pending: BTreeSet<RouteKey>,
    pub(super) observed: Observed,
    /// All that are on-link, whether they answer or not.
    pub(super) next_hops: BTreeSet<Hop>,
}

/// What became of the wish for one network, in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Packets to it go to a next hop: by a route of its own, or through a wider one that comes first.
    Installed(String),
    /// They do not, and why.
    Not(String),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl Snapshot {
    /// The outcome of a comparison that was not carried out.
    pub(super) fn compared(
        merged: Merged,
        verdicts: Vec<Verdict>,
        pending: BTreeSet<RouteKey>,
        observed: Observed,
    ) -> Self {
        Self {
            version: 0,
            merged: Arc::new(merged),
            verdicts,
            failures: BTreeMap::new(),
            pending,
            observed,
            next_hops: BTreeSet::new(),
        }
    }

    /// Which version of what the sources want this is the outcome of. 0 before the first comparison.
    #[must_use]
    pub const fn version(&self) -> u64 {
        self.version
    }

    /// What became of the wish for exactly this network.
    #[must_use]
    pub fn fate(&self, to: IpNet) -> Option<Fate> {
        let merged = &self.merged;
        let decided = |to: IpNet| merged.routes.iter().position(|route| route.to == to);
        let place = decided(to).or_else(|| {
            // What another source says of a network that holds it decides.
            merged.shadowed.iter().find(|lost| lost.route.to == to).and_then(|lost| decided(lost.by.to))
        })?;
        let row = self.decided(place)?;
        Some(match row.state {
            State::Installed | State::Partial => Fate::Installed(row.route),
            _ => Fate::Not(row.reason.unwrap_or(row.route)),
        })
    }

    fn decided(&self, place: usize) -> Option<RouteStatus> {
        let desired = self.merged.routes.get(place)?;
        let (state, route, reason) = match self.verdicts.get(place)? {
            Verdict::Refused(refusal) => (State::Refused, desired.to_string(), Some(refusal.to_string())),
            Verdict::Down => (State::Down, desired.to_string(), Some("no next hop answers".to_owned())),
            Verdict::Installed { route, partly } => {
                let shown = self.observed.show(route);
                match (self.failures.get(&route.key), partly) {
                    _ if self.pending.contains(&route.key) => (State::Pending, shown, None),
                    (Some(failure), _) => (State::Failed, shown, Some(failure.clone())),
                    (None, Some(refusal)) => (State::Partial, shown, Some(refusal.to_string())),
                    (None, None) => (State::Installed, shown, None),
                }
            }
        };
        Some(row(desired, state, route, reason))
    }

    /// A row for each route anybody wants, in order of network; those that lost to another source last.
    pub fn rows(&self) -> impl Iterator<Item = RouteStatus> {
        let decided = (0..self.merged.routes.len()).filter_map(|place| self.decided(place));
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

    /// Returns the longest desired route that holds an address, and its row.
    #[must_use]
    pub fn covering(&self, address: IpAddr) -> Option<(&DesiredRoute, RouteStatus)> {
        let routes = self.merged.routes.iter().enumerate();
        let holding = routes.filter(|(_, route)| route.to.contains(&address));
        let (place, route) = holding.max_by_key(|(_, route)| route.to.prefix_len())?;
        Some((route, self.decided(place)?))
    }

    /// Every desired route, those that yield to another source included.
    pub fn desired(&self) -> impl Iterator<Item = &DesiredRoute> {
        let shadowed = self.merged.shadowed.iter().map(|lost| &*lost.route);
        self.merged.routes.iter().map(|route| &**route).chain(shadowed)
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

    /// Every next hop that is on-link, in order of address.
    pub fn next_hops(&self) -> impl Iterator<Item = NextHopStatus> {
        self.next_hops.iter().map(|hop| {
            let dev = self.observed.links.get(&hop.1).map(|link| link.name.clone()).unwrap_or_default();
            NextHopStatus { address: hop.0, dev, up: !self.observed.down.contains(hop) }
        })
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

/// A node on the way to pods, and whether it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NextHopStatus {
    /// Address of the next hop.
    pub address: IpAddr,
    /// The interface it is on.
    pub dev: String,
    /// Whether routes through it are used.
    pub up: bool,
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
    /// Dumps that changed while they were read (`NLM_F_DUMP_INTR`) and were read again.
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
