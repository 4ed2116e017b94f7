//! The answers of several nodes as one.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::cli::table;
use crate::state::Status;

/// Standard output of a command on one node.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) node: String,
    pub(super) text: String,
}

/// Merges tables into one with a column for the node; other text comes under the name of its node. A node without an answer
/// has reported an error.
pub(super) fn text(answers: &[Answer]) -> String {
    let answers: Vec<_> = answers.iter().filter(|answer| !answer.text.is_empty()).collect();
    let tables: Vec<_> = answers.iter().map_while(|answer| Table::parse(&answer.text)).collect();
    // Another version of the agent may have other columns.
    let is_alike = tables.windows(2).all(|pair| pair[0].header == pair[1].header);
    let Some(first) = tables.first().filter(|_| is_alike && tables.len() == answers.len()) else {
        let section = |answer: &&Answer| format!("== {}\n{}\n", answer.node, answer.text.trim_end());
        return answers.iter().map(section).collect();
    };
    let mut header = vec!["node"];
    header.extend(first.header.iter().map(String::as_str));
    let mut merged = table::table(&header);
    for (answer, table) in answers.iter().zip(&tables) {
        for row in &table.rows {
            merged.add_row([&answer.node].into_iter().chain(row));
        }
    }
    table::render(&merged)
}

/// A table as [`table::render`] writes it.
struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Reads a table; `None` if the first line is no header of capital letters in several columns.
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let first: Vec<char> = lines.next()?.chars().collect();
        let columns = columns(&first);
        let is_header = !first.iter().any(char::is_ascii_lowercase) && columns.len() > 1;
        let cells = |line: &[char]| -> Vec<String> {
            let cell = |column: &Range<usize>| {
                let end = column.end.min(line.len());
                line.get(column.start..end).map(|cell| cell.iter().collect::<String>().trim().to_owned())
            };
            columns.iter().map(|column| cell(column).unwrap_or_default()).collect()
        };
        is_header.then(|| Self {
            header: cells(&first),
            rows: lines.map(|line| cells(&line.chars().collect::<Vec<_>>())).collect(),
        })
    }
}

/// Returns the columns under a header, whose names are two or more spaces apart. The last one has no end.
fn columns(header: &[char]) -> Vec<Range<usize>> {
    let begins = |index: &usize| {
        let is_space = |index: Option<usize>| index.is_none_or(|index| header[index] == ' ');
        header[*index] != ' ' && is_space(index.checked_sub(1)) && is_space(index.checked_sub(2))
    };
    let starts: Vec<usize> = (0..header.len()).filter(begins).collect();
    let ends = starts.iter().skip(1).copied().chain([usize::MAX]);
    starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect()
}

/// Merges JSON: the elements of arrays into one array, each with its node; other values become such elements.
pub(super) fn json(answers: &[Answer]) -> String {
    let mut merged = Vec::new();
    for answer in answers {
        match serde_json::from_str(&answer.text) {
            Ok(Value::Array(list)) => merged.extend(list.into_iter().map(|value| named(&answer.node, value))),
            Ok(value) => merged.push(named(&answer.node, value)),
            Err(_) => merged.push(named(&answer.node, Value::from(answer.text.trim_end()))),
        }
    }
    format!("{:#}\n", Value::from(merged))
}

/// Returns a line of JSON with the name of its node.
pub(super) fn json_line(node: &str, line: &str) -> String {
    let value = serde_json::from_str(line).unwrap_or_else(|_| Value::from(line.trim_end()));
    format!("{}\n", named(node, value))
}

fn named(node: &str, value: Value) -> Value {
    let mut object = Map::new();
    object.insert("node".to_owned(), node.into());
    match value {
        // A row of the agent that names a node itself is about that one.
        Value::Object(fields) if !fields.contains_key("node") => object.extend(fields),
        other => _ = object.insert("value".to_owned(), other),
    }
    Value::Object(object)
}

/// One row for each node, of `bridge-agent status --json`; below it the reasons why nodes are not ready.
pub(super) fn status(answers: &[Answer]) -> String {
    let columns = ["node", "agent", "ready", "mode", "policy", "rules", "flows", "denied"];
    let mut table = table::table(&columns);
    let mut reasons = String::new();
    for Answer { node, text } in answers {
        let report: Value = serde_json::from_str(text).unwrap_or_default();
        let agent: Option<Status> = serde_json::from_value(report["agent"].clone()).unwrap_or_default();
        let unready = agent.as_ref().map(Status::unready);
        for reason in unready.iter().flatten() {
            reasons += &format!("{node}: {reason}\n");
        }
        let enforcement = &report["enforcement"];
        let shown = |value: &Value| match value {
            Value::Null => "-".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let sum = |list: &Value, field: &str| {
            let values =
                list.as_array().map(|list| list.iter().filter_map(|item| item[field].as_u64()).sum::<u64>());
            values.map_or_else(|| "-".to_owned(), |sum| sum.to_string())
        };
        table.add_row([
            node.clone(),
            match report["running"].as_bool() {
                Some(true) => shown(&report["agent"]["version"]),
                Some(false) => "not running".to_owned(),
                None => "no answer".to_owned(),
            },
            unready.map_or("-", |reasons| if reasons.is_empty() { "yes" } else { "no" }).to_owned(),
            shown(&enforcement["mode"]),
            shown(&enforcement["generation"]),
            shown(&enforcement["rules"]),
            shown(&enforcement["flows"]["established"]),
            sum(&enforcement["denied"], "packets"),
        ]);
    }
    table::render(&table) + &reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(texts: &[(&str, &str)]) -> Vec<Answer> {
        texts
            .iter()
            .map(|(node, text)| Answer { node: (*node).to_owned(), text: (*text).to_owned() })
            .collect()
    }

    #[test]
    fn tables_become_one_with_the_node_first() {
        let one = "PROTO  SOURCE         FAST PATH  RULE\n\
                   tcp    10.0.0.1:4000  state      api\n\
                   udp    [fd20::1]:53              a rule of several  words\n";
        let other = "PROTO  SOURCE            FAST PATH  RULE\ntcp    192.168.31.67:1   no\n";
        let merged =
            text(&answers(&[("node-1", one), ("n2", other), ("n3", "PROTO  SOURCE  FAST PATH  RULE\n")]));
        insta::assert_snapshot!(merged, @r"
        NODE    PROTO  SOURCE           FAST PATH  RULE
        node-1  tcp    10.0.0.1:4000    state      api
        node-1  udp    [fd20::1]:53                a rule of several  words
        n2      tcp    192.168.31.67:1  no
        ");
    }

    #[test]
    fn text_and_tables_of_other_versions_come_under_their_node() {
        assert_eq!(text(&answers(&[("a", "fine\n"), ("b", "good")])), "== a\nfine\n== b\ngood\n");
        let other = text(&answers(&[("a", "A  B\n1  2\n"), ("b", "A  C\n1  2\n")]));
        assert_eq!(other, "== a\nA  B\n1  2\n== b\nA  C\n1  2\n");
        // A node that failed has printed nothing.
        assert_eq!(text(&answers(&[("a", "A  B\n1  2\n"), ("b", "")])), "NODE  A  B\na     1  2\n");
    }

    #[test]
    fn json_names_the_node_of_each_element() {
        let merged =
            json(&answers(&[("a", "[{\"x\": 1}, 2]"), ("b", "{\"node\": \"own\"}"), ("c", "oops\n")]));
        let merged: Value = serde_json::from_str(&merged).unwrap();
        let expected = serde_json::json!([
            {"node": "a", "x": 1}, {"node": "a", "value": 2},
            {"node": "b", "value": {"node": "own"}}, {"node": "c", "value": "oops"},
        ]);
        assert_eq!(merged, expected);
        assert_eq!(json_line("a", "{\"x\": 1}\n"), "{\"node\":\"a\",\"x\":1}\n");
    }

    #[test]
    fn the_summary_has_a_row_for_each_node_that_answers_or_not() {
        let running = r#"{"running": false, "agent": null, "enforcement": {"mode": "enforce", "generation": 7, "rules": 3,
            "flows": {"established": 5, "halfOpen": 2}, "denied": [{"packets": 4}, {"packets": 6}]}}"#;
        insta::assert_snapshot!(status(&answers(&[("a", running), ("b", "")])), @r"
        NODE  AGENT        READY  MODE     POLICY  RULES  FLOWS  DENIED
        a     not running  -      enforce  7       3      5      10
        b     no answer    -      -        -       -      -      -
        ");
    }
}
