//! The flag in the text of a manifest: found by the YAML's own structure, changed in its place, so that comments, order,
//! quotes and line ends stay as they are. JSON is YAML, and is changed likewise.

use std::{ops::Range, path::Path};

use super::{DEFAULT, Error};
use crate::{
    config::{
        ConfigErrors,
        node::{Node, Span, Value},
        report::Findings,
        yaml,
    },
    model::PortRange,
};

const FLAG: &str = "service-node-port-range";
/// The NodePort of the service `kubernetes`: kube-apiserver does not start if it is outside the range.
const OWN_PORT: &str = "kubernetes-service-node-port";
const PROGRAM: &str = "kube-apiserver";

/// Content of a manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The active range: as written, or kube-apiserver's default.
    pub range: PortRange,
    /// As it is written; `None`: it is not.
    pub written: Option<String>,
    /// `--kubernetes-service-node-port`, if it is set and not 0.
    pub own_port: Option<u16>,
    place: Place,
}

/// Where the flag is, or is to be; in bytes of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// `--flag=value` in one element.
    Joined(Range<usize>),
    /// The value is an element of its own, behind `--flag`.
    Separate(Range<usize>),
    /// Nowhere: this is the last element of the list.
    After(Range<usize>),
}

/// An element of `command` or `args`.
struct Item<'n> {
    text: &'n str,
    at: Range<usize>,
}

/// Reads a manifest; messages call it `path`.
///
/// # Errors
/// [`Error::Syntax`] and [`Error::Manifest`].
pub fn read(text: &str, path: &Path) -> Result<Manifest, Error> {
    let refuse = |problem: String, remedy| Error::Manifest { path: path.to_owned(), problem, remedy };
    let tree = parse(text, path)?;
    let lists = program(&tree).ok_or_else(|| {
        refuse(
            format!("no container runs {PROGRAM}"),
            "name the static pod manifest of kube-apiserver, whose `command` (or `args`) begins with kube-apiserver",
        )
    })?;
    let items: Vec<Item<'_>> = lists.iter().flat_map(|list| elements(list)).collect();
    let twice = || {
        refuse(format!("--{FLAG} is there more than once"), "keep one of them: kube-apiserver takes the last")
    };
    let mut found = None;
    let mut own_port = None;
    for (index, item) in items.iter().enumerate() {
        let Some((name, value)) = flag(item.text) else { continue };
        let (value, place) = match value {
            Some(value) => (value, Place::Joined(item.at.clone())),
            None => match items.get(index + 1) {
                Some(next) => (next.text, Place::Separate(next.at.clone())),
                None if name == FLAG => {
                    return Err(refuse(format!("--{FLAG} has no value"), "write one, or remove the flag"));
                }
                None => continue,
            },
        };
        if name == OWN_PORT {
            own_port = value.trim().parse().ok().filter(|port| *port != 0);
        } else if name == FLAG && found.replace((value, place)).is_some() {
            return Err(twice());
        }
    }
    let (range, written, place) = match (found, items.last()) {
        (Some((value, place)), _) => {
            let range = parse_range(value).ok_or_else(|| {
                refuse(format!("--{FLAG}={value} is not a range of ports"), "write one such as 30000-32767")
            })?;
            (range, Some(value.to_owned()), place)
        }
        (None, Some(last)) => (DEFAULT, None, Place::After(last.at.clone())),
        // A list that runs the program has an element.
        (None, None) => return Err(refuse("`command` is empty".into(), "write it")),
    };
    Ok(Manifest { range, written, own_port, place })
}

/// The text with another range, and else unchanged.
///
/// # Errors
/// [`Error::Manifest`]: the flag, or its neighbour, is written in a way that cannot be followed.
pub fn with_range(text: &str, path: &Path, range: PortRange) -> Result<String, Error> {
    let manifest = read(text, path)?;
    let refuse = || Error::Manifest {
        path: path.to_owned(),
        problem: format!(
            "--{FLAG}, or the element before its place, is an alias, a block text, or shares its line"
        ),
        remedy: "write it as an element of its own: - --service-node-port-range=30000-32767",
    };
    let value = format!("{}-{}", range.first, range.last);
    let joined = format!("--{FLAG}={value}");
    let (at, new) = match &manifest.place {
        Place::Joined(at) => (at.clone(), requote(&text[at.clone()], &joined).ok_or_else(refuse)?),
        Place::Separate(at) => (at.clone(), requote(&text[at.clone()], &value).ok_or_else(refuse)?),
        Place::After(last) => insertion(text, last, &joined).ok_or_else(refuse)?,
    };
    let changed = [&text[..at.start], &new, &text[at.end..]].concat();
    // Parsed again: an edit in a wrong place would show here.
    let before = parse(text, path)?;
    let after = parse(&changed, path)?;
    if read(&changed, path)?.range != range || !differ_in_one(&scalars(&before), &scalars(&after)) {
        return Err(refuse());
    }
    Ok(changed)
}

fn parse<'t>(text: &'t str, path: &Path) -> Result<Node<'t>, Error> {
    if text.trim().is_empty() {
        return Err(Error::Manifest {
            path: path.to_owned(),
            problem: "the file is empty".into(),
            remedy: "name the static pod manifest of kube-apiserver",
        });
    }
    let mut findings = Findings::default();
    let tree = yaml::parse(text, &mut findings);
    let failed = findings.has_errors();
    match tree {
        Some(tree) if !failed => Ok(tree),
        _ => Err(ConfigErrors(findings.into_diagnostics(Some(path), Some(text))).into()),
    }
}

/// `command` and `args` of the container that runs kube-apiserver; those that there are, in this order.
fn program<'n, 's>(tree: &'n Node<'s>) -> Option<Vec<&'n Node<'s>>> {
    let Value::List(containers) = &tree.get("spec")?.get("containers")?.value else { return None };
    containers.iter().find_map(|container| {
        let lists: Vec<_> = ["command", "args"].iter().filter_map(|key| container.get(key)).collect();
        let first = lists.iter().flat_map(|list| elements(list)).next()?.text;
        (first.rsplit('/').next() == Some(PROGRAM)).then_some(lists)
    })
}

fn elements<'n>(list: &'n Node<'_>) -> impl Iterator<Item = Item<'n>> {
    let list: &[Node<'_>] = if let Value::List(list) = &list.value { list } else { &[] };
    list.iter().filter_map(|node| Some(Item { text: node.scalar()?, at: bytes(node.at) }))
}

fn bytes(at: Span) -> Range<usize> {
    at.offset as usize..(at.offset + at.len) as usize
}

/// Name and, behind `=`, value of a flag; underscores count as dashes (`WordSepNormalizeFunc`, k8s.io/component-base).
fn flag(text: &str) -> Option<(String, Option<&str>)> {
    let text = text.strip_prefix("--")?;
    let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
    Some((name.replace('_', "-"), value))
}

/// As kube-apiserver reads it (`PortRange.Set`, k8s.io/apimachinery/pkg/util/net/port_range.go): `30000-32767`, `30000+2767`,
/// one port, or nothing for the default.
fn parse_range(value: &str) -> Option<PortRange> {
    let value = value.trim();
    let port = |text: &str| text.parse::<u16>().ok();
    let (first, last) = if value.is_empty() {
        return Some(DEFAULT);
    } else if let Some((first, last)) = value.split_once('-') {
        (port(first)?, port(last)?)
    } else if let Some((first, more)) = value.split_once('+') {
        (port(first)?, port(first)?.checked_add(port(more)?)?)
    } else {
        (port(value)?, port(value)?)
    };
    (first <= last).then_some(PortRange { first, last })
}

/// `new` as `old` was written: in the same quotes, or in none.
fn requote(old: &str, new: &str) -> Option<String> {
    let quote = match old.chars().next()? {
        quote @ ('"' | '\'') => Some(quote),
        '*' | '|' | '>' => return None,
        _ => None,
    };
    if old.contains('\n') {
        return None;
    }
    Some(quote.map_or_else(|| new.to_owned(), |quote| format!("{quote}{new}{quote}")))
}

/// Returns the place and the text to insert behind an element, the last one of its list.
fn insertion(text: &str, last: &Range<usize>, new: &str) -> Option<(Range<usize>, String)> {
    let old = &text[last.clone()];
    let new = requote(old, new)?;
    let line = text[..last.start].rfind('\n').map_or(0, |end| end + 1);
    let indent = &text[line..last.start];
    let end = text[last.end..].find('\n').map(|end| last.end + end);
    let line_end = if end.is_some_and(|end| text[..end].ends_with('\r')) { "\r\n" } else { "\n" };
    let dashes = indent.trim_matches(' ');
    if dashes == "-" {
        // After the end of the line: a comment stays with its element.
        return Some(match end {
            Some(end) => (end + 1..end + 1, format!("{indent}{new}{line_end}")),
            None => (text.len()..text.len(), format!("{line_end}{indent}{new}")),
        });
    }
    let alone = indent.trim().is_empty() && !indent.is_empty();
    let is_list = text[last.end..].trim_start().starts_with([',', ']', '#']);
    let between = if alone { format!(",{line_end}{indent}") } else { ", ".to_owned() };
    is_list.then(|| (last.end..last.end, between + &new))
}

/// Every key and every value, in order.
fn scalars<'n>(node: &'n Node<'_>) -> Vec<&'n str> {
    match &node.value {
        Value::Plain(text) | Value::Quoted(text) => vec![text],
        Value::List(list) => list.iter().flat_map(scalars).collect(),
        Value::Map(entries) => {
            entries.iter().flat_map(|(key, node)| std::iter::once(&*key.name).chain(scalars(node))).collect()
        }
    }
}

/// Whether at most one was replaced or added.
fn differ_in_one(before: &[&str], after: &[&str]) -> bool {
    let same = before.iter().zip(after).take_while(|(before, after)| before == after).count();
    let (before, after) = (&before[same..], &after[same..]);
    let rest = before.iter().rev().zip(after.iter().rev()).take_while(|(b, a)| b == a).count();
    before.len() - rest <= 1 && after.len() - rest <= 1
}

#[cfg(test)]
mod tests;
