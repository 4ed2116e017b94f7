//! `kubernetes`: where pods, nodes and rules can be learnt from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::labels::is_subdomain;
use super::leaf::{AbsolutePath, Problem, unprintable};
use super::report::{Path, Report};

/// Learns pods, nodes and rules from a cluster. Empty: by the service account of the pod that the agent runs in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Kubernetes {
    /// The kubeconfig file to connect with, outside a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["/etc/bridge/kubeconfig"]))]
    pub kubeconfig: Option<AbsolutePath>,
    /// The context of the kubeconfig. Left out: its current context.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// The name of this node in the cluster. Left out: the environment variable `NODE_NAME`, else the host name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Who says which pod networks a node has.
    pub pod_networks: PodNetworks,
    /// Which pods a node follows.
    pub pods: FollowedPods,
    /// Whether a BridgeNamespacePolicy takes effect: the users of a namespace can then open ports of its pods.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub namespace_policies: bool,
}

/// Which pods a node follows, so that rules can select them by labels.
///
/// A NodePort, LoadBalancer or ClusterIP connection from the LAN may enter the cluster at a node that does not host the pod. That
/// node hides the peer from the pod's own node, so it has to decide.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FollowedPods {
    /// Those of every node. Each node then hears of every pod of the cluster.
    #[default]
    All,
    /// Those of this node. What the node translates to pods of other nodes is denied to LAN hosts.
    Own,
}

/// Who says which pod networks a node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PodNetworks {
    /// Calico if it has given any node a block, else Cilium if it has given any node a network, else the nodes.
    #[default]
    Auto,
    /// `spec.podCIDRs` of the nodes.
    Node,
    /// Calico's IPAM: `blockaffinities` and `ipamblocks` of `crd.projectcalico.org/v1`.
    Calico,
    /// Cilium's IPAM: `ciliumnodes` of `cilium.io/v2`.
    Cilium,
}

/// The variable that names the node.
pub(crate) const NODE_VARIABLE: &str = "NODE_NAME";
/// A name that is no name is repeated up to this number of characters.
const SHOWN: usize = 64;

/// Checks the name of a node in the cluster.
pub(crate) fn check_node_name(name: &str) -> Result<(), Problem> {
    if is_subdomain(name) {
        return Ok(());
    }
    let help =
        "write the name that `kubectl get nodes` shows: lower-case letters, digits, `-` and `.`, at most 253";
    let (shown, more) = match name.char_indices().nth(SHOWN) {
        Some((end, _)) => (&name[..end], "..."),
        None => (name, ""),
    };
    Err(Problem::new(format!("{shown:?}{more} is not the name of a node"), help))
}

/// Returns the variable that names the node, unless it is empty.
pub(crate) fn node_variable() -> Option<String> {
    let name = std::env::var_os(NODE_VARIABLE)?;
    (!name.is_empty()).then(|| name.to_string_lossy().into_owned())
}

impl Kubernetes {
    /// Returns why the environment names no node, if the section leaves that to it.
    pub(crate) fn misnamed(&self) -> Option<Problem> {
        let name = if self.node_name.is_some() { None } else { node_variable() };
        let problem = check_node_name(&name?).err()?;
        Some(Problem::new(
            format!("by the variable {NODE_VARIABLE}, {}", problem.message),
            format!("{}; or write `kubernetes: {{nodeName: NAME}}`", problem.help),
        ))
    }

    pub(crate) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        if let Some(problem) = self.node_name.as_deref().and_then(|name| check_node_name(name).err()) {
            report.error(&path.key("nodeName"), problem);
        }
        let context = path.key("context");
        if self.context.as_deref() == Some("") {
            let help = "write one of `kubectl config get-contexts`, or remove it for the current one";
            report.error(&context, Problem::new("the name of the context is empty", help));
        } else if let Some(problem) = self.context.as_deref().and_then(unprintable) {
            report.error(&context, problem);
        }
        if self.context.is_some() && self.kubeconfig.is_none() && report.intact(path) {
            report.error(
                &path.key("context"),
                Problem::new(
                    "`context` names a context of a kubeconfig, and none is given",
                    "add `kubeconfig: PATH`, or remove `context`",
                ),
            );
        }
    }
}
