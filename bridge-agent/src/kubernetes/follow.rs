//! Follows a cluster for as long as it is wanted, and says what is known of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use kube::Client;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::cluster::Cluster;
use super::connect::{self, Error};
use super::engines::Engines;
use super::objects::{
    AffinityObject, BlockObject, CiliumObject, Followed, NamespaceObject, NodeObject, PodObject, PolicyObject,
};
use super::plan::{Planned, plan};
use super::report;
use super::saved::Saved;
use super::status::{Applied, KubernetesStatus};
use super::thread::{ClusterThread, PLUGIN_DEADLINE};
use super::watch::{Query, follow};
use crate::config::{Config, Kubernetes, PodNetworks, Role};
use crate::kernel::time;

/// What a connection that cannot be made is called among what fails.
const CONNECTION: &str = "connection";
/// Between two attempts to make a connection.
const AGAIN: Duration = Duration::from_secs(5);
/// Until it is looked again whether a resource has come: of another project, and bridge's own.
const ABSENT: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(5));
/// Between two changes of what is in force, at least; several of the cluster become one meanwhile.
const PAUSE: Duration = Duration::from_millis(20);

/// What is known of a cluster and of the way to it; clones stand for the same.
#[derive(Clone)]
pub(super) struct State(Arc<Inner>);

struct Inner {
    cluster: Mutex<Cluster>,
    /// Whether the cluster is as an earlier run knew it, until all is listed.
    from_before: bool,
    health: Mutex<Health>,
    applied: Mutex<Applied>,
    /// Grows with each change of the cluster.
    version: watch::Sender<u64>,
    /// Something was brought into force.
    news: Notify,
}

struct Health {
    server: String,
    /// What has to be listed before anything is known.
    expected: Vec<&'static str>,
    /// What of that has been, since the agent has started.
    listed: BTreeSet<&'static str>,
    /// What fails, and why.
    failing: BTreeMap<&'static str, String>,
    /// Since when something fails, or nothing does.
    since: SystemTime,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in between leaves whole values.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn new(before: Option<Cluster>, expected: Vec<&'static str>) -> Self {
        let health = Health {
            server: String::new(),
            expected,
            listed: BTreeSet::new(),
            failing: BTreeMap::new(),
            since: SystemTime::now(),
        };
        Self(Arc::new(Inner {
            from_before: before.is_some(),
            cluster: Mutex::new(before.unwrap_or_default()),
            health: Mutex::new(health),
            applied: Mutex::default(),
            version: watch::Sender::new(0),
            news: Notify::new(),
        }))
    }

    pub(super) fn cluster(&self) -> MutexGuard<'_, Cluster> {
        lock(&self.0.cluster)
    }

    pub(super) fn applied(&self) -> Applied {
        lock(&self.0.applied).clone()
    }

    /// Waits until something was brought into force.
    pub(super) async fn news(&self) {
        self.0.news.notified().await;
    }

    pub(super) fn version(&self) -> u64 {
        *self.0.version.borrow()
    }

    /// Changes what is known; `change` says whether it has.
    pub(super) fn change(&self, change: impl FnOnce(&mut Cluster) -> bool) {
        let changed = change(&mut self.cluster());
        if changed {
            self.0.version.send_modify(|version| *version += 1);
        }
    }

    /// All of a resource is known.
    pub(super) fn listed(&self, resource: &'static str) {
        let first = lock(&self.0.health).listed.insert(resource);
        if first {
            tracing::debug!(resource, "listed");
            self.0.version.send_modify(|version| *version += 1);
        }
    }

    /// Whether everything is known that there is.
    pub(super) fn synced(&self) -> bool {
        let health = lock(&self.0.health);
        health.expected.iter().all(|resource| health.listed.contains(resource))
    }

    pub(super) fn works(&self, resource: &'static str) {
        let mut health = lock(&self.0.health);
        if health.failing.remove(resource).is_some() && health.failing.is_empty() {
            let gone = health.since.elapsed().unwrap_or_default();
            health.since = SystemTime::now();
            tracing::info!(server = health.server, ?gone, "the API server is back");
        }
    }

    pub(super) fn fails(&self, resource: &'static str, reason: String) {
        let mut health = lock(&self.0.health);
        if health.failing.is_empty() {
            health.since = SystemTime::now();
            tracing::warn!(
                server = health.server,
                resource,
                reason,
                "the cluster cannot be followed; what is in force stays, and it is tried again"
            );
        }
        health.failing.insert(resource, reason);
    }

    pub(super) fn status(&self) -> KubernetesStatus {
        let applied = self.applied();
        let (counts, invalid_policies) = {
            let cluster = self.cluster();
            (counts(&cluster), cluster.invalid_policies())
        };
        let health = lock(&self.0.health);
        let connected = health.failing.is_empty();
        let objects = counts.into_iter().filter(|(resource, _)| health.expected.contains(resource));
        let objects: BTreeMap<_, _> = objects.map(|(name, count)| (name.to_owned(), count)).collect();
        let count = |resource: &str| objects.get(resource).copied().unwrap_or_default();
        let missing = health.expected.iter().filter(|one| !health.listed.contains(*one));
        let failing = health.failing.iter();
        KubernetesStatus {
            server: health.server.clone(),
            connected,
            disconnected_seconds: match connected {
                true => 0,
                false => health.since.elapsed().unwrap_or_default().as_secs(),
            },
            since: time::at(health.since),
            failing: failing.map(|(resource, reason)| ((*resource).to_owned(), reason.clone())).collect(),
            known: self.0.from_before || missing.clone().next().is_none(),
            waiting_for: missing.map(ToString::to_string).collect(),
            current: applied.current,
            pod_networks_from: applied.origin,
            nodes: count(NodeObject::NAME),
            pods: count(PodObject::NAME),
            objects,
            invalid_policies,
            policies: applied.policies,
            remarks: applied.remarks,
            error: applied.error,
        }
    }
}

/// Follows a cluster until it is dropped.
pub(crate) struct Follower {
    section: Kubernetes,
    role: Role,
    node: Option<String>,
    state: State,
    seen: watch::Receiver<u64>,
    /// What of the cluster is in force.
    applied: Option<u64>,
    /// Not before then is it looked at again.
    not_before: Instant,
    _thread: ClusterThread,
}

/// To look at what is known; from any thread.
#[derive(Clone)]
pub struct View(State);

impl View {
    /// What is known of the cluster, and of the way to it.
    #[must_use]
    pub fn status(&self) -> KubernetesStatus {
        self.0.status()
    }
}

impl Follower {
    /// Begins to follow the cluster of a configuration; nothing has been asked of it on return. On a node, what was known
    /// at the end of an earlier run is known at once.
    ///
    /// # Errors
    /// There is nothing to connect with.
    pub(crate) fn start(
        config: &Config,
        section: &Kubernetes,
        engines: watch::Receiver<Engines>,
        state_directory: &Path,
    ) -> Result<Self, Error> {
        connect::check(section)?;
        let node = match config.role {
            Role::Node => Some(connect::node_name(section)?),
            Role::Host => None,
        };
        let place = state_directory.join("kubernetes.json");
        let saved = node.as_ref().map(|node| Saved::new(place, node.clone(), section.clone()));
        let before = saved.as_ref().and_then(Saved::load);
        if let Some(cluster) = &before {
            tracing::info!(
                pods = cluster.pods.len(),
                policies = cluster.policies.len(),
                "cluster as last known"
            );
        }
        let state = State::new(before, expected(config.role, section.pod_networks));
        let seen = state.0.version.subscribe();
        let follow = supervise(section.clone(), node.clone(), state.clone());
        let report = report::run(section.clone(), node.clone(), state.clone(), engines, saved);
        let work = async move { tokio::join!(follow, report) };
        let thread = ClusterThread::start(work, PLUGIN_DEADLINE).map_err(Error::Thread)?;
        Ok(Self {
            section: section.clone(),
            role: config.role,
            node,
            state,
            seen,
            applied: None,
            not_before: Instant::now(),
            _thread: thread,
        })
    }

    /// Whether it follows what this configuration asks for.
    pub(crate) fn is_for(&self, config: &Config) -> bool {
        config.kubernetes.as_ref() == Some(&self.section) && config.role == self.role
    }

    /// What the configuration file and all that is known come to.
    pub(crate) fn plan(&self, file: &Config) -> (Planned, u64) {
        let cluster = self.state.cluster();
        let version = self.state.version();
        (plan(file, &cluster, self.node.as_deref()), version)
    }

    /// Whether everything has been listed once: until then nothing may be withdrawn for not being known.
    pub(crate) fn synced(&self) -> bool {
        self.state.synced()
    }

    /// Waits until there is something new, all of it is known, and a pause has passed. Can be dropped at any time.
    pub(crate) async fn changed(&mut self) {
        let (applied, state) = (self.applied, &self.state);
        // The sender is kept by the state.
        drop(self.seen.wait_for(|version| Some(*version) != applied && state.synced()).await);
        tokio::time::sleep_until(self.not_before.into()).await;
    }

    /// Tells what has become of version `version`: in force, or an error, after which it is tried again.
    pub(crate) fn done(&mut self, version: u64, planned: Planned, error: Option<String>, took: Duration) {
        let pause = if error.is_some() { AGAIN } else { took.max(PAUSE) };
        self.applied = error.is_none().then_some(version);
        self.not_before = Instant::now() + pause;
        lock(&self.state.0.applied).take(planned, error, self.state.synced());
        self.state.0.news.notify_one();
    }

    /// To look at it.
    pub(crate) fn view(&self) -> View {
        View(self.state.clone())
    }
}

/// How many objects are known of each resource.
fn counts(cluster: &Cluster) -> [(&'static str, usize); 7] {
    [
        (NodeObject::NAME, cluster.nodes.len()),
        (PodObject::NAME, cluster.pods.len()),
        (NamespaceObject::NAME, cluster.namespaces.len()),
        (PolicyObject::NAME, cluster.policies.len()),
        (AffinityObject::NAME, cluster.affinities.len()),
        (BlockObject::NAME, cluster.blocks.len()),
        (CiliumObject::NAME, cluster.cilium.len()),
    ]
}

/// Which sources of pod networks are asked.
const fn asks(wanted: PodNetworks) -> (bool, bool) {
    let calico = matches!(wanted, PodNetworks::Auto | PodNetworks::Calico);
    let cilium = matches!(wanted, PodNetworks::Auto | PodNetworks::Cilium);
    (calico, cilium)
}

fn expected(role: Role, networks: PodNetworks) -> Vec<&'static str> {
    let (calico, cilium) = asks(networks);
    let on_node = role == Role::Node;
    [
        (true, NodeObject::NAME),
        (on_node, PodObject::NAME),
        (on_node, NamespaceObject::NAME),
        (on_node, PolicyObject::NAME),
        (calico, AffinityObject::NAME),
        // Each address that a pod gets changes a block: only who needs routes to single ones follows them.
        (calico && !on_node, BlockObject::NAME),
        (cilium, CiliumObject::NAME),
    ]
    .into_iter()
    .filter_map(|(wanted, name)| wanted.then_some(name))
    .collect()
}

/// Connects, follows, and connects anew when the API server does not know us any more.
async fn supervise(section: Kubernetes, node: Option<String>, state: State) {
    loop {
        match connect::connect(&section).await {
            Err(error) => state.fails(CONNECTION, error.to_string()),
            Ok((client, server)) => {
                tracing::info!(server, "following the cluster");
                lock(&state.0.health).server = server;
                state.works(CONNECTION);
                let mut kinds = begin(&client, node.as_deref(), &state);
                // One ends when it is refused: certificates and tokens are then read again.
                drop(kinds.join_next().await);
                tracing::info!("reading the credentials for the API server anew");
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn begin(client: &Client, node: Option<&str>, state: &State) -> JoinSet<()> {
    let mut kinds = JoinSet::new();
    let expected = lock(&state.0.health).expected.clone();
    let mut add = Add { kinds: &mut kinds, expected, client, state };
    let other = Query { absent: Some(ABSENT.0), ..Query::default() };
    add.kind::<NodeObject>(Query::default());
    add.kind::<NamespaceObject>(Query::default());
    add.kind::<PolicyObject>(Query { absent: Some(ABSENT.1), ..Query::default() });
    add.kind::<AffinityObject>(other.clone());
    add.kind::<BlockObject>(other.clone());
    add.kind::<CiliumObject>(other);
    if let Some(node) = node {
        let field_selector = Some(format!("spec.nodeName={node}"));
        add.kind::<PodObject>(Query { field_selector, from_cache: true, absent: None });
    }
    kinds
}

struct Add<'a> {
    kinds: &'a mut JoinSet<()>,
    expected: Vec<&'static str>,
    client: &'a Client,
    state: &'a State,
}

impl Add<'_> {
    fn kind<T: Followed>(&mut self, query: Query) {
        if self.expected.contains(&T::NAME) {
            self.kinds.spawn(follow::<T>(self.client.clone(), query, self.state.clone()));
        }
    }
}
