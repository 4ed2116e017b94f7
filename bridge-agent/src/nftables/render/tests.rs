use proptest::prelude::*;

use ipnet::IpNet;

use super::*;
use crate::model::{Action, NodePorts, PortRange, Protocol, Rule, Topology, Tunnel};
use crate::nftables::script;

fn nets(list: &[&str]) -> Vec<IpNet> {
    list.iter().map(|net| net.parse().unwrap()).collect()
}

fn rule(name: &str, external: &[&str], pods: &[&str], action: Action) -> Rule {
    let side = |list: &[&str]| (!list.is_empty()).then(|| nets(list));
    Rule {
        name: name.into(),
        direction: Direction::Inbound,
        external: side(external),
        pods: side(pods),
        protocol: Protocol::Tcp,
        ports: vec![PortRange { first: 80, last: 80 }],
        source_ports: Vec::new(),
        action,
    }
}

fn policy(rules: Vec<Rule>) -> Policy {
    Policy {
        mode: Mode::Enforce,
        on_deny: OnDeny::Reject,
        pods: nets(&["10.200.1.0/24"]),
        external: nets(&["192.168.31.0/24"]),
        nodes: nets(&["192.168.31.17/32"]),
        rules,
        audited: Vec::new(),
        node_ports: None,
    }
}

fn elements(rules: &Ruleset, map: &str) -> Vec<String> {
    rules.maps[map].elements.iter().map(|(key, e)| format!("{key} {} {}", e.rule, e.verdict)).collect()
}

#[test]
fn a_rule_is_an_element_and_denies_come_first() {
    let rules = vec![
        rule("web", &["192.168.31.67/32"], &["10.200.1.0/28"], Action::Allow),
        rule("no", &["192.168.31.0/24"], &["10.200.1.9/32"], Action::Deny),
    ];
    let rules = ruleset(&policy(rules), &Options::default());
    assert_eq!(elements(&rules, "in4-allow-tcp-hpd-0"), ["192.168.31.67 . 10.200.1.0/28 . 80 web accept"]);
    // The whole LAN need not be compared.
    assert_eq!(elements(&rules, "in4-deny-tcp-pdx-0"), ["10.200.1.9 . 80 no goto deny-rule"]);
    let chain = &rules.chains["in4"].rules;
    let at = |map: &str| chain.iter().position(|rule| rule.contains(map)).unwrap();
    assert!(at("@in4-deny-tcp-pdx-0") < at("@in4-allow-tcp-hpd-0"), "{chain:#?}");
    assert_eq!(chain.last().unwrap(), "counter name no-rule goto deny");
}

#[test]
fn rules_of_many_hosts_and_many_pods_take_the_sum_and_not_the_product() {
    let hosts: Vec<String> = (0..100).map(|host| format!("192.168.31.{}/32", host * 2)).collect();
    let pods: Vec<String> = (0..100).map(|pod| format!("10.200.1.{}/32", pod * 2)).collect();
    let texts = |list: &[String]| -> Vec<IpNet> { list.iter().map(|net| net.parse().unwrap()).collect() };
    let mut wide = rule("wide", &[], &[], Action::Allow);
    (wide.external, wide.pods) = (Some(texts(&hosts)), Some(texts(&pods)));
    let policy = policy(vec![wide]);
    let (counted, most) = count(&policy);
    assert_eq!((counted, most.unwrap().name.as_str()), (200, "wide"));
    let rules = ruleset(&policy, &Options::default());
    let of_maps: usize = rules.maps.values().map(|map| map.elements.len()).sum();
    assert_eq!(of_maps, counted);
    assert!(rules.maps["in4-allow-pods"].elements.contains_key("10.200.1.4"));
}

#[test]
fn a_changed_rule_changes_its_own_elements_only() {
    let rules = |port| {
        let mut changed = rule("changed", &["192.168.31.70/32"], &[], Action::Allow);
        changed.ports = vec![PortRange { first: port, last: port }];
        let rules = vec![rule("web", &["192.168.31.67/32"], &["10.200.1.0/28"], Action::Allow), changed];
        ruleset(&policy(rules), &Options::default())
    };
    assert_eq!(
        script::change(&rules(81), &rules(82)),
        "delete element inet bridge-agent in4-allow-tcp-hdx-0 {\n\t192.168.31.70 . 81 : accept,\n}\n\
         add element inet bridge-agent in4-allow-tcp-hdx-0 {\n\t192.168.31.70 . 82 counter comment \"changed\" : accept,\n}\n"
    );
    assert_eq!(script::change(&rules(81), &rules(81)), "");
}

#[test]
fn nothing_is_written_for_a_policy_that_judges_nothing() {
    let mut nothing = policy(Vec::new());
    nothing.pods.clear();
    assert_eq!(ruleset(&nothing, &Options::default()), Ruleset::default());
    // A gateway refuses everything that no rule allows.
    let strict = Options { scope: Scope::Strict, ..Options::default() };
    assert_eq!(ruleset(&nothing, &strict).chains["scope"].rules, ["counter name strict goto deny"]);
}

#[test]
fn in_audit_mode_no_packet_is_stopped() {
    let mut audited = policy(vec![rule("no", &[], &[], Action::Deny)]);
    audited.mode = Mode::Audit;
    audited.node_ports =
        Some(NodePorts { range: PortRange { first: 30_000, last: 32_767 }, allow: Vec::new() });
    let topology = Topology {
        external: vec!["eth0".into()],
        internal: vec!["cali+".into()],
        remote: vec![RoutedPods { interface: "vxlan0".into(), pods: nets(&["10.200.1.128/25"]) }],
        gateways: Vec::new(),
        tunnels: vec![Tunnel::Udp(4789), Tunnel::Protocol(47)],
        tunnel_interfaces: vec!["vxlan0".into()],
        settled: Vec::new(),
    };
    let rules = ruleset(&audited, &Options { topology, ..Options::default() });
    for (name, chain) in &rules.chains {
        for rule in &chain.rules {
            assert!(!rule.ends_with("drop") && !rule.contains("reject"), "{name}: {rule}");
        }
    }
    assert!(rules.chains["sources4"].rules.iter().any(|rule| rule.starts_with("iifname \"cali*\"")));
}

#[test]
fn only_nodes_send_packets_of_tunnels_and_none_where_no_node_is_known() {
    let topology = Topology { tunnels: vec![Tunnel::Udp(4789)], ..Topology::default() };
    let options = Options { topology, ..Options::default() };
    let mut policy = policy(Vec::new());
    policy.nodes.clear();
    // The packet inside may be of the other family.
    policy.pods.retain(|net| matches!(net, IpNet::V4(_)));
    let rules = ruleset(&policy, &options);
    for family in ["4", "6"] {
        let of = |name: &str| rules.chains[format!("{name}{family}").as_str()].rules.clone();
        assert!(
            of("sources").contains(&format!("udp dport 4789 jump tunnel{family}")),
            "{:?}",
            of("sources")
        );
        assert_eq!(of("tunnel"), ["fib daddr type local goto spoofed"]);
    }
    assert_eq!(rules.chains["sources6"].rules.len(), 1);
}

/// The element of each map that a packet would find, in the order in which the chain looks the maps up.
fn verdict(
    rules: &Ruleset,
    external: IpNet,
    pod: IpNet,
    protocol: u8,
    ports: [u16; 2],
) -> Option<(String, String)> {
    let chain = &rules.chains["in4"].rules;
    let matches = |key: &str, fields: &str| {
        let mut parts = key.split(" . ");
        fields.split(" . ").all(|field| {
            let part = parts.next().unwrap();
            let number = |number: u32| match part.split_once('-') {
                Some((first, last)) => (first.parse().unwrap()..=last.parse().unwrap()).contains(&number),
                None => part.parse() == Ok(number),
            };
            let prefix = |address: IpNet| {
                if let Some((first, last)) = part.split_once('-') {
                    let range = first.parse::<std::net::IpAddr>().unwrap()..=last.parse().unwrap();
                    return range.contains(&address.addr());
                }
                let part = if part.contains('/') { part.to_owned() } else { format!("{part}/32") };
                part.parse::<IpNet>().unwrap().contains(&address)
            };
            match field {
                "ip saddr" => prefix(external),
                "ip daddr" => prefix(pod),
                "meta l4proto" => number(protocol.into()),
                "th sport" => number(ports[0].into()),
                _ => number(ports[1].into()),
            }
        })
    };
    let speaks_of = |rule: &&String| match rule.strip_prefix("meta l4proto ") {
        Some(rest) if rest.starts_with("{ 6, 17, 132 }") => true,
        Some(rest) => rest.split_once(' ').is_some_and(|(number, _)| number == protocol.to_string()),
        None => true,
    };
    let maps =
        chain.iter().filter(speaks_of).filter_map(|rule| rule.split_once("vmap @").map(|(_, map)| map));
    for map in maps {
        let map = &rules.maps[map];
        assert!(!map.exact || map.elements.keys().all(|key| !key.contains(['/', '-'])), "{map:?}");
        let found: Vec<_> = map.elements.iter().filter(|(key, _)| matches(key, &map.key)).collect();
        assert!(found.len() < 2, "{found:?}");
        if let Some((_, element)) = found.first() {
            if let Some(chain) = element.verdict.strip_prefix("jump ") {
                let inner = rules.chains[chain].rules.clone();
                let mut rules = rules.clone();
                rules.chains.get_mut("in4").unwrap().rules = inner;
                if let Some(found) = verdict(&rules, external, pod, protocol, ports) {
                    return Some(found);
                }
                continue;
            }
            return Some((element.rule.clone(), element.verdict.clone()));
        }
    }
    None
}

fn range() -> impl Strategy<Value = PortRange> {
    (1u16..8, 1u16..8).prop_map(|(a, b)| PortRange { first: a.min(b), last: a.max(b) })
}

fn side(network: &'static str) -> impl Strategy<Value = Option<Vec<IpNet>>> {
    let net = (0u8..8, 29u8..=32).prop_map(move |(last, length)| {
        format!("{network}.{last}/{length}").parse::<IpNet>().unwrap().trunc()
    });
    prop::option::of(prop::collection::vec(net, 1..6))
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let ports = || prop::collection::vec(range(), 0..3);
    (side("192.168.31"), side("10.200.1"), any::<bool>(), any::<bool>(), ports(), ports()).prop_map(
        |(external, pods, deny, tcp, ports, source_ports)| Rule {
            name: String::new(),
            direction: Direction::Inbound,
            external,
            pods,
            protocol: if tcp { Protocol::Tcp } else { Protocol::Any },
            ports,
            source_ports,
            action: if deny { Action::Deny } else { Action::Allow },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn the_maps_decide_as_the_rules_do(
        rules in prop::collection::vec(any_rule(), 1..8),
        packets in prop::collection::vec((0u8..8, 0u8..8, any::<bool>(), 0u16..9, 0u16..9), 40)
    ) {
        let rules: Vec<Rule> =
            rules.into_iter().enumerate().map(|(index, rule)| Rule { name: format!("r{index}"), ..rule }).collect();
        let mut policy = policy(rules);
        // Small enough for rules to name all of them.
        (policy.external, policy.pods) = (nets(&["192.168.31.0/29"]), nets(&["10.200.1.0/29"]));
        let rendered = ruleset(&policy, &Options::default());
        for (host, pod, tcp, source_port, port) in packets {
            let (external, pod) = ([192, 168, 31, host], [10, 200, 1, pod]);
            let packet = crate::policy::reference::Packet {
                source: external.into(),
                destination: pod.into(),
                protocol: if tcp { bridge_common::filter::policy::class::TCP } else { bridge_common::filter::policy::class::UDP },
                source_port,
                destination_port: port,
            };
            let wanted = crate::policy::reference::evaluate_model(&policy, &[], &packet);
            let host = |address: [u8; 4]| IpNet::from(std::net::IpAddr::from(address));
            let seen = verdict(&rendered, host(external), host(pod), if tcp { 6 } else { 17 }, [source_port, port]);
            // Rules that are looked up by pod come behind the others: which of several allows counts is not compared.
            let wanted = wanted.map(|(_, action)| if action == Action::Allow { "accept" } else { "goto deny-rule" });
            prop_assert_eq!(seen.map(|(_, verdict)| verdict), wanted.map(str::to_owned));
        }
    }
}
