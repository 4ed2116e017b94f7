//! Renders a policy as rules; pure.
//!
//! ```text
//! raw PREROUTING    -> BRIDGE-PREROUTING   sources that cannot be true              -> BRIDGE-SPOOFED
//! mangle PREROUTING -> BRIDGE-NODEPORT     LAN host to a NodePort of this node: mark, before DNAT
//! filter FORWARD    -> BRIDGE-FORWARD      replies and related: return, the rest    -> BRIDGE-SCOPE
//!   BRIDGE-SCOPE                           marked as NodePort                       -> BRIDGE-NODEPORT-NEW
//!                                          destination is a pod                     -> BRIDGE-TO-POD
//!                                          destination is a LAN host                -> BRIDGE-TO-LAN
//!                                          scope strict: everything else            -> BRIDGE-DENY
//!   BRIDGE-TO-POD                          from a node or a pod: return; from a LAN host -> BRIDGE-INBOUND
//!                                          from elsewhere                           -> BRIDGE-DENY
//!   BRIDGE-TO-LAN                          from a pod                               -> BRIDGE-OUTBOUND
//!   BRIDGE-INBOUND, BRIDGE-OUTBOUND        packets that open no flow, denies, allows, then -> BRIDGE-DENY
//!   BRIDGE-IN-AUDITED, BRIDGE-OUT-AUDITED  called before the denies: rules in audit mode, each returns
//! ```
//!
//! FORWARD comes after DNAT and before SNAT: a packet has the real peer as its source and the final destination,
//! whichever Service, hostPort or masquerade it goes through. So translation exempts nothing.
//!
//! "Return" ends in the built-in chain, since own chains lead to one another by goto: a packet that bridge allows still has
//! to pass the rules of others (network policies of a CNI, for example). bridge only restricts.

mod dispatch;
mod node_ports;
mod parts;
mod ports;
mod sources;

pub(super) use self::parts::DENY;
use self::parts::{
    Networks, Selected, chain, each, established, jump, line, log, openers, opening, select, silent_deny,
};
use super::ruleset::{Chain, Family, Line, Ruleset, Table, TableRules};
use crate::config::Scope;
pub use crate::firewall::Options;
use crate::model::{Action, Direction, Mode, NodePorts, OnDeny, Policy, RoutedPods, Rule};

/// Entry from FORWARD of table filter.
pub(super) const FORWARD: &str = "BRIDGE-FORWARD";
/// Entry from INPUT of table filter; exists only if NodePorts are judged.
const INPUT: &str = "BRIDGE-INPUT";
const SCOPE: &str = "BRIDGE-SCOPE";
/// Judges by the source of the packet, which is the real peer.
const PEER: &str = "BRIDGE-PEER";
const TO_POD: &str = "BRIDGE-TO-POD";
const TO_LAN: &str = "BRIDGE-TO-LAN";
const INBOUND: &str = "BRIDGE-INBOUND";
const OUTBOUND: &str = "BRIDGE-OUTBOUND";

/// Returns the rules that enforce `policy` in the tables of `family`.
///
/// Empty if the policy has no networks in that family: no packet can then be in scope, but the outer packet of a tunnel.
#[must_use]
pub fn ruleset(policy: &Policy, options: &Options, family: Family) -> Ruleset {
    let of = Networks::of(policy, family);
    let node_ports = policy.node_ports.as_ref().filter(|_| !of.external.is_empty());
    let mut tables = Vec::new();
    if !of.pods.is_empty() || !policy.pods.is_empty() && !options.topology.tunnels.is_empty() {
        tables.push(sources::table(policy, options, family, &of));
    }
    if let Some(node_ports) = node_ports {
        tables.push(node_ports::table(policy, node_ports, options, &of));
    }
    if !of.pods.is_empty() || node_ports.is_some() || options.scope == Scope::Strict {
        tables.push(filter(policy, options, family, &of, node_ports));
    }
    Ruleset { family, tables }
}

/// Returns the input of `iptables-restore --noflush` (`ip6tables-restore`) for a host without rules of bridge.
#[must_use]
pub fn restore_input(policy: &Policy, options: &Options, family: Family) -> String {
    super::plan::fresh(&ruleset(policy, options, family))
}

fn filter(
    policy: &Policy,
    options: &Options,
    family: Family,
    networks: &Networks,
    node_ports: Option<&NodePorts>,
) -> TableRules {
    let strict = options.scope == Scope::Strict;
    let unscoped = || line("", "bridge:strict", &format!("-g {DENY}"));
    let node_port = node_ports.map(|node_ports| node_ports::judged(node_ports, options));
    let mut jumps = vec![jump("FORWARD", FORWARD)];
    let mut entry = opening(SCOPE);
    // The pod's own node sees the address of this one: the real peer is judged here, packet by packet.
    entry.extend(options.topology.remote.iter().filter(|_| !networks.pods.is_empty()).map(|remote| {
        let masqueraded = format!(" -o {} -m conntrack --ctstate SNAT --ctdir ORIGINAL", remote.interface);
        line(&masqueraded, "bridge:scope", &format!("-g {SCOPE}"))
    }));
    entry.extend([established(), line("", "bridge:scope", &format!("-g {SCOPE}"))]);
    let mut chains = vec![chain(FORWARD, entry)];
    let mut lines: Vec<Line> = node_port.iter().cloned().collect();
    if !networks.pods.is_empty() {
        lines.extend(each(&networks.pods, "-d", "bridge:to-pod", TO_POD));
        lines.extend(each(&networks.external, "-d", "bridge:to-lan", TO_LAN));
    }
    if strict {
        lines.push(unscoped());
    }
    chains.push(chain(SCOPE, lines));
    if let (Some(judged), Some(node_ports)) = (node_port, node_ports) {
        jumps.push(jump("INPUT", INPUT));
        chains.push(chain(INPUT, vec![judged]));
        chains.push(node_ports::judge(node_ports));
    }
    if !networks.pods.is_empty() {
        let leave = if strict { format!("-g {DENY}") } else { "-j RETURN".into() };
        chains.push(chain(TO_POD, to_pod(options, family, networks, &leave)));
        chains.push(chain(PEER, peer(policy.mode, networks)));
        if !networks.external.is_empty() {
            let mut lines = from_nodes(networks, &leave);
            lines.extend(neighbour_discovery(family));
            lines.extend(options.topology.remote.iter().flat_map(|RoutedPods { interface, pods }| {
                let from = |prefix| format!(" -i {interface} -s {prefix}");
                let prefixes = select(pods, family).into_iter();
                prefixes.map(|prefix| line(&from(prefix), "bridge:transit", &leave)).collect::<Vec<_>>()
            }));
            lines.extend(each(&networks.pods, "-s", "bridge:outbound", OUTBOUND));
            if strict {
                lines.push(unscoped());
            }
            chains.push(chain(TO_LAN, lines));
            for direction in [Direction::Inbound, Direction::Outbound] {
                chains.extend(judging(policy, family, direction));
            }
        }
    }
    chains.push(chain(DENY, deny(policy, options)));
    TableRules { table: Table::Filter, jumps, chains }
}

/// Passes traffic inside the cluster; the rest is judged by its peer.
fn to_pod(options: &Options, family: Family, networks: &Networks, leave: &str) -> Vec<Line> {
    let mut lines = from_nodes(networks, leave);
    lines.extend(neighbour_discovery(family));
    // Raw PREROUTING has refused pods' addresses that came by a wrong interface.
    lines.extend(networks.pods.iter().map(|prefix| line(&format!(" -s {prefix}"), "bridge:pod", leave)));
    let judge = || format!("-g {PEER}");
    // Pods of other nodes are judged there, by the real peer, unless this node hides it.
    for RoutedPods { interface, .. } in &options.topology.remote {
        let translated = format!(" -o {interface} -m conntrack --ctstate DNAT,SNAT");
        lines.push(line(&translated, "bridge:translated", &judge()));
        lines.push(line(&format!(" -o {interface}"), "bridge:transit", leave));
    }
    lines.push(line("", "bridge:inbound", &judge()));
    lines
}

fn peer(mode: Mode, networks: &Networks) -> Vec<Line> {
    let mut lines = vec![line(" -m conntrack --ctstate INVALID", "bridge:invalid", silent_deny(mode))];
    lines.extend(each(&networks.external, "-s", "bridge:inbound", INBOUND));
    // No rule can name another source.
    lines.push(line("", "bridge:foreign", &format!("-g {DENY}")));
    lines
}

fn from_nodes(networks: &Networks, leave: &str) -> Vec<Line> {
    let sides = ["-s", "-d"].into_iter();
    let matches = sides.flat_map(|side| networks.nodes.iter().map(move |node| format!(" {side} {node}")));
    matches.map(|matches| line(&matches, "bridge:node", leave)).collect()
}

/// Passes neighbour solicitations and advertisements, which only a bridge forwards: connection tracking leaves them alone.
fn neighbour_discovery(family: Family) -> Vec<Line> {
    let types: &[u8] = if family == Family::V6 { &[135, 136] } else { &[] };
    let matches = types.iter().map(|kind| format!(" -p ipv6-icmp -m icmp6 --icmpv6-type {kind}"));
    matches.map(|matches| line(&matches, "bridge:neighbour", "-j RETURN")).collect()
}

fn judge(direction: Direction) -> (&'static str, &'static str) {
    match direction {
        Direction::Inbound => (INBOUND, "bridge:inbound"),
        Direction::Outbound => (OUTBOUND, "bridge:outbound"),
    }
}

/// Rules of one direction and action, as one family has them.
fn selected(rules: &[Rule], family: Family, direction: Direction, action: Action) -> Vec<Selected<'_>> {
    let rules = rules.iter().filter(|rule| rule.direction == direction && rule.action == action);
    rules.filter_map(|rule| Selected::of(rule, family)).collect()
}

/// In audit mode a denied packet returns from BRIDGE-DENY: it must not pass a second list of rules and count twice.
fn may_dispatch(mode: Mode, action: Action) -> bool {
    action == Action::Allow || mode == Mode::Enforce
}

/// Returns the number of lines that the rules of `policy` take in `family`, without rendering them.
#[must_use]
pub fn line_count(policy: &Policy, family: Family) -> usize {
    let kinds = [Direction::Inbound, Direction::Outbound].into_iter().flat_map(|direction| {
        [Action::Deny, Action::Allow].into_iter().map(move |action| (direction, action))
    });
    kinds
        .map(|(direction, action)| {
            let rules = selected(&policy.rules, family, direction, action);
            let audited = selected(&policy.audited, family, direction, action);
            dispatch::count(&rules, may_dispatch(policy.mode, action))
                .saturating_add(dispatch::count(&audited, false))
        })
        .fold(0, usize::saturating_add)
}

/// Returns the chain that judges new flows of one direction, and the chains it leads to.
fn judging(policy: &Policy, family: Family, direction: Direction) -> Vec<Chain> {
    let mut lines = vec![line(" -m conntrack --ctstate INVALID", "bridge:invalid", silent_deny(policy.mode))];
    if family == Family::V6 {
        // conntrack takes more for a query than RFC 4443 does, and leaves neighbour discovery alone.
        let no_query = " -p ipv6-icmp -m icmp6 ! --icmpv6-type 128";
        lines.push(line(no_query, "bridge:icmp-type", silent_deny(policy.mode)));
    }
    lines.extend(openers());
    let mut others = Vec::new();
    let audited = audited(policy, family, direction);
    if let Some(chain) = &audited {
        lines.push(line("", "bridge:audited", &format!("-j {}", chain.name)));
    }
    others.extend(audited);
    for action in [Action::Deny, Action::Allow] {
        let rules = selected(&policy.rules, family, direction, action);
        let section = dispatch::section(&rules, direction, action, may_dispatch(policy.mode, action));
        lines.extend(section.lines);
        others.extend(section.chains);
    }
    lines.push(line("", "bridge:no-rule", &format!("-g {DENY}")));
    let mut chains = vec![chain(judge(direction).0, lines)];
    chains.extend(others);
    chains
}

/// Returns the chain of the rules in audit mode of one direction, which counts, and returns whatever matches.
fn audited(policy: &Policy, family: Family, direction: Direction) -> Option<Chain> {
    let lines: Vec<Line> = [Action::Deny, Action::Allow]
        .into_iter()
        .flat_map(|action| {
            let rules = selected(&policy.audited, family, direction, action);
            // The target of an allow is a return.
            dispatch::section(&rules, direction, Action::Allow, false).lines
        })
        .collect();
    let name = if direction == Direction::Inbound { "BRIDGE-IN-AUDITED" } else { "BRIDGE-OUT-AUDITED" };
    (!lines.is_empty()).then(|| chain(name, lines))
}

/// The lines of the last chain of every denied packet.
fn deny(policy: &Policy, options: &Options) -> Vec<Line> {
    let mut lines = log(policy.mode, options);
    match (policy.mode, policy.on_deny) {
        // The counter of this rule is the number of packets that would be denied; they return to FORWARD.
        (Mode::Audit, _) => lines.push(line("", "bridge:audit", "")),
        (Mode::Enforce, OnDeny::Drop) => lines.push(line("", "bridge:deny", "-j DROP")),
        (Mode::Enforce, OnDeny::Reject) => {
            // The default of REJECT is icmp-port-unreachable, in IPv6 icmp6-port-unreachable.
            lines.push(line(" -p tcp", "bridge:deny", "-j REJECT --reject-with tcp-reset"));
            lines.push(line(" -p udp", "bridge:deny", "-j REJECT"));
            lines.push(line("", "bridge:deny", "-j DROP"));
        }
    }
    lines
}

#[cfg(test)]
mod tests;
