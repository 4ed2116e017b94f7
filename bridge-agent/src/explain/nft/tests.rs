use std::net::IpAddr;

use serde_json::{Value, json};

use super::*;
use crate::{
    iptables::walk::{Interfaces, Packet, State},
    model::PortRange,
};

const OTHERS: &str = r#"{"nftables":[{"metainfo":{}},
    {"chain":{"family":"ip","table":"filter","name":"FORWARD","hook":"forward","prio":0,"policy":"drop"}},
    {"chain":{"family":"inet","table":"site","name":"fwd","hook":"forward","prio":0,"policy":"accept"}},
    {"chain":{"family":"inet","table":"site","name":"lan"}},
    {"set":{"family":"inet","table":"site","name":"plcs","elem":[{"prefix":{"addr":"192.168.31.64","len":28}}]}}
    RULES]}"#;

fn packet(destination_port: u16) -> Packet {
    Packet {
        source: IpAddr::from([10, 200, 1, 91]),
        source_ports: PortRange::one(61001),
        destination: IpAddr::from([192, 168, 31, 67]),
        destination_port,
        protocol: 6,
        icmp_type: 0,
        to_node: false,
        from_node: false,
        state: State::New,
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

/// Follows `packet` through one rule of a chain at a hook.
fn at(family: &str, hook: &Value, packet: &Packet, rule: Value) -> Walked {
    let mut chain =
        json!({"family": family, "table": "site", "name": "c", "type": "filter", "policy": "accept"});
    chain.as_object_mut().unwrap().extend(hook.as_object().unwrap().clone());
    let rule = json!({"rule": {"family": family, "table": "site", "chain": "c", "expr": rule}});
    let ruleset = Ruleset::parse(&json!({"nftables": [{"chain": chain}, rule]}).to_string());
    let interfaces = Interfaces { input: Some("cali1"), output: Some("eth0") };
    ruleset.walk(&Way { before: packet, after: packet, interfaces }, Owner::Others)
}

#[test]
fn each_hook_has_its_packets() {
    let drop = || json!([{"drop": null}]);
    let (packet, answer) = (packet(502), packet(502).reply());
    let passes = |family: &str, hook: Value, packet: &Packet| at(family, &hook, packet, drop()).passes;
    for hook in ["prerouting", "forward", "postrouting"] {
        assert_eq!(passes("inet", json!({"hook": hook}), &packet), Some(false), "{hook}");
        assert_eq!(passes("ip6", json!({"hook": hook}), &packet), Some(true), "{hook} of the other family");
        assert_eq!(passes("bridge", json!({"hook": hook}), &packet), Some(true), "{hook} of a bridge");
    }
    for hook in ["input", "output"] {
        assert_eq!(passes("inet", json!({"hook": hook}), &packet), Some(true), "{hook}");
    }
    let of_node = Packet { from_node: true, ..answer };
    assert_eq!(passes("inet", json!({"hook": "output"}), &of_node), Some(false));
    assert_eq!(passes("inet", json!({"hook": "prerouting"}), &of_node), Some(true));
    let at_device = |device: &str| passes("netdev", json!({"hook": "ingress", "dev": device}), &packet);
    assert_eq!([at_device("cali1"), at_device("eth0")], [Some(false), Some(true)]);
    let not_shown = at("netdev", &json!({"hook": "egress"}), &packet, drop());
    assert_eq!((not_shown.passes, not_shown.may_drop.len()), (None, 1));
}

#[test]
fn connection_tracking_knows_a_packet_behind_its_hook() {
    let state = |bits: u64| json!([{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": bits}}, {"drop": null}]);
    let (packet, answer) = (packet(502), packet(502).reply());
    let at_priority = |priority: i64, bits| {
        at("inet", &json!({"hook": "prerouting", "prio": priority}), &packet, state(bits)).passes
    };
    assert_eq!([at_priority(-300, 8), at_priority(-150, 8)], [Some(true), Some(false)], "a new flow");
    let forward = json!({"hook": "forward"});
    assert_eq!(
        [2, 8].map(|bits| at("inet", &forward, &answer, state(bits)).passes),
        [Some(false), Some(true)]
    );
    let parts = [
        (json!({"notrack": null}), state(64)),
        (
            json!({"mangle": {"key": {"ct": {"key": "mark"}}, "value": 5}}),
            json!([{"match": {"op": "==", "left": {"ct": {"key": "mark"}}, "right": 5}}, {"drop": null}]),
        ),
    ];
    for (first, second) in parts {
        let rules = [("fwd", json!([port(502), first])), ("fwd", second)];
        assert_eq!(
            [502, 503].map(|port| others(&rules, port).passes),
            [Some(false), Some(true)],
            "{rules:?}"
        );
    }
    let queue = others(&[("fwd", json!([{"queue": {"num": 4}}]))], 502);
    assert_eq!((queue.passes, queue.may_drop.len()), (None, 1));
}

#[test]
fn a_condition_on_the_source_port_holds_for_all_ports_or_is_no_verdict() {
    let sport = json!({"payload": {"protocol": "tcp", "field": "sport"}});
    let rule =
        json!([{"match": {"op": "==", "left": sport, "right": {"range": [61000, 61100]}}}, {"drop": null}]);
    let from = |first, last| {
        let packet = Packet { source_ports: PortRange { first, last }, ..packet(502) };
        at("inet", &json!({"hook": "forward"}), &packet, rule.clone()).passes
    };
    assert_eq!([from(61001, 61100), from(32768, 60999), from(32768, 61000)], [Some(false), Some(true), None]);
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
    let found = |out: &str| Ruleset::parse(&text.replace("OUT", out)).masquerades(&way).certain;
    assert_eq!(found("eth0"), ["ip kube post: ip saddr 10.200.0.0/16 meta oifname eth0 masquerade"]);
    assert!(found("eth1").is_empty());
}

/// The tables of kube-proxy in its mode `nftables`, shortened, as `nft --json --numeric` prints them.
fn kube_proxy(endpoints: &str) -> Ruleset {
    let match_of = |left: Value, right: Value| json!({"match": {"op": "==", "left": left, "right": right}});
    let payload = |field: &str| json!({"payload": {"protocol": "ip", "field": field}});
    let key = |first: Value| json!({"concat": [first, {"meta": {"key": "l4proto"}}, {"payload": {"protocol": "th", "field": "dport"}}]});
    let mark = json!({"meta": {"key": "mark"}});
    let chain = |name: &str, hook: Option<(&str, i64)>| match hook {
        Some((hook, priority)) => {
            json!({"chain": {"family": "ip", "table": "kube-proxy", "name": name, "type": "nat", "hook": hook,
            "prio": priority, "policy": "accept"}})
        }
        None => json!({"chain": {"family": "ip", "table": "kube-proxy", "name": name}}),
    };
    let rule = |chain: &str, parts: Value| json!({"rule": {"family": "ip", "table": "kube-proxy", "chain": chain, "expr": parts}});
    let service = "service-A-plant/plc/tcp/modbus";
    let endpoint = |number: u8| format!("endpoint-{number}-plant/plc/tcp/modbus__10.200.1.{number}/8080");
    let to = |number: u8| {
        let dnat = json!({"dnat": {"family": "ip", "addr": format!("10.200.1.{number}"), "port": 8080}});
        rule(&endpoint(number), json!([match_of(json!({"meta": {"key": "l4proto"}}), json!(6)), dnat]))
    };
    let numgen = json!({"vmap": {"key": {"numgen": {"mode": "random", "mod": 2, "offset": 0}},
        "data": {"set": [[0, {"goto": {"target": endpoint(91)}}], [1, {"goto": {"target": endpoint(92)}}]]}}});
    let not_pods = json!({"match": {"op": "!=", "left": payload("saddr"), "right": {"prefix": {"addr": "10.200.0.0", "len": 16}}}});
    let objects = json!([
        chain("nat-prerouting", Some(("prerouting", -100))), chain("nat-postrouting", Some(("postrouting", 100))),
        chain("services", None), chain(service, None), chain(&endpoint(91), None), chain(&endpoint(92), None),
        chain("mark-for-masquerade", None), chain("masquerading", None),
        {"map": {"family": "ip", "table": "kube-proxy", "name": "service-ips", "type": ["ipv4_addr", "inet_proto", "inet_service"],
            "map": "verdict", "elem": [[{"concat": ["172.16.0.10", 6, 502]}, {"goto": {"target": service}}]]}},
        {"map": {"family": "ip", "table": "kube-proxy", "name": "service-nodeports", "type": ["inet_proto", "inet_service"],
            "map": "verdict", "elem": [[{"concat": [6, 30080]}, {"goto": {"target": service}}]]}},
        rule("nat-prerouting", json!([{"jump": {"target": "services"}}])),
        rule("services", json!([{"vmap": {"key": key(payload("daddr")), "data": "@service-ips"}}])),
        rule("services", json!([
            match_of(json!({"fib": {"result": "type", "flags": ["daddr"]}}), json!(2)),
            {"vmap": {"key": {"concat": [{"meta": {"key": "l4proto"}}, {"payload": {"protocol": "th", "field": "dport"}}]},
                "data": "@service-nodeports"}}])),
        rule(service, json!([match_of(payload("daddr"), json!("172.16.0.10")), not_pods, {"jump": {"target": "mark-for-masquerade"}}])),
        rule(service, serde_json::from_str(endpoints).unwrap_or(json!([numgen]))),
        rule("mark-for-masquerade", json!([{"mangle": {"key": mark, "value": {"|": [mark, 16384]}}}])),
        to(91), to(92),
        rule("nat-postrouting", json!([{"jump": {"target": "masquerading"}}])),
        rule("masquerading", json!([match_of(json!({"&": [mark, 16384]}), json!(0)), {"return": null}])),
        rule("masquerading", json!([{"mangle": {"key": mark, "value": {"^": [mark, 16384]}}}])),
        rule("masquerading", json!([{"masquerade": {"flags": "fully-random"}}])),
    ]);
    Ruleset::parse(&json!({"nftables": objects}).to_string())
}

fn to_service(source: [u8; 4], destination: [u8; 4], destination_port: u16, to_node: bool) -> Packet {
    let (source, destination) = (IpAddr::from(source), IpAddr::from(destination));
    Packet { source, destination, to_node, ..packet(destination_port) }
}

#[test]
fn a_service_of_kube_proxy_leads_to_each_endpoint() {
    let interfaces = Interfaces { input: Some("eth0"), output: None };
    let ends = |packet: &Packet| {
        let way = Way { before: packet, after: packet, interfaces };
        kube_proxy("").destinations(&way)
    };
    let both = [(IpAddr::from([10, 200, 1, 91]), 8080), (IpAddr::from([10, 200, 1, 92]), 8080)];
    let (lan, service, node) = ([192, 168, 31, 67], [172, 16, 0, 10], [192, 168, 31, 17]);
    assert_eq!(ends(&to_service(lan, service, 502, false)), both);
    assert_eq!(ends(&to_service(lan, node, 30080, true)), both, "the NodePort");
    for other in [
        to_service(lan, service, 503, false),
        to_service(lan, node, 30080, false),
        to_service(lan, node, 30081, true),
    ] {
        assert!(ends(&other).is_empty(), "{other:?}");
    }
}

#[test]
fn a_service_of_kube_proxy_is_found_by_its_name() {
    let rules = kube_proxy("");
    assert_eq!(rules.service("plant", "plc"), [(IpAddr::from([172, 16, 0, 10]), 502)]);
    assert!(rules.service("plant", "pl").is_empty() && rules.service("lant", "plc").is_empty());
}

/// kube-proxy masquerades packets with its mark: a LAN host at a cluster IP, and no direct connection.
#[test]
fn a_mark_decides_about_a_masquerade() {
    let rules = kube_proxy("");
    let found = |before: &Packet, after: &Packet| {
        let interfaces = Interfaces { input: Some("eth0"), output: Some("cali1") };
        rules.masquerades(&Way { before, after, interfaces })
    };
    let pod = [10, 200, 1, 91];
    let from_lan = to_service([192, 168, 31, 67], [172, 16, 0, 10], 502, false);
    let marked = found(&from_lan, &to_service([192, 168, 31, 67], pod, 8080, false));
    assert_eq!((marked.certain.len(), marked.possible.len()), (1, 0), "{marked:?}");
    let from_pod = to_service([10, 200, 1, 93], [172, 16, 0, 10], 502, false);
    let plain = found(&from_pod, &to_service([10, 200, 1, 93], pod, 8080, false));
    assert_eq!(plain, Masquerades::default());
    let direct = to_service([192, 168, 31, 67], pod, 8080, false);
    assert_eq!(found(&direct, &direct), Masquerades::default());
}

#[test]
fn a_map_of_addresses_and_a_host_port_are_translations() {
    let mapped = r#"[{"dnat": {"family": "ip", "addr": {"map": {"key": {"numgen": {"mode": "inc", "mod": 2, "offset": 0}},
        "data": {"set": [[0, "10.200.1.7"], [1, {"concat": ["10.200.1.8", 81]}]]}}}, "port": 80}}]"#;
    let packet = to_service([192, 168, 31, 67], [172, 16, 0, 10], 502, false);
    let way = Way { before: &packet, after: &packet, interfaces: Interfaces::default() };
    let ends = kube_proxy(mapped).destinations(&way);
    assert_eq!(ends, [(IpAddr::from([10, 200, 1, 7]), 80), (IpAddr::from([10, 200, 1, 8]), 81)]);
}
