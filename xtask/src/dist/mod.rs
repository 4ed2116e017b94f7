//! `cargo xtask dist`: static binaries for x86_64 and aarch64, packages for Debian and RPM systems, a bill of
//! materials and checksums, all below `target/dist/out`.
//!
//! The binaries are linked statically against musl: they run on any distribution from the kernel floor on, which
//! glibc does not allow (its name service loads shared libraries at run time). `zig cc` is the C compiler and the
//! linker for both targets; the standard library is built from Debian's source package.

mod again;
mod arm64;
mod binaries;
mod debian;
mod image;
mod install;
mod packages;
mod plugin;
mod zig;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{
    build, cmd, docs,
    setup::{self, Program, Scope, program, toolchain::EbpfToolchain},
    steps::Steps,
    workspace::{self, Metadata},
};

/// Checksums of all other artefacts.
const SUMS: &str = "SHA256SUMS";

/// Programs that make packages.
const PROGRAMS: [Program; 3] = [
    program("llvm-objcopy", "llvm", "removes DWARF from the eBPF objects"),
    program("dpkg-deb", "dpkg", "writes the .deb packages"),
    program("rpmbuild", "rpm", "writes the .rpm packages"),
];

/// Programs that test artefacts.
const TEST_PROGRAMS: [Program; 4] = [
    program("qemu-aarch64-static", "qemu-user-static", "runs the aarch64 binary here"),
    program("debootstrap", "debootstrap", "makes the root that the .deb is installed into"),
    program("systemd-nspawn", "systemd-container", "boots that root"),
    program("file", "file", "reports whether a binary is static"),
];

/// Options of `cargo xtask dist`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Test each artefact after it is built; tests that cannot run here are listed as NOT RUN
    #[arg(long)]
    test: bool,
    /// Test the artefacts of the last build
    #[arg(long, conflicts_with = "test")]
    test_only: bool,
    /// Only the tests whose name contains this, for instance deb
    #[arg(requires = "test_only")]
    filter: Option<String>,
    /// Build a second time in another folder, and compare every artefact; --test does so, too
    #[arg(long)]
    reproducible: bool,
    /// Make packages, plugin and image of the binaries of the last build
    #[arg(long, conflicts_with = "test_only")]
    package_only: bool,
    /// Build this architecture only; may be repeated
    #[arg(long, value_enum, value_name = "ARCHITECTURE")]
    only: Vec<Architecture>,
}

/// An architecture that is shipped, under the names that compilers and package managers give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Architecture {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
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

    fn is_native(self) -> bool {
        self.machine() == env::consts::ARCH
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
    architectures: Vec<Architecture>,
    version: String,
    /// Time of every file in an artefact, seconds since 1970.
    epoch: u64,
    /// Where artefacts are written.
    out: PathBuf,
    /// Where intermediate files are written.
    work: PathBuf,
}

impl Dist {
    fn new(architectures: Vec<Architecture>) -> Result<Self> {
        let metadata = Metadata::read()?;
        let version = metadata.version("bridge-agent").context("cargo metadata names no version")?;
        let work = metadata.target_directory()?.join("dist");
        let out = work.join("out");
        Ok(Self { architectures, version, epoch: crate::image::epoch()?, out, work })
    }

    /// Returns the path of the static binary of `architecture`, as it is shipped.
    fn binary(&self, architecture: Architecture) -> PathBuf {
        self.out.join(format!("bridge-agent-{}-linux-{}", self.version, architecture.machine()))
    }

    /// Returns the folder of the eBPF objects that the binaries embed.
    fn objects(&self) -> PathBuf {
        self.work.join("bpf")
    }

    /// Returns the tree of files that the packages of `architecture` install.
    fn tree(&self, architecture: Architecture) -> PathBuf {
        self.work.join("tree").join(architecture.machine())
    }

    /// Returns a command that runs the binary of `architecture`, in emulation if it is foreign.
    fn run(&self, architecture: Architecture) -> Command {
        let binary = self.binary(architecture);
        if architecture.is_native() {
            return cmd::command(binary);
        }
        let mut emulator = cmd::command(format!("qemu-{}-static", architecture.machine()));
        emulator.arg(binary);
        emulator
    }
}

/// `cargo xtask dist`.
///
/// # Errors
/// Setup, a build, a package or a test fails.
pub(crate) fn main(options: Options) -> Result<()> {
    let test = options.test || options.test_only;
    let ready = setup::ensure(if test { Scope::Lab } else { Scope::Build })?;
    setup::programs(&PROGRAMS)?;
    let mut architectures = options.only;
    if architectures.is_empty() {
        architectures.extend(Architecture::ALL);
    }
    if test || !architectures.iter().any(|architecture| architecture.is_native()) {
        setup::programs(&TEST_PROGRAMS)?;
    }
    let dist = Dist::new(architectures)?;
    let mut steps = Steps::only(options.filter);
    if !options.test_only && (options.package_only || build_binaries(&dist, &ready.ebpf, &mut steps)) {
        package(&dist, &mut steps);
    }
    if test {
        steps.step("the checksums are those of the artefacts", || {
            cmd::run(cmd::command("sha256sum").args(["--check", "--quiet", SUMS]).current_dir(&dist.out))
        });
        steps.step("the binaries are static, small, complete and run in an empty root", || {
            binaries::test(&dist)
        });
        steps.step("the .deb enforces in a bare Debian root, upgrades, is purged", || install::deb(&dist));
        steps.step("the .rpm installs by rpm's own tools", || install::rpm(&dist));
        steps.step("the commands of the README install as printed", || install::readme(&dist));
        steps.step("the Helm chart makes the objects of kustomize", install::chart);
        steps.step("the image of each architecture runs, and this one's enforces", || {
            install::image(&image::test(&dist)?)
        });
        steps.step("krew installs kubectl bridge from its manifest", || plugin::test(&dist));
        steps
            .step("the chart enforces in a cluster, and kubectl bridge shows its nodes", install::in_cluster);
        steps.step("the clients in Python, C and Rust take ports of the agent", || install::clients(&dist));
        steps.step("bridge-client builds as crates.io would receive it", install::publish);
        if let Some(checker) =
            steps.step_or_not_run("the checker of bridge-client's API", false, setup::semver_checks)
        {
            steps.step("bridge-client's API is compatible with the last release", || {
                install::semver(&checker)
            });
        }
        steps.step("the pages as a site, and their links", docs::main);
        steps.step("the static binary in the lab", || in_lab(&dist));
        steps.step("the aarch64 binary judges traffic on Debian's arm64 kernel", || arm64::test(&dist));
    }
    if test || options.reproducible {
        steps.step("a build in another folder is equal", || again::compare(&dist));
    }
    steps.finish()?;
    for name in artefacts(&dist.out)? {
        let size = fs::metadata(dist.out.join(&name))?.len();
        println!("{:>9} KiB  {name}", size / 1024);
    }
    println!("in {}", dist.out.display());
    Ok(())
}

/// Builds the binary of each architecture; returns whether that succeeded.
fn build_binaries(dist: &Dist, toolchain: &EbpfToolchain, steps: &mut Steps) -> bool {
    let built = steps.step("eBPF objects", || build::objects(toolchain)).and_then(|()| {
        steps.step("static binaries", || {
            fs::create_dir_all(&dist.out).with_context(|| dist.out.display().to_string())?;
            binaries::build(dist, toolchain)
        })
    });
    built.is_some()
}

/// Makes every other artefact of the binaries.
fn package(dist: &Dist, steps: &mut Steps) {
    steps.step("packages", || packages::build(dist));
    steps.step("kubectl plugin", || plugin::build(dist));
    steps.step("image", || image::build(dist));
    steps.step("bill of materials", || binaries::bill_of_materials(dist));
    steps.step("checksums", || checksums(dist));
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
    let names: Vec<_> = artefacts(&dist.out)?.into_iter().filter(|name| name != SUMS).collect();
    let sums = cmd::output(cmd::command("sha256sum").args(&names).current_dir(&dist.out))?;
    fs::write(dist.out.join(SUMS), sums)?;
    Ok(())
}

/// Plays the scenes of the lab with the static binary of this machine's architecture as the agent.
fn in_lab(dist: &Dist) -> Result<()> {
    let lab = build::program(false, "bridge-lab", "lab")?;
    let agent = dist.architectures.iter().find(|architecture| architecture.is_native());
    let agent = dist.binary(*agent.context("no binary for this machine was built")?);
    ensure!(cmd::can_be_root(), "the lab needs root");
    let mut arguments = vec![format!("BRIDGE_AGENT={}", agent.display()).into(), lab.into_os_string()];
    arguments.extend(["--once".into()]);
    cmd::run(cmd::as_root(Path::new("env"), &arguments)?.current_dir(workspace::root()))
}
