//! The pieces that rules are made of.

use ipnet::IpNet;

use super::ports;
use crate::firewall::Options;
use crate::iptables::ruleset::{Chain, Family, Jump, Line};
use crate::model::{Mode, Policy, Protocol, Rule};

/// The last chain of every denied packet.
pub(in crate::iptables) const DENY: &str = "BRIDGE-DENY";

/// The networks of one family, joined where they can be.
pub(super) struct Networks {
    pub(super) external: Vec<IpNet>,
    pub(super) pods: Vec<IpNet>,
    pub(super) nodes: Vec<IpNet>,
}

impl Networks {
    pub(super) fn of(policy: &Policy, family: Family) -> Self {
        let select = |all: &[IpNet]| select(all, family);
        Self { external: select(&policy.external), pods: select(&policy.pods), nodes: select(&policy.nodes) }
    }
}

/// The prefixes of `family`, joined where that changes nothing.
pub(super) fn select(all: &[IpNet], family: Family) -> Vec<IpNet> {
    let wanted =
        |net: &&IpNet| matches!((net, family), (IpNet::V4(_), Family::V4) | (IpNet::V6(_), Family::V6));
    IpNet::aggregate(&all.iter().filter(wanted).map(IpNet::trunc).collect())
}

/// Packets that open a flow, whether or not connection tracking takes them for part of an older one.
pub(super) const SYN: &str = " -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN";
pub(super) const INIT: &str = " -p sctp -m sctp --chunk-types only INIT";

/// Sends packets that open a flow to `chain`: the policy of now decides, also on the ports of an established flow.
pub(super) fn opening(to: &str) -> Vec<Line> {
    [SYN, INIT].map(|matches| line(matches, "bridge:opening", &format!("-g {to}"))).into()
}

/// Refuses packets that belong to no flow and do not open one.
pub(super) fn openers() -> [Line; 2] {
    let deny = format!("-g {DENY}");
    // A masqueraded flow to another node is judged packet by packet.
    let new = " -m conntrack ! --ctstate ESTABLISHED";
    [
        line(&format!(" -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN{new}"), "bridge:not-syn", &deny),
        line(&format!(" -p sctp -m sctp ! --chunk-types only INIT{new}"), "bridge:not-init", &deny),
    ]
}

/// The target for packets that are never answered: a reset for a packet outside the window would end its connection.
pub(super) const fn silent_deny(mode: Mode) -> &'static str {
    match mode {
        Mode::Enforce => "-j DROP",
        Mode::Audit => "-g BRIDGE-DENY",
    }
}

pub(super) fn log(mode: Mode, options: &Options) -> Vec<Line> {
    let prefix = match mode {
        Mode::Enforce => "bridge denied: ",
        Mode::Audit => "bridge would deny: ",
    };
    let limited = |rate| format!(" -m limit --limit {rate}/sec --limit-burst {rate}");
    let target = format!("-j LOG --log-prefix \"{prefix}\"");
    options.log_per_second.iter().map(|rate| line(&limited(rate), "bridge:log", &target)).collect()
}

/// A rule with the prefixes it has in one family; `None` as in the rule.
pub(super) struct Selected<'a> {
    pub(super) rule: &'a Rule,
    pub(super) family: Family,
    pub(super) external: Option<Vec<IpNet>>,
    pub(super) pods: Option<Vec<IpNet>>,
}

impl<'a> Selected<'a> {
    /// `None` if no packet of the family can match.
    pub(super) fn of(rule: &'a Rule, family: Family) -> Option<Self> {
        let side = |nets: &Option<Vec<IpNet>>| nets.as_ref().map(|nets| select(nets, family));
        let selected = Self { rule, family, external: side(&rule.external), pods: side(&rule.pods) };
        let empty = |side: &Option<Vec<IpNet>>| side.as_ref().is_some_and(Vec::is_empty);
        (!empty(&selected.external) && !empty(&selected.pods)).then_some(selected)
    }

    /// Returns the layer 4 matches, one text for each line.
    pub(super) fn layer4(&self) -> Vec<String> {
        let rule = self.rule;
        let with_ports = |protocol: &str| -> Vec<String> {
            let matches = ports::matches(&rule.source_ports, &rule.ports);
            matches.iter().map(|ports| format!(" -p {protocol}{ports}")).collect()
        };
        match rule.protocol {
            Protocol::Tcp => with_ports("tcp"),
            Protocol::Udp => with_ports("udp"),
            Protocol::Sctp => with_ports("sctp"),
            // Only queries open a flow to connection tracking: replies and errors that belong to none are invalid.
            Protocol::Icmp => {
                vec![format!(" -p {}", if self.family == Family::V4 { "icmp" } else { "ipv6-icmp" })]
            }
            Protocol::Any if rule.ports.is_empty() && rule.source_ports.is_empty() => vec![String::new()],
            Protocol::Any => ["tcp", "udp", "sctp"].into_iter().flat_map(with_ports).collect(),
        }
    }

    /// Returns the number of texts that [`Self::layer4`] makes.
    pub(super) fn layer4_count(&self) -> usize {
        let rule = self.rule;
        let ports = || ports::count(&rule.source_ports, &rule.ports);
        match rule.protocol {
            Protocol::Tcp | Protocol::Udp | Protocol::Sctp => ports(),
            Protocol::Icmp => 1,
            Protocol::Any if rule.ports.is_empty() && rule.source_ports.is_empty() => 1,
            Protocol::Any => ports().saturating_mul(3),
        }
    }
}

pub(super) fn chain(name: &str, lines: Vec<Line>) -> Chain {
    Chain { name: name.into(), lines }
}

pub(super) fn line(matches: &str, name: &str, target: &str) -> Line {
    Line { matches: matches.into(), name: name.into(), target: target.into() }
}

pub(super) fn jump(hook: &'static str, to: &str) -> Jump {
    Jump { hook, line: line("", "bridge:jump", &format!("-j {to}")) }
}

pub(super) fn established() -> Line {
    line(" -m conntrack --ctstate RELATED,ESTABLISHED", "bridge:established", "-j RETURN")
}

/// One goto for each prefix.
pub(super) fn each(prefixes: &[IpNet], side: &str, name: &str, to: &str) -> Vec<Line> {
    prefixes.iter().map(|prefix| line(&format!(" {side} {prefix}"), name, &format!("-g {to}"))).collect()
}
