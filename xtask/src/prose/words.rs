//! Counts words that make prose hard to read, and compares them with the ceilings in `xtask/words.toml`.

use std::{collections::BTreeMap, fs, path::Path, path::PathBuf};

use anyhow::{Context, Result, bail};

use super::text;
use crate::{cmd, workspace};

/// Ceilings, relative to the root of the repository.
const CEILINGS: &str = "xtask/words.toml";
const HEADER: &str = "\
# The most occurrences of each word that comments, string literals and Markdown may hold; code is not counted.
# `cargo xtask lint` fails above a ceiling. `cargo xtask words --lower` writes today's figures where they are lower.
# CONTRIBUTING.md says what to write instead.
";

/// A phrase to avoid, with its inflections.
struct Phrase {
    name: &'static str,
    forms: &'static [&'static str],
}

const PHRASES: [Phrase; 11] = [
    Phrase { name: "what", forms: &["what"] },
    Phrase { name: "whoever", forms: &["whoever"] },
    Phrase { name: "nobody", forms: &["nobody"] },
    Phrase { name: "somebody", forms: &["somebody"] },
    Phrase { name: "tell", forms: &["tell", "tells", "told"] },
    Phrase { name: "so-many", forms: &["so many"] },
    Phrase { name: "anew", forms: &["anew"] },
    Phrase { name: "bears", forms: &["bears"] },
    Phrase { name: "in-force", forms: &["in force", "into force"] },
    Phrase { name: "let-go", forms: &["let go", "lets go", "gone with"] },
    Phrase { name: "make-known", forms: &["make known", "makes known"] },
];

type Counts = BTreeMap<String, usize>;

/// Fails if a phrase occurs more often than its ceiling allows.
pub(crate) fn check() -> Result<()> {
    let counts = count_repository()?;
    let over = over_ceiling(&counts, &ceilings()?);
    if !over.is_empty() {
        bail!(
            "{}; write it in other words (CONTRIBUTING.md), `cargo xtask words WORD` lists the places",
            over.join("; ")
        );
    }
    Ok(())
}

/// Lowers the ceilings to today's figures. A figure above its ceiling is refused.
pub(crate) fn lower() -> Result<()> {
    let counts = count_repository()?;
    let over = over_ceiling(&counts, &ceilings()?);
    if !over.is_empty() {
        bail!("a ceiling only falls: {}", over.join("; "));
    }
    let table: String = PHRASES.iter().map(|p| format!("{} = {}\n", p.name, counts[p.name])).collect();
    let path = workspace::root().join(CEILINGS);
    fs::write(&path, format!("{HEADER}{table}")).with_context(|| path.display().to_string())
}

/// Lists each line with an occurrence of `phrase`, or the figures of all phrases.
pub(crate) fn list(phrase: Option<&str>) -> Result<()> {
    let Some(name) = phrase else {
        for (name, count) in count_repository()? {
            println!("{count:6} {name}");
        }
        return Ok(());
    };
    let known = || PHRASES.map(|p| p.name).join(", ");
    let phrase = PHRASES.iter().find(|p| p.name == name).with_context(|| format!("one of {}", known()))?;
    for (path, prose) in documents()? {
        for line in prose.lines().filter(|line| count(line, phrase) > 0) {
            println!("{}: {}", path.display(), line.trim());
        }
    }
    Ok(())
}

fn over_ceiling(counts: &Counts, ceilings: &Counts) -> Vec<String> {
    let over = |(name, count): (&String, &usize)| {
        let ceiling = ceilings.get(name).copied().unwrap_or(0);
        (*count > ceiling).then(|| format!("{name}: {count} occurrences, at most {ceiling} are allowed"))
    };
    counts.iter().filter_map(over).collect()
}

fn ceilings() -> Result<Counts> {
    let text = fs::read_to_string(workspace::root().join(CEILINGS)).context(CEILINGS)?;
    toml::from_str(&text).context(CEILINGS)
}

fn count_repository() -> Result<Counts> {
    let mut counts: Counts = PHRASES.iter().map(|phrase| (phrase.name.to_owned(), 0)).collect();
    for (_, prose) in documents()? {
        for phrase in &PHRASES {
            *counts.entry(phrase.name.to_owned()).or_default() += count(&prose, phrase);
        }
    }
    Ok(counts)
}

/// Counts whole words, whatever their case; a phrase may be broken over two lines of a comment.
fn count(prose: &str, phrase: &Phrase) -> usize {
    let words: Vec<String> = prose
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect();
    let occurs = |form: &&str| {
        let form: Vec<&str> = form.split(' ').collect();
        words.windows(form.len()).filter(|window| window.iter().zip(&form).all(|(a, b)| a == b)).count()
    };
    phrase.forms.iter().map(occurs).sum()
}

/// Reads the prose of every Rust and Markdown file that git does not ignore.
fn documents() -> Result<Vec<(PathBuf, String)>> {
    let mut git = cmd::command("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.rs", "*.md"]);
    let list = cmd::output(git.current_dir(workspace::root()))?;
    let mut documents = Vec::new();
    for name in list.split('\0').filter(|name| !name.is_empty()) {
        let path = workspace::root().join(name);
        // A file that was deleted but not committed is still in the list.
        if !path.exists() {
            continue;
        }
        let source = fs::read_to_string(&path).with_context(|| name.to_owned())?;
        let prose = match Path::new(name).extension() {
            Some(extension) if extension == "md" => text::of_markdown(&source),
            _ => text::of_rust(&source),
        };
        documents.push((PathBuf::from(name), prose));
    }
    Ok(documents)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(name: &str, prose: &str) -> usize {
        count(prose, PHRASES.iter().find(|phrase| phrase.name == name).unwrap())
    }

    #[test]
    fn whole_words_of_any_case_are_counted_with_their_inflections() {
        assert_eq!(counted("what", "What, somewhat whatever what_not what?"), 2);
        assert_eq!(counted("tell", "It tells; told. Teller, foretold, to tell"), 3);
    }

    #[test]
    fn a_phrase_is_counted_across_lines_and_comment_markers() {
        assert_eq!(
            counted("in-force", "comes into\n    /// force; what is in force; reinforce in forces"),
            2
        );
    }

    #[test]
    fn a_figure_above_its_ceiling_is_reported_and_one_below_is_not() {
        let table = |what, anew| Counts::from([("what".to_owned(), what), ("anew".to_owned(), anew)]);
        assert_eq!(over_ceiling(&table(5, 2), &table(5, 3)), Vec::<String>::new());
        assert_eq!(over_ceiling(&table(6, 2), &table(5, 3)), ["what: 6 occurrences, at most 5 are allowed"]);
        let without = Counts::from([("what".to_owned(), 6)]);
        assert_eq!(over_ceiling(&table(6, 1), &without), ["anew: 1 occurrences, at most 0 are allowed"]);
    }

    #[test]
    fn every_phrase_has_a_ceiling() {
        let ceilings = ceilings().unwrap();
        assert_eq!(ceilings.keys().len(), PHRASES.len());
        assert!(PHRASES.iter().all(|phrase| ceilings.contains_key(phrase.name)));
    }
}
