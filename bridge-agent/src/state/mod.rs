//! The state of the agent that the run loop writes and API clients read, and the requests of clients to the run loop.

mod engines;
mod filter_counts;
mod journal;
mod probe;
mod readiness;
mod request;
mod routes;
mod status;
mod trial;

use std::{
    collections::BTreeMap,
    fmt,
    net::IpAddr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic::AtomicU64},
};

use bridge_common::filter::event::verdict;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use tokio::{
    runtime::Handle,
    sync::{broadcast, mpsc, watch},
};

pub use engines::{AttachedInterface, DivergenceStatus, Enforcement, FastPathStatus, FirewallStatus};
pub use filter_counts::FilterCounts;
pub use journal::{Event, EventId, InvalidEventId, Journal, Logged, Reader, Received, Start};
pub use probe::{InvalidProbe, Probe};
pub use request::{
    Applied, ApplyError, ApplyRequest, MAX_PROBES, MAX_TRIAL, MIN_TRIAL, ReloadError, Request, WriteError,
};
pub use routes::{DiscoveryStatus, RouteList, RoutesStatus};
pub use status::{Reload, Reloads, Status};
pub(crate) use trial::time_left;
pub use trial::{ProbeStatus, TrialEnd, TrialOutcome, TrialStatus};

use crate::{
    config::PoolScope,
    datapath::{Maps, Verdict},
    firewall::Counts,
    kubernetes::{self, Engines},
    model::Policy,
    pool::service::Service,
    routes::{RouteEvent, View},
};

/// Events of routes that the journal may lag behind before it loses some.
const BACKLOG: usize = 1024;
/// Requests that may wait for the run loop.
const REQUESTS: usize = 16;

/// The state shared by the run loop and the servers of the API. Clones share it.
#[derive(Clone)]
pub struct Shared {
    inner: Arc<RwLock<Inner>>,
    /// The last events, for readers of the API.
    pub events: Journal,
    /// Clients that were disconnected because they took no byte of an answer for too long.
    pub(crate) stalled_clients: Arc<AtomicU64>,
    /// Parts of scrapes of the metrics that could not be read.
    pub(crate) scrape_errors: Arc<AtomicU64>,
    /// Seconds that each change of the configuration took.
    pub(crate) apply_time: Histogram,
    /// Changes of routes, next hops and discovered pods.
    pub route_events: broadcast::Sender<RouteEvent>,
    /// Requests to the run loop.
    pub requests: mpsc::Sender<Request>,
    engines: watch::Sender<Engines>,
    /// The runtime of the run loop.
    main: Option<Handle>,
}

/// The policy that judges packets.
#[derive(Clone, Debug)]
pub struct ActivePolicy {
    /// The rules and networks.
    pub policy: Arc<Policy>,
    /// The port pool of the same configuration.
    pub pool: Option<PoolScope>,
    /// The addresses of this node; none where eBPF does not enforce.
    pub local: Vec<IpAddr>,
}

struct Inner {
    status: Status,
    active: Option<ActivePolicy>,
    /// Counters of the packet filter, where it enforces alone.
    counts: Option<Arc<Counts>>,
    last_denied: Option<Arc<Verdict>>,
    maps: Option<Arc<Maps>>,
    routes: Option<View>,
    pool: Option<Arc<Service>>,
    kubernetes: Option<kubernetes::View>,
    names: Arc<BTreeMap<String, String>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    /// Returns the shared state, and the requests for the run loop. Call it in the runtime of the run loop, if there is one.
    #[must_use]
    pub fn new(status: Status) -> (Self, mpsc::Receiver<Request>) {
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let inner = Inner {
            status,
            active: None,
            counts: None,
            last_denied: None,
            maps: None,
            routes: None,
            pool: None,
            kubernetes: None,
            names: Arc::default(),
        };
        let shared = Self {
            inner: Arc::new(RwLock::new(inner)),
            events: Journal::default(),
            stalled_clients: Arc::default(),
            scrape_errors: Arc::default(),
            // From 5 ms to 41 s.
            apply_time: Histogram::new(exponential_buckets(0.005, 2.0, 14)),
            route_events: broadcast::Sender::new(BACKLOG),
            requests,
            engines: watch::Sender::default(),
            main: Handle::try_current().ok(),
        };
        (shared, receiver)
    }

    /// A panic while the lock was held leaves whole values.
    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the run loop has finished its current work, so that the status is not older than any change of the kernel
    /// that the caller has already seen.
    pub async fn settled(&self) {
        if let Some(main) = &self.main {
            // The runtime has one thread: the task runs between two steps of the run loop. An error means that the agent stops.
            drop(main.spawn(async {}).await);
        }
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Status)) {
        let mut inner = self.write();
        change(&mut inner.status);
        self.publish_engines(&inner);
    }

    /// Publishes a verdict, and keeps it if it denies.
    pub(crate) fn publish_verdict(&self, verdict: Verdict) {
        let verdict = Arc::new(verdict);
        // Of `audit-allow`, the denial has an event of its own.
        let passes = [verdict::ALLOW, verdict::AUDIT_ALLOW].map(|number| verdict::NAMES[usize::from(number)]);
        if !passes.contains(&&*verdict.verdict) {
            self.write().last_denied = Some(Arc::clone(&verdict));
        }
        self.events.publish(Event::Verdict(Logged::new(verdict)));
    }

    /// The latest verdict that denied a packet, or would have.
    #[must_use]
    pub fn last_denied(&self) -> Option<Arc<Verdict>> {
        self.read().last_denied.clone()
    }

    /// `counts`: counters of the packet filter, where it enforces alone.
    pub(crate) fn set_active(&self, active: Option<ActivePolicy>, counts: Option<Arc<Counts>>) {
        let mut inner = self.write();
        (inner.active, inner.counts) = (active, counts);
    }

    /// Returns the counters of the packet filter, if one enforces alone.
    #[must_use]
    pub fn filter_counts(&self) -> Option<FilterCounts> {
        let inner = self.read();
        let (counts, active) = (inner.counts.as_ref()?, inner.active.as_ref()?);
        Some(FilterCounts { counts: Arc::clone(counts), policy: Arc::clone(&active.policy) })
    }

    /// The policy that judges packets, if an engine enforces.
    #[must_use]
    pub fn active(&self) -> Option<ActivePolicy> {
        self.read().active.clone()
    }

    /// Returns the addresses of a pod of this node, none if it is not known; `None`: no cluster is followed.
    #[must_use]
    pub fn pod_addresses(&self, namespace: &str, name: &str) -> Option<Vec<IpAddr>> {
        self.read().kubernetes.as_ref().map(|cluster| cluster.pod_addresses(namespace, name))
    }

    pub(crate) fn set_maps(&self, maps: Option<Arc<Maps>>) {
        self.write().maps = maps;
    }

    pub(crate) fn set_routes(&self, routes: Option<View>) {
        self.write().routes = routes;
    }

    pub(crate) fn set_kubernetes(&self, cluster: Option<kubernetes::View>) {
        self.write().kubernetes = cluster;
    }

    /// The cluster, if one is followed.
    pub(crate) fn cluster(&self) -> Option<kubernetes::View> {
        self.read().kubernetes.clone()
    }

    /// Names of the configuration, by address or network.
    pub(crate) fn names(&self) -> Arc<BTreeMap<String, String>> {
        Arc::clone(&self.read().names)
    }

    pub(crate) fn set_names(&self, names: &BTreeMap<String, String>) {
        self.write().names = Arc::new(names.clone());
    }

    /// Makes `pool` the pool from which clients lease ports.
    pub fn set_pool(&self, pool: Option<Arc<Service>>) {
        let mut inner = self.write();
        inner.pool = pool;
        self.publish_engines(&inner);
    }

    /// The engines and the pool of this node, for its report to the cluster.
    pub(crate) fn engines(&self) -> watch::Receiver<Engines> {
        self.engines.subscribe()
    }

    fn publish_engines(&self, inner: &Inner) {
        let engines = engines(inner);
        self.engines.send_if_modified(|known| {
            let changed = *known != engines;
            *known = engines;
            changed
        });
    }

    /// The pinned maps, if eBPF enforces.
    #[must_use]
    pub fn maps(&self) -> Option<Arc<Maps>> {
        self.read().maps.clone()
    }

    /// The routes, if the configuration has any.
    #[must_use]
    pub fn routes(&self) -> Option<View> {
        self.read().routes.clone()
    }

    /// The port pool, if the configuration has one.
    #[must_use]
    pub fn pool(&self) -> Option<Arc<Service>> {
        self.read().pool.clone()
    }

    /// The current status.
    #[must_use]
    pub fn status(&self) -> Status {
        let (mut status, cluster) = {
            let inner = self.read();
            (inner.status.clone(), inner.kubernetes.clone())
        };
        status.kubernetes = cluster.map(|cluster| cluster.status());
        if let Some(maps) = self.maps() {
            status.flows = maps.count_flows().ok();
            status.suppressed_events = maps.suppressed_events().ok();
        }
        if let Some(trial) = &mut status.trial {
            trial.refresh();
        }
        status.routes = self.routes().as_ref().map(RoutesStatus::of);
        status.pool = self.pool().and_then(|pool| pool.summary().ok());
        status
    }
}

fn engines(Inner { status, pool, .. }: &Inner) -> Engines {
    let mut engines = Engines { pool: pool.clone(), ..Engines::default() };
    if let Some(ebpf) = &status.enforcement {
        engines.names.push("ebpf");
        engines.mode.clone_from(&ebpf.mode);
        engines.generation = ebpf.generation;
        engines.interfaces = ebpf.interfaces.iter().map(|interface| interface.name.clone()).collect();
    }
    if let Some(filter) = &status.firewall {
        engines.names.push(if filter.engine == "nftables" { "nftables" } else { "iptables" });
        engines.errors.extend(filter.failure.clone());
    }
    engines.errors.extend(status.enforcement.iter().flat_map(|ebpf| ebpf.remarks.iter().cloned()));
    engines.unready = status.unready();
    engines.divergence =
        status.firewall.as_ref().and_then(|firewall| firewall.divergence.as_ref()?.summary());
    let trial = status.last_trial.as_ref().filter(|trial| trial.outcome == TrialOutcome::Expired);
    engines.trial_expired = trial.map(|trial| trial.time.clone());
    engines
}
