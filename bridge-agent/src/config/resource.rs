//! The rules of a custom resource: the same types, checks and messages as those of the configuration file.

use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::report::{ConfigErrors, Findings, Path, Report, Severity};
use super::shape::Shape;
use super::{Problem, Rule, rules, yaml};

/// What a `BridgePolicy` says, read as the configuration file is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    rules: Vec<Rule>,
}

/// Reads and checks `spec` of a `BridgePolicy`; `json` is its text.
///
/// # Errors
/// All that is wrong with it: which value, and what to write instead.
pub(crate) fn policy_rules(json: &str) -> Result<Vec<Rule>, ConfigErrors> {
    static SHAPE: LazyLock<Shape> = LazyLock::new(Shape::of::<Spec>);
    let mut findings = Findings::default();
    // JSON is YAML.
    let spec = yaml::parse(json, &mut findings).and_then(|mut tree| {
        if !SHAPE.fit(&mut tree, &Path::Root, &mut findings) {
            return None;
        }
        match Spec::deserialize(&tree) {
            Ok(spec) => {
                let mut report = Report::new(&tree, &mut findings);
                let path = Path::Root.key("rules");
                if spec.rules.is_empty() && report.intact(&path) {
                    let problem =
                        Problem::new("the list of rules is empty", "write a rule, or delete the policy");
                    report.error(&path, problem);
                }
                rules::check_for_cluster(&spec.rules, &path, &mut report);
                Some(spec)
            }
            Err(error) => {
                let help = "compare it with `kubectl explain bridgepolicy.spec`";
                findings.push(Severity::Error, &Path::Root, None, Problem::new(error.to_string(), help));
                None
            }
        }
    });
    let failed = findings.has_errors();
    match spec {
        Some(spec) if !failed => Ok(spec.rules),
        // Without the text: its lines are nobody's.
        _ => Err(ConfigErrors(findings.into_diagnostics(None, None))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(json: &str) -> String {
        let errors = policy_rules(json).expect_err("it is wrong").0;
        let one =
            |found: &crate::config::Diagnostic| format!("{}: {}; {}", found.path, found.message, found.help);
        errors.list.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn rules_are_those_of_the_configuration_file() {
        let rules = policy_rules(
            r#"{"rules": [{"name": "api", "direction": "inbound", "external": ["192.168.31.67/32"], "protocol": "tcp",
                "ports": [40002, "60001-60100"], "podSelector": {"matchLabels": {"app": "api"}},
                "namespaceSelector": {}}]}"#,
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
                {"name": "c", "direction": "outbound", "protocol": "tcp", "pods": ["10.0.0.1/8"]},
                {"name": "d", "direction": "outbound", "protocol": "tcp", "pods": ["10.0.0.0/8"], "namespaceSelector": {}}]}"#
        ), @r#"
        rules[0].ports[0]: port range `7-3` ends before it begins; write "3-7"
        rules[1].name: the name `a` is already taken by the rule at rules[0]; give each rule a name of its own: hit counters and iptables comments go by it
        rules[1].ports: ICMP has no ports, so rule `a` can have none; remove `ports`, or write the protocol the ports belong to: tcp, udp or sctp
        rules[2].pods[0]: `10.0.0.1/8` has bits set after its first 8; write 10.0.0.0/8 for the network, or 10.0.0.1/32 for this one address
        rules[3].namespaceSelector: rule `d` has both `pods` and `namespaceSelector`; keep one: `pods` for addresses, `namespaceSelector` for labels
        "#);
        insta::assert_snapshot!(wrong(r#"{"rules": []}"#), @r"
        rules: the list of rules is empty; write a rule, or delete the policy
        ");
        insta::assert_snapshot!(wrong("{}"), @r"
        : `rules` is missing; add `rules`, such as `rules: [{direction: inbound, name: devices-to-api, protocol: tcp}]`
        ");
    }
}
