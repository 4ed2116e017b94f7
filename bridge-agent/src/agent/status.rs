//! What the agent says of itself, and what its parts share.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::{broadcast, mpsc, oneshot},
};

use super::{
    apply::{Applied, ApplyError, Order},
    enforcer::Enforcement,
    packet_filter::FirewallStatus,
    routing::RoutesStatus,
    trial::{TrialEnd, TrialStatus},
};
use crate::{
    datapath::{FlowCounts, Maps, Verdict},
    kubernetes::{self, KubernetesStatus},
    pool::{Summary, service::Service},
    routes::{RouteEvent, View},
};

/// What the agent says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Version of the agent.
    pub version: String,
    /// Version of the layout of pinned maps.
    pub abi_version: u32,
    /// Its process id.
    pub pid: u32,
    /// Since when it runs; RFC 3339, UTC.
    pub started: String,
    /// Its configuration file.
    pub config: PathBuf,
    /// `node` or `host`.
    pub role: String,
    /// The packet path, if it is to enforce by eBPF.
    pub enforcement: Option<Enforcement>,
    /// The iptables rules, if it is to enforce by iptables.
    pub firewall: Option<FirewallStatus>,
    /// The routes to pods, if the configuration has any to look after.
    pub routes: Option<RoutesStatus>,
    /// The port pool, if there is one.
    pub pool: Option<Summary>,
    /// Ranges of ports that get into each other's way, with the remedy.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// The cluster, if one is followed.
    #[serde(default)]
    pub kubernetes: Option<KubernetesStatus>,
    /// How full the flow tables are.
    pub flows: Option<FlowCounts>,
    /// Events that were kept back so far.
    pub suppressed_events: Option<u64>,
    /// How reloads went.
    pub reloads: Reloads,
    /// The configuration on trial, if one is.
    pub trial: Option<TrialStatus>,
    /// How the last trial ended.
    pub last_trial: Option<TrialEnd>,
}

/// How reloads went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reloads {
    /// Configurations that were brought into force.
    pub succeeded: u64,
    /// Configurations that were refused.
    pub failed: u64,
    /// The last one.
    pub last: Option<Reload>,
}

/// An attempt to bring a configuration into force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reload {
    /// When; RFC 3339, UTC.
    pub time: String,
    /// Why it was refused; the one before it is still in force then.
    pub error: Option<String>,
}

/// What is asked of the run loop.
#[derive(Debug)]
pub enum Request {
    /// Read the configuration again; the answer says what was wrong with it.
    Reload(oneshot::Sender<Result<(), String>>),
    /// Bring a configuration into force.
    Apply(Box<Order>, oneshot::Sender<Result<Applied, ApplyError>>),
    /// Make the configuration on trial the one that counts.
    Confirm(oneshot::Sender<Result<Applied, ApplyError>>),
    /// Go back to the configuration before the one on trial.
    Revert(oneshot::Sender<Result<Applied, ApplyError>>),
    /// Of the configuration on trial, every probe has answered.
    ProbesAnswered,
}

/// What the run loop shares with those who serve clients.
#[derive(Clone)]
pub struct Shared {
    inner: Arc<RwLock<Inner>>,
    /// Verdicts as they happen.
    pub verdicts: broadcast::Sender<Arc<Verdict>>,
    /// What happens to routes, next hops and discovered pods, as it happens.
    pub happenings: broadcast::Sender<RouteEvent>,
    /// To the run loop.
    pub requests: mpsc::Sender<Request>,
    /// The runtime of the run loop.
    main: Option<Handle>,
}

struct Inner {
    status: Status,
    maps: Option<Arc<Maps>>,
    routes: Option<View>,
    pool: Option<Arc<Service>>,
    kubernetes: Option<kubernetes::View>,
}

/// How many verdicts, or events of routes, a slow reader may lag behind before it loses some.
const BACKLOG: usize = 1024;

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    /// Shared by a run loop, which has the other end, and its servers. To be called in the runtime of the run loop, if there
    /// is one.
    #[must_use]
    pub fn new(status: Status) -> (Self, mpsc::Receiver<Request>) {
        let (requests, receiver) = mpsc::channel(16);
        let (verdicts, _) = broadcast::channel(BACKLOG);
        let inner =
            Arc::new(RwLock::new(Inner { status, maps: None, routes: None, pool: None, kubernetes: None }));
        let main = Handle::try_current().ok();
        (Self { inner, verdicts, happenings: broadcast::Sender::new(BACKLOG), requests, main }, receiver)
    }

    /// Waits until the run loop has finished what it is at: from then on, what the agent tells is not older than what could be
    /// seen of it in the kernel before.
    pub async fn settled(&self) {
        if let Some(main) = &self.main {
            // It has one thread, which comes to this when it comes to anything else. That it ends is no error.
            drop(main.spawn(async {}).await);
        }
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.inner.write().unwrap_or_else(PoisonError::into_inner).status);
    }

    pub(super) fn set_maps(&self, maps: Option<Arc<Maps>>) {
        self.inner.write().unwrap_or_else(PoisonError::into_inner).maps = maps;
    }

    pub(super) fn set_routes(&self, routes: Option<View>) {
        self.inner.write().unwrap_or_else(PoisonError::into_inner).routes = routes;
    }

    /// The routes, if this agent looks after any.
    #[must_use]
    pub fn routes(&self) -> Option<View> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).routes.clone()
    }

    /// Makes this the pool that clients get their ports from.
    pub fn set_pool(&self, pool: Option<Arc<Service>>) {
        self.inner.write().unwrap_or_else(PoisonError::into_inner).pool = pool;
    }

    /// The port pool, if this agent has one.
    #[must_use]
    pub fn pool(&self) -> Option<Arc<Service>> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).pool.clone()
    }

    pub(super) fn set_kubernetes(&self, cluster: Option<kubernetes::View>) {
        self.inner.write().unwrap_or_else(PoisonError::into_inner).kubernetes = cluster;
    }

    /// What enforces, as it was looked at last.
    pub(crate) fn engines(&self) -> (Option<Enforcement>, Option<FirewallStatus>) {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        (inner.status.enforcement.clone(), inner.status.firewall.clone())
    }

    /// The pinned maps, if this agent enforces by eBPF.
    #[must_use]
    pub fn maps(&self) -> Option<Arc<Maps>> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).maps.clone()
    }

    /// The status of now.
    #[must_use]
    pub fn status(&self) -> Status {
        let (mut status, cluster) = {
            let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
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

/// Now, as RFC 3339 in UTC.
pub(crate) fn wall_clock() -> String {
    at(SystemTime::now())
}

/// A time, as RFC 3339 in UTC.
pub(crate) fn at(time: SystemTime) -> String {
    crate::kernel::time::rfc3339(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}
