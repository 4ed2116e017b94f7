//! From the desired state to the tables by which the kernel judges packets.
//!
//! Pure: nothing here touches the kernel. The tables are specified in [`bridge_common::filter::policy`]; [`mod@reference`]
//! reads them as the kernel does. Among the rules that match the first packet of a flow a deny wins, then the
//! lowest index; if none matches, the packet is denied.

mod addresses;
pub mod budget;
mod envelope;
mod intern;
mod pairs;
mod ports;
pub mod reference;
mod sets;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::IpAddr;

use bridge_common::filter::policy::{
    AddressInfo, PairKey, PairSets, PortIntervals, PortPage, RuleInfo, RuleSet, direction, origin,
    reference as abi, side,
};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::{Action, Direction, NodePorts, Policy, PortRange, Rule};
use addresses::{Naming, Side, Use};
use pairs::Combination;
use ports::{Claim, Exhausted, Ports, rank};
use sets::Emitter;

/// The most pairs of address classes a policy may need: the kernel holds each in about 64 bytes.
pub const MAX_PAIRS: usize = 4_000_000;

/// The most port intervals that may be computed on the way, intermediate results included: about a second, and
/// 130 MB.
pub const MAX_INTERVALS: usize = 1 << 24;

/// The most pages that port lookups may need, 1 KiB of kernel memory each.
pub const MAX_PAGES: usize = 1 << 18;

/// The name of the rule that stands for [`NodePorts::allow`].
pub const NODE_PORTS_RULE: &str = "nodePorts";

/// A policy as the kernel reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Prefixes, without host bits, ascending, each once; the longest that matches an address holds for it.
    /// Class 0 is named by no rule that names both sides, and in no pair.
    pub addresses: Vec<(IpNet, AddressInfo)>,
    /// Ascending by key, each once.
    pub pairs: Vec<(PairKey, PairSets)>,
    /// By index; the first says "no rule matches".
    pub rule_sets: Vec<RuleSet>,
    /// By [`AddressInfo::origin`]: the distinct properties of addresses of pods and LAN hosts.
    pub origins: Vec<AddressInfo>,
    /// By index.
    pub narrows: Vec<PortIntervals>,
    /// By index; the first is not used.
    pub pages: Vec<PortPage>,
    /// By index: the rules of the policy, then [`NODE_PORTS_RULE`], if NodePorts are judged, then the rules in audit mode.
    pub rules: Vec<RuleInfo>,
    /// For [`bridge_common::filter::control::Settings::global_sets`].
    pub global_sets: [u32; 2],
    /// For [`bridge_common::filter::control::Settings::node_ports`].
    pub node_ports: [u16; 2],
    /// For [`bridge_common::filter::control::Settings::node_port_root`].
    pub node_port_root: u32,
    /// Length of `rules`.
    pub rule_count: u32,
}

/// How many entries each table has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TablesStats {
    /// IPv4 prefixes.
    pub addresses4: usize,
    /// IPv6 prefixes.
    pub addresses6: usize,
    /// Pairs of address classes.
    pub pairs: usize,
    /// Sets of rules.
    pub rule_sets: usize,
    /// Port lookups with few intervals, 64 bytes each.
    pub narrows: usize,
    /// Pages of port lookups with many intervals, 1 KiB each.
    pub pages: usize,
    /// Rules, the one for NodePorts included.
    pub rules: usize,
}

impl Tables {
    /// How large they are.
    #[must_use]
    pub fn stats(&self) -> TablesStats {
        let addresses4 = self.addresses.iter().filter(|(prefix, _)| matches!(prefix, IpNet::V4(_))).count();
        TablesStats {
            addresses4,
            addresses6: self.addresses.len() - addresses4,
            pairs: self.pairs.len(),
            rule_sets: self.rule_sets.len(),
            narrows: self.narrows.len(),
            pages: self.pages.len(),
            rules: self.rules.len(),
        }
    }
}

/// Why a policy cannot be compiled.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An address would be both a pod's and a LAN host's.
    #[error(
        "pod network {pods} and external network {external} overlap: an address must be on one side; \
         write networks.external without the pods' addresses"
    )]
    OverlappingNetworks {
        /// Of [`Policy::pods`].
        pods: IpNet,
        /// Of [`Policy::external`].
        external: IpNet,
    },
    /// Rules that name both sides name too many combinations.
    #[error(
        "rules that name both external and pods make {pairs} pairs of address lists, of which {MAX_PAIRS} can be \
         held; most come from {rules}: leave out external or pods there, name the same list of addresses in all of \
         them, or write one prefix in place of many addresses"
    )]
    TooManyPairs {
        /// How many it would be.
        pairs: u64,
        /// Those that contribute most.
        rules: String,
    },
    /// The port ranges of rules for the same addresses overlap in too many ways.
    #[error(
        "the ports and source ports of {rules} overlap in more than {MAX_INTERVALS} ways: give rules for the same \
         addresses the same sourcePorts, or leave them out, and join rules that differ in their ports only"
    )]
    TooManyPortRanges {
        /// Whose they are.
        rules: String,
    },
    /// The tables for port lookup would take too much memory.
    #[error(
        "the ports and source ports of the rules need {pages} pages of 1 KiB, of which {MAX_PAGES} can be held: give \
         rules for the same addresses the same sourcePorts, or leave them out, and join rules that differ in their \
         ports only"
    )]
    TooManyPages {
        /// How many it would be.
        pages: usize,
    },
    /// More rules than a verdict can name.
    #[error("{rules} rules are more than the {limit} that the tables can distinguish; join rules that differ in their ports only", limit = abi::RULE - 1)]
    TooManyRules {
        /// How many there are.
        rules: usize,
    },
}

/// Rules of one direction that name the same addresses.
struct Group {
    direction: usize,
    external: Naming,
    pods: Naming,
    /// Indexes, ascending.
    rules: Vec<u32>,
}

/// The tables for `policy` on a node whose own addresses are `local`.
///
/// # Errors
/// If networks overlap, or if the policy needs more than [`MAX_PAIRS`], [`MAX_INTERVALS`] or [`MAX_PAGES`]. The text
/// says which rules to change, and how.
pub fn compile(policy: &Policy, local: &[IpAddr]) -> Result<Tables, Error> {
    compile_within(policy, local, MAX_INTERVALS)
}

/// All rules of a policy, by index.
#[derive(Clone, Copy)]
struct Numbered<'p> {
    rules: &'p [Rule],
    audited: &'p [Rule],
    /// Index of the first rule in audit mode.
    first_audited: u32,
}

impl<'p> Numbered<'p> {
    fn get(&self, index: u32) -> &'p Rule {
        match index.checked_sub(self.first_audited) {
            Some(audited) => &self.audited[audited as usize],
            None => &self.rules[index as usize],
        }
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &'p Rule)> + use<'p> {
        (0..).zip(self.rules).chain((self.first_audited..).zip(self.audited))
    }
}

fn compile_within(policy: &Policy, local: &[IpAddr], max_intervals: usize) -> Result<Tables, Error> {
    let first_audited = policy.rules.len() + usize::from(policy.node_ports.is_some());
    let number = |count: usize| {
        let number = u32::try_from(count).ok().filter(|&count| count < abi::RULE);
        number.ok_or(Error::TooManyRules { rules: policy.rules.len() + policy.audited.len() })
    };
    let rule_count = number(first_audited + policy.audited.len())?;
    let first_audited = number(first_audited)?;
    let rules = Numbered { rules: &policy.rules, audited: &policy.audited, first_audited };
    let mut sides = [Side::new(side::EXTERNAL, &policy.external), Side::new(side::POD, &policy.pods)];
    if let Some((external, pods)) = sides[0].overlap(&sides[1]) {
        return Err(Error::OverlappingNetworks { pods, external });
    }
    let groups = groups(rules, &mut sides);

    let mut ports = Ports::new(max_intervals, first_audited);
    let mut global = [0; 2];
    let mut uses = sides.each_ref().map(|side| vec![Use::default(); side.list_count()]);
    let mut combinations = Vec::new();
    for group in &groups {
        let members: Vec<(u32, &Rule)> = group.rules.iter().map(|&index| (index, rules.get(index))).collect();
        let table = ports.table(&members).map_err(|Exhausted| Error::TooManyPortRanges {
            rules: names(members.iter().map(|(_, rule)| *rule)),
        })?;
        match (group.external, group.pods) {
            (Naming::Nothing, _) | (_, Naming::Nothing) => {}
            (Naming::Everything, Naming::Everything) => global[group.direction] = table,
            (Naming::List(list), Naming::Everything) => {
                uses[0][list as usize].tables[group.direction] = table
            }
            (Naming::Everything, Naming::List(list)) => {
                uses[1][list as usize].tables[group.direction] = table
            }
            (Naming::List(external), Naming::List(pods)) => {
                uses[0][external as usize].pairs = true;
                uses[1][pods as usize].pairs = true;
                let direction = group.direction;
                combinations.push(Combination { direction, external, pods, table, rules: &group.rules });
            }
        }
    }

    let mut addresses = addresses::entries(&mut sides, &uses, &policy.nodes, local, &mut ports)?;
    let mut pairs = pairs::pairs(&combinations, &sides, rules, &mut ports)?;
    let node_ports = policy.node_ports.as_ref();
    let node_port_partition = node_ports
        .map_or(Ok(0), |node_ports| node_port_partition(node_ports, first_audited - 1, &mut ports))
        .map_err(|Exhausted| Error::TooManyPortRanges { rules: "nodePorts.allow".to_owned() })?;

    let mut emitter = Emitter::new(&ports);
    let mut emit = |sets: &mut [u32; 2]| *sets = sets.map(|table| emitter.set(table));
    emit(&mut global);
    addresses.iter_mut().for_each(|(_, info)| emit(&mut info.sets));
    pairs.iter_mut().for_each(|(_, pair)| emit(&mut pair.sets));
    let node_port_root = emitter.root(node_port_partition);
    let origins = number_origins(&mut addresses);
    Ok(Tables {
        addresses,
        origins,
        pairs,
        rules: rule_infos(policy),
        global_sets: global,
        node_ports: node_ports.map_or([0; 2], |node_ports| [node_ports.range.first, node_ports.range.last]),
        node_port_root,
        rule_count,
        ..emitter.finish()?
    })
}

/// Numbers the distinct properties of addresses of pods and LAN hosts; those that are too many share the last number,
/// which has none.
fn number_origins(addresses: &mut [(IpNet, AddressInfo)]) -> Vec<AddressInfo> {
    let mut origins = Vec::new();
    let mut numbers: HashMap<AddressInfo, u16> = HashMap::new();
    for (_, info) in addresses {
        if info.side & (side::POD | side::EXTERNAL) == 0 {
            continue;
        }
        info.origin = match numbers.get(info) {
            Some(number) => *number,
            None => match u16::try_from(origins.len()).ok().filter(|number| *number < origin::OVERFLOW) {
                Some(number) => {
                    numbers.insert(*info, number);
                    origins.push(AddressInfo { origin: number, ..*info });
                    number
                }
                None => origin::OVERFLOW,
            },
        };
    }
    origins
}

/// Rules sorted by what they name; those that name nothing are left out.
fn groups(rules: Numbered<'_>, sides: &mut [Side; 2]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    let mut by_names: HashMap<(usize, Naming, Naming), usize> = HashMap::new();
    for (index, rule) in rules.iter() {
        let external = sides[0].naming(rule.external.as_deref());
        let pods = sides[1].naming(rule.pods.as_deref());
        if external == Naming::Nothing || pods == Naming::Nothing {
            continue;
        }
        let direction = usize::from(number(rule.direction));
        let group = *by_names.entry((direction, external, pods)).or_insert_with(|| {
            groups.push(Group { direction, external, pods, rules: Vec::new() });
            groups.len() - 1
        });
        groups[group].rules.push(index);
    }
    groups
}

/// The ports of the NodePort range that are allowed, by rule `index`.
fn node_port_partition(node_ports: &NodePorts, index: u32, ports: &mut Ports) -> Result<u32, Exhausted> {
    let NodePorts { range, allow } = node_ports;
    let inside = |allowed: &PortRange| {
        let (first, last) = (allowed.first.max(range.first), allowed.last.min(range.last));
        (first <= last).then_some(PortRange { first, last })
    };
    let allowed: Vec<PortRange> = allow.iter().filter_map(inside).collect();
    if allowed.is_empty() {
        return Ok(0); // an empty list would claim every port
    }
    ports.sweep(&[Claim { rank: rank(index, Action::Allow), ports: &allowed, source_ports: &[] }])
}

fn rule_infos(policy: &Policy) -> Vec<RuleInfo> {
    let node_ports =
        policy.node_ports.iter().map(|_| rule_info(NODE_PORTS_RULE, direction::NODE_PORT, Action::Allow));
    let of = |rule: &Rule| rule_info(&rule.name, number(rule.direction), rule.action);
    let audited = policy.audited.iter().map(|rule| RuleInfo { audit: 1, ..of(rule) });
    policy.rules.iter().map(of).chain(node_ports).chain(audited).collect()
}

fn rule_info(name: &str, direction: u8, action: Action) -> RuleInfo {
    let mut info = RuleInfo {
        name: [0; 64],
        direction: direction.into(),
        deny: (action == Action::Deny).into(),
        audit: 0,
    };
    let length = name.floor_char_boundary(info.name.len() - 1);
    info.name[..length].copy_from_slice(&name.as_bytes()[..length]);
    info
}

const fn number(direction: Direction) -> u8 {
    match direction {
        Direction::Inbound => direction::INBOUND,
        Direction::Outbound => direction::OUTBOUND,
    }
}

/// The first few of `rules`, for a message.
fn names<'a>(rules: impl ExactSizeIterator<Item = &'a Rule>) -> String {
    const SHOWN: usize = 5;
    let more = rules.len().saturating_sub(SHOWN);
    let shown: Vec<&str> = rules.take(SHOWN).map(|rule| rule.name.as_str()).collect();
    let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{and_more}", shown.join(", "))
}
