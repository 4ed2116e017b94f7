//! Nodes, pods and namespaces of a lab as objects of the API server.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{ApiServer, User};
use crate::lab::{Family, Host, Lab};

impl ApiServer {
    /// Makes the node with this number, from 0, of the lab: its LAN addresses, its pod networks.
    pub fn add_node(&self, lab: &Lab, number: u8) -> Result<()> {
        let node = &lab.nodes()[usize::from(number)];
        let networks = Family::BOTH.map(|family| lab.pod_network(number, family).to_string());
        let addresses = Family::BOTH.map(|family| node.ip(family).to_string());
        self.add_node_as(&node.name, &addresses, &networks)
    }

    /// Makes a node with these internal addresses and pod networks.
    pub fn add_node_as(&self, name: &str, addresses: &[String], networks: &[String]) -> Result<()> {
        let object = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": networks[0], "podCIDRs": networks},
        });
        self.request(User::Admin, "POST", "/api/v1/nodes", Some(&object)).context("make a node")?;
        let internal = |address: &String| json!({"type": "InternalIP", "address": address});
        let status = json!({"status": {"addresses": addresses.iter().map(internal).collect::<Vec<_>>()}});
        let path = format!("/api/v1/nodes/{name}/status");
        self.request(User::Admin, "PATCH", &path, Some(&status))
            .context("give a node its addresses")
            .map(drop)
    }

    /// Makes a namespace with labels (a JSON object).
    pub fn add_namespace(&self, name: &str, labels: &Value) -> Result<()> {
        let object =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        self.request(User::Admin, "POST", "/api/v1/namespaces", Some(&object)).map(drop)
    }

    /// Makes a pod on a node, without an address yet, as the scheduler leaves it.
    pub fn add_pod(&self, namespace: &str, name: &str, labels: &Value, node: &str) -> Result<()> {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "none"}]},
        });
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        self.request(User::Admin, "POST", &path, Some(&object)).map(drop)
    }

    /// Gives a pod the addresses of one of the lab, as kubelet does.
    pub fn run_pod(&self, namespace: &str, name: &str, pod: &Host) -> Result<()> {
        let status = json!({"status": {
            "phase": "Running", "podIP": pod.v4, "podIPs": [{"ip": pod.v4}, {"ip": pod.v6}],
        }});
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/status");
        self.request(User::Admin, "PATCH", &path, Some(&status)).map(drop)
    }

    /// Deletes an object at once.
    pub fn delete(&self, path: &str) -> Result<()> {
        let now = json!({"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0});
        self.request(User::Admin, "DELETE", path, Some(&now)).map(drop)
    }
}
