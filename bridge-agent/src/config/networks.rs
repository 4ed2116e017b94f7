//! `networks`: who is a pod, who is a LAN host.

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::Problem;
use super::network::{HostOrNetwork, Network};
use super::report::{Path, Report};
use super::role::Role;
use super::special;

/// The networks whose traffic with each other is judged. Everything else passes untouched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Networks {
    /// The networks of the pods. With a `kubernetes` section, the pod networks of the cluster's nodes are added.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "super::flow::flow")]
    pub pods: Vec<Network>,
    /// The networks of the LAN hosts.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "super::flow::flow")]
    pub external: Vec<Network>,
    /// Addresses inside `external` or `pods` that belong to cluster nodes, and are judged neither as a LAN host nor
    /// as a pod. The addresses of this node are added by themselves.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "super::flow::flow")]
    pub nodes: Vec<HostOrNetwork>,
}

impl Networks {
    pub(crate) fn pod_nets(&self) -> Vec<IpNet> {
        self.pods.iter().map(|network| network.net()).collect()
    }

    pub(crate) fn external_nets(&self) -> Vec<IpNet> {
        self.external.iter().map(|network| network.net()).collect()
    }

    pub(crate) fn node_nets(&self) -> Vec<IpNet> {
        self.nodes.iter().map(|host| host.net()).collect()
    }

    pub(crate) fn check(&self, path: &Path<'_>, role: Role, kubernetes: bool, report: &mut Report<'_>) {
        let (pods, external) = (path.key("pods"), path.key("external"));
        if role == Role::Node && report.intact(path) {
            if self.pods.is_empty() && !kubernetes {
                report.error(
                    &pods,
                    Problem::new(
                        "no pod network is given",
                        "write the networks of this node's pods, such as `pods: [10.200.1.0/24]` under `networks`, \
                         or a `kubernetes` section to learn them from the cluster",
                    ),
                );
            }
            if self.external.is_empty() {
                report.error(
                    &external,
                    Problem::new(
                        "no external network is given",
                        "write the networks of the LAN hosts, such as `external: [192.168.31.0/24]` under `networks`",
                    ),
                );
            }
        }
        let (pod_nets, external_nets) = (self.pod_nets(), self.external_nets());
        repeated(&pods, &pod_nets, report);
        repeated(&external, &external_nets, report);
        no_hosts(&pods, &pod_nets, report);
        no_hosts(&external, &external_nets, report);
        for (index, net) in external_nets.iter().enumerate() {
            if let Some(pod) = pod_nets.iter().find(|pod| overlap(pod, net)) {
                report.error(
                    &external.index(index),
                    Problem::new(
                        format!("{net} overlaps the pod network {pod}"),
                        "write networks that share no address: one address cannot be both a pod and a LAN host",
                    ),
                );
            }
        }
        // An entry that is refused may have been of the missing family.
        let external_is_valid = report.intact(&external);
        let family = family_without_external(&pod_nets, &external_nets);
        if let Some(family) =
            family.filter(|_| role == Role::Node && !external_nets.is_empty() && external_is_valid)
        {
            report.warn(
                &external,
                Problem::new(
                    format!(
                        "pods have {family} networks and `external` names none, so no rule covers {family}"
                    ),
                    format!("add the {family} networks of the LAN to `external`"),
                ),
            );
        }
        let nodes = path.key("nodes");
        no_hosts(&nodes, &self.node_nets(), report);
        repeated(&nodes, &self.node_nets(), report);
        if report.intact(&pods) && report.intact(&external) {
            // Two halves enclose a network as well.
            let joined = IpNet::aggregate(&self.node_nets());
            for (index, host) in self.nodes.iter().enumerate() {
                let net = host.net();
                let whole = joined.iter().find(|whole| whole.contains(&net)).unwrap_or(&net);
                if let Some(problem) = encloses(*host, whole, &pod_nets, &external_nets) {
                    report.error(&nodes.index(index), problem);
                } else if !kubernetes
                    && !pod_nets.iter().chain(&external_nets).any(|known| overlap(known, &net))
                {
                    report.warn(
                        &nodes.index(index),
                        Problem::new(
                            format!(
                                "{host} lies in no network of `pods` or `external`, so this changes nothing"
                            ),
                            "remove it, or correct it",
                        ),
                    );
                }
            }
        }
    }
}

/// Refuses an entry of `nodes` that makes nodes of all hosts of a network. `whole` is the entry joined with its neighbours.
/// The address of one host is never refused.
fn encloses(host: HostOrNetwork, whole: &IpNet, pods: &[IpNet], external: &[IpNet]) -> Option<Problem> {
    let net = host.net();
    if net.prefix_len() == net.max_prefix_len() {
        return None;
    }
    let inner = |nets: &[IpNet]| nets.iter().find(|inner| whole.contains(*inner)).copied();
    let all = match (inner(external), inner(pods)) {
        (Some(lan), _) => {
            format!("all of the external network {lan}: every LAN host there would count as a node")
        }
        (None, Some(pods)) => format!("all of the pod network {pods}: every pod there would count as a node"),
        (None, None) if net.prefix_len() == 0 => "every address: every host would count as a node".to_owned(),
        (None, None) => return None,
    };
    Some(Problem::new(
        format!("{host} makes nodes of {all}, and nodes are not restricted"),
        "write the addresses of the nodes one by one, such as `nodes: [192.168.31.17]`",
    ))
}

/// Returns the address family that pods have and no external network has.
pub(crate) fn family_without_external(pods: &[IpNet], external: &[IpNet]) -> Option<&'static str> {
    let has = |nets: &[IpNet], v4: bool| nets.iter().any(|net| matches!(net, IpNet::V4(_)) == v4);
    [(true, "IPv4"), (false, "IPv6")]
        .into_iter()
        .find_map(|(v4, name)| (has(pods, v4) && !has(external, v4)).then_some(name))
}

/// Refuses networks whose addresses no forwarded packet has.
pub(super) fn no_hosts(path: &Path<'_>, nets: &[IpNet], report: &mut Report<'_>) {
    for (index, net) in nets.iter().enumerate() {
        if let Some(problem) = special::no_hosts(net) {
            report.error(&path.index(index), problem);
        }
    }
}

/// Warns of networks that another one of the same list already contains.
pub(crate) fn repeated(path: &Path<'_>, nets: &[IpNet], report: &mut Report<'_>) {
    // A prefix sorts right before the prefixes that it contains.
    let mut sorted: Vec<(IpNet, usize)> = nets.iter().enumerate().map(|(index, net)| (*net, index)).collect();
    sorted.sort_unstable();
    let mut outer: Option<IpNet> = None;
    for (net, index) in sorted {
        match outer {
            Some(outer) if outer.contains(&net) => report.warn(
                &path.index(index),
                Problem::new(format!("{net} is already covered by {outer} in the same list"), "remove it"),
            ),
            _ => outer = Some(net),
        }
    }
}

/// Whether the two share an address.
pub(crate) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}
