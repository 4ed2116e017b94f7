use std::collections::{BTreeMap, HashMap};

use bridge_agent::model::{Action, Direction, Protocol};
use ipnet::IpNet;

use super::*;

fn cases() -> impl Iterator<Item = Case> {
    (0..700).map(|seed| Case::new(seed, 200))
}

#[test]
fn a_seed_gives_the_same_case_again() {
    for seed in [0, 1, u64::MAX] {
        let (a, b) = (Case::new(seed, 300), Case::new(seed, 300));
        assert_eq!(a.policy, b.policy);
        let bytes = |case: &Case| -> Vec<Vec<u8>> {
            case.sent.iter().flat_map(|sent| &sent.packets).map(Packet::ip).collect()
        };
        assert_eq!(bytes(&a), bytes(&b));
    }
    assert_ne!(Case::new(1, 10).policy, Case::new(2, 10).policy);
}

#[test]
fn policies_are_what_the_model_promises() {
    for case in cases() {
        let policy = case.policy;
        let within = |nets: &[IpNet], blocks: [&str; 2]| {
            let blocks = blocks.map(|block| block.parse::<IpNet>().unwrap());
            nets.iter().all(|net| blocks.iter().any(|block| block.contains(net)))
        };
        let (pods, elsewhere): (Vec<IpNet>, Vec<IpNet>) =
            policy.pods.iter().partition(|net| endpoints::side(net.addr()) == Side::Pods);
        assert!(within(&policy.external, LAN) && within(&pods, PODS), "seed {}", case.seed);
        assert!(elsewhere.len() == 4 && !pods.is_empty(), "seed {}", case.seed);
        let is_named = local().iter().all(|own| policy.nodes.contains(&IpNet::from(*own)));
        assert!(is_named || policy.nodes.is_empty() && case.seed % 8 == 7, "seed {}", case.seed);
        for rule in &policy.rules {
            assert!(rule.ports.iter().chain(&rule.source_ports).all(|range| range.first <= range.last));
            assert!(rule.protocol != Protocol::Icmp || rule.ports.is_empty() && rule.source_ports.is_empty());
        }
        if let Some(node_ports) = policy.node_ports {
            let range = node_ports.range;
            assert!(node_ports.allow.iter().all(|a| range.first <= a.first && a.last <= range.last));
        }
    }
}

#[test]
fn every_packet_comes_from_its_side_and_can_be_told_from_all_others() {
    for case in cases() {
        let mut seen = HashMap::new();
        for sent in &case.sent {
            for packet in &sent.packets {
                let (source, destination) = packet.addresses();
                let is_elsewhere = FORGED.contains(&sent.label) || THROUGH.contains(&sent.label);
                assert!(is_elsewhere != (endpoints::side(source) == sent.from), "{sent:?}");
                assert!(!local().contains(&source), "{sent:?}");
                assert_ne!(source, destination);
                let before = seen.insert(packet.ip(), sent.label);
                assert!(
                    before.is_none(),
                    "seed {}: {before:?} and {} are the same packet",
                    case.seed,
                    sent.label
                );
            }
        }
    }
}

/// Packets that no policy restricts: pods may open flows to hosts outside of `networks.external`, and get their answers.
/// And packets of translated flows that were opened, and packets in transit.
const UNRESTRICTED: [&str; 18] = [
    "question to a foreign host",
    "answer of a foreign host",
    "SYN ACK of a service",
    "ACK to a service",
    "data to a service",
    "data of a service",
    "answer of a service",
    "another answer of a service",
    "datagram in transit",
    "answer in transit",
    "stray segment in transit",
    "SYN in transit",
    "SYN ACK in transit",
    "segment in transit",
    "fragments in transit",
    "SYN ACK to the LAN",
    "segment to the LAN",
    "answer to the LAN",
];

/// Packets that no policy allows.
const DENIED: [&str; 2] = ["datagram of a foreign host", FORGED[1]];

/// Packets that come from another side than their source.
const FORGED: [&str; 2] = ["datagram with a forged source", "datagram in the name of a pod"];

/// Packets of LAN hosts that come by the overlay of another node.
const THROUGH: [&str; 3] =
    ["SYN through the overlay", "segment through the overlay", "datagram through the overlay"];

#[test]
fn everything_happens_often_enough_both_ways() {
    let mut verdicts: BTreeMap<&str, [u32; 3]> = BTreeMap::new();
    let mut total = [0u32; 3];
    for case in cases() {
        for sent in case.sent {
            let Expected { ebpf, iptables, .. } = sent.expected;
            let column = if ebpf == iptables { usize::from(ebpf) } else { 2 };
            verdicts.entry(sent.label).or_default()[column] += 1;
            total[column] += 1;
        }
    }
    let table: String =
        verdicts.iter().map(|(label, [no, yes, open])| format!("{label}: {no} {yes} {open}\n")).collect();
    for (label, [denied, passed, open]) in &verdicts {
        if UNRESTRICTED.contains(label) || *label == THROUGH[1] {
            assert!(*denied == 0 && *passed >= 20, "{label}\n{table}");
            continue;
        }
        if DENIED.contains(label) {
            assert!(*denied >= 20 && *passed == 0, "{label}\n{table}");
            continue;
        }
        assert!(*denied + *open >= 20 && *passed + *open >= 20, "{label}\n{table}");
    }
    assert!(verdicts.len() >= 40, "{table}");
    let [denied, passed, open] = total;
    assert!(
        denied > passed / 4 && passed > denied / 4 && open < (denied + passed) / 20,
        "{total:?}\n{table}"
    );
}

#[test]
fn policies_speak_of_everything_a_rule_can_say() {
    let rules: Vec<_> = cases().flat_map(|case| case.policy.rules).collect();
    let some = |property: &str, holds: &dyn Fn(&bridge_agent::model::Rule) -> bool| {
        assert!(rules.iter().filter(|rule| holds(rule)).count() > 10, "{property}");
    };
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Icmp, Protocol::Any] {
        for direction in [Direction::Inbound, Direction::Outbound] {
            for action in [Action::Allow, Action::Deny] {
                some("each", &|rule| {
                    (rule.protocol, rule.direction, rule.action) == (protocol, direction, action)
                });
            }
        }
    }
    some("source and destination ports", &|rule| !rule.ports.is_empty() && !rule.source_ports.is_empty());
    some("more ports than a multiport match holds", &|rule| rule.ports.len() > 15);
    some("no pod", &|rule| rule.pods.as_ref().is_some_and(Vec::is_empty));
    some("many of both", &|rule| {
        let many = |side: &Option<Vec<IpNet>>| side.as_ref().is_some_and(|nets| nets.len() >= 3);
        many(&rule.external) && many(&rule.pods)
    });
    some("port 0", &|rule| rule.ports.iter().any(|range| range.first == 0));
    some("port 65535", &|rule| rule.ports.iter().any(|range| range.last == u16::MAX));
}
