use std::net::IpAddr;

use serde_json::{Value, json};

use super::*;
use crate::iptables::walk::{Interfaces, Packet};

const OTHERS: &str = r#"{"nftables":[{"metainfo":{}},
    {"chain":{"family":"ip","table":"filter","name":"FORWARD","hook":"forward","prio":0,"policy":"drop"}},
    {"chain":{"family":"inet","table":"site","name":"fwd","hook":"forward","prio":0,"policy":"accept"}},
    {"chain":{"family":"inet","table":"site","name":"lan"}},
    {"set":{"family":"inet","table":"site","name":"plcs","elem":[{"prefix":{"addr":"192.168.31.64","len":28}}]}}
    RULES]}"#;

fn packet(destination_port: u16) -> Packet {
    Packet {
        source: IpAddr::from([10, 200, 1, 91]),
        source_port: 61001,
        destination: IpAddr::from([192, 168, 31, 67]),
        destination_port,
        protocol: 6,
        icmp_type: 0,
        to_node: false,
    }
}

/// Walks through rules of `fwd` and `lan`: pairs of a chain and its expressions.
fn others(rules: &[(&str, Value)], destination_port: u16) -> Walked {
    let rules: String = rules
        .iter()
        .map(|(chain, parts)| {
            let rule = json!({"rule": {"family": "inet", "table": "site", "chain": chain, "expr": parts}});
            format!(",{rule}")
        })
        .collect();
    let ruleset = Ruleset::parse(&OTHERS.replace("RULES", &rules));
    let packet = packet(destination_port);
    let interfaces = Interfaces { input: Some("cali1"), output: Some("eth0") };
    ruleset.walk(&Way { before: &packet, after: &packet, interfaces }, Owner::Others)
}

fn port(port: u16) -> Value {
    json!({"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": port}})
}

#[test]
fn the_rule_that_drops_is_named() {
    let to_plcs = json!({"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "@plcs"}});
    let rules =
        [("fwd", json!([to_plcs, {"jump": {"target": "lan"}}])), ("lan", json!([port(502), {"drop": null}]))];
    let dropped = others(&rules, 502);
    assert_eq!(dropped.passes, Some(false));
    assert_eq!(dropped.rule.as_deref(), Some("inet site lan: tcp dport 502 drop"));
    assert_eq!(dropped.chains, ["inet site fwd", "lan"]);
    assert_eq!(others(&rules, 503).passes, Some(true));
}

#[test]
fn a_return_behind_goto_ends_the_chain_that_went() {
    let rules = [
        ("fwd", json!([{"goto": {"target": "lan"}}])),
        ("fwd", json!([{"drop": null}])),
        ("lan", json!([port(502), {"return": null}])),
        ("lan", json!([port(503), {"drop": null}])),
    ];
    assert_eq!(
        [502, 503, 504].map(|port| others(&rules, port).passes),
        [Some(true), Some(false), Some(true)]
    );
    let jump = [("fwd", json!([{"jump": {"target": "lan"}}])), rules[1].clone(), rules[2].clone()];
    assert_eq!(others(&jump, 502).passes, Some(false));
}

#[test]
fn a_condition_that_is_not_read_leaves_the_verdict_open_unless_both_ways_agree() {
    let limit = json!({"limit": {"rate": 5, "per": "minute"}});
    let open = others(&[("fwd", json!([limit, {"drop": null}]))], 502);
    assert_eq!(
        (open.passes, open.may_drop.as_slice()),
        (None, &["inet site fwd: limit drop".to_owned()][..])
    );
    let both = [("fwd", json!([limit, {"reject": {}}])), ("fwd", json!([{"drop": null}]))];
    assert_eq!(others(&both, 502).passes, Some(false));
    let elsewhere = json!({"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "docker*"}});
    assert_eq!(others(&[("fwd", json!([elsewhere, limit, {"drop": null}]))], 502).passes, Some(true));
    let not_read = json!({"match": {"op": "==", "left": {"meta": {"key": "skuid"}}, "right": 0}});
    let may_leave = [("fwd", json!([not_read, {"accept": null}])), ("fwd", json!([{"drop": null}]))];
    assert_eq!(others(&may_leave, 502).passes, None);
}

#[test]
fn the_policy_of_a_chain_counts_and_tables_of_iptables_do_not() {
    let text = OTHERS.replace("RULES", "").replace(r#""policy":"accept""#, r#""policy":"drop""#);
    let packet = packet(502);
    let way = Way { before: &packet, after: &packet, interfaces: Interfaces::default() };
    let dropped = Ruleset::parse(&text).walk(&way, Owner::Others);
    assert_eq!((dropped.passes, dropped.rule.as_deref()), (Some(false), Some("inet site fwd: policy drop")));
    let only_iptables = Ruleset::parse(&OTHERS.replace("RULES", ""));
    assert_eq!(only_iptables.walk(&way, Owner::Others).passes, Some(true));
    assert_eq!(Ruleset::parse("no JSON").walk(&way, Owner::Others).passes, Some(true));
}

#[test]
fn a_masquerade_is_found_where_its_conditions_hold() {
    let text = r#"{"nftables":[
        {"chain":{"family":"ip","table":"kube","name":"post","hook":"postrouting","prio":100,"policy":"accept"}},
        {"rule":{"family":"ip","table":"kube","chain":"post","expr":[
            {"match":{"op":"==","left":{"payload":{"protocol":"ip","field":"saddr"}},"right":{"prefix":{"addr":"10.200.0.0","len":16}}}},
            {"match":{"op":"==","left":{"meta":{"key":"oifname"}},"right":"OUT"}},{"masquerade":null}]}}]}"#;
    let packet = packet(502);
    let interfaces = Interfaces { input: Some("cali1"), output: Some("eth0") };
    let way = Way { before: &packet, after: &packet, interfaces };
    let found = |out: &str| Ruleset::parse(&text.replace("OUT", out)).masquerades(&way);
    assert_eq!(found("eth0"), ["ip kube post: ip saddr 10.200.0.0/16 meta oifname eth0 masquerade"]);
    assert!(found("eth1").is_empty());
}
