//! Properties that hold for any configuration.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::{FilePath, parse};
use crate::config::leaf::Leaf;
use crate::config::{
    Backend, Config, Enforcement, Engine, Events, FastPath, Flows, InterfacePattern, Interfaces, Iptables,
    Network, Networks, Nftables, NodePorts, PacketMark, PortItem, PortPool, Ports, Role, Rule, RuleName,
    Scope, Syslog, TimeSpan, Timeouts, Xdp,
};
use crate::model::{Action, Direction, Mode, OnDeny, PortRange, Protocol};

/// Sorted distinct ports, two at a time: disjoint ranges in any number of shapes.
fn ports(first: u16, last: u16) -> impl Strategy<Value = Ports> {
    btree_set(first..=last, 2..8).prop_map(|bounds| {
        let bounds: Vec<u16> = bounds.into_iter().collect();
        let range = |pair: &[u16]| {
            PortItem(PortRange { first: pair[0], last: pair[1] - u16::from(pair[1].is_multiple_of(3)) })
        };
        Ports(bounds.chunks_exact(2).map(range).collect())
    })
}

/// A network inside 10.0.0.0/9 or fd00:1::/32: pods. With `side` 1, inside 10.128.0.0/9 or fd00:2::/32: LAN hosts.
fn network(side: u8) -> impl Strategy<Value = Network> {
    let v4 = (any::<[u8; 3]>(), 9_u8..=32).prop_map(move |([a, b, c], length)| {
        let address = Ipv4Addr::new(10, a & 0x7f | side << 7, b, c);
        IpNet::V4(Ipv4Net::new(address, length).unwrap())
    });
    let v6 = (any::<u64>(), 32_u8..=128).prop_map(move |(low, length)| {
        let address = Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(side + 1) << 96 | u128::from(low));
        IpNet::V6(Ipv6Net::new(address, length).unwrap())
    });
    prop_oneof![v4, v6].prop_map(Network::from)
}

fn all(side: u8) -> Vec<Network> {
    let nets = [["10.0.0.0/9", "fd00:1::/32"], ["10.128.0.0/9", "fd00:2::/32"]];
    nets[usize::from(side)].iter().map(|net| Network::parse(net).unwrap()).collect()
}

fn rule() -> impl Strategy<Value = Rule> {
    let side = |side| option::of(vec(network(side), 1..4));
    let protocol = select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Icmp, Protocol::Any]);
    (
        "[A-Za-z0-9._-]{1,60}",
        select(vec![Direction::Inbound, Direction::Outbound]),
        side(1),
        side(0),
        protocol,
        option::of(ports(1, u16::MAX)),
        option::of(ports(1, u16::MAX)),
        select(vec![Action::Allow, Action::Deny]),
        select(vec![None, Some(Mode::Enforce), Some(Mode::Audit)]),
    )
        .prop_map(|(name, direction, external, pods, protocol, ports, source_ports, action, mode)| {
            let has_ports = protocol != Protocol::Icmp;
            let needs_ports = has_ports && protocol != Protocol::Any;
            let ports =
                ports.or_else(|| needs_ports.then(|| Ports(vec![PortItem::parse("1-65535").unwrap()])));
            Rule {
                name: RuleName::parse(&name).unwrap(),
                direction,
                external,
                pods,
                pod_selector: None,
                namespace_selector: None,
                protocol,
                ports: ports.filter(|_| has_ports),
                source_ports: source_ports.filter(|_| has_ports),
                action,
                mode,
            }
        })
        .prop_filter("the two sides have an IP version in common", |rule| {
            let versions = |list: &Option<Vec<Network>>| {
                let has = |v4: bool| {
                    list.as_ref()
                        .is_none_or(|list| list.iter().any(|net| matches!(net.net(), IpNet::V4(_)) == v4))
                };
                (has(true), has(false))
            };
            let (external, pods) = (versions(&rule.external), versions(&rule.pods));
            external.0 && pods.0 || external.1 && pods.1
        })
}

fn enforcement() -> impl Strategy<Value = Enforcement> {
    (
        any::<[bool; 5]>(),
        1_u64..86_400,
        0_u32..1_000_000,
        1024_u32..16_777_216,
        vec("[a-z](\\*?[a-z0-9.-]){0,5}\\*?", 0..3),
        vec("[A-Z]\\*{0,1}[a-z0-9\"#&%@!-]{0,9}", 0..3),
    )
        .prop_map(|([audit, drop, strict, allowed, one], seconds, rate, flows, external, internal)| {
            // None is in its list twice.
            let patterns = |list: Vec<String>| {
                let names: BTreeSet<String> = list.into_iter().collect();
                names.iter().map(|text| InterfacePattern::parse(text).unwrap()).collect()
            };
            Enforcement {
                mode: if audit { Mode::Audit } else { Mode::Enforce },
                engines: if one { vec![Engine::Iptables] } else { vec![Engine::Ebpf, Engine::Nftables] },
                on_deny: if drop { OnDeny::Drop } else { OnDeny::Reject },
                scope: if strict { Scope::Strict } else { Scope::Scoped },
                iptables: Iptables {
                    backend: if one { Backend::Legacy } else { Backend::Auto },
                    mark: PacketMark::parse(&format!("{:#x}", 1_u32 << (rate % 32))).unwrap(),
                    log_rate: rate % 10_001,
                    lock_wait: TimeSpan::seconds(seconds % 60 + 1),
                },
                nftables: Nftables {
                    mark: PacketMark::parse(&format!("{:#x}", 1_u32 << (seconds % 32))).unwrap(),
                    log_rate: rate % 10_001,
                },
                interfaces: Interfaces { external: patterns(external), internal: patterns(internal) },
                timeouts: Timeouts { tcp_established: TimeSpan::seconds(seconds), ..Timeouts::default() },
                events: Events { rate, allowed },
                syslog: allowed.then(|| Syslog { rate: rate.clamp(1, 10_000), ..Syslog::default() }),
                flows: Flows { established: flows, half_open: flows },
                fast_path: if one { FastPath::Off } else { FastPath::Auto },
                xdp: if drop { Xdp::Auto } else { Xdp::Off },
            }
        })
}

fn config() -> impl Strategy<Value = Config> {
    let node_ports = option::of(option::of(ports(30000, 32767)));
    (
        vec(rule(), 0..6),
        enforcement(),
        node_ports,
        option::of((ports(33000, 65535), option::of(1_u32..3), proptest::bool::ANY)),
    )
        .prop_map(|(mut rules, enforcement, node_ports, pool)| {
            rules.sort_by(|a, b| a.name.cmp(&b.name));
            rules.dedup_by(|a, b| a.name == b.name);
            Config {
                names: [("192.168.31.67".to_owned(), "plc-7".to_owned())].into(),
                role: Role::Node,
                networks: Networks { pods: all(0), external: all(1), nodes: vec![] },
                enforcement,
                rules,
                node_ports: node_ports
                    .map(|allow| NodePorts { allow: allow.unwrap_or_default(), ..NodePorts::default() }),
                port_pool: pool.map(|(ports, quota, flag)| PortPool {
                    ports,
                    exclude: None,
                    destinations: None,
                    transparent: None,
                    quota,
                    strict: !flag,
                    bind_udp: flag,
                    masquerade: flag,
                }),
                routes: None,
                kubernetes: None,
                persistence: Default::default(),
                api: Default::default(),
            }
        })
}

/// Text that a mutation inserts: tokens of YAML and of the leaves.
const PIECES: &[&str] = &[
    "",
    " ",
    "\n",
    "\t",
    "  ",
    ":",
    ": ",
    "-",
    "- ",
    ",",
    "[",
    "]",
    "{",
    "}",
    "#",
    "&a ",
    "*a",
    "<<: *a",
    "!!str ",
    "!x ",
    "\"",
    "'",
    "|",
    ">",
    "%",
    "@",
    "`",
    "~",
    "null",
    "---\n",
    "...",
    "\u{0}",
    "\u{feff}",
    "\u{2028}",
    "ä",
    "\u{1F600}",
    "0",
    "-1",
    "65535",
    "65536",
    "99999999999999999999",
    "1e400",
    ".nan",
    "/",
    "/33",
    "10.0.0.0/8",
    "::/0",
    "::ffff:1.2.3.4/128",
    "30s",
    "true",
    "\\x",
    "? ",
    "\r\n",
    "\r",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// A valid configuration is accepted, and `check` prints the same configuration.
    #[test]
    fn printing_and_reading_back_changes_nothing(config in config()) {
        let yaml = config.to_yaml().unwrap();
        let read = parse(&yaml, None).map_err(|error| TestCaseError::fail(format!("{error}\n{yaml}")))?;
        prop_assert_eq!(&read.config, &config);

        let effective = config.effective();
        let read = parse(&effective.to_yaml().unwrap(), None).unwrap().config;
        prop_assert_eq!(&read, &effective);
        prop_assert_eq!(read.effective(), effective.clone(), "filling in defaults is done once");

        // The value filled in is the default of the omitted one.
        let (policy, filled) = (config.policy(), read.policy());
        for (rule, filled) in policy.rules.iter().zip(&filled.rules) {
            prop_assert_eq!(rule.pods.as_ref().unwrap_or(&policy.pods), filled.pods.as_ref().unwrap());
            prop_assert_eq!(rule.external.as_ref().unwrap_or(&policy.external), filled.external.as_ref().unwrap());
            prop_assert_eq!((&rule.ports, &rule.source_ports), (&filled.ports, &filled.source_ports));
        }
        prop_assert_eq!(policy.node_ports, filled.node_ports);
    }

    /// JSON is YAML: the output of `check --json` is a configuration too.
    #[test]
    fn json_is_read_as_well(config in config()) {
        let json = serde_json::to_string_pretty(&config).unwrap();
        prop_assert_eq!(parse(&json, None).unwrap().config, config);
    }

    /// No text makes it panic, every error can be shown, and has a place in the file unless the file has no value.
    #[test]
    fn no_text_makes_it_panic(
        file in select(vec![include_str!("../../../../deploy/examples/node.yaml"), include_str!("../../../../deploy/examples/host.yaml")]),
        edits in vec((any::<prop::sample::Index>(), 0_usize..12, select(PIECES)), 1..6),
    ) {
        let mut text: Vec<char> = file.chars().collect();
        for (at, removed, piece) in edits {
            let at = at.index(text.len() + 1);
            let end = (at + removed).min(text.len());
            text.splice(at..end, piece.chars());
        }
        let text: String = text.into_iter().collect();
        if let Err(error) = parse(&text, Some(FilePath::new("bridge.yaml"))) {
            prop_assert!(!error.0.list.is_empty());
            prop_assert!(error.to_string().starts_with("error: ") || error.to_string().starts_with("warning: "));
            for diagnostic in &error.0.list {
                prop_assert!(diagnostic.place.is_some() || diagnostic.message.contains("is empty"), "{diagnostic:?}\n{text}");
                prop_assert!(!diagnostic.help.is_empty());
            }
        }
    }

    /// Nor does input that is no text at all.
    #[test]
    fn nor_do_random_bytes(bytes in vec(any::<u8>(), 0..200)) {
        let _ = parse(&String::from_utf8_lossy(&bytes), None).map_err(|error| error.to_string());
    }
}
