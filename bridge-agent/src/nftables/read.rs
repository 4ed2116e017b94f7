//! The rules as they stand in the kernel.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Deserialize;

use super::carry::Group;
use super::error::Error;
use super::programs::Programs;
use super::ruleset::TABLE;
use crate::firewall::Hits;

/// Returns a hash of the whole table without the counters; `None` if there is no table.
pub(super) fn fingerprint(programs: &Programs) -> Result<Option<u64>, Error> {
    let text = programs.list(&["--stateless", "--numeric", "list", "table", "inet", TABLE])?;
    Ok(text.map(|text| {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        hasher.finish()
    }))
}

/// The counters of the table, and its size.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    /// By the name of the rule; named counters begin with `bridge:`.
    pub(super) hits: BTreeMap<String, Hits>,
    /// Those of rules, by map and rule.
    pub(super) groups: BTreeMap<Group, Hits>,
    pub(super) elements: usize,
    pub(super) rules: usize,
    pub(super) chains: usize,
}

/// Reads everything; `None` if there is no table.
pub(super) fn content(programs: &Programs) -> Result<Option<Content>, Error> {
    let text = programs.list(&["--json", "list", "table", "inet", TABLE])?;
    text.map(|text| parse(&text)).transpose()
}

/// Reads the named counters; `None` if there is no table.
pub(super) fn counters(programs: &Programs) -> Result<Option<BTreeMap<String, Hits>>, Error> {
    let text = programs.list(&["--json", "list", "counters", "table", "inet", TABLE])?;
    Ok(text.map(|text| parse(&text)).transpose()?.map(|content| content.hits))
}

#[derive(Deserialize)]
struct Document {
    nftables: Vec<Object>,
}

/// One object; others than these are not of interest.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Object {
    Counter(NamedCounter),
    Set(Set),
    Map(Set),
    Chain(serde::de::IgnoredAny),
    Rule(serde::de::IgnoredAny),
    #[serde(untagged)]
    Other(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct NamedCounter {
    name: String,
    packets: u64,
    bytes: u64,
}

#[derive(Deserialize)]
struct Set {
    name: String,
    #[serde(default)]
    elem: Vec<serde_json::Value>,
}

fn parse(text: &str) -> Result<Content, Error> {
    let document: Document = serde_json::from_str(text)?;
    let mut content = Content::default();
    for object in document.nftables {
        match object {
            Object::Counter(NamedCounter { name, packets, bytes }) => {
                content.hits.insert(format!("bridge:{name}"), Hits { packets, bytes });
            }
            Object::Set(set) | Object::Map(set) => {
                content.elements += set.elem.len();
                for (rule, hits) in set.elem.iter().filter_map(counted) {
                    *content.groups.entry((set.name.clone(), rule.clone())).or_default() += hits;
                    *content.hits.entry(rule).or_default() += hits;
                }
            }
            Object::Chain(_) => content.chains += 1,
            Object::Rule(_) => content.rules += 1,
            Object::Other(_) => {}
        }
    }
    Ok(content)
}

/// Returns the rule that an element stands for, and its counter: `[{"elem": {"comment": .., "counter": {..}}}, VERDICT]`.
fn counted(element: &serde_json::Value) -> Option<(String, Hits)> {
    let element = element.get(0)?.get("elem")?;
    let counter = element.get("counter")?;
    let count = |key| counter.get(key)?.as_u64();
    let hits = Hits { packets: count("packets")?, bytes: count("bytes")? };
    Some((element.get("comment")?.as_str()?.to_owned(), hits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_all_elements_of_a_rule_are_added() {
        let text = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"name": "bridge-agent"}},
            {"counter": {"family": "inet", "name": "no-rule", "table": "t", "handle": 6, "packets": 3, "bytes": 180}},
            {"set": {"name": "pods4", "elem": [{"prefix": {"addr": "10.200.1.0", "len": 24}}]}},
            {"map": {"name": "in4-allow-tcp-hd-0", "elem": [
              [{"elem": {"val": {"concat": ["192.168.31.1", 6]}, "comment": "web", "counter": {"packets": 1, "bytes": 60}}}, {"accept": null}],
              [{"elem": {"val": {"concat": ["192.168.31.2", 6]}, "comment": "web", "counter": {"packets": 2, "bytes": 120}}}, {"accept": null}]]}},
            {"chain": {"name": "forward"}}, {"rule": {"chain": "forward", "expr": []}}]}"#;
        let content = parse(text).unwrap();
        let hits = |packets, bytes| Hits { packets, bytes };
        assert_eq!(
            content.hits,
            BTreeMap::from([("bridge:no-rule".into(), hits(3, 180)), ("web".into(), hits(3, 180))])
        );
        assert_eq!((content.elements, content.rules, content.chains), (3, 1, 1));
    }
}
