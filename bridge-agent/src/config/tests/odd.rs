//! Odd values of every key of the schema: each is refused with a remedy, or has the meaning that a snapshot shows.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value as Json, json};

use super::parse;
use crate::config::report::Severity;
use crate::config::shape::inlined_schema_of;
use crate::config::{Config, ConfigErrors, Diagnostics, PolicyScope, check_policy};

/// A configuration that has every key of the schema.
const FULL: &str = r#"
role: node
networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24], nodes: [192.168.31.17]}
enforcement:
  mode: enforce
  engines: [ebpf, iptables]
  onDeny: reject
  scope: scoped
  iptables: {backend: auto, mark: "0x2000", logRate: 5, lockWait: 5s}
  nftables: {mark: "0x2000", logRate: 5}
  interfaces: {external: [eth0], internal: ["cali*"]}
  fastPath: auto
  xdp: "off"
  timeouts: {tcpHandshake: 30s, tcpEstablished: 1d, tcpClosing: 2m, tcpReset: 2m, udpUnreplied: 30s, udpReplied: 3m, icmp: 30s, other: 10m}
  events: {rate: 100, allowed: false}
  syslog: {socket: /dev/log, rate: 10}
  flows: {established: 262144, halfOpen: 65536}
rules:
  - {name: a, direction: inbound, external: [192.168.31.64/26], pods: [10.200.1.0/25], protocol: tcp, ports: [40002, 60001-60100],
     sourcePorts: [61001-61100], action: allow, mode: audit}
  - name: b
    direction: inbound
    protocol: icmp
    podSelector: {matchLabels: {app: api}, matchExpressions: [{key: tier, operator: In, values: [gold]}]}
    namespaceSelector: {matchLabels: {team: shop}, matchExpressions: [{key: team, operator: In, values: [shop]}]}
nodePorts: {range: 30000-32767, allow: [30080]}
portPool:
  ports: [61001-61100]
  exclude: [61050]
  destinations: [192.168.31.0/24]
  transparent: {cgroups: [/kubepods.slice]}
  quota: 50
  strict: true
  bindUdp: true
  masquerade: false
routes:
  static:
    - {to: 10.201.1.0/24, via: 192.168.31.18, backup: 192.168.31.19, dev: eth0, metric: 50, table: 254}
    - {to: 10.201.2.0/24, via: [{via: 192.168.31.18, dev: eth0, weight: 3}], backup: [{via: 192.168.31.19, dev: eth0, weight: 3}]}
    - {to: 10.201.3.0/24, blackhole: true}
    - {to: 10.201.4.0/24, via: {via: 192.168.31.18, dev: eth0, weight: 3}, backup: {via: 192.168.31.19, dev: eth0, weight: 3}}
  file: /etc/bridge/cluster.yaml
  table: 254
  metric: 1024
  onWithdraw: remove
  allowInside: [10.0.0.0/8]
  health: {enabled: true, interval: 5s, tcpPort: 10250, timeout: 1s}
  discovery: {listen: 192.168.31.67:12345, keyFile: /etc/bridge/discovery.key}
kubernetes: {kubeconfig: /etc/bridge/kubeconfig, context: lab, nodeName: node-1, podNetworks: auto, pods: all, namespacePolicies: true}
names: {192.168.31.67: plc-7}
persistence: {save: auto}
api: {socket: /run/bridge/agent.sock, mode: "0660", group: bridge, metrics: 127.0.0.1:9469}
"#;

/// The paths of all values that a schema describes: `*` is any key, `[]` any element.
fn paths(schema: &Json, path: &str, found: &mut BTreeSet<String>) {
    let variants = ["anyOf", "oneOf"].iter().filter_map(|key| schema[*key].as_array()).flatten();
    let mut nested = false;
    for variant in variants.filter(|_| schema.get("format").is_none()) {
        nested |= !variant["type"].is_null();
        paths(variant, path, found);
    }
    if let Some(fields) = schema["properties"].as_object() {
        fields.iter().for_each(|(key, field)| paths(field, &format!("{path}/{key}"), found));
        nested = true;
    }
    for (key, name) in [("additionalProperties", "*"), ("items", "[]")] {
        if schema[key].is_object() {
            paths(&schema[key], &format!("{path}/{name}"), found);
            nested = true;
        }
    }
    if !path.is_empty() && (!nested || schema["items"].is_object()) {
        found.insert(path.to_owned());
    }
}

/// Replaces each value at `path` with `new`, one at a time.
fn replaced(value: &Json, path: &[&str], new: &Json) -> Vec<(Json, Json)> {
    let Some((first, rest)) = path.split_first() else { return vec![(new.clone(), value.clone())] };
    let one = |keep: &dyn Fn(Json) -> Json, inner: &Json| {
        replaced(inner, rest, new).into_iter().map(|(inner, old)| (keep(inner), old)).collect::<Vec<_>>()
    };
    match (value, *first) {
        (Json::Array(list), "[]") => list
            .iter()
            .enumerate()
            .flat_map(|(index, inner)| {
                let keep = |inner| {
                    let mut list = list.clone();
                    list[index] = inner;
                    Json::Array(list)
                };
                one(&keep, inner)
            })
            .collect(),
        (Json::Object(map), key) => map
            .iter()
            .filter(|(name, _)| key == "*" || *name == key)
            .flat_map(|(name, inner)| {
                let keep = |inner| {
                    let mut map = map.clone();
                    map[name] = inner;
                    Json::Object(map)
                };
                one(&keep, inner)
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// The YAML of odd values in the place of `old`.
fn odd(old: &Json) -> BTreeSet<String> {
    let mut values: BTreeSet<String> = [
        "",
        "~",
        "null",
        "''",
        "' '",
        "[]",
        "{}",
        "[[]]",
        "{a: b}",
        "true",
        "yes",
        ".nan",
        "1.5",
        "-1",
        "0",
        "00",
        "7",
        "010",
        "0o10",
        "0x10",
        "+1",
        "1e3",
        "1_000",
        "65536",
        "4294967295",
        "4294967296",
        "99999999999999999999",
        "'\u{663}'",
        "\u{e4}",
        r#""a\0b""#,
        r#""a\nb""#,
        r#""a\u202eb""#,
        "0.0.0.0",
        "127.0.0.1",
        "127.0.0.0/8",
        "224.0.0.0/4",
        "'::1/128'",
        "'fe80::/10'",
        "'ff00::/8'",
        "'::ffff:10.0.0.0/104'",
        "0.0.0.0/0",
        "255.255.255.255/32",
        "/",
        "/proc/",
        "'*'",
        "'-'",
        "'--help'",
        "'%s'",
    ]
    .into_iter()
    .map(str::to_owned)
    .collect();
    let text = match old {
        Json::String(text) => text.clone(),
        Json::Number(_) | Json::Bool(_) => old.to_string(),
        Json::Array(list) => {
            let first = &list[0];
            values.insert(format!("[{first}, {first}]"));
            return values;
        }
        _ => return values,
    };
    let quoted = |text: &str| json!(text).to_string();
    for odd in [
        text.clone(),
        format!(" {text}"),
        format!("{text} "),
        format!("{text}\n"),
        format!("{text}\0"),
        format!("{text}{text}"),
        text.to_uppercase(),
        text.repeat(1 + 10_000 / text.len()),
    ] {
        values.insert(quoted(&odd));
    }
    // A zero before each number.
    let letters: Vec<char> = text.chars().collect();
    for at in 0..letters.len() {
        let begins = letters[at].is_ascii_digit() && (at == 0 || !letters[at - 1].is_ascii_digit());
        if begins || (at == 2 && text.starts_with("0x")) {
            let zero: String = letters[..at].iter().chain(&['0']).chain(&letters[at..]).collect();
            values.insert(quoted(&zero));
            values.insert(zero.replace(['*', '"'], "x"));
        }
    }
    values
}

const MARK: &str = "@@";

/// A value as the snapshot shows it.
fn shown(text: &str) -> String {
    let line = text.replace('\n', "\\n");
    if line.len() > 60 {
        format!("{}... ({} bytes)", &line[..line.floor_char_boundary(30)], line.len())
    } else {
        line
    }
}

/// Returns the accepted values of all paths with their meaning, and complaints about errors without a remedy.
fn run() -> (Vec<String>, Vec<String>) {
    let full: Json = serde_saphyr::from_str(FULL).unwrap();
    let loaded = parse(FULL, None).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.warnings.list, []);
    let mut all = BTreeSet::new();
    paths(&inlined_schema_of::<Config>(), "", &mut all);
    assert!(all.len() > 110, "{}: {all:?}", all.len());
    let (mut accepted, mut wrong) = (BTreeMap::<&str, BTreeSet<String>>::new(), Vec::new());
    for path in &all {
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        // The sections that others need, and its own.
        let mut part = full.clone();
        if let Json::Object(sections) = &mut part {
            sections.retain(|key, _| ["role", "networks", "kubernetes", parts[0]].contains(&key.as_str()));
        }
        let before = parse(&part.to_string(), None).unwrap_or_else(|error| panic!("{error}")).config;
        let places = replaced(&part, &parts, &MARK.into());
        assert!(!places.is_empty(), "write {path} into FULL");
        for (document, old) in places {
            let policy = json!({"spec": {"rules": document["rules"]}});
            for value in odd(&old) {
                let with = |document: &Json| {
                    document.to_string().replace(&format!("\"{MARK}\""), &format!(" {value} "))
                };
                let result = parse(&with(&document), None);
                if path.starts_with("/rules/[]")
                    && let Some(differs) = differs_in_a_policy(&with(&policy), result.as_ref().err())
                {
                    wrong.push(format!("{path}: {}: {differs}", shown(&value)));
                }
                match result {
                    Ok(loaded) if loaded.config == before => {}
                    Ok(loaded) => {
                        let values_at = |config: &Config| -> BTreeSet<String> {
                            let config = serde_json::to_value(config).unwrap();
                            let values = replaced(&config, &parts, &Json::Null).into_iter();
                            values
                                .map(|(_, value)| {
                                    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
                                })
                                .collect()
                        };
                        let (new, old) = (values_at(&loaded.config), values_at(&before));
                        let new: Vec<_> = new.difference(&old).map(|value| shown(value)).collect();
                        let warned = if loaded.warnings.list.is_empty() { "" } else { " (warned of)" };
                        let written = value.trim_matches(['"', '\'']);
                        let meaning = match new.as_slice() {
                            [one] if *one == shown(written) => String::new(),
                            new => format!(" -> {}", new.join(" ")),
                        };
                        accepted
                            .entry(path)
                            .or_default()
                            .insert(format!("{}{meaning}{warned}", shown(&value)));
                    }
                    Err(ConfigErrors(errors)) => {
                        wrong.extend(
                            without_remedy(&errors).map(|text| format!("{path}: {}: {text}", shown(&value))),
                        );
                    }
                }
            }
        }
    }
    let lines = accepted.into_iter().map(|(path, values)| {
        let values: Vec<String> = values.into_iter().collect();
        format!("{path}: {}", values.join(" | "))
    });
    (lines.collect(), wrong)
}

/// Errors without a place or a remedy.
fn without_remedy(errors: &Diagnostics) -> Option<String> {
    let bad = errors.list.iter().find(|found| {
        let remedy = [
            "write",
            "remove",
            "add",
            "say",
            "keep",
            "did you mean",
            "shorten",
            "give",
            "quote",
            "correct",
            "leave",
            "use",
            "exclude",
        ];
        let has = remedy.iter().any(|word| found.help.contains(word));
        found.severity == Severity::Error && (!has || found.place.is_none() || found.message.len() > 25_000)
    });
    bad.map(|found| format!("{}; {}", shown(&found.message), found.help))
}

/// A policy has the vocabulary of the file: compares the outcome of the rules of a configuration.
fn differs_in_a_policy(text: &str, in_file: Option<&ConfigErrors>) -> Option<String> {
    let policy = check_policy(text, PolicyScope::Cluster);
    // Only a node knows its networks.
    let of_node = in_file
        .is_some_and(|errors| errors.0.list.iter().all(|found| found.message.contains("is not inside")));
    match (in_file, policy) {
        (None, Ok(())) | (Some(_), Err(_)) => None,
        (Some(_), Ok(())) if of_node => None,
        (None, Err(errors)) => Some(format!("a policy refuses it: {errors}")),
        (Some(errors), Ok(())) => Some(format!("a policy takes it, the file does not: {errors}")),
    }
}

#[test]
fn odd_values_are_refused_with_a_remedy_or_mean_this() {
    let (accepted, wrong) = run();
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    insta::assert_snapshot!(accepted.join("\n"));
}
