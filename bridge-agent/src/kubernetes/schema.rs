//! The schema of rules in a custom resource definition, which must be "structural": a subset of JSON schema.
//!
//! It is made from the schema of the configuration file. Bounds and CEL rules have the API server refuse at once every fault that it
//! can see; the agent checks the rest, and reports it in the condition `Accepted`. Two properties keep the API server from
//! changing the meaning of a policy before the agent reads it:
//!
//! - Unknown keys are preserved, so that the agent can refuse a misspelt one. The API server would drop it.
//! - Keys may be null, so that the agent can refuse that. The API server would drop the key, and a rule without `external`
//!   is for the whole LAN.
//!
//! CEL takes a null key for an absent one, and does not see unknown keys. The ValidatingAdmissionPolicy in
//! `deploy/kubernetes/admission.yaml` sees both, and has the API server refuse them at once.
//!
//! See <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema>.

use schemars::Schema;
use serde_json::{Map, Value as Json, json};

use crate::config::labels::{KEY_PATTERN, MAX_KEY, MAX_NAME, VALUE_PATTERN};
use crate::config::ports::PATTERN;
use crate::config::{Rule, bounds};
use crate::model::Mode;

/// The longest port item, `10000-65535`.
const MAX_PORT: usize = 11;
/// The longest network, an IPv6 address of 39 characters with `/128`.
const MAX_NETWORK: usize = 43;

/// A CEL rule, and the message that the API server shows if it does not hold.
type Validation = (String, String);

fn validation(rule: &str, message: &str) -> Validation {
    (rule.to_owned(), message.to_owned())
}

/// The rules about several keys of one rule.
fn of_rule() -> Vec<Validation> {
    vec![
        validation(
            "self.protocol in ['icmp', 'any'] || has(self.ports)",
            r#"write `ports`, such as ports: [40002]; for all of them: ports: ["1-65535"]"#,
        ),
        validation(
            "self.protocol != 'icmp' || !(has(self.ports) || has(self.sourcePorts))",
            "ICMP has no ports: remove `ports` and `sourcePorts`, or write tcp, udp or sctp",
        ),
        validation(
            "!has(self.pods) || !(has(self.podSelector) || has(self.namespaceSelector))",
            "keep one: `pods` for addresses, or `podSelector` and `namespaceSelector` for labels",
        ),
    ]
}

fn of_selector() -> Vec<Validation> {
    vec![validation(
        "has(self.matchLabels) || has(self.matchExpressions)",
        "an empty selector selects everything: leave it out, or write `matchLabels` or `matchExpressions`",
    )]
}

fn of_requirement() -> Vec<Validation> {
    vec![validation(
        "(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",
        "In and NotIn need `values`; Exists and DoesNotExist take none",
    )]
}

fn of_port() -> Vec<Validation> {
    vec![validation(
        "type(self) == int || !self.contains('-') || int(self.split('-')[0]) <= int(self.split('-')[1])",
        r#"a range is "first-last", its ends in order"#,
    )]
}

fn of_network() -> Vec<Validation> {
    vec![validation(
        "isCIDR(self) && cidr(self) == cidr(self).masked()",
        "not a network: write ADDRESS/LENGTH with no bits set after LENGTH, such as 192.168.31.0/24",
    )]
}

/// Returns the schema of the mode of a policy.
pub(super) fn mode() -> Schema {
    let mut mode = crate::config::schema_of::<Mode>();
    structural(&mut mode);
    mode["nullable"] = true.into();
    Schema::try_from(mode).expect("an object is a schema")
}

/// Returns the rules about several keys of a policy.
pub(super) fn of_spec() -> Vec<(String, String)> {
    vec![validation(
        "!has(self.mode) || self.mode != 'audit' || self.rules.all(rule, !has(rule.mode) || rule.mode == 'audit')",
        "the policy has `mode: audit`, so that none of its rules enforces: remove `mode: enforce` of a rule, or `mode: audit` of \
         the policy",
    )]
}

/// Returns the schema of the rules of a cluster.
pub(super) fn rules() -> Schema {
    list(of_rule())
}

/// Returns the schema of the rules of a namespace.
pub(super) fn rules_of_namespace() -> Schema {
    let mut validations = of_rule();
    validations.push(validation(
        "!(has(self.pods) || has(self.namespaceSelector))",
        "a BridgeNamespacePolicy is about the pods of its own namespace: remove `pods` and `namespaceSelector`, and write \
         `podSelector` for some of these pods",
    ));
    list(validations)
}

fn list(validations: Vec<Validation>) -> Schema {
    let mut rule = crate::config::schema_of::<Rule>();
    structural(&mut rule);
    strict(&mut rule, validations);
    let list = json!({
        "type": "array",
        "items": rule,
        "minItems": 1,
        "maxItems": bounds::RULES,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
    });
    Schema::try_from(list).expect("an object is a schema")
}

/// Has an object keep unknown keys and nulls.
fn strict(schema: &mut Json, validations: Vec<Validation>) {
    let Some(object) = schema.as_object_mut() else { return };
    let required: Vec<Json> = object.get("required").and_then(Json::as_array).cloned().unwrap_or_default();
    if let Some(Json::Object(fields)) = object.get_mut("properties") {
        let optional = fields.iter_mut().filter(|(key, _)| !required.iter().any(|name| name == *key));
        optional.for_each(|(_, field)| field["nullable"] = true.into());
    }
    object.insert("x-kubernetes-preserve-unknown-fields".into(), true.into());
    insert_validations(object, validations);
}

fn insert_validations(object: &mut Map<String, Json>, validations: Vec<Validation>) {
    let list = validations.into_iter().map(|(rule, message)| json!({ "rule": rule, "message": message }));
    object.insert("x-kubernetes-validations".into(), list.collect());
}

fn structural(schema: &mut Json) {
    let Some(object) = schema.as_object_mut() else { return };
    for key in ["examples", "$schema", "title", "x-shown"] {
        object.remove(key);
    }
    if object.get("additionalProperties") == Some(&Json::Bool(false)) {
        object.remove("additionalProperties");
    }
    // Kept where it has a meaning: `action: allow`.
    if object.get("default").is_some_and(|default| !default.is_string()) {
        object.remove("default");
    }
    match object.get("format").and_then(Json::as_str) {
        Some("port-range") => return port(object),
        Some("rule-name") => {
            object.remove("format");
            object.insert("pattern".into(), "^[A-Za-z0-9._-]{1,63}$".into());
            object.insert("maxLength".into(), MAX_NAME.into());
        }
        Some("cidr") => {
            // The format's own message does not say how to write a network.
            object.remove("format");
            object.insert("maxLength".into(), MAX_NETWORK.into());
            insert_validations(object, of_network());
        }
        _ => {}
    }
    // A list of ports may be written without its brackets in a file; here each value has one form.
    if let Some(Json::Array(forms)) = object.remove("anyOf")
        && let Some(Json::Object(list)) = forms.into_iter().find(|form| form["type"] == "array")
    {
        object.extend(list.into_iter().filter(|(key, _)| key != "description"));
    }
    choices(object);
    let mut is_selector = false;
    let mut is_requirement = false;
    for (key, value) in object.iter_mut() {
        match (key.as_str(), value) {
            ("properties", Json::Object(fields)) => {
                is_selector = fields.contains_key("matchLabels");
                is_requirement = fields.contains_key("operator");
                for (name, field) in fields {
                    structural(field);
                    limit(name, field);
                }
            }
            ("items" | "additionalProperties", value) => structural(value),
            _ => {}
        }
    }
    if is_selector {
        strict(schema, of_selector());
    } else if is_requirement {
        strict(schema, of_requirement());
    }
}

/// Bounds a field by its name.
fn limit(name: &str, field: &mut Json) {
    let list = |field: &mut Json, most: usize| {
        field["minItems"] = 1.into();
        field["maxItems"] = most.into();
    };
    match name {
        "ports" | "sourcePorts" => list(field, bounds::PORTS),
        "external" | "pods" => list(field, bounds::NETWORKS),
        "matchExpressions" => list(field, bounds::REQUIREMENTS),
        "matchLabels" => {
            field["minProperties"] = 1.into();
            field["maxProperties"] = bounds::REQUIREMENTS.into();
            label_value(&mut field["additionalProperties"]);
        }
        "key" => {
            field["pattern"] = KEY_PATTERN.into();
            field["maxLength"] = MAX_KEY.into();
        }
        "values" => {
            list(field, bounds::VALUES);
            label_value(&mut field["items"]);
        }
        _ => {}
    }
}

fn label_value(schema: &mut Json) {
    schema["pattern"] = VALUE_PATTERN.into();
    schema["maxLength"] = MAX_NAME.into();
}

/// A number or a text.
fn port(object: &mut Map<String, Json>) {
    object.clear();
    object.insert("x-kubernetes-int-or-string".into(), true.into());
    object.insert("pattern".into(), PATTERN.into());
    object.insert("maxLength".into(), MAX_PORT.into());
    object.insert("minimum".into(), 1.into());
    object.insert("maximum".into(), u16::MAX.into());
    insert_validations(object, of_port());
}

/// Turns `oneOf` of constants, each with its description, into `enum`.
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
