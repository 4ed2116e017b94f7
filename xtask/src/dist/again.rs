//! A second build, in another folder, to be compared with the first.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum as _;

use super::{Dist, SUMS};
use crate::{cmd, workspace};

/// Builds the same sources in a folder below `dist.work` and compares the checksums of every artefact.
pub(super) fn compare(dist: &Dist) -> Result<()> {
    let folder = copy_sources(dist)?;
    let mut cargo = cmd::cargo();
    cargo.args(["xtask", "dist"]).current_dir(&folder);
    for architecture in &dist.architectures {
        let value = architecture.to_possible_value().context("an architecture without a name")?;
        cargo.args(["--only", value.get_name()]);
    }
    cargo.env("SOURCE_DATE_EPOCH", dist.epoch.to_string()).env_remove("CARGO_TARGET_DIR");
    cmd::run(&mut cargo)?;
    let ours = sums(&dist.out)?;
    let theirs = sums(&folder.join("target/dist/out"))?;
    let differ: Vec<_> = ours.iter().filter(|(name, sum)| theirs.get(*name) != Some(sum)).collect();
    ensure!(differ.is_empty(), "built in {}, these are other files: {differ:?}", folder.display());
    ensure!(ours.len() == theirs.len(), "{} artefacts here, {} there", ours.len(), theirs.len());
    Ok(())
}

/// Copies the files that git tracks, as they are now; keeps `target` of an earlier run.
fn copy_sources(dist: &Dist) -> Result<PathBuf> {
    let folder = dist.work.join("again/elsewhere");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    for entry in fs::read_dir(&folder)? {
        let path = entry?.path();
        let removed = match path.is_dir() {
            true if path.ends_with("target") => Ok(()),
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        removed.with_context(|| path.display().to_string())?;
    }
    let copy = "git ls-files -z | tar --null --no-recursion --files-from=- -cf - | tar -C \"$1\" -xf -";
    let mut shell = cmd::command("sh");
    cmd::run(shell.args(["-euc", copy, "sh"]).arg(&folder).current_dir(workspace::root()))?;
    Ok(folder)
}

/// Reads the checksums in `out`, by name.
fn sums(out: &Path) -> Result<BTreeMap<String, String>> {
    let path = out.join(SUMS);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
        text => text.with_context(|| path.display().to_string())?,
    };
    let sums: BTreeMap<_, _> = text.lines().filter_map(|line| line.split_once("  ")).collect();
    ensure!(!sums.is_empty(), "{} has no checksums", path.display());
    Ok(sums.into_iter().map(|(sum, name)| (name.to_owned(), sum.to_owned())).collect())
}
