//! `rules`: the flows that may be opened, in the configuration file and in policies alike.

use std::collections::HashMap;
use std::fmt;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bounds;
use super::labels::{LabelSelector, check_selector};
use super::leaf::{Leaf, Problem, leaf};
use super::network::Network;
use super::networks::Networks;
use super::ports::Ports;
use super::report::{Path, Report};
use crate::model::{self, Action, Direction, Mode, PortRange, Protocol};

/// The most rules a configuration may have.
pub const MAX_RULES: usize = 1_000_000;

/// One rule: every criterion must match. Among matching rules a deny wins; without a match a flow is denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    /// Unique among the rules; 1 to 63 bytes of letters, digits, `.`, `_` and `-`, such as `devices-to-api`.
    pub name: RuleName,
    /// The side that opens the flow: `inbound` from a LAN host to a pod, `outbound` from a pod to a LAN host.
    pub direction: Direction,
    /// LAN hosts, inside `networks.external`, in CIDR notation, such as `[192.168.31.67/32, "fd00:31::/64"]`. Left out: all of
    /// `networks.external`.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "super::flow::flow_option")]
    pub external: Option<Vec<Network>>,
    /// Pods by address, inside `networks.pods`, in CIDR notation, such as `[10.200.1.0/24]`. Left out, and no selector either:
    /// all of `networks.pods`.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "super::flow::flow_option")]
    pub pods: Option<Vec<Network>>,
    /// Pods by label, instead of `pods`, such as `{matchLabels: {app: api}}`. Needs a `kubernetes` section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<Box<LabelSelector>>,
    /// Pods by the labels of their namespace, instead of `pods`; with `podSelector`, both must match. Left out: every
    /// namespace. Needs a `kubernetes` section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<Box<LabelSelector>>,
    /// The protocol. `any` covers every IP protocol; with ports, those that have ports: TCP, UDP and SCTP.
    pub protocol: Protocol,
    /// Destination ports: numbers and ranges with both ends included, such as `[40002, "60001-60100"]`. Required for `tcp`,
    /// `udp` and `sctp`; `["1-65535"]` covers all ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-shown" = true))]
    pub ports: Option<Ports>,
    /// Source ports, in the form of `ports`, such as `["61001-61100"]`. Left out: all ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_ports: Option<Ports>,
    /// The action for a flow that matches.
    #[serde(default)]
    pub action: Action,
    /// `audit`: the rule neither allows nor denies; flows about which it would decide are counted and reported. Left out:
    /// that of the policy, else `enforce`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

/// The name of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleName(String);

leaf!(RuleName);

impl RuleName {
    /// # Errors
    /// `text` is not a name; the problem has the remedy.
    pub fn new(text: &str) -> Result<Self, Problem> {
        Self::parse(text)
    }

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

/// The parts of a configuration that its rules are checked against, computed once for all rules.
struct Context {
    pods: Cover,
    external: Cover,
    /// Whether all pod networks are in the file, rather than also in the cluster.
    pods_known: bool,
    external_known: bool,
    kubernetes: bool,
    /// Whether the rules are those of a configuration file, rather than of a policy in the cluster.
    of_a_file: bool,
}

impl Context {
    /// The context of a policy, which applies to every node.
    const fn of_a_policy() -> Self {
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

/// Disjoint, sorted networks, adjacent ones joined; a binary search finds whether they contain another.
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

/// Checks the rules of a configuration file. `path` points to the list.
pub(crate) fn check(
    rules: &[Rule],
    path: &Path<'_>,
    networks: &Networks,
    kubernetes: bool,
    report: &mut Report<'_>,
) {
    let root = Path::Root;
    let section = root.key("networks");
    let context = Context {
        pods: Cover::of(&networks.pod_nets()),
        external: Cover::of(&networks.external_nets()),
        pods_known: !kubernetes && report.intact(&section) && !networks.pods.is_empty(),
        external_known: report.intact(&section) && !networks.external.is_empty(),
        kubernetes,
        of_a_file: true,
    };
    check_list(rules, path, &context, report);
}

/// Checks the rules of a policy, which apply to every node, each with networks of its own. `path` points to the list.
pub(crate) fn check_policy(rules: &[Rule], path: &Path<'_>, report: &mut Report<'_>) {
    bound("rules", rules.len(), bounds::RULES, path, report);
    check_list(rules, path, &Context::of_a_policy(), report);
}

/// Reports a list of a policy that is longer than the API server takes.
fn bound(name: &str, length: usize, limit: usize, path: &Path<'_>, report: &mut Report<'_>) {
    if length > limit {
        let message = format!("`{name}` has {length} items, and a policy may have {limit}");
        report.error(path, Problem::new(message, "split it over several rules or policies"));
    }
}

fn check_list(rules: &[Rule], path: &Path<'_>, context: &Context, report: &mut Report<'_>) {
    if let Some(problem) = too_many(rules.len()) {
        report.error(path, problem);
        return;
    }
    let mut names = HashMap::with_capacity(rules.len());
    for (index, rule) in rules.iter().enumerate() {
        let at = path.index(index);
        if let Some(first) = names.insert(rule.name.as_str(), index) {
            let first = path.index(first);
            // A policy has no lines to point to.
            let place = if context.of_a_file { report.place(&first.key("name")) } else { first.to_string() };
            report.error(
                &at.key("name"),
                Problem::new(
                    format!("the name `{}` is already taken by the rule at {place}", rule.name),
                    "give each rule a name of its own: hit counters and iptables comments go by it",
                ),
            );
        }
        rule.check(&at, context, report);
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
    fn check(&self, path: &Path<'_>, context: &Context, report: &mut Report<'_>) {
        self.check_selectors(path, context, report);
        self.check_ports(path, context, report);
        let external =
            self.side(&path.key("external"), self.external.as_deref(), "external", context, report);
        let pods = self.side(&path.key("pods"), self.pods.as_deref(), "pods", context, report);
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

    /// Whether it selects pods by labels.
    #[must_use]
    pub const fn selects(&self) -> bool {
        self.pod_selector.is_some() || self.namespace_selector.is_some()
    }

    fn check_selectors(&self, path: &Path<'_>, context: &Context, report: &mut Report<'_>) {
        for (key, selector) in
            [("podSelector", &self.pod_selector), ("namespaceSelector", &self.namespace_selector)]
        {
            let Some(selector) = selector else { continue };
            let path = path.key(key);
            if self.pods.is_some() {
                let message = format!("rule `{}` has both `pods` and `{key}`", self.name);
                let help = format!("keep one: `pods` for addresses, `{key}` for labels");
                report.error(&path, Problem::new(message, help));
            }
            if !context.kubernetes {
                let message = "pods can be selected by label only with a `kubernetes` section";
                let help = "add `kubernetes: {}` (inside a cluster) or `kubernetes: {kubeconfig: PATH}`, or use `pods`";
                report.error(&path, Problem::new(message, help));
            }
            check_selector(key, selector, &path, report);
            if !context.of_a_file {
                for (name, length, limit) in selector.sizes() {
                    bound(name, length, limit, &path, report);
                }
            }
        }
    }

    fn check_ports(&self, path: &Path<'_>, context: &Context, report: &mut Report<'_>) {
        let needs_ports = matches!(self.protocol, Protocol::Tcp | Protocol::Udp | Protocol::Sctp);
        if needs_ports && self.ports.is_none() && report.intact(path) {
            let message = format!("rule `{}` has no `ports`", self.name);
            let help = r#"write `ports`, such as ports: [40002]; for all of them: ports: ["1-65535"]"#;
            report.error(path, Problem::new(message, help));
        }
        for (key, ports) in [("ports", &self.ports), ("sourcePorts", &self.source_ports)] {
            let Some(ports) = ports else { continue };
            let path = path.key(key);
            if self.protocol == Protocol::Icmp {
                let message = format!("ICMP has no ports, so rule `{}` can have none", self.name);
                let help =
                    format!("remove `{key}`, or write the protocol the ports belong to: tcp, udp or sctp");
                report.error(&path, Problem::new(message, help));
            }
            ports.check(&path, report);
            if !context.of_a_file {
                bound(key, ports.0.len(), bounds::PORTS, &path, report);
            }
        }
    }

    /// Checks one side, and returns its networks, if they are known.
    fn side(
        &self,
        path: &Path<'_>,
        nets: Option<&[Network]>,
        side: &str,
        context: &Context,
        report: &mut Report<'_>,
    ) -> Option<Vec<IpNet>> {
        let (all, known) = match side {
            "pods" => (&context.pods, context.pods_known),
            _ => (&context.external, context.external_known),
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
        super::networks::no_hosts(path, &nets, report);
        if !context.of_a_file {
            bound(side, nets.len(), bounds::NETWORKS, path, report);
        }
        if known {
            for (index, net) in nets.iter().enumerate().filter(|(_, net)| !all.contains(net)) {
                report.error(&path.index(index), outside(net, side, &all.0));
            }
        }
        Some(nets)
    }

    /// Whether it decides nothing.
    pub(crate) fn is_audited(&self) -> bool {
        self.mode == Some(Mode::Audit)
    }

    /// The rule as the engines see it. A rule with a selector matches nothing until its pods are known.
    pub(crate) fn to_model(&self) -> model::Rule {
        let nets = |list: &Option<Vec<Network>>| {
            list.as_ref().map(|list| list.iter().map(|network| network.net()).collect::<Vec<IpNet>>())
        };
        // For a protocol that has ports, all ports are no restriction. `any` with ports excludes protocols without.
        let all = |ranges: &[PortRange]| ranges == [EVERY_PORT] && self.protocol != Protocol::Any;
        let ports = |ports: &Option<Ports>| {
            let ranges = ports.as_ref().map(Ports::normalised).unwrap_or_default();
            if all(&ranges) { Vec::new() } else { ranges }
        };
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

/// Written `1-65535`: 0 cannot be written, and is never used on the wire.
const EVERY_PORT: PortRange = PortRange { first: 1, last: u16::MAX };

/// The IP versions that a list of networks has.
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
