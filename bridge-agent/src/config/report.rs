//! Faults found in a configuration, with their places.

use std::fmt;
use std::path::{Path as FilePath, PathBuf};

use annotate_snippets::{AnnotationKind, Level, Origin, Renderer, Snippet};
use serde::Serialize;

use super::leaf::Problem;
use super::node::{Node, Span, Value};
pub use super::path::Path;

/// Further findings are counted, not kept: they are never read, and each costs memory.
const MOST_KEPT: usize = 1000;

/// Maximum number of bytes of a line that are shown before and behind the start of a fault.
const MOST_SHOWN: usize = 128;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The configuration is refused.
    Error,
    /// The configuration is valid, but probably not intended.
    Warning,
}

/// Something found, not yet put into words for a reader.
#[derive(Debug)]
pub(crate) struct Finding {
    severity: Severity,
    path: String,
    at: Option<Span>,
    problem: Problem,
}

/// All that was found in one configuration.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    kept: Vec<Finding>,
    errors: usize,
    left_off: usize,
}

impl Findings {
    pub(crate) fn push(&mut self, severity: Severity, path: &Path<'_>, at: Option<Span>, problem: Problem) {
        self.errors += usize::from(severity == Severity::Error);
        if self.kept.len() < MOST_KEPT {
            self.kept.push(Finding { severity, path: path.to_string(), at, problem });
        } else {
            self.left_off += 1;
        }
    }

    pub(crate) const fn has_errors(&self) -> bool {
        self.errors > 0
    }

    /// In the order of the file, with the text each one is about.
    pub(crate) fn into_diagnostics(mut self, file: Option<&FilePath>, source: Option<&str>) -> Diagnostics {
        self.kept.sort_by_key(|finding| finding.at.map(|at| at.offset));
        let list = self
            .kept
            .into_iter()
            .map(|finding| {
                let place = finding.at.zip(source).map(|(at, source)| Place::find(at, source));
                Diagnostic {
                    severity: finding.severity,
                    file: file.map(FilePath::to_path_buf),
                    path: finding.path,
                    place,
                    message: finding.problem.message,
                    help: finding.problem.help,
                }
            })
            .collect();
        Diagnostics { list, left_off: self.left_off }
    }
}

/// Collects the findings of checks that compare values.
pub(crate) struct Report<'t> {
    tree: &'t Node<'t>,
    findings: &'t mut Findings,
}

impl<'t> Report<'t> {
    pub(crate) const fn new(tree: &'t Node<'t>, findings: &'t mut Findings) -> Self {
        Self { tree, findings }
    }

    pub(crate) fn error(&mut self, path: &Path<'_>, problem: Problem) {
        self.push(Severity::Error, path, problem);
    }

    pub(crate) fn warn(&mut self, path: &Path<'_>, problem: Problem) {
        self.push(Severity::Warning, path, problem);
    }

    /// Reports each element of the list at `path` that is there before.
    pub(crate) fn repeated<T: PartialEq>(&mut self, path: &Path<'_>, list: &[T]) {
        for (index, element) in list.iter().enumerate() {
            if list[..index].contains(element) {
                let problem = Problem::new("this is in the list twice", "remove one of them");
                self.error(&path.index(index), problem);
            }
        }
    }

    fn push(&mut self, severity: Severity, path: &Path<'_>, problem: Problem) {
        let (node, _) = self.resolve(path);
        self.findings.push(severity, &node.original(path), Some(node.at), problem);
    }

    /// Returns whether everything written at and below `path` could be read. Where it could not, a check that relies on
    /// a missing value would only raise a false alarm.
    pub(crate) fn intact(&self, path: &Path<'_>) -> bool {
        // A key that is not there was perhaps misspelt: the mapping it belongs to knows.
        !self.resolve(path).0.damaged
    }

    /// Where `path` is, in words.
    pub(crate) fn place(&self, path: &Path<'_>) -> String {
        format!("line {}", self.resolve(path).0.at.line)
    }

    /// The node at `path`, or the nearest above it, and whether it is the very one.
    fn resolve(&self, path: &Path<'_>) -> (&'t Node<'t>, bool) {
        match path {
            Path::Root => (self.tree, true),
            Path::Key(parent, key) => match self.resolve(parent) {
                (node, true) => match node.get(key) {
                    Some(child) => (child, true),
                    None => (node, false),
                },
                above => above,
            },
            Path::Index(parent, index) => match self.resolve(parent) {
                (node, true) => match &node.value {
                    Value::List(list) => match list.get(*index) {
                        Some(child) => (child, true),
                        None => (node, false),
                    },
                    // A scalar where a list of one was meant.
                    _ => (node, true),
                },
                above => above,
            },
        }
    }
}

/// The place of a finding in its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// The text that was found wrong, as far as it stands on `line`; 128 bytes of it at most.
    pub text: String,
    /// The line, or the part of a long one around `text`.
    #[serde(skip)]
    excerpt: String,
    /// Where `text` is in `excerpt`, in bytes.
    #[serde(skip)]
    range: std::ops::Range<usize>,
}

impl Place {
    fn find(at: Span, source: &str) -> Self {
        let floor =
            |offset: usize| (0..=offset.min(source.len())).rev().find(|at| source.is_char_boundary(*at));
        let start = floor(at.offset as usize).unwrap_or(0);
        let end = floor(at.offset as usize + at.len as usize).unwrap_or(0).max(start);
        let line_start = source[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = source[start..].find(['\n', '\r']).map_or(source.len(), |newline| start + newline);
        // A file may be one line of many megabytes, and have an error in each part of it.
        let line_end = floor(line_end.min(start + MOST_SHOWN)).unwrap_or(line_end);
        let end = start + source[start..end.min(line_end).max(start)].trim_end().len();
        let column = source[line_start..start].chars().count() + 1;
        let line_start = floor(line_start.max(start.saturating_sub(MOST_SHOWN))).unwrap_or(line_start);
        Self {
            line: at.line as usize,
            column,
            text: source[start..end].to_owned(),
            excerpt: source[line_start..line_end].to_owned(),
            range: start - line_start..end - line_start,
        }
    }
}

/// One finding, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// The file, if it came from one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Which value, such as `rules[3].ports[0]`.
    pub path: String,
    /// Where in the file.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub place: Option<Place>,
    /// The fault.
    pub message: String,
    /// The remedy.
    pub help: String,
}

impl Diagnostic {
    /// Puts it into words, with the line of the file it is about.
    #[must_use]
    pub fn render(&self, renderer: &Renderer) -> String {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let file = self.file.as_ref().map(|file| file.display().to_string());
        match (&self.place, file) {
            (Some(place), file) => {
                let annotation = AnnotationKind::Primary.span(place.range.clone());
                let snippet = Snippet::source(&place.excerpt).line_start(place.line).annotation(annotation);
                let title = level.primary_title(&self.message);
                let help = Level::HELP.message(&self.help);
                let before = place.excerpt[..place.range.start].chars().count();
                let group = match file {
                    // The column in an excerpt is not the one in the line.
                    Some(file) if before + 1 != place.column => {
                        let origin = Origin::path(file).line(place.line).char_column(place.column);
                        title.element(origin).element(snippet).element(help)
                    }
                    file => title.element(snippet.path(file)).element(help),
                };
                renderer.render(&[group])
            }
            (None, Some(file)) => {
                let title = level.primary_title(format!("{file}: {}", self.message));
                renderer.render(&[title.element(Level::HELP.message(&self.help))])
            }
            (None, None) => {
                let colon = if self.path.is_empty() { "" } else { ": " };
                let title = level.primary_title(format!("{}{colon}{}", self.path, self.message));
                renderer.render(&[title.element(Level::HELP.message(&self.help))])
            }
        }
    }
}

/// Findings in the order of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diagnostics {
    /// Those that were kept.
    pub list: Vec<Diagnostic>,
    /// How many more there were.
    pub left_off: usize,
}

impl Diagnostics {
    /// One finding that belongs to no line of a file.
    pub(crate) fn of_file(file: &FilePath, problem: Problem) -> Self {
        let diagnostic = Diagnostic {
            severity: Severity::Error,
            file: Some(file.to_path_buf()),
            path: String::new(),
            place: None,
            message: problem.message,
            help: problem.help,
        };
        Self { list: vec![diagnostic], left_off: 0 }
    }

    /// Puts all into words, each followed by an empty line.
    #[must_use]
    pub fn render(&self, renderer: &Renderer) -> String {
        let mut text = String::new();
        for diagnostic in &self.list {
            text.push_str(&diagnostic.render(renderer));
            text.push_str("\n\n");
        }
        if self.left_off > 0 {
            text.push_str(&format!("and {} more\n", self.left_off));
        }
        text
    }
}

/// Why a configuration was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors(pub Diagnostics);

impl ConfigErrors {
    /// One fault that belongs to no line of a file.
    pub(crate) fn of_file(file: &FilePath, problem: Problem) -> Self {
        Self(Diagnostics::of_file(file, problem))
    }
}

impl fmt::Display for ConfigErrors {
    /// Without colours.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.render(&Renderer::plain()).trim_end())
    }
}
