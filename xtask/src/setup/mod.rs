//! `cargo xtask setup`: finds and installs the tools that the machine needs.
//!
//! Every tool is probed by looking at files, so that a second call costs next to nothing. A missing one is announced,
//! then installed by the package manager it belongs to.

mod apt;
pub(crate) mod kube_assets;
pub(crate) mod pypi;
mod rust_tools;
pub(crate) mod toolchain;

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cmd;
pub(crate) use rust_tools::cache;
use toolchain::EbpfToolchain;

/// A program that is run by name.
pub(crate) struct Program {
    name: &'static str,
    /// The Debian package that holds it.
    package: &'static str,
    why: &'static str,
}

pub(crate) const fn program(name: &'static str, package: &'static str, why: &'static str) -> Program {
    Program { name, package, why }
}

/// Programs of the lab, the privileged tests and the benchmarks.
const LAB: [Program; 11] = [
    program("iptables", "iptables", "the rules beside those in eBPF, by iptables-nft and iptables-legacy"),
    program("nft", "nftables", "to inspect and measure the rules of iptables-nft"),
    program("ip", "iproute2", "network namespaces, links and routes of the lab"),
    program("tc", "iproute2", "to list the programs attached to an interface"),
    program("bpftool", "bpftool", "to look at maps and programs"),
    program("conntrack", "conntrack", "to look at the kernel's connection tracking"),
    program("ethtool", "ethtool", "offloads of the lab's links, on and off"),
    program("tcpdump", "tcpdump", "to capture packets on a link"),
    program("curl", "curl", "an unmodified client, and the lease API"),
    program("nc", "netcat-openbsd", "an unmodified client and server"),
    program("python3", "python3", "an unmodified client"),
];

/// Programs that only tests need.
const TEST: [Program; 11] = [
    program("bird", "bird2", "the test of routes exported for BIRD asks BIRD itself"),
    program("vtysh", "frr", "the test of routes exported for FRR asks FRR itself"),
    program("dnsmasq", "dnsmasq-base", "the test of routes exported for DHCP serves them"),
    program("busybox", "busybox-static", "its DHCP client reads the routes that were served"),
    program("chromium", "chromium", "the tests of the page open it in a browser"),
    program("chromedriver", "chromium-driver", "the tests of the page steer the browser"),
    program("promtool", "prometheus", "the tests of alerts, metrics and the dashboard"),
    program("crun", "crun", "the tests of the DaemonSet run the agent as a container"),
    program("setpriv", "util-linux", "the tests of privileges run the agent as another user"),
    program("systemd-analyze", "systemd", "to check how much the systemd unit leaves the agent"),
    program("openssl", "openssl", "certificates of the API server of the Kubernetes tests"),
];

/// Programs that start other kernels.
pub(crate) const MACHINE: [Program; 2] = [
    program("qemu-system-x86_64", "qemu-system-x86", "to run other kernels in emulation"),
    program(
        "busybox",
        "busybox-static",
        "the first program of those kernels, before they see this host's files",
    ),
];

/// Programs that build the container image.
pub(crate) const IMAGE: [Program; 3] = [
    program("buildah", "buildah", "builds the container image"),
    program("debootstrap", "debootstrap", "makes the base of the container image"),
    program("strip", "binutils", "takes debugging information out of the agent in the image"),
];

/// Programs that compile libFuzzer.
pub(crate) const FUZZ: [Program; 1] =
    [program("c++", "g++", "libFuzzer, which is in C++, is compiled from source")];

/// The tools that a command needs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scope {
    /// To build everything.
    Build,
    /// And to run the lab.
    Lab,
    /// And to check and test everything.
    Test,
}

/// The tools that [`ensure`] found or installed.
pub(crate) struct Ready {
    /// Builds the kernel side.
    pub(crate) ebpf: EbpfToolchain,
    /// Only with [`Scope::Test`].
    pub(crate) checks: Option<Checks>,
}

/// The programs that check and test.
pub(crate) struct Checks {
    /// `cargo-nextest`.
    pub(crate) nextest: PathBuf,
    /// `cargo-deny`.
    pub(crate) deny: PathBuf,
    /// `cargo-machete`.
    pub(crate) machete: PathBuf,
}

/// Installs the missing tools of `scope`; prints nothing if there are none.
///
/// # Errors
/// Something cannot be installed; the message names the command to type.
pub(crate) fn ensure(scope: Scope) -> Result<Ready> {
    let mut apt = apt::Apt::default();
    if scope >= Scope::Lab {
        let tests: &[Program] = if scope >= Scope::Test { &TEST } else { &[] };
        install(&mut apt, LAB.iter().chain(tests))?;
    }
    let ebpf = toolchain::ensure(&mut apt)?;
    let checks = if scope >= Scope::Test {
        let user_side = cmd::cargo_path();
        let bin = |cargo: &Path| cargo.parent().map(Path::to_owned).unwrap_or_default();
        rust_tools::components(&mut apt, &bin(&user_side), &[rust_tools::RUSTFMT, rust_tools::CLIPPY])?;
        rust_tools::components(&mut apt, &bin(&ebpf.cargo), &[rust_tools::CLIPPY])?;
        let [nextest, deny, machete] =
            [rust_tools::NEXTEST, rust_tools::DENY, rust_tools::MACHETE].map(|tool| tool.ensure());
        Some(Checks { nextest: nextest?, deny: deny?, machete: machete? })
    } else {
        None
    };
    Ok(Ready { ebpf, checks })
}

/// Returns `cargo-auditable`, which embeds the list of dependencies into a binary; builds it if it is missing.
///
/// # Errors
/// The build fails.
pub(crate) fn auditable() -> Result<PathBuf> {
    rust_tools::AUDITABLE.ensure()
}

/// Returns `auditable2cdx`, which makes a bill of materials from that list; builds it if it is missing.
///
/// # Errors
/// The build fails.
pub(crate) fn auditable_to_cyclonedx() -> Result<PathBuf> {
    rust_tools::AUDITABLE_TO_CYCLONEDX.ensure()
}

/// Returns `cargo-semver-checks`, which is installed if it is missing.
///
/// # Errors
/// It cannot be built.
pub(crate) fn semver_checks() -> Result<PathBuf> {
    rust_tools::SEMVER_CHECKS.ensure()
}

/// Sees to it that these programs are there.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn programs(wanted: &[Program]) -> Result<()> {
    install(&mut apt::Apt::default(), wanted.iter())
}

/// Sees to it that these Debian packages are installed, each with the reason that is shown.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn packages(wanted: &[(&str, &str)]) -> Result<()> {
    let installed = |name: &str| Path::new("/var/lib/dpkg/info").join(format!("{name}.list")).exists();
    let with_architecture = |name: &str| {
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        installed(&format!("{name}:{architecture}"))
    };
    let missing = wanted.iter().filter(|(name, _)| !installed(name) && !with_architecture(name));
    apt::Apt::default().install(missing.copied())
}

fn install<'a>(apt: &mut apt::Apt, wanted: impl Iterator<Item = &'a Program>) -> Result<()> {
    let missing = wanted.filter(|program| cmd::find_program(program.name).is_none());
    apt.install(missing.map(|program| (program.package, program.why)))
}

/// `cargo xtask setup`.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn main() -> Result<()> {
    let ready = ensure(Scope::Test)?;
    println!("eBPF toolchain  {}", ready.ebpf.name);
    println!("eBPF linker     {}", ready.ebpf.linker.display());
    if let Some(checks) = ready.checks {
        println!("cargo-nextest   {}", checks.nextest.display());
        println!("cargo-deny      {}", checks.deny.display());
        println!("cargo-machete   {}", checks.machete.display());
    }
    println!("everything is in place");
    Ok(())
}

/// The package that a meta package stands for now, if the lists of packages have it.
///
/// # Errors
/// apt fails.
pub(crate) fn newest_dependency(meta: &str) -> Result<Option<String>> {
    apt::Apt::default().dependency(meta)
}

/// Announces an installation.
fn announce(tool: &str, why: &str) {
    eprintln!("setup: installing {tool}: {why}");
}
