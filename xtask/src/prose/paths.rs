//! Tests that the paths and links in the documents exist.
#![cfg(test)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::workspace;

/// Documents at the root and in docs/.
fn documents() -> Vec<PathBuf> {
    let markdown = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect()
    };
    let root = workspace::root();
    [root.to_owned(), root.join("docs"), root.join("docs/decisions")]
        .iter()
        .flat_map(|f| markdown(f))
        .collect()
}

/// Returns the code spans of `text` that look like a path in this repository: `a/b`, `a/b.rs`, `FILE.md`.
fn paths(text: &str) -> Vec<&str> {
    let spans = text.split('`').skip(1).step_by(2);
    let is_path = |span: &&str| {
        let plain = span.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
        plain
            && !span.starts_with('/')
            && (span.contains('/') || span.ends_with(".rs") || span.ends_with(".md"))
    };
    spans.filter(is_path).collect()
}

/// Returns the targets of links to files, without their anchors.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    let target = |target: &'_ str| target.split_once('#').map_or(target.len(), |(file, _)| file.len());
    targets
        .filter(|link| !link.contains("://") && !link.starts_with("mailto:"))
        .map(|link| &link[..target(link)])
        .filter(|link| !link.is_empty())
        .collect()
}

#[test]
fn paths_and_links_are_found() {
    let text = "`a/b.rs`, `x y/z`, `/etc/passwd`, `lib.rs`, `word`, [one](docs/a.md#b), [two](https://x/y), [three](#b)";
    assert_eq!(paths(text), ["a/b.rs", "lib.rs"]);
    assert_eq!(links(text), ["docs/a.md"]);
}

#[test]
fn every_path_in_the_architecture_exists() {
    let root = workspace::root();
    let text = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let missing: Vec<&str> = paths(&text).into_iter().filter(|path| !root.join(path).exists()).collect();
    assert!(paths(&text).len() > 40, "ARCHITECTURE.md names hardly any path");
    assert!(missing.is_empty(), "ARCHITECTURE.md names paths that do not exist: {missing:?}");
}

#[test]
fn every_link_in_the_documents_leads_to_a_file() {
    let mut broken = Vec::new();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        let folder = document.parent().unwrap();
        let dead = links(&text).into_iter().filter(|link| !folder.join(link).exists());
        broken.extend(dead.map(|link| format!("{}: {link}", document.display())));
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
