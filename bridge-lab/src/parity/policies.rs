//! Random policies.

use bridge_agent::model::{Action, Direction, Mode, NodePorts, OnDeny, Policy, PortRange, Protocol, Rule};
use ipnet::IpNet;

use super::dice::Dice;
use super::{LAN, PODS, local};

/// A policy with both families, up to a dozen rules, and often NodePorts.
pub(crate) fn policy(dice: &mut Dice) -> Policy {
    let networks = |dice: &mut Dice, blocks: &[&str]| -> Vec<IpNet> {
        let mut networks: Vec<IpNet> = blocks.iter().map(|block| subnet(dice, block, 4, 10)).collect();
        while dice.percent(40) {
            let block = *dice.pick(blocks);
            networks.push(subnet(dice, block, 4, 14));
        }
        networks
    };
    let external = networks(dice, &LAN);
    let pods = networks(dice, &PODS);
    let mut nodes: Vec<IpNet> = local().into_iter().map(IpNet::from).collect();
    while dice.percent(30) {
        let side = if dice.percent(50) { &external } else { &pods };
        let around = *dice.pick(side);
        nodes.push(IpNet::from(dice.address(&around)));
    }
    let count = dice.below(13);
    let rules: Vec<Rule> = (0..count).map(|number| rule(dice, number, &external, &pods)).collect();
    // In no engine do they change a verdict.
    let (audited, rules) = rules.into_iter().partition(|_| dice.percent(15));
    let node_ports = if dice.percent(60) { Some(node_ports(dice)) } else { None };
    Policy {
        mode: Mode::Enforce,
        on_deny: if dice.percent(50) { OnDeny::Reject } else { OnDeny::Drop },
        pods,
        external,
        nodes,
        rules,
        audited,
        node_ports,
    }
}

fn node_ports(dice: &mut Dice) -> NodePorts {
    let range = if dice.percent(70) { PortRange { first: 30_000, last: 32_767 } } else { range(dice) };
    // Port 0 is unusable, and the configuration refuses it; for a NodePort the tables cannot even express it.
    let range = PortRange { first: range.first.max(1), last: range.last.max(1) };
    let count = dice.below(5);
    NodePorts { range, allow: (0..count).map(|_| inside(dice, range)).collect() }
}

fn rule(dice: &mut Dice, number: usize, external: &[IpNet], pods: &[IpNet]) -> Rule {
    let protocol = *dice.pick(&[
        Protocol::Tcp,
        Protocol::Tcp,
        Protocol::Udp,
        Protocol::Sctp,
        Protocol::Icmp,
        Protocol::Any,
    ]);
    let has_ports = protocol != Protocol::Icmp;
    Rule {
        name: format!("rule-{number}"),
        direction: if dice.percent(50) { Direction::Inbound } else { Direction::Outbound },
        external: prefixes(dice, external),
        pods: prefixes(dice, pods),
        protocol,
        ports: if has_ports && dice.percent(75) { ranges(dice) } else { Vec::new() },
        source_ports: if has_ports && dice.percent(25) { ranges(dice) } else { Vec::new() },
        action: if dice.percent(75) { Action::Allow } else { Action::Deny },
    }
}

/// Half the time all of a side; else some prefixes in its networks, rarely none.
fn prefixes(dice: &mut Dice, networks: &[IpNet]) -> Option<Vec<IpNet>> {
    if dice.percent(50) {
        return None;
    }
    let count = if dice.percent(5) { 0 } else { 1 + dice.below(6) };
    let one = |dice: &mut Dice| {
        let network = *dice.pick(networks);
        let room = network.max_prefix_len() - network.prefix_len();
        let length = network.prefix_len() + dice.within(0, room.min(12));
        let length = if dice.percent(30) { network.max_prefix_len() } else { length };
        IpNet::new(dice.address(&network), length).map_or(network, |net| net.trunc())
    };
    Some((0..count).map(|_| one(dice)).collect())
}

/// Few as often as more than a `multiport` match holds.
fn ranges(dice: &mut Dice) -> Vec<PortRange> {
    let most = if dice.percent(20) { 40 } else { 4 };
    let count = 1 + dice.below(most);
    (0..count).map(|_| range(dice)).collect()
}

fn range(dice: &mut Dice) -> PortRange {
    let first = match dice.below(10) {
        0 => 0,
        1 => u16::MAX,
        2 => *dice.pick(&[1, 255, 256, 65_279, 65_280, 65_534]),
        _ => dice.port(),
    };
    let length = match dice.below(4) {
        0 | 1 => 0,
        2 => 1 + dice.port() % 20,
        _ => dice.port(),
    };
    PortRange { first, last: first.saturating_add(length) }
}

/// A range that lies in `around`.
fn inside(dice: &mut Dice, around: PortRange) -> PortRange {
    let PortRange { first, last } = range(dice);
    let count = around.count();
    let fold = |port: u16| around.first + u16::try_from(u32::from(port) % count).unwrap_or_default();
    let (a, b) = (fold(first), fold(last));
    PortRange { first: a.min(b), last: a.max(b) }
}

/// Returns a network inside `block`, longer by `least` to `most` bits.
fn subnet(dice: &mut Dice, block: &str, least: u8, most: u8) -> IpNet {
    let block: IpNet = block.parse().expect("a prefix");
    let length = block.prefix_len() + dice.within(least, most);
    IpNet::new(dice.address(&block), length).map_or(block, |net| net.trunc())
}
