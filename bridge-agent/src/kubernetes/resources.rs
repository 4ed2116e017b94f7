//! The custom resources of bridge: `BridgePolicy`, written by an operator, and `BridgeNode`, written by the agent of a
//! node.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, CustomResourceExt};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::schema;
use crate::config::Rule;

pub use crate::config::GROUP;

/// The condition of a `BridgePolicy` that tells whether its rules can be followed.
pub const ACCEPTED: &str = "Accepted";

/// Which flows may be opened between pods and LAN hosts, on every node. A flow that no rule allows is denied; a rule that
/// denies wins over one that allows, whichever policy either is in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "bridge.lan",
    version = "v1alpha1",
    kind = "BridgePolicy",
    plural = "bridgepolicies",
    shortname = "bpol",
    category = "bridge",
    status = "BridgePolicyStatus",
    doc = "Which flows may be opened between the pods of the cluster and the hosts of the LAN.",
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name": "Generation", "type": "integer", "jsonPath": ".metadata.generation"}"#,
    printcolumn = r#"{"name": "Reason", "type": "string", "priority": 1, "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].message"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct BridgePolicySpec {
    /// The rules, as in the configuration file of an agent.
    #[schemars(schema_with = "rules")]
    pub rules: Vec<Rule>,
}

fn rules(_: &mut SchemaGenerator) -> Schema {
    schema::rules()
}

/// What the agents make of a policy; each finds the same, and the first one to find it writes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BridgePolicyStatus {
    /// `Accepted`: whether the rules can be followed, and if not, why. A policy that is not accepted allows and denies
    /// nothing; the others stay in force.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// What the agent of a node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "bridge.lan",
    version = "v1alpha1",
    kind = "BridgeNode",
    plural = "bridgenodes",
    shortname = "bnode",
    category = "bridge",
    status = "BridgeNodeStatus",
    doc = "What the agent of a node says of itself; written by the agent, named as the node.",
    printcolumn = r#"{"name": "Mode", "type": "string", "jsonPath": ".status.mode"}"#,
    printcolumn = r#"{"name": "Engines", "type": "string", "jsonPath": ".status.engines"}"#,
    printcolumn = r#"{"name": "Current", "type": "boolean", "jsonPath": ".status.current"}"#,
    printcolumn = r#"{"name": "Policies", "type": "integer", "jsonPath": ".status.policyCount"}"#,
    printcolumn = r#"{"name": "Errors", "type": "integer", "jsonPath": ".status.errorCount"}"#,
    printcolumn = r#"{"name": "Pool", "type": "string", "jsonPath": ".status.pool.use"}"#,
    printcolumn = r#"{"name": "Generation", "type": "integer", "priority": 1, "jsonPath": ".status.generation"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct BridgeNodeSpec {}

/// What is in force on the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BridgeNodeStatus {
    /// Version of the agent.
    pub version: String,
    /// `enforce`, `audit`, or `none` if nothing is enforced.
    pub mode: String,
    /// The engines that enforce, joined by commas: `ebpf`, `iptables`.
    pub engines: String,
    /// Whether everything that the agent has seen of the cluster is in force.
    pub current: bool,
    /// Number of the policy in the data path; grows with each change.
    pub generation: i64,
    /// How many policies of the cluster are in force.
    pub policy_count: i64,
    /// The policies that are in force, each with the generation that is.
    pub policies: Vec<ObservedPolicy>,
    /// The interfaces that packets are judged on.
    pub interfaces: Vec<String>,
    /// How many pods of this node are known.
    pub pods: i64,
    /// How many errors there are.
    pub error_count: i64,
    /// What is not as it should be: the first few.
    pub errors: Vec<String>,
    /// The port pool, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolUse>,
}

/// A policy in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObservedPolicy {
    /// Its name.
    pub name: String,
    /// `metadata.generation` of what is in force of it.
    pub observed_generation: i64,
}

/// How full the port pool is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolUse {
    /// Held and all ports, as `17/1000`.
    #[serde(rename = "use")]
    pub usage: String,
    /// Ports held by connections and leases.
    pub held: i64,
    /// Ports of the pool, for each destination.
    pub available: i64,
}

/// The custom resource definitions.
#[must_use]
pub fn objects() -> [CustomResourceDefinition; 2] {
    let mut policy = BridgePolicy::crd();
    // The agent refuses unknown keys by itself; see `schema`.
    for version in &mut policy.spec.versions {
        let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
        let Some(schema) = schema else { continue };
        schema.x_kubernetes_preserve_unknown_fields = Some(true);
        if let Some(spec) = schema.properties.as_mut().and_then(|properties| properties.get_mut("spec")) {
            spec.x_kubernetes_preserve_unknown_fields = Some(true);
        }
    }
    [policy, BridgeNode::crd()]
}

/// File name and YAML of each custom resource definition, as they lie in `deploy/kubernetes/crds`.
///
/// # Errors
/// If the serializer fails, which it does for no value of these types.
pub fn definitions() -> Result<Vec<(String, String)>, serde_saphyr::SerializeError> {
    let file = |definition: CustomResourceDefinition| {
        let yaml = serde_saphyr::to_string(&definition)?;
        Ok((
            format!("{}.yaml", definition.spec.names.plural),
            format!("# Written by `cargo xtask crds`.\n{yaml}"),
        ))
    };
    objects().into_iter().map(file).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_definitions_in_deploy_are_up_to_date() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/crds");
        for (name, yaml) in definitions().unwrap() {
            let there = std::fs::read_to_string(folder.join(&name)).unwrap_or_default();
            assert!(there == yaml, "deploy/kubernetes/crds/{name} is out of date: run `cargo xtask crds`");
        }
    }

    #[test]
    fn the_group_is_one() {
        for (_, yaml) in definitions().unwrap() {
            assert!(yaml.contains(&format!("group: {GROUP}\n")), "{yaml}");
        }
    }
}
