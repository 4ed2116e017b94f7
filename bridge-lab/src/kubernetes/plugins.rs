//! Calico and Cilium as the API server sees them: definitions with as much of their schemas as matters here, and objects as
//! they write them (Calico 3.29 with its Kubernetes datastore; Cilium 1.16).

use anyhow::Result;
use serde_json::{Value, json};

use super::{ApiServer, User};

const CALICO: &str = "crd.projectcalico.org";
const CILIUM: &str = "cilium.io";

impl ApiServer {
    /// Installs Calico's definitions of blocks.
    pub fn install_calico(&self) -> Result<()> {
        let block = json!({
            "cidr": {"type": "string"}, "deleted": {"type": "boolean"},
            "affinity": {"type": "string", "nullable": true}, "strictAffinity": {"type": "boolean"},
            "allocations": {"type": "array", "items": {"type": "integer", "nullable": true}},
            "unallocated": {"type": "array", "items": {"type": "integer"}},
            "attributes": {"type": "array", "items": {"type": "object", "properties": {
                "handle_id": {"type": "string"},
                "secondary": {"type": "object", "additionalProperties": {"type": "string"}},
            }}},
        });
        let affinity = json!({
            "cidr": {"type": "string"}, "deleted": {"type": "string"}, "node": {"type": "string"},
            "state": {"type": "string"}, "type": {"type": "string"},
        });
        self.define(CALICO, "v1", "IPAMBlock", &block)?;
        self.define(CALICO, "v1", "BlockAffinity", &affinity)
    }

    /// Installs Cilium's definition of nodes.
    pub fn install_cilium(&self) -> Result<()> {
        let pool = json!({"type": "object", "properties": {
            "pool": {"type": "string"}, "cidrs": {"type": "array", "items": {"type": "string"}},
        }});
        let ipam = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
            "podCIDRs": {"type": "array", "items": {"type": "string"}},
            "pools": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
                "allocated": {"type": "array", "items": pool},
            }},
        }});
        self.define(CILIUM, "v2", "CiliumNode", &json!({"ipam": ipam}))
    }

    /// Makes a definition of cluster-wide objects whose `spec` has these properties, and more.
    fn define(&self, group: &str, version: &str, kind: &str, spec: &Value) -> Result<()> {
        let singular = kind.to_lowercase();
        let plural = if let Some(stem) = singular.strip_suffix('y') {
            format!("{stem}ies")
        } else {
            format!("{singular}s")
        };
        let schema = json!({"type": "object", "properties": {"spec": {
            "type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": spec,
        }}});
        let name = format!("{plural}.{group}");
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": name},
            "spec": {
                "group": group, "scope": "Cluster",
                "names": {"kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": singular},
                "versions": [{
                    "name": version, "served": true, "storage": true, "schema": {"openAPIV3Schema": schema},
                }],
            },
        });
        self.apply(&definition.to_string())?;
        self.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", &name], "").map(drop)
    }

    /// Gives a node a block of 64 IPv4 addresses, as Calico does. The address with the number `lent.0` in it is that of a pod on
    /// the node `lent.1`. Applied again, the block changes.
    pub fn apply_calico_block(&self, cidr: &str, node: &str, lent: Option<(usize, &str)>) -> Result<()> {
        let name = cidr.replace(['.', '/'], "-");
        let mut allocations = vec![Value::Null; 64];
        allocations[0] = 0.into();
        let of_pod = |node: &str| {
            json!({"handle_id": "k8s-pod-network.0b54", "secondary": {
                "namespace": "shop", "node": node, "pod": "c1", "timestamp": "2026-01-05 09:12:44.1 +0000 UTC",
            }})
        };
        let tunnel = json!({"handle_id": format!("vxlan-tunnel-addr-{node}"), "secondary": {
            "node": node, "type": "vxlanTunnelAddress",
        }});
        let mut attributes = vec![tunnel, of_pod(node)];
        allocations[1] = 1.into();
        if let Some((number, borrower)) = lent {
            allocations[number] = 2.into();
            attributes.push(of_pod(borrower));
        }
        let unallocated: Vec<usize> = (0..64).filter(|number| allocations[*number].is_null()).collect();
        let block = json!({
            "apiVersion": format!("{CALICO}/v1"), "kind": "IPAMBlock", "metadata": {"name": name},
            "spec": {
                "cidr": cidr, "affinity": format!("host:{node}"), "affinityClaimTime": "2026-01-05T09:12:40Z",
                "allocations": allocations, "attributes": attributes, "unallocated": unallocated,
                "deleted": false, "sequenceNumber": 1_887_224_917_511_042_109_u64,
                "sequenceNumberForAllocation": {"0": 1_887_224_917_511_042_108_u64}, "strictAffinity": false,
            },
        });
        // As a client would apply it to a list: missing entries are removed.
        self.kubectl(&["apply", "-f", "-"], &block.to_string())?;
        self.apply_calico_affinity(cidr, node, "host")
    }

    /// Says whose block it is.
    pub fn apply_calico_affinity(&self, cidr: &str, node: &str, kind: &str) -> Result<()> {
        let name = format!("{node}-{}", cidr.replace(['.', '/'], "-"));
        let affinity = json!({
            "apiVersion": format!("{CALICO}/v1"), "kind": "BlockAffinity", "metadata": {"name": name},
            "spec": {"cidr": cidr, "deleted": "false", "node": node, "state": "confirmed", "type": kind},
        });
        self.apply(&affinity.to_string()).map(drop)
    }

    /// Describes a node as Cilium does; `ipam` is that part of it.
    pub fn add_cilium_node(&self, name: &str, address: &str, ipam: &Value) -> Result<()> {
        let node = json!({
            "apiVersion": format!("{CILIUM}/v2"), "kind": "CiliumNode",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": {
                "addresses": [{"ip": address, "type": "InternalIP"}, {"ip": "10.60.1.44", "type": "CiliumInternalIP"}],
                "alibaba-cloud": {}, "azure": {}, "encryption": {}, "eni": {}, "health": {"ipv4": "10.60.1.23"},
                "ingress": {}, "ipam": ipam,
            },
            "status": {"alibaba-cloud": {}, "azure": {}, "eni": {}, "ipam": {"operator-status": {}}},
        });
        let path = format!("/apis/{CILIUM}/v2/ciliumnodes");
        self.request(User::Admin, "POST", &path, Some(&node)).map(drop)
    }
}
