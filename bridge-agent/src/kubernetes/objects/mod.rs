//! The objects of the API server, reduced to the used fields while they are read.
//!
//! A node's list of images, a pod's containers, the managed fields of anything: none of it is ever held in memory, but
//! for the one page of a list that is being read.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::Resource;
use serde::de::{DeserializeOwned, MapAccess};
use serde::{Deserialize, Deserializer};
use serde_json::value::{RawValue, Value as Json};

use super::cluster::{Cluster, Labels, Node, Pod, Policy, Refusal, Stamp, Table};
use super::resources::{Condition, GROUP, RefusedPolicy};
use crate::config::{PolicyScope, special};
use crate::pool::pods;

/// An object that the agent follows.
pub(super) trait Followed:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
    /// The used fields.
    type Kept: PartialEq + Debug + Send;
    /// The resource, as `kubectl` names it.
    const NAME: &'static str;
    /// Whether the others are followed without it where the account may not read it, also if none of it was ever known.
    const OPTIONAL: bool = false;

    /// Returns the used fields; `None` if the object counts for nothing.
    fn keep(self) -> Option<Self::Kept>;

    /// Takes over what may have changed without a change of `known`. Returns false if the object must be read as a whole.
    fn refresh(&mut self, _known: &mut Self::Kept) -> bool {
        false
    }

    /// Where it is kept.
    fn table(cluster: &mut Cluster) -> &mut Table<Self::Kept>;
}

/// The name of an object, with its namespace if it has one.
pub(super) fn key(object: &impl Resource<DynamicType = ()>) -> Box<str> {
    let meta = object.meta();
    let name = meta.name.as_deref().unwrap_or_default();
    match meta.namespace.as_deref() {
        Some(namespace) => format!("{namespace}/{name}").into(),
        None => name.into(),
    }
}

/// Metadata without long and unused fields: managed fields, owners, annotations but for two.
fn meta<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Default, Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Slim {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        generation: Option<i64>,
        labels: Option<BTreeMap<String, String>>,
        annotations: Option<BTreeMap<String, String>>,
    }
    let Slim { name, namespace, uid, resource_version, generation, labels, mut annotations } =
        Option::deserialize(deserializer)?.unwrap_or_default();
    if let Some(annotations) = &mut annotations {
        annotations.retain(|key, _| matches!(key.as_str(), pods::ANNOTATION | pods::CONFIG_HASH));
    }
    let annotations = annotations.filter(|annotations| !annotations.is_empty());
    let rest = ObjectMeta::default();
    Ok(ObjectMeta { name, namespace, uid, resource_version, generation, labels, annotations, ..rest })
}

/// As [`meta`].
#[derive(Default, Deserialize)]
struct Meta(#[serde(deserialize_with = "meta")] ObjectMeta);

/// The JSON text of keys, each with its value as it was sent: no more than one policy of a page is held as a tree, and lists
/// that are nested too deeply for a tree keep no other object from being read.
#[derive(Default)]
struct Rest(String);

impl Rest {
    fn push<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        let value = map.next_value::<Box<RawValue>>()?;
        let before = if self.0.is_empty() { '{' } else { ',' };
        self.0 += &format!("{before}{}:{}", Json::from(key), value.get());
        Ok(())
    }

    fn close(self) -> String {
        if self.0.is_empty() { "{}".to_owned() } else { self.0 + "}" }
    }
}

/// `null` equals a missing value.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

macro_rules! object {
    ($(#[$doc:meta])* $name:ident: $group:expr, $version:literal, $kind:literal, $plural:literal, $scope:ty {
        $($field:ident: $type:ty),* $(,)?
    } $($rest:ident)?) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub(in crate::kubernetes) struct $name {
            metadata: ObjectMeta,
            $($field: $type,)*
            // Every other key, so that a misspelt one is not lost.
            $($rest: String,)?
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Keys;

                impl<'de> serde::de::Visitor<'de> for Keys {
                    type Value = $name;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("an object")
                    }

                    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<$name, A::Error> {
                        let mut metadata = ObjectMeta::default();
                        $(let mut $field = <$type>::default();)*
                        let mut rest = crate::kubernetes::objects::Rest::default();
                        let keeps_rest = !<[&str]>::is_empty(&[$(stringify!($rest))?]);
                        while let Some(key) = map.next_key::<String>()? {
                            match key.as_str() {
                                "metadata" => metadata = map.next_value::<Option<crate::kubernetes::objects::Meta>>()?.unwrap_or_default().0,
                                $(stringify!($field) => {
                                    $field = map.next_value::<Option<$type>>()?.unwrap_or_default();
                                })*
                                _ if keeps_rest => rest.push(&key, &mut map)?,
                                _ => drop(map.next_value::<serde::de::IgnoredAny>()?),
                            }
                        }
                        Ok($name { metadata, $($field,)* $($rest: rest.close(),)? })
                    }
                }

                deserializer.deserialize_map(Keys)
            }
        }

        impl Resource for $name {
            type DynamicType = ();
            type Scope = $scope;

            fn kind((): &()) -> std::borrow::Cow<'_, str> {
                $kind.into()
            }

            fn group((): &()) -> std::borrow::Cow<'_, str> {
                $group.into()
            }

            fn version((): &()) -> std::borrow::Cow<'_, str> {
                $version.into()
            }

            fn plural((): &()) -> std::borrow::Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

// The macro is known from here on.
mod plugins;

pub(super) use plugins::{AffinityObject, BlockObject, CiliumObject};

object! {
    /// `v1` Node.
    NodeObject: "", "v1", "Node", "nodes", ClusterResourceScope { spec: NodeSpec, status: NodeStatus }
}
object! {
    /// `v1` Pod.
    PodObject: "", "v1", "Pod", "pods", NamespaceResourceScope { spec: PodSpec, status: PodStatus }
}
object! {
    /// `v1` Pod of another node.
    RemotePodObject: "", "v1", "Pod", "pods", NamespaceResourceScope { spec: PodSpec, status: PodStatus }
}
object! {
    /// `v1` Namespace.
    NamespaceObject: "", "v1", "Namespace", "namespaces", ClusterResourceScope {}
}
object! {
    /// `bridge.lan/v1alpha1` BridgePolicy. Its `spec` is read by the parser of the configuration file: one that is
    /// not valid must not keep the others from being read.
    PolicyObject: GROUP, "v1alpha1", "BridgePolicy", "bridgepolicies", ClusterResourceScope {
        status: PolicyStatus,
    }
    rest
}
object! {
    /// `bridge.lan/v1alpha1` BridgeNamespacePolicy, read as a BridgePolicy.
    NamespacePolicyObject: GROUP, "v1alpha1", "BridgeNamespacePolicy", "bridgenamespacepolicies", NamespaceResourceScope {
        status: PolicyStatus,
    }
    rest
}
object! {
    /// The metadata of a BridgeNamespacePolicy.
    NamespacePolicyMeta: GROUP, "v1alpha1", "BridgeNamespacePolicy", "bridgenamespacepolicies", NamespaceResourceScope {}
}
object! {
    /// The metadata of a BridgePolicy: the answer to a write, whatever is wrong with the policy.
    PolicyMeta: GROUP, "v1alpha1", "BridgePolicy", "bridgepolicies", ClusterResourceScope {}
}
object! {
    /// The metadata of a BridgeNode.
    BridgeNodeMeta: GROUP, "v1alpha1", "BridgeNode", "bridgenodes", ClusterResourceScope {}
}
object! {
    /// The part of a BridgeNode with the policies that the node applies.
    BridgeNodeReport: GROUP, "v1alpha1", "BridgeNode", "bridgenodes", ClusterResourceScope {
        status: NodeReport,
    }
}

impl BridgeNodeReport {
    /// Returns the part with the policies that the node applies or refuses.
    pub(super) fn into_report(self) -> NodeReport {
        self.status
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct NodeReport {
    /// See [`BridgeNodeStatus`](super::resources::BridgeNodeStatus).
    #[serde(deserialize_with = "or_default")]
    pub(super) policy_hash: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) namespace_policy_hash: String,
    #[serde(deserialize_with = "or_default")]
    pub(super) refused_policies: Vec<RefusedPolicy>,
    #[serde(deserialize_with = "or_default")]
    pub(super) refused_set: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct NodeSpec {
    #[serde(rename = "podCIDRs", deserialize_with = "or_default")]
    pod_cidrs: Vec<String>,
    #[serde(rename = "podCIDR", deserialize_with = "or_default")]
    pod_cidr: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct NodeStatus {
    #[serde(deserialize_with = "or_default")]
    addresses: Vec<Address>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Address {
    r#type: String,
    address: String,
}

fn internal(addresses: &[Address]) -> Box<[IpAddr]> {
    let internal = addresses.iter().filter(|address| address.r#type == "InternalIP");
    internal.filter_map(|address| address.address.parse().ok()).collect()
}

/// Unreadable networks, and those that no pod has, are left out: a network that bridge does not know is not judged by mistake.
fn networks<'a>(texts: impl IntoIterator<Item = &'a String>) -> Box<[IpNet]> {
    let nets = texts.into_iter().filter_map(|text| Some(text.parse::<IpNet>().ok()?.trunc()));
    nets.filter(|net| special::no_hosts(net).is_none()).collect()
}

impl Followed for NodeObject {
    type Kept = Node;
    const NAME: &'static str = "nodes";

    fn keep(self) -> Option<Node> {
        let Self { spec: NodeSpec { pod_cidrs, pod_cidr }, status, .. } = self;
        // An old cluster has the one alone.
        let cidrs = if pod_cidrs.is_empty() { vec![pod_cidr] } else { pod_cidrs };
        Some(Node { addresses: internal(&status.addresses), networks: networks(&cidrs) })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Node> {
        &mut cluster.nodes
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodSpec {
    #[serde(deserialize_with = "or_default")]
    host_network: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PodStatus {
    #[serde(deserialize_with = "or_default")]
    phase: String,
    #[serde(rename = "podIPs", deserialize_with = "or_default")]
    pod_ips: Vec<PodIp>,
    #[serde(rename = "podIP", deserialize_with = "or_default")]
    pod_ip: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: String,
}

impl Followed for PodObject {
    type Kept = Pod;
    const NAME: &'static str = "pods";

    fn keep(self) -> Option<Pod> {
        let Self { metadata, spec, status } = self;
        // One that has ended has no address any more, whatever its status says: another pod may have it.
        if matches!(status.phase.as_str(), "Succeeded" | "Failed") {
            return None;
        }
        let texts = status.pod_ips.iter().map(|ip| &ip.ip).chain([&status.pod_ip]);
        let mut addresses: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        if spec.host_network {
            // They are the node's.
            addresses.clear();
        }
        // Known before it has an address: its control group is there before.
        let uid = metadata.uid.unwrap_or_default();
        let pool_uid = pods::opted_in(&uid, &metadata.annotations.unwrap_or_default());
        if addresses.is_empty() && pool_uid.is_none() {
            return None;
        }
        Some(Pod {
            pool_uid: pool_uid.map(Into::into),
            namespace: metadata.namespace.unwrap_or_default().into(),
            labels: labels(metadata.labels),
            addresses: addresses.into(),
        })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Pod> {
        &mut cluster.pods
    }
}

impl Followed for RemotePodObject {
    type Kept = Pod;
    const NAME: &'static str = "pods of other nodes";

    fn keep(self) -> Option<Pod> {
        let Self { metadata, spec, status } = self;
        let pod = PodObject { metadata, spec, status }.keep()?;
        // The port pool is the matter of the pod's own node.
        (!pod.addresses.is_empty()).then_some(Pod { pool_uid: None, ..pod })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Pod> {
        &mut cluster.remote_pods
    }
}

fn labels(of: Option<BTreeMap<String, String>>) -> Labels {
    of.into_iter().flatten().map(|(key, value)| (key.into(), value.into())).collect()
}

impl Followed for NamespaceObject {
    type Kept = Labels;
    const NAME: &'static str = "namespaces";

    fn keep(self) -> Option<Labels> {
        Some(labels(self.metadata.labels))
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Labels> {
        &mut cluster.namespaces
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PolicyStatus {
    #[serde(deserialize_with = "or_default")]
    conditions: Vec<Condition>,
}

impl Followed for PolicyObject {
    type Kept = Policy;
    const NAME: &'static str = "bridgepolicies";

    fn keep(self) -> Option<Policy> {
        Some(policy(&self.metadata, &self.rest, self.status, PolicyScope::Cluster))
    }

    fn refresh(&mut self, known: &mut Policy) -> bool {
        refresh(&self.metadata, &mut self.status, known)
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Policy> {
        &mut cluster.policies
    }
}

impl NamespacePolicyObject {
    /// Returns its generation and the conditions in its status.
    pub(super) fn reported(self) -> (i64, Vec<Condition>) {
        (self.metadata.generation.unwrap_or_default(), self.status.conditions)
    }
}

impl Followed for NamespacePolicyObject {
    type Kept = Policy;
    const NAME: &'static str = "bridgenamespacepolicies";
    /// The role of an older version has no right to it.
    const OPTIONAL: bool = true;

    fn keep(self) -> Option<Policy> {
        Some(policy(&self.metadata, &self.rest, self.status, PolicyScope::Namespace))
    }

    fn refresh(&mut self, known: &mut Policy) -> bool {
        refresh(&self.metadata, &mut self.status, known)
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Policy> {
        &mut cluster.namespace_policies
    }
}

fn policy(meta: &ObjectMeta, json: &str, status: PolicyStatus, scope: PolicyScope) -> Policy {
    Policy {
        generation: meta.generation.unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default().into(),
        rules: crate::config::policy_rules(json, scope)
            .map_err(|errors| Refusal { reason: "Invalid".to_owned(), message: one_line(&errors) }),
        reported: status.conditions,
        stamp: Stamp::default(),
    }
}

/// Takes over the conditions of a policy: they change far more often than its rules, which may take long to read.
fn refresh(meta: &ObjectMeta, status: &mut PolicyStatus, known: &mut Policy) -> bool {
    let same = meta.generation == Some(known.generation) && meta.uid.as_deref() == Some(&*known.uid);
    if same {
        known.reported = std::mem::take(&mut status.conditions);
    }
    same
}

/// The findings in a condition; the others are counted.
const FINDINGS: usize = 5;
/// The longest finding in a condition, which may quote a long value.
const MAX_FINDING: usize = 512;

fn one_line(errors: &crate::config::ConfigErrors) -> String {
    let list = &errors.0.list;
    let mut lines: Vec<String> = list
        .iter()
        .take(FINDINGS)
        .map(|found| {
            let path = if found.path.is_empty() { "spec" } else { &found.path };
            let text = format!("{path}: {}; {}", found.message, found.help);
            text[..text.floor_char_boundary(MAX_FINDING)].to_owned()
        })
        .collect();
    let more = (list.len() + errors.0.left_off).saturating_sub(FINDINGS);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines.join(". ")
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn kept<T: Followed>(json: &str) -> Option<T::Kept> {
        serde_json::from_str::<T>(json).expect("it is read").keep()
    }

    #[test]
    fn a_node_has_both_families_and_an_old_one_its_single_network() {
        let node = kept::<NodeObject>(
            r#"{"metadata": {"name": "b", "managedFields": [{"manager": "x", "fieldsV1": {"f:a": {}}}]},
                "spec": {"podCIDR": "10.200.1.0/24", "podCIDRs": ["10.200.1.0/24", "fd20:1::/64"]},
                "status": {"addresses": [{"type": "Hostname", "address": "b"}, {"type": "InternalIP", "address": "192.168.31.17"},
                           {"type": "InternalIP", "address": "fd31::17"}], "images": [{"names": ["x"]}]}}"#,
        );
        let node = node.unwrap();
        assert_eq!(node.addresses.len(), 2);
        assert_eq!(&*node.networks, ["10.200.1.0/24", "fd20:1::/64"].map(|net| net.parse().unwrap()));
        let old =
            kept::<NodeObject>(r#"{"spec": {"podCIDR": "10.1.0.0/24"}, "status": {"addresses": null}}"#);
        assert_eq!(&*old.unwrap().networks, ["10.1.0.0/24".parse().unwrap()]);
        assert!(kept::<NodeObject>(r#"{"metadata": {"name": "new"}}"#).unwrap().networks.is_empty());
    }

    #[test]
    fn a_pod_counts_while_it_has_addresses_of_its_own() {
        let pod = |spec: &str, status: &str| {
            kept::<PodObject>(&format!(
                r#"{{"metadata": {{"name": "c", "namespace": "n"}}, "spec": {spec}, "status": {status}}}"#
            ))
        };
        let both = r#"{"phase": "Running", "podIP": "10.200.1.91", "podIPs": [{"ip": "10.200.1.91"}, {"ip": "fd20:1::91"}]}"#;
        assert_eq!(pod("{}", both).unwrap().addresses.len(), 2);
        assert_eq!(pod(r#"{"hostNetwork": true}"#, both), None);
        assert_eq!(pod("{}", r#"{"phase": "Succeeded", "podIP": "10.200.1.91"}"#), None);
        assert_eq!(pod("{}", r#"{"phase": "Pending"}"#), None);
        // One that takes part in the port pool counts from the beginning, and on the host's network, too.
        let opted = |spec: &str, phase: &str| {
            kept::<PodObject>(&format!(
                r#"{{"metadata": {{"name": "c", "namespace": "n", "uid": "u", "annotations": {{"bridge.lan/port-pool": "transparent", "x": "y"}}}},
                    "spec": {spec}, "status": {{"phase": "{phase}", "podIP": "10.200.1.91"}}}}"#
            ))
        };
        assert_eq!(opted("{}", "Pending").unwrap().pool_uid.as_deref(), Some("u"));
        let of_host = opted(r#"{"hostNetwork": true}"#, "Running").unwrap();
        assert_eq!((of_host.pool_uid.as_deref(), of_host.addresses.len()), (Some("u"), 0));
        assert_eq!(opted("{}", "Succeeded"), None);
    }

    #[test]
    fn a_policy_that_is_nested_too_deeply_keeps_no_other_from_being_read() {
        let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
        let rule = r#"{"name": "a", "direction": "inbound", "protocol": "any"}"#;
        let of =
            |more: &str| format!(r#"{{"metadata": {{"name": "p"}}, "spec": {{"rules": [{rule}]}}{more}}}"#);
        let text = format!(r#"{{"items": [{}, {}]}}"#, of(&format!(r#", "x": {deep}"#)), of(""));
        #[derive(Deserialize)]
        struct List {
            items: Vec<PolicyObject>,
        }
        let list = serde_json::from_str::<List>(&text).unwrap().items;
        let kept: Vec<Policy> = list.into_iter().filter_map(Followed::keep).collect();
        let refusal = kept[0].rules.as_ref().unwrap_err();
        assert!(refusal.message.contains("nest less deeply"), "{refusal:?}");
        assert_eq!(kept[1].rules.as_ref().map(Vec::len), Ok(1));
    }

    #[test]
    fn a_policy_that_is_not_valid_is_kept_with_its_reason() {
        let policy = kept::<PolicyObject>(
            r#"{"metadata": {"name": "p", "generation": 3}, "spec": {"rules": [{"name": "a", "direction": "inbound", "protocol": "tcp", "ports": ["9-1"]}]},
                "status": {"conditions": [{"type": "Accepted", "status": "True", "observedGeneration": 2, "reason": "Valid", "message": "",
                           "lastTransitionTime": "2024-01-01T00:00:00Z"}]}}"#,
        );
        let policy = policy.unwrap();
        let reported = &policy.reported[0];
        assert_eq!((reported.observed_generation, reported.status.as_str()), (2, "True"));
        assert_eq!(
            policy.rules.unwrap_err().message,
            r#"spec.rules[0].ports[0]: port range `9-1` ends before it begins; write "1-9""#
        );
    }
}
