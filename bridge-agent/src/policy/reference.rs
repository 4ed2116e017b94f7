//! The policy's meaning, twice: read from the tables as the kernel reads them, and from the rules one by one as they
//! are documented. Both must agree.

use std::net::IpAddr;

use bridge_common::filter::policy::{AddressInfo, PairKey, RuleSet, class, direction, reference, side};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Tables;
use crate::model::{Action, Direction, Policy, PortRange, Protocol, Rule};

/// The first packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// One of [`bridge_common::filter::policy::class`].
    pub protocol: usize,
    /// Host byte order; 0 where the protocol has no ports.
    pub source_port: u16,
    /// Host byte order; 0 where the protocol has no ports.
    pub destination_port: u16,
}

/// Which direction's rules judge `packet`, whose source is believed and whose addresses are final, by the tables: one of
/// [`bridge_common::filter::policy::direction`]. `None`: no rule restricts it.
#[must_use]
pub fn scope_tables(tables: &Tables, packet: &Packet) -> Option<u8> {
    let has = |address, bits| look_up(tables, address).side & bits != 0;
    if packet.source.is_ipv4() != packet.destination.is_ipv4() {
        None
    } else if has(packet.destination, side::POD) && !has(packet.source, side::POD | side::NODE | side::LOCAL)
    {
        Some(direction::INBOUND)
    } else if has(packet.source, side::POD) && has(packet.destination, side::EXTERNAL) {
        Some(direction::OUTBOUND)
    } else if has(packet.source, side::EXTERNAL)
        && has(packet.destination, side::LOCAL)
        && has_ports(packet.protocol)
        && tables.node_ports != [0, 0]
        && (tables.node_ports[0]..=tables.node_ports[1]).contains(&packet.destination_port)
    {
        Some(direction::NODE_PORT)
    } else {
        None
    }
}

/// Index and action of the rule that decides about `packet`, by the tables. `None`: no rule matches, or the packet
/// is out of scope.
///
/// # Panics
/// If a table refers to an entry that is not there.
#[must_use]
pub fn evaluate_tables(tables: &Tables, packet: &Packet) -> Option<(u32, Action)> {
    evaluate_sets(tables, packet, |set| &set.roots)
}

/// Returns the rule in audit mode that would decide, as [`evaluate_tables`].
#[must_use]
pub fn audit_tables(tables: &Tables, packet: &Packet) -> Option<(u32, Action)> {
    scope_tables(tables, packet).filter(|direction| *direction != direction::NODE_PORT)?;
    evaluate_sets(tables, packet, |set| &set.audited)
}

fn evaluate_sets(
    tables: &Tables,
    packet: &Packet,
    roots: fn(&RuleSet) -> &[u32; class::COUNT],
) -> Option<(u32, Action)> {
    let direction = scope_tables(tables, packet)?;
    if direction == direction::NODE_PORT {
        return verdict(resolve(tables, tables.node_port_root, packet.destination_port));
    }
    let (source, destination) = (look_up(tables, packet.source), look_up(tables, packet.destination));
    let (external, pod) =
        if direction == direction::INBOUND { (source, destination) } else { (destination, source) };
    if external.side & side::EXTERNAL == 0 {
        return None;
    }
    let key = PairKey { external: external.class, pod: pod.class };
    let pair = tables.pairs.iter().find(|(other, _)| *other == key);
    let pair = pair.map_or([0; 2], |(_, pair)| pair.sets);
    let mut winner = None;
    for sets in [tables.global_sets, external.sets, pod.sets, pair] {
        let set = tables.rule_sets[sets[usize::from(direction)] as usize];
        let mut answer = resolve(tables, roots(&set)[packet.protocol], packet.destination_port);
        if reference::tag(answer) != reference::LEAF {
            answer = resolve(tables, answer, packet.source_port);
        }
        winner = better(winner, verdict(answer));
    }
    winner
}

fn look_up(tables: &Tables, address: IpAddr) -> AddressInfo {
    let matching = tables.addresses.iter().filter(|(prefix, _)| prefix.contains(&address));
    matching.max_by_key(|(prefix, _)| prefix.prefix_len()).map_or(AddressInfo::default(), |&(_, info)| info)
}

fn resolve(tables: &Tables, root: u32, port: u16) -> u32 {
    let value = (root & reference::VALUE) as usize;
    let [high, low] = port.to_be_bytes().map(usize::from);
    match reference::tag(root) {
        reference::LEAF => root,
        reference::INTERVALS => {
            let narrow = &tables.narrows[value];
            let slot = narrow.first.iter().filter(|&&first| first <= port).count() - 1;
            narrow.references[slot]
        }
        reference::DIRECTORY => {
            let entry = tables.pages[value].references[high];
            if reference::tag(entry) == reference::PAGE {
                tables.pages[(entry & reference::VALUE) as usize].references[low]
            } else {
                entry
            }
        }
        _ => panic!("reference {root:#x} is a page outside a directory"),
    }
}

fn verdict(leaf: u32) -> Option<(u32, Action)> {
    assert_eq!(reference::tag(leaf), reference::LEAF, "reference {leaf:#x} is no verdict");
    let index = (leaf & reference::RULE).checked_sub(1)?;
    Some((index, if leaf & reference::DENY == 0 { Action::Allow } else { Action::Deny }))
}

fn better(a: Option<(u32, Action)>, b: Option<(u32, Action)>) -> Option<(u32, Action)> {
    a.into_iter().chain(b).min_by_key(|&(index, action)| (action == Action::Allow, index))
}

/// As [`scope_tables`], by the model. `local`: the own addresses of the node.
#[must_use]
pub fn scope_model(policy: &Policy, local: &[IpAddr], packet: &Packet) -> Option<u8> {
    let is_node = |address: &IpAddr| local.contains(address) || contains(&policy.nodes, *address);
    let is_external = |address: &IpAddr| !is_node(address) && contains(&policy.external, *address);
    let is_pod = |address: &IpAddr| !is_node(address) && contains(&policy.pods, *address);
    let Packet { source, destination, .. } = packet;
    if source.is_ipv4() != destination.is_ipv4() {
        return None;
    }
    // Traffic inside the cluster is out of scope; every other source is judged.
    if is_pod(destination) {
        return (!is_pod(source) && !is_node(source)).then_some(direction::INBOUND);
    }
    if is_pod(source) && is_external(destination) {
        return Some(direction::OUTBOUND);
    }
    let node_ports = policy.node_ports.as_ref()?;
    let to_node_port = is_external(source)
        && local.contains(destination)
        && has_ports(packet.protocol)
        && node_ports.range.contains(packet.destination_port);
    to_node_port.then_some(direction::NODE_PORT)
}

/// As [`evaluate_tables`], by the model: every rule is asked. `local`: the own addresses of the node.
#[must_use]
pub fn evaluate_model(policy: &Policy, local: &[IpAddr], packet: &Packet) -> Option<(u32, Action)> {
    if scope_model(policy, local, packet)? == direction::NODE_PORT {
        let allow = &policy.node_ports.as_ref()?.allow;
        let allowed = allow.iter().any(|range| range.contains(packet.destination_port));
        let index = u32::try_from(policy.rules.len()).ok()?;
        return allowed.then_some((index, Action::Allow));
    }
    winner_among(&policy.rules, policy, local, packet)
}

/// Returns index and action of the rule in audit mode that would decide, as [`evaluate_model`].
#[must_use]
pub fn audit_model(policy: &Policy, local: &[IpAddr], packet: &Packet) -> Option<(u32, Action)> {
    let (index, action) = winner_among(&policy.audited, policy, local, packet)?;
    let first = policy.rules.len() + usize::from(policy.node_ports.is_some());
    Some((u32::try_from(first).ok()? + index, action))
}

fn winner_among(rules: &[Rule], policy: &Policy, local: &[IpAddr], packet: &Packet) -> Option<(u32, Action)> {
    let (direction, external, pod) = match scope_model(policy, local, packet)? {
        direction::INBOUND => (Direction::Inbound, packet.source, packet.destination),
        direction::OUTBOUND => (Direction::Outbound, packet.destination, packet.source),
        _ => return None,
    };
    // Rules can allow the addresses of `networks.external` only.
    if local.contains(&external) || contains(&policy.nodes, external) || !contains(&policy.external, external)
    {
        return None;
    }
    winner(rules, direction, external, pod, packet)
}

/// Returns index and action of the rule that decides about `packet` between these two sides: among matching rules a deny
/// wins, then the first.
#[must_use]
pub fn winner(
    rules: &[Rule],
    direction: Direction,
    external: IpAddr,
    pod: IpAddr,
    packet: &Packet,
) -> Option<(u32, Action)> {
    let mut first = None;
    for (index, rule) in (0..).zip(rules) {
        if !misses(rule, direction, external, pod, packet).is_empty() {
            continue;
        }
        if rule.action == Action::Deny {
            return Some((index, Action::Deny));
        }
        first = first.or(Some((index, Action::Allow)));
    }
    first
}

/// A criterion of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Criterion {
    /// [`Rule::direction`].
    Direction,
    /// [`Rule::external`].
    External,
    /// [`Rule::pods`].
    Pods,
    /// [`Rule::protocol`].
    Protocol,
    /// [`Rule::ports`].
    Ports,
    /// [`Rule::source_ports`].
    SourcePorts,
}

/// Criteria of a rule that a packet does not meet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Misses(u8);

impl Misses {
    const ALL: [Criterion; 6] = [
        Criterion::Direction,
        Criterion::External,
        Criterion::Pods,
        Criterion::Protocol,
        Criterion::Ports,
        Criterion::SourcePorts,
    ];

    fn note(&mut self, criterion: Criterion, holds: bool) {
        self.0 |= u8::from(!holds) << criterion as u8;
    }

    /// Whether the rule matches.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The criterion, if it is the only one.
    #[must_use]
    pub fn only(self) -> Option<Criterion> {
        let mut missed = Self::ALL.into_iter().filter(|criterion| self.0 & 1 << *criterion as u8 != 0);
        missed.next().filter(|_| missed.next().is_none())
    }
}

/// Returns the criteria of `rule` that `packet` does not meet; none: the rule matches.
#[must_use]
pub fn misses(rule: &Rule, direction: Direction, external: IpAddr, pod: IpAddr, packet: &Packet) -> Misses {
    let named =
        |ranges: &[PortRange], port| ranges.is_empty() || ranges.iter().any(|range| range.contains(port));
    let by_port = !rule.ports.is_empty() || !rule.source_ports.is_empty();
    let protocol = match rule.protocol {
        Protocol::Tcp => packet.protocol == class::TCP,
        Protocol::Udp => packet.protocol == class::UDP,
        Protocol::Sctp => packet.protocol == class::SCTP,
        Protocol::Icmp => packet.protocol == class::ICMP,
        Protocol::Any => !by_port || has_ports(packet.protocol),
    };
    let mut misses = Misses::default();
    misses.note(Criterion::Direction, rule.direction == direction);
    misses.note(Criterion::External, rule.external.as_ref().is_none_or(|named| contains(named, external)));
    misses.note(Criterion::Pods, rule.pods.as_ref().is_none_or(|named| contains(named, pod)));
    misses.note(Criterion::Protocol, protocol);
    misses.note(Criterion::Ports, named(&rule.ports, packet.destination_port));
    misses.note(Criterion::SourcePorts, named(&rule.source_ports, packet.source_port));
    misses
}

/// Whether a protocol, one of [`bridge_common::filter::policy::class`], has ports.
#[must_use]
pub fn has_ports(protocol: usize) -> bool {
    matches!(protocol, class::TCP | class::UDP | class::SCTP)
}

fn contains(prefixes: &[IpNet], address: IpAddr) -> bool {
    prefixes.iter().any(|prefix| prefix.contains(&address))
}
