//! The custom resources of bridge: `BridgePolicy`, written by an operator, and `BridgeNode`, written by the agent of a
//! node.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, ValidationRule,
};
use kube::{CustomResource, CustomResourceExt};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::schema;
use crate::config::Rule;
use crate::model::Mode;

pub use crate::config::GROUP;

/// The served version.
pub const VERSION: &str = crate::config::VERSION;
/// UID and generation.
pub(super) type Revision = (Box<str>, i64);
/// The field manager of everything that agents write.
pub(super) const MANAGER: &str = "bridge-agent";
/// The reason for which a policy of a namespace is refused.
pub(super) const NAMESPACE_POLICIES_OFF: &str = "policies of namespaces are off; an administrator of the cluster may write `kubernetes: {namespacePolicies: true}` into the \
     configuration of the agents";
/// The condition of a `BridgePolicy` that says whether its rules are valid.
pub const ACCEPTED: &str = "Accepted";
/// The condition of a `BridgePolicy` that says whether all nodes enforce it.
pub const PROGRAMMED: &str = "Programmed";

/// The flows that may be opened between pods and LAN hosts, on every node. A flow that no rule allows is denied; a rule that
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
    doc = "The flows that may be opened between the pods of the cluster and the hosts of the LAN.",
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name": "Programmed", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Programmed\")].status"}"#,
    printcolumn = r#"{"name": "Nodes", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Programmed\")].message"}"#,
    printcolumn = r#"{"name": "Generation", "type": "integer", "priority": 1, "jsonPath": ".metadata.generation"}"#,
    printcolumn = r#"{"name": "Reason", "type": "string", "priority": 1, "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].reason"}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "priority": 1, "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].message"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct BridgePolicySpec {
    /// `audit`: the policy neither allows nor denies; flows about which its rules would decide are counted and reported.
    /// Left out: `enforce`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "mode")]
    pub mode: Option<Mode>,
    /// The rules, as in the configuration file of an agent, such as `[{name: to-api, direction: inbound, external:
    /// [192.168.31.67/32], podSelector: {matchLabels: {app: api}}, protocol: tcp, ports: [40002]}]`.
    #[schemars(schema_with = "rules")]
    pub rules: Vec<Rule>,
}

fn mode(_: &mut SchemaGenerator) -> Schema {
    schema::mode()
}

fn rules(_: &mut SchemaGenerator) -> Schema {
    schema::rules()
}

/// The flows that may be opened between the pods of its namespace and LAN hosts. Needs `kubernetes: {namespacePolicies: true}`
/// in the configuration of the agents. A rule that denies wins over one that allows, whichever policy either is in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "bridge.lan",
    version = "v1alpha1",
    kind = "BridgeNamespacePolicy",
    plural = "bridgenamespacepolicies",
    shortname = "bnpol",
    category = "bridge",
    namespaced,
    status = "BridgePolicyStatus",
    doc = "The flows that may be opened between the pods of its namespace and the hosts of the LAN. It takes effect if the agents are configured with `kubernetes: {namespacePolicies: true}`.",
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].status"}"#,
    printcolumn = r#"{"name": "Programmed", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Programmed\")].status"}"#,
    printcolumn = r#"{"name": "Nodes", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Programmed\")].message"}"#,
    printcolumn = r#"{"name": "Generation", "type": "integer", "priority": 1, "jsonPath": ".metadata.generation"}"#,
    printcolumn = r#"{"name": "Reason", "type": "string", "priority": 1, "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].reason"}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "priority": 1, "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].message"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct BridgeNamespacePolicySpec {
    /// `audit`: the policy neither allows nor denies; flows about which its rules would decide are counted and reported.
    /// Left out: `enforce`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "mode")]
    pub mode: Option<Mode>,
    /// The rules, as in a BridgePolicy. Their pods are those of the namespace, and `podSelector` selects among them; `pods` and
    /// `namespaceSelector` are refused.
    #[schemars(schema_with = "rules_of_namespace")]
    pub rules: Vec<Rule>,
}

fn rules_of_namespace(_: &mut SchemaGenerator) -> Schema {
    schema::rules_of_namespace()
}

/// The outcome of a policy, written by one of the agents.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BridgePolicyStatus {
    /// `Accepted`: whether the rules are valid, with the remedy if not. A policy that is not accepted allows and denies
    /// nothing; the others stay. `Programmed`: whether all nodes enforce the policy, with their number.
    #[serde(default)]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// A condition, as the conventions of the Kubernetes API have it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase")]
#[schemars(extend("required" = ["type", "status", "reason", "message", "lastTransitionTime"]))]
pub struct Condition {
    /// The aspect of the object that it is about.
    #[serde(rename = "type")]
    #[schemars(extend("maxLength" = 316, "pattern" = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"))]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    #[schemars(extend("enum" = ["True", "False", "Unknown"]))]
    pub status: String,
    /// The `metadata.generation` that it is about.
    #[serde(skip_serializing_if = "is_zero")]
    pub observed_generation: i64,
    /// The reason, for programs.
    #[schemars(extend("minLength" = 1, "maxLength" = 1024, "pattern" = "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"))]
    pub reason: String,
    /// The reason, for people.
    #[schemars(extend("maxLength" = 32_768))]
    pub message: String,
    /// The time of the last change of the status.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
const fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// Written by the agent of a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomResource, JsonSchema)]
#[kube(
    group = "bridge.lan",
    version = "v1alpha1",
    kind = "BridgeNode",
    plural = "bridgenodes",
    shortname = "bnode",
    category = "bridge",
    status = "BridgeNodeStatus",
    doc = "The report of the agent of a node; has the name of the node.",
    printcolumn = r#"{"name": "Mode", "type": "string", "jsonPath": ".status.mode"}"#,
    printcolumn = r#"{"name": "Engines", "type": "string", "jsonPath": ".status.engines"}"#,
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status"}"#,
    printcolumn = r#"{"name": "Current", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Current\")].status"}"#,
    printcolumn = r#"{"name": "Policies", "type": "integer", "jsonPath": ".status.policyCount"}"#,
    printcolumn = r#"{"name": "Errors", "type": "integer", "jsonPath": ".status.errorCount"}"#,
    printcolumn = r#"{"name": "Pool", "type": "string", "jsonPath": ".status.pool.use"}"#,
    printcolumn = r#"{"name": "Heartbeat", "type": "date", "jsonPath": ".status.heartbeatTime"}"#,
    printcolumn = r#"{"name": "Generation", "type": "integer", "priority": 1, "jsonPath": ".status.policyGeneration"}"#,
    printcolumn = r#"{"name": "Version", "type": "string", "priority": 1, "jsonPath": ".status.version"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "priority": 1, "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct BridgeNodeSpec {}

/// The state of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BridgeNodeStatus {
    /// Version of the agent.
    pub version: String,
    /// The agent writes the time once a minute. An older time means that the agent is dead or cut off; enforcement stays.
    #[schemars(extend("format" = "date-time"))]
    pub heartbeat_time: String,
    /// `Ready`: the node enforces as its configuration asks. `Current`: it enforces everything that the API server has.
    /// `DatapathHealthy`: the engines work and agree.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// `enforce`, `audit`, or `none` without an engine.
    pub mode: String,
    /// The active engines: `ebpf`, `iptables`.
    #[schemars(extend("x-kubernetes-list-type" = "set"))]
    pub engines: Vec<String>,
    /// Number of the policy in the data path; grows with each change.
    pub policy_generation: i64,
    /// Number of enforced policies of the cluster.
    pub policy_count: i64,
    /// Hash of name, UID and generation of all BridgePolicies that the node has applied or refused.
    pub policy_hash: String,
    /// The same of all BridgeNamespacePolicies; absent where they have no effect.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace_policy_hash: String,
    /// Number of refused policies.
    pub refused_count: i64,
    /// The first refused policies.
    pub refused_policies: Vec<RefusedPolicy>,
    /// All refused policies, if they are more than `refusedPolicies` has: of the policies of both hashes in the order of their
    /// names, those of the cluster first, a bit each, four in a hexadecimal digit, the first bit the highest.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub refused_set: String,
    /// The interfaces on which packets are judged.
    pub interfaces: Vec<String>,
    /// Number of known pods of this node.
    pub pods: i64,
    /// Number of errors.
    pub error_count: i64,
    /// The first errors.
    pub errors: Vec<String>,
    /// Facts that are probably not intended.
    pub remarks: Vec<String>,
    /// The port pool, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolUse>,
}

/// An enforced policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObservedPolicy {
    /// Name of the policy; of a namespace, `namespace/name`.
    pub name: String,
    /// The `metadata.generation` that is enforced.
    pub observed_generation: i64,
    /// The `metadata.uid`.
    #[serde(skip)]
    pub(super) uid: Box<str>,
}

impl ObservedPolicy {
    pub(super) fn revision(&self) -> Revision {
        (self.uid.clone(), self.observed_generation)
    }
}

/// A policy that a node does not enforce.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RefusedPolicy {
    /// Name of the policy; of a namespace, `namespace/name`.
    pub name: String,
    /// The `metadata.generation` that is refused.
    pub generation: i64,
    /// The reason, with the remedy.
    pub message: String,
}

/// The longest message of a refused policy in a `BridgeNode`.
const MAX_MESSAGE: usize = 1024;

impl RefusedPolicy {
    pub(super) fn new(name: &str, generation: i64, message: &str) -> Self {
        let message = message[..message.floor_char_boundary(MAX_MESSAGE)].to_owned();
        Self { name: name.to_owned(), generation, message }
    }
}

impl fmt::Display for RefusedPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "policy {} is refused: {}", self.name, self.message)
    }
}

/// Use of the port pool.
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
pub fn objects() -> [CustomResourceDefinition; 3] {
    let policies = [BridgePolicy::crd(), BridgeNamespacePolicy::crd()].map(strict);
    let [policy, namespace_policy] = policies;
    [policy, namespace_policy, BridgeNode::crd()].map(|mut definition| {
        // The derive macro takes a literal.
        definition.metadata.name = Some(format!("{}.{GROUP}", definition.spec.names.plural));
        definition.spec.group = GROUP.to_owned();
        for version in &mut definition.spec.versions {
            let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
            let properties = schema.and_then(|schema| schema.properties.as_mut());
            properties.and_then(|properties| properties.get_mut("status")).map(without_defaults);
        }
        definition
    })
}

/// Has the API server keep unknown keys, which the agent refuses by itself; see `schema`.
fn strict(mut definition: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
        let Some(schema) = schema else { continue };
        schema.x_kubernetes_preserve_unknown_fields = Some(true);
        if let Some(spec) = schema.properties.as_mut().and_then(|properties| properties.get_mut("spec")) {
            spec.x_kubernetes_preserve_unknown_fields = Some(true);
            let validations = schema::of_spec().into_iter().map(|(rule, message)| ValidationRule {
                rule,
                message: Some(message),
                ..ValidationRule::default()
            });
            spec.x_kubernetes_validations = Some(validations.collect());
        }
    }
    definition
}

/// Removes defaults, which are for the reader of a condition, not for its writer.
fn without_defaults(schema: &mut JSONSchemaProps) {
    schema.default = None;
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        without_defaults(items);
    }
    schema.properties.iter_mut().flat_map(BTreeMap::values_mut).for_each(without_defaults);
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
