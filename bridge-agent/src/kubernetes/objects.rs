//! The objects of the API server, reduced to what is used while they are read.
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
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value as Json;

use super::cluster::{Affinity, Block, Cluster, Labels, Node, Pod, Policy, Table, Told};
use super::resources::{ACCEPTED, GROUP};

/// An object that the agent follows.
pub(super) trait Followed:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
    /// What is kept of it.
    type Kept: PartialEq + Debug + Send;
    /// The resource, as `kubectl` names it.
    const NAME: &'static str;

    /// What is kept of it; `None` if it counts for nothing.
    fn keep(self) -> Option<Self::Kept>;

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

/// Metadata without what is long and not used: managed fields, annotations, owners.
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
    }
    let Slim { name, namespace, uid, resource_version, generation, labels } =
        Option::deserialize(deserializer)?.unwrap_or_default();
    Ok(ObjectMeta { name, namespace, uid, resource_version, generation, labels, ..ObjectMeta::default() })
}

/// `null` is what is not there.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

macro_rules! object {
    ($(#[$doc:meta])* $name:ident: $group:expr, $version:literal, $kind:literal, $plural:literal, $scope:ty {
        $($field:ident: $type:ty),* $(,)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Deserialize)]
        pub(super) struct $name {
            #[serde(default, deserialize_with = "meta")]
            metadata: ObjectMeta,
            $(#[serde(default, deserialize_with = "or_default")] $field: $type,)*
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

object! {
    /// `v1` Node.
    NodeObject: "", "v1", "Node", "nodes", ClusterResourceScope { spec: NodeSpec, status: NodeStatus }
}
object! {
    /// `v1` Pod.
    PodObject: "", "v1", "Pod", "pods", NamespaceResourceScope { spec: PodSpec, status: PodStatus }
}
object! {
    /// `v1` Namespace.
    NamespaceObject: "", "v1", "Namespace", "namespaces", ClusterResourceScope {}
}
object! {
    /// `bridge.lan/v1alpha1` BridgePolicy. Its `spec` is read by the parser of the configuration file: one that is
    /// not valid must not keep the others from being read.
    PolicyObject: GROUP, "v1alpha1", "BridgePolicy", "bridgepolicies", ClusterResourceScope {
        spec: Option<Json>,
        status: PolicyStatus,
    }
}
object! {
    /// `crd.projectcalico.org/v1` IPAMBlock.
    BlockObject: "crd.projectcalico.org", "v1", "IPAMBlock", "ipamblocks", ClusterResourceScope { spec: BlockSpec }
}
object! {
    /// `crd.projectcalico.org/v1` BlockAffinity.
    AffinityObject: "crd.projectcalico.org", "v1", "BlockAffinity", "blockaffinities", ClusterResourceScope {
        spec: AffinitySpec,
    }
}
object! {
    /// `cilium.io/v2` CiliumNode.
    CiliumObject: "cilium.io", "v2", "CiliumNode", "ciliumnodes", ClusterResourceScope { spec: CiliumSpec }
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

/// What cannot be read is left out: a network that bridge does not know is not judged by mistake.
fn networks<'a>(texts: impl IntoIterator<Item = &'a String>) -> Box<[IpNet]> {
    texts.into_iter().filter_map(|text| Some(text.parse::<IpNet>().ok()?.trunc())).collect()
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
        if spec.host_network || matches!(status.phase.as_str(), "Succeeded" | "Failed") {
            return None;
        }
        let texts = status.pod_ips.iter().map(|ip| &ip.ip).chain([&status.pod_ip]);
        let mut addresses: Vec<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.is_empty() {
            return None;
        }
        Some(Pod {
            namespace: metadata.namespace.unwrap_or_default().into(),
            labels: labels(metadata.labels),
            addresses: addresses.into(),
        })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Pod> {
        &mut cluster.pods
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
    conditions: Vec<PolicyCondition>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PolicyCondition {
    r#type: String,
    status: String,
    observed_generation: i64,
    last_transition_time: String,
}

impl Followed for PolicyObject {
    type Kept = Policy;
    const NAME: &'static str = "bridgepolicies";

    fn keep(self) -> Option<Policy> {
        let json = self.spec.map_or_else(|| "{}".to_owned(), |spec| spec.to_string());
        let condition = self.status.conditions.into_iter().find(|condition| condition.r#type == ACCEPTED);
        Some(Policy {
            generation: self.metadata.generation.unwrap_or_default(),
            rules: crate::config::policy_rules(&json).map_err(|errors| one_line(&errors)),
            told: condition.map(|condition| Told {
                generation: condition.observed_generation,
                accepted: condition.status == "True",
                since: condition.last_transition_time,
            }),
        })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Policy> {
        &mut cluster.policies
    }
}

/// So many findings are told in a condition.
const FINDINGS: usize = 5;

fn one_line(errors: &crate::config::ConfigErrors) -> String {
    let list = &errors.0.list;
    let mut lines: Vec<String> = list
        .iter()
        .take(FINDINGS)
        .map(|found| {
            let path = if found.path.is_empty() { "spec" } else { &found.path };
            format!("{path}: {}; {}", found.message, found.help)
        })
        .collect();
    let more = (list.len() + errors.0.left_off).saturating_sub(FINDINGS);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines.join(". ")
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct BlockSpec {
    cidr: String,
    #[serde(deserialize_with = "or_default")]
    affinity: String,
    #[serde(deserialize_with = "or_default")]
    deleted: bool,
    /// For each address of the block, which of `attributes` has it.
    #[serde(deserialize_with = "or_default")]
    allocations: Vec<Option<usize>>,
    #[serde(deserialize_with = "or_default")]
    attributes: Vec<Attribute>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Attribute {
    #[serde(deserialize_with = "or_default")]
    secondary: BTreeMap<String, String>,
}

/// How Calico names a node in the affinity of a block.
const OF_HOST: &str = "host:";
/// As many addresses a block is believed to have; Calico's own limit is lower.
const MOST_ADDRESSES: usize = 1 << 16;

impl Followed for BlockObject {
    type Kept = Block;
    const NAME: &'static str = "ipamblocks.crd.projectcalico.org";

    fn keep(self) -> Option<Block> {
        let BlockSpec { cidr, affinity, deleted, allocations, attributes } = self.spec;
        let network = cidr.parse::<IpNet>().ok().filter(|_| !deleted)?.trunc();
        let node = affinity.strip_prefix(OF_HOST).map(Box::from);
        // An address that a pod on another node has: it needs a route of its own.
        let lent = |(index, attribute): (usize, &Option<usize>)| {
            let holder = attributes.get((*attribute)?)?.secondary.get("node")?;
            (node.as_deref() != Some(holder.as_str()))
                .then(|| Some((nth(network, index)?, Box::from(holder.as_str()))))?
        };
        let lent = allocations.iter().take(MOST_ADDRESSES).enumerate().filter_map(lent).collect();
        Some(Block { network, node, lent })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Block> {
        &mut cluster.blocks
    }
}

/// The address at `index` of a network, if it has so many.
fn nth(network: IpNet, index: usize) -> Option<IpAddr> {
    let address = match network.network() {
        IpAddr::V4(first) => {
            IpAddr::from(first.to_bits().checked_add(u32::try_from(index).ok()?)?.to_be_bytes())
        }
        IpAddr::V6(first) => IpAddr::from((first.to_bits() + u128::try_from(index).ok()?).to_be_bytes()),
    };
    network.contains(&address).then_some(address)
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct AffinitySpec {
    cidr: String,
    node: String,
    state: String,
    /// A text, in this resource.
    #[serde(deserialize_with = "or_default")]
    deleted: String,
}

impl Followed for AffinityObject {
    type Kept = Affinity;
    const NAME: &'static str = "blockaffinities.crd.projectcalico.org";

    fn keep(self) -> Option<Affinity> {
        let AffinitySpec { cidr, node, state, deleted } = self.spec;
        let network = cidr.parse::<IpNet>().ok()?.trunc();
        (state == "confirmed" && deleted != "true").then(|| Affinity { network, node: node.into() })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Affinity> {
        &mut cluster.affinities
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct CiliumSpec {
    #[serde(deserialize_with = "or_default")]
    ipam: CiliumIpam,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct CiliumIpam {
    #[serde(rename = "podCIDRs", deserialize_with = "or_default")]
    pod_cidrs: Vec<String>,
}

impl Followed for CiliumObject {
    type Kept = Node;
    const NAME: &'static str = "ciliumnodes.cilium.io";

    fn keep(self) -> Option<Node> {
        // Its addresses, the node itself has.
        Some(Node { addresses: [].into(), networks: networks(&self.spec.ipam.pod_cidrs) })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Node> {
        &mut cluster.cilium
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept<T: Followed>(json: &str) -> Option<T::Kept> {
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
    }

    #[test]
    fn a_block_of_calico_lends_addresses_to_other_nodes() {
        let block = kept::<BlockObject>(
            r#"{"spec": {"cidr": "10.200.1.0/30", "affinity": "host:b", "deleted": false, "allocations": [0, null, 1, 1],
                "attributes": [{"secondary": {"node": "b", "pod": "c1"}}, {"secondary": {"node": "b2"}}]}}"#,
        );
        let block = block.unwrap();
        assert_eq!(block.node.as_deref(), Some("b"));
        let lent = |text: &str| (text.parse().unwrap(), Box::from("b2"));
        assert_eq!(&*block.lent, [lent("10.200.1.2"), lent("10.200.1.3")]);
        assert_eq!(kept::<BlockObject>(r#"{"spec": {"cidr": "10.200.1.0/30", "deleted": true}}"#), None);
        let affinity = |state: &str, deleted: &str| {
            kept::<AffinityObject>(&format!(
                r#"{{"spec": {{"cidr": "10.200.1.0/26", "node": "b", "state": "{state}", "deleted": "{deleted}"}}}}"#
            ))
        };
        assert!(affinity("confirmed", "false").is_some());
        assert_eq!(affinity("pending", "false"), None);
        assert_eq!(affinity("confirmed", "true"), None);
    }

    #[test]
    fn a_policy_that_is_not_valid_is_kept_with_its_reason() {
        let policy = kept::<PolicyObject>(
            r#"{"metadata": {"name": "p", "generation": 3}, "spec": {"rules": [{"name": "a", "direction": "inbound", "protocol": "tcp", "ports": ["9-1"]}]},
                "status": {"conditions": [{"type": "Accepted", "status": "True", "observedGeneration": 2, "reason": "Valid", "message": "",
                           "lastTransitionTime": "2024-01-01T00:00:00Z"}]}}"#,
        );
        let policy = policy.unwrap();
        let told = policy.told.unwrap();
        assert_eq!((told.generation, told.accepted), (2, true));
        assert_eq!(
            policy.rules.unwrap_err(),
            r#"rules[0].ports[0]: port range `9-1` ends before it begins; write "1-9""#
        );
    }
}
