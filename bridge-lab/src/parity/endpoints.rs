//! Senders and receivers: at the edges of the policy's networks, and one beyond.

use std::net::IpAddr;

use bridge_agent::model::{Direction, Policy, PortRange, Protocol, Rule};
use ipnet::IpNet;

use super::dice::Dice;
use super::{LAN, PODS, Side, elsewhere, local};

/// The 5-tuple of a flow, by its first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Address of who opens it.
    pub source: IpAddr,
    /// Address of who is asked.
    pub destination: IpAddr,
    /// 0 where there are none.
    pub source_port: u16,
    /// 0 where there are none.
    pub destination_port: u16,
}

impl Flow {
    /// The side that its first packet comes from.
    #[must_use]
    pub fn from(&self) -> Side {
        side(self.source)
    }

    /// The flow that its replies would be, were they first.
    #[must_use]
    pub fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
        }
    }
}

/// Whether an address is a pod's, of any node.
pub(super) fn is_pod(policy: &Policy, address: IpAddr) -> bool {
    let within = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&address));
    within(&policy.pods) && !within(&policy.nodes)
}

/// Returns the side that the node routes an address to.
pub(super) fn side(address: IpAddr) -> Side {
    let block =
        |blocks: &[&str]| blocks.iter().any(|b| b.parse::<IpNet>().is_ok_and(|b| b.contains(&address)));
    if block(&LAN) || block(&elsewhere::BEYOND) || elsewhere::other_node().contains(&address) {
        Side::Lan
    } else if block(&elsewhere::OVERLAY) {
        Side::Overlay
    } else {
        Side::Pods
    }
}

/// A flow that a rule speaks of, nearly speaks of, or none does; and the protocol that goes with it.
pub(crate) fn flow(dice: &mut Dice, policy: &Policy) -> (Flow, Protocol) {
    let near =
        if dice.percent(75) && !policy.rules.is_empty() { Some(dice.pick(&policy.rules)) } else { None };
    let inbound = near.map_or(dice.percent(50), |rule| rule.direction == Direction::Inbound);
    // Now and then the way round that the rule does not speak of.
    let inbound = inbound ^ dice.percent(8);
    let v4 = dice.percent(50);
    let external = address(dice, near.and_then(|r| r.external.as_deref()), &policy.external, &LAN, v4);
    let pod = address(dice, near.and_then(|r| r.pods.as_deref()), &policy.pods, &PODS, v4);
    let (source, destination) = if inbound { (external, pod) } else { (pod, external) };
    let protocol = protocol(dice, near);
    let flow = Flow {
        source,
        destination,
        source_port: port(dice, near.map_or(&[], |rule| rule.source_ports.as_slice()), true),
        destination_port: port(dice, near.map_or(&[], |rule| rule.ports.as_slice()), false),
    };
    (flow, protocol)
}

/// From the LAN to a port of the node that is in the NodePort range, or just beside it.
pub(crate) fn node_port_flow(dice: &mut Dice, policy: &Policy) -> Option<(Flow, Protocol)> {
    let node_ports = policy.node_ports.as_ref()?;
    let v4 = dice.percent(50);
    let choices = [vec![node_ports.range], node_ports.allow.clone()].concat();
    let flow = Flow {
        source: address(dice, None, &policy.external, &LAN, v4),
        destination: *local().iter().find(|address| address.is_ipv4() == v4)?,
        source_port: 1024 + dice.port() % 50_000,
        destination_port: port(dice, &choices, false),
    };
    Some((flow, *dice.pick(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp])))
}

/// Returns an address on the side of `of`: a router on the way to it.
pub(crate) fn beyond(dice: &mut Dice, policy: &Policy, of: IpAddr) -> IpAddr {
    let (networks, blocks) = match side(of) {
        Side::Lan => (&policy.external, &LAN),
        Side::Pods | Side::Overlay => (&policy.pods, &PODS),
    };
    address(dice, None, networks, blocks, of.is_ipv4())
}

/// Mostly in the rule's prefixes or at their edges; else in the networks, at their edges, or anywhere in the blocks.
fn address(
    dice: &mut Dice,
    named: Option<&[IpNet]>,
    networks: &[IpNet],
    blocks: &[&str],
    v4: bool,
) -> IpAddr {
    let of_family = |nets: &[IpNet]| -> Vec<IpNet> {
        nets.iter().filter(|net| net.addr().is_ipv4() == v4).copied().collect()
    };
    let blocks: Vec<IpNet> = of_family(&blocks.iter().filter_map(|b| b.parse().ok()).collect::<Vec<_>>());
    let (named, networks) = (of_family(named.unwrap_or(networks)), of_family(networks));
    let choice = match dice.below(10) {
        0 => &blocks,
        1 | 2 if !networks.is_empty() => &networks,
        _ if !named.is_empty() => &named,
        _ if !networks.is_empty() => &networks,
        _ => &blocks,
    };
    let net = *dice.pick(choice);
    let address = if dice.percent(20) { dice.beside(&net) } else { dice.address(&net) };
    let usable = blocks.iter().any(|block| block.contains(&address)) && !local().contains(&address);
    // Beside the edge of a block is nowhere, and the node sends nothing here.
    if usable { address } else { usable_in(&blocks) }
}

/// Any address that is not the node's.
fn usable_in(blocks: &[IpNet]) -> IpAddr {
    let host = |net: &IpNet| net.hosts().find(|address| !local().contains(address));
    blocks.iter().find_map(host).unwrap_or(IpAddr::from([192, 168, 0, 1]))
}

fn protocol(dice: &mut Dice, near: Option<&Rule>) -> Protocol {
    let with_ports = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    match near.map(|rule| rule.protocol) {
        Some(Protocol::Any) if dice.percent(70) => *dice.pick(&with_ports),
        Some(protocol) if dice.percent(85) => protocol,
        _ => *dice.pick(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Icmp, Protocol::Any]),
    }
}

/// Both ends of a range, one beyond each, or any.
fn port(dice: &mut Dice, ranges: &[PortRange], ephemeral: bool) -> u16 {
    if ranges.is_empty() || dice.percent(10) {
        return if ephemeral { 32_768 + dice.port() % 28_000 } else { dice.port() };
    }
    let range = *dice.pick(ranges);
    match dice.below(6) {
        0 => range.first.saturating_sub(1),
        1 => range.last.saturating_add(1),
        2 => range.last,
        3 => range.first + u16::try_from(u32::from(dice.port()) % range.count()).unwrap_or_default(),
        _ => range.first,
    }
}
