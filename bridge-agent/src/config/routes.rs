//! `routes`: the way from a LAN host to the pods.

use std::net::IpAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::interface::InterfaceName;
use super::leaf::{AbsolutePath, Problem, SocketAddress};
use super::network::Network;
use super::report::{Path, Report};

/// Routes to pod networks that are added, repaired, and withdrawn when they are no longer wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Routes {
    /// Routes that are always wanted.
    #[serde(rename = "static", skip_serializing_if = "Vec::is_empty")]
    pub fixed: Vec<StaticRoute>,
    /// A file of further routes, one `NETWORK via ADDRESS` a line, read again whenever it changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<AbsolutePath>,
    /// The routing table the routes are put in. 254 is the main table.
    #[schemars(range(min = 1))]
    pub table: u32,
    /// The metric of routes that have none of their own: the lowest wins. 0 is the kernel's default.
    pub metric: u32,
    /// The protocol number that marks a route as one of ours (`ip route show proto N`), so that no other is touched.
    #[schemars(range(min = 5, max = 255))]
    pub protocol: u8,
    /// Learns routes from the nodes' announcements.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovery: Option<Discovery>,
}

impl Default for Routes {
    fn default() -> Self {
        Self { fixed: Vec::new(), file: None, table: 254, metric: 0, protocol: 98, discovery: None }
    }
}

/// A route that is always wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StaticRoute {
    /// The destination, usually the pod network of one node.
    pub to: Network,
    /// The next hop, usually the address of that node.
    pub via: IpAddr,
    /// The interface to leave by. Left out: the one that `via` is reached by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dev: Option<InterfaceName>,
    /// The metric. Left out: `routes.metric`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<u32>,
}

/// Learns routes from the nodes' announcements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Discovery {
    /// The address and port that announcements are expected on.
    pub listen: SocketAddress,
    /// The file with the key that announcements are authenticated with; readable by root alone.
    pub key_file: AbsolutePath,
}

/// The kernel's table of local addresses (`RT_TABLE_LOCAL`).
const TABLE_LOCAL: u32 = 255;

impl Routes {
    pub(crate) fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        if self.table == TABLE_LOCAL {
            report.error(
                &path.key("table"),
                Problem::new(
                    "table 255 holds the kernel's own local addresses",
                    "write 254 for the main table, or a table of your own",
                ),
            );
        }
        let list = path.key("static");
        let mut seen: std::collections::HashMap<(IpNet, u32), usize> = std::collections::HashMap::new();
        for (index, route) in self.fixed.iter().enumerate() {
            let at = list.index(index);
            route.check(&at, report);
            let metric = route.metric.unwrap_or(self.metric);
            if let Some(first) = seen.insert((route.to.net(), metric), index) {
                let place = report.place(&list.index(first));
                report.error(
                    &at.key("to"),
                    Problem::new(
                        format!("{} already has a route with metric {metric} at {place}", route.to),
                        "remove one of them, or give them different metrics",
                    ),
                );
            }
        }
    }
}

impl StaticRoute {
    fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        let (to, via) = (self.to.net(), path.key("via"));
        if self.via.is_ipv4() != matches!(to, IpNet::V4(_)) {
            report.error(
                &via,
                Problem::new(
                    format!("{} and {to} are of different IP versions", self.via),
                    "write a next hop of the same IP version as the destination",
                ),
            );
        } else if to.prefix_len() > 0 && to.contains(&self.via) {
            report.error(
                &via,
                Problem::new(
                    format!(
                        "the next hop {} is itself inside {to}, so the route would lead to itself",
                        self.via
                    ),
                    "write the address that the node has on the LAN",
                ),
            );
        }
        if self.via.is_unspecified() || self.via.is_multicast() || self.via.is_loopback() {
            report.error(
                &via,
                Problem::new(
                    format!("{} cannot be a next hop", self.via),
                    "write the address that the node has on the LAN",
                ),
            );
        }
    }
}
