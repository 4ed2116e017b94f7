//! `portPool`: the source ports that clients may take.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::{Leaf, Problem, leaf, unprintable};
use super::network::Network;
use super::networks::Networks;
use super::node_ports::NodePorts;
use super::ports::Ports;
use super::report::{Path, Report};
use super::role::Role;
use crate::model::PortRange;

/// The source ports that clients may take, shared by all pods of a node or all processes of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortPool {
    /// The ports of the pool.
    pub ports: Ports,
    /// Ports inside `ports` that are never given out, because something else uses them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude: Option<Ports>,
    /// Connections to these networks get a port from the pool. Left out: `networks.external` on a node,
    /// `networks.pods` on a host.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "super::flow::flow_option")]
    pub destinations: Option<Vec<Network>>,
    /// The clients whose connections get a port from the pool without asking for it. Left out: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transparent: Option<Transparent>,
    /// The most ports that one pod, or a host with all its processes, may hold at a time to one destination.
    /// Left out: all of them while no other pod uses the pool, else as many as leave a quarter of the rest free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    pub quota: Option<u32>,
    /// Whether a program that binds a port outside the pool itself is kept from connecting to `destinations`, so that
    /// no connection to them leaves from another port.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub strict: bool,
    /// Whether UDP sockets that bind port 0 get a port of the pool, so that they may send without connecting. The
    /// highest eighth of the ports is set aside for them.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub bind_udp: bool,
    /// On a node: whether bridge masquerades the connections of pods to `destinations` itself, with their port of the
    /// pool, before another masquerade gives them one at random. Needs nftables.
    #[serde(default, skip_serializing_if = "is_no")]
    pub masquerade: bool,
}

/// The pool as an explanation of a connection needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolScope {
    /// Its ports.
    pub ports: Vec<PortRange>,
    /// Connections to these get one.
    pub destinations: Vec<ipnet::IpNet>,
    /// The control groups whose connections get one without asking for it.
    pub cgroups: Vec<String>,
    /// See [`PortPool::strict`].
    pub strict: bool,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_yes(value: &bool) -> bool {
    *value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_no(value: &bool) -> bool {
    !*value
}

/// Whose connections get a port from the pool without asking for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Transparent {
    /// Control groups, by their path below the cgroup2 mount, with all that is in them. `/` is every process.
    #[serde(serialize_with = "super::flow::flow")]
    pub cgroups: Vec<CgroupPath>,
}

/// The path of a control group below the cgroup2 mount.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CgroupPath(String);

leaf!(CgroupPath);

impl CgroupPath {
    /// The path, which begins with `/`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Leaf for CgroupPath {
    const FORMAT: &'static str = "cgroup-path";
    const EXAMPLE: &'static str = "/kubepods.slice";

    fn parse(text: &str) -> Result<Self, Problem> {
        const HELP: &str = "write the path below the cgroup2 mount, such as / or /kubepods.slice";
        if let Some(problem) = unprintable(text) {
            return Err(problem);
        }
        let below =
            text.strip_prefix("/sys/fs/cgroup").filter(|below| below.is_empty() || below.starts_with('/'));
        if let Some(below) = below {
            let below = below.strip_prefix("/unified").unwrap_or(below);
            let below = if below.is_empty() { "/" } else { below };
            return Err(Problem::new(
                format!("`{text}` includes the mount point"),
                format!("write the path below it: {below}"),
            ));
        }
        let clean = text.starts_with('/')
            && (text == "/" || text[1..].split('/').all(|part| !matches!(part, "" | "." | "..")));
        if clean {
            Ok(Self(text.into()))
        } else {
            Err(Problem::new(format!("`{text}` is not the path of a control group"), HELP))
        }
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl PortPool {
    /// The ports that are given out: `ports` without `exclude`, sorted, disjoint.
    #[must_use]
    pub fn available(&self) -> Vec<PortRange> {
        let excluded = self.exclude.as_ref().map(Ports::normalised).unwrap_or_default();
        let mut left = Vec::new();
        for range in self.ports.normalised() {
            // u32: one past the last port is a value of its own.
            let mut next = u32::from(range.first);
            let last = u32::from(range.last);
            for hole in excluded.iter().filter(|hole| hole.first <= range.last && range.first <= hole.last) {
                push(&mut left, next, u32::from(hole.first).saturating_sub(1));
                next = next.max(u32::from(hole.last) + 1);
            }
            push(&mut left, next, last);
        }
        left
    }

    pub(crate) fn check(
        &self,
        path: &Path<'_>,
        node_ports: Option<&NodePorts>,
        implied_destinations: bool,
        report: &mut Report<'_>,
    ) {
        let (ports, exclude) = (path.key("ports"), path.key("exclude"));
        self.ports.check(&ports, report);
        let pool = self.ports.normalised();
        if let Some(excluded) = &self.exclude {
            excluded.check(&exclude, report);
            if report.intact(&ports) {
                for (index, hole) in excluded.ranges().enumerate() {
                    if !pool.iter().any(|range| range.first <= hole.first && hole.last <= range.last) {
                        report.error(
                            &exclude.index(index),
                            Problem::new(
                                format!("{hole} is not inside `portPool.ports`"),
                                "exclude only ports that are in the pool",
                            ),
                        );
                    }
                }
            }
        }
        let available: u32 = self.available().iter().map(PortRange::count).sum();
        if available == 0 && !pool.is_empty() {
            let problem = Problem::new("`exclude` leaves no port in the pool", "exclude fewer ports");
            report.error(&exclude, problem);
        }
        if let Some(quota) = self.quota.filter(|quota| *quota > available && available > 0) {
            report.warn(
                &path.key("quota"),
                Problem::new(
                    format!("a quota of {quota} limits nothing: the pool has {available} ports"),
                    format!("write at most {available}, or remove it"),
                ),
            );
        }
        self.check_neighbours(&ports, node_ports, report);
        self.check_destinations(path, implied_destinations, report);
    }

    fn check_neighbours(&self, path: &Path<'_>, node_ports: Option<&NodePorts>, report: &mut Report<'_>) {
        for (index, range) in self.ports.ranges().enumerate() {
            if range.first < 1024 {
                report.warn(
                    &path.index(index),
                    Problem::new(
                        format!(
                            "{range} has ports below 1024, which servers listen on and only root may bind"
                        ),
                        "take ports of the dynamic range, such as \"61001-65535\"",
                    ),
                );
            }
            if let Some(node_ports) = node_ports.map(|node_ports| node_ports.range.0)
                && range.first <= node_ports.last
                && node_ports.first <= range.last
            {
                report.warn(
                    &path.index(index),
                    Problem::new(
                        format!("{range} overlaps the NodePort range {node_ports}"),
                        "take other ports for the pool: a reply to one of these can be taken for a NodePort request",
                    ),
                );
            }
        }
    }

    pub(crate) fn check_masquerade(
        &self,
        path: &Path<'_>,
        role: Role,
        networks: &Networks,
        report: &mut Report<'_>,
    ) {
        let problem = match role {
            Role::Host => Problem::new(
                "connections of pods are masqueraded on a node, and this is a host",
                "write `role: node`, or remove `masquerade`",
            ),
            Role::Node if networks.pod_nets().is_empty() => Problem::new(
                "`masquerade` is for connections of pods, and `networks.pods` names none",
                "add `pods: [...]` under `networks`, or remove `masquerade`",
            ),
            Role::Node => return,
        };
        report.error(&path.key("masquerade"), problem);
    }

    fn check_destinations(&self, path: &Path<'_>, implied: bool, report: &mut Report<'_>) {
        let at = path.key("destinations");
        match &self.destinations {
            Some(networks) if networks.is_empty() && report.intact(&at) => report.error(
                &at,
                Problem::new(
                    "the list of destinations is empty",
                    "write at least one network, or remove the key",
                ),
            ),
            Some(networks) => {
                let nets: Vec<_> = networks.iter().map(|network| network.net()).collect();
                super::networks::repeated(&at, &nets, report);
            }
            None if !implied && report.intact(path) => report.error(
                path,
                Problem::new(
                    "the pool has no destinations, and `networks` names none to take instead",
                    "add `destinations: [...]`, or the networks under `networks`",
                ),
            ),
            None => {}
        }
        let transparent = path.key("transparent");
        let cgroups = transparent.key("cgroups");
        if let Some(transparent) = &self.transparent {
            report.repeated(&cgroups, &transparent.cgroups);
        }
        if let Some(transparent) = &self.transparent
            && transparent.cgroups.is_empty()
            && report.intact(&cgroups)
        {
            let help = "write [/] for every process, or remove `transparent`";
            report.error(&cgroups, Problem::new("the list of control groups is empty", help));
        }
    }
}

fn push(ranges: &mut Vec<PortRange>, first: u32, last: u32) {
    if let (Ok(first), Ok(last)) = (u16::try_from(first), u16::try_from(last))
        && first <= last
    {
        ranges.push(PortRange { first, last });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_cut_out_at_both_ends_and_inside() {
        let pool: PortPool = serde_json::from_str(
            r#"{"ports": ["100-200", 300, "65530-65535"], "exclude": [100, 150, 200, 300, "65534-65535"]}"#,
        )
        .unwrap();
        let text: Vec<String> = pool.available().iter().map(PortRange::to_string).collect();
        assert_eq!(text, ["101-149", "151-199", "65530-65533"]);
    }

    #[test]
    fn cgroup_paths_are_below_the_mount() {
        assert_eq!(
            CgroupPath::parse("/sys/fs/cgroup/unified/x").unwrap_err().help,
            "write the path below it: /x"
        );
        assert_eq!(CgroupPath::parse("/sys/fs/cgroup").unwrap_err().help, "write the path below it: /");
        assert!(CgroupPath::parse("/").is_ok() && CgroupPath::parse("/a/b.slice").is_ok());
        for bad in ["", "a", "/a/", "/a//b", "/../b", "/a/./b"] {
            assert!(CgroupPath::parse(bad).is_err(), "{bad:?}");
        }
    }
}
