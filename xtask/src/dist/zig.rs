//! `zig cc` and cargo-zigbuild, from PyPI: the C compiler and linker for static binaries.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{
    cmd,
    setup::{self, cache, program},
};

const ZIG: &str = "ziglang==0.17.1";
const ZIGBUILD: &str = "cargo-zigbuild==0.24.1";

/// Returns the folder that has `cargo-zigbuild` and `python-zig`; installs them into the cache if they are missing.
///
/// # Errors
/// Python has no `venv`, or a package cannot be installed.
pub(super) fn ensure() -> Result<PathBuf> {
    let name = format!("{ZIG}-{ZIGBUILD}").replace("==", "-");
    let root = cache()?.join("tools").join(name);
    let bin = root.join("bin");
    if bin.join("cargo-zigbuild").exists() {
        return Ok(bin);
    }
    setup::programs(&[program("python3", "python3-venv", "installs zig, which links the static binaries")])?;
    eprintln!("setup: installing {ZIG} and {ZIGBUILD} from PyPI: they link the static binaries");
    cmd::run(cmd::command("python3").args(["-m", "venv"]).arg(&root))
        .context("`apt-get install python3-venv`")?;
    cmd::run(cmd::command(bin.join("pip")).args(["install", "--quiet", ZIG, ZIGBUILD]))?;
    Ok(bin)
}
