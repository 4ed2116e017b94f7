//! Tests of the artefacts where they are installed: packages in a bare Debian root, the chart, the crate.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::{Architecture, Dist, packages};
use crate::{
    cluster, cmd,
    setup::{self, kube_assets},
    test, workspace,
};

/// Suite of the root that packages are tested in.
const SUITE: &str = "bookworm";
/// A version before every release.
const OLDER: &str = "0.0.1";

/// A Debian root, a copy of one that debootstrap makes once.
struct Root(PathBuf);

impl Root {
    /// Makes a fresh root that the tests of `name` may change.
    fn new(name: &str) -> Result<Self> {
        let folder = setup::cache()?.join("roots");
        let base = folder.join(SUITE);
        if !base.join("etc/debian_version").exists() {
            println!("debootstrap {SUITE}, once: about a minute");
            let part = folder.join(format!("{SUITE}.part"));
            let script = "set -eu; rm -rf \"$1\"; mkdir -p \"$1\"; \
                 debootstrap --variant=minbase --include=systemd-sysv \"$3\" \"$1\" >\"$1.log\" || { tail -n 20 \"$1.log\" >&2; exit 1; }; \
                 mv \"$1\" \"$2\"";
            let arguments = [part.into_os_string(), base.clone().into_os_string(), SUITE.into()];
            as_root("sh", &[&["-c".into(), script.into(), "sh".into()][..], &arguments].concat())?;
        }
        let root = folder.join(name);
        as_root("rm", &["-rf".into(), "--one-file-system".into(), root.clone().into()])?;
        as_root("cp", &["-a".into(), base.into(), root.clone().into()])?;
        Ok(Self(root))
    }

    /// Runs a shell command in the root; returns its output.
    fn run(&self, script: &str) -> Result<String> {
        let arguments = [self.0.clone().into_os_string(), "sh".into(), "-euc".into(), script.into()];
        as_root("chroot", &arguments).with_context(|| script.to_owned())
    }

    /// Runs a file of bridge-tests that works on the root, with these variables.
    fn run_test(&self, name: &str, variables: &[(&str, &Path)]) -> Result<()> {
        run_test(name, &[&[("BRIDGE_ROOT", self.0.as_path())], variables].concat())
    }

    /// Runs rpm on the root; its scripts run in the root.
    fn rpm(&self, arguments: &[&str], package: &Path) -> Result<String> {
        let mut all: Vec<OsString> = vec!["--root".into(), self.0.clone().into(), "--nodeps".into()];
        // Debian's rpm asks for it; rpm elsewhere does not know it.
        if Path::new("/etc/debian_version").exists() {
            all.push("--force-debian".into());
        }
        all.extend(arguments.iter().map(Into::into));
        all.push(package.into());
        as_root("rpm", &all)
    }
}

/// Runs the ignored tests of a file of bridge-tests with these variables.
fn run_test(name: &str, variables: &[(&str, &Path)]) -> Result<()> {
    let mut command = cmd::cargo();
    command.args(["test", "--package", "bridge-tests", "--test", name, "--", "--ignored", "--nocapture"]);
    command.current_dir(workspace::root()).envs(variables.iter().copied());
    if !cmd::is_root() {
        test::run_tests_by_sudo(&mut command)?;
    }
    cmd::run(&mut command)
}

fn as_root(program: &str, arguments: &[OsString]) -> Result<String> {
    cmd::output(&mut cmd::as_root(Path::new(program), arguments)?)
}

/// Returns the architecture of this machine if it was built.
fn native(dist: &Dist) -> Result<Architecture> {
    let native = dist.architectures.iter().copied().find(|architecture| architecture.is_native());
    native.context("no package for this machine was built")
}

/// Installs the .deb over an older version in a bare Debian root, with traffic, and removes it.
///
/// The older version is the package in `$BRIDGE_PREVIOUS_DEB`, else the same files under a lower version.
pub(super) fn deb(dist: &Dist) -> Result<()> {
    let architecture = native(dist)?;
    let older = match env::var_os("BRIDGE_PREVIOUS_DEB") {
        Some(previous) => PathBuf::from(previous),
        None => packages::deb(dist, architecture, OLDER, &dist.work)?,
    };
    let package = packages::deb_path(architecture, &dist.version, &dist.out);
    let root = Root::new("deb")?;
    root.run_test("packages", &[("BRIDGE_DEB", &package), ("BRIDGE_DEB_OLDER", &older)])
}

/// Runs the commands of the README.
pub(super) fn readme(dist: &Dist) -> Result<()> {
    native(dist)?;
    kube_assets::ensure()?;
    setup::packages(&[("python3-venv", "the Python package is installed into an environment of its own")])?;
    Root::new("readme")?.run_test("install", &[("BRIDGE_DIST", &dist.out)])
}

/// Installs, replaces and erases the .rpm in a Debian root, by rpm's own tools, and reads every .rpm.
pub(super) fn rpm(dist: &Dist) -> Result<()> {
    for architecture in dist.architectures.iter().copied() {
        let rpm = packages::rpm_path(dist, architecture);
        let query = |arguments: &[&str]| cmd::output(cmd::command("rpm").args(arguments).arg(&rpm));
        ensure!(query(&["-qp", "--qf", "%{ARCH}"])? == architecture.machine());
        let files = query(&["-qpl"])?;
        let units = packages::UNITS.map(|unit| format!("/usr/lib/systemd/system/{unit}"));
        for file in units.iter().map(String::as_str).chain(["/usr/bin/bridge-agent"]) {
            ensure!(files.lines().any(|line| line == file), "{} lacks {file}", rpm.display());
        }
        query(&["--checksig", "--nosignature"])?;
    }
    let package = packages::rpm_path(dist, native(dist)?);
    let root = Root::new("rpm")?;
    root.rpm(&["--install"], &package)?;
    root.rpm(&["--verify", "--nomtime"], Path::new("bridge-agent"))?;
    let version = root.run("bridge-agent --version")?;
    ensure!(version.trim() == format!("bridge-agent {}", dist.version), "{version}");
    root.run("test \"$(stat -c %a /etc/bridge)\" = 700; test -s /usr/share/man/man1/bridge-agent.1.gz")?;
    root.run(
        "cp /usr/share/doc/bridge-agent/examples/node.yaml /etc/bridge/bridge.yaml; bridge-agent check",
    )?;
    root.rpm(&["--upgrade", "--replacepkgs"], &package)?;
    root.rpm(&["--erase"], Path::new("bridge-agent"))?;
    root.run("test -s /etc/bridge/bridge.yaml; ! test -e /usr/bin/bridge-agent; ! test -e /usr/share/doc/bridge-agent")?;
    Ok(())
}

/// Compares the Helm chart with the output of kustomize.
pub(super) fn chart() -> Result<()> {
    kube_assets::ensure()?;
    run_test("chart", &[("BRIDGE_HELM", &cluster::helm()?)])
}

/// Runs the agent from the root of an image, in a container of the DaemonSet.
pub(super) fn image(root: &Path) -> Result<()> {
    setup::programs(&[setup::program("crun", "crun", "runs the agent as a container")])?;
    let result = run_test("image", &[("BRIDGE_IMAGE", root)]);
    as_root("rm", &["-rf".into(), "--one-file-system".into(), root.into()])?;
    result
}

/// Installs the chart in a cluster of this machine, and runs `kubectl bridge` in it.
pub(super) fn in_cluster() -> Result<()> {
    cluster::ensure(None)?;
    run_test("cluster", &[("BRIDGE_HELM", &cluster::helm()?)])
}

/// Builds bridge-client from its archive as crates.io would receive it.
pub(super) fn publish() -> Result<()> {
    let arguments = ["publish", "--dry-run", "--locked", "--allow-dirty", "--package", "bridge-client"];
    cmd::run(cmd::cargo().args(arguments).current_dir(workspace::root()))
}
