//! The programs of a cluster, as `cargo xtask cluster` builds them.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// The Kubernetes release that is used unless another is named; `xtask/src/cluster/versions.toml` has the same.
pub const KUBERNETES: &str = "1.36.1";

/// The release of Cilium; `xtask/src/cluster/versions.toml` has the same.
const CILIUM: &str = "1.18.0";

/// Every program that a cluster runs. CNI plugins are called by containerd.
const NAMES: [&str; 16] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "bridge",
    "ptp",
    "loopback",
    "host-local",
    "portmap",
];

/// Finds the folder of Cilium: `$BRIDGE_CILIUM`, else that in the cache that `cargo xtask cluster --cni cilium` fills.
///
/// # Errors
/// A program or its eBPF sources are missing.
pub(super) fn cilium() -> Result<PathBuf> {
    let folder = match env::var_os("BRIDGE_CILIUM") {
        Some(folder) => PathBuf::from(folder),
        None => cache()?.join("bridge/cluster").join(format!("cilium-{CILIUM}")),
    };
    let parts =
        ["bin/cilium-agent", "bin/cilium-operator", "bin/cilium-cni", "bin/clang", "lib/bpf/bpf_lxc.c"];
    let missing: Vec<_> = parts.into_iter().filter(|part| !folder.join(part).is_file()).collect();
    ensure!(
        missing.is_empty(),
        "{} lacks {}: `cargo xtask cluster --build --cni cilium` builds them",
        folder.display(),
        missing.join(", ")
    );
    Ok(folder)
}

/// A folder that has all programs.
#[derive(Clone, Debug)]
pub struct Programs(PathBuf);

impl Programs {
    /// Finds the programs of Kubernetes `version` in `$BRIDGE_CLUSTER_BIN`, else in the cache that `cargo xtask cluster`
    /// fills.
    ///
    /// # Errors
    /// A program is missing.
    pub fn find(version: &str) -> Result<Self> {
        let folder = match env::var_os("BRIDGE_CLUSTER_BIN") {
            Some(folder) => PathBuf::from(folder),
            None => cache()?.join("bridge/cluster").join(version).join("bin"),
        };
        let missing: Vec<_> = NAMES.into_iter().filter(|name| !folder.join(name).is_file()).collect();
        ensure!(
            missing.is_empty(),
            "{} lacks {}: `cargo xtask cluster --build` builds them",
            folder.display(),
            missing.join(", ")
        );
        Ok(Self(folder))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Returns the path of a program.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

fn cache() -> Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    cache.context("neither XDG_CACHE_HOME nor HOME names a folder")
}
