//! `cargo xtask dist`: static binaries for x86_64 and aarch64, packages for Debian and RPM systems, a bill of
//! materials and checksums, all below `target/dist/out`.
//!
//! The binaries are linked statically against musl: they run on any distribution from the kernel floor on, which
//! glibc does not allow (its name service loads shared libraries at run time). `zig cc` is the C compiler and the
//! linker for both targets; the standard library is built from Debian's source package.

mod binaries;
mod packages;
mod zig;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    build, cmd, image,
    setup::{self, Program, Scope, program},
    steps::Steps,
    workspace::{self, Metadata},
};

/// Programs that make and test packages.
const PROGRAMS: [Program; 6] = [
    program("dpkg-deb", "dpkg", "writes the .deb packages"),
    program("rpmbuild", "rpm", "writes the .rpm packages"),
    program("llvm-strip", "llvm", "removes symbols from binaries of both architectures"),
    program("qemu-aarch64-static", "qemu-user-static", "runs the aarch64 binary here"),
    program("debootstrap", "debootstrap", "makes the root that the .deb is installed into"),
    program("file", "file", "tells whether a binary is static"),
];

/// An architecture that is shipped, under the names that compilers and package managers give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    X86_64,
    Aarch64,
}

impl Architecture {
    const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    const fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-musl",
            Self::Aarch64 => "aarch64-unknown-linux-musl",
        }
    }

    /// As rpm and the kernel name it.
    const fn machine(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    const fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }
}

/// Everything that one run of `cargo xtask dist` works on.
pub(crate) struct Dist {
    version: String,
    /// Time of every file in an artefact, seconds since 1970.
    epoch: u64,
    /// Where artefacts are written.
    out: PathBuf,
    /// Where intermediate files are written.
    work: PathBuf,
}

impl Dist {
    fn new() -> Result<Self> {
        let metadata = Metadata::read()?;
        let version = metadata.version("bridge-agent").context("cargo metadata names no version")?;
        let work = metadata.target_directory()?.join("dist");
        let out = work.join("out");
        Ok(Self { version, epoch: image::epoch()?, out, work })
    }

    /// The static binary of `architecture`, as it is shipped.
    fn binary(&self, architecture: Architecture) -> PathBuf {
        self.out.join(format!("bridge-agent-{}-linux-{}", self.version, architecture.machine()))
    }
}

/// `cargo xtask dist`.
///
/// # Errors
/// Setup, a build, a package or a test fails.
pub(crate) fn main(test: bool) -> Result<()> {
    let ready = setup::ensure(if test { Scope::Lab } else { Scope::Build })?;
    setup::programs(&PROGRAMS)?;
    let dist = Dist::new()?;
    let mut steps = Steps::default();
    let built = steps.step("eBPF objects", || build::objects(&ready.ebpf)).and_then(|()| {
        fs::create_dir_all(&dist.out).ok()?;
        steps.step("static binaries", || binaries::build(&dist, &ready.ebpf))
    });
    if built.is_some() {
        steps.step("packages", || packages::build(&dist));
        steps.step("bill of materials", || binaries::bill_of_materials(&dist));
        steps.step("checksums", || checksums(&dist));
        if test {
            steps.step("the binaries are static and run", || binaries::test(&dist));
            steps.step("the packages install, upgrade and are purged", || packages::test(&dist));
            steps.step("the static binary in the lab", || in_lab(&dist));
        }
    }
    steps.finish()?;
    for name in artefacts(&dist.out)? {
        let size = fs::metadata(dist.out.join(&name))?.len();
        println!("{:>9} KiB  {name}", size / 1024);
    }
    println!("in {}", dist.out.display());
    Ok(())
}

/// The names of all files in `out`, sorted.
fn artefacts(out: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(out).with_context(|| out.display().to_string())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Writes `SHA256SUMS` over every other artefact, as `sha256sum --check` reads it.
fn checksums(dist: &Dist) -> Result<()> {
    let names: Vec<_> = artefacts(&dist.out)?.into_iter().filter(|name| name != "SHA256SUMS").collect();
    let sums = cmd::output(cmd::command("sha256sum").args(&names).current_dir(&dist.out))?;
    fs::write(dist.out.join("SHA256SUMS"), sums)?;
    Ok(())
}

/// Plays the scenes of the lab with the static binary of this machine's architecture as the agent.
fn in_lab(dist: &Dist) -> Result<()> {
    let lab = build::program(false, "bridge-lab", "lab")?;
    let agent = dist.binary(Architecture::X86_64);
    ensure!(cmd::can_be_root(), "the lab needs root");
    let mut arguments = vec![format!("BRIDGE_AGENT={}", agent.display()).into(), lab.into_os_string()];
    arguments.extend(["--once".into()]);
    cmd::run(cmd::as_root(Path::new("env"), &arguments)?.current_dir(workspace::root()))
}
