//! From a policy to rules: pure.
//!
//! ```text
//! filter FORWARD -> BRIDGE-FORWARD            established and related: return
//!                     source is a LAN host -> BRIDGE-FROM-LAN  destination is a pod      -> BRIDGE-INBOUND
//!                     source is a pod      -> BRIDGE-FROM-POD  destination is a LAN host -> BRIDGE-OUTBOUND
//!                     scope strict: anything else                                        -> BRIDGE-DENY
//! BRIDGE-INBOUND, BRIDGE-OUTBOUND             what opens no flow, denies, allows, else   -> BRIDGE-DENY
//! mangle PREROUTING -> BRIDGE-NODEPORT        LAN host to a NodePort of this node, before DNAT
//! ```
//!
//! "Return" ends in the built-in chain, since own chains lead to one another by goto: what bridge allows still has to
//! pass whatever else stands there (network policies of a CNI, say). bridge only ever takes away.

mod dispatch;
mod node_ports;
mod ports;

use std::num::NonZeroU32;

use ipnet::IpNet;

use super::ruleset::{Chain, Family, Jump, Line, Ruleset, Table, TableRules};
use crate::config::{PacketMark, Scope};
use crate::model::{Action, Direction, Mode, OnDeny, Policy, Protocol, Rule};

/// Entry from FORWARD of table filter.
pub(super) const FORWARD: &str = "BRIDGE-FORWARD";
/// Entry from INPUT of table filter; exists only if denied NodePort traffic is to be rejected.
const INPUT: &str = "BRIDGE-INPUT";
const FROM_LAN: &str = "BRIDGE-FROM-LAN";
const FROM_POD: &str = "BRIDGE-FROM-POD";
const INBOUND: &str = "BRIDGE-INBOUND";
const OUTBOUND: &str = "BRIDGE-OUTBOUND";
/// Where every denied packet ends.
pub(super) const DENY: &str = "BRIDGE-DENY";

/// What a table says beside the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Whether forwarded traffic out of scope is let be.
    pub scope: Scope,
    /// One bit of the packet mark: set between mangle PREROUTING and filter on NodePort packets that are to be
    /// rejected, since the kernel allows REJECT in table filter only. No other program may use that bit.
    pub mark: NonZeroU32,
    /// Denied packets (in audit mode: those that would be) that may be logged in a second; `None`: none.
    pub log_per_second: Option<NonZeroU32>,
}

impl Default for Options {
    fn default() -> Self {
        Self { scope: Scope::Scoped, mark: PacketMark::default().get(), log_per_second: None }
    }
}

/// Everything that has to stand in the tables of `family` for `policy` to hold.
///
/// Empty if the policy has nothing in that family: no packet can then be in scope.
#[must_use]
pub fn ruleset(policy: &Policy, options: &Options, family: Family) -> Ruleset {
    let of_family = Networks::of(policy, family);
    let in_scope = !of_family.external.is_empty() && !of_family.pods.is_empty();
    let mut tables = Vec::new();
    let node_ports = policy.node_ports.as_ref().filter(|_| !of_family.external.is_empty());
    if let Some(node_ports) = node_ports {
        tables.push(node_ports::table(policy, node_ports, options, &of_family));
    }
    if in_scope || node_ports.is_some() || options.scope == Scope::Strict {
        let rejected =
            node_ports.filter(|_| policy.mode == Mode::Enforce && policy.on_deny == OnDeny::Reject);
        let rejects = rejected.map_or_else(Vec::new, |n| node_ports::reject_lines(n, options));
        tables.push(filter(policy, options, family, &of_family, rejects));
    }
    Ruleset { family, tables }
}

/// What `iptables-restore --noflush` (`ip6tables-restore`) is to be given on a host where bridge has no rules yet.
#[must_use]
pub fn restore_input(policy: &Policy, options: &Options, family: Family) -> String {
    super::plan::fresh(&ruleset(policy, options, family))
}

/// The networks of one family, joined where they can be.
struct Networks {
    external: Vec<IpNet>,
    pods: Vec<IpNet>,
    nodes: Vec<IpNet>,
}

impl Networks {
    fn of(policy: &Policy, family: Family) -> Self {
        let select = |all: &[IpNet]| select(all, family);
        Self { external: select(&policy.external), pods: select(&policy.pods), nodes: select(&policy.nodes) }
    }
}

/// The prefixes of `family`, joined where that changes nothing.
fn select(all: &[IpNet], family: Family) -> Vec<IpNet> {
    let wanted =
        |net: &&IpNet| matches!((net, family), (IpNet::V4(_), Family::V4) | (IpNet::V6(_), Family::V6));
    IpNet::aggregate(&all.iter().filter(wanted).map(IpNet::trunc).collect())
}

fn filter(
    policy: &Policy,
    options: &Options,
    family: Family,
    networks: &Networks,
    node_port_rejects: Vec<Line>,
) -> TableRules {
    let strict = options.scope == Scope::Strict;
    let unscoped = || line("", "bridge:strict", &format!("-g {DENY}"));
    let mut entry = vec![established()];
    entry.extend(node_port_rejects.iter().cloned());
    let scoped = !networks.external.is_empty() && !networks.pods.is_empty();
    if scoped {
        entry.extend(each(&networks.external, "-s", "bridge:from-lan", FROM_LAN));
        entry.extend(each(&networks.pods, "-s", "bridge:from-pod", FROM_POD));
    }
    if strict {
        entry.push(unscoped());
    }
    let mut jumps = vec![jump("FORWARD", FORWARD)];
    let mut chains = vec![chain(FORWARD, entry)];
    if !node_port_rejects.is_empty() {
        jumps.push(jump("INPUT", INPUT));
        chains.push(chain(INPUT, [vec![established()], node_port_rejects].concat()));
    }
    if scoped {
        for (direction, from, to) in [
            (Direction::Inbound, FROM_LAN, &networks.pods),
            (Direction::Outbound, FROM_POD, &networks.external),
        ] {
            let (name, comment) = judge(direction);
            let leave = if strict { format!("-g {DENY}") } else { "-j RETURN".into() };
            let mut lines: Vec<Line> = ["-s", "-d"]
                .iter()
                .flat_map(|side| networks.nodes.iter().map(move |node| format!(" {side} {node}")))
                .map(|matches| line(&matches, "bridge:node", &leave))
                .collect();
            lines.extend(each(to, "-d", comment, name));
            if strict {
                lines.push(unscoped());
            }
            chains.push(chain(from, lines));
        }
        for direction in [Direction::Inbound, Direction::Outbound] {
            chains.extend(judging(policy, family, direction));
        }
    }
    chains.push(chain(DENY, deny(policy, options)));
    TableRules { table: Table::Filter, jumps, chains }
}

fn judge(direction: Direction) -> (&'static str, &'static str) {
    match direction {
        Direction::Inbound => (INBOUND, "bridge:inbound"),
        Direction::Outbound => (OUTBOUND, "bridge:outbound"),
    }
}

/// The chain that gives the verdict on new flows of one direction, and those it leads to.
fn judging(policy: &Policy, family: Family, direction: Direction) -> Vec<Chain> {
    let mut lines = vec![
        line(" -m conntrack --ctstate INVALID", "bridge:invalid", silent_deny(policy.mode)),
        // A flow to a Service was judged, or found out of scope, by the address it was sent to.
        line(" -m conntrack --ctstate DNAT", "bridge:translated", "-j RETURN"),
    ];
    if family == Family::V6 {
        // conntrack takes more for a query than RFC 4443 does, and leaves neighbour discovery alone.
        let no_query = " -p ipv6-icmp -m icmp6 ! --icmpv6-type 128";
        lines.push(line(no_query, "bridge:icmp-type", silent_deny(policy.mode)));
    }
    lines.extend(openers());
    let mut others = Vec::new();
    for action in [Action::Deny, Action::Allow] {
        let rules: Vec<Selected<'_>> = policy
            .rules
            .iter()
            .filter(|rule| rule.direction == direction && rule.action == action)
            .filter_map(|rule| Selected::of(rule, family))
            .collect();
        // A denied packet is to be counted once in audit mode too, so the way back from BRIDGE-DENY must not lead
        // through a second list of rules.
        let may_dispatch = action == Action::Allow || policy.mode == Mode::Enforce;
        let section = dispatch::section(&rules, direction, action, may_dispatch);
        lines.extend(section.lines);
        others.extend(section.chains);
    }
    lines.push(line("", "bridge:no-rule", &format!("-g {DENY}")));
    let mut chains = vec![chain(judge(direction).0, lines)];
    chains.extend(others);
    chains
}

/// Refuses what has no flow and does not open one.
fn openers() -> [Line; 2] {
    let deny = format!("-g {DENY}");
    [
        line(" -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN", "bridge:not-syn", &deny),
        line(" -p sctp -m sctp ! --chunk-types only INIT", "bridge:not-init", &deny),
    ]
}

/// Never answered: a reset for a packet outside the window would end the connection it belongs to.
const fn silent_deny(mode: Mode) -> &'static str {
    match mode {
        Mode::Enforce => "-j DROP",
        Mode::Audit => "-g BRIDGE-DENY",
    }
}

/// Where every denied packet ends.
fn deny(policy: &Policy, options: &Options) -> Vec<Line> {
    let mut lines = log(policy.mode, options);
    match (policy.mode, policy.on_deny) {
        // The counter of this rule is the number of packets that would be denied; they return to FORWARD.
        (Mode::Audit, _) => lines.push(line("", "bridge:audit", "")),
        (Mode::Enforce, OnDeny::Drop) => lines.push(line("", "bridge:deny", "-j DROP")),
        (Mode::Enforce, OnDeny::Reject) => {
            // icmp-port-unreachable and icmp6-port-unreachable are what REJECT answers with if not told otherwise.
            lines.push(line(" -p tcp", "bridge:deny", "-j REJECT --reject-with tcp-reset"));
            lines.push(line(" -p udp", "bridge:deny", "-j REJECT"));
            lines.push(line("", "bridge:deny", "-j DROP"));
        }
    }
    lines
}

fn log(mode: Mode, options: &Options) -> Vec<Line> {
    let prefix = match mode {
        Mode::Enforce => "bridge denied: ",
        Mode::Audit => "bridge would deny: ",
    };
    let limited = |rate| format!(" -m limit --limit {rate}/sec --limit-burst {rate}");
    let target = format!("-j LOG --log-prefix \"{prefix}\"");
    options.log_per_second.iter().map(|rate| line(&limited(rate), "bridge:log", &target)).collect()
}

/// A rule with the prefixes it has in one family; `None` as in the rule.
struct Selected<'a> {
    rule: &'a Rule,
    family: Family,
    external: Option<Vec<IpNet>>,
    pods: Option<Vec<IpNet>>,
}

impl<'a> Selected<'a> {
    /// `None` if no packet of the family can match.
    fn of(rule: &'a Rule, family: Family) -> Option<Self> {
        let side = |nets: &Option<Vec<IpNet>>| nets.as_ref().map(|nets| select(nets, family));
        let selected = Self { rule, family, external: side(&rule.external), pods: side(&rule.pods) };
        let empty = |side: &Option<Vec<IpNet>>| side.as_ref().is_some_and(Vec::is_empty);
        (!empty(&selected.external) && !empty(&selected.pods)).then_some(selected)
    }

    /// The layer 4 part, one text for each rule it takes.
    fn layer4(&self) -> Vec<String> {
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
}

fn chain(name: &str, lines: Vec<Line>) -> Chain {
    Chain { name: name.into(), lines }
}

fn line(matches: &str, name: &str, target: &str) -> Line {
    Line { matches: matches.into(), name: name.into(), target: target.into() }
}

fn jump(hook: &'static str, to: &str) -> Jump {
    Jump { hook, line: line("", "bridge:jump", &format!("-j {to}")) }
}

fn established() -> Line {
    line(" -m conntrack --ctstate RELATED,ESTABLISHED", "bridge:established", "-j RETURN")
}

/// One goto for each prefix.
fn each(prefixes: &[IpNet], side: &str, name: &str, to: &str) -> Vec<Line> {
    prefixes.iter().map(|prefix| line(&format!(" {side} {prefix}"), name, &format!("-g {to}"))).collect()
}

#[cfg(test)]
mod tests;
