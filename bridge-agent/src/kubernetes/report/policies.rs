//! The conditions of all policies, written by the agent that holds the Lease.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client};
use serde_json::json;

use super::super::cluster::{Policy, namespace_of};
use super::super::objects::{BridgeNodeReport, NamespacePolicyMeta, PolicyMeta, key};
use super::super::plan::policy_hash;
use super::super::resources::{
    ACCEPTED, Condition, GROUP, NAMESPACE_POLICIES_OFF, PROGRAMMED, RefusedPolicy, VERSION,
};
use super::super::state::State;
use super::MANAGER;
use super::conditions::{condition, same, truth};
use super::event::Events;
use super::lease::{Lease, RENEW};

/// Changes within this time become one write: most nodes apply a policy meanwhile.
const COALESCE: Duration = Duration::from_millis(200);
/// A condition that says that nodes are missing is written at most this often.
const PROGRESS: Duration = Duration::from_secs(10);
/// A condition is repeated at most this often, after another client or the number of nodes has changed it.
const REPEAT: Duration = Duration::from_secs(60);
/// Versions of the set of policies that are remembered.
const HISTORY: usize = 256;
/// Nodes that a message names.
const NAMED: usize = 3;

/// Versions of the set of policies, so that the hash that a node reports identifies its policies.
#[derive(Default)]
struct History {
    version: u64,
    /// Version by hash, the oldest first.
    hashes: Vec<(String, u64)>,
    /// Generation of each policy, and the version in which it came.
    policies: BTreeMap<String, (i64, u64)>,
}

impl History {
    /// Takes note of the policies that exist.
    fn update<'p>(&mut self, policies: impl Iterator<Item = (&'p str, &'p Policy)> + Clone) {
        let hash = policy_hash(policies.clone().map(|(name, policy)| (name, policy.generation)));
        if self.hashes.last().is_some_and(|(last, _)| *last == hash) {
            return;
        }
        self.version += 1;
        let before = std::mem::take(&mut self.policies);
        for (name, policy) in policies {
            let known = before.get(name).filter(|(generation, _)| *generation == policy.generation);
            self.policies.insert(name.to_owned(), *known.unwrap_or(&(policy.generation, self.version)));
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
    /// The version of the set of policies that it has.
    version: u64,
    hash: String,
    refused: Vec<RefusedPolicy>,
}

/// The last condition written to a policy, and its time.
struct Written {
    conditions: Vec<Condition>,
    at: Instant,
}

/// Writes conditions while it runs.
pub(super) struct Policies {
    client: Client,
    state: State,
    history: History,
    nodes: BTreeMap<String, Report>,
    written: HashMap<String, Written>,
    warned: BTreeSet<String>,
    /// Whether policies of namespaces take effect.
    namespace_policies: bool,
}

impl Policies {
    pub(super) fn new(client: Client, state: State, namespace_policies: bool) -> Self {
        let (history, nodes, written, warned) = Default::default();
        Self { client, state, history, nodes, written, warned, namespace_policies }
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
                        due.get_or_insert_with(|| Instant::now() + COALESCE);
                    }
                },
                _ = versions.changed() => {
                    let cluster = self.state.cluster();
                    self.history.update(cluster.all_policies());
                    drop(cluster);
                    due.get_or_insert_with(|| Instant::now() + COALESCE);
                }
            }
        }
    }

    fn take(&mut self, node: BridgeNodeReport) {
        let name = key(&node).into_string();
        let before = self.nodes.get(&name).map_or(0, |report| report.version);
        let (hash, refused) = node.into_parts();
        // A set that came and went between two polls: the node has at least its former one.
        let version = self.history.version_of(&hash).unwrap_or(before);
        self.nodes.insert(name, Report { version, hash, refused });
    }

    /// Writes each condition that is not as it should be. One that cannot be written keeps no other from it.
    async fn write(&mut self, events: &Events) {
        for (name, conditions, rejected) in self.wanted() {
            let written = self.apply(&name, &conditions).await;
            match written {
                Ok(()) => {
                    if let Some(note) = rejected {
                        events.policy_rejected(&name, &note).await;
                    }
                    self.written.insert(name, Written { conditions, at: Instant::now() });
                }
                // Deleted meanwhile.
                Err(kube::Error::Api(error)) if error.code == 404 => {}
                Err(error) if self.warned.insert(name.clone()) => {
                    tracing::warn!(policy = name, %error, "the agent cannot write the conditions of a policy");
                }
                Err(_) => {}
            }
        }
    }

    /// Conditions to write, each with the name of its policy, and a note if it is newly rejected.
    fn wanted(&mut self) -> Vec<(String, Vec<Condition>, Option<String>)> {
        let cluster = self.state.cluster();
        self.history.update(cluster.all_policies());
        for report in self.nodes.values_mut() {
            report.version = self.history.version_of(&report.hash).unwrap_or(report.version);
        }
        self.written.retain(|name, _| cluster.policy(name).is_some());
        let mut list = Vec::new();
        for (name, policy) in cluster.all_policies() {
            let conditions = self.conditions(name, policy);
            if same(&policy.reported, &conditions) || !self.is_due(name, policy, &conditions) {
                continue;
            }
            let accepted = |list: &[Condition]| {
                let found = list.iter().find(|condition| condition.kind == ACCEPTED);
                found.map(|condition| (condition.status.clone(), condition.observed_generation))
            };
            let is_new = accepted(&policy.reported) != accepted(&conditions);
            let rejected =
                self.refusal(name, policy).filter(|_| is_new).map(|(_, message)| message.to_owned());
            list.push((name.to_owned(), conditions, rejected));
        }
        list
    }

    /// Returns reason and message of a policy that is not accepted.
    fn refusal<'p>(&self, name: &str, policy: &'p Policy) -> Option<(&'p str, &'p str)> {
        if namespace_of(name).is_some() && !self.namespace_policies {
            return Some(("NamespacePoliciesOff", NAMESPACE_POLICIES_OFF));
        }
        policy.rules.as_ref().err().map(|refusal| (refusal.reason.as_str(), refusal.message.as_str()))
    }

    fn conditions(&self, name: &str, policy: &Policy) -> Vec<Condition> {
        let (generation, before) = (policy.generation, &policy.reported);
        let refusal = self.refusal(name, policy);
        let count = policy.rules.as_ref().map_or(0, Vec::len);
        let (reason, message) = refusal.map_or_else(
            || ("Valid", format!("{count} rules")),
            |(reason, message)| (reason, message.to_owned()),
        );
        let accepted = truth(refusal.is_none());
        let accepted = condition(before, ACCEPTED, accepted, generation, reason, &message);
        let (programmed, reason, message) = match refusal {
            Some(_) => (false, "NotAccepted", "the policy is not accepted".to_owned()),
            None => self.programmed(name, generation),
        };
        let programmed = condition(before, PROGRAMMED, truth(programmed), generation, reason, &message);
        vec![accepted, programmed]
    }

    fn programmed(&self, name: &str, generation: i64) -> (bool, &'static str, String) {
        let since = self.history.policies.get(name).map_or(u64::MAX, |(_, version)| *version);
        let all = self.nodes.len();
        let mut refused = Vec::new();
        let mut missing = Vec::new();
        for (node, report) in &self.nodes {
            let of_policy = |one: &&RefusedPolicy| one.name == name && one.generation == generation;
            if let Some(policy) = report.refused.iter().find(of_policy) {
                refused.push(format!("{node}: {}", policy.message));
            } else if report.version < since {
                missing.push(node.as_str());
            }
        }
        let done = all - refused.len() - missing.len();
        let count = format!("{done} of {all} nodes");
        if let Some(first) = refused.first() {
            return (false, "RefusedByNode", format!("{count}; {first}"));
        }
        if missing.is_empty() {
            return (all > 0, if all > 0 { "AllNodes" } else { "NoNodes" }, count);
        }
        let more = if missing.len() > NAMED { ", ..." } else { "" };
        missing.truncate(NAMED);
        (false, "Pending", format!("{count}; not yet on {}{more}", missing.join(", ")))
    }

    /// Whether a condition may be written now.
    fn is_due(&self, name: &str, policy: &Policy, conditions: &[Condition]) -> bool {
        let Some(written) = self.written.get(name) else { return true };
        let of = |list: &[Condition], kind: &str| list.iter().find(|one| one.kind == kind).cloned();
        let generation = |list: &[Condition]| of(list, ACCEPTED).map(|one| one.observed_generation);
        if generation(&written.conditions) != Some(policy.generation) {
            return true;
        }
        if same(&written.conditions, conditions) {
            // Another writer has changed them. The watch may also be a little behind the last write.
            return written.at.elapsed() >= REPEAT;
        }
        let status = |list: &[Condition]| {
            [ACCEPTED, PROGRAMMED].map(|kind| of(list, kind).map(|condition| condition.status))
        };
        if status(&written.conditions) == status(conditions) {
            let pending = of(conditions, PROGRAMMED).is_some_and(|one| one.status == "False");
            return written.at.elapsed() >= if pending { PROGRESS } else { REPEAT };
        }
        true
    }

    async fn apply(&self, name: &str, conditions: &[Condition]) -> kube::Result<()> {
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
                let policies = Api::<PolicyMeta>::all(self.client.clone());
                policies.patch_status(name, &parameters, &object).await.map(drop)
            }
            Some((namespace, name)) => {
                let object = object("BridgeNamespacePolicy", json!({ "name": name, "namespace": namespace }));
                let policies = Api::<NamespacePolicyMeta>::namespaced(self.client.clone(), namespace);
                policies.patch_status(name, &parameters, &object).await.map(drop)
            }
        }
    }
}
