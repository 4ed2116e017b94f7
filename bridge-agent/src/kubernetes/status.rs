//! State of the followed cluster, as the agent reports it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::networks::Origin;
use super::plan::Planned;
use super::policy_sets::PolicySets;
use super::resources::{ObservedPolicy, RefusedPolicy};
use crate::config::Config;

/// The cluster as it is known, and the way to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KubernetesStatus {
    /// The API server.
    pub server: String,
    /// Whether everything can be followed.
    pub connected: bool,
    /// Since when that is so, or is not; RFC 3339, UTC.
    pub since: String,
    /// Objects that cannot be followed, with the reason.
    pub failing: BTreeMap<String, String>,
    /// Whether the state of the cluster is known: all of it, or that of an earlier run of the agent.
    pub known: bool,
    /// Resources that have not been listed since the agent has started. Until all have, nothing is withdrawn.
    pub waiting_for: Vec<String>,
    /// Whether the known state is applied.
    pub current: bool,
    /// Who says which pod networks a node has: `node`, `calico` or `cilium`.
    pub pod_networks_from: Origin,
    /// How many seconds ago the connection was lost; 0: it is there.
    pub disconnected_seconds: u64,
    /// How many objects are known, by resource, as `kubectl` names it.
    pub objects: BTreeMap<String, usize>,
    /// How many policies cannot be followed, as they are not valid.
    pub invalid_policies: usize,
    /// How many nodes there are.
    pub nodes: usize,
    /// How many pods of this node are known.
    pub pods: usize,
    /// The active policies.
    pub policies: Vec<ObservedPolicy>,
    /// Objects that cannot be followed.
    pub remarks: Vec<String>,
    /// The reason why the known state is not applied.
    pub error: Option<String>,
}

/// The outcome of the last change of the configuration by the cluster.
#[derive(Clone, Debug, Default)]
pub(super) struct Applied {
    /// Whether the whole cluster as known was applied.
    pub(super) current: bool,
    pub(super) origin: Origin,
    pub(super) policies: Vec<ObservedPolicy>,
    pub(super) refused: Vec<RefusedPolicy>,
    /// All policies that were applied or refused.
    pub(super) sets: PolicySets,
    pub(super) remarks: Vec<String>,
    pub(super) error: Option<String>,
}

impl Applied {
    /// Takes in the outcome of a change. Returns the planned configuration.
    pub(super) fn take(&mut self, planned: Planned, error: Option<String>) -> Config {
        self.current = planned.synced && error.is_none();
        // A change that failed leaves the one before it active.
        if error.is_none() {
            (self.origin, self.policies) = (planned.origin, planned.policies);
            (self.refused, self.sets) = (planned.refused, planned.sets);
            self.remarks = planned.remarks;
        }
        self.error = error;
        planned.config
    }
}
