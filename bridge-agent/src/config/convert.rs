//! Rewrites rules of older forms as today's forms, with the meaning that they had. Comments and order stay.
//!
//! Version 0.1 took a rule without `ports` for all ports, an empty selector for every pod, a key without a value for an absent
//! one, and numbers with leading zeros for decimal ones. Today each of these is refused. A text that could mean two things is
//! not rewritten: its author has to say which.

use std::net::IpAddr;
use std::path::Path as FilePath;

use ipnet::IpNet;

use super::leaf::{Problem, has_leading_zero, without_leading_zeros};
use super::node::{Key, Node, Span, Value};
use super::report::{ConfigErrors, Findings, Path, Severity};
use super::resource::{GROUP, NAMESPACE_POLICY, POLICY, items};
use super::{is_manifest, manifests, parse, yaml};

/// All ports, as a rule says it.
const ALL_PORTS: &str = r#"["1-65535"]"#;
/// Keys with lists of networks, and with lists of ports.
const NETWORKS: [&str; 4] = ["external", "pods", "nodes", "destinations"];
const PORTS: [&str; 2] = ["ports", "sourcePorts"];
const SELECTORS: [&str; 2] = ["podSelector", "namespaceSelector"];

/// Returns a selector that selects every pod, or every namespace, that is known.
fn everything() -> String {
    format!("{{matchExpressions: [{{key: {GROUP}/none, operator: DoesNotExist}}]}}")
}

/// A converted text.
#[derive(Debug)]
pub(crate) struct Conversion {
    pub(crate) text: String,
    /// What was changed, with the line of the former text.
    pub(crate) changes: Vec<Change>,
}

/// A change of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// From 1.
    pub(crate) line: u32,
    pub(crate) message: String,
}

/// Converts a configuration file, or manifests with policies. `file` names the text in messages.
///
/// # Errors
/// The text is not valid, and would not be after the conversion; the errors name places of the text as it would be.
pub(crate) fn convert(text: &str, file: &FilePath) -> Result<Conversion, ConfigErrors> {
    let mut findings = Findings::default();
    let of_manifests = is_manifest(text);
    let documents = yaml::parse_stream(text, &mut findings).unwrap_or_default();
    let mut editor = Editor { text, of_manifests, edits: Vec::new(), changes: Vec::new(), findings };
    for document in documents {
        if of_manifests {
            items(document).iter().for_each(|object| editor.object(object));
        } else {
            editor.rules(&document, "");
            editor.numbers(&document);
        }
    }
    let Editor { edits, mut changes, findings, .. } = editor;
    if findings.has_errors() {
        return Err(ConfigErrors(findings.into_diagnostics(Some(file), Some(text))));
    }
    let converted = apply(text, edits);
    if of_manifests {
        manifests(&converted, file)?;
    } else {
        parse(&converted, Some(file))?;
    }
    changes.sort_by_key(|change| change.line);
    Ok(Conversion { text: converted, changes })
}

/// Replaces the bytes of a text from `first` to before `last`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Edit {
    first: usize,
    last: usize,
    with: String,
}

fn apply(text: &str, mut edits: Vec<Edit>) -> String {
    edits.sort();
    // A value that aliases repeat is edited where it stands, once.
    edits.dedup();
    let (mut converted, mut at) = (String::with_capacity(text.len()), 0);
    for Edit { first, last, with } in edits {
        converted.push_str(text.get(at..first).unwrap_or_default());
        converted.push_str(&with);
        at = at.max(last);
    }
    converted.push_str(text.get(at..).unwrap_or_default());
    converted
}

const fn range(at: Span) -> (usize, usize) {
    (at.offset as usize, at.offset as usize + at.len as usize)
}

struct Editor<'t> {
    text: &'t str,
    of_manifests: bool,
    edits: Vec<Edit>,
    changes: Vec<Change>,
    findings: Findings,
}

impl Editor<'_> {
    fn object(&mut self, object: &Node<'_>) {
        let kind = object.get("kind").and_then(Node::scalar).unwrap_or_default();
        let name = object.get("metadata").and_then(|metadata| metadata.get("name")).and_then(Node::scalar);
        if !matches!(kind, POLICY | NAMESPACE_POLICY) {
            return;
        }
        if let Some(spec) = object.get("spec") {
            self.rules(spec, &format!("{kind} {}, ", name.unwrap_or_default()));
            self.numbers(spec);
        }
    }

    fn rules(&mut self, parent: &Node<'_>, place: &str) {
        let Some(Node { value: Value::List(rules), .. }) = parent.get("rules") else { return };
        for rule in rules {
            if let Value::Map(entries) = &rule.value {
                let name = rule.get("name").and_then(Node::scalar).unwrap_or_default();
                self.rule(rule, entries, &format!("{place}rule {name}"));
            }
        }
    }

    fn rule(&mut self, rule: &Node<'_>, entries: &[(Key<'_>, Node<'_>)], place: &str) {
        let protocol = rule.get("protocol").and_then(Node::scalar).unwrap_or_default();
        let needs_ports = matches!(protocol, "tcp" | "udp" | "sctp");
        // A misspelt key is for its author to correct: what was meant by it was never in effect.
        let known = |name: &str| {
            PORTS.contains(&name)
                || SELECTORS.contains(&name)
                || NETWORKS.contains(&name)
                || matches!(name, "name" | "direction" | "protocol" | "action" | "mode")
        };
        let is_intact = entries.iter().all(|(key, _)| known(&key.name));
        match rule.get("ports") {
            None if needs_ports && is_intact => {
                let message = format!(
                    "{place} has no `ports`, which meant all ports: writes {ALL_PORTS}; check that it was meant"
                );
                self.insert(rule, &format!("ports: {ALL_PORTS}"), message);
            }
            Some(ports) if ports.is_null() && needs_ports => {
                let message = format!(
                    "{place} has `ports` without a value, which meant all ports: writes {ALL_PORTS}; check that it was meant"
                );
                self.replace_value(ports, ALL_PORTS, message);
            }
            _ => {}
        }
        for (index, (key, value)) in entries.iter().enumerate() {
            let name = &*key.name;
            if name == "ports" && needs_ports || !known(name) {
                continue;
            }
            if value.is_null() {
                let message = format!(
                    "{place} has `{name}` without a value, which meant the same as none: removes the key"
                );
                self.remove(entries, index, message);
            } else if SELECTORS.contains(&name) && selects_everything(value) {
                let with = everything();
                let message =
                    format!("{place} has an empty `{name}`, which selected everything: writes {with}");
                self.replace_value(value, &with, message);
            }
        }
    }

    /// Rewrites numbers with leading zeros, wherever networks and ports are.
    fn numbers(&mut self, node: &Node<'_>) {
        match &node.value {
            Value::Map(entries) => {
                for (key, value) in entries {
                    let is_ports = PORTS.contains(&&*key.name);
                    if is_ports || NETWORKS.contains(&&*key.name) {
                        match &value.value {
                            Value::List(items) => items.iter().for_each(|item| self.number(item, is_ports)),
                            _ => self.number(value, is_ports),
                        }
                    }
                    self.numbers(value);
                }
            }
            Value::List(items) => items.iter().for_each(|item| self.numbers(item)),
            Value::Plain(_) | Value::Quoted(_) => {}
        }
    }

    fn number(&mut self, node: &Node<'_>, is_ports: bool) {
        let Some(text) = node.scalar() else { return };
        let without = if is_ports { ports_without_zeros(text) } else { network_without_zeros(text) };
        if without == text {
            return;
        }
        let is_plain_number =
            matches!(node.value, Value::Plain(_)) && text.bytes().all(|byte| byte.is_ascii_digit());
        if self.of_manifests
            && is_plain_number
            && let Ok(octal) = u16::from_str_radix(text, 8)
        {
            let message = format!(
                "`{text}` without quotes is {octal} to kubectl, which reads it as octal, and {without} to others"
            );
            let problem = Problem::new(message, format!("write {octal} or {without}, whichever is meant"));
            return self.findings.push(Severity::Error, &Path::Root, Some(node.at), problem);
        }
        let quoted = matches!(node.value, Value::Quoted(_)) || without.contains('-');
        let with = if quoted { format!("\"{without}\"") } else { without.clone() };
        self.replace_value(
            node,
            &with,
            format!("`{text}` has a leading zero: writes {without}, which it was taken for"),
        );
    }

    fn note(&mut self, line: u32, message: String) {
        let change = Change { line, message };
        if !self.changes.contains(&change) {
            self.changes.push(change);
        }
    }

    /// Adds a key to a mapping, before its first one.
    fn insert(&mut self, mapping: &Node<'_>, entry: &str, message: String) {
        let (first, _) = range(mapping.at);
        let is_flow = self.text[first..].starts_with('{');
        let (at, with) = if is_flow {
            (first + 1, format!("{entry}, "))
        } else {
            let line = self.text[..first].rfind('\n').map_or(0, |end| end + 1);
            // The dash of a list stands before the first key only.
            let indent: String = self.text[line..first].chars().map(|_| ' ').collect();
            (first, format!("{entry}\n{indent}"))
        };
        self.edits.push(Edit { first: at, last: at, with });
        self.note(mapping.at.line, message);
    }

    fn replace_value(&mut self, node: &Node<'_>, with: &str, message: String) {
        let (first, last) = range(node.at);
        // A value that is not written has the place of its colon.
        let unwritten = first == last && self.text[first..].starts_with(':');
        let edit = if unwritten {
            Edit { first: first + 1, last: last + 1, with: format!(" {with}") }
        } else {
            Edit { first, last, with: with.to_owned() }
        };
        self.edits.push(edit);
        self.note(node.at.line, message);
    }

    /// Removes a key of a mapping, which has others.
    fn remove(&mut self, entries: &[(Key<'_>, Node<'_>)], index: usize, message: String) {
        let (key, value) = &entries[index];
        let (first, _) = range(key.at);
        let (first, last) = match entries.get(index + 1) {
            Some((next, _)) => (first, range(next.at).0),
            None => {
                let end = range(value.at).1.max(range(key.at).1);
                let end = end + usize::from(self.text[end..].starts_with(':'));
                let line = self.text[..first].rfind('\n').map_or(0, |end| end + 1);
                if self.text[line..first].trim().is_empty() {
                    // A block: the whole line.
                    let next = self.text[end..].find('\n').map_or(self.text.len(), |at| end + at + 1);
                    (line, next)
                } else {
                    // In braces: with the comma before it.
                    (self.text[..first].trim_end().trim_end_matches(',').len(), end.max(first))
                }
            }
        };
        self.edits.push(Edit { first, last, with: String::new() });
        self.note(key.at.line, message);
    }
}

/// Whether a selector has no requirement.
fn selects_everything(selector: &Node<'_>) -> bool {
    let is_empty = |node: &Node<'_>| match &node.value {
        Value::Map(entries) => entries.is_empty(),
        Value::List(items) => items.is_empty(),
        Value::Plain(_) | Value::Quoted(_) => node.is_null(),
    };
    match &selector.value {
        Value::Map(entries) => entries
            .iter()
            .all(|(key, value)| matches!(&*key.name, "matchLabels" | "matchExpressions") && is_empty(value)),
        _ => false,
    }
}

/// Returns an address or a network without superfluous zeros; another text as it is.
fn network_without_zeros(text: &str) -> String {
    let without = without_leading_zeros(text);
    let is_one = without.parse::<IpNet>().is_ok() || without.parse::<IpAddr>().is_ok();
    if is_one { without } else { text.to_owned() }
}

/// Returns ports and ranges of ports without superfluous zeros; another text as it is.
fn ports_without_zeros(text: &str) -> String {
    let number = |part: &str| {
        let is_number = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        (is_number && has_leading_zero(part)).then(|| part.trim_start_matches('0').to_owned())
    };
    let parts: Vec<String> =
        text.split('-').map(|part| number(part).unwrap_or_else(|| part.to_owned())).collect();
    if parts.len() > 2 || parts.iter().any(String::is_empty) {
        return text.to_owned();
    }
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn converted(text: &str) -> Conversion {
        convert(text, FilePath::new("old.yaml")).unwrap_or_else(|error| panic!("{error}"))
    }

    const NODE: &str = "role: node\nnetworks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}\n";

    #[test]
    fn rules_of_a_file_keep_their_meaning_and_their_comments() {
        let old = format!(
            "{NODE}rules:\n  # devices\n  - name: a   # first\n    direction: inbound\n    protocol: tcp\n  - {{name: b, direction: outbound, protocol: udp}}\n  \
             - name: c\n    direction: inbound\n    external:\n    protocol: tcp\n    ports:\n  - {{name: d, direction: inbound, protocol: tcp, \
             ports: [\"080\", 0443, \"0100-0200\", 7], external: [192.168.031.067/32], pods: null}}\n  - name: e\n    direction: inbound\n    \
             protocol: icmp\n    pods: ~\n"
        );
        let Conversion { text, changes } = converted(&old);
        insta::assert_snapshot!(text, @r#"
        role: node
        networks: {pods: [10.200.1.0/24], external: [192.168.31.0/24]}
        rules:
          # devices
          - ports: ["1-65535"]
            name: a   # first
            direction: inbound
            protocol: tcp
          - {ports: ["1-65535"], name: b, direction: outbound, protocol: udp}
          - name: c
            direction: inbound
            protocol: tcp
            ports: ["1-65535"]
          - {name: d, direction: inbound, protocol: tcp, ports: ["80", 443, "100-200", 7], external: [192.168.31.67/32]}
          - name: e
            direction: inbound
            protocol: icmp
        "#);
        assert_eq!(changes.len(), 10, "{changes:#?}");
        assert!(changes[0].message.contains("rule a has no `ports`"), "{changes:?}");
        // Today's form stays as it is.
        let again = converted(&text);
        assert_eq!((again.text, again.changes), (text, Vec::new()));
    }

    #[test]
    fn policies_of_a_stream_are_converted_and_other_objects_stay() {
        let old = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata: {ports: '080'}\n---\napiVersion: bridge.lan/v1alpha1\nkind: BridgePolicy\n\
             metadata: {name: p}\nspec:\n  rules:\n  - {name: r, direction: inbound, protocol: tcp, podSelector: {}}\n  - name: s\n    direction: inbound\n    \
             protocol: any\n    namespaceSelector: {matchLabels: null}\nstatus:\n  conditions: []\n";
        let Conversion { text, .. } = converted(old);
        assert!(text.contains("data: {ports: '080'}"), "{text}");
        assert!(
            text.contains(&format!(
                "{{ports: {ALL_PORTS}, name: r, direction: inbound, protocol: tcp, podSelector: {}}}",
                everything()
            )),
            "{text}"
        );
        assert!(text.contains(&format!("namespaceSelector: {}\nstatus:", everything())), "{text}");
        let list = "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": [{\"apiVersion\": \"bridge.lan/v1alpha1\", \"kind\": \"BridgePolicy\", \
             \"metadata\": {\"name\": \"p\"}, \"spec\": {\"rules\": [{\"name\": \"r\", \"direction\": \"inbound\", \"protocol\": \"tcp\"}]}}]}";
        assert!(converted(list).text.contains("{ports: [\"1-65535\"], \"name\": \"r\""));
    }

    #[test]
    fn what_could_mean_two_things_is_left_to_its_author() {
        let policy = |rule: &str| {
            let text = format!(
                "apiVersion: bridge.lan/v1alpha1\nkind: BridgePolicy\nmetadata: {{name: p}}\nspec: {{rules: [{{name: r, direction: inbound, {rule}}}]}}\n"
            );
            convert(&text, FilePath::new("old.yaml")).unwrap_err().to_string()
        };
        let octal = policy("protocol: tcp, ports: [010]");
        assert!(octal.contains("is 8 to kubectl") && octal.contains("write 8 or 10"), "{octal}");
        // The API server dropped it, and opened all ports.
        let misspelt = policy("protocol: tcp, port: [80]");
        assert!(misspelt.contains("did you mean `ports`?"), "{misspelt}");
    }
}
