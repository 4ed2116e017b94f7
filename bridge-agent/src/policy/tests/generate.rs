//! Policies that are likely to hurt, and packets at their edges.

use std::net::IpAddr;

use bridge_common::filter::policy::class;
use ipnet::IpNet;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::model::{Action, Direction, Mode, NodePorts, OnDeny, Policy, PortRange, Protocol, Rule};
use crate::policy::reference::Packet;

/// A policy and the own addresses of the node it is for.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) policy: Policy,
    pub(super) local: Vec<IpAddr>,
}

const EXTERNAL: [&str; 5] =
    ["192.168.31.0/24", "192.168.30.128/25", "172.16.0.0/30", "fd00:a::/120", "fd00:a::100/121"];
const PODS: [&str; 4] = ["10.200.1.0/24", "10.200.2.64/26", "fd00:c::/120", "fd00:c:0:1::/126"];

pub(super) fn net(prefix: &str) -> IpNet {
    prefix.parse().expect("a prefix")
}

/// Prefixes in, around and beside the networks; half of them have host bits set.
fn prefix(networks: &'static [&'static str]) -> impl Strategy<Value = IpNet> {
    (0..networks.len(), -2_i8..=7, 0..=255_u8, any::<bool>()).prop_map(
        |(network, longer, offset, host_bits)| {
            let network = net(networks[network]);
            let address = match network.network() {
                IpAddr::V4(v4) => IpAddr::from((u32::from(v4) ^ u32::from(offset)).to_be_bytes()),
                IpAddr::V6(v6) => IpAddr::from((u128::from(v6) ^ u128::from(offset)).to_be_bytes()),
            };
            let length = network.prefix_len().saturating_add_signed(longer).min(network.max_prefix_len());
            let prefix = IpNet::new(address, length).expect("no longer than an address");
            if host_bits { prefix } else { prefix.trunc() }
        },
    )
}

fn networks(all: &'static [&'static str]) -> impl Strategy<Value = Vec<IpNet>> {
    proptest::sample::subsequence(all, all.len() - 2..=all.len())
        .prop_map(|some| some.into_iter().map(net).collect())
}

/// Edges of the port space and of pages, a crowd around 40000, and anything else.
fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        2 => proptest::sample::select(vec![0, 1, 255, 256, 257, 511, 512, 65_279, 65_280, 65_534, 65_535]),
        4 => 39_990_u16..40_020,
        1 => any::<u16>(),
    ]
}

fn range() -> impl Strategy<Value = PortRange> {
    prop_oneof![
        port().prop_map(|port| PortRange { first: port, last: port }),
        (port(), port()).prop_map(|(a, b)| PortRange { first: a.min(b), last: a.max(b) }),
    ]
}

fn ranges() -> impl Strategy<Value = Vec<PortRange>> {
    let scattered = vec((any::<u16>(), 0..600_u16), 12..30).prop_map(|ranges| {
        ranges
            .into_iter()
            .map(|(first, more)| PortRange { first, last: first.saturating_add(more) })
            .collect()
    });
    prop_oneof![6 => Just(Vec::new()), 10 => vec(range(), 1..4), 1 => vec(range(), 12..30), 3 => scattered]
}

fn rule() -> impl Strategy<Value = Rule> {
    let protocol = prop_oneof![
        3 => Just(Protocol::Tcp),
        1 => Just(Protocol::Udp),
        1 => Just(Protocol::Sctp),
        1 => Just(Protocol::Icmp),
        2 => Just(Protocol::Any),
    ];
    let direction = prop_oneof![Just(Direction::Inbound), Just(Direction::Outbound)];
    let action = prop_oneof![2 => Just(Action::Allow), 1 => Just(Action::Deny)];
    let external =
        option::of(prop_oneof![1 => vec(prefix(&EXTERNAL), 0..2), 9 => vec(prefix(&EXTERNAL), 2..6)]);
    let pods = option::of(prop_oneof![1 => vec(prefix(&PODS), 0..2), 9 => vec(prefix(&PODS), 2..6)]);
    (direction, external, pods, protocol, ranges(), ranges(), action).prop_map(
        |(direction, external, pods, protocol, ports, source_ports, action)| {
            let portless = protocol == Protocol::Icmp;
            Rule {
                name: String::new(),
                direction,
                external,
                pods,
                protocol,
                ports: if portless { Vec::new() } else { ports },
                source_ports: if portless { Vec::new() } else { source_ports },
                action,
            }
        },
    )
}

fn node_ports() -> impl Strategy<Value = NodePorts> {
    let allow = vec((29_990_u16..32_780, 0..300_u16), 0..14);
    allow.prop_map(|allow| NodePorts {
        range: PortRange { first: 30_000, last: 32_767 },
        allow: allow.into_iter().map(|(first, more)| PortRange { first, last: first + more }).collect(),
    })
}

pub(super) fn case() -> impl Strategy<Value = Case> {
    let rules = prop_oneof![4 => vec(rule(), 0..12), 1 => vec(rule(), 20..40)];
    let any_prefix = || prop_oneof![prefix(&EXTERNAL), prefix(&PODS)];
    let local = vec(any_prefix().prop_map(|prefix| prefix.addr()), 0..4);
    // A quarter of the rules.
    let audited = (any::<u64>(), any::<u64>()).prop_map(|(some, others)| some & others);
    (
        networks(&EXTERNAL),
        networks(&PODS),
        vec(any_prefix(), 0..3),
        rules,
        option::of(node_ports()),
        local,
        audited,
    )
        .prop_map(|(external, pods, nodes, mut rules, node_ports, local, audited)| {
            for (index, rule) in rules.iter_mut().enumerate() {
                rule.name = format!("rule-{index}");
            }
            let (mode, on_deny) = (Mode::default(), OnDeny::default());
            // A node's list that is as wide as its network would leave nothing to test.
            let nodes = nodes
                .into_iter()
                .filter(|prefix| prefix.prefix_len() > prefix.max_prefix_len() - 6)
                .collect();
            let mut numbers = 0..;
            let (audited, rules) =
                rules.into_iter().partition(|_| audited >> (numbers.next().unwrap_or(0) % 64) & 1 == 1);
            Case {
                policy: Policy { mode, on_deny, pods, external, nodes, rules, audited, node_ports },
                local,
            }
        })
}

/// Packets between the edges of prefixes, at the edges of port ranges; most of them aimed at one of the rules.
pub(super) fn packets(case: &Case, seed: u64, count: usize) -> Vec<Packet> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..count).map(|_| packet(case, &mut random)).collect()
}

fn packet(case: &Case, random: &mut StdRng) -> Packet {
    let Case { policy, local } = case;
    let target = policy.rules.choose(random);
    let v6 = random.random_bool(0.4);
    let mut side = |named: Option<&Vec<IpNet>>, networks: &Vec<IpNet>| {
        let all: Vec<IpNet> = match random.random_range(0..10) {
            0 => [&policy.nodes[..], &policy.external, &policy.pods].concat(),
            1 => local.iter().map(|&address| IpNet::from(address)).collect(),
            2..8 => named.unwrap_or(networks).clone(),
            _ => networks.clone(),
        };
        let family: Vec<IpNet> = all.into_iter().filter(|prefix| prefix.addr().is_ipv6() == v6).collect();
        let prefix = family.choose(random).or_else(|| networks.choose(random)).copied().expect("a network");
        edge(&prefix, random)
    };
    let external = side(target.and_then(|rule| rule.external.as_ref()), &policy.external);
    let pod = side(target.and_then(|rule| rule.pods.as_ref()), &policy.pods);
    let inbound = match target {
        Some(rule) if random.random_bool(0.9) => rule.direction == Direction::Inbound,
        _ => random.random_bool(0.5),
    };
    let (source, destination) = if inbound { (external, pod) } else { (pod, external) };
    let protocol = match target.map(|rule| rule.protocol) {
        Some(Protocol::Tcp) if random.random_bool(0.7) => class::TCP,
        Some(Protocol::Udp) if random.random_bool(0.7) => class::UDP,
        Some(Protocol::Sctp) if random.random_bool(0.7) => class::SCTP,
        Some(Protocol::Icmp) if random.random_bool(0.7) => class::ICMP,
        _ => random.random_range(0..class::COUNT),
    };
    let (mut source_port, mut destination_port) = (0, 0);
    if protocol < class::ICMP {
        source_port = port_at_edge(target.map(|rule| &rule.source_ports), random);
        destination_port = port_at_edge(target.map(|rule| &rule.ports), random);
    }

    match &policy.node_ports {
        Some(node_ports) if random.random_bool(0.2) => {
            let range = [node_ports.range];
            let ranges: Vec<PortRange> = node_ports.allow.iter().chain(&range).copied().collect();
            Packet {
                source: external,
                destination: local.choose(random).copied().unwrap_or(destination),
                destination_port: port_at_edge(Some(&ranges), random),
                source_port,
                protocol,
            }
        }
        _ => Packet { source, destination, protocol, source_port, destination_port },
    }
}

/// Both ends of a prefix, one beyond, and something inside.
fn edge(prefix: &IpNet, random: &mut StdRng) -> IpAddr {
    let step = [0, 0, 0, 1, -1][random.random_range(0..5)];
    let beyond = |address: u128| address.wrapping_add_signed(step);
    let pick = |first: u128, last: u128, inside: u128| match inside % 4 {
        0 => beyond(first),
        1 => beyond(last),
        _ => first + inside % (last - first + 1),
    };
    let inside = u128::from(random.random::<u64>());
    match (prefix.network(), prefix.broadcast()) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            let address = pick(u32::from(first).into(), u32::from(last).into(), inside);
            IpAddr::from(u32::try_from(address).unwrap_or(0).to_be_bytes())
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => {
            IpAddr::from(pick(first.into(), last.into(), inside).to_be_bytes())
        }
        _ => unreachable!("both ends are of one family"),
    }
}

/// Both ends of a range, one beyond, and something anywhere.
fn port_at_edge(ranges: Option<&Vec<PortRange>>, random: &mut StdRng) -> u16 {
    let Some(range) = ranges.and_then(|ranges| ranges.choose(random)) else { return random.random() };
    match random.random_range(0..6) {
        0 => range.first,
        1 => range.last,
        2 => range.first.wrapping_sub(1),
        3 => range.last.wrapping_add(1),
        4 => random.random_range(range.first..=range.last),
        _ => random.random(),
    }
}
