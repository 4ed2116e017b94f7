//! Programs of crates.io, and components of the user side's toolchain.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use super::{announce, apt::Apt};
use crate::cmd;

/// A program that `cargo install` makes.
pub(super) struct RustTool {
    pub(super) name: &'static str,
    pub(super) version: &'static str,
    pub(super) why: &'static str,
}

pub(super) const NEXTEST: RustTool = RustTool {
    name: "cargo-nextest",
    version: "0.9.151",
    why: "runs the tests, each in a process of its own",
};
pub(super) const DENY: RustTool = RustTool {
    name: "cargo-deny",
    version: "0.20.2",
    why: "checks licences, bans and sources of dependencies",
};
pub(super) const MACHETE: RustTool =
    RustTool { name: "cargo-machete", version: "0.9.2", why: "finds unused dependencies" };

pub(super) const AUDITABLE: RustTool = RustTool {
    name: "cargo-auditable",
    version: "0.7.7",
    why: "embeds the list of dependencies into the shipped binaries",
};
pub(super) const AUDITABLE_TO_CYCLONEDX: RustTool = RustTool {
    name: "auditable2cdx",
    version: "0.1.0",
    why: "writes the bill of materials of the shipped binaries",
};
pub(super) const SEMVER_CHECKS: RustTool = RustTool {
    name: "cargo-semver-checks",
    version: "0.51.0",
    why: "compares the API of bridge-client with that of the last release",
};

impl RustTool {
    /// The program: the user's own, else the one in our cache, built if missing.
    pub(super) fn ensure(&self) -> Result<PathBuf> {
        if let Some(program) = cmd::find_program(self.name) {
            return Ok(program);
        }
        install(self.name, self.version, self.why, "", |_| {})
    }
}

/// Returns the folder for built and fetched tools: the user's, outside the repository.
pub(crate) fn cache() -> Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".cache")))
        .map(|cache| cache.join("bridge"))
        .context("neither XDG_CACHE_HOME nor HOME names a folder: set HOME")
}

/// Returns the path where `install` puts the program `name`; `variant` distinguishes builds of one version.
pub(super) fn installed(name: &str, version: &str, variant: &str) -> Result<PathBuf> {
    Ok(cache()?.join(format!("tools/{name}-{version}{variant}/bin/{name}")))
}

/// Builds the program `name` into the cache, unless it is there; `adjust` may add arguments and environment.
pub(super) fn install(
    name: &str,
    version: &str,
    why: &str,
    variant: &str,
    adjust: impl FnOnce(&mut std::process::Command),
) -> Result<PathBuf> {
    let program = installed(name, version, variant)?;
    if program.exists() {
        return Ok(program);
    }
    announce(&format!("{name} {version} (built by cargo; takes minutes)"), why);
    let root = program.ancestors().nth(2).context("the cache has no folder")?;
    let mut cargo = cmd::cargo();
    cargo.args(["install", "--quiet", "--locked", "--version", version, name, "--root"]).arg(root);
    // Not from within the repository: its configuration is not for other people's programs.
    cargo.current_dir("/");
    // These programs run for a moment; optimising them takes minutes.
    for (key, value) in [("OPT_LEVEL", "0"), ("LTO", "off"), ("CODEGEN_UNITS", "64"), ("DEBUG", "false")] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
    }
    adjust(&mut cargo);
    cmd::run(&mut cargo).with_context(|| format!("{name} cannot be built; it is needed because it {why}"))?;
    Ok(program)
}

/// A program that comes with a toolchain, if asked for.
pub(super) struct Component {
    program: &'static str,
    /// Name that rustup uses.
    name: &'static str,
    /// The Debian package beside `rustc-web`.
    package: &'static str,
    why: &'static str,
}

pub(super) const RUSTFMT: Component =
    Component { program: "rustfmt", name: "rustfmt", package: "rustfmt-web", why: "checks the formatting" };
pub(super) const CLIPPY: Component = Component {
    program: "cargo-clippy",
    name: "clippy",
    package: "rust-web-clippy",
    why: "checks for mistakes",
};

/// Adds the missing components of `wanted` to the toolchain whose programs lie in `bin`.
pub(super) fn components(apt: &mut Apt, bin: &Path, wanted: &[Component]) -> Result<()> {
    let missing: Vec<_> = wanted.iter().filter(|component| !bin.join(component.program).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if bin == Path::new("/usr/bin") {
        return apt.install(missing.iter().map(|component| (component.package, component.why)));
    }
    let names: Vec<_> = missing.iter().map(|component| component.name).collect();
    let arguments = ["component", "add", "--toolchain"];
    let toolchain = bin.parent().context("a toolchain without a folder")?;
    // rustup names the folder of a toolchain as the toolchain.
    let toolchain = match toolchain.parent().is_some_and(|parent| parent.ends_with("toolchains")) {
        true => toolchain.file_name().context("a toolchain without a name")?,
        false => bail!(
            "the toolchain in {} lacks {}, and is none of rustup's: add them",
            bin.display(),
            names.join(", ")
        ),
    };
    for component in missing {
        announce(component.name, component.why);
    }
    let rustup = cmd::find_program("rustup").context("there is no rustup in PATH")?;
    cmd::run(cmd::command(rustup).args(arguments).arg(toolchain).args(names))
}
