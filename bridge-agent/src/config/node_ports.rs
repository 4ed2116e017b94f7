//! `nodePorts`: which NodePorts of the node the LAN may use.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::Problem;
use super::ports::{PortItem, Ports};
use super::report::{Path, Report};
use crate::model::{self, PortRange};

/// Which NodePorts of this node the LAN may use. Without this section, traffic to NodePorts is not judged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct NodePorts {
    /// The range that the cluster takes NodePorts from: kube-apiserver's `--service-node-port-range`.
    pub range: PortItem,
    /// The NodePorts that LAN hosts may use, inside `range`; the others are denied. Left out: none may be used.
    pub allow: Ports,
}

impl Default for NodePorts {
    fn default() -> Self {
        Self { range: PortItem(PortRange { first: 30000, last: 32767 }), allow: Ports::default() }
    }
}

impl NodePorts {
    pub(crate) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        let allow = path.key("allow");
        if !self.allow.0.is_empty() {
            self.allow.check(&allow, report);
        }
        if !report.intact(&path.key("range")) {
            return;
        }
        let range = self.range.0;
        for (index, item) in self.allow.ranges().enumerate() {
            if item.first < range.first || item.last > range.last {
                report.error(
                    &allow.index(index),
                    Problem::new(
                        format!("{item} is not inside the NodePort range {range}"),
                        format!(
                            "write ports from {} to {}, or correct `nodePorts.range`",
                            range.first, range.last
                        ),
                    ),
                );
            }
        }
    }

    pub(crate) fn to_model(&self) -> model::NodePorts {
        model::NodePorts { range: self.range.0, allow: self.allow.normalised() }
    }
}
