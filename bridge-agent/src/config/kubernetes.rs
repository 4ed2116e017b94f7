//! `kubernetes`: where pods, nodes and rules can be learnt from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::{AbsolutePath, Problem};
use super::report::{Path, Report};

/// Learns pods, nodes and rules from a cluster. Empty: by the service account of the pod that the agent runs in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Kubernetes {
    /// The kubeconfig file to connect with, outside a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<AbsolutePath>,
    /// The context of the kubeconfig. Left out: its current context.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
}

impl Kubernetes {
    pub(crate) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
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
