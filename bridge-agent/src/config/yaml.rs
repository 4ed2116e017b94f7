//! YAML text to a tree.

use std::borrow::Cow;
use std::collections::HashMap;

use granit_parser::{ErrorKind, Event, Parser, ScalarStyle, ScanError, Tag};

use super::leaf::Problem;
use super::node::{Key, Node, Span, Value};
use super::report::{Findings, Path, Severity};

/// The limit of nested lists and mappings. The configuration itself needs 6, a CustomResourceDefinition 30.
const MOST_NESTED: usize = 64;

/// How many keys a mapping may have. The configuration itself has 13 at most, a label selector a few.
const MOST_KEYS: usize = 4096;

/// How many values aliases may repeat in all, so that a small file cannot ask for all memory.
const MOST_REPEATED: usize = 1_000_000;

/// Reads one YAML document. Faults go to `findings`; `None` if no tree is left.
pub(crate) fn parse<'s>(text: &'s str, findings: &mut Findings) -> Option<Node<'s>> {
    let mut documents = documents(text, Documents::One, findings)?;
    if documents.is_empty() {
        let help = "write at least `role: node` or `role: host`";
        findings.push(Severity::Error, &Path::Root, None, Problem::new("the configuration is empty", help));
        return None;
    }
    Some(documents.swap_remove(0))
}

/// Parses a stream of YAML documents, such as the output of `kustomize build`. Errors go to `findings`; `None` if the text
/// is not YAML.
pub(crate) fn parse_stream<'s>(text: &'s str, findings: &mut Findings) -> Option<Vec<Node<'s>>> {
    documents(text, Documents::Many, findings)
}

/// The number of documents that a text may have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Documents {
    One,
    Many,
}

fn documents<'s>(text: &'s str, allowed: Documents, findings: &mut Findings) -> Option<Vec<Node<'s>>> {
    let options = granit_parser::options! {
        emit_comments: false,
        emit_unresolved_aliases: true,
        flow_nesting_limit: MOST_NESTED,
        block_nesting_limit: MOST_NESTED,
    };
    let mut builder = Builder {
        open: Vec::new(),
        roots: Vec::new(),
        allowed,
        anchors: HashMap::new(),
        repeated: 0,
        documents: 0,
        findings,
    };
    for event in Parser::new_from_str_with_options(text, options) {
        match event {
            Ok((event, span)) => builder.event(event, to_span(&span)),
            Err(error) => {
                let at = Span { len: 0, ..to_span(&granit_parser::Span::empty(*error.marker())) };
                builder.error(at, syntax(&error));
                return None;
            }
        }
    }
    Some(builder.roots)
}

/// A list or mapping whose end was not seen yet.
struct Open<'s> {
    at: Span,
    anchor: usize,
    damaged: bool,
    value: Value<'s>,
    /// Of a mapping: the key whose value comes next.
    key: Option<Key<'s>>,
}

struct Builder<'s, 'f> {
    open: Vec<Open<'s>>,
    roots: Vec<Node<'s>>,
    allowed: Documents,
    anchors: HashMap<usize, Node<'s>>,
    repeated: usize,
    documents: usize,
    findings: &'f mut Findings,
}

impl<'s> Builder<'s, '_> {
    fn error(&mut self, at: Span, problem: Problem) {
        self.findings.push(Severity::Error, &Path::Root, Some(at), problem);
    }

    fn event(&mut self, event: Event<'s>, at: Span) {
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents == 2 && self.allowed == Documents::One {
                    let help = "keep one document to a file: remove this and the rest";
                    self.error(at, Problem::new("a second YAML document begins here", help));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.tag(tag.as_deref(), at);
                let plain = matches!(style, ScalarStyle::Plain);
                self.value(at, anchor, false, if plain { Value::Plain(text) } else { Value::Quoted(text) });
            }
            // Most lists have one element, and a large file has hundreds of thousands of lists.
            Event::SequenceStart(_, anchor, tag) => {
                self.begin(at, anchor, tag.as_deref(), Value::List(Vec::with_capacity(1)))
            }
            Event::MappingStart(_, anchor, tag) => {
                self.begin(at, anchor, tag.as_deref(), Value::Map(Vec::new()))
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(Open { at: start, anchor, damaged, value, .. }) = self.open.pop() {
                    // A flow collection is quoted whole, a block by its first line.
                    let len = (at.offset + at.len).saturating_sub(start.offset);
                    self.value(Span { len, ..start }, anchor, damaged, value);
                }
            }
            Event::Alias(id) => self.alias(id, at),
            Event::UnresolvedAlias(name) => {
                self.error(
                    at,
                    Problem::new(
                        format!("`*{name}` without quotes is a YAML alias, and no anchor `&{name}` is defined before it"),
                        format!("write \"*{name}\" in quotes if the star is meant as it is"),
                    ),
                );
                self.unusable(at);
            }
            _ => {}
        }
    }

    fn begin(&mut self, at: Span, anchor: usize, tag: Option<&Tag>, value: Value<'s>) {
        self.tag(tag, at);
        self.open.push(Open { at, anchor, damaged: false, value, key: None });
    }

    fn tag(&mut self, tag: Option<&Tag>, at: Span) {
        if let Some(tag) = tag.filter(|tag| !tag.is_yaml_core_schema()) {
            self.error(at, Problem::new(format!("the YAML tag {tag} means nothing here"), "remove the tag"));
        }
    }

    fn alias(&mut self, id: usize, at: Span) {
        // An anchor that is not complete yet would contain itself.
        let Some(target) = self.anchors.get(&id) else {
            self.error(at, Problem::new("this alias is inside its own anchor", "spell the value out"));
            return self.unusable(at);
        };
        self.repeated += weight(target);
        if self.repeated > MOST_REPEATED {
            let message = format!("aliases repeat more than {MOST_REPEATED} values");
            self.error(at, Problem::new(message, "spell the values out"));
            return self.unusable(at);
        }
        let Node { damaged, value, .. } = target.clone();
        self.value(at, 0, damaged, value);
    }

    /// Something stood here that cannot be used.
    fn unusable(&mut self, at: Span) {
        if let Some(open) = self.open.last_mut() {
            open.damaged = true;
            if open.key.take().is_none() && matches!(open.value, Value::Map(_)) {
                open.key = Some(Key { name: Cow::Borrowed(""), at });
            }
        }
    }

    fn value(&mut self, at: Span, anchor: usize, damaged: bool, value: Value<'s>) {
        let mut node = Node { at, index: 0, damaged, value };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(open) = self.open.last_mut() else {
            // Of several documents the first one counts where one is allowed; the others were refused above.
            if self.roots.is_empty() || self.allowed == Documents::Many {
                self.roots.push(node);
            }
            return;
        };
        open.damaged |= node.damaged;
        match (&mut open.value, open.key.take()) {
            (Value::List(list), _) => {
                node.index = u32::try_from(list.len()).unwrap_or(u32::MAX);
                list.push(node);
            }
            (Value::Map(_), None) => match node.value {
                Value::Plain(name) | Value::Quoted(name) => open.key = Some(Key { name, at }),
                Value::List(_) | Value::Map(_) => {
                    open.damaged = true;
                    open.key = Some(Key { name: Cow::Borrowed(""), at });
                    let help = "write a name before the colon; quote it if it begins with [ or {";
                    self.error(at, Problem::new("a list or mapping cannot be a key", help));
                }
            },
            (Value::Map(entries), Some(key)) => {
                match entries.iter().find(|(other, _)| other.name == key.name) {
                    // The key was refused already.
                    _ if key.name.is_empty() && open.damaged => {}
                    Some((first, _)) => {
                        let message =
                            format!("the key `{}` is there twice, first in line {}", key.name, first.at.line);
                        open.damaged = true;
                        self.error(key.at, Problem::new(message, "keep one of them"));
                    }
                    None if entries.len() >= MOST_KEYS => {
                        // Said once; each further key would be compared with all before it.
                        if !std::mem::replace(&mut open.damaged, true) {
                            let message = format!("a mapping with more than {MOST_KEYS} keys");
                            self.error(key.at, Problem::new(message, "check the indentation"));
                        }
                    }
                    None => entries.push((key, node)),
                }
            }
            (Value::Plain(_) | Value::Quoted(_), _) => {}
        }
    }
}

/// How many values a tree has.
fn weight(node: &Node<'_>) -> usize {
    1 + match &node.value {
        Value::Plain(_) | Value::Quoted(_) => 0,
        Value::List(list) => list.iter().map(weight).sum(),
        Value::Map(entries) => entries.iter().map(|(_, node)| 1 + weight(node)).sum::<usize>(),
    }
}

fn to_span(span: &granit_parser::Span) -> Span {
    // The file is smaller than 4 GiB, and its text is parsed from memory: the offsets are there and fit.
    let range = span.byte_range().unwrap_or_default();
    Span {
        offset: u32::try_from(range.start).unwrap_or(u32::MAX),
        len: u32::try_from(range.len()).unwrap_or(u32::MAX),
        line: u32::try_from(span.start.line()).unwrap_or(u32::MAX),
    }
}

fn syntax(error: &ScanError) -> Problem {
    let help = match error.kind() {
        ErrorKind::RecursionLimitExceeded => "nest less deeply",
        ErrorKind::MissingAnchorOrAliasName => "quote a text that begins with * or &, such as \"*\"",
        _ if error.info().contains("tab") => "indent with spaces",
        _ => {
            "correct the YAML here or just before: check indentation, quotes, brackets, and the space after a colon"
        }
    };
    Problem::new(format!("this is not YAML: {}", error.info()), help)
}
