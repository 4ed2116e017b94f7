//! What a kernel can do and what not, as the runs have shown it.

use std::{fmt::Write as _, fs};

use anyhow::{Context, Result};

use super::{jobs::Outcome, kernel::Kernel};
use crate::workspace;

/// The lines between which the table stands.
const BEGIN: &str = "<!-- made by `cargo xtask vm --write` -->\n";
const END: &str = "<!-- end -->\n";

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
                Some((_, true)) => "yes",
                Some((_, false)) => "**no**",
                None => "not run",
            };
            write!(table, " {cell} |").expect("writing to a string");
        }
        table += "\n";
    }
    table
}

/// Puts the table into docs/kernels.md.
///
/// # Errors
/// The place for it is not there.
pub(super) fn write(table: &str) -> Result<()> {
    let path = workspace::root().join("docs/kernels.md");
    let text = fs::read_to_string(&path).context("read docs/kernels.md")?;
    let (before, rest) = text.split_once(BEGIN).context("docs/kernels.md has no place for the table")?;
    let (_, after) = rest.split_once(END).context("docs/kernels.md has no end of the table")?;
    fs::write(path, format!("{before}{BEGIN}{table}{END}{after}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
