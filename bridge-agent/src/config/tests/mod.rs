//! The configuration as a whole; each kind of value has tests of its own beside it.

mod errors;
mod odd;
mod properties;

use super::*;
use crate::model::{Action, Direction, PortRange, Protocol};

const MINIMAL: &str = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\n";

fn loaded(text: &str) -> Loaded {
    parse(text, None).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let config = loaded(MINIMAL).config;
    let enforcement = &config.enforcement;
    assert_eq!(enforcement.engines, [Engine::Ebpf, Engine::Iptables]);
    assert_eq!(
        (enforcement.scope, enforcement.events.rate, enforcement.events.allowed),
        (Scope::Scoped, 100, false)
    );
    let iptables = enforcement.iptables;
    assert_eq!((iptables.backend, iptables.mark.get().get(), iptables.log_rate), (Backend::Auto, 0x2000, 0));
    assert_eq!(iptables.lock_wait, TimeSpan::seconds(5));
    assert_eq!((enforcement.flows.established, enforcement.flows.half_open), (262_144, 65_536));
    let timeouts = &enforcement.timeouts;
    let seconds = [
        timeouts.tcp_handshake,
        timeouts.tcp_established,
        timeouts.tcp_closing,
        timeouts.tcp_reset,
        timeouts.udp_unreplied,
        timeouts.udp_replied,
        timeouts.icmp,
        timeouts.other,
    ]
    .map(|span| span.duration().as_secs());
    assert_eq!(seconds, [30, 86_400, 120, 120, 30, 180, 30, 600]);
    assert_eq!(config.api.socket.0.to_str(), Some("/run/bridge/agent.sock"));
    assert_eq!((config.api.mode.0, config.persistence.save), (0o660, Save::Auto));
    assert!(config.node_ports.is_none() && config.port_pool.is_none() && config.routes.is_none());
}

#[test]
fn the_policy_has_what_the_file_says() {
    let policy = loaded(
        "role: node
networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24], nodes: [192.168.31.17]}
enforcement: {mode: audit, onDeny: drop}
rules:
  - {name: a, direction: inbound, external: [192.168.31.67/32], protocol: tcp, ports: [40002, \"60001-60100\", 40001]}
  - {name: b, direction: outbound, protocol: any, sourcePorts: 61001, action: deny}
nodePorts: {allow: 30080}
",
    )
    .policy();
    let range = |first, last| PortRange { first, last };
    assert_eq!((policy.mode, policy.on_deny), (crate::model::Mode::Audit, crate::model::OnDeny::Drop));
    assert_eq!(policy.nodes, ["192.168.31.17/32".parse().unwrap()]);
    let [a, b] = policy.rules.as_slice() else { panic!("{:?}", policy.rules) };
    assert_eq!((a.direction, a.protocol, a.action), (Direction::Inbound, Protocol::Tcp, Action::Allow));
    assert_eq!(a.external, Some(vec!["192.168.31.67/32".parse().unwrap()]));
    assert_eq!((&a.pods, &a.source_ports), (&None, &vec![]));
    // Both ends stay in the range; neighbours become one range.
    assert_eq!(a.ports, [range(40001, 40002), range(60001, 60100)]);
    assert_eq!((b.direction, b.protocol, b.action), (Direction::Outbound, Protocol::Any, Action::Deny));
    assert_eq!((b.source_ports.as_slice(), b.ports.as_slice()), (&[range(61001, 61001)][..], &[][..]));
    let node_ports = policy.node_ports.unwrap();
    assert_eq!((node_ports.range, node_ports.allow), (range(30000, 32767), vec![range(30080, 30080)]));
}

#[test]
fn a_rule_by_label_matches_nothing_until_its_pods_are_known() {
    let policy = loaded(
        "role: node
networks: {external: [192.168.31.0/24]}
kubernetes: {}
rules: [{name: a, direction: inbound, protocol: any, podSelector: {matchLabels: {app: api}}}]
",
    )
    .policy();
    assert_eq!(policy.rules[0].pods, Some(vec![]), "None would be every pod");
}

#[test]
fn aliases_share_a_list() {
    let policy = loaded(
        "role: node
networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}
rules:
  - {name: a, direction: inbound, protocol: tcp, external: &devices [192.168.31.67/32], ports: 1}
  - {name: b, direction: inbound, protocol: udp, external: *devices, ports: 2}
",
    )
    .policy();
    assert_eq!(policy.rules[0].external, policy.rules[1].external);
}

#[test]
fn unquoted_scalars_are_what_they_are_wanted_as() {
    // A YAML resolver makes these a boolean, the number 432, and a number.
    let config = loaded(&format!(
        "{MINIMAL}api: {{mode: 0660, group: no}}
rules: [{{name: 80, direction: inbound, protocol: tcp, ports: 60001-60100}}]\n"
    ))
    .config;
    assert_eq!((config.api.mode.0, config.api.group.as_deref()), (0o660, Some("no")));
    assert_eq!(config.rules[0].name.as_str(), "80");
}

#[test]
fn the_examples_are_valid_and_free_of_warnings() {
    for name in ["node.yaml", "host.yaml"] {
        let path = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(name);
        let loaded = load(&path).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(loaded.warnings, Diagnostics::default(), "{name}");
    }
}

#[test]
fn every_key_of_the_schema_is_described() {
    fn walk(path: &str, schema: &serde_json::Value, keys: &mut usize) {
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            assert!(property["description"].as_str().is_some_and(|text| text.len() > 10), "{path}");
            *keys += 1;
            walk(&path, property, keys);
        }
        for (name, definition) in schema["$defs"].as_object().into_iter().flatten() {
            walk(name, definition, keys);
        }
    }
    let mut keys = 0;
    walk("", &schema(), &mut keys);
    assert!(keys > 50, "{keys}");
}

#[test]
fn the_schema_promises_no_null() {
    let text = schema().to_string();
    assert!(!text.contains("\"null\"") && text.contains("\"additionalProperties\":false"));
}

#[test]
fn the_pool_serves_the_other_side_unless_told_otherwise() {
    let pool = |role: &str, more: &str| {
        let text = format!(
            "role: {role}\nnetworks: {{pods: [10.200.1.0/24], external: [192.168.31.0/24]}}
portPool: {{ports: 61001-61100{more}}}\n"
        );
        loaded(&text).config.pool_destinations().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(pool("node", ""), ["192.168.31.0/24"]);
    assert_eq!(pool("host", ""), ["10.200.1.0/24"]);
    assert_eq!(pool("host", ", destinations: [10.0.0.0/8]"), ["10.0.0.0/8"]);
}

#[test]
fn editors_find_the_schema_from_each_example() {
    let deploy = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let written = std::fs::read_to_string(deploy.join("bridge.schema.json")).unwrap();
    assert!(
        written == format!("{:#}\n", schema()),
        "deploy/bridge.schema.json is out of date: run `cargo xtask crds`"
    );
    assert_eq!(schema()["$id"], "https://bridge.lan/schemas/bridge.schema.json");
    for example in ["node.yaml", "host.yaml"] {
        let text = std::fs::read_to_string(deploy.join("examples").join(example)).unwrap();
        assert!(text.starts_with("# yaml-language-server: $schema=../bridge.schema.json\n"), "{text}");
    }
}
