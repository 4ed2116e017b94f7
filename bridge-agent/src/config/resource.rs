//! The objects of the cluster that have rules, read with the types, checks and messages of the configuration file.

use std::borrow::Cow;
use std::path::Path as FilePath;
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::node::{Node, Value};
use super::report::{ConfigErrors, Diagnostics, Findings, Path, Report, Severity};
use super::shape::Shape;
use super::{Problem, Rule, rules, shadow, yaml};
use crate::model::Mode;

/// The API group of the custom resources of bridge. An owner with another domain changes it here.
pub const GROUP: &str = "bridge.lan";
/// The version of its resources.
pub const VERSION: &str = "v1alpha1";
/// The kind of the resource that has rules.
pub(crate) const POLICY: &str = "BridgePolicy";
/// The kind of the resource with rules for the pods of its namespace.
pub(crate) const NAMESPACE_POLICY: &str = "BridgeNamespacePolicy";
/// The keys that every object has, and that the API server defines.
const COMMON: [&str; 4] = ["apiVersion", "kind", "metadata", "status"];
/// The key of a ConfigMap that holds a configuration file.
const CONFIG_KEY: &str = "bridge.yaml";

/// A policy without the keys that every object has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    spec: Spec,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<Mode>,
    rules: Vec<Rule>,
}

/// Reads and checks the JSON text of a policy; keys that every object has are skipped.
///
/// # Errors
/// The policy is not valid; the errors have paths and remedies.
pub(crate) fn policy_rules(json: &str, scope: PolicyScope) -> Result<Vec<Rule>, ConfigErrors> {
    let mut findings = Findings::default();
    let read = serde_json::from_str(json).ok();
    let read = read.and_then(|mut tree| policy(&mut tree, scope, &mut findings));
    if let Some(rules) = read.filter(|_| !findings.has_errors()) {
        return Ok(rules);
    }
    // JSON is YAML. With places, which have the findings in the order of the text.
    let mut findings = Findings::default();
    let rules = yaml::parse(json, &mut findings).and_then(|mut tree| policy(&mut tree, scope, &mut findings));
    let failed = findings.has_errors();
    match rules {
        Some(rules) if !failed => Ok(rules),
        // Without the text, whose lines its author has never seen.
        _ => Err(ConfigErrors(findings.into_diagnostics(None, None))),
    }
}

/// Checks the JSON text of a policy, as `bridge-agent check` and the agent do.
///
/// # Errors
/// The policy is not valid; the errors have paths and remedies.
pub fn check_policy(json: &str, scope: PolicyScope) -> Result<(), ConfigErrors> {
    policy_rules(json, scope).map(drop)
}

/// Reads and checks a policy.
fn policy(tree: &mut Node<'_>, scope: PolicyScope, findings: &mut Findings) -> Option<Vec<Rule>> {
    static SHAPE: LazyLock<Shape> = LazyLock::new(Shape::of::<Document>);
    if let Value::Map(entries) = &mut tree.value {
        entries.retain(|(key, _)| !COMMON.contains(&&*key.name));
    }
    if !SHAPE.fit(tree, &Path::Root, findings) {
        return None;
    }
    match Document::deserialize(&*tree) {
        Ok(Document { spec }) => {
            let mut report = Report::new(tree, findings);
            let (root, rules) = (Path::Root, "rules");
            let (spec_path, mut list) = (root.key("spec"), spec.rules);
            let path = spec_path.key(rules);
            if list.is_empty() && report.intact(&path) {
                let problem =
                    Problem::new("the list of rules is empty", "write a rule, or delete the policy");
                report.error(&path, problem);
            }
            rules::check_policy(&list, &path, &mut report);
            shadow::check(&list, &path, &mut report);
            if scope == PolicyScope::Namespace {
                for (index, rule) in list.iter().enumerate() {
                    check_of_namespace(rule, &path.index(index), &mut report);
                }
            }
            if spec.mode == Some(Mode::Audit) {
                for (index, rule) in list.iter_mut().enumerate() {
                    if rule.mode == Some(Mode::Enforce) {
                        let message = "the policy has `mode: audit`, so that none of its rules enforces";
                        let help = "remove `mode: enforce` of the rule, or `mode: audit` of the policy";
                        report.error(&path.index(index).key("mode"), Problem::new(message, help));
                    }
                    rule.mode = Some(Mode::Audit);
                }
            }
            Some(list)
        }
        Err(error) => {
            let help = "compare it with `kubectl explain bridgepolicy.spec`";
            findings.push(Severity::Error, &Path::Root, None, Problem::new(error.to_string(), help));
            None
        }
    }
}

/// Refuses a rule of a namespace that names pods by other means than their labels.
fn check_of_namespace(rule: &Rule, path: &Path<'_>, report: &mut Report<'_>) {
    for (key, is_there) in
        [("pods", rule.pods.is_some()), ("namespaceSelector", rule.namespace_selector.is_some())]
    {
        if is_there {
            let message = format!("a {NAMESPACE_POLICY} is about the pods of its own namespace");
            let help = format!("remove `{key}`, and write `podSelector` for some of these pods");
            report.error(&path.key(key), Problem::new(message, help));
        }
    }
}

/// The pods that a policy is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyScope {
    /// Those of the cluster.
    Cluster,
    /// Those of its namespace.
    Namespace,
}

/// Valid objects of a stream of manifests.
#[derive(Debug)]
pub(crate) struct Manifests {
    /// Name and rules of each policy.
    pub(crate) policies: Vec<(String, Vec<Rule>)>,
    /// Names of the ConfigMaps that hold a configuration file.
    pub(crate) configs: Vec<String>,
    /// Objects of other kinds, which are skipped.
    pub(crate) skipped: usize,
    /// Warnings of all of them.
    pub(crate) warnings: Diagnostics,
}

/// Whether a text has manifests of Kubernetes, rather than a configuration file.
pub(crate) fn is_manifest(text: &str) -> bool {
    // A configuration may be large, and has no such key.
    if !text.starts_with("kind:") && !text.contains("\nkind:") && !text.contains("\"kind\"") {
        return false;
    }
    let documents = yaml::parse_stream(text, &mut Findings::default()).unwrap_or_default();
    documents.iter().any(|object| object.get("kind").is_some() && object.get("apiVersion").is_some())
}

/// Reads and checks manifests as `kustomize build` writes them: each policy, and each ConfigMap that holds a
/// `bridge.yaml`. `file` names the text in messages.
///
/// # Errors
/// One of them is not valid, or there is none.
pub(crate) fn manifests(text: &str, file: &FilePath) -> Result<Manifests, ConfigErrors> {
    let mut findings = Findings::default();
    let mut nested = Diagnostics::default();
    let mut found =
        Manifests { policies: Vec::new(), configs: Vec::new(), skipped: 0, warnings: Diagnostics::default() };
    for object in yaml::parse_stream(text, &mut findings).unwrap_or_default().into_iter().flat_map(items) {
        found.object(object, file, &mut findings, &mut nested);
    }
    if found.policies.is_empty()
        && found.configs.is_empty()
        && !findings.has_errors()
        && nested.list.is_empty()
    {
        let message = format!("none of these {} objects is a {POLICY} of {GROUP}", found.skipped);
        let help =
            format!("write `apiVersion: {GROUP}/{VERSION}` and `kind: {POLICY}`, or check another file");
        findings.push(Severity::Error, &Path::Root, None, Problem::new(message, help));
    }
    let failed = findings.has_errors() || nested.list.iter().any(|found| found.severity == Severity::Error);
    let mut diagnostics = findings.into_diagnostics(Some(file), Some(text));
    diagnostics.list.append(&mut nested.list);
    diagnostics.left_off += nested.left_off;
    if failed {
        return Err(ConfigErrors(diagnostics));
    }
    found.warnings = diagnostics;
    Ok(found)
}

/// The objects of a list, or the object itself.
pub(super) fn items(object: Node<'_>) -> Vec<Node<'_>> {
    let is_list = object.get("kind").and_then(Node::scalar).is_some_and(|kind| kind.ends_with("List"));
    match object.value {
        Value::Map(entries) if is_list => {
            let items =
                entries.into_iter().filter(|(key, _)| key.name == "items").map(|(_, items)| items.value);
            items
                .filter_map(|items| if let Value::List(items) = items { Some(items) } else { None })
                .flatten()
                .collect()
        }
        value => vec![Node { value, ..object }],
    }
}

impl Manifests {
    fn object(
        &mut self,
        mut object: Node<'_>,
        file: &FilePath,
        findings: &mut Findings,
        nested: &mut Diagnostics,
    ) {
        let text = |key: &str| object.get(key).and_then(Node::scalar).unwrap_or_default();
        let (group, version) = text("apiVersion").split_once('/').unwrap_or_default();
        let scope = match text("kind") {
            POLICY => Some(PolicyScope::Cluster),
            NAMESPACE_POLICY => Some(PolicyScope::Namespace),
            _ => None,
        };
        let scope = scope.filter(|_| group == GROUP);
        let metadata = object.get("metadata");
        let name = metadata.and_then(|metadata| metadata.get("name")).and_then(Node::scalar);
        let mut name = name.unwrap_or_default().to_owned();
        if let Some(scope) = scope {
            if version != VERSION {
                let message = format!("`{GROUP}/{version}` is no version of a policy that this agent knows");
                let problem = Problem::new(message, format!("write `apiVersion: {GROUP}/{VERSION}`"));
                let at = object.get("apiVersion").map(|node| node.at);
                findings.push(Severity::Error, &Path::Root.key("apiVersion"), at, problem);
            }
            if name.is_empty() {
                let problem = Problem::new("the policy has no name", "add `metadata: {name: NAME}`");
                findings.push(Severity::Error, &Path::Root, Some(object.at), problem);
            }
            if scope == PolicyScope::Namespace {
                // As the agent names it in counters and events.
                let namespace =
                    metadata.and_then(|metadata| metadata.get("namespace")).and_then(Node::scalar);
                name = format!("{}.{name}", namespace.unwrap_or("default"));
            }
            self.policies.extend(policy(&mut object, scope, findings).map(|rules| (name, rules)));
            return;
        }
        let config = object.get("data").and_then(|data| data.get(CONFIG_KEY)).and_then(Node::scalar);
        let Some(config) = config.filter(|_| text("apiVersion") == "v1" && text("kind") == "ConfigMap")
        else {
            self.skipped += 1;
            return;
        };
        // Its lines are not those of the manifest.
        let place: Cow<'_, str> = format!("{}: ConfigMap {name}, {CONFIG_KEY}", file.display()).into();
        let diagnostics = match super::parse(config, Some(FilePath::new(&*place))) {
            Ok(loaded) => loaded.warnings,
            Err(ConfigErrors(diagnostics)) => diagnostics,
        };
        nested.list.extend(diagnostics.list);
        nested.left_off += diagnostics.left_off;
        self.configs.push(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(json: &str) -> String {
        let errors =
            policy_rules(&format!(r#"{{"spec": {json}}}"#), PolicyScope::Cluster).expect_err("it is wrong").0;
        let one =
            |found: &crate::config::Diagnostic| format!("{}: {}; {}", found.path, found.message, found.help);
        errors.list.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn rules_are_those_of_the_configuration_file() {
        let rules = policy_rules(
            r#"{"spec": {"rules": [{"name": "api", "direction": "inbound", "external": ["192.168.31.67/32"], "protocol": "tcp",
                "ports": [40002, "60001-60100"], "podSelector": {"matchLabels": {"app": "api"}},
                "namespaceSelector": {"matchLabels": {"tier": "gold"}}}]}}"#,
            PolicyScope::Cluster,
        )
        .unwrap();
        assert!(rules[0].selects());
        assert_eq!(rules[0].to_model().ports.len(), 2);
    }

    #[test]
    fn all_that_is_wrong_is_said_with_its_place() {
        insta::assert_snapshot!(wrong(
            r#"{"rules": [
                {"name": "a", "direction": "inbound", "protocol": "tcp", "ports": ["7-3"]},
                {"name": "a", "direction": "inbound", "protocol": "icmp", "ports": [80]},
                {"name": "c", "direction": "outbound", "protocol": "any", "pods": ["10.0.0.1/8"]},
                {"name": "d", "direction": "outbound", "protocol": "any", "pods": ["10.0.0.0/8"], "namespaceSelector": {}}]}"#
        ), @r#"
        spec.rules[0].ports[0]: port range `7-3` ends before it begins; write "3-7"
        spec.rules[1].name: the name `a` is already taken by the rule at spec.rules[0]; give each rule a name of its own: hit counters and iptables comments go by it
        spec.rules[1].ports: ICMP has no ports, so rule `a` can have none; remove `ports`, or write the protocol the ports belong to: tcp, udp or sctp
        spec.rules[2].pods[0]: `10.0.0.1/8` has bits set after its first 8; write 10.0.0.0/8 for the network, or 10.0.0.1/32 for this one address
        spec.rules[3].namespaceSelector: rule `d` has both `pods` and `namespaceSelector`; keep one: `pods` for addresses, `namespaceSelector` for labels
        spec.rules[3].namespaceSelector: an empty `namespaceSelector` selects every namespace; leave it out, or write `matchLabels` or `matchExpressions`
        "#);
        insta::assert_snapshot!(wrong(r#"{"rules": []}"#), @r"
        spec.rules: the list of rules is empty; write a rule, or delete the policy
        ");
        insta::assert_snapshot!(wrong("{}"), @r#"
        spec: `rules` is missing; add `rules`, such as `rules: [{direction: inbound, name: devices-to-api, ports: ["60001-60100"], protocol: tcp}]`
        "#);
    }
}
