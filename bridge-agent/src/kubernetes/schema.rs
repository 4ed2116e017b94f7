//! The schema of rules as a custom resource definition may have it: "structural", which is less than JSON schema.
//!
//! It is made from the very schema that the configuration file is checked against; whatever it cannot say, the agent
//! checks, and tells by a condition.
//! See <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>.

use schemars::Schema;
use serde_json::{Map, Value as Json, json};

use crate::config::Rule;

/// As many rules a policy may have: what they cost to validate must have a bound.
const MOST_RULES: usize = 4096;

/// Rules that the schema itself cannot say: for API servers from 1.25 on (CEL). Older ones drop them, and leave it to
/// the agent.
const VALIDATIONS: [(&str, &str); 2] = [
    (
        "!has(self.pods) || !(has(self.podSelector) || has(self.namespaceSelector))",
        "keep one: `pods` for addresses, or `podSelector` and `namespaceSelector` for labels",
    ),
    (
        "self.protocol != 'icmp' || !(has(self.ports) || has(self.sourcePorts))",
        "ICMP has no ports: remove `ports` and `sourcePorts`, or write tcp, udp or sctp",
    ),
];

/// The schema of a list of rules.
pub(super) fn rules() -> Schema {
    let mut rule = crate::config::schema_of::<Rule>();
    structural(&mut rule);
    let validations = VALIDATIONS.map(|(rule, message)| json!({ "rule": rule, "message": message })).to_vec();
    if let Some(rule) = rule.as_object_mut() {
        rule.insert("x-kubernetes-validations".into(), validations.into());
    }
    let list = json!({
        "type": "array",
        "items": rule,
        "minItems": 1,
        "maxItems": MOST_RULES,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
    });
    Schema::try_from(list).expect("an object is a schema")
}

fn structural(schema: &mut Json) {
    let Some(object) = schema.as_object_mut() else { return };
    for key in ["examples", "$schema", "title"] {
        object.remove(key);
    }
    if object.get("additionalProperties") == Some(&Json::Bool(false)) {
        object.remove("additionalProperties");
    }
    if object.get("default").is_some_and(Json::is_null) {
        object.remove("default");
    }
    match object.get("format").and_then(Json::as_str) {
        Some("port-range") => return port(object),
        Some("rule-name") => {
            object.remove("format");
            object.insert("pattern".into(), "^[A-Za-z0-9._-]{1,63}$".into());
        }
        _ => {}
    }
    // A list of ports may be written without its brackets in a file; a schema here has one form of each value.
    if let Some(Json::Array(forms)) = object.remove("anyOf")
        && let Some(Json::Object(list)) = forms.into_iter().find(|form| form["type"] == "array")
    {
        object.extend(list.into_iter().filter(|(key, _)| key != "description"));
    }
    choices(object);
    for (key, value) in object.iter_mut() {
        match (key.as_str(), value) {
            ("properties", Json::Object(fields)) => fields.values_mut().for_each(structural),
            ("items" | "additionalProperties", value) => structural(value),
            _ => {}
        }
    }
}

/// A number or a text. What the agent accepts as a range, the pattern does: not that its ends are in order.
fn port(object: &mut Map<String, Json>) {
    object.clear();
    object.insert("x-kubernetes-int-or-string".into(), true.into());
    object.insert("pattern".into(), "^[0-9]{1,5}(-[0-9]{1,5})?$".into());
    object.insert("minimum".into(), 1.into());
    object.insert("maximum".into(), u16::MAX.into());
}

/// `oneOf` of constants, each with its description, to `enum`.
fn choices(object: &mut Map<String, Json>) {
    let Some(Json::Array(variants)) = object.remove("oneOf") else { return };
    let text = |variant: &Json| match (&variant["const"], &variant["enum"]) {
        (Json::String(one), _) => vec![Json::from(one.clone())],
        (_, Json::Array(some)) => some.clone(),
        _ => Vec::new(),
    };
    object.insert("type".into(), "string".into());
    object.insert("enum".into(), variants.iter().flat_map(text).collect());
}
