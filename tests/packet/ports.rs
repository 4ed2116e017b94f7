//! Ranges: both ends belong to them, and nothing beyond.

use bridge_agent::model::{Action, Direction, PortRange, Protocol, Rule};
use bridge_common::filter::{counters::Reason, event::verdict};
use bridge_lab::{
    packet::{Packet, Tcp},
    prog::{LAN_INTERFACE, Node, behaviour},
};

use crate::world::{ExternalIngress, InternalIngress, families, ip, node_of, policy, range, rule};

const RANGES: [PortRange; 6] = [
    PortRange { first: 1, last: 1 },
    PortRange { first: 255, last: 256 },
    PortRange { first: 1024, last: 2047 },
    PortRange { first: 40_002, last: 40_002 },
    PortRange { first: 60_001, last: 60_100 },
    PortRange { first: 65_535, last: 65_535 },
];

/// The ends of every range, and their neighbours.
fn ports() -> impl Iterator<Item = u16> {
    RANGES.into_iter().flat_map(|range| {
        [range.first.checked_sub(1), Some(range.first), Some(range.last), range.last.checked_add(1)]
            .into_iter()
            .flatten()
    })
}

fn check(node: &mut Node, direction: Direction, packet: &dyn Fn(&crate::world::Family, u16) -> Packet) {
    let hook = if direction == Direction::Inbound { ExternalIngress } else { InternalIngress };
    for family in families() {
        for port in ports() {
            let packet = packet(&family, port);
            if RANGES.iter().any(|range| range.contains(port)) {
                node.passes(hook, &packet, Reason::new_flow);
            } else {
                node.denies(hook, &packet, Reason::no_rule);
            }
        }
    }
}

fn ends(family: &crate::world::Family, direction: Direction) -> Packet {
    match direction {
        Direction::Inbound => Packet::new(family.lan, family.pod),
        Direction::Outbound => Packet::new(family.pod, family.lan),
    }
}

/// As many ranges that the narrow table cannot hold them, far from those that are tested.
fn many() -> Vec<PortRange> {
    (0..40).map(|i| range(10_000 + i * 100, 10_010 + i * 100)).collect()
}

#[test]
fn destination_ports_of_every_protocol_in_both_directions() {
    for extra in [Vec::new(), many()] {
        let ranges = [RANGES.to_vec(), extra].concat();
        for direction in [Direction::Inbound, Direction::Outbound] {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Any] {
                let policy = policy(vec![rule("ranges", direction, protocol, &ranges)]);
                let mut node = node_of(&policy, &behaviour());
                if matches!(protocol, Protocol::Tcp | Protocol::Any) {
                    check(&mut node, direction, &|f, port| ends(f, direction).tcp(Tcp::syn(50_000, port)));
                }
                if matches!(protocol, Protocol::Udp | Protocol::Any) {
                    check(&mut node, direction, &|f, port| ends(f, direction).udp(50_000, port, b"x"));
                }
                if matches!(protocol, Protocol::Sctp | Protocol::Any) {
                    check(&mut node, direction, &|f, port| ends(f, direction).sctp_init(50_000, port));
                }
            }
        }
    }
}

#[test]
fn source_ports_in_both_directions() {
    for extra in [Vec::new(), many()] {
        for direction in [Direction::Inbound, Direction::Outbound] {
            let rule = Rule {
                source_ports: [RANGES.to_vec(), extra.clone()].concat(),
                ..rule("sources", direction, Protocol::Tcp, &[range(443, 443)])
            };
            let mut node = node_of(&policy(vec![rule]), &behaviour());
            check(&mut node, direction, &|f, port| ends(f, direction).tcp(Tcp::syn(port, 443)));
            for family in families() {
                let hook = if direction == Direction::Inbound { ExternalIngress } else { InternalIngress };
                let other = ends(&family, direction).tcp(Tcp::syn(60_001, 444));
                node.denies(hook, &other, Reason::no_rule);
            }
        }
    }
}

#[test]
fn a_deny_beats_every_allow_and_the_event_names_the_rule() {
    let rules = vec![
        rule("wide", Direction::Inbound, Protocol::Any, &[]),
        Rule {
            action: Action::Deny,
            ..rule("no-telnet", Direction::Inbound, Protocol::Tcp, &[range(23, 23)])
        },
        rule("telnet", Direction::Inbound, Protocol::Tcp, &[range(23, 23)]),
    ];
    let mut node = node_of(&policy(rules), &behaviour());
    for family in families() {
        let packet = Packet::new(family.lan, family.pod).tcp(Tcp::syn(50_000, 23));
        node.denies(ExternalIngress, &packet, Reason::deny_rule);
        let packet = Packet::new(family.lan, family.pod).tcp(Tcp::syn(50_000, 24));
        node.passes(ExternalIngress, &packet, Reason::new_flow);
        let events: Vec<_> = node.events().iter().map(|event| (event.verdict, event.rule)).collect();
        assert_eq!(
            events,
            [(verdict::REJECT, 2), (verdict::ALLOW, 1)],
            "rules are reported by index plus one"
        );
    }
}

#[test]
fn rules_count_what_they_decide() {
    let rules = vec![
        rule("first", Direction::Inbound, Protocol::Tcp, &[range(1, 100)]),
        rule("second", Direction::Inbound, Protocol::Tcp, &[range(50, 200)]),
        rule("third", Direction::Outbound, Protocol::Tcp, &[range(1, 100)]),
    ];
    let mut node = node_of(&policy(rules), &behaviour());
    let [family, _] = families();
    for port in [1, 60, 150, 201] {
        let frame = Packet::new(family.lan, family.pod).tcp(Tcp::syn(50_000, port)).frame();
        node.run(ExternalIngress, &frame).expect("the program runs");
    }
    let maps = &node.datapath().maps;
    let hits: Vec<_> = maps.rule_hits(maps.slot()).expect("hits").iter().map(|hits| hits.packets).collect();
    // The last is the one that stands for nodePorts.
    assert_eq!(hits, [2, 1, 0, 0], "the first of the rules that match counts");
}

#[test]
fn rules_that_name_one_side_both_or_none_hold_together() {
    let net = |net: &str| Some(vec![net.parse().expect("a network")]);
    let named = |name, external, pods, port| Rule {
        external,
        pods,
        ..rule(name, Direction::Inbound, Protocol::Tcp, &[range(port, port)])
    };
    let policy = policy(vec![
        named("none", None, None, 1),
        named("lan", net("192.168.31.64/26"), None, 2),
        named("pod", None, net("10.200.1.91/32"), 3),
        named("both", net("192.168.31.67/32"), net("10.200.1.64/26"), 4),
    ]);
    let mut node = node_of(&policy, &behaviour());
    node.host(ip("10.200.1.20"), LAN_INTERFACE).expect("room for a pod");
    let mut open = |lan: &str, pod: &str| -> Vec<u16> {
        (1..=5)
            .filter(|&port| {
                let (lan, pod) = (ip(lan), ip(pod));
                let frame = Packet::new(lan, pod).tcp(Tcp::syn(50_000, port)).frame();
                let judged = node.run(ExternalIngress, &frame).expect("the program runs");
                judged.counted.is_some_and(|(_, reason)| reason == Reason::new_flow)
            })
            .collect()
    };
    assert_eq!(open("192.168.31.67", "10.200.1.91"), [1, 2, 3, 4]);
    assert_eq!(open("192.168.31.67", "10.200.1.92"), [1, 2, 4]);
    assert_eq!(open("192.168.31.67", "10.200.1.20"), [1, 2]);
    assert_eq!(open("192.168.31.68", "10.200.1.91"), [1, 2, 3]);
    assert_eq!(open("192.168.31.20", "10.200.1.91"), [1, 3]);
    assert_eq!(open("192.168.31.20", "10.200.1.20"), [1]);
}
