//! `cargo xtask cluster`: a Kubernetes cluster of today with bridge in it, on this machine.
//!
//! The programs are built from their Go modules into the user's cache, once for each version; the cluster itself is
//! `bridge-lab/src/cluster`.

mod cilium;
mod modules;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    build, cmd,
    setup::{self, Program, Scope, program},
};

/// Programs that a cluster needs beside its own.
const PROGRAMS: [Program; 4] = [
    program("busybox", "busybox-static", "the workload of test pods"),
    program("openssl", "openssl", "certificates of the cluster"),
    program("ldd", "libc-bin", "finds the libraries of the agent for its image"),
    program("bridge", "iproute2", "the overlay between nodes"),
];

/// `cargo xtask cluster`: builds what is missing, and becomes the program that runs the cluster.
///
/// # Errors
/// Setup or a build fails, or the program cannot be started.
pub(crate) fn main(only_build: bool, arguments: &[OsString]) -> Result<()> {
    let ready = setup::ensure(Scope::Lab)?;
    let folder = ensure(value("--version", arguments).as_deref())?;
    if value("--cni", arguments).as_deref() == Some("cilium") {
        let built = cilium::ensure().context("NOT RUN: Cilium cannot be built here")?;
        if only_build {
            println!("{}", built.display());
        }
    }
    if only_build {
        println!("{}", folder.display());
        return Ok(());
    }
    build::objects(&ready.ebpf)?;
    let program = build::program(false, "bridge-lab", "cluster")?;
    cmd::become_command(&mut cmd::as_root(&program, arguments)?)
}

/// Builds the missing programs of the Kubernetes release `version`, by default that of `versions.toml`; returns their
/// folder.
///
/// # Errors
/// There is no Go and none can be installed, or a module cannot be fetched or built.
pub(crate) fn ensure(version: Option<&str>) -> Result<PathBuf> {
    setup::programs(&PROGRAMS)?;
    let mut versions = modules::Versions::read()?;
    if let Some(version) = version {
        version.clone_into(&mut versions.kubernetes);
    }
    let folder = setup::cache()?.join("cluster").join(&versions.kubernetes).join("bin");
    modules::build(&versions, &folder).with_context(|| {
        format!(
            "the programs of the cluster cannot be built; a folder that has them can be named in BRIDGE_CLUSTER_BIN, and \
             finished ones stay in {}",
            folder.display()
        )
    })?;
    Ok(folder)
}

/// Returns helm, built into the cache.
///
/// # Errors
/// There is no Go and none can be installed, or the module cannot be fetched or built.
pub(crate) fn helm() -> Result<PathBuf> {
    modules::helm().context("helm cannot be built")
}

/// Returns krew, built into the cache.
///
/// # Errors
/// As [`helm`].
pub(crate) fn krew() -> Result<PathBuf> {
    modules::krew().context("krew cannot be built")
}

/// The value of an option, such as `--version`, in the arguments of the cluster.
fn value(option: &str, arguments: &[OsString]) -> Option<String> {
    let words: Vec<_> = arguments.iter().map(|word| word.to_string_lossy()).collect();
    let after = words.iter().position(|word| word == option).and_then(|index| words.get(index + 1));
    let joined =
        words.iter().find_map(|word| word.strip_prefix(option)?.strip_prefix('=').map(str::to_owned));
    after.map(|word| word.clone().into_owned()).or(joined)
}

/// Whether `folder` has the program `name`.
fn has(folder: &Path, name: &str) -> bool {
    folder.join(name).is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_is_found_in_either_form() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        assert_eq!(value("--version", &words(&["--once", "--version", "1.34.1"])).as_deref(), Some("1.34.1"));
        assert_eq!(value("--version", &words(&["--version=1.37.2"])).as_deref(), Some("1.37.2"));
        assert_eq!(value("--version", &words(&["--once", "--versions=2"])), None);
    }
}
