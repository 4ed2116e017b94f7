//! Builds Cilium, a network plugin of the cluster, from its Go module.

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use anyhow::{Context, Result};

use super::modules::{Go, Versions};
use crate::{
    cmd,
    progress::Progress,
    setup::{self, Program, cache, program},
};

const MODULE: &str = "github.com/cilium/cilium";
/// Its programs, each with the folder of its package.
const NAMES: [(&str, &str); 4] = [
    ("cilium-agent", "daemon"),
    ("cilium-operator", "operator"),
    ("cilium-cni", "plugins/cilium-cni"),
    ("cilium-dbg", "cilium-dbg"),
];
/// Cilium's agent compiles its eBPF programs on the node, by a program with the name `clang`.
const CLANG: &str = "clang-19";
const NEEDED: [Program; 2] = [
    program(CLANG, CLANG, "Cilium's agent compiles its eBPF programs with it"),
    program("ipset", "ipset", "Cilium's agent excludes nodes from masquerade with it"),
];

/// Builds the missing programs of the release that `versions.toml` names into the cache, and copies the C sources of its eBPF
/// programs beside them: `bin` and `lib/bpf`. Returns their folder.
///
/// # Errors
/// There is no clang 19 or no Go and none can be installed, or the module cannot be fetched or built.
pub(super) fn ensure() -> Result<PathBuf> {
    let versions = Versions::read()?;
    let folder = cache()?.join("cluster").join(format!("cilium-{}", versions.cilium));
    let (bin, sources) = (folder.join("bin"), folder.join("lib/bpf"));
    setup::programs(&NEEDED)?;
    let missing: Vec<_> = NAMES.into_iter().filter(|(name, _)| !bin.join(name).is_file()).collect();
    if missing.is_empty() && sources.is_dir() {
        return Ok(folder);
    }
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(folder.join("lib"))?;
    let go = Go::find(&versions)?;
    eprintln!("building Cilium {} from its Go module, once: 8 minutes", versions.cilium);
    let module = go.download(&format!("{MODULE}@v{}", versions.cilium))?;
    for (name, package) in missing {
        let _progress = Progress::of(format!("building {name}"));
        // As the main module: its own go.mod replaces some modules by forks.
        let mut build = go.command(&module);
        build.args(["build", "-trimpath", "-ldflags", "-s -w", "-o"]).arg(bin.join(name));
        build.arg(format!("./{package}")).env("GOFLAGS", "-mod=readonly").env("CGO_ENABLED", "0");
        go.run(&mut build)?;
    }
    let clang = bin.join("clang");
    if !clang.exists() {
        symlink(cmd::find_program(CLANG).with_context(|| format!("there is no {CLANG}"))?, clang)?;
    }
    if !sources.is_dir() {
        cmd::run(
            cmd::command("cp")
                .args(["--recursive", "--no-preserve=mode"])
                .arg(module.join("bpf"))
                .arg(&sources),
        )?;
    }
    Ok(folder)
}
