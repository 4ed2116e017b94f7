//! Label selectors, with the syntax and the meaning that Kubernetes gives them.
//! See <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/>.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bounds;
use super::leaf::Problem;
use super::report::{Path, Report};

/// A label value: at most 63 characters, alphanumeric at both ends; may be empty.
pub(crate) const VALUE_PATTERN: &str = "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$";
/// A label key: an optional DNS subdomain and a slash, then a name that is like a value, but not empty.
pub(crate) const KEY_PATTERN: &str = "^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?\
    ([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$";
/// The longest prefix of a label key, and with its slash and a name the longest key.
pub(crate) const MAX_KEY: usize = MAX_PREFIX + 1 + MAX_NAME;
/// The longest label value, and the longest name in a label key.
pub(crate) const MAX_NAME: usize = 63;
const MAX_PREFIX: usize = 253;

/// Selects by labels, as Kubernetes does: every requirement must match. It needs one at least.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelSelector {
    /// Labels that must have exactly these values, such as `{app: api}`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// Requirements on labels, such as `[{key: tier, operator: In, values: [gold, silver]}]`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub match_expressions: Vec<LabelRequirement>,
}

/// A requirement on one label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelRequirement {
    /// The key of the label, such as `app.kubernetes.io/name`.
    pub key: String,
    /// The comparison of the label with `values`.
    pub operator: LabelOperator,
    /// The values of `In` and `NotIn`; none for `Exists` and `DoesNotExist`.
    #[serde(default, skip_serializing_if = "Vec::is_empty", serialize_with = "super::flow::flow")]
    pub values: Vec<String>,
}

/// See [`LabelRequirement::operator`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LabelOperator {
    /// The label has one of the values.
    In,
    /// The label has none of the values, or does not exist.
    NotIn,
    /// The label exists.
    Exists,
    /// The label does not exist.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether it has no requirement.
    pub(crate) fn is_empty(&self) -> bool {
        self.match_labels.is_empty() && self.match_expressions.is_empty()
    }

    /// Name, length and limit of its lists.
    pub(crate) fn sizes(&self) -> [(&'static str, usize, usize); 3] {
        let values = self.match_expressions.iter().map(|requirement| requirement.values.len()).max();
        [
            ("matchLabels", self.match_labels.len(), bounds::REQUIREMENTS),
            ("matchExpressions", self.match_expressions.len(), bounds::REQUIREMENTS),
            ("values", values.unwrap_or_default(), bounds::VALUES),
        ]
    }
}

/// Checks the selector at `path`, which is the value of `key`.
pub(super) fn check_selector(key: &str, selector: &LabelSelector, path: &Path<'_>, report: &mut Report<'_>) {
    if selector.is_empty() && report.intact(path) {
        let all = if key == "podSelector" { "pod" } else { "namespace" };
        report.error(
            path,
            Problem::new(
                format!("an empty `{key}` selects every {all}"),
                "leave it out, or write `matchLabels` or `matchExpressions`",
            ),
        );
    }
    let labels = path.key("matchLabels");
    for (key, value) in &selector.match_labels {
        let path = labels.key(key);
        for problem in [check_key(key), check_value(value)].into_iter().flatten() {
            report.error(&path, problem);
        }
    }
    let expressions = path.key("matchExpressions");
    for (index, requirement) in selector.match_expressions.iter().enumerate() {
        let path = expressions.index(index);
        if let Some(problem) = check_key(&requirement.key) {
            report.error(&path.key("key"), problem);
        }
        let values = path.key("values");
        for (index, value) in requirement.values.iter().enumerate() {
            if let Some(problem) = check_value(value) {
                report.error(&values.index(index), problem);
            }
        }
        let takes_values = matches!(requirement.operator, LabelOperator::In | LabelOperator::NotIn);
        if takes_values == requirement.values.is_empty() && report.intact(&path) {
            let (message, help) = if takes_values {
                ("this operator needs values", "add `values: [...]`")
            } else {
                ("this operator takes no values", "remove `values`")
            };
            report.error(&path, Problem::new(message, help));
        }
    }
}

/// Whether `text` is alphanumeric at both ends and has only `-`, `_` and `.` besides.
fn is_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    let inside = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    bytes.len() <= MAX_NAME
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(inside)
}

/// Whether `text` is a DNS subdomain (RFC 1123).
pub(super) fn is_subdomain(text: &str) -> bool {
    let is_label = |label: &str| {
        let inside = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        !label.is_empty() && label.chars().all(inside) && !label.starts_with('-') && !label.ends_with('-')
    };
    text.len() <= MAX_PREFIX && text.split('.').all(is_label)
}

fn check_key(key: &str) -> Option<Problem> {
    let good = match key.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_name(name),
        None => is_name(key),
    };
    let help = "write at most 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends, after an optional \
                DNS name and `/`, such as app.kubernetes.io/name";
    (!good).then(|| Problem::new(format!("`{key}` is not a label key, so no pod can have it"), help))
}

fn check_value(value: &str) -> Option<Problem> {
    let help = "write at most 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends";
    (!value.is_empty() && !is_name(value))
        .then(|| Problem::new(format!("`{value}` is not a label value, so no pod can have it"), help))
}

#[cfg(test)]
mod tests {
    use regex::Regex;

    use super::*;

    #[test]
    fn checks_and_patterns_agree() {
        let (key, value) = (Regex::new(KEY_PATTERN).unwrap(), Regex::new(VALUE_PATTERN).unwrap());
        for (text, is_key, is_value) in [
            ("app", true, true),
            ("a", true, true),
            ("app.kubernetes.io/name", true, false),
            ("", false, true),
            ("/name", false, false),
            ("a/", false, false),
            ("a/b/c", false, false),
            ("UPPER/x", false, false),
            ("-a/x", false, false),
            ("a..b/x", false, false),
            ("Not_a.label-but-yes1", true, true),
            ("not a label!", false, false),
            ("-a", false, false),
            ("a-", false, false),
            ("ä", false, false),
        ] {
            assert_eq!((check_key(text).is_none(), key.is_match(text)), (is_key, is_key), "key {text:?}");
            assert_eq!(
                (check_value(text).is_none(), value.is_match(text)),
                (is_value, is_value),
                "value {text:?}"
            );
        }
        let (long, longer) = ("x".repeat(63), "x".repeat(64));
        assert!(check_value(&long).is_none() && check_value(&longer).is_some());
        assert!(check_key(&long).is_none() && check_key(&longer).is_some());
    }
}
