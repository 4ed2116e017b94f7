//! `rules`: which flows may be opened.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::leaf::{Leaf, Problem, leaf};
use super::network::Network;
use super::networks::Networks;
use super::ports::Ports;
use super::report::{Path, Report};
use crate::model::{self, Action, Direction, Protocol};

/// The most rules a configuration may have.
pub const MAX_RULES: usize = 1_000_000;

/// One rule: every criterion must match. Among matching rules a deny wins; without a match a flow is denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// Unique among the rules; 1 to 63 bytes of letters, digits, `.`, `_` and `-`.
    pub name: RuleName,
    /// Which side opens the flow: `inbound` from a LAN host to a pod, `outbound` from a pod to a LAN host.
    pub direction: Direction,
    /// LAN hosts, inside `networks.external`. Left out: all of `networks.external`.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "super::flow_option")]
    pub external: Option<Vec<Network>>,
    /// Pods by address, inside `networks.pods`. Left out: all of `networks.pods`.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "super::flow_option")]
    pub pods: Option<Vec<Network>>,
    /// Pods by label, instead of `pods`. Needs a `kubernetes` section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<LabelSelector>,
    /// Pods by the labels of their namespace, instead of `pods`; with `podSelector`, both must hold. Left out: every
    /// namespace. Needs a `kubernetes` section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    /// The protocol. `any` is every IP protocol; with ports, those that have ports: TCP, UDP and SCTP.
    pub protocol: Protocol,
    /// Destination ports. Left out: all ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Ports>,
    /// Source ports. Left out: all ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_ports: Option<Ports>,
    /// What happens to a flow that matches.
    #[serde(default)]
    pub action: Action,
}

/// The name of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleName(String);

leaf!(RuleName);

impl RuleName {
    /// # Errors
    /// What is wrong with `text`, and what to write instead.
    pub fn new(text: &str) -> Result<Self, Problem> {
        Self::parse(text)
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Leaf for RuleName {
    const FORMAT: &'static str = "rule-name";
    const EXAMPLE: &'static str = "devices-to-api";

    fn parse(text: &str) -> Result<Self, Problem> {
        const MOST: usize = 63;
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if text.is_empty() {
            return Err(Problem::new("the rule's name is empty", "write a name, such as devices-to-api"));
        }
        if let Some(c) = text.chars().find(|c| !allowed(*c)) {
            let mended: String = text.chars().map(|c| if allowed(c) { c } else { '-' }).take(MOST).collect();
            return Err(Problem::new(
                format!("the rule's name contains {c:?}"),
                format!("use only letters, digits, `.`, `_` and `-`, such as {mended}"),
            ));
        }
        if text.len() > MOST {
            return Err(Problem::new(
                format!("the rule's name has {} bytes", text.len()),
                format!("shorten it to {MOST} bytes, such as {}", &text[..MOST]),
            ));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Selects pods by their labels, as Kubernetes does: every requirement must hold; an empty selector selects all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Labels that must have exactly these values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// Requirements on labels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<LabelRequirement>,
}

/// A requirement on one label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelRequirement {
    /// The label that is looked at.
    pub key: String,
    /// How the label is compared with `values`.
    pub operator: LabelOperator,
    /// The values of `In` and `NotIn`; none for `Exists` and `DoesNotExist`.
    #[serde(default, skip_serializing_if = "Vec::is_empty", serialize_with = "super::flow")]
    pub values: Vec<String>,
}

/// See [`LabelRequirement::operator`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LabelOperator {
    /// The label has one of the values.
    In,
    /// The label has none of the values, or is not there.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
}

/// What the rules of one configuration are held against, computed once for all of them.
struct Surroundings {
    pods: Cover,
    external: Cover,
    /// Whether all pod networks are in the file, rather than also in the cluster.
    pods_known: bool,
    external_known: bool,
    kubernetes: bool,
    of_a_file: bool,
}

impl Surroundings {
    /// Those of a rule that says nothing of the node it is for.
    const fn of_a_cluster() -> Self {
        Self {
            pods: Cover(Vec::new()),
            external: Cover(Vec::new()),
            pods_known: false,
            external_known: false,
            kubernetes: true,
            of_a_file: false,
        }
    }
}

/// Networks joined where they can be, disjoint and sorted, so that one look tells what they contain.
struct Cover(Vec<IpNet>);

impl Cover {
    fn of(nets: &[IpNet]) -> Self {
        let mut joined = IpNet::aggregate(&nets.to_vec());
        joined.sort_unstable();
        Self(joined)
    }

    fn contains(&self, net: &IpNet) -> bool {
        let after = self.0.partition_point(|outer| outer <= net);
        // A prefix sorts before all that it contains, and nothing disjoint comes between.
        after > 0 && self.0[after - 1].contains(net)
    }
}

/// Checks all rules. `path` is that of the list.
pub(crate) fn check(
    rules: &[Rule],
    path: &Path<'_>,
    networks: &Networks,
    kubernetes: bool,
    report: &mut Report<'_>,
) {
    let root = Path::Root;
    let section = root.key("networks");
    let around = Surroundings {
        pods: Cover::of(&networks.pod_nets()),
        external: Cover::of(&networks.external_nets()),
        pods_known: !kubernetes && report.intact(&section) && !networks.pods.is_empty(),
        external_known: report.intact(&section) && !networks.external.is_empty(),
        kubernetes,
        of_a_file: true,
    };
    check_list(rules, path, &around, report);
}

/// Checks rules that are not a node's own, but for every node of a cluster: whose networks they are held against, each
/// node knows for itself. `path` is that of the list.
pub(crate) fn check_for_cluster(rules: &[Rule], path: &Path<'_>, report: &mut Report<'_>) {
    check_list(rules, path, &Surroundings::of_a_cluster(), report);
}

fn check_list(rules: &[Rule], path: &Path<'_>, around: &Surroundings, report: &mut Report<'_>) {
    if let Some(problem) = too_many(rules.len()) {
        report.error(path, problem);
        return;
    }
    let mut names = HashMap::with_capacity(rules.len());
    for (index, rule) in rules.iter().enumerate() {
        let at = path.index(index);
        if let Some(first) = names.insert(rule.name.as_str(), index) {
            let first = path.index(first);
            // Of what is in no file, the path is all there is to say.
            let place = if around.of_a_file { report.place(&first.key("name")) } else { first.to_string() };
            report.error(
                &at.key("name"),
                Problem::new(
                    format!("the name `{}` is already taken by the rule at {place}", rule.name),
                    "give each rule a name of its own: hit counters and iptables comments go by it",
                ),
            );
        }
        rule.check(&at, around, report);
    }
}

fn too_many(count: usize) -> Option<Problem> {
    (count > MAX_RULES).then(|| {
        Problem::new(
            format!("{count} rules are more than the {MAX_RULES} that fit"),
            "join rules: one rule takes several networks and several port ranges",
        )
    })
}

impl Rule {
    fn check(&self, path: &Path<'_>, around: &Surroundings, report: &mut Report<'_>) {
        self.check_selectors(path, around, report);
        self.check_ports(path, report);
        let external = self.side(&path.key("external"), self.external.as_deref(), "external", around, report);
        let pods = self.side(&path.key("pods"), self.pods.as_deref(), "pods", around, report);
        if let (Some(external), Some(pods)) = (external, pods)
            && report.intact(path)
            && !families(&external).shares(families(&pods))
        {
            let (some, other) = if families(&external).v4 { ("IPv4", "IPv6") } else { ("IPv6", "IPv4") };
            report.error(
                path,
                Problem::new(
                    format!(
                        "rule `{}` can match nothing: its external side is {some} only, its pods {other} only",
                        self.name
                    ),
                    "give both sides networks of the same IP version",
                ),
            );
        }
    }

    /// Whether its pods are named by labels.
    #[must_use]
    pub const fn selects(&self) -> bool {
        self.pod_selector.is_some() || self.namespace_selector.is_some()
    }

    fn check_selectors(&self, path: &Path<'_>, around: &Surroundings, report: &mut Report<'_>) {
        for (key, selector) in
            [("podSelector", &self.pod_selector), ("namespaceSelector", &self.namespace_selector)]
        {
            if let Some(selector) = selector {
                self.check_selector(key, selector, &path.key(key), around, report);
            }
        }
    }

    fn check_selector(
        &self,
        key: &str,
        selector: &LabelSelector,
        path: &Path<'_>,
        around: &Surroundings,
        report: &mut Report<'_>,
    ) {
        if self.pods.is_some() {
            report.error(
                path,
                Problem::new(
                    format!("rule `{}` has both `pods` and `{key}`", self.name),
                    format!("keep one: `pods` for addresses, `{key}` for labels"),
                ),
            );
        }
        if !around.kubernetes {
            report.error(
                path,
                Problem::new(
                    "pods can be selected by label only with a `kubernetes` section",
                    "add `kubernetes: {}` (inside a cluster) or `kubernetes: {kubeconfig: PATH}`, or use `pods`",
                ),
            );
        }
        let expressions = path.key("matchExpressions");
        for (index, requirement) in selector.match_expressions.iter().enumerate() {
            let takes_values = matches!(requirement.operator, LabelOperator::In | LabelOperator::NotIn);
            if takes_values == requirement.values.is_empty() && report.intact(&expressions.index(index)) {
                let (message, help) = if takes_values {
                    ("this operator needs values", "add `values: [...]`")
                } else {
                    ("this operator takes no values", "remove `values`")
                };
                report.error(&expressions.index(index), Problem::new(message, help));
            }
        }
    }

    fn check_ports(&self, path: &Path<'_>, report: &mut Report<'_>) {
        for (key, ports) in [("ports", &self.ports), ("sourcePorts", &self.source_ports)] {
            let Some(ports) = ports else { continue };
            let path = path.key(key);
            if self.protocol == Protocol::Icmp {
                report.error(
                    &path,
                    Problem::new(
                        format!("ICMP has no ports, so rule `{}` can have none", self.name),
                        format!(
                            "remove `{key}`, or write the protocol the ports belong to: tcp, udp or sctp"
                        ),
                    ),
                );
            }
            ports.check(&path, report);
        }
    }

    /// Checks one side, and returns the networks it stands for, if they are known.
    fn side(
        &self,
        path: &Path<'_>,
        nets: Option<&[Network]>,
        side: &str,
        around: &Surroundings,
        report: &mut Report<'_>,
    ) -> Option<Vec<IpNet>> {
        let (all, known) = match side {
            "pods" => (&around.pods, around.pods_known),
            _ => (&around.external, around.external_known),
        };
        let Some(nets) = nets else {
            let selected = side == "pods" && self.selects();
            return (known && !selected).then(|| all.0.clone());
        };
        if nets.is_empty() && report.intact(path) {
            report.error(
                path,
                Problem::new(
                    format!("the list is empty, so rule `{}` could match nothing", self.name),
                    format!("write at least one network, or remove the key for all of `networks.{side}`"),
                ),
            );
            return None;
        }
        let nets: Vec<IpNet> = nets.iter().map(|network| network.net()).collect();
        super::networks::repeated(path, &nets, report);
        if known {
            for (index, net) in nets.iter().enumerate().filter(|(_, net)| !all.contains(net)) {
                report.error(&path.index(index), outside(net, side, &all.0));
            }
        }
        Some(nets)
    }

    /// The rule as the engines see it. A rule with a selector matches nothing until its pods are known.
    pub(crate) fn to_model(&self) -> model::Rule {
        let nets = |list: &Option<Vec<Network>>| {
            list.as_ref().map(|list| list.iter().map(|network| network.net()).collect::<Vec<IpNet>>())
        };
        let ports = |ports: &Option<Ports>| ports.as_ref().map(Ports::normalised).unwrap_or_default();
        model::Rule {
            name: self.name.0.clone(),
            direction: self.direction,
            external: nets(&self.external),
            pods: if self.selects() { Some(Vec::new()) } else { nets(&self.pods) },
            protocol: self.protocol,
            ports: ports(&self.ports),
            source_ports: ports(&self.source_ports),
            action: self.action,
        }
    }
}

fn outside(net: &IpNet, side: &str, all: &[IpNet]) -> Problem {
    let listed = all.iter().take(4).map(IpNet::to_string).collect::<Vec<_>>().join(", ");
    let more = if all.len() > 4 { ", ..." } else { "" };
    Problem::new(
        format!("{net} is not inside `networks.{side}` ({listed}{more}), where alone packets are judged"),
        format!("write a network inside them, or add {net} to `networks.{side}`"),
    )
}

/// Which IP versions a list of networks has.
#[derive(Clone, Copy)]
struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    const fn shares(self, other: Self) -> bool {
        (self.v4 && other.v4) || (self.v6 && other.v6)
    }
}

fn families(nets: &[IpNet]) -> Families {
    Families {
        v4: nets.iter().any(|net| matches!(net, IpNet::V4(_))),
        v6: nets.iter().any(|net| matches!(net, IpNet::V6(_))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_rules_and_no_more() {
        assert_eq!(too_many(1_000_000), None);
        assert!(too_many(1_000_001).unwrap().message.starts_with("1000001 rules"));
    }

    #[test]
    fn a_cover_contains_what_its_networks_contain_together() {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpNet>>();
        let cover =
            Cover::of(&nets(&["10.0.0.128/25", "10.0.0.0/25", "10.2.0.0/16", "fd00::/64", "10.2.3.0/24"]));
        for inside in nets(&["10.0.0.0/24", "10.0.0.0/32", "10.0.0.255/32", "10.2.255.0/24", "fd00::1/128"]) {
            assert!(cover.contains(&inside), "{inside}");
        }
        for outside in
            nets(&["10.0.0.0/23", "10.0.1.0/32", "10.1.255.255/32", "10.3.0.0/32", "fd00::/63", "9.0.0.0/8"])
        {
            assert!(!cover.contains(&outside), "{outside}");
        }
    }
}
