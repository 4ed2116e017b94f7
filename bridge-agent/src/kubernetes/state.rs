//! The state of a followed cluster, shared by its watches, the run loop and the report.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use super::cluster::Cluster;
use super::objects::{
    AffinityObject, BlockObject, CiliumObject, Followed, NamespaceObject, NamespacePolicyObject, NodeObject,
    PodObject, PolicyObject, RemotePodObject,
};
use super::plan::Planned;
use super::status::{Applied, KubernetesStatus};
use crate::config::Config;
use crate::kernel::clock;

/// The cluster as far as it is known, and the health of the watches. Clones share it.
#[derive(Clone)]
pub(super) struct State(Arc<Inner>);

struct Inner {
    cluster: Mutex<Cluster>,
    /// Whether an earlier run of the agent has saved the cluster.
    restored: bool,
    health: Mutex<Health>,
    applied: watch::Sender<Applied>,
    /// Grows with each change of the cluster.
    version: watch::Sender<u64>,
}

struct Health {
    server: String,
    /// Resources to be listed before the cluster is known.
    expected: Vec<&'static str>,
    /// Resources listed since the agent has started.
    listed: BTreeSet<&'static str>,
    /// Resources that the API server refuses, and without which the others are followed.
    without: BTreeSet<&'static str>,
    failing: BTreeMap<&'static str, Failure>,
    /// Time of the last change between failing and not.
    since: SystemTime,
}

struct Failure {
    reason: String,
    /// Whether the API server answered and refused, rather than not being there.
    refused: bool,
}

/// A panic while the lock is held leaves whole values.
fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    pub(super) fn new(restored: Option<Cluster>, expected: Vec<&'static str>) -> Self {
        let health = Health {
            server: String::new(),
            expected,
            listed: BTreeSet::new(),
            without: BTreeSet::new(),
            failing: BTreeMap::new(),
            since: SystemTime::now(),
        };
        Self(Arc::new(Inner {
            restored: restored.is_some(),
            cluster: Mutex::new(restored.unwrap_or_default()),
            health: Mutex::new(health),
            applied: watch::Sender::default(),
            version: watch::Sender::new(0),
        }))
    }

    pub(super) fn cluster(&self) -> MutexGuard<'_, Cluster> {
        lock(&self.0.cluster)
    }

    /// The outcome of the last change of the configuration.
    pub(super) fn applied(&self) -> watch::Receiver<Applied> {
        self.0.applied.subscribe()
    }

    pub(super) fn set_applied(&self, planned: Planned, error: Option<String>) -> Config {
        let mut config = None;
        self.0.applied.send_modify(|applied| config = Some(applied.take(planned, error)));
        config.expect("a sender calls its closure")
    }

    pub(super) fn version(&self) -> u64 {
        *self.0.version.borrow()
    }

    pub(super) fn versions(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    pub(super) fn expects(&self, resource: &str) -> bool {
        lock(&self.0.health).expected.contains(&resource)
    }

    pub(super) fn set_server(&self, server: String) {
        lock(&self.0.health).server = server;
    }

    /// Changes the cluster; `change` returns whether it did.
    pub(super) fn change(&self, change: impl FnOnce(&mut Cluster) -> bool) {
        let changed = change(&mut self.cluster());
        if changed {
            self.0.version.send_modify(|version| *version += 1);
        }
    }

    /// Notes that all objects of a resource are known.
    pub(super) fn set_listed(&self, resource: &'static str) {
        let mut health = lock(&self.0.health);
        if !health.listed.insert(resource) {
            return;
        }
        tracing::debug!(resource, "resource listed");
        self.show_synced(health);
        self.0.version.send_modify(|version| *version += 1);
    }

    /// Follows the others without a resource that the API server refuses. Its objects stay as last known.
    pub(super) fn go_without(&self, resource: &'static str) {
        let mut health = lock(&self.0.health);
        if health.listed.contains(resource) || !health.without.insert(resource) {
            return;
        }
        self.show_synced(health);
        self.0.version.send_modify(|version| *version += 1);
    }

    fn show_synced(&self, health: MutexGuard<'_, Health>) {
        let synced = health.is_synced().then(|| (health.server.clone(), health.without()));
        drop(health);
        if let Some((server, without)) = synced {
            let without = without.join(", ");
            let without = (!without.is_empty()).then_some(without);
            tracing::info!(server, without, "following the cluster");
        }
    }

    /// Whether every resource has been listed since the agent has started, or is one that the others are followed without.
    pub(super) fn is_synced(&self) -> bool {
        lock(&self.0.health).is_synced()
    }

    /// Whether the cluster is known: every resource has been listed, or an earlier run has saved them.
    pub(super) fn is_known(&self) -> bool {
        self.0.restored || self.is_synced()
    }

    /// Notes that a resource can be followed.
    pub(super) fn recovered(&self, resource: &'static str) {
        let mut health = lock(&self.0.health);
        if health.failing.remove(resource).is_some() && health.failing.is_empty() {
            let outage = health.since.elapsed().unwrap_or_default();
            health.since = SystemTime::now();
            tracing::info!(server = health.server, ?outage, "the API server is back");
        }
    }

    /// Notes that a resource cannot be followed; `refused`: the API server answered and refused.
    pub(super) fn failed(&self, resource: &'static str, reason: String, refused: bool) {
        let mut health = lock(&self.0.health);
        if health.failing.is_empty() {
            health.since = SystemTime::now();
            let server = &health.server;
            tracing::warn!(
                server,
                resource,
                reason,
                "the agent cannot follow the cluster; enforcement stays, it retries"
            );
        }
        health.failing.insert(resource, Failure { reason, refused });
    }

    /// Failures, each with its resource.
    pub(super) fn failures(&self) -> Vec<String> {
        let health = lock(&self.0.health);
        health.failing.iter().map(|(resource, failure)| format!("{resource}: {}", failure.reason)).collect()
    }

    /// Whether the API server refuses a resource, so that changes of it are not seen.
    pub(super) fn is_refused(&self) -> bool {
        lock(&self.0.health).failing.values().any(|failure| failure.refused)
    }

    pub(super) fn status(&self) -> KubernetesStatus {
        let applied = self.0.applied.borrow().clone();
        let (counts, invalid_policies) = {
            let cluster = self.cluster();
            (counts(&cluster), cluster.invalid_policies())
        };
        let health = lock(&self.0.health);
        let connected = health.failing.is_empty();
        let objects = counts.into_iter().filter(|(resource, _)| health.expected.contains(resource));
        let objects: BTreeMap<_, _> = objects.map(|(name, count)| (name.to_owned(), count)).collect();
        let count = |resource: &str| objects.get(resource).copied().unwrap_or_default();
        let missing = health.expected.iter().filter(|one| !health.is_settled(one));
        let failing = health.failing.iter();
        KubernetesStatus {
            server: health.server.clone(),
            connected,
            disconnected_seconds: match connected {
                true => 0,
                false => health.since.elapsed().unwrap_or_default().as_secs(),
            },
            since: clock::at(health.since),
            failing: failing
                .map(|(resource, failure)| ((*resource).to_owned(), failure.reason.clone()))
                .collect(),
            known: self.0.restored || missing.clone().next().is_none(),
            waiting_for: missing.map(ToString::to_string).collect(),
            current: applied.current && !health.failing.values().any(|failure| failure.refused),
            pod_networks_from: applied.origin,
            nodes: count(NodeObject::NAME),
            pods: count(PodObject::NAME),
            objects,
            invalid_policies,
            policies: applied.policies,
            remarks: applied.refused.iter().map(ToString::to_string).chain(applied.remarks).collect(),
            error: applied.error,
        }
    }
}

impl Health {
    fn is_synced(&self) -> bool {
        self.expected.iter().all(|resource| self.is_settled(resource))
    }

    /// Whether a resource keeps the others from being followed no longer.
    fn is_settled(&self, resource: &str) -> bool {
        self.listed.contains(resource) || self.without.contains(resource)
    }

    /// Resources that the others are followed without.
    fn without(&self) -> Vec<&'static str> {
        self.without.iter().filter(|resource| !self.listed.contains(*resource)).copied().collect()
    }
}

/// The number of known objects of each resource.
fn counts(cluster: &Cluster) -> [(&'static str, usize); 9] {
    [
        (NodeObject::NAME, cluster.nodes.len()),
        (PodObject::NAME, cluster.pods.len()),
        (RemotePodObject::NAME, cluster.remote_pods.len()),
        (NamespaceObject::NAME, cluster.namespaces.len()),
        (PolicyObject::NAME, cluster.policies.len()),
        (NamespacePolicyObject::NAME, cluster.namespace_policies.len()),
        (AffinityObject::NAME, cluster.affinities.len()),
        (BlockObject::NAME, cluster.blocks.len()),
        (CiliumObject::NAME, cluster.cilium.len()),
    ]
}
