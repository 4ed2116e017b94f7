//! Tests of the artefacts where they are installed: packages in a bare Debian root, the chart, the crate.

use std::{
    env,
    ffi::OsString,
    fs,
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
                 debootstrap --variant=minbase --include=systemd-sysv,rpm \"$3\" \"$1\" >\"$1.log\" || { tail -n 20 \"$1.log\" >&2; exit 1; }; \
                 mv \"$1\" \"$2\"";
            let arguments = [part.into_os_string(), base.clone().into_os_string(), SUITE.into()];
            as_root("sh", &[&["-c".into(), script.into(), "sh".into()][..], &arguments].concat())?;
        }
        let root = folder.join(name);
        as_root("rm", &["-rf".into(), "--one-file-system".into(), root.clone().into()])?;
        as_root("cp", &["-a".into(), base.into(), root.clone().into()])?;
        Ok(Self(root))
    }

    /// Runs a test of a file of bridge-tests that works on the root, with these variables.
    fn run_test(&self, name: &[&str], variables: &[(&str, &Path)]) -> Result<()> {
        run_test(name, &[&[("BRIDGE_ROOT", self.0.as_path())], variables].concat())
    }
}

/// Runs the ignored tests of a file of bridge-tests, or those with one name, with these variables.
fn run_test(name: &[&str], variables: &[(&str, &Path)]) -> Result<()> {
    let mut command = cmd::cargo();
    command.args(["test", "--package", "bridge-tests", "--test"]).args(name);
    command.args(["--", "--ignored", "--nocapture"]);
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
/// The older version is the package in `BRIDGE_PREVIOUS_DEB`, else the same files under a lower version.
pub(super) fn deb(dist: &Dist) -> Result<()> {
    let architecture = native(dist)?;
    let older = match env::var_os("BRIDGE_PREVIOUS_DEB") {
        Some(previous) => PathBuf::from(previous),
        None => packages::deb(dist, architecture, OLDER, &dist.work)?,
    };
    let package = packages::deb_path(architecture, &dist.version, &dist.out);
    Root::new("deb")?
        .run_test(&["packages", "deb"], &[("BRIDGE_DEB", &package), ("BRIDGE_DEB_OLDER", &older)])
}

/// Runs the commands of the README.
pub(super) fn readme(dist: &Dist) -> Result<()> {
    native(dist)?;
    kube_assets::ensure()?;
    setup::packages(&[("python3-venv", "the Python package is installed into an environment of its own")])?;
    Root::new("readme")?.run_test(&["install"], &[("BRIDGE_DIST", &dist.out)])
}

/// Reads every .rpm, and installs this machine's over an older version, as [`deb`] does.
pub(super) fn rpm(dist: &Dist) -> Result<()> {
    for architecture in dist.architectures.iter().copied() {
        let rpm = packages::rpm_path(architecture, &dist.version, &dist.out);
        let query = |arguments: &[&str]| cmd::output(cmd::command("rpm").args(arguments).arg(&rpm));
        ensure!(query(&["-qp", "--qf", "%{ARCH}"])? == architecture.machine());
        let files = query(&["-qpl"])?;
        let units = packages::UNITS.map(|unit| format!("/usr/lib/systemd/system/{unit}"));
        for file in units.iter().map(String::as_str).chain(["/usr/bin/bridge-agent"]) {
            ensure!(files.lines().any(|line| line == file), "{} lacks {file}", rpm.display());
        }
        query(&["--checksig", "--nosignature"])?;
    }
    let architecture = native(dist)?;
    let older = packages::rpm(dist, architecture, OLDER, &dist.work)?;
    let package = packages::rpm_path(architecture, &dist.version, &dist.out);
    Root::new("rpm")?
        .run_test(&["packages", "rpm"], &[("BRIDGE_RPM", &package), ("BRIDGE_RPM_OLDER", &older)])
}

/// Compares the Helm chart with the output of kustomize.
pub(super) fn chart() -> Result<()> {
    kube_assets::ensure()?;
    run_test(&["chart"], &[("BRIDGE_HELM", &cluster::helm()?)])
}

/// Runs the agent from the root of an image, in a container of the DaemonSet.
pub(super) fn image(root: &Path) -> Result<()> {
    setup::programs(&[setup::program("crun", "crun", "runs the agent as a container")])?;
    let result = run_test(&["image"], &[("BRIDGE_IMAGE", root)]);
    as_root("rm", &["-rf".into(), "--one-file-system".into(), root.into()])?;
    result
}

/// Installs the chart in a cluster of this machine, and runs `kubectl bridge` in it.
pub(super) fn in_cluster() -> Result<()> {
    cluster::ensure(None)?;
    run_test(&["cluster", "plugin::"], &[("BRIDGE_HELM", &cluster::helm()?)])
}

/// Builds bridge-client from its archive as crates.io would receive it.
pub(super) fn publish() -> Result<()> {
    let arguments = ["publish", "--dry-run", "--locked", "--allow-dirty", "--package", "bridge-client"];
    cmd::run(cmd::cargo().args(arguments).current_dir(workspace::root()))
}

/// Compares the API of bridge-client with that of the last release in the changelog: its tag, else the commit that added its section.
pub(super) fn semver(checker: &Path) -> Result<()> {
    let git = |arguments: &[&str]| {
        let mut git = cmd::command("git");
        cmd::output(git.args(arguments).current_dir(workspace::root()))
    };
    let changelog = fs::read_to_string(workspace::root().join("CHANGELOG.md"))?;
    let mut sections = changelog.lines().filter_map(|line| line.strip_prefix("## "));
    let release = sections.find(|section| *section != "Unreleased").context("CHANGELOG.md has no release")?;
    let tag = format!("v{release}");
    let baseline = match git(&["rev-parse", "--verify", "--quiet", &format!("{tag}^{{commit}}")]) {
        Ok(commit) => commit,
        Err(_) => {
            git(&["log", "--reverse", "--format=%H", "-S", &format!("## {release}\n"), "--", "CHANGELOG.md"])?
        }
    };
    let baseline = baseline.lines().next().with_context(|| {
        format!("neither a tag {tag} nor a commit that added it to CHANGELOG.md is here: fetch the history")
    })?;
    println!("compared with {release}, commit {baseline}");
    let mut check = cmd::command(checker);
    check.args(["semver-checks", "--package", "bridge-client", "--all-features", "--baseline-rev", baseline]);
    cmd::run(check.current_dir(workspace::root()))
}

/// Runs the Python package, the C header and the crate with its examples, the first with the agent of this build.
pub(super) fn clients(dist: &Dist) -> Result<()> {
    let agent = dist.binary(native(dist)?);
    for arguments in [
        &["--package", "bridge-tests", "--test", "clients"][..],
        &["--package", "bridge-tests", "--test", "pool_agent", "the_examples_in_other_languages_work"],
        &["--package", "bridge-client", "--all-features"],
    ] {
        let mut command = cmd::cargo();
        command.arg("test").args(arguments).current_dir(workspace::root()).env("BRIDGE_AGENT", &agent);
        if !cmd::is_root() {
            test::run_tests_by_sudo(&mut command)?;
        }
        cmd::run(&mut command)?;
    }
    Ok(())
}
