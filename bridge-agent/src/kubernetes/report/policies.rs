//! The conditions of all policies, written by the agent that holds the Lease.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client};
use serde_json::json;

use super::super::cluster::{Cluster, Policy, Refusal, namespace_of};
use super::super::objects::{BridgeNodeReport, NamespacePolicyMeta, NodeReport, PolicyMeta, key};
use super::super::policy_sets::{self, is_set};
use super::super::resources::{
    ACCEPTED, Condition, GROUP, MANAGER, PROGRAMMED, RefusedPolicy, Revision, VERSION,
};
use super::super::state::State;
use super::conditions::{condition, same, truth};
use super::event::Events;
use super::lease::{Lease, RENEW};

/// Changes within this time become one write: most nodes apply a policy meanwhile.
const COALESCE: Duration = Duration::from_millis(200);
/// A new or changed policy is not called pending before this time: nodes that apply it meanwhile make one write of two.
const SETTLE: Duration = Duration::from_millis(1500);
/// A condition that says that nodes are missing is written at most this often in the first minute, and then as others.
const PROGRESS: Duration = Duration::from_secs(10);
/// A condition is repeated at most this often, after another client or the number of nodes has changed it.
const REPEAT: Duration = Duration::from_secs(60);
/// Changes of a status that are written about one revision of a policy, at most this many within that time: it is pending, and
/// then enforced.
const CHANGES: usize = 2;
const WINDOW: Duration = Duration::from_secs(120);
/// Versions of the set of policies that are remembered.
const HISTORY: usize = 256;
/// Nodes that a message names.
const NAMED: usize = 3;
/// The reason of a policy that a node refuses.
const REFUSED_BY_NODE: &str = "RefusedByNode";
/// The reason of a policy that a node has not applied yet.
const PENDING: &str = "Pending";
/// Conditions that are written at a time.
const WRITES: usize = 8;
/// The message of a node that refuses more policies than it lists.
const UNLISTED: &str =
    "it refuses more policies than its BridgeNode lists; `bridge-agent status` there has the reason";

/// Versions of the set of policies, so that the hash that a node reports identifies its policies.
#[derive(Default)]
struct History {
    version: u64,
    /// Version by hash, the oldest first.
    hashes: Vec<(String, u64)>,
    /// Revision of each policy, and the version in which it came.
    policies: BTreeMap<String, (Revision, u64)>,
}

/// Of the policies of the cluster, and of those of namespaces.
#[derive(Default)]
struct Histories([History; 2]);

impl Histories {
    fn update(&mut self, cluster: &Cluster) {
        let Self([of_cluster, of_namespaces]) = self;
        of_cluster.update(cluster.policies.iter());
        of_namespaces.update(cluster.namespace_policies.iter());
    }

    /// Returns the versions with these hashes, or where one is not known, that of `before`.
    fn versions_of(&self, hashes: &[String; 2], before: [u64; 2]) -> [u64; 2] {
        let of = |kind: usize| self.0[kind].version_of(&hashes[kind]).unwrap_or(before[kind]);
        [of(0), of(1)]
    }

    /// The version in which a policy came; `None` if it is not known.
    fn since(&self, name: &str) -> Option<u64> {
        self.0[kind(name)].policies.get(name).map(|(_, version)| *version)
    }

    /// Returns the names in a node's set of refused policies, if that is about the present policies.
    fn refused(&self, hashes: &[String; 2], set: &str) -> Option<BTreeSet<String>> {
        let Self([of_cluster, of_namespaces]) = self;
        let is_present =
            |history: &History, hash: &String| history.hashes.last().is_some_and(|(last, _)| last == hash);
        if set.is_empty() {
            return Some(BTreeSet::new());
        }
        // Where policies of namespaces have no effect, the node's set has none of them.
        let with_namespaces = !hashes[1].is_empty();
        if !is_present(of_cluster, &hashes[0]) || with_namespaces && !is_present(of_namespaces, &hashes[1]) {
            return None;
        }
        let others = of_namespaces.policies.keys().filter(|_| with_namespaces);
        let names = of_cluster.policies.keys().chain(others).enumerate();
        Some(names.filter(|(index, _)| is_set(set, *index)).map(|(_, name)| name.clone()).collect())
    }
}

/// The kind of a policy, as an index.
fn kind(name: &str) -> usize {
    usize::from(namespace_of(name).is_some())
}

impl History {
    /// Takes note of the policies that exist.
    fn update<'p>(&mut self, policies: impl Iterator<Item = (&'p str, &'p Policy)> + Clone) {
        let hash = policy_sets::hash(policies.clone());
        if self.hashes.last().is_some_and(|(last, _)| *last == hash) {
            return;
        }
        self.version += 1;
        let before = std::mem::take(&mut self.policies);
        for (name, policy) in policies {
            let known = before.get(name).filter(|(revision, _)| *revision == policy.revision());
            let known = known.cloned().unwrap_or_else(|| (policy.revision(), self.version));
            self.policies.insert(name.to_owned(), known);
        }
        self.hashes.retain(|(known, _)| *known != hash);
        self.hashes.push((hash, self.version));
        if self.hashes.len() > HISTORY {
            self.hashes.remove(0);
        }
    }

    fn version_of(&self, hash: &str) -> Option<u64> {
        self.hashes.iter().rev().find(|(known, _)| known == hash).map(|(_, version)| *version)
    }
}

/// The last report of a node.
struct Report {
    /// The versions of the sets of policies that it has.
    versions: [u64; 2],
    hashes: [String; 2],
    refused: Vec<RefusedPolicy>,
    /// The refused policies, if they are more than listed.
    refused_set: String,
    /// The same, by name.
    unlisted: BTreeSet<String>,
}

/// The last condition written to a policy, and its time.
struct Written {
    revision: Revision,
    conditions: Vec<Condition>,
    at: Instant,
    /// The first write about this revision.
    first: Instant,
    /// Writes that changed a status of this revision, within [`WINDOW`].
    changes: Vec<Instant>,
}

/// Writes conditions while it runs.
pub(super) struct Policies {
    client: Client,
    state: State,
    history: Histories,
    nodes: BTreeMap<String, Report>,
    written: HashMap<String, Written>,
    /// Revision of each policy, and the time when it was first seen.
    seen: HashMap<String, (Revision, Instant)>,
    /// When the first of the policies that wait for their nodes is to be written.
    settles: Option<Instant>,
    warned: BTreeSet<String>,
}

impl Policies {
    pub(super) fn new(client: Client, state: State) -> Self {
        let (history, nodes, written, seen, settles, warned) = Default::default();
        Self { client, state, history, nodes, written, seen, settles, warned }
    }

    /// Runs until the Lease is lost.
    pub(super) async fn run(&mut self, lease: &mut Lease, events: &Events) {
        let api = Api::<BridgeNodeReport>::all(self.client.clone());
        let mut reports = Box::pin(watcher(api, Config::default()));
        let mut versions = self.state.versions();
        let mut renew = tokio::time::interval(RENEW);
        let mut listed = false;
        let mut listing = BTreeSet::new();
        let mut due = None::<Instant>;
        loop {
            let wait = due.unwrap_or_else(Instant::now);
            tokio::select! {
                biased;
                _ = renew.tick() => {
                    let nodes = self.state.cluster().nodes.len();
                    if !matches!(lease.acquire(nodes).await, Ok(true)) {
                        return;
                    }
                    due.get_or_insert_with(Instant::now);
                }
                () = tokio::time::sleep_until(wait.into()), if due.is_some() && listed => {
                    due = None;
                    if self.state.is_synced() {
                        self.write(events).await;
                        due = self.settles;
                    }
                }
                event = reports.next() => match event {
                    None => return,
                    Some(Err(error)) => {
                        tracing::debug!(%error, "the agent cannot watch BridgeNodes");
                        tokio::time::sleep(COALESCE).await;
                    }
                    Some(Ok(event)) => {
                        match event {
                            Event::Init => listing.clear(),
                            Event::InitApply(node) => {
                                listing.insert(key(&node).into_string());
                                self.take(node);
                            }
                            Event::InitDone => {
                                self.nodes.retain(|name, _| listing.contains(name));
                                listed = true;
                            }
                            Event::Apply(node) => self.take(node),
                            Event::Delete(node) => drop(self.nodes.remove(&*key(&node))),
                        }
                        due = soon(due);
                    }
                },
                _ = versions.changed() => {
                    self.history.update(&self.state.cluster());
                    due = soon(due);
                }
            }
        }
    }

    fn take(&mut self, node: BridgeNodeReport) {
        let name = key(&node).into_string();
        let (before, unlisted) = self
            .nodes
            .remove(&name)
            .map_or_else(Default::default, |report| (report.versions, report.unlisted));
        let NodeReport { policy_hash, namespace_policy_hash, refused_policies, refused_set } =
            node.into_report();
        let hashes = [policy_hash, namespace_policy_hash];
        // A set that came and went between two polls: the node has at least its former one.
        let versions = self.history.versions_of(&hashes, before);
        let unlisted = self.history.refused(&hashes, &refused_set).unwrap_or(unlisted);
        self.nodes
            .insert(name, Report { versions, hashes, refused: refused_policies, refused_set, unlisted });
    }

    /// Writes each condition that is not as it should be. One that cannot be written keeps no other from it.
    async fn write(&mut self, events: &Events) {
        let client = &self.client.clone();
        let wanted = stream::iter(self.wanted()).map(|wanted| async move {
            let written = apply(client, &wanted.name, &wanted.conditions).await;
            if let (Ok(()), Some(note)) = (&written, &wanted.rejected) {
                events.policy_rejected(&wanted.name, note).await;
            }
            (wanted, written)
        });
        let written: Vec<_> = wanted.buffer_unordered(WRITES).collect().await;
        for (Wanted { name, revision, conditions, .. }, written) in written {
            match written {
                Ok(()) => self.note_written(name, revision, conditions),
                // Deleted meanwhile.
                Err(kube::Error::Api(error)) if error.code == 404 => {}
                Err(error) if self.warned.insert(name.clone()) => {
                    tracing::warn!(policy = name, %error, "the agent cannot write the conditions of a policy");
                }
                Err(_) => {}
            }
        }
    }

    fn note_written(&mut self, name: String, revision: Revision, conditions: Vec<Condition>) {
        let (at, before) =
            (Instant::now(), self.written.remove(&name).filter(|one| one.revision == revision));
        let (mut first, mut changes) = (at, Vec::new());
        if let Some(before) = before {
            (first, changes) = (before.first, before.changes);
            changes.retain(|change| change.elapsed() < WINDOW);
            if statuses(&before.conditions) != statuses(&conditions) {
                changes.push(at);
            }
        }
        self.written.insert(name, Written { revision, conditions, at, first, changes });
    }

    fn wanted(&mut self) -> Vec<Wanted> {
        let state = self.state.clone();
        let cluster = state.cluster();
        self.history.update(&cluster);
        for report in self.nodes.values_mut() {
            report.versions = self.history.versions_of(&report.hashes, report.versions);
            if let Some(unlisted) = self.history.refused(&report.hashes, &report.refused_set) {
                report.unlisted = unlisted;
            }
        }
        self.written.retain(|name, _| cluster.policy(name).is_some());
        self.seen.retain(|name, (revision, _)| {
            cluster.policy(name).is_some_and(|policy| policy.revision() == *revision)
        });
        // A report whose node is not one of the cluster, or no longer, says nothing about it.
        let members: BTreeSet<&str> = cluster.nodes.iter().map(|(name, _)| name).collect();
        self.settles = None;
        let mut list = Vec::new();
        for (name, policy) in cluster.all_policies() {
            let conditions = self.conditions(name, policy, &members);
            if same(&policy.reported, &conditions) || !self.is_due(name, policy, &conditions) {
                continue;
            }
            let pending = conditions.iter().any(|one| one.reason == PENDING);
            if pending && !reports(&policy.reported, policy.generation) {
                let known = self.seen.entry(name.to_owned());
                let settles = known.or_insert_with(|| (policy.revision(), Instant::now())).1 + SETTLE;
                if settles > Instant::now() {
                    self.settles = Some(self.settles.map_or(settles, |first| first.min(settles)));
                    continue;
                }
            }
            let accepted = |list: &[Condition]| {
                let found = list.iter().find(|condition| condition.kind == ACCEPTED);
                found.map(|condition| (condition.status.clone(), condition.observed_generation))
            };
            let is_new = accepted(&policy.reported) != accepted(&conditions);
            let rejected =
                policy.rules.as_ref().err().filter(|_| is_new).map(|refusal| refusal.message.clone());
            let rejected = rejected.or_else(|| newly_refused(&policy.reported, &conditions));
            list.push(Wanted { name: name.to_owned(), revision: policy.revision(), conditions, rejected });
        }
        list
    }

    fn conditions(&self, name: &str, policy: &Policy, members: &BTreeSet<&str>) -> Vec<Condition> {
        let (generation, before) = (policy.generation, &policy.reported);
        match &policy.rules {
            Err(Refusal { reason, message }) => not_accepted(before, generation, reason, message),
            Ok(rules) => {
                let message = format!("{} rules", rules.len());
                let accepted = condition(before, ACCEPTED, truth(true), generation, "Valid", &message);
                let (programmed, reason, message) = self.programmed(name, generation, members);
                let programmed =
                    condition(before, PROGRAMMED, truth(programmed), generation, reason, &message);
                vec![accepted, programmed]
            }
        }
    }

    fn programmed(
        &self,
        name: &str,
        generation: i64,
        members: &BTreeSet<&str>,
    ) -> (bool, &'static str, String) {
        let (since, kind) = (self.history.since(name).unwrap_or(u64::MAX), kind(name));
        let mut refused = Vec::new();
        let mut missing = Vec::new();
        let mut all = 0;
        for (node, report) in self.nodes.iter().filter(|(node, _)| members.contains(node.as_str())) {
            all += 1;
            let of_policy = |one: &&RefusedPolicy| one.name == name && one.generation == generation;
            if report.versions[kind] < since {
                missing.push(node.as_str());
            } else if let Some(policy) = report.refused.iter().find(of_policy) {
                refused.push(format!("{node}: {}", policy.message));
            } else if report.unlisted.contains(name) {
                refused.push(format!("{node}: {UNLISTED}"));
            }
        }
        let done = all - refused.len() - missing.len();
        let count = format!("{done} of {all} nodes");
        if let Some(first) = refused.first() {
            return (false, REFUSED_BY_NODE, format!("{count}; {first}"));
        }
        if missing.is_empty() {
            return (all > 0, if all > 0 { "AllNodes" } else { "NoNodes" }, count);
        }
        let more = if missing.len() > NAMED { ", ..." } else { "" };
        missing.truncate(NAMED);
        (false, PENDING, format!("{count}; not yet on {}{more}", missing.join(", ")))
    }

    /// Whether a condition may be written now.
    fn is_due(&self, name: &str, policy: &Policy, conditions: &[Condition]) -> bool {
        let Some(written) = self.written.get(name).filter(|one| one.revision == policy.revision()) else {
            return true;
        };
        if same(&written.conditions, conditions) {
            // Another writer has changed them. The watch may also be a little behind the last write.
            return written.at.elapsed() >= REPEAT;
        }
        let now = statuses(conditions);
        if statuses(&written.conditions) == now {
            let progresses = now[1] == Some("False") && written.first.elapsed() < REPEAT;
            return written.at.elapsed() >= if progresses { PROGRESS } else { REPEAT };
        }
        // A node that comes and goes, or a client that writes its report, does not have all conditions written each time.
        written.changes.iter().filter(|change| change.elapsed() < WINDOW).count() < CHANGES
    }
}

/// The status of each condition of this agent.
fn statuses(conditions: &[Condition]) -> [Option<&str>; 2] {
    [ACCEPTED, PROGRAMMED].map(|kind| {
        let found = conditions.iter().find(|one| one.kind == kind);
        found.map(|condition| condition.status.as_str())
    })
}

/// Conditions to write.
struct Wanted {
    name: String,
    revision: Revision,
    conditions: Vec<Condition>,
    /// The reason, if the policy is newly rejected.
    rejected: Option<String>,
}

/// Returns the time of the next write after a change; an earlier one stays.
fn soon(due: Option<Instant>) -> Option<Instant> {
    let after = Instant::now() + COALESCE;
    Some(due.map_or(after, |due| due.min(after)))
}

/// Whether conditions are about this generation.
fn reports(conditions: &[Condition], generation: i64) -> bool {
    conditions.iter().any(|one| one.kind == PROGRAMMED && one.observed_generation == generation)
}

/// Returns the conditions of a policy that is not accepted.
pub(super) fn not_accepted(
    before: &[Condition],
    generation: i64,
    reason: &str,
    message: &str,
) -> Vec<Condition> {
    let accepted = condition(before, ACCEPTED, truth(false), generation, reason, message);
    let text = "the policy is not accepted";
    let programmed = condition(before, PROGRAMMED, truth(false), generation, "NotAccepted", text);
    vec![accepted, programmed]
}

/// Returns the message of a policy that a node refuses, unless that is known.
fn newly_refused(before: &[Condition], conditions: &[Condition]) -> Option<String> {
    let refused = |list: &[Condition]| {
        let found = list.iter().find(|one| one.kind == PROGRAMMED && one.reason == REFUSED_BY_NODE)?;
        Some((found.observed_generation, found.message.clone()))
    };
    let (generation, message) = refused(conditions)?;
    (refused(before).map(|(before, _)| before) != Some(generation)).then_some(message)
}

/// Writes the conditions of a policy.
pub(super) async fn apply(client: &Client, name: &str, conditions: &[Condition]) -> kube::Result<()> {
    let parameters = PatchParams::apply(MANAGER).force();
    let object = |kind: &str, metadata| {
        Patch::Apply(json!({
            "apiVersion": format!("{GROUP}/{VERSION}"), "kind": kind, "metadata": metadata,
            "status": { "conditions": conditions },
        }))
    };
    match name.split_once('/') {
        None => {
            let object = object("BridgePolicy", json!({ "name": name }));
            let policies = Api::<PolicyMeta>::all(client.clone());
            policies.patch_status(name, &parameters, &object).await.map(drop)
        }
        Some((namespace, name)) => {
            let object = object("BridgeNamespacePolicy", json!({ "name": name, "namespace": namespace }));
            let policies = Api::<NamespacePolicyMeta>::namespaced(client.clone(), namespace);
            policies.patch_status(name, &parameters, &object).await.map(drop)
        }
    }
}
