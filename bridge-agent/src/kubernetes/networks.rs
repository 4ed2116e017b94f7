//! Which node has which pod networks: by Calico, by Cilium, or by the nodes themselves.

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cluster::Cluster;
use crate::config::PodNetworks;
use crate::routes::{ClusterFile, FileNode, FilePod};

/// Who says which pod networks a node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// The nodes.
    #[default]
    Node,
    /// Calico's IPAM.
    Calico,
    /// Cilium's IPAM.
    Cilium,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Node => "nodes",
            Self::Calico => "Calico",
            Self::Cilium => "Cilium",
        })
    }
}

/// Who is asked.
pub(super) fn origin(wanted: PodNetworks, cluster: &Cluster) -> Origin {
    match wanted {
        PodNetworks::Node => Origin::Node,
        PodNetworks::Calico => Origin::Calico,
        PodNetworks::Cilium => Origin::Cilium,
        PodNetworks::Auto => {
            let calico = cluster.blocks.iter().any(|(_, block)| block.node.is_some());
            if calico || cluster.affinities.len() > 0 {
                Origin::Calico
            } else if cluster.cilium.iter().any(|(_, node)| !node.networks.is_empty()) {
                Origin::Cilium
            } else {
                Origin::Node
            }
        }
    }
}

/// The networks of each node's pods, sorted. No network is at two nodes.
pub(super) fn by_node(origin: Origin, cluster: &Cluster) -> BTreeMap<&str, Vec<IpNet>> {
    let mut owners = BTreeMap::<IpNet, &str>::new();
    match origin {
        Origin::Node => {
            for (name, node) in cluster.nodes.iter() {
                owners.extend(node.networks.iter().map(|network| (*network, name)));
            }
        }
        Origin::Cilium => {
            for (name, node) in cluster.cilium.iter() {
                owners.extend(node.networks.iter().map(|network| (*network, name)));
            }
        }
        Origin::Calico => {
            let blocks = cluster.blocks.iter().map(|(_, block)| (block.network, block.node.as_deref()));
            owners.extend(blocks.filter_map(|(network, node)| Some((network, node?))));
            owners.extend(cluster.affinities.iter().map(|(_, own)| (own.network, &*own.node)));
        }
    }
    let mut networks = BTreeMap::<&str, Vec<IpNet>>::new();
    for (network, node) in owners {
        networks.entry(node).or_default().push(network);
    }
    networks
}

/// Returns the cluster as `cluster.yaml` would describe it, the source of routes. `own`, the node of this agent, is
/// left out: it reaches its pods without.
pub(super) fn description(origin: Origin, cluster: &Cluster, own: Option<&str>) -> ClusterFile {
    let mut networks = by_node(origin, cluster);
    let nodes = cluster.nodes.iter().filter(|(name, _)| Some(*name) != own);
    let nodes: Vec<FileNode> = nodes
        .map(|(name, node)| FileNode {
            name: name.to_owned(),
            addresses: node.addresses.to_vec(),
            pod_networks: networks.remove(name).unwrap_or_default(),
            // The health checks of its address show better than the heartbeat of its kubelet whether packets pass.
            ready: true,
        })
        .collect();
    let lent = cluster.blocks.iter().filter(|_| origin == Origin::Calico).flat_map(|(_, block)| &block.lent);
    let pods = lent
        .filter(|(_, node)| Some(&**node) != own)
        .map(|(address, node)| FilePod { address: *address, node: node.to_string() })
        .collect();
    ClusterFile { nodes, pods }
}

#[cfg(test)]
mod tests {
    use super::super::cluster::{Affinity, Block, Node};
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn node(addresses: &[&str], networks: &[&str]) -> Option<Node> {
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        Some(Node { addresses, networks: nets(networks).into() })
    }

    fn cluster() -> Cluster {
        let mut cluster = Cluster::default();
        let b = node(&["192.168.31.17", "fd31::17"], &["10.200.1.0/24", "fd20:1::/64"]);
        cluster.nodes.apply("b".into(), b);
        cluster.nodes.apply("b2".into(), node(&["192.168.31.18"], &["10.200.2.0/24", "fd20:2::/64"]));
        cluster.nodes.apply("b3".into(), node(&[], &["10.200.3.0/24"]));
        cluster
    }

    fn routes(origin: Origin, cluster: &Cluster, own: Option<&str>) -> String {
        let routes = description(origin, cluster, own).routes_of(crate::routes::SourceKind::Kubernetes);
        routes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn routes_lead_to_internal_addresses_of_the_same_family() {
        insta::assert_snapshot!(routes(Origin::Node, &cluster(), None), @r"
        10.200.1.0/24 via 192.168.31.17 (kubernetes b)
        fd20:1::/64 via fd31::17 (kubernetes b)
        10.200.2.0/24 via 192.168.31.18 (kubernetes b2)
        ");
        insta::assert_snapshot!(routes(Origin::Node, &cluster(), Some("b")), @r"
        10.200.2.0/24 via 192.168.31.18 (kubernetes b2)
        ");
    }

    #[test]
    fn calico_is_asked_where_it_has_given_out_blocks() {
        let mut cluster = cluster();
        assert_eq!(origin(PodNetworks::Auto, &cluster), Origin::Node);
        let cilium = node(&["192.168.31.17"], &["10.100.1.0/24"]);
        cluster.cilium.apply("b".into(), cilium);
        assert_eq!(origin(PodNetworks::Auto, &cluster), Origin::Cilium);
        let lent = Box::new([("10.50.0.9".parse().unwrap(), "b2".into())]);
        let block = Block { network: "10.50.0.0/26".parse().unwrap(), node: Some("b".into()), lent };
        cluster.blocks.apply("10-50-0-0-26".into(), Some(block));
        let own = Affinity { network: "10.50.0.64/26".parse().unwrap(), node: "b2".into() };
        cluster.affinities.apply("b2-10-50-0-64-26".into(), Some(own));
        assert_eq!(origin(PodNetworks::Auto, &cluster), Origin::Calico);
        assert_eq!(origin(PodNetworks::Node, &cluster), Origin::Node);
        insta::assert_snapshot!(routes(Origin::Calico, &cluster, None), @r"
        10.50.0.0/26 via 192.168.31.17 (kubernetes b)
        10.50.0.64/26 via 192.168.31.18 (kubernetes b2)
        10.50.0.9/32 via 192.168.31.18 (kubernetes b2)
        ");
        insta::assert_snapshot!(routes(Origin::Cilium, &cluster, None), @r"
        10.100.1.0/24 via 192.168.31.17 (kubernetes b)
        ");
    }
}
