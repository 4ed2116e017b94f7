//! Single policies whose tables can be derived by hand.

use std::net::IpAddr;

use bridge_common::filter::policy::{AddressInfo, class, direction, reference as abi, side};
use ipnet::IpNet;

use super::generate::net;
use crate::model::{Action, Direction, Mode, NodePorts, OnDeny, Policy, PortRange, Protocol, Rule};
use crate::policy::{Error, Tables, compile};

pub(super) fn policy(rules: Vec<Rule>) -> Policy {
    Policy {
        mode: Mode::default(),
        on_deny: OnDeny::default(),
        pods: vec![net("10.200.0.0/16"), net("fd00:c::/64")],
        external: vec![net("192.168.0.0/16"), net("fd00:a::/64")],
        nodes: Vec::new(),
        rules,
        audited: Vec::new(),
        node_ports: None,
    }
}

/// Allows inbound TCP on every port.
pub(super) fn rule(name: &str) -> Rule {
    Rule {
        name: name.to_owned(),
        direction: Direction::Inbound,
        external: None,
        pods: None,
        protocol: Protocol::Tcp,
        ports: Vec::new(),
        source_ports: Vec::new(),
        action: Action::Allow,
    }
}

pub(super) const fn range(first: u16, last: u16) -> PortRange {
    PortRange { first, last }
}

fn nets(prefixes: &[&str]) -> Option<Vec<IpNet>> {
    Some(prefixes.iter().map(|prefix| net(prefix)).collect())
}

fn compiled(rules: Vec<Rule>) -> Tables {
    compile(&policy(rules), &[]).expect("small policy")
}

fn info(tables: &Tables, prefix: &str) -> AddressInfo {
    let entry = tables.addresses.iter().find(|(other, _)| *other == net(prefix));
    entry.unwrap_or_else(|| panic!("{prefix} is in {:?}", tables.addresses)).1
}

fn root(tables: &Tables, set: u32, protocol: usize) -> u32 {
    tables.rule_sets[set as usize].roots[protocol]
}

#[test]
fn a_range_is_three_intervals_of_a_narrow() {
    let tables = compiled(vec![Rule { ports: vec![range(60_001, 60_100)], ..rule("r") }]);
    let set = tables.global_sets[0];
    assert_eq!(root(&tables, set, class::TCP), abi::INTERVALS);
    assert_eq!(tables.rule_sets[set as usize].roots[1..], [0; 4]);
    assert_eq!(tables.narrows.len(), 1);
    assert_eq!(tables.narrows[0].first[..4], [0, 60_001, 60_101, 60_101]);
    assert_eq!(tables.narrows[0].references[..4], [0, 1, 0, 0]);
    assert_eq!(tables.global_sets[1], 0, "nothing outbound");
}

#[test]
fn every_protocol_only_without_ports() {
    let any = Rule { protocol: Protocol::Any, ..rule("any") };
    let tables = compiled(vec![any.clone()]);
    assert_eq!(tables.rule_sets[1].roots, [1; 5]);
    assert!(tables.narrows.is_empty(), "a uniform verdict needs no lookup");

    let tables = compiled(vec![Rule { source_ports: vec![range(5, 5)], ..any }]);
    let roots = tables.rule_sets[1].roots;
    assert_eq!(abi::tag(roots[0]), abi::INTERVALS);
    assert_eq!(roots, [roots[0], roots[0], roots[0], 0, 0], "those that have ports share one lookup");
}

#[test]
fn source_ports_alone_still_take_a_lookup_by_destination_port_first() {
    let tables = compiled(vec![Rule { source_ports: vec![range(61_001, 61_100)], ..rule("r") }]);
    let first = &tables.narrows[(root(&tables, 1, class::TCP) & abi::VALUE) as usize];
    assert_eq!(first.first, [0; 10]);
    let second = &tables.narrows[(first.references[0] & abi::VALUE) as usize];
    assert_eq!(second.first[..4], [0, 61_001, 61_101, 61_101]);
    assert_eq!(second.references[..4], [0, 1, 0, 0]);
}

#[test]
fn all_source_ports_are_no_criterion() {
    let all = Rule { source_ports: vec![range(40_000, 65_535), range(0, 39_999)], ..rule("r") };
    assert_eq!(root(&compiled(vec![all]), 1, class::TCP), 1);
}

#[test]
fn ten_intervals_are_narrow_and_eleven_are_wide() {
    let ports = |count: u16| (1..=count).map(|port| range(port * 512, port * 512 + 9)).collect();
    let narrow =
        compiled(vec![Rule { ports: ports(4), ..rule("r") }, Rule { ports: vec![range(9, 9)], ..rule("s") }]);
    assert_eq!(abi::tag(root(&narrow, 1, class::TCP)), abi::DIRECTORY, "4 + 1 ranges apart are 11 intervals");

    let edge = vec![range(0, 9), range(20, 29), range(40, 49), range(60, 69), range(80, 89)];
    let narrow = compiled(vec![Rule { ports: edge, ..rule("r") }]);
    assert_eq!(abi::tag(root(&narrow, 1, class::TCP)), abi::INTERVALS, "from port 0 on it is 10");
    assert!(narrow.narrows[0].first.is_sorted_by(|a, b| a < b), "all slots are used");

    let wide = compiled(vec![Rule { ports: ports(20), ..rule("r") }]);
    let directory = &wide.pages[(root(&wide, 1, class::TCP) & abi::VALUE) as usize];
    assert_eq!(directory.references[1], 0, "a uniform block needs no page");
    assert_eq!(directory.references[2], directory.references[4], "equal blocks share a page");
    assert_eq!(abi::tag(directory.references[2]), abi::PAGE);
    assert_eq!(wide.pages.len(), 3, "the unused one, the directory, the block");
}

#[test]
fn a_deny_wins_and_then_the_first() {
    let deny = Rule { action: Action::Deny, ..rule("no") };
    let tables = compiled(vec![rule("a"), deny.clone(), rule("b"), deny]);
    assert_eq!(root(&tables, tables.global_sets[0], class::TCP), abi::DENY | 2);
    let tables = compiled(vec![rule("a"), rule("b")]);
    assert_eq!(root(&tables, tables.global_sets[0], class::TCP), 1);
}

#[test]
fn a_list_that_covers_the_networks_names_no_side() {
    let halves = ["192.168.0.0/17", "192.168.128.0/17", "fd00::/16"];
    let tables = compiled(vec![Rule { external: nets(&halves), ..rule("r") }]);
    assert_ne!(tables.global_sets[0], 0);
    assert_eq!(tables.addresses.len(), 4, "the networks only");

    let tables = compiled(vec![Rule { external: nets(&halves[1..]), ..rule("r") }]);
    assert_eq!(tables.global_sets[0], 0);
    assert_ne!(info(&tables, "192.168.128.0/17").sets[0], 0);
    assert_ne!(info(&tables, "fd00:a::/64").sets[0], 0, "a wider prefix covers the network");
    assert_eq!(info(&tables, "192.168.0.0/16").sets[0], 0);
}

#[test]
fn a_list_of_no_pods_matches_nothing_and_keeps_its_number() {
    let tables = compiled(vec![Rule { pods: nets(&[]), ..rule("none") }, rule("all")]);
    assert_eq!(root(&tables, tables.global_sets[0], class::TCP), 2);
    assert_eq!(tables.rule_count, 2);
}

#[test]
fn addresses_named_by_the_same_rules_share_class_and_set() {
    let hosts = ["192.168.31.67/32", "192.168.31.99/32"];
    let both = Rule { external: nets(&hosts), pods: nets(&["10.200.1.0/24"]), ..rule("both") };
    let tables = compiled(vec![both, Rule { external: nets(&hosts), ..rule("one") }]);
    let [a, b] = hosts.map(|host| info(&tables, host));
    assert_eq!(a, b);
    assert_eq!(tables.pairs.len(), 1);
    assert_eq!(tables.pairs[0].0.external, a.class);
    assert_eq!(tables.pairs[0].0.pod, info(&tables, "10.200.1.0/24").class);
    assert_eq!(info(&tables, "192.168.0.0/16").class, 0, "not named");
}

#[test]
fn a_prefix_inside_another_is_named_by_the_rules_of_both() {
    let wide = Rule { external: nets(&["192.168.31.0/24"]), ports: vec![range(1, 1)], ..rule("wide") };
    let host = Rule { external: nets(&["192.168.31.67/32"]), ports: vec![range(2, 2)], ..rule("host") };
    let tables = compiled(vec![wide, host]);
    let set = info(&tables, "192.168.31.67/32").sets[0];
    let narrow = &tables.narrows[(root(&tables, set, class::TCP) & abi::VALUE) as usize];
    assert_eq!(narrow.first[..4], [0, 1, 2, 3]);
    assert_eq!(narrow.references[..4], [0, 1, 2, 0]);
}

#[test]
fn nodes_are_on_no_side_and_own_addresses_are_local() {
    let host = Rule { external: nets(&["192.168.31.16/32", "192.168.31.67/32"]), ..rule("host") };
    let mut policy = policy(vec![host]);
    policy.nodes = vec![net("192.168.31.16/30"), net("192.168.31.67/32")];
    let local: IpAddr = "192.168.31.17".parse().expect("an address");
    let pod_gateway: IpAddr = "10.200.1.1".parse().expect("an address");
    let tables = compile(&policy, &[local, pod_gateway]).expect("small policy");
    for node in ["192.168.31.16/30", "192.168.31.67/32"] {
        assert_eq!(info(&tables, node), AddressInfo { side: side::NODE, ..AddressInfo::default() });
    }
    assert!(
        !tables.addresses.iter().any(|(prefix, _)| *prefix == net("192.168.31.16/32")),
        "hidden by the node"
    );
    for own in ["192.168.31.17/32", "10.200.1.1/32"] {
        assert_eq!(info(&tables, own), AddressInfo { side: side::LOCAL, ..AddressInfo::default() });
    }
}

#[test]
fn node_ports_are_the_last_rule() {
    let mut policy = policy(vec![rule("r")]);
    policy.node_ports = Some(NodePorts {
        range: range(30_000, 32_767),
        allow: vec![range(30_080, 30_080), range(32_700, 40_000), range(1, 2)],
    });
    let tables = compile(&policy, &[]).expect("small policy");
    assert_eq!(tables.node_ports, [30_000, 32_767]);
    let narrow = &tables.narrows[(tables.node_port_root & abi::VALUE) as usize];
    assert_eq!(narrow.first[..6], [0, 30_080, 30_081, 32_700, 32_768, 32_768]);
    assert_eq!(narrow.references[..5], [0, 2, 0, 2, 0]);
    assert_eq!(tables.rule_count, 2);
    assert_eq!(tables.rules[1].direction, u32::from(direction::NODE_PORT));
    assert!(tables.rules[1].name.starts_with(b"nodePorts\0"));

    policy.node_ports = Some(NodePorts { range: range(30_000, 32_767), allow: Vec::new() });
    let tables = compile(&policy, &[]).expect("small policy");
    assert_eq!((tables.node_ports, tables.node_port_root), ([30_000, 32_767], 0), "judged, and none allowed");
}

#[test]
fn an_address_on_both_sides_is_refused() {
    for (external, pods) in [("10.0.0.0/8", "10.200.1.0/24"), ("10.200.1.64/26", "10.200.1.0/24")] {
        let policy = Policy { pods: vec![net(pods)], external: vec![net(external)], ..policy(Vec::new()) };
        assert!(
            matches!(compile(&policy, &[]), Err(Error::OverlappingNetworks { .. })),
            "{external} and {pods}"
        );
    }
}
