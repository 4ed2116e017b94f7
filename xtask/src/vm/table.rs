//! Table of the features that each kernel has, as the runs have shown.

use std::{fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context, Result};

use super::{jobs::Outcome, kernel::Kernel};
use crate::workspace;

/// The lines between which the table stands.
const BEGIN: &str = "<!-- made by `cargo xtask vm --write` -->\n";
const END: &str = "<!-- end -->\n";

const YES: &str = "yes";
const NO: &str = "**no**";

/// One row for each thing that was done, one column for each kernel.
pub(super) fn render(columns: &[(Kernel, Vec<Outcome>)]) -> String {
    let mut rows: Vec<String> = Vec::new();
    let cells: Vec<Vec<(String, bool)>> =
        columns.iter().map(|(_, outcomes)| outcomes.iter().flat_map(Outcome::rows).collect()).collect();
    for (name, _) in cells.iter().flatten() {
        if !rows.contains(name) {
            rows.push(name.clone());
        }
    }
    let mut table = String::from("| |");
    for (kernel, _) in columns {
        write!(table, " Linux {} |", kernel.name()).expect("writing to a string");
    }
    table += "\n|---|";
    table += &"---|".repeat(columns.len());
    table += "\n";
    for row in rows {
        write!(table, "| {row} |").expect("writing to a string");
        for column in &cells {
            let cell = match column.iter().find(|(name, _)| *name == row) {
                Some((_, true)) => YES,
                Some((_, false)) => NO,
                None => "not run",
            };
            write!(table, " {cell} |").expect("writing to a string");
        }
        table += "\n";
    }
    table
}

fn document() -> PathBuf {
    workspace::root().join("docs/kernels.md")
}

/// docs/kernels.md, in three parts: the second is its table.
fn parts(text: &str) -> Result<[&str; 3]> {
    let (before, rest) = text.split_once(BEGIN).context("docs/kernels.md has no place for the table")?;
    let (table, after) = rest.split_once(END).context("docs/kernels.md has no end of the table")?;
    Ok([before, table, after])
}

/// Puts the table into docs/kernels.md.
///
/// # Errors
/// The place for it is not there.
pub(super) fn write(table: &str) -> Result<()> {
    let text = fs::read_to_string(document()).context("read docs/kernels.md")?;
    let [before, _, after] = parts(&text)?;
    fs::write(document(), format!("{before}{BEGIN}{table}{END}{after}"))?;
    Ok(())
}

/// The table of docs/kernels.md.
///
/// # Errors
/// It is not there.
pub(super) fn documented() -> Result<String> {
    let text = fs::read_to_string(document()).context("read docs/kernels.md")?;
    Ok(parts(&text)?[1].to_owned())
}

/// Returns a line for each result of these kernels that is worse than `documented`.
pub(super) fn worse(documented: &str, columns: &[(Kernel, Vec<Outcome>)]) -> Vec<String> {
    let mut worse = Vec::new();
    for (kernel, outcomes) in columns {
        let said = column(documented, *kernel);
        let done: Vec<_> = outcomes.iter().flat_map(Outcome::rows).collect();
        for (row, ok) in &done {
            if !ok && !said.contains(&(row, NO)) {
                worse.push(format!("on Linux {}: {row}", kernel.name()));
            }
        }
        for (row, cell) in said {
            if cell == YES && done.iter().all(|(name, _)| name != row) {
                worse.push(format!("on Linux {}, not run: {row}", kernel.name()));
            }
        }
        for outcome in outcomes {
            if outcome.is_cut {
                worse.push(format!("on Linux {}, {} was cut short", kernel.name(), outcome.name));
            } else if !outcome.ok && outcome.rows().iter().all(|(_, ok)| *ok) {
                worse.push(format!("on Linux {}, {} failed", kernel.name(), outcome.name));
            }
        }
    }
    worse
}

/// Returns the rows of a table with their cell for one kernel.
fn column(table: &str, kernel: Kernel) -> Vec<(&str, &str)> {
    let mut lines = table.lines().map(|line| line.trim().trim_start_matches('|').trim_end_matches('|'));
    let heading = format!("Linux {}", kernel.name());
    let header = lines.next().unwrap_or_default();
    let Some(at) = header.split('|').position(|cell| cell.trim() == heading) else { return Vec::new() };
    lines
        .skip(1)
        .filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            Some((*cells.first()?, *cells.get(at)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_features_are_named_and_those_never_there_are_not() {
        let documented =
            "| | Linux 6.1 | Linux 6.12 |\n|---|---|---|\n| `a` | yes | yes |\n| `b` | **no** | yes |\n";
        let worse = |kernel, output: &str| worse(documented, &[(kernel, vec![Outcome::of(output)])]);
        let both = "test a ... ok\ntest b ... FAILED\n";
        assert_eq!(worse(Kernel::Linux6_1, both), Vec::<String>::new());
        assert_eq!(worse(Kernel::Linux6_12, both), ["on Linux 6.12: `b`"]);
        assert_eq!(worse(Kernel::Linux6_1, ""), ["on Linux 6.1, not run: `a`"]);
        assert_eq!(worse(Kernel::Linux6_1, "test a ... ok\ntest c ... FAILED\n"), ["on Linux 6.1: `c`"]);
    }

    #[test]
    fn a_job_that_fails_without_a_row_that_says_why_is_named() {
        let mut job = Outcome::of("test a ... ok\n");
        job.ok = false;
        let documented = "| | Linux 6.1 |\n|---|---|\n| `a` | yes |\n";
        assert_eq!(worse(documented, &[(Kernel::Linux6_1, vec![job])]), ["on Linux 6.1, job failed"]);
        // Rows that are not documented would not be missed.
        let mut job = Outcome::of("test a ... ok\ntest b ... FAILED\n");
        (job.ok, job.is_cut) = (false, true);
        let documented = "| | Linux 6.1 |\n|---|---|\n| `a` | yes |\n| `b` | **no** |\n";
        assert_eq!(worse(documented, &[(Kernel::Linux6_1, vec![job])]), ["on Linux 6.1, job was cut short"]);
    }

    #[test]
    fn one_row_for_each_thing_done() {
        let scene = "{\"name\":\"a port\",\"ok\":true}\n";
        let table = render(&[
            (Kernel::Linux6_1, vec![Outcome::of(scene)]),
            (Kernel::Linux6_12, vec![Outcome::of(scene), Outcome::of("test a_pool ... FAILED\n")]),
        ]);
        assert_eq!(
            table,
            "| | Linux 6.1 | Linux 6.12 |\n|---|---|---|\n| a port | yes | yes |\n| `a_pool` | not run | **no** |\n"
        );
    }
}
