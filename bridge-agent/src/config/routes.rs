//! `routes`: the way from a LAN host to the pods.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::{AbsolutePath, Problem, SocketAddress};
use super::network::Network;
use super::networks;
use super::report::{Path, Report};
use super::static_route::{self, StaticRoute, check_table};
use super::time_span::TimeSpan;

/// `RT_TABLE_MAIN` of `linux/rtnetlink.h`.
pub const TABLE_MAIN: u32 = 254;
/// The metric of a route whose configuration names none; the kernel's own default for IPv6.
pub const DEFAULT_METRIC: u32 = 1024;

/// Routes to pod networks that are added, repaired, and withdrawn when they are no longer wanted. They bear the
/// protocol number 98 (`ip route show proto 98`); no other route is ever touched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Routes {
    /// Routes that are always wanted.
    #[serde(rename = "static", skip_serializing_if = "Vec::is_empty")]
    pub fixed: Vec<StaticRoute>,
    /// A file that describes the nodes of the cluster and their pod networks, read again whenever it changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["/etc/bridge/cluster.yaml"]))]
    pub file: Option<AbsolutePath>,
    /// The routing table the routes are put in. 254 is the main table.
    #[schemars(range(min = 1))]
    pub table: u32,
    /// The metric of routes that have none of their own: the lowest wins.
    pub metric: u32,
    /// Replacement of a route that is no longer wanted, or whose next hops are all down.
    pub on_withdraw: OnWithdraw,
    /// Networks of foreign routes that ours may lie inside, such as a company's 10.0.0.0/8. Any other overlap with a
    /// foreign route is refused.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow_inside: Vec<Network>,
    /// How the nodes on the way are watched.
    pub health: Health,
    /// Learns routes from announcements of pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discovery: Option<Discovery>,
}

impl Default for Routes {
    fn default() -> Self {
        Self {
            fixed: Vec::new(),
            file: None,
            table: TABLE_MAIN,
            metric: DEFAULT_METRIC,
            on_withdraw: OnWithdraw::Remove,
            allow_inside: Vec::new(),
            health: Health::default(),
            discovery: None,
        }
    }
}

/// See [`Routes::on_withdraw`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnWithdraw {
    /// Nothing: packets follow the next wider route, usually the default route.
    #[default]
    Remove,
    /// A blackhole of the same network, until it is wanted again or `routes withdraw` takes it away.
    Blackhole,
}

/// How the nodes on the way are watched: one that does not answer loses its routes, or yields to another next hop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Health {
    /// Whether they are watched at all.
    pub enabled: bool,
    /// How often the kernel asks each one by ARP or neighbour discovery.
    pub interval: TimeSpan,
    /// A TCP port of each node that must accept connections too.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub tcp_port: Option<u16>,
    /// How long a connection to that port may take.
    pub timeout: TimeSpan,
}

impl Default for Health {
    fn default() -> Self {
        Self { enabled: true, interval: TimeSpan::seconds(5), tcp_port: None, timeout: TimeSpan::seconds(1) }
    }
}

/// Learns routes from announcements of pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Discovery {
    /// The address and port that announcements are expected on.
    pub listen: SocketAddress,
    /// The file with the key that announcements are authenticated with; readable by root alone.
    pub key_file: AbsolutePath,
}

impl Routes {
    /// `pods` is whether there are networks in which a pod is accepted.
    pub(crate) fn check(&self, pods: bool, path: &Path<'_>, report: &mut Report<'_>) {
        check_table(self.table, &path.key("table"), report);
        static_route::check(&self.fixed, self.table, &path.key("static"), report);
        let inside: Vec<_> = self.allow_inside.iter().map(|network| network.net()).collect();
        let allow_inside = path.key("allowInside");
        networks::repeated(&allow_inside, &inside, report);
        networks::no_hosts(&allow_inside, &inside, report);
        self.health.check(&path.key("health"), report);
        if self.discovery.is_some() && !pods {
            report.error(
                &path.key("discovery"),
                Problem::new(
                    "nothing says which addresses pods may announce",
                    "write their networks under `networks.pods`",
                ),
            );
        }
    }
}

impl Health {
    /// More often than this is a burden for the LAN.
    const LEAST: Duration = Duration::from_millis(200);

    fn check(&self, path: &Path<'_>, report: &mut Report<'_>) {
        if self.interval.duration() < Self::LEAST {
            report.error(
                &path.key("interval"),
                Problem::new(
                    format!("an interval of {} would flood the LAN", self.interval),
                    "write 200ms or more",
                ),
            );
        }
        if self.tcp_port.is_some() && self.timeout > self.interval {
            report.error(
                &path.key("timeout"),
                Problem::new(
                    format!("a check may take {}, and the next begins after {}", self.timeout, self.interval),
                    "write a timeout no longer than `interval`",
                ),
            );
        }
    }
}
