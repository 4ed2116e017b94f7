use ipnet::IpNet;
use proptest::prelude::*;

use std::num::NonZeroU32;

use super::*;
use crate::model::{PortRange, Protocol, Rule, Topology, Tunnel};

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn ports(texts: &[(u16, u16)]) -> Vec<PortRange> {
    texts.iter().map(|(first, last)| PortRange { first: *first, last: *last }).collect()
}

fn rule(name: &str, direction: Direction, protocol: Protocol, action: Action) -> Rule {
    Rule {
        name: name.into(),
        direction,
        external: None,
        pods: None,
        protocol,
        ports: Vec::new(),
        source_ports: Vec::new(),
        action,
    }
}

fn policy() -> Policy {
    Policy {
        mode: Mode::Enforce,
        on_deny: OnDeny::Reject,
        pods: nets(&["10.200.1.0/24", "fd00:200:1::/64"]),
        external: nets(&["192.168.31.0/24", "fd00:31::/64"]),
        nodes: nets(&["192.168.31.17/32"]),
        rules: vec![
            Rule {
                external: Some(nets(&["192.168.31.67/32"])),
                ports: ports(&[(40002, 40002), (60001, 60100)]),
                source_ports: ports(&[(61001, 61100)]),
                ..rule("devices-to-api", Direction::Inbound, Protocol::Tcp, Action::Allow)
            },
            Rule {
                external: Some(nets(&["192.168.31.99/32"])),
                ..rule("not-that-one", Direction::Inbound, Protocol::Any, Action::Deny)
            },
            Rule {
                ports: ports(&[(53, 53)]),
                ..rule("dns", Direction::Outbound, Protocol::Any, Action::Allow)
            },
            rule("ping", Direction::Outbound, Protocol::Icmp, Action::Allow),
        ],
        audited: Vec::new(),
        node_ports: Some(NodePorts {
            range: PortRange { first: 30000, last: 32767 },
            allow: ports(&[(30080, 30080), (31000, 31100)]),
        }),
    }
}

#[test]
fn reject() {
    insta::assert_snapshot!("reject_v4", restore_input(&policy(), &Options::default(), Family::V4));
    insta::assert_snapshot!("reject_v6", restore_input(&policy(), &Options::default(), Family::V6));
}

#[test]
fn drop_answers_nothing() {
    let policy = Policy { on_deny: OnDeny::Drop, ..policy() };
    let text = restore_input(&policy, &Options::default(), Family::V4);
    assert!(!text.contains("REJECT"), "{text}");
    insta::assert_snapshot!(text);
}

#[test]
fn audit_denies_nothing() {
    let policy = Policy { mode: Mode::Audit, ..policy() };
    let options = Options { log_per_second: NonZeroU32::new(10), ..Options::default() };
    let text = restore_input(&policy, &options, Family::V4);
    for verdict in ["-j DROP", "-j REJECT"] {
        assert!(!text.contains(verdict), "{verdict} in\n{text}");
    }
    insta::assert_snapshot!(text);
}

#[test]
fn strict_ends_in_deny() {
    let options = Options { scope: Scope::Strict, ..Options::default() };
    insta::assert_snapshot!(restore_input(&Policy { node_ports: None, ..policy() }, &options, Family::V4));
}

#[test]
fn a_family_without_lan_hosts_denies_everything_from_outside() {
    let policy = Policy { external: nets(&["192.168.31.0/24"]), ..policy() };
    let text = restore_input(&policy, &Options::default(), Family::V6);
    let peer: Vec<_> = text.lines().filter(|line| line.starts_with("-A BRIDGE-PEER")).collect();
    assert!(
        matches!(peer[..], [invalid, foreign]
        if invalid.contains("INVALID") && foreign.ends_with("\"bridge:foreign\" -g BRIDGE-DENY")),
        "{text}"
    );
    assert!(!text.contains("BRIDGE-TO-LAN") && !text.contains("MARK"), "{text}");
}

#[test]
fn interfaces_decide_who_is_believed() {
    let topology = Topology {
        external: vec!["eth0".into()],
        internal: vec!["cali+".into()],
        remote: vec![
            RoutedPods { interface: "eth0".into(), pods: nets(&["10.200.1.128/26"]) },
            RoutedPods {
                interface: "flannel.1".into(),
                pods: nets(&["10.200.1.192/26", "fd00:200:1:0:2::/80"]),
            },
        ],
        gateways: Vec::new(),
        tunnels: vec![Tunnel::Udp(8472), Tunnel::Protocol(4)],
        tunnel_interfaces: vec!["flannel.1".into()],
        settled: Vec::new(),
    };
    let options = Options { topology, ..Options::default() };
    insta::assert_snapshot!("topology_v4", restore_input(&policy(), &options, Family::V4));
    insta::assert_snapshot!("topology_v6", restore_input(&policy(), &options, Family::V6));
}

#[test]
fn only_nodes_send_packets_of_tunnels_and_none_where_no_node_is_known() {
    let topology = Topology { tunnels: vec![Tunnel::Udp(8472)], ..Topology::default() };
    let options = Options { topology, ..Options::default() };
    // The packet inside may be of the other family.
    let pods = policy().pods.into_iter().filter(|net| net.addr().is_ipv4()).collect();
    let policy = Policy {
        nodes: Vec::new(),
        pods,
        external: nets(&["192.168.31.0/24"]),
        node_ports: None,
        ..policy()
    };
    for family in Family::ALL {
        let text = restore_input(&policy, &options, family);
        assert!(
            text.contains("--dport 8472 -m comment --comment \"bridge:tunnel\" -j BRIDGE-TUNNEL\n"),
            "{text}"
        );
        let tunnel: Vec<_> = text.lines().filter(|line| line.starts_with("-A BRIDGE-TUNNEL")).collect();
        assert!(
            matches!(tunnel[..], [line] if line.contains("--dst-type LOCAL") && line.ends_with("-g BRIDGE-SPOOFED")),
            "{text}"
        );
        assert_eq!(text.contains("rpfilter"), family == Family::V4, "{text}");
    }
}

#[test]
fn a_family_without_networks_is_left_alone() {
    let v4 = |all: &[IpNet]| all.iter().filter(|net| net.addr().is_ipv4()).copied().collect();
    let policy = Policy { pods: v4(&policy().pods), external: v4(&policy().external), ..policy() };
    assert_eq!(restore_input(&policy, &Options::default(), Family::V6), "");
    let strict = Options { scope: Scope::Strict, ..Options::default() };
    let text = restore_input(&policy, &strict, Family::V6);
    assert!(text.contains("-A BRIDGE-SCOPE -m comment --comment \"bridge:strict\" -g BRIDGE-DENY"), "{text}");
}

#[test]
fn a_rule_of_the_other_family_or_for_no_pod_has_no_line() {
    let mut policy = policy();
    policy.rules[0].external = Some(nets(&["fd00:31::67/128"]));
    policy.rules[1].pods = Some(Vec::new());
    let v4 = restore_input(&policy, &Options::default(), Family::V4);
    assert!(!v4.contains("devices-to-api") && !v4.contains("not-that-one"), "{v4}");
    let v6 = restore_input(&policy, &Options::default(), Family::V6);
    assert!(v6.contains("-s fd00:31::67/128 -p tcp"), "{v6}");
}

#[test]
fn many_hosts_and_many_pods_are_not_multiplied() {
    let mut policy = policy();
    let hosts = (0..50).map(|i| format!("192.168.31.{}/32", i * 2).parse().unwrap()).collect();
    let pods = (0..100).map(|i| format!("10.200.1.{}/32", i * 2).parse().unwrap()).collect();
    policy.rules[0].external = Some(hosts);
    policy.rules[0].pods = Some(pods);
    let lines = restore_input(&policy, &Options::default(), Family::V4).lines().count();
    assert!(lines < 300, "{lines} lines");
}

#[test]
fn every_rule_has_a_comment_and_every_chain_is_led_to() {
    let of = |mode, scope| (Policy { mode, ..policy() }, Options { scope, ..Options::default() });
    for (policy, options) in
        [of(Mode::Enforce, Scope::Scoped), of(Mode::Audit, Scope::Scoped), of(Mode::Enforce, Scope::Strict)]
    {
        for table in ruleset(&policy, &options, Family::V4).tables {
            let targets: Vec<_> = table
                .chains
                .iter()
                .flat_map(|chain| &chain.lines)
                .chain(table.jumps.iter().map(|jump| &jump.line))
                .filter_map(|line| line.target.split_whitespace().nth(1).map(str::to_owned))
                .collect();
            for chain in &table.chains {
                assert!(chain.name.len() <= 28, "{} is longer than the kernel takes", chain.name);
                assert!(targets.contains(&chain.name), "{} is led to by nothing", chain.name);
                assert!(chain.lines.iter().all(|line| !line.name.is_empty()));
            }
        }
    }
}

/// The verdict of a small model of iptables on a new flow in scope.
fn walk<'a>(table: &'a TableRules, chain: &str, source: &IpNet, destination: &IpNet) -> Option<&'a str> {
    let chain = table.chains.iter().find(|c| c.name == chain).unwrap();
    for line in &chain.lines {
        let words: Vec<_> = line.matches.split_whitespace().collect();
        let side = |option: &str, address: &IpNet| {
            words
                .iter()
                .position(|word| *word == option)
                .is_none_or(|at| words[at + 1].parse::<IpNet>().unwrap().contains(address))
        };
        if words.contains(&"--ctstate")
            || words.contains(&"--tcp-flags")
            || words.contains(&"--chunk-types")
            || !side("-s", source)
            || !side("-d", destination)
        {
            continue;
        }
        let (option, to) = line.target.split_once(' ').unwrap_or_default();
        match (option, to) {
            ("-j", "RETURN") => return Some(&line.name),
            (_, "BRIDGE-DENY") => return Some("denied"),
            ("-g", to) => return walk(table, to, source, destination),
            ("-j", to) => {
                if let Some(verdict) = walk(table, to, source, destination) {
                    return Some(verdict);
                }
            }
            _ => unreachable!("{}", line.target),
        }
    }
    None
}

fn some_nets(base: &'static str) -> impl Strategy<Value = Option<Vec<IpNet>>> {
    let net = (0u8..64, 27u8..=32)
        .prop_map(move |(host, length)| format!("{base}.{host}/{length}").parse::<IpNet>().unwrap().trunc());
    prop::option::of(prop::collection::vec(net, 0..8))
}

fn some_rule() -> impl Strategy<Value = Rule> {
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    let direction = prop_oneof![Just(Direction::Inbound), Just(Direction::Outbound)];
    (some_nets("192.168.31"), some_nets("10.200.1"), direction, action).prop_map(
        |(external, pods, direction, action)| Rule {
            external,
            pods,
            ..rule("x", direction, Protocol::Any, action)
        },
    )
}

proptest! {
    #[test]
    fn looking_up_by_pod_changes_no_verdict(
        rules in prop::collection::vec(some_rule(), 0..8),
        host in 0u8..64,
        pod in 0u8..64,
        inbound: bool,
        audit: bool,
    ) {
        let mode = if audit { Mode::Audit } else { Mode::Enforce };
        let policy = Policy { mode, rules, nodes: Vec::new(), node_ports: None, ..policy() };
        let host: IpNet = format!("192.168.31.{host}/32").parse().unwrap();
        let pod: IpNet = format!("10.200.1.{pod}/32").parse().unwrap();
        let direction = if inbound { Direction::Inbound } else { Direction::Outbound };
        let within = |nets: &Option<Vec<IpNet>>, address| {
            nets.as_ref().is_none_or(|nets| nets.iter().any(|net| net.contains(address)))
        };
        let matching = |action| policy.rules.iter().any(|rule| {
            rule.direction == direction && rule.action == action
                && within(&rule.external, &host) && within(&rule.pods, &pod)
        });
        let expected = matching(Action::Allow) && !matching(Action::Deny);

        let ruleset = ruleset(&policy, &Options::default(), Family::V4);
        let table = ruleset.table(Table::Filter).unwrap();
        // The size is known without rendering.
        let of_rules = |chain: &&Chain| {
            [INBOUND, OUTBOUND, "BRIDGE-IN-", "BRIDGE-OUT-"].iter().any(|start| chain.name.starts_with(start))
        };
        let lines = table.chains.iter().filter(of_rules).flat_map(|chain| {
            let looked_up = !chain.name.ends_with("BOUND");
            chain.lines.iter().filter(move |line| looked_up || line.name == "x" || line.name == "bridge:pod")
        });
        prop_assert_eq!(lines.count(), line_count(&policy, Family::V4));
        let (source, destination) = if inbound { (&host, &pod) } else { (&pod, &host) };
        // The rules against packets that open no flow are for TCP and SCTP alone; this packet is neither.
        let mut table = table.clone();
        for chain in &mut table.chains {
            chain.lines.retain(|line| !line.name.starts_with("bridge:not-"));
        }
        let verdict = walk(&table, FORWARD, source, destination);
        prop_assert_eq!(verdict, Some(if expected { "x" } else { "denied" }));
    }
}

#[test]
fn the_budget_does_not_underestimate_the_rules_that_are_rendered() {
    use crate::model::{OnDeny, PortRange};
    let single = |count: u16| (0..count).map(|index| PortRange { first: index * 2 + 1, last: index * 2 + 1 });
    let range = |count: u16| (0..count).map(|index| PortRange { first: index * 9 + 1, last: index * 9 + 3 });
    for (ports, sources, networks) in
        [(1, 0, 0), (16, 0, 3), (31, 17, 2), (15, 15, 1), (60, 60, 1), (29, 46, 9)]
    {
        for mixed in [false, true] {
            let list =
                |count: u16| if mixed { range(count).collect() } else { single(count).collect::<Vec<_>>() };
            let nets = |prefix: &str| {
                let net = |index: u16| format!("{prefix}.{}/32", index * 2).parse().unwrap();
                (networks > 0).then(|| (0..networks).map(net).collect::<Vec<IpNet>>())
            };
            let rule = Rule {
                name: "expensive".into(),
                direction: Direction::Inbound,
                external: nets("192.168.31"),
                pods: nets("10.200.1"),
                protocol: Protocol::Tcp,
                ports: list(ports),
                source_ports: list(sources),
                action: Action::Allow,
            };
            let policy = Policy {
                mode: Mode::Enforce,
                on_deny: OnDeny::Reject,
                pods: vec!["10.200.0.0/16".parse().unwrap()],
                external: vec!["192.168.0.0/16".parse().unwrap()],
                nodes: Vec::new(),
                rules: vec![rule.clone()],
                audited: Vec::new(),
                node_ports: None,
            };
            let text = restore_input(&policy, &Options::default(), Family::V4);
            let rendered = text.lines().filter(|line| line.contains("expensive")).count() as u64;
            let estimate = crate::policy::budget::lines(&rule);
            assert!(rendered > 0 && estimate >= rendered, "{estimate} {rendered}: {text}");
        }
    }
}
