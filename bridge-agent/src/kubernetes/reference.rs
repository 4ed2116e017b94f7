//! The reference of the custom resources in Markdown, made from their schemas, with an example for each field.

use std::fmt::Write as _;

use serde_json::Value as Json;

use super::resources::{
    ACCEPTED, BridgeNodeStatus, BridgePolicyStatus, Condition, GROUP, PROGRAMMED, PoolUse, RefusedPolicy,
    VERSION, objects,
};
use crate::config::{NAMESPACE_POLICY, POLICY};

/// Marks the beginning and the end of the reference in a page.
pub const MARKS: (&str, &str) = ("<!-- reference: cargo xtask crds -->\n", "<!-- end of reference -->\n");

/// A rule to which the examples add a key, or in which they replace one.
pub const RULE: &str = "{name: example, direction: inbound, protocol: tcp, ports: [40002]}";

/// An example for each field of a policy's `spec`: its name, and keys of a `spec` in YAML.
pub const OF_SPEC: &[(&str, &str)] =
    &[("mode", "{mode: audit}"), ("rules", "{rules: [{name: ping, direction: outbound, protocol: icmp}]}")];

/// The fields of a rule that a policy of a namespace refuses.
const OF_CLUSTER_ONLY: [&str; 2] = ["pods", "namespaceSelector"];

/// Returns whether a policy of a namespace takes a field of a rule.
#[must_use]
pub fn is_of_namespace(field: &str) -> bool {
    !OF_CLUSTER_ONLY.iter().any(|name| field.split('.').next() == Some(*name))
}

/// An example for each field of a rule: its path, and keys of a rule in YAML.
pub const EXAMPLES: &[(&str, &str)] = &[
    ("name", "{name: devices-to-api}"),
    ("direction", "{direction: outbound}"),
    ("protocol", "{protocol: udp}"),
    ("ports", r#"{ports: [40002, "60001-60100"]}"#),
    ("sourcePorts", r#"{sourcePorts: ["61001-61100"]}"#),
    ("external", r#"{external: [192.168.31.67/32, "fd31::/64"]}"#),
    ("pods", "{pods: [10.200.1.0/24]}"),
    ("action", "{action: deny}"),
    ("mode", "{mode: audit}"),
    ("podSelector", "{podSelector: {matchLabels: {app: api}}}"),
    ("podSelector.matchLabels", "{podSelector: {matchLabels: {app.kubernetes.io/name: api, tier: gold}}}"),
    (
        "podSelector.matchExpressions",
        "{podSelector: {matchExpressions: [{key: app, operator: In, values: [api, web]}]}}",
    ),
    (
        "podSelector.matchExpressions[].key",
        "{podSelector: {matchExpressions: [{key: app, operator: Exists}]}}",
    ),
    (
        "podSelector.matchExpressions[].operator",
        "{podSelector: {matchExpressions: [{key: canary, operator: DoesNotExist}]}}",
    ),
    (
        "podSelector.matchExpressions[].values",
        "{podSelector: {matchExpressions: [{key: tier, operator: NotIn, values: [test]}]}}",
    ),
    ("namespaceSelector", "{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}}"),
    ("namespaceSelector.matchLabels", "{namespaceSelector: {matchLabels: {team: shop}}}"),
    (
        "namespaceSelector.matchExpressions",
        "{namespaceSelector: {matchExpressions: [{key: team, operator: Exists}]}}",
    ),
    (
        "namespaceSelector.matchExpressions[].key",
        "{namespaceSelector: {matchExpressions: [{key: team, operator: In, values: [shop]}]}}",
    ),
    (
        "namespaceSelector.matchExpressions[].operator",
        "{namespaceSelector: {matchExpressions: [{key: team, operator: NotIn, values: [shop]}]}}",
    ),
    (
        "namespaceSelector.matchExpressions[].values",
        "{namespaceSelector: {matchExpressions: [{key: team, operator: In, values: [shop, test]}]}}",
    ),
];

/// The time of the examples.
const TIME: &str = "2026-05-04T09:12:44Z";

fn condition(kind: &str, generation: i64, reason: &str, message: &str) -> Condition {
    Condition {
        kind: kind.to_owned(),
        status: "True".to_owned(),
        observed_generation: generation,
        reason: reason.to_owned(),
        message: message.to_owned(),
        last_transition_time: TIME.to_owned(),
    }
}

/// Returns a status of an object of this kind, with a value in each field.
#[must_use]
pub fn example_status(kind: &str) -> Json {
    let status = if matches!(kind, POLICY | NAMESPACE_POLICY) {
        let accepted = condition(ACCEPTED, 2, "Valid", "3 rules");
        let programmed = condition(PROGRAMMED, 2, "AllNodes", "3 of 3 nodes");
        serde_json::to_value(BridgePolicyStatus { conditions: vec![accepted, programmed] })
    } else {
        serde_json::to_value(BridgeNodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            heartbeat_time: TIME.to_owned(),
            conditions: vec![condition("Ready", 1, "Enforcing", "all that is configured is active")],
            mode: "enforce".to_owned(),
            engines: vec!["ebpf".to_owned(), "iptables".to_owned()],
            policy_generation: 7,
            policy_count: 12,
            policy_hash: "00f1d2a3b4c5d6e7".to_owned(),
            namespace_policy_hash: "8a9b0c1d2e3f4051".to_owned(),
            refused_count: 1,
            refused_policies: vec![RefusedPolicy {
                name: "greedy".to_owned(),
                generation: 1,
                message: "its rules need 64000 iptables rules, and 20000 are allowed".to_owned(),
            }],
            refused_set: "0008".to_owned(),
            interfaces: vec!["eth0".to_owned(), "cali1234567890a".to_owned()],
            pods: 31,
            error_count: 1,
            errors: vec!["policy greedy is refused: its rules need 64000 iptables rules".to_owned()],
            remarks: vec!["rule devices.in matches nothing here".to_owned()],
            pool: Some(PoolUse { usage: "17/1000".to_owned(), held: 17, available: 1000 }),
        })
    };
    status.unwrap_or_default()
}

/// Returns the value at a path such as `conditions[].type`, of the first element of each list.
fn at<'v>(value: &'v Json, path: &str) -> Option<&'v Json> {
    path.split('.').try_fold(value, |value, name| match name.strip_suffix("[]") {
        Some(list) => value.get(list)?.get(0),
        None => value.get(name),
    })
}

/// Returns the example of a field of an object of this kind, as it is written in YAML.
fn example(kind: &str, path: &str) -> Option<String> {
    if let Some(path) = path.strip_prefix("status.") {
        let name = path.rsplit('.').next().unwrap_or_default();
        // A flow mapping of YAML is JSON.
        return Some(format!("{name}: {}", at(&example_status(kind), path)?));
    }
    let keys = match path.strip_prefix("spec.rules[].") {
        Some(of_rule) => EXAMPLES.iter().find(|(field, _)| *field == of_rule)?.1,
        None => OF_SPEC.iter().find(|(field, _)| path.strip_prefix("spec.") == Some(*field))?.1,
    };
    Some(keys.trim_start_matches('{').strip_suffix('}').unwrap_or(keys).to_owned())
}

/// Returns the reference.
#[must_use]
pub fn reference() -> String {
    let mut text = String::new();
    for definition in objects() {
        let kind = &definition.spec.names.kind;
        let short = definition.spec.names.short_names.iter().flatten().next().cloned().unwrap_or_default();
        let scope = if definition.spec.scope == "Namespaced" { "in a namespace" } else { "cluster-wide" };
        line(&mut text, format_args!("### {kind}\n"));
        line(&mut text, format_args!("`apiVersion: {GROUP}/{VERSION}`, {scope}, short name `{short}`.\n"));
        line(&mut text, format_args!("| field | form | meaning |\n| --- | --- | --- |"));
        let schema = definition.spec.versions.first().and_then(|version| version.schema.as_ref());
        let schema = serde_json::to_value(schema).unwrap_or_default();
        let schema = &schema["openAPIV3Schema"];
        for part in ["spec", "status"] {
            fields(&mut text, kind, part, &schema["properties"][part]);
        }
        line(&mut text, format_args!(""));
    }
    text
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(text, "{arguments}").expect("writing to a string");
}

/// Adds a row for each field below `path`.
fn fields(text: &mut String, kind: &str, path: &str, schema: &Json) {
    let required =
        |name: &str| schema["required"].as_array().is_some_and(|list| list.iter().any(|one| one == name));
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let of_rule = path.strip_prefix("spec.rules[].");
        if kind == NAMESPACE_POLICY && of_rule.is_some_and(|field| !is_of_namespace(field)) {
            continue;
        }
        let of_list = if field["type"] == "array" { format!("{path}[]") } else { path.clone() };
        let mut meaning =
            field["description"].as_str().unwrap_or_default().replace('\n', " ").replace('|', "\\|");
        if let Some(example) = example(kind, &path) {
            write!(meaning, " Example: `{}`", example.replace('|', "\\|")).expect("writing to a string");
        }
        let needed = if required(name) && path.starts_with("spec") { ", required" } else { "" };
        line(text, format_args!("| `{path}` | {}{needed} | {meaning} |", form(field)));
        fields(text, kind, &of_list, if field["type"] == "array" { &field["items"] } else { field });
    }
}

/// The form of a value.
fn form(schema: &Json) -> String {
    let bounds = |least: &str, most: &str| match (schema[least].as_u64(), schema[most].as_u64()) {
        (Some(least), Some(most)) => format!(" ({least} to {most})"),
        (None, Some(most)) => format!(" (at most {most})"),
        _ => String::new(),
    };
    if let Some(choices) = schema["enum"].as_array() {
        let choices: Vec<String> =
            choices.iter().filter_map(|one| Some(format!("`{}`", one.as_str()?))).collect();
        let default =
            schema["default"].as_str().map(|text| format!("; default `{text}`")).unwrap_or_default();
        return choices.join(", ") + &default;
    }
    if schema["x-kubernetes-int-or-string"] == true {
        return "port or \"first-last\"".to_owned();
    }
    match schema["type"].as_str().unwrap_or_default() {
        "array" => format!("list of {}{}", form(&schema["items"]), bounds("minItems", "maxItems")),
        "object" if schema["additionalProperties"].is_object() => {
            format!(
                "map of {}{}",
                form(&schema["additionalProperties"]),
                bounds("minProperties", "maxProperties")
            )
        }
        "string" if schema["format"] == "date-time" => "time".to_owned(),
        "string" => format!("text{}", bounds("minLength", "maxLength")),
        kind => kind.to_owned(),
    }
}

/// Replaces the reference in a page.
#[must_use]
pub fn insert(page: &str) -> Option<String> {
    let (before, rest) = page.split_once(MARKS.0)?;
    let (_, after) = rest.split_once(MARKS.1)?;
    Some(format!("{before}{}\n{}{}{after}", MARKS.0, reference(), MARKS.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_the_reference_of_these_types() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/kubernetes.md");
        let page = std::fs::read_to_string(path).unwrap();
        assert!(insert(&page).unwrap() == page, "docs/kubernetes.md is out of date: run `cargo xtask crds`");
    }

    #[test]
    fn every_field_has_an_example() {
        let text = reference();
        let rows: Vec<&str> =
            text.lines().filter(|row| row.starts_with("| `spec.") || row.starts_with("| `status.")).collect();
        for row in &rows {
            assert!(row.contains(" Example: "), "{row}");
        }
        assert!(rows.len() > 70, "{}", rows.len());
        let of_namespace = text.split("### ").find(|part| part.starts_with("BridgeNamespacePolicy")).unwrap();
        for field in OF_CLUSTER_ONLY {
            assert!(!of_namespace.contains(&format!("`spec.rules[].{field}")), "{field} is refused there");
        }
    }
}
