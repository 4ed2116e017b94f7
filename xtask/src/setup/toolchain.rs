//! Finds the tools that build the kernel side: a compiler that accepts `-Z build-std`, the source of `core`, and
//! bpf-linker.
//!
//! bpf-linker reads the bitcode that rustc writes, so it must be linked to the LLVM of that rustc: the LLVM
//! decides which toolchains are usable here.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::{apt::Apt, rust_tools};
use crate::cmd;

const LINKER: &str = "bpf-linker";
const LINKER_VERSION: &str = "0.13.0";
/// Major versions of LLVM that this version of the linker can be built for.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// The oldest release of Rust that compiles this workspace (`rust-version` in Cargo.toml), as 1.N.
const OLDEST_RUST: u32 = 95;

/// The nightly to install where there is nothing else: its LLVM is the one that Debian has packages of.
const NIGHTLY: &str = "nightly-2026-05-20";

/// A toolchain that builds the kernel side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EbpfToolchain {
    /// For people.
    pub(crate) name: String,
    /// `cargo` itself, not a proxy of rustup.
    pub(crate) cargo: PathBuf,
    /// Its `rustc`.
    pub(crate) rustc: PathBuf,
    /// Whether `-Z` needs RUSTC_BOOTSTRAP.
    pub(crate) stable: bool,
    /// `bpf-linker` for its LLVM.
    pub(crate) linker: PathBuf,
}

/// A toolchain with the source of `core`, not yet known to have a linker.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Compiler {
    name: String,
    bin: PathBuf,
    llvm: u32,
    stable: bool,
}

/// Returns the toolchain to use, after installing its missing parts: Debian's where it can be had, since programs of
/// one source cost the verifier more or less by compiler, and their budget is that of one; else a nightly.
pub(super) fn ensure(apt: &mut Apt) -> Result<EbpfToolchain> {
    let works = |llvm| linker_path(llvm).is_ok_and(|linker| linker_works(&linker));
    let mut refused = Vec::new();
    if debian_compiler()?.is_none()
        && let Err(why) = install_debian_compiler(apt)?
    {
        refused.push(why);
    }
    let compiler = match choose(&installed_compilers()?, works, |llvm| can_link(apt, llvm))? {
        Choice::Ready(compiler) => return Ok(with_linker(&compiler, linker_path(compiler.llvm)?)),
        Choice::NeedsLinker(compiler) => compiler,
        Choice::Install { refused: others } => {
            refused.extend(others);
            let compiler = install_nightly(&refused)?;
            if let Err(why) = can_link(apt, compiler.llvm)? {
                bail!("{} is there, but {why}", compiler.name);
            }
            compiler
        }
    };
    Ok(with_linker(&compiler, install_linker(apt, compiler.llvm)?))
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// There is a linker for it.
    Ready(Compiler),
    /// A linker for it can be had.
    NeedsLinker(Compiler),
    /// No compiler here will do; why not, for each.
    Install { refused: Vec<String> },
}

/// The first compiler whose linker works, else the first that can get one.
fn choose(
    compilers: &[Compiler],
    works: impl Fn(u32) -> bool,
    mut can_link: impl FnMut(u32) -> Result<Result<(), String>>,
) -> Result<Choice> {
    if let Some(compiler) = compilers.iter().find(|compiler| works(compiler.llvm)) {
        return Ok(Choice::Ready(compiler.clone()));
    }
    let mut refused = Vec::new();
    for compiler in compilers {
        match can_link(compiler.llvm)? {
            Ok(()) => return Ok(Choice::NeedsLinker(compiler.clone())),
            Err(why) => refused.push(format!("{}: {why}", compiler.name)),
        }
    }
    Ok(Choice::Install { refused })
}

fn with_linker(compiler: &Compiler, linker: PathBuf) -> EbpfToolchain {
    EbpfToolchain {
        name: format!("{} (LLVM {})", compiler.name, compiler.llvm),
        cargo: compiler.bin.join("cargo"),
        rustc: compiler.bin.join("rustc"),
        stable: compiler.stable,
        linker,
    }
}

/// Compilers on this machine that can build `core`, the preferred first.
fn installed_compilers() -> Result<Vec<Compiler>> {
    let mut compilers = Vec::from_iter(debian_compiler()?);
    for toolchain in nightlies()? {
        compilers.extend(compiler(&toolchain.join("bin"), &toolchain.join("lib/rustlib/src/rust"))?);
    }
    Ok(compilers)
}

/// Folders of rustup's nightly toolchains: `nightly` itself first, then the dated ones from new to old.
fn nightlies() -> Result<Vec<PathBuf>> {
    let Some(home) = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".rustup")))
    else {
        return Ok(Vec::new());
    };
    let toolchains = home.join("toolchains");
    if !toolchains.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(&toolchains).with_context(|| toolchains.display().to_string())?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    Ok(sort_nightlies(names).into_iter().map(|name| toolchains.join(name)).collect())
}

fn sort_nightlies(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| name.starts_with("nightly-"));
    let dated = |name: &String| name["nightly-".len()..].starts_with(|c: char| c.is_ascii_digit());
    names.sort_by(|a, b| dated(a).cmp(&dated(b)).then(b.cmp(a)));
    names
}

/// Debian's compiler for web browsers, kept newer than Debian's own.
fn debian_compiler() -> Result<Option<Compiler>> {
    let Some(mut compiler) = compiler(Path::new("/usr/bin"), Path::new("/usr/lib/rustlib/src/rust"))? else {
        return Ok(None);
    };
    compiler.name = format!("Debian's {}", compiler.name);
    Ok(Some(compiler))
}

/// The compiler in `bin`, if it is complete, new enough, and the source of `core` is in `source`.
fn compiler(bin: &Path, source: &Path) -> Result<Option<Compiler>> {
    let rustc = bin.join("rustc");
    if !rustc.exists() || !bin.join("cargo").exists() || !source.join("library/core/src/lib.rs").exists() {
        return Ok(None);
    }
    let version = cmd::output(Command::new(&rustc).arg("-vV"))?;
    let version =
        parse_version(&version).with_context(|| format!("{} -vV: not understood", rustc.display()))?;
    if version.minor < OLDEST_RUST {
        return Ok(None);
    }
    Ok(Some(Compiler {
        name: format!("rustc {}", version.release),
        bin: bin.to_owned(),
        llvm: version.llvm,
        stable: !version.release.contains("nightly"),
    }))
}

#[derive(Debug, PartialEq, Eq)]
struct Version {
    release: String,
    /// N of 1.N.
    minor: u32,
    /// Major version of LLVM.
    llvm: u32,
}

/// Parses the output of `rustc -vV`.
fn parse_version(text: &str) -> Option<Version> {
    let field = |name| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let release = field("release")?;
    Some(Version {
        release: release.to_owned(),
        minor: parse_minor(release)?,
        llvm: field("LLVM version")?.split('.').next()?.parse().ok()?,
    })
}

/// N of a version 1.N.
fn parse_minor(version: &str) -> Option<u32> {
    version.strip_prefix("1.")?.split('.').next()?.parse().ok()
}

fn linker_path(llvm: u32) -> Result<PathBuf> {
    rust_tools::installed(LINKER, LINKER_VERSION, &format!("-llvm{llvm}"))
}

/// Whether the linker is there and starts: the LLVM under it may have been removed since it was built.
fn linker_works(linker: &Path) -> bool {
    linker.exists() && cmd::output(Command::new(linker).arg("--version")).is_ok()
}

/// Folder of Debian's LLVM.
fn llvm_prefix(llvm: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{llvm}"))
}

/// Returns the library that the linker is linked to.
fn llvm_library(llvm: u32) -> PathBuf {
    llvm_prefix(llvm).join("lib/libLLVM.so")
}

fn llvm_package(llvm: u32) -> String {
    format!("llvm-{llvm}-dev")
}

/// Whether a linker for this LLVM can be built here, or why not.
fn can_link(apt: &mut Apt, llvm: u32) -> Result<Result<(), String>> {
    if !LINKER_LLVM.contains(&llvm) {
        return Ok(Err(format!("{LINKER} {LINKER_VERSION} cannot be built for LLVM {llvm}")));
    }
    if llvm_library(llvm).exists() || apt.candidate(&llvm_package(llvm))?.is_some() {
        return Ok(Ok(()));
    }
    Ok(Err(format!("there is no package {} to link {LINKER} to", llvm_package(llvm))))
}

fn install_linker(apt: &mut Apt, llvm: u32) -> Result<PathBuf> {
    if !llvm_library(llvm).exists() {
        apt.install([(llvm_package(llvm).as_str(), "the LLVM that bpf-linker is linked to, that of rustc")])?;
    }
    let linker = linker_path(llvm)?;
    if linker_works(&linker) {
        return Ok(linker);
    }
    if linker.exists() {
        // It exists but does not start: the library under it has changed.
        fs::remove_dir_all(linker.ancestors().nth(2).context("the cache has no folder")?)?;
    }
    let why = "links the kernel side into eBPF objects";
    rust_tools::install(LINKER, LINKER_VERSION, why, &format!("-llvm{llvm}"), |cargo| {
        cargo.args(["--no-default-features", "--features", &format!("llvm-{llvm}")]);
        cargo.env("LLVM_PREFIX", llvm_prefix(llvm));
    })
}

/// Installs Debian's compiler, or returns why it cannot be had.
fn install_debian_compiler(apt: &mut Apt) -> Result<Result<(), String>> {
    let why = "compiles the kernel side to eBPF (-Z build-std)";
    Ok(match apt.candidate("rustc-web")? {
        None => Err("Debian's rustc-web: there is no such package here".into()),
        Some(version) if parse_minor(&version).is_none_or(|minor| minor < OLDEST_RUST) => {
            Err(format!("Debian's rustc-web {version}: older than 1.{OLDEST_RUST}"))
        }
        Some(_) => apt
            .install(["rustc-web", "cargo-web", "rust-web-src"].map(|package| (package, why)))
            .map_err(|error| format!("Debian's rustc-web: {error:#}")),
    })
}

/// Installs a nightly of rustup, as nothing else will do: `refused` says why, for each.
fn install_nightly(refused: &[String]) -> Result<Compiler> {
    let arguments = [
        "toolchain",
        "install",
        NIGHTLY,
        "--profile",
        "minimal",
        "--component",
        "rust-src",
        "--no-self-update",
    ];
    let Some(rustup) = cmd::find_program("rustup") else {
        bail!(
            "no toolchain can build the kernel side:\n  {}\nInstall rustup (https://rustup.rs), then type\n  rustup {}",
            refused.join("\n  "),
            arguments.join(" ")
        );
    };
    super::announce(NIGHTLY, "compiles the kernel side to eBPF (-Z build-std)");
    let mut command = cmd::command(rustup);
    cmd::run(command.args(arguments))
        .with_context(|| format!("no toolchain can build the kernel side:\n  {}", refused.join("\n  ")))?;
    let nightly = nightlies()?
        .into_iter()
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(NIGHTLY)));
    let nightly =
        nightly.with_context(|| format!("rustup has installed {NIGHTLY}, but not where expected"))?;
    compiler(&nightly.join("bin"), &nightly.join("lib/rustlib/src/rust"))?.with_context(|| {
        format!("{NIGHTLY} lacks rust-src: type `rustup component add rust-src --toolchain {NIGHTLY}`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiler_with(llvm: u32) -> Compiler {
        Compiler { name: format!("with LLVM {llvm}"), bin: "/bin".into(), llvm, stable: false }
    }

    #[test]
    fn a_compiler_with_a_linker_is_taken_without_asking_for_packages() {
        let compilers = [compiler_with(23), compiler_with(22)];
        let choice = choose(&compilers, |llvm| llvm == 22, |_| panic!("asked")).unwrap();
        assert_eq!(choice, Choice::Ready(compiler_with(22)));
    }

    #[test]
    fn a_nightly_whose_llvm_has_no_package_is_passed_over() {
        let can_link = |llvm| Ok(if llvm == 22 { Ok(()) } else { Err("no package".to_owned()) });
        let choice = choose(&[compiler_with(23), compiler_with(22)], |_| false, can_link).unwrap();
        assert_eq!(choice, Choice::NeedsLinker(compiler_with(22)));
        let choice = choose(&[compiler_with(23)], |_| false, can_link).unwrap();
        assert_eq!(choice, Choice::Install { refused: vec!["with LLVM 23: no package".into()] });
    }

    #[test]
    fn version_of_a_nightly() {
        let text = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                    release: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        let expected = Version { release: "1.97.0-nightly".into(), minor: 97, llvm: 22 };
        assert_eq!(parse_version(text), Some(expected));
        assert_eq!(parse_version("rustc 1.97.0"), None);
    }

    #[test]
    fn minor_version_of_a_debian_package() {
        assert_eq!(parse_minor("1.96.0+dfsg1-1~deb12u2"), Some(96));
        assert_eq!(parse_minor("2:1.96.0"), None);
    }

    #[test]
    fn plain_nightly_comes_before_dated_ones_and_new_before_old() {
        let names =
            ["nightly-2025-01-01-x86_64", "stable-x86_64", "nightly-x86_64", "nightly-2026-05-20-x86_64"];
        assert_eq!(
            sort_nightlies(names.map(str::to_owned).to_vec()),
            ["nightly-x86_64", "nightly-2026-05-20-x86_64", "nightly-2025-01-01-x86_64"]
        );
    }

    #[test]
    fn a_toolchain_without_the_source_of_core_is_none() {
        let folder = env::temp_dir();
        assert_eq!(compiler(&folder.join("no-bin"), &folder.join("no-src")).unwrap(), None);
    }
}
