//! Debian's packages for an architecture, unpacked; this machine's apt stays without a foreign architecture.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::Architecture;
use crate::cmd;

/// Fetches `packages` for `architecture` and unpacks them into `root`; a meta package of kernels stands for its newest one.
pub(super) fn unpack(architecture: Architecture, packages: &[&str], root: &Path) -> Result<()> {
    let part = root.with_extension("part");
    drop(fs::remove_dir_all(&part));
    for folder in ["lists/partial", "cache/archives/partial", "root"] {
        fs::create_dir_all(part.join(folder))?;
    }
    let name = architecture.debian();
    let options = [
        format!("APT::Architecture={name}"),
        format!("APT::Architectures={name}"),
        "APT::Sandbox::User=root".to_owned(),
        "Dir::State::status=/dev/null".to_owned(),
        format!("Dir::State::lists={}", part.join("lists").display()),
        format!("Dir::Cache={}", part.join("cache").display()),
    ];
    let apt = |program: &str, arguments: &[&str]| {
        let mut apt = cmd::command(program);
        apt.args(options.iter().flat_map(|option| ["-o", option])).args(arguments).current_dir(&part);
        cmd::output(apt.env("LC_ALL", "C"))
    };
    apt("apt-get", &["update", "-q"])?;
    let mut download = vec!["download".to_owned(), "-q".to_owned()];
    for package in packages {
        if package.starts_with("linux-image-") {
            let depends = apt("apt-cache", &["depends", package])?;
            let kernel = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
            download.push(kernel.with_context(|| format!("{package} depends on no kernel"))?.to_owned());
        } else {
            download.push((*package).to_owned());
        }
    }
    apt("apt-get", &download.iter().map(String::as_str).collect::<Vec<_>>())?;
    for file in fs::read_dir(&part)? {
        let path: PathBuf = file?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            cmd::run(cmd::command("dpkg-deb").arg("-x").arg(&path).arg(part.join("root")))?;
        }
    }
    fs::create_dir_all(root.parent().context("a root without a folder")?)?;
    fs::rename(part.join("root"), root)?;
    fs::remove_dir_all(&part)?;
    Ok(())
}
