//! The objects of network plugins that say which node has which pod networks.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::ClusterResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Deserialize;

use super::super::cluster::{Affinity, Block, Cluster, Node, Table};
use super::{Followed, networks, or_default};

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

/// Returns the address at `index` of a network, if it is large enough.
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
    /// `host`, which older ones do not say; `virtual` is for addresses of load balancers, which no pod has.
    #[serde(deserialize_with = "or_default")]
    r#type: String,
    /// A text, in this resource.
    #[serde(deserialize_with = "or_default")]
    deleted: String,
}

impl Followed for AffinityObject {
    type Kept = Affinity;
    const NAME: &'static str = "blockaffinities.crd.projectcalico.org";

    fn keep(self) -> Option<Affinity> {
        let AffinitySpec { cidr, node, state, r#type, deleted } = self.spec;
        let network = cidr.parse::<IpNet>().ok()?.trunc();
        let of_pods = matches!(r#type.as_str(), "" | "host");
        (of_pods && state == "confirmed" && deleted != "true")
            .then(|| Affinity { network, node: node.into() })
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
    #[serde(deserialize_with = "or_default")]
    pools: CiliumPools,
}

/// In its IPAM mode `multi-pool`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct CiliumPools {
    #[serde(deserialize_with = "or_default")]
    allocated: Vec<CiliumPool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct CiliumPool {
    #[serde(deserialize_with = "or_default")]
    cidrs: Vec<String>,
}

impl Followed for CiliumObject {
    type Kept = Node;
    const NAME: &'static str = "ciliumnodes.cilium.io";

    fn keep(self) -> Option<Node> {
        // Its addresses, the node itself has.
        let CiliumIpam { pod_cidrs, pools } = self.spec.ipam;
        let of_pools = pools.allocated.iter().flat_map(|pool| &pool.cidrs);
        Some(Node { addresses: [].into(), networks: networks(pod_cidrs.iter().chain(of_pools)) })
    }

    fn table(cluster: &mut Cluster) -> &mut Table<Node> {
        &mut cluster.cilium
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::kept;
    use super::*;

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
    fn addresses_of_load_balancers_are_no_pods() {
        let affinity = |kind: &str| {
            kept::<AffinityObject>(&format!(
                r#"{{"spec": {{"cidr": "10.201.0.0/26", "node": "b", "state": "confirmed"{kind}}}}}"#
            ))
        };
        assert!(affinity("").is_some() && affinity(r#", "type": "host""#).is_some());
        assert_eq!(affinity(r#", "type": "virtual""#), None);
    }

    #[test]
    fn cilium_gives_out_one_network_or_several_of_its_pools() {
        let networks = |ipam: &str| {
            let node = kept::<CiliumObject>(&format!(r#"{{"spec": {{"ipam": {ipam}}}}}"#)).unwrap();
            node.networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            networks(r#"{"podCIDRs": ["10.1.0.0/24", "fd00::/64"], "pools": {}}"#),
            "10.1.0.0/24 fd00::/64"
        );
        assert_eq!(
            networks(r#"{"pools": {"allocated": [{"pool": "a", "cidrs": ["10.2.0.0/27"]}, {"pool": "b"}]}}"#),
            "10.2.0.0/27"
        );
        assert_eq!(networks("{}"), "");
    }
}
