//! Where kube-apiserver, etcd and kubectl are.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, bail};

const PROGRAMS: [&str; 3] = ["kube-apiserver", "etcd", "kubectl"];

/// The programs of a control plane.
#[derive(Clone, Debug)]
pub struct Assets {
    /// `kube-apiserver`.
    pub server: PathBuf,
    /// `etcd`.
    pub etcd: PathBuf,
    /// `kubectl`.
    pub kubectl: PathBuf,
}

impl Assets {
    /// In `$KUBEBUILDER_ASSETS`, else where `cargo xtask kube-assets` puts them, else in `PATH`.
    ///
    /// # Errors
    /// One is in none of them.
    pub fn find() -> Result<Self> {
        Ok(Self { server: find("kube-apiserver")?, etcd: find("etcd")?, kubectl: find("kubectl")? })
    }
}

pub(super) fn find(name: &str) -> Result<PathBuf> {
    let given = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = given.into_iter().chain(built()).chain(env::split_paths(&path));
    match folders.map(|folder| folder.join(name)).find(|program| program.is_file()) {
        Some(program) => Ok(program),
        None => bail!(
            "there is no {name}: run `cargo xtask kube-assets`, or name a folder that has it in KUBEBUILDER_ASSETS"
        ),
    }
}

/// The folder of the programs that `cargo xtask cluster` builds, of the newest version that is built to the end.
fn built() -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    let versions =
        std::fs::read_dir(cache.join("bridge/cluster")).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let number = |path: &PathBuf| -> Vec<u32> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.split('.').filter_map(|part| part.parse().ok()).collect()
    };
    let complete = |path: &PathBuf| PROGRAMS.iter().all(|name| path.join("bin").join(name).is_file());
    versions.filter(complete).max_by_key(number).map(|version| version.join("bin"))
}
