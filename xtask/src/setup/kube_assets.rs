//! kube-apiserver, etcd and kubectl for the Kubernetes tests: those that `cargo xtask cluster` builds.
//!
//! Programs in `KUBEBUILDER_ASSETS` come first, those in `PATH` last.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{cluster, cmd};

/// The programs of a control plane.
const PROGRAMS: [&str; 3] = ["kube-apiserver", "kubectl", "etcd"];

/// `cargo xtask kube-assets`.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn main() -> Result<()> {
    ensure()?;
    for name in PROGRAMS {
        if let Some(program) = find(name)? {
            println!("{name:15} {}", program.display());
        }
    }
    Ok(())
}

/// Builds an API server, an etcd and a kubectl, unless they exist.
///
/// # Errors
/// A program is missing and cannot be built; the message has the remedy.
pub(crate) fn ensure() -> Result<()> {
    for name in PROGRAMS {
        if find(name)?.is_none() {
            return cluster::ensure(None).map(drop).context(
                "the Kubernetes tests have no API server; name a folder that has kube-apiserver, etcd and kubectl in \
                 KUBEBUILDER_ASSETS",
            );
        }
    }
    Ok(())
}

/// Finds a program where the tests look for it, in their order.
fn find(name: &str) -> Result<Option<PathBuf>> {
    let given = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let folders = given.into_iter().chain(newest(&super::cache()?.join("cluster")));
    let first = folders.map(|folder| folder.join(name)).find(|program| program.is_file());
    Ok(first.or_else(|| cmd::find_program(name)))
}

/// The programs of the newest release in the cache that is built to the end.
fn newest(cache: &Path) -> Option<PathBuf> {
    let releases = fs::read_dir(cache).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let releases =
        releases.filter(|release| PROGRAMS.iter().all(|name| release.join("bin").join(name).is_file()));
    let number = |path: &PathBuf| -> Vec<u32> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.split('.').filter_map(|part| part.parse().ok()).collect()
    };
    releases.max_by_key(number).map(|release| release.join("bin"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_release_that_is_built_to_the_end_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["1.9.4", "1.36.1", "1.36.0", "work"] {
            fs::create_dir_all(folder.path().join(name).join("bin")).unwrap();
            PROGRAMS.iter().for_each(|program| {
                fs::write(folder.path().join(name).join("bin").join(program), "").unwrap();
            });
        }
        fs::create_dir_all(folder.path().join("1.37.2/bin")).unwrap();
        fs::write(folder.path().join("1.37.2/bin/etcd"), "").unwrap();
        assert_eq!(newest(folder.path()), Some(folder.path().join("1.36.1/bin")));
        assert_eq!(newest(&folder.path().join("none")), None);
    }
}
