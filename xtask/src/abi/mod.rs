//! The rule that a changed layout of `bridge-common` needs a new ABI version.
//!
//! Pinned maps outlive the agent that made them, so the next agent must read the same layout. The layout is recorded in
//! `bridge-common/abi.lock` beside the version it belongs to.

mod layout;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail};

use crate::{cmd, workspace};
use layout::{Difference, Layout};

const PACKAGE: &str = "bridge-common";

/// `cargo xtask abi`.
///
/// # Errors
/// As [`check`]; with `bless`, only if the present layout must not be recorded, or cannot be.
pub(crate) fn main(bless: bool) -> Result<()> {
    if !bless {
        check()?;
        println!("the layout of {PACKAGE} is the one on record");
        return Ok(());
    }
    let present = present()?;
    if let Some(recorded) = recorded()? {
        match judge(&recorded, &present) {
            Verdict::Same | Verdict::Record { .. } => {}
            Verdict::Refused(why) => bail!("{why}"),
        }
    }
    let file = lock_file();
    fs::write(&file, present.to_string()).with_context(|| file.display().to_string())?;
    println!("recorded the layout of ABI version {}", present.version);
    Ok(())
}

/// Compares the present layout with the recorded one.
///
/// # Errors
/// The layouts differ; the message names the difference and the remedy.
pub(crate) fn check() -> Result<()> {
    let bless = "type `cargo xtask abi --bless` and commit bridge-common/abi.lock";
    let Some(recorded) = recorded()? else { bail!("no layout is on record: {bless}") };
    match judge(&recorded, &present()?) {
        Verdict::Same => Ok(()),
        Verdict::Record { difference } => bail!("{difference}: {bless}"),
        Verdict::Refused(why) => bail!("{why}"),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    /// Nothing is wrong with the present layout, but it is not on record.
    Record {
        difference: String,
    },
    /// The present layout must not go by its version.
    Refused(String),
}

fn judge(recorded: &Layout, present: &Layout) -> Verdict {
    let (was, is) = (recorded.version, present.version);
    let differences = present.differences(recorded);
    if is < was {
        return Verdict::Refused(format!("ABI_VERSION is {is}, but {was} is on record: versions only go up"));
    }
    if is > was {
        return Verdict::Record { difference: format!("ABI version {is} is not on record ({was} is)") };
    }
    // New types lie in no map that an agent of this version has pinned.
    let breaking: Vec<_> =
        differences.iter().filter(|difference| !matches!(difference, Difference::Added(_))).collect();
    if !breaking.is_empty() {
        let list: String = breaking.iter().map(|difference| format!("\n  {difference}")).collect();
        return Verdict::Refused(format!(
            "the layout of {PACKAGE} has changed, but ABI_VERSION is still {is}:{list}\nset ABI_VERSION in \
             bridge-common/src/lib.rs to {}, then type `cargo xtask abi --bless`",
            is + 1
        ));
    }
    if differences.is_empty() {
        return Verdict::Same;
    }
    let list: String = differences.iter().map(|difference| format!("\n  {difference}")).collect();
    Verdict::Record { difference: format!("not on record yet:{list}\nno new version is needed") }
}

fn lock_file() -> PathBuf {
    workspace::root().join(PACKAGE).join("abi.lock")
}

/// The layout on record, if there is one.
fn recorded() -> Result<Option<Layout>> {
    let file = lock_file();
    if !file.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    Layout::parse_lock(&text).with_context(|| file.display().to_string()).map(Some)
}

/// The layout in the sources, macros expanded.
fn present() -> Result<Layout> {
    let mut rustc = cmd::command(cmd::rustc_path());
    // Only the pretty-printer is unstable here; whichever toolchain runs us has it.
    rustc.env("RUSTC_BOOTSTRAP", "1").current_dir(workspace::root());
    rustc.args([
        "--edition",
        "2024",
        "--crate-type",
        "lib",
        "-Zunpretty=expanded",
        "bridge-common/src/lib.rs",
    ]);
    Layout::parse_source(&cmd::output(&mut rustc)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "pub const ABI_VERSION: u32 = 3;
        pub mod flow { #[repr(C)] pub struct Flow { pub created: u64, pub rule: u32, pub padding: u32 } }";

    fn layout(source: &str) -> Layout {
        Layout::parse_source(source).unwrap()
    }

    fn after(from: &str, to: &str) -> Verdict {
        assert!(SOURCE.contains(from), "{from}");
        judge(&layout(SOURCE), &layout(&SOURCE.replace(from, to)))
    }

    #[test]
    fn a_changed_layout_needs_a_new_version() {
        for (from, to) in [
            ("pub rule: u32", "pub rule: u16, pub spare: u16"),
            ("pub created: u64, pub rule: u32", "pub rule: u32, pub created: u64"),
            ("rule", "rule_index"),
            ("repr(C)", "repr(C, packed)"),
            ("pub mod flow", "pub mod flows"),
        ] {
            let verdict = after(from, to);
            let Verdict::Refused(why) = verdict else { panic!("{from} -> {to}: {verdict:?}") };
            assert!(why.contains("flow::Flow") && why.contains("ABI_VERSION") && why.contains('4'), "{why}");
        }
    }

    #[test]
    fn a_new_version_is_recorded() {
        let present = layout(&SOURCE.replace("= 3", "= 4").replace("u64", "u32"));
        assert!(matches!(judge(&layout(SOURCE), &present), Verdict::Record { .. }));
    }

    #[test]
    fn a_lower_version_is_refused() {
        assert!(matches!(after("= 3", "= 2"), Verdict::Refused(_)));
    }

    #[test]
    fn an_addition_is_recorded_under_the_same_version() {
        assert!(matches!(
            after("pub mod flow", "pub const NEW: u8 = 1; pub mod flow"),
            Verdict::Record { .. }
        ));
    }

    #[test]
    fn comments_white_space_and_functions_are_no_layout() {
        assert_eq!(after("pub rule: u32,", "/// Why.\n pub rule:\n u32,"), Verdict::Same);
        assert_eq!(after("pub mod flow {", "pub mod flow { pub fn new() -> u8 { 1 }"), Verdict::Same);
    }

    #[test]
    fn the_sources_are_understood() {
        let present = present().unwrap();
        assert!(present.version > 0);
        assert_eq!(Layout::parse_lock(&present.to_string()).unwrap(), present);
    }
}
