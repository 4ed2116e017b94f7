//! From the desired state to the tables by which the kernel judges packets.
//!
//! Pure: nothing here touches the kernel. The tables are specified in [`bridge_common::filter::policy`]; [`mod@reference`]
//! reads them as the kernel does. Among the rules that match the first packet of a flow a deny wins, then the
//! lowest index; if none matches, the packet is denied.

mod addresses;
pub mod budget;
mod envelope;
mod intern;
mod interval;
mod numbered;
mod pairs;
mod ports;
pub mod reference;
mod sets;
mod tables;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::IpAddr;

use bridge_common::filter::policy::{AddressInfo, RuleInfo, direction, origin, reference as abi, side};
use ipnet::IpNet;

use crate::model::{Action, Direction, NodePorts, Policy, PortRange, Rule};
use addresses::{Naming, Side, Use};
use numbered::Numbered;
use pairs::Combination;
use ports::{Claim, Exhausted, Ports, rank};
use sets::Emitter;
use tables::names;
pub use tables::{Error, MAX_INTERVALS, MAX_PAGES, MAX_PAIRS, NODE_PORTS_RULE, Tables, TablesStats};

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
