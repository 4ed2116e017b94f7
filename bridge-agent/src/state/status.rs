//! The status of the agent: the answer to `GET /v1/status`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Enforcement, FirewallStatus, RoutesStatus, TrialEnd, TrialStatus};
use crate::{datapath::FlowCounts, kubernetes::KubernetesStatus, pool::Summary};

/// State that the agent reports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reloads {
    /// Configurations that were applied.
    pub succeeded: u64,
    /// Configurations that were refused.
    pub failed: u64,
    /// The last one.
    pub last: Option<Reload>,
}

/// An attempt to apply a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Reload {
    /// When; RFC 3339, UTC.
    pub time: String,
    /// The reason of a refusal; the former configuration is still active then.
    pub error: Option<String>,
}
