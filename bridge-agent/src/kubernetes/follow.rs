//! Follows a cluster for as long as it is wanted, and publishes its known state.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kube::Client;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::budgets::Budgets;
use super::cluster::Cluster;
use super::connect::{self, Error};
use super::engines::Engines;
use super::objects::{
    AffinityObject, BlockObject, CiliumObject, Followed, NamespaceObject, NamespacePolicyObject, NodeObject,
    PodObject, PolicyObject, RemotePodObject,
};
use super::plan::{Planned, plan_with};
use super::quarantine::Quarantine;
use super::report;
use super::saved::Saved;
use super::state::State;
use super::status::KubernetesStatus;
use super::thread::{ClusterThread, PLUGIN_DEADLINE};
use super::watch::{Query, follow};
use crate::config::{Config, FollowedPods, Kubernetes, PodNetworks, Role};

/// Name of a failed connection among the failures.
const CONNECTION: &str = "connection";
/// Between two attempts to make a connection.
const RETRY: Duration = Duration::from_secs(5);
/// Until it is looked again whether a resource has come: of another project, and bridge's own.
const ABSENT: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(5));
/// Minimum time between two changes of the active configuration; several changes of the cluster become one meanwhile.
const PAUSE: Duration = Duration::from_millis(20);
/// A change that took longer is followed by a pause of this part of its time, for all else that the run loop has to do.
const PAUSE_SHARE: u32 = 4;

/// Follows a cluster until it is dropped.
pub(crate) struct Follower {
    section: Kubernetes,
    role: Role,
    node: Option<String>,
    state: State,
    seen: watch::Receiver<u64>,
    /// Version of the cluster's state that is applied.
    applied: Option<u64>,
    /// Not before then is it looked at again.
    not_before: Instant,
    /// Borrowed for the time of a plan.
    budgets: Mutex<Budgets>,
    quarantine: Mutex<Quarantine>,
    /// Generation of each refused policy that was logged.
    logged: HashMap<String, i64>,
    _thread: ClusterThread,
}

/// Reads the known state; from any thread.
#[derive(Clone)]
pub struct View(State);

impl View {
    /// Visits the pods of this node: namespace and name, addresses, and the UID of one that takes part in the port pool.
    pub(crate) fn visit_pods(&self, mut visit: impl FnMut(&str, &[IpAddr], Option<&str>)) {
        for (name, pod) in self.0.cluster().pods.iter() {
            visit(name, &pod.addresses, pod.pool_uid.as_deref());
        }
    }

    /// Returns the known state of the cluster, and of the connection.
    #[must_use]
    pub fn status(&self) -> KubernetesStatus {
        self.0.status()
    }

    /// Returns the addresses of a pod of this node; none if it is not known.
    #[must_use]
    pub(crate) fn pod_addresses(&self, namespace: &str, name: &str) -> Vec<IpAddr> {
        let cluster = self.0.cluster();
        let pod = cluster.pods.get(&format!("{namespace}/{name}"));
        pod.map(|pod| pod.addresses.to_vec()).unwrap_or_default()
    }
}

impl Follower {
    /// Begins to follow the cluster of a configuration; nothing has been asked of it on return. On a node, the state
    /// saved by an earlier run is known at once.
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
        Self::start_as(node, config, section, engines, state_directory)
    }

    /// As [`start`](Self::start), after `error`: a file that is missing or wrong is read again, and again. Without the name of
    /// the node, nothing is followed until [`Self::can_begin`].
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start_later(
        config: &Config,
        section: &Kubernetes,
        engines: watch::Receiver<Engines>,
        state_directory: &Path,
        error: Error,
    ) -> Result<Self, Error> {
        let node = match config.role {
            Role::Node => match connect::node_name(section) {
                Ok(name) => Some(name),
                Err(_) => {
                    return Self::start_with(None, None, config, section, |state| {
                        state.failed(CONNECTION, error.to_string(), false);
                        until_named(section.clone(), state.clone())
                    });
                }
            },
            Role::Host => None,
        };
        Self::start_as(node, config, section, engines, state_directory)
    }

    fn start_as(
        node: Option<String>,
        config: &Config,
        section: &Kubernetes,
        engines: watch::Receiver<Engines>,
        state_directory: &Path,
    ) -> Result<Self, Error> {
        let place = state_directory.join("kubernetes.json");
        let saved = node.as_ref().map(|node| Saved::new(place, node.clone(), section.clone()));
        let before = saved.as_ref().and_then(Saved::load);
        if let Some(cluster) = &before {
            tracing::info!(
                pods = cluster.pods.len(),
                policies = cluster.all_policies().count(),
                "cluster as last known"
            );
        }
        let (of_section, name) = (section.clone(), node.clone());
        Self::start_with(node, before, config, section, move |state| {
            let follow = supervise(of_section.clone(), name.clone(), state.clone());
            let report = report::run(of_section, name, state.clone(), engines, saved);
            async move { tokio::join!(follow, report) }
        })
    }

    fn start_with<W: Future + Send + 'static>(
        node: Option<String>,
        before: Option<Cluster>,
        config: &Config,
        section: &Kubernetes,
        work: impl FnOnce(&State) -> W,
    ) -> Result<Self, Error> {
        let state = State::new(before, expected(config.role, section));
        let seen = state.versions();
        let thread = ClusterThread::start(work(&state), PLUGIN_DEADLINE).map_err(Error::Thread)?;
        Ok(Self {
            section: section.clone(),
            role: config.role,
            node,
            state,
            seen,
            applied: None,
            not_before: Instant::now(),
            budgets: Mutex::default(),
            quarantine: Mutex::default(),
            logged: HashMap::new(),
            _thread: thread,
        })
    }

    /// Returns whether it follows the cluster of this configuration.
    pub(crate) fn is_for(&self, config: &Config) -> bool {
        config.kubernetes.as_ref() == Some(&self.section) && config.role == self.role
    }

    /// Returns whether it follows nothing since this node had no valid name, and the node has one now.
    pub(crate) fn can_begin(&self) -> bool {
        self.role == Role::Node && self.node.is_none() && connect::node_name(&self.section).is_ok()
    }

    /// Combines the configuration file with the known state.
    pub(crate) fn plan(&self, file: &Config) -> (Planned, u64) {
        // First: a change that comes meanwhile is planned now or announced again, and never lost.
        let (version, synced) = (self.state.version(), self.state.is_synced());
        let cluster = self.state.cluster();
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        let mut planned = plan_with(file, &cluster, self.node.as_deref(), &mut budgets, &self.quarantine());
        planned.synced = synced;
        (planned, version)
    }

    /// Returns whether the cluster is known, by the API server or by an earlier run.
    pub(crate) fn knows_cluster(&self) -> bool {
        self.state.is_known()
    }

    /// Waits until there is something new, all of it is known or [`Self::can_begin`], and a pause has passed. Can be dropped at any
    /// time.
    pub(crate) async fn changed(&mut self) {
        let (applied, mut seen) = (self.applied, self.seen.clone());
        let is_due =
            |version: &u64| Some(*version) != applied && (self.state.is_synced() || self.can_begin());
        // The sender is kept by the state.
        drop(seen.wait_for(is_due).await);
        tokio::time::sleep_until(self.not_before.into()).await;
    }

    /// Notes the outcome of applying version `version`: success, or an error, after which it is tried again. Returns the
    /// planned configuration.
    pub(crate) fn done(
        &mut self,
        version: u64,
        planned: Planned,
        error: Option<String>,
        took: Duration,
    ) -> Config {
        let again = match &error {
            None => self.quarantine().succeeded(&planned.policies, &self.state.cluster()),
            Some(error) => self.exclude(&planned, error),
        };
        let pause = if error.is_some() && !again { RETRY } else { (took / PAUSE_SHARE).max(PAUSE) };
        self.applied = (error.is_none() && !again).then_some(version);
        self.not_before = Instant::now() + pause;
        self.log_refused(&planned);
        self.state.set_applied(planned, error)
    }

    /// Leaves policies out of the next plan because `planned` could not be applied. Returns whether there are any, so that it
    /// is worth another attempt.
    pub(crate) fn exclude(&self, planned: &Planned, error: &str) -> bool {
        self.quarantine().failed(&planned.policies, error)
    }

    fn quarantine(&self) -> MutexGuard<'_, Quarantine> {
        self.quarantine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs each refused policy once a generation.
    fn log_refused(&mut self, planned: &Planned) {
        let refused: HashSet<&str> = planned.refused.iter().map(|policy| policy.name.as_str()).collect();
        self.logged.retain(|name, _| refused.contains(name.as_str()));
        for policy in &planned.refused {
            if self.logged.insert(policy.name.clone(), policy.generation) != Some(policy.generation) {
                let (name, generation, reason) = (&policy.name, policy.generation, &policy.message);
                tracing::warn!(policy = name, generation, reason, "the agent refuses a policy");
            }
        }
    }

    /// To look at it.
    pub(crate) fn view(&self) -> View {
        View(self.state.clone())
    }
}

/// Which sources of pod networks are asked.
const fn asks(wanted: PodNetworks) -> (bool, bool) {
    let calico = matches!(wanted, PodNetworks::Auto | PodNetworks::Calico);
    let cilium = matches!(wanted, PodNetworks::Auto | PodNetworks::Cilium);
    (calico, cilium)
}

fn expected(role: Role, section: &Kubernetes) -> Vec<&'static str> {
    let (calico, cilium) = asks(section.pod_networks);
    let on_node = role == Role::Node;
    [
        (true, NodeObject::NAME),
        (on_node, PodObject::NAME),
        (on_node && section.pods == FollowedPods::All, RemotePodObject::NAME),
        (on_node, NamespaceObject::NAME),
        (on_node, PolicyObject::NAME),
        // Where they have no effect, the right to read them is not needed.
        (on_node && section.namespace_policies, NamespacePolicyObject::NAME),
        (calico, AffinityObject::NAME),
        // Each address that a pod gets changes a block: only who needs routes to single ones follows them.
        (calico && !on_node, BlockObject::NAME),
        (cilium, CiliumObject::NAME),
    ]
    .into_iter()
    .filter_map(|(wanted, name)| wanted.then_some(name))
    .collect()
}

/// Waits until this node has a valid name, and announces it.
async fn until_named(section: Kubernetes, state: State) {
    while let Err(error) = connect::node_name(&section) {
        state.failed(CONNECTION, error.to_string(), false);
        tokio::time::sleep(RETRY).await;
    }
    state.change(|_| true);
}

/// Connects, follows, and connects again when the API server refuses our credentials.
async fn supervise(section: Kubernetes, node: Option<String>, state: State) {
    loop {
        match connect::connect(&section).await {
            Err(error) => state.failed(CONNECTION, error.to_string(), false),
            Ok((client, server)) => {
                tracing::debug!(server, "connecting to the API server");
                state.set_server(server);
                state.recovered(CONNECTION);
                let mut kinds = begin(&client, node.as_deref(), &state);
                // One ends when it is refused: certificates and tokens are then read again.
                drop(kinds.join_next().await);
                tracing::debug!("reading the credentials for the API server again");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn begin(client: &Client, node: Option<&str>, state: &State) -> JoinSet<()> {
    let mut kinds = JoinSet::new();
    let mut add = Add { kinds: &mut kinds, client, state };
    let other = Query { absent: Some(ABSENT.0), ..Query::default() };
    add.kind::<NodeObject>(Query::default());
    add.kind::<NamespaceObject>(Query::default());
    add.kind::<PolicyObject>(Query { absent: Some(ABSENT.1), ..Query::default() });
    add.kind::<NamespacePolicyObject>(Query { absent: Some(ABSENT.1), ..Query::default() });
    add.kind::<AffinityObject>(other.clone());
    add.kind::<BlockObject>(other.clone());
    add.kind::<CiliumObject>(other);
    if let Some(node) = node {
        let field_selector = Some(format!("spec.nodeName={node}"));
        add.kind::<PodObject>(Query { field_selector, from_cache: true, absent: None });
        let field_selector = Some(format!("spec.nodeName!={node}"));
        add.kind::<RemotePodObject>(Query { field_selector, ..Query::default() });
    }
    kinds
}

struct Add<'a> {
    kinds: &'a mut JoinSet<()>,
    client: &'a Client,
    state: &'a State,
}

impl Add<'_> {
    fn kind<T: Followed>(&mut self, query: Query) {
        if self.state.expects(T::NAME) {
            self.kinds.spawn(follow::<T>(self.client.clone(), query, self.state.clone()));
        }
    }
}
