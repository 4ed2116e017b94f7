//! The reference of the custom resources in Markdown, made from their schemas, with an example for each field of a rule.

use std::fmt::Write as _;

use serde_json::Value as Json;

use super::resources::{GROUP, VERSION, objects};

/// Marks the beginning and the end of the reference in a page.
pub const MARKS: (&str, &str) = ("<!-- reference: cargo xtask crds -->\n", "<!-- end of reference -->\n");

/// A rule to which the examples add a key, or in which they replace one.
pub const RULE: &str = "{name: example, direction: inbound, protocol: tcp, ports: [40002]}";

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
            fields(&mut text, part, &schema["properties"][part]);
        }
        line(&mut text, format_args!(""));
    }
    text
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(text, "{arguments}").expect("writing to a string");
}

/// Adds a row for each field below `path`.
fn fields(text: &mut String, path: &str, schema: &Json) {
    let required =
        |name: &str| schema["required"].as_array().is_some_and(|list| list.iter().any(|one| one == name));
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let of_list = if field["type"] == "array" { format!("{path}[]") } else { path.clone() };
        let mut meaning =
            field["description"].as_str().unwrap_or_default().replace('\n', " ").replace('|', "\\|");
        let of_rule = path.strip_prefix("spec.rules[].").unwrap_or_default();
        if let Some((_, example)) = EXAMPLES.iter().find(|(field, _)| *field == of_rule) {
            let keys = example.trim_start_matches('{').strip_suffix('}').unwrap_or(example);
            write!(meaning, " Example: `{keys}`").expect("writing to a string");
        }
        let needed = if required(name) && path.starts_with("spec") { ", required" } else { "" };
        line(text, format_args!("| `{path}` | {}{needed} | {meaning} |", form(field)));
        fields(text, &of_list, if field["type"] == "array" { &field["items"] } else { field });
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
    fn every_field_of_a_rule_has_an_example() {
        let text = reference();
        for row in text.lines().filter(|row| row.starts_with("| `spec.rules[].")) {
            assert!(row.contains(" Example: "), "{row}");
        }
    }
}
