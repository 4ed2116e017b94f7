//! `zig cc` and cargo-zigbuild, from PyPI: the C compiler and linker for static binaries.

use std::path::PathBuf;

use anyhow::Result;

use crate::setup::pypi::Group;

const ZIG: Group = Group {
    packages: &["ziglang==0.17.1", "cargo-zigbuild==0.24.1"],
    program: "cargo-zigbuild",
    why: "links the static binaries",
};

/// Returns the folder that has `cargo-zigbuild` and `python-zig`.
///
/// # Errors
/// As [`Group::ensure`].
pub(super) fn ensure() -> Result<PathBuf> {
    ZIG.ensure()
}
