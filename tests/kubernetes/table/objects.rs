//! Policies by their keys beside those of rules.

use super::Answer::{self, Accepted, Admission, Server};
use super::PORT;

/// Other keys of an object, and the answer.
pub(super) const OBJECTS: &[(&str, Answer)] = &[
    ("spec: {}", Server("spec.rules: Required value")),
    ("spec: {rules: null}", Server("spec.rules")),
    ("spec: {rules: []}", Server("at least 1 items")),
    ("{}", Server("spec: Required value")),
    ("spec: {rule: [{name: r, direction: inbound, protocol: any}]}", Server("spec.rules: Required value")),
    ("spec: {rules: [{direction: inbound, protocol: any}]}", Server("name")),
    ("spec: {rules: [{name: 'a b', direction: inbound, protocol: any}]}", Server(PORT)),
    (
        "spec: {rules: [{name: a, direction: inbound, protocol: any}, {name: a, direction: outbound, protocol: any}]}",
        Server("Duplicate value"),
    ),
    ("spec: {mode: audit, rules: [{name: a, direction: inbound, protocol: any}]}", Accepted),
    ("spec: {mode: enforce, rules: [{name: a, direction: inbound, protocol: any}]}", Accepted),
    ("spec: {mode: audit, rules: [{name: a, direction: inbound, protocol: any, mode: audit}]}", Accepted),
    ("spec: {mode: enforce, rules: [{name: a, direction: inbound, protocol: any, mode: audit}]}", Accepted),
    (
        "spec: {mode: audit, rules: [{name: a, direction: inbound, protocol: any, mode: enforce}]}",
        Server("none of its rules enforces"),
    ),
    (
        "spec: {mode: null, rules: [{name: a, direction: inbound, protocol: any}]}",
        Server("Unsupported value: null"),
    ),
    (
        "spec: {mode: AUDIT, rules: [{name: a, direction: inbound, protocol: any}]}",
        Server("Unsupported value: \"AUDIT\""),
    ),
    (
        "spec: {Mode: audit, rules: [{name: a, direction: inbound, protocol: any}]}",
        Admission("did you mean `mode`?"),
    ),
    (
        "spec: {enabled: false, rules: [{name: a, direction: inbound, protocol: any}]}",
        Admission("unknown key `enabled`"),
    ),
    ("spec: {rules: {a: {direction: inbound, protocol: any}}}", Server("must be of type array")),
    ("spec: {rules: [null]}", Server("spec.rules[0]")),
    ("spec: {rules: [a]}", Server("must be of type object")),
    ("spec: [{name: a, direction: inbound, protocol: any}]", Server("must be of type object")),
    ("spec: {rules: [{name: '', direction: inbound, protocol: any}]}", Server(PORT)),
    ("spec: {rules: [{name: 5, direction: inbound, protocol: any}]}", Server("must be of type string")),
    ("spec: {rules: [{name: 'bridge:deny', direction: inbound, protocol: any}]}", Server(PORT)),
    (
        "spec: {rules: [{name: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, direction: inbound, protocol: any}]}",
        Accepted,
    ),
    (
        "spec: {rules: [{name: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, direction: inbound, protocol: any}]}",
        Server("may not be more than 63 bytes"),
    ),
    (
        "mode: audit\nspec: {rules: [{name: a, direction: inbound, protocol: any}]}",
        Admission("unknown key `mode`"),
    ),
];
